/* Streams: each is a queue and a worker thread, started with the first work. Work of one stream runs in order.
 *
 * When a worker may take the next piece of work:
 * - every ticket that the work waits for is done: events, and the legacy default stream's rule. That stream (handle
 *   NULL or cudaStreamLegacy, one a device) waits for all earlier work of the device's blocking streams, and they wait
 *   for all earlier work of it. torch makes its streams non-blocking (cudaStreamNonBlocking): no rule binds those.
 * - in the on-demand schedule, somebody waits for it: the latest moment that CUDA allows.
 * - no test holds it.
 *
 * Not simulated: priorities have no effect, there is no limit on copies at a time, cudaStreamPerThread is one blocking
 * stream a device and not one a thread.
 */
#include <errno.h>
#include <signal.h>

#include "runtime.h"

enum { STREAM_MAGIC = 0x57EA, PER_THREAD = 1 };
/* A query that finds work unfinished does not let it start until it was repeated this often: a loop that polls must
 * end, but the few queries of torch's allocators must not hide a missing wait. */
enum { QUERIES_THAT_DEMAND = 64 };

static Stream *streams; /* all that were made and not destroyed, and the default streams */
static Clock ended[MAX_DEVICES]; /* of streams that were destroyed, whose work is done */
static Stream *default_streams[MAX_DEVICES][2]; /* the legacy and the per-thread one */
static unsigned streams_made;

/* ---- tickets ----------------------------------------------------------------------------------------------------- */

Ticket *keep_ticket(Ticket *ticket) {
    if (ticket) ticket->references++;
    return ticket;
}

void drop_ticket(Ticket *ticket) {
    if (!ticket || --ticket->references) return;
    free(ticket->clock.at);
    free(ticket);
}

void demand(Ticket *ticket) {
    if (ticket->done || ticket->stream->demanded >= ticket->position) return;
    ticket->stream->demanded = ticket->position;
    pthread_cond_signal(&ticket->stream->work);
}

bool poll_ticket(Ticket *ticket) {
    if (!ticket) return true;
    if (ticket->done) {
        host_knows(&ticket->clock);
        return true;
    }
    if (++ticket->queries >= QUERIES_THAT_DEMAND) demand(ticket);
    return false;
}

static struct timespec in_milliseconds(unsigned milliseconds) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += milliseconds / 1000;
    at.tv_nsec += (long)(milliseconds % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) at.tv_sec++, at.tv_nsec -= 1000000000;
    return at;
}

/* A wait for held work would never end, so it fails after a while; any other wait is as long as the work. */
cudaError_t await(Ticket *ticket) {
    if (!ticket) return cudaSuccess;
    keep_ticket(ticket);
    struct timespec deadline = {0};
    cudaError_t error = cudaSuccess;
    while (!ticket->done && error == cudaSuccess) {
        demand(ticket);
        if (!anything_held()) {
            pthread_cond_wait(&progress, &world);
            continue;
        }
        if (!deadline.tv_sec) deadline = in_milliseconds(settings.hold_timeout_ms);
        bool late = pthread_cond_timedwait(&progress, &world, &deadline) == ETIMEDOUT;
        if (late && anything_held() && !ticket->done) error = cudaErrorLaunchTimeout;
    }
    if (ticket->done) host_knows(&ticket->clock);
    if (error == cudaSuccess) error = device_error(ticket->device);
    drop_ticket(ticket);
    return error;
}

static cudaError_t await_streams(int device) {
    size_t count = 0, room = 0;
    Ticket **tickets = NULL;
    for (Stream *s = streams; s; s = s->next) {
        if ((device >= 0 && s->device != device) || !s->last) continue;
        if (count == room) {
            room = room ? 2 * room : 16;
            tickets = realloc(tickets, room * sizeof *tickets);
            if (!tickets) abort();
        }
        tickets[count++] = keep_ticket(s->last);
    }
    cudaError_t error = cudaSuccess;
    for (size_t i = 0; i < count; i++) demand(tickets[i]); /* so that none waits for the one before */
    for (size_t i = 0; i < count; i++) {
        if (error == cudaSuccess) error = await(tickets[i]);
        drop_ticket(tickets[i]);
    }
    free(tickets);
    /* Streams that were destroyed and have ended since are on no list any more. */
    for (int d = 0; d < MAX_DEVICES; d++)
        if (error == cudaSuccess && (device == -1 || device == d)) host_knows(&ended[d]);
    return error;
}

cudaError_t await_device(int device) { return await_streams(device); }
cudaError_t await_all_devices(void) { return await_streams(-1); }

/* ---- the worker -------------------------------------------------------------------------------------------------- */

static bool may_start(const Stream *stream) {
    return stream->head && (!settings.on_demand || stream->closing || stream->demanded >= stream->head->ticket->position);
}

