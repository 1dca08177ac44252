/* Events: a name for "everything queued in that stream so far".
 *
 * Recording an event queues a mark and remembers the mark's ticket. Whoever waits takes the ticket that the event has
 * at that moment: recording the event again moves nobody who waits already. An event that was never recorded is done.
 *
 * Not simulated: events between processes (IPC).
 */
#include "runtime.h"

struct CUevent_st {
    int device;
    bool timing;
    Ticket *latest;            /* NULL: never recorded, or recorded in a capture */
    struct Capture *captured; /* recorded last in a stream that is captured */
};

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    ENTER();
    *event = malloc(sizeof **event);
    if (!*event) return fail(cudaErrorMemoryAllocation);
    **event = (struct CUevent_st){.device = current_device(), .timing = !(flags & cudaEventDisableTiming)};
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

static void forget_record(cudaEvent_t event) {
    drop_ticket(event->latest);
    drop_capture(event->captured);
    event->latest = NULL;
    event->captured = NULL;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    ENTER_ALWAYS();
    if (!event) return fail(cudaErrorInvalidResourceHandle);
    lock_world();
    forget_record(event);
    unlock_world();
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
    ENTER();
    (void)flags;
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = event && stream && stream->device == event->device ? cudaSuccess : cudaErrorInvalidResourceHandle;
    Ticket *ticket = NULL;
    if (error == cudaSuccess) error = submit(stream, (Op){.kind = OP_MARK, .copy_kind = -1}, &ticket);
    if (error == cudaSuccess) {
        forget_record(event);
        event->latest = keep_ticket(ticket);
        event->captured = ticket ? NULL : keep_capture(stream->capture);
    }
    unlock_world();
    return fail(error);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
    ENTER();
    (void)flags;
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = event && stream ? cudaSuccess : cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess && event->captured) {
        error = join_capture(stream, event->captured);
    } else if (error == cudaSuccess && event->latest && stream->capture) {
        spoil_capture(stream);
        error = cudaErrorStreamCaptureIsolation;
    } else if (error == cudaSuccess && event->latest) {
        Op op = {.kind = OP_MARK, .copy_kind = -1};
        Ticket *ticket;
        add_wait(stream, &op, event->latest);
        if (op.wait_count) error = submit(stream, op, &ticket);
    }
    unlock_world();
    return fail(error);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    ENTER();
    lock_world();
    cudaError_t error = !event            ? cudaErrorInvalidResourceHandle
                        : event->captured ? cudaErrorCapturedEvent
                                          : refuse_in_capture();
    if (error == cudaSuccess && !poll_ticket(event->latest)) error = cudaErrorNotReady;
    unlock_world();
    return fail(error);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER();
    lock_world();
    cudaError_t error = !event            ? cudaErrorInvalidResourceHandle
                        : event->captured ? cudaErrorCapturedEvent
                                          : await(event->latest);
    unlock_world();
    return fail(error);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    ENTER();
    lock_world();
    cudaError_t error = cudaSuccess;
    if (!start || !end || !start->timing || !end->timing || !start->latest || !end->latest)
        error = cudaErrorInvalidResourceHandle;
    else if (!poll_ticket(start->latest) || !poll_ticket(end->latest)) error = cudaErrorNotReady;
    else {
        struct timespec a = start->latest->when, b = end->latest->when;
        *milliseconds = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) * 1e-6);
    }
    unlock_world();
    return fail(error);
}
