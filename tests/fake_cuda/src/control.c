/* Switches, counters, injected failures, holds and the trace: what a test sets and reads.
 *
 * The environment variables (FAKE_CUDA_..., listed in README.md) are read when the library is loaded. The functions
 * fake_cuda_... change the same things while the program runs; control.py wraps them. `fake_cuda_reset` goes back to
 * what the environment says, so that tests can share a process.
 */
#include <stdarg.h>

#include "runtime.h"

Settings settings;
pthread_mutex_t world = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t progress;
Counters counters;
const char *const copy_kind_names[COPY_KINDS] = {"H2D", "D2H", "D2D", "P2P", "H2H"};

#define ADDRESSES_PER_BYTE ((size_t)64) /* memory.c never hands out an address twice */
enum { RULES = 16, UNSUPPORTED = 64, CALL_SLOTS = 1024 };

typedef struct Rule { /* the failure of one call to come */
    char what[64];
    uint64_t calls_before;
    cudaError_t error;
    bool late;
} Rule;

static Settings initial;
static Rule rules[RULES];
static size_t rule_count;
static cudaError_t broken[MAX_DEVICES];
static const char *unsupported[UNSUPPORTED];
static size_t unsupported_count;
static bool holding;
static unsigned held_kinds; /* bit k: copies of CopyKind k */
static uint64_t steps;      /* held copies that may pass */
static unsigned held_streams;
static bool forked;
static FILE *trace_file;
static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;

static struct Call {
    const char *function;
    uint64_t count;
} calls[CALL_SLOTS]; /* open addressing by the address of the name, which is unique for __func__ */

EXPORT int fake_cuda_fail(const char *what, uint64_t nth, const char *error, int late);
EXPORT void fake_cuda_trace(const char *path);

/* ---- start ------------------------------------------------------------------------------------------------------- */

static void complain(const char *name, const char *value) {
    fprintf(stderr, "fake CUDA runtime: %s=%s is not understood (see tests/fake_cuda/README.md)\n", name, value);
    exit(2);
}

static unsigned long long number(const char *name, unsigned long long otherwise, unsigned long long most) {
    const char *text = getenv(name);
    if (!text) return otherwise;
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (!*text || *end || value > most) complain(name, text);
    return value;
}

static void read_failure(void) { /* what:nth:error[:late] */
    const char *text = getenv("FAKE_CUDA_FAIL");
    if (!text) return;
    char what[64], error[64], late[8] = "";
    unsigned long long nth;
    int fields = sscanf(text, "%63[^:]:%llu:%63[^:]:%7s", what, &nth, error, late);
    if (fields < 3 || (fields == 4 && strcmp(late, "late")) || !fake_cuda_fail(what, nth, error, fields == 4))
        complain("FAKE_CUDA_FAIL", text);
}

static void in_child(void) { forked = true; }

__attribute__((constructor)) static void start(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&progress, &monotonic);
    pthread_condattr_destroy(&monotonic);
    settings.devices = (int)number("FAKE_CUDA_DEVICES", 1, MAX_DEVICES);
    settings.memory = (size_t)number("FAKE_CUDA_MEMORY_MB", 8192, 1 << 15) << 20;
    settings.addresses = settings.memory * ADDRESSES_PER_BYTE;
    settings.latency_us = (unsigned)number("FAKE_CUDA_LATENCY_US", 0, 60000000);
    settings.peer_access = number("FAKE_CUDA_PEER_ACCESS", 0, 1);
    settings.hold_timeout_ms = (unsigned)number("FAKE_CUDA_HOLD_TIMEOUT_MS", 10000, 3600000);
    const char *schedule = getenv("FAKE_CUDA_SCHEDULE");
    if (schedule && strcmp(schedule, "eager") && strcmp(schedule, "on_demand")) complain("FAKE_CUDA_SCHEDULE", schedule);
    settings.on_demand = schedule && !strcmp(schedule, "on_demand");
    read_failure();
    if (getenv("FAKE_CUDA_TRACE")) fake_cuda_trace(getenv("FAKE_CUDA_TRACE"));
    pthread_atfork(NULL, NULL, in_child);
    initial = settings;
    make_arenas();
}

/* ---- for the other files ----------------------------------------------------------------------------------------- */

static void count_call(const char *function) {
    size_t slot = ((uintptr_t)function >> 3) % CALL_SLOTS;
    while (calls[slot].function && calls[slot].function != function) slot = (slot + 1) % CALL_SLOTS;
    calls[slot].function = function;
    calls[slot].count++;
}

cudaError_t injected(const char *what, bool *late) {
    for (size_t i = 0; i < rule_count; i++) {
        if (strcmp(rules[i].what, what)) continue;
        if (rules[i].calls_before) {
            rules[i].calls_before--;
            continue;
        }
        cudaError_t error = rules[i].error;
        *late = rules[i].late;
        rules[i] = rules[--rule_count];
        return error;
    }
    return cudaSuccess;
}

cudaError_t enter(const char *function, bool needs_device) {
    if (forked) return cudaErrorInitializationError; /* the lock may be held by a thread that the child lacks */
    bool late = false;
    lock_world();
    count_call(function);
    cudaError_t error = injected(function, &late);
    if (error == cudaSuccess && needs_device) error = broken[current_device()];
    unlock_world();
    if (error != cudaSuccess) trace("%s fails: %s", function, cudaGetErrorName(error));
    return error;
}

void break_device(int device, cudaError_t error) {
    if (broken[device] == cudaSuccess) broken[device] = error;
    trace("device %d is broken: %s", device, cudaGetErrorName(error));
}

cudaError_t device_error(int device) { return broken[device]; }