static void run(Op *op, unsigned latency_us) {
    bool moves = op->kind == OP_COPY || op->kind == OP_SET;
    if (moves && latency_us) {
        struct timespec pause = {latency_us / 1000000, (long)(latency_us % 1000000) * 1000};
        nanosleep(&pause, NULL);
    }
    if (op->late_error != cudaSuccess) return;
    if (moves) move_bytes(op);
    else if (op->kind == OP_CALL) op->call(op->argument);
}

void discard(Op *op) {
    for (size_t i = 0; i < op->wait_count; i++) drop_ticket(op->waits[i]);
    free(op->waits);
    free(op->staged);
}

static void finish(Stream *stream, Op *op) {
    if (op->late_error != cudaSuccess) break_device(stream->device, op->late_error);
    for (int i = 0; i < 2; i++) unhold_block(op->blocks[i]);
    if (op->kind == OP_RELEASE) release_device(op->blocks[0]);
    discard(op);
    clock_gettime(CLOCK_MONOTONIC, &op->ticket->when);
    op->ticket->done = true;
    drop_ticket(op->ticket);
    free(op);
    pthread_cond_broadcast(&progress);
}

static void forget_stream(Stream *stream) {
    for (Stream **s = &streams; *s; s = &(*s)->next)
        if (*s == stream) {
            *s = stream->next;
            break;
        }
    drop_ticket(stream->last);
    join_clock(&ended[stream->device], &stream->clock);
    free(stream->clock.at);
    pthread_cond_destroy(&stream->work);
    stream->magic = 0;
    free(stream);
}

static void *work(void *argument) {
    Stream *stream = argument;
    lock_world();
    for (;;) {
        while (!may_start(stream) && !(stream->closing && !stream->head)) pthread_cond_wait(&stream->work, &world);
        Op *op = stream->head;
        if (!op) break;
        for (size_t i = 0; i < op->wait_count; i++)
            while (!op->waits[i]->done) {
                demand(op->waits[i]);
                pthread_cond_wait(&progress, &world);
            }
        while (is_held(stream, op->copy_kind)) pthread_cond_wait(&progress, &world);
        if (op->copy_kind >= 0) count_step(op->copy_kind);
        unsigned latency = settings.latency_us;
        unlock_world();
        run(op, latency);
        lock_world();
        stream->head = op->next;
        if (!stream->head) stream->tail = NULL;
        finish(stream, op);
    }
    forget_stream(stream);
    unlock_world();
    return NULL;
}

/* ---- queueing ---------------------------------------------------------------------------------------------------- */

void add_wait(Stream *stream, Op *op, Ticket *ticket) {
    if (!ticket) return;
    join_clock(&stream->clock, &ticket->clock); /* an order in any case, also when there is nothing to wait for */
    if (ticket->done) return;
    op->waits = realloc(op->waits, (op->wait_count + 1) * sizeof *op->waits);
    if (!op->waits) abort();
    op->waits[op->wait_count++] = keep_ticket(ticket);
}

static void start_worker(Stream *stream) {
    sigset_t every, before; /* the program's signals are for the program's threads */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, stream)) abort();
    pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    stream->started = true;
}

cudaError_t submit(Stream *stream, Op op, Ticket **ticket) {
    *ticket = NULL;
    if (stream->capture) return capture_op(stream, op);
    if (stream->legacy) {
        for (Stream *s = streams; s; s = s->next)
            if (s != stream && s->device == stream->device && !(s->flags & cudaStreamNonBlocking)) {
                if (s->capture) {
                    discard(&op);
                    return cudaErrorStreamCaptureImplicit;
                }
                add_wait(stream, &op, s->last);
            }
    } else if (!(stream->flags & cudaStreamNonBlocking)) {
        Stream *legacy = default_streams[stream->device][0];
        if (legacy) add_wait(stream, &op, legacy->last);
    }
    Op *queued = malloc(sizeof *queued);
    Ticket *made = malloc(sizeof *made);
    if (!queued || !made) abort();
    *made = (Ticket){.references = 2 /* the op's and the stream's */,
                     .stream = stream,
                     .device = stream->device,
                     .position = ++stream->queued};
    note_work(stream, &op);
    join_clock(&made->clock, &stream->clock);
    *queued = op;
    queued->ticket = made;
    queued->next = NULL;
    for (int i = 0; i < 2; i++) hold_block(queued->blocks[i]);
    if (stream->tail) stream->tail->next = queued;
    else stream->head = queued;
    stream->tail = queued;
    drop_ticket(stream->last);
    stream->last = made;
    if (!stream->started) start_worker(stream);
    pthread_cond_signal(&stream->work);
    *ticket = made;
    return cudaSuccess;
}

void wake_streams(void) {
    for (Stream *s = streams; s; s = s->next) pthread_cond_signal(&s->work);
    pthread_cond_broadcast(&progress);
}

void let_streams_go(void) {
    for (Stream *s = streams; s; s = s->next) s->held = false;
}

