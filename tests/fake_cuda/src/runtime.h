/* What the parts of the fake CUDA runtime know of each other.
 *
 * One lock, `world`, guards every list, queue and counter: this is a test tool, and one lock is easy to prove right.
 * It is never held while bytes are copied, while a callback runs or while a thread sleeps. Functions below are called
 * with the world held unless their comment says otherwise; runtime functions (cuda...) take it themselves.
 *
 * Everything asynchronous waits on a Ticket: one promise that one piece of a stream's work will be done.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cuda_runtime_api.h>

struct Op;

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 16
#define PAGE ((size_t)4096)

/* ---- control.c: switches, counters, injected failures, the trace ------------------------------------------------ */

typedef struct Settings {
    /* never change after the start, so they are read without the world */
    int devices;
    bool peer_access; /* what cudaDeviceCanAccessPeer answers */
    size_t addresses; /* bytes of addresses a device */
    /* change under the world */
    size_t memory;            /* bytes a device */
    unsigned latency_us;      /* sleep before each copy and set */
    bool on_demand;           /* stream work runs only when somebody waits for it */
    unsigned hold_timeout_ms; /* how long a host thread waits for held work before it gives up */
} Settings;

extern Settings settings;
extern pthread_mutex_t world;
extern pthread_cond_t progress; /* some ticket was done, or something was released */

static inline void lock_world(void) { pthread_mutex_lock(&world); }
static inline void unlock_world(void) { pthread_mutex_unlock(&world); }

typedef enum { H2D, D2H, D2D, P2P, H2H, COPY_KINDS } CopyKind;
extern const char *const copy_kind_names[COPY_KINDS];

typedef struct CopyCount {
    uint64_t count, bytes, largest;
    uint64_t pageable; /* copies whose host side was not page-locked */
} CopyCount;

typedef struct Counters {
    CopyCount copies[COPY_KINDS];
    uint64_t sets, host_functions, kernels;
    uint64_t device_allocations, device_allocated_bytes;
    uint64_t host_allocations, host_allocated_bytes;
    uint64_t host_registrations, host_registered_bytes;
    uint64_t hazards; /* host memory given back while a copy of it was pending */
    uint64_t races;   /* see races.c */
} Counters;

extern Counters counters;

/* Both without the world. The first line of every runtime function: counts the call, and returns the failure that a
 * test injected, or that an earlier failure left on the device. */
cudaError_t enter(const char *function, bool needs_device);
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define ENTER_IF(needs_device)                                    \
    do {                                                          \
        cudaError_t entered = enter(__func__, needs_device);      \
        if (entered != cudaSuccess) return fail(entered);         \
    } while (0)
#define ENTER() ENTER_IF(true)
#define ENTER_ALWAYS() ENTER_IF(false) /* answers even when the device is broken */

/* What a test injected for the next `what` ("copy", "allocation", "host allocation"); `*late` says when it shows. */
cudaError_t injected(const char *what, bool *late);
void break_device(int device, cudaError_t error); /* every later call fails, as after an illegal access */
cudaError_t device_error(int device);             /* what broke it; cudaSuccess: nothing */
void count_copy(CopyKind kind, size_t bytes, bool pageable);
void note_unsupported(const char *what); /* takes the world itself */
bool is_held(cudaStream_t stream, int copy_kind); /* copy_kind: a CopyKind, or -1 for other work */
bool anything_held(void);
void count_step(int copy_kind); /* one piece of work that `is_held` let pass */
cudaError_t fail(cudaError_t error); /* without the world; sets what cudaGetLastError answers */

/* ---- device.c ---------------------------------------------------------------------------------------------------- */

int current_device(void);
bool is_device(int device);
cudaError_t error_of_name(const char *name); /* cudaErrorUnknown when there is none */

/* ---- races.c ----------------------------------------------------------------------------------------------------- */

typedef struct Clock { /* for each stream's number, up to which of its work all is surely done before */
    uint64_t *at;
    size_t size;
} Clock;

typedef struct Touch { /* some work read or wrote these bytes */
    uintptr_t start, end;
    unsigned stream;
    uint64_t position;
    bool writes;
    const char *name;
} Touch;

void join_clock(Clock *clock, const Clock *other);
EXPORT void fake_cuda_forget_races(void);
void host_knows(const Clock *clock); /* the host has seen that all this is done */
void note_work(struct CUstream_st *stream, const struct Op *op); /* just before it is queued */

/* ---- memory.c ---------------------------------------------------------------------------------------------------- */

typedef enum { DEVICE_MEMORY, PINNED_MEMORY, REGISTERED_MEMORY } BlockKind;