void count_copy(CopyKind kind, size_t bytes, bool pageable) {
    CopyCount *count = &counters.copies[kind];
    count->count++;
    count->bytes += bytes;
    count->pageable += pageable;
    if (bytes > count->largest) count->largest = bytes;
}

void note_unsupported(const char *what) {
    lock_world();
    bool known = unsupported_count == UNSUPPORTED;
    for (size_t i = 0; i < unsupported_count; i++) known |= !strcmp(unsupported[i], what);
    if (!known) unsupported[unsupported_count++] = what;
    unlock_world();
    trace("unsupported: %s", what);
}

bool is_held(cudaStream_t stream, int copy_kind) {
    if (stream->held) return true;
    return holding && copy_kind >= 0 && held_kinds >> copy_kind & 1 && !steps;
}

void count_step(int copy_kind) {
    if (holding && held_kinds >> copy_kind & 1 && steps) steps--;
}

bool anything_held(void) { return (holding && !steps) || held_streams; }

void trace(const char *format, ...) {
    pthread_mutex_lock(&trace_lock);
    if (trace_file) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        fprintf(trace_file, "%ld.%06ld ", (long)now.tv_sec, now.tv_nsec / 1000);
        va_list arguments;
        va_start(arguments, format);
        vfprintf(trace_file, format, arguments);
        va_end(arguments);
        fputc('\n', trace_file);
        fflush(trace_file);
    }
    pthread_mutex_unlock(&trace_lock);
}

/* ---- for tests (see control.py) ---------------------------------------------------------------------------------- */

EXPORT void fake_cuda_counters(Counters *out) {
    lock_world();
    *out = counters;
    unlock_world();
}

EXPORT uint64_t fake_cuda_calls(const char *function) {
    uint64_t count = 0;
    lock_world();
    for (size_t i = 0; i < CALL_SLOTS; i++)
        if (calls[i].function && !strcmp(calls[i].function, function)) count += calls[i].count;
    unlock_world();
    return count;
}

/* Newline-separated names of what was called and does not exist here; returns the length without the final NUL. */
EXPORT size_t fake_cuda_unsupported(char *text, size_t room) {
    size_t length = 0;
    if (room) *text = 0;
    lock_world();
    for (size_t i = 0; i < unsupported_count && length < room; i++)
        length += (size_t)snprintf(text + length, room - length, "%s\n", unsupported[i]);
    unlock_world();
    return length;
}

EXPORT void fake_cuda_note_unsupported(const char *what) { note_unsupported(what); }

EXPORT void fake_cuda_set_latency(unsigned microseconds) {
    lock_world();
    settings.latency_us = microseconds;
    unlock_world();
}

EXPORT void fake_cuda_set_on_demand(int on_demand) {
    lock_world();
    settings.on_demand = on_demand;
    wake_streams();
    unlock_world();
}

EXPORT void fake_cuda_set_hold_timeout(unsigned milliseconds) {
    lock_world();
    settings.hold_timeout_ms = milliseconds;
    unlock_world();
}

EXPORT void fake_cuda_set_memory(size_t bytes) {
    lock_world();
    settings.memory = bytes;
    unlock_world();
}

/* The nth call from now (1: the next) of `what` fails. `late`, for copies: the call succeeds, the work breaks the
 * device. Returns 0 when the error's name is not known or there are too many failures to come. */
EXPORT int fake_cuda_fail(const char *what, uint64_t nth, const char *error, int late) {
    cudaError_t code = error_of_name(error);
    if ((code == cudaErrorUnknown && strcmp(error, "cudaErrorUnknown")) || !nth) return 0;
    lock_world();
    bool room = rule_count < RULES;
    if (room) {
        Rule *rule = &rules[rule_count++];
        *rule = (Rule){.calls_before = nth - 1, .error = code, .late = late};
        snprintf(rule->what, sizeof rule->what, "%s", what);
    }
    unlock_world();
    return room;
}

EXPORT void fake_cuda_hold(unsigned kinds) {
    lock_world();
    holding = true;
    held_kinds = kinds;
    steps = 0;
    unlock_world();
}

EXPORT void fake_cuda_step(uint64_t copies) {
    lock_world();
    steps += copies;
    pthread_cond_broadcast(&progress);
    unlock_world();
}

EXPORT void fake_cuda_release(void) {
    lock_world();
    holding = false;
    pthread_cond_broadcast(&progress);
    unlock_world();
}

EXPORT int fake_cuda_hold_stream(cudaStream_t handle, int hold) {
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream && stream->held != (bool)hold) {
        stream->held = hold;
        held_streams += hold ? 1 : -1u;
        pthread_cond_broadcast(&progress);
    }
    unlock_world();
    return stream != NULL;
}

EXPORT uint64_t fake_cuda_pending(void) {
    lock_world();
    uint64_t count = pending_work();
    unlock_world();
    return count;
}

/* Waits for all work, then back to the switches of the environment and to counters of zero. */
EXPORT void fake_cuda_reset(void) {
    lock_world();
    holding = false;
    held_streams = 0;
    let_streams_go();
    settings.latency_us = initial.latency_us;
    settings.on_demand = initial.on_demand;
    settings.memory = initial.memory;
    settings.hold_timeout_ms = initial.hold_timeout_ms;
    wake_streams();
    await_all_devices();
    rule_count = 0;
    unsupported_count = 0;
    memset(broken, 0, sizeof broken);
    memset(calls, 0, sizeof calls);
    counters = (Counters){0};
    unlock_world();
    fake_cuda_forget_races();
    cudaGetLastError(); /* of this thread */
}

EXPORT void fake_cuda_trace(const char *path) {
    pthread_mutex_lock(&trace_lock);
    if (trace_file) fclose(trace_file);
    trace_file = path ? fopen(path, "ae") : NULL;
    pthread_mutex_unlock(&trace_lock);
}