uint64_t pending_work(void) {
    uint64_t count = 0;
    for (Stream *s = streams; s; s = s->next)
        for (Op *op = s->head; op; op = op->next) count++;
    return count;
}

/* ---- streams for the program ------------------------------------------------------------------------------------- */

static Stream *make_stream(int device, unsigned flags, int priority) {
    Stream *stream = calloc(1, sizeof *stream);
    if (!stream) abort();
    *stream = (Stream){.magic = STREAM_MAGIC, .number = ++streams_made, .device = device, .flags = flags,
                       .priority = priority, .next = streams};
    pthread_cond_init(&stream->work, NULL);
    return streams = stream;
}

Stream *stream_of(cudaStream_t handle) {
    if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread)
        return handle->magic == STREAM_MAGIC ? handle : NULL;
    int which = handle == cudaStreamPerThread ? PER_THREAD : 0;
    Stream **stream = &default_streams[current_device()][which];
    if (!*stream) {
        *stream = make_stream(current_device(), cudaStreamDefault, 0);
        (*stream)->legacy = which != PER_THREAD;
    }
    return *stream;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    ENTER();
    if (flags & ~(unsigned)cudaStreamNonBlocking) return fail(cudaErrorInvalidValue);
    lock_world();
    *stream = make_stream(current_device(), flags, priority);
    unsigned number = (*stream)->number;
    unlock_world();
    trace("stream %u on device %d, %s, priority %d", number, current_device(),
          flags & cudaStreamNonBlocking ? "non-blocking" : "blocking", priority);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0); }

/* Returns at once; work that is queued still runs. */
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    ENTER();
    lock_world();
    Stream *stream = handle ? stream_of(handle) : NULL;
    cudaError_t error = cudaSuccess;
    if (!stream || stream->closing || stream == default_streams[stream->device][0] ||
        stream == default_streams[stream->device][PER_THREAD])
        error = cudaErrorInvalidResourceHandle;
    else if (stream->capture) error = cudaErrorStreamCaptureUnsupported;
    if (error == cudaSuccess) {
        stream->closing = true;
        if (stream->started) pthread_cond_signal(&stream->work);
        else forget_stream(stream);
    }
    unlock_world();
    return fail(error);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream) *priority = stream->priority;
    unlock_world();
    return stream ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream) *flags = stream->flags;
    unlock_world();
    return stream ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int *device) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream) *device = stream->device;
    unlock_world();
    return stream ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = cudaErrorInvalidResourceHandle;
    if (stream && stream->capture) {
        spoil_capture(stream);
        error = cudaErrorStreamCaptureUnsupported;
    } else if (stream && stream->legacy) {
        Ticket *ticket; /* the legacy stream's rule counts for waiting on it as well */
        error = submit(stream, (Op){.kind = OP_MARK, .copy_kind = -1}, &ticket);
        if (error == cudaSuccess) error = await(ticket);
    } else if (stream) {
        error = await(stream->last);
    }
    unlock_world();
    return fail(error);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = !stream                        ? cudaErrorInvalidResourceHandle
                        : stream->capture              ? cudaErrorStreamCaptureUnsupported
                        : poll_ticket(stream->last) ? cudaSuccess
                                                       : cudaErrorNotReady;
    if (error == cudaErrorStreamCaptureUnsupported) spoil_capture(stream);
    unlock_world();
    return fail(error);
}

cudaError_t cudaDeviceSynchronize(void) {
    ENTER();
    lock_world();
    cudaError_t error = refuse_in_capture();
    if (error == cudaSuccess) error = await_device(current_device());
    unlock_world();
    return fail(error);
}

static cudaError_t queue_call(cudaStream_t handle, cudaHostFn_t call, void *argument, bool may_be_captured) {
    Op op = {.kind = OP_CALL, .copy_kind = -1, .call = call, .argument = argument};
    Ticket *ticket;
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = !stream                               ? cudaErrorInvalidResourceHandle
                        : stream->capture && !may_be_captured ? cudaErrorStreamCaptureUnsupported
                                                              : submit(stream, op, &ticket);
    if (error == cudaSuccess) counters.host_functions++;
    unlock_world();
    return error;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *argument) {
    ENTER();
    return fail(call ? queue_call(stream, call, argument, true) : cudaErrorInvalidValue);
}

typedef struct Callback {
    cudaStream_t stream;
    cudaStreamCallback_t call;
    void *argument;
} Callback;

static void run_callback(void *argument) {
    Callback callback = *(Callback *)argument;
    free(argument);
    callback.call(callback.stream, cudaSuccess, callback.argument);
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *argument, unsigned flags) {
    ENTER();
    if (!call || flags) return fail(cudaErrorInvalidValue);
    Callback *callback = malloc(sizeof *callback);
    if (!callback) abort();
    *callback = (Callback){stream, call, argument};
    cudaError_t error = queue_call(stream, run_callback, callback, false);
    if (error != cudaSuccess) free(callback);
    return fail(error);
}