typedef struct Block {
    uintptr_t start, end;
    BlockKind kind;
    int device;
    unsigned flags;
    unsigned pending;   /* queued pieces of work that read or write it */
    bool gone;          /* freed: the struct lives until nothing is pending */
    bool free_queued;   /* cudaFreeAsync was called */
    bool from_pool;     /* cudaMallocAsync */
    Touch *touches;     /* see races.c */
    size_t touch_count, touch_room;
} Block;

void make_arenas(void); /* once, before any thread starts */
cudaError_t allocate_device(int device, size_t bytes, bool from_pool, void **pointer);
void release_device(Block *block);
/* The block that [start, start + bytes) touches. NULL: none. `*inside` is false when the range leaves it. */
Block *block_at(const void *start, size_t bytes, bool *inside);
void hold_block(Block *block);    /* NULL is fine */
void unhold_block(Block *block);
/* Without the world: where a worker may read or write what the program knows as `pointer`. */
char *reach(const void *pointer);

/* ---- streams.c --------------------------------------------------------------------------------------------------- */

typedef struct Ticket {
    unsigned references;
    bool done;
    cudaStream_t stream; /* alive as long as the ticket is not done */
    int device;
    uint64_t position; /* in its stream */
    unsigned queries;    /* how often it was asked for in vain */
    struct timespec when;
    Clock clock; /* of its stream, when it was queued */
} Ticket;

typedef enum { OP_COPY, OP_SET, OP_CALL, OP_RELEASE, OP_MARK } OpKind;

/* One piece of a stream's work. Addresses are the program's own. */
typedef struct Op {
    OpKind kind;
    int copy_kind; /* OP_COPY: a CopyKind, else -1 */
    void *target;
    const void *source;
    size_t width, height, target_pitch, source_pitch; /* height rows of width bytes */
    unsigned char pattern[16];                        /* OP_SET: repeated over the rows */
    size_t pattern_size;
    void *staged; /* the bytes of a pageable source, read when the call was made */
    cudaHostFn_t call;
    void *argument;
    Block *blocks[2]; /* kept alive until the work is done */
    cudaError_t late_error;
    Ticket *ticket;
    Ticket **waits; /* tickets of other streams that must be done first */
    size_t wait_count;
    struct Op *next;
} Op;

typedef struct CUstream_st Stream;

struct CUstream_st {
    uint32_t magic;
    unsigned number; /* for the trace and for people */
    int device, priority;
    unsigned flags;
    bool legacy, started, closing, held;
    Op *head, *tail;
    Ticket *last;          /* of the work queued last */
    uint64_t queued;       /* position of the work queued last */
    uint64_t demanded;     /* on_demand: work up to here may run */
    struct Capture *capture;
    Clock clock;
    pthread_cond_t work;
    struct CUstream_st *next;
};

Stream *stream_of(cudaStream_t handle); /* NULL: not a stream */
/* Lets the stream's next work, `op`, wait for the ticket; NULL is fine. */
void add_wait(Stream *stream, Op *op, Ticket *ticket);
/* Queues the work, or records it when the stream is being captured (then `*ticket` is NULL). Takes over op's
 * `staged` and `waits`, also when it fails. The ticket is borrowed from the stream. */
cudaError_t submit(Stream *stream, Op op, Ticket **ticket);
void demand(Ticket *ticket);
void wake_streams(void);   /* let every worker look at the switches again */
void let_streams_go(void); /* ends the hold of every single stream */
uint64_t pending_work(void);
bool poll_ticket(Ticket *ticket);
void discard(Op *op); /* frees what a piece of work that was never queued owns */
/* These let go of the world while they wait, and answer with what broke the device, if anything did. */
cudaError_t await(Ticket *ticket);
cudaError_t await_device(int device);
cudaError_t await_all_devices(void);
Ticket *keep_ticket(Ticket *ticket); /* NULL is fine in both */
void drop_ticket(Ticket *ticket);

/* ---- copies.c ---------------------------------------------------------------------------------------------------- */

void move_bytes(const Op *op);  /* OP_COPY and OP_SET; without the world */
cudaError_t resolve_blocks(Op *op); /* finds op->blocks again; for work that is launched later */

/* ---- capture.c --------------------------------------------------------------------------------------------------- */

/* For calls that CUDA forbids while somebody captures: the error to return then, and the capture is spoilt. */
cudaError_t refuse_in_capture(void);
void spoil_capture(Stream *stream);
cudaError_t capture_op(Stream *stream, Op op);
cudaError_t join_capture(Stream *stream, struct Capture *capture);
struct Capture *keep_capture(struct Capture *capture); /* NULL is fine in both */
void drop_capture(struct Capture *capture);
