/* Stream capture and graphs: enough for `torch.cuda.graph(...)` to be entered, left, and replayed for copies.
 *
 * A capturing stream keeps its work in a list instead of running it. Other streams join by waiting for an event that
 * was recorded in a capturing one. A graph is that list, in the order of the calls; a launch queues all of it in one
 * stream, which is one of the orders that CUDA permits. What CUDA forbids while somebody captures is refused: waiting,
 * blocking copies, and (unless the thread asked for the relaxed mode) allocations and queries.
 *
 * Not simulated: building or changing graphs by hand, conditional nodes, memory nodes, dependencies between nodes.
 */
#include "runtime.h"

struct CUgraph_st {
    unsigned references; /* the program's handle and the executable graphs */
    Op *ops;
    size_t count;
};

struct CUgraphExec_st {
    struct CUgraph_st *graph;
};

typedef struct Capture {
    unsigned references; /* the streams in it and the events recorded in it */
    unsigned long long id;
    struct CUgraph_st *graph;
    Stream *origin;
    pthread_t thread;
    enum cudaStreamCaptureMode mode;
    bool spoiled, ended;
    Stream **streams;
    size_t stream_count;
} Capture;

static _Thread_local enum cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
static unsigned long long captures_made;
static Capture *running[64]; /* those that have begun and not ended */
static size_t running_count;

Capture *keep_capture(Capture *capture) {
    if (capture) capture->references++;
    return capture;
}

static void drop_graph(struct CUgraph_st *graph) {
    if (!graph || --graph->references) return;
    free(graph->ops);
    free(graph);
}

void drop_capture(Capture *capture) {
    if (!capture || --capture->references) return;
    drop_graph(capture->graph);
    free(capture->streams);
    free(capture);
}

cudaError_t refuse_in_capture(void) {
    if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    bool refused = false;
    for (size_t i = 0; i < running_count; i++) {
        bool mine = pthread_equal(running[i]->thread, pthread_self());
        bool everyones = running[i]->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
        if (!everyones && !(mine && running[i]->mode != cudaStreamCaptureModeRelaxed)) continue;
        running[i]->spoiled = refused = true;
    }
    return refused ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

void spoil_capture(Stream *stream) {
    if (stream->capture) stream->capture->spoiled = true;
}

cudaError_t capture_op(Stream *stream, Op op) {
    struct CUgraph_st *graph = stream->capture->graph;
    if (stream->capture->spoiled || op.staged || op.kind == OP_RELEASE) {
        spoil_capture(stream);
        discard(&op);
        return cudaErrorStreamCaptureInvalidated;
    }
    if (op.kind == OP_MARK) { /* one stream runs the graph in the order of the calls: no marks needed */
        discard(&op);
        return cudaSuccess;
    }
    Op *ops = realloc(graph->ops, (graph->count + 1) * sizeof *ops);
    if (!ops) abort();
    graph->ops = ops;
    graph->ops[graph->count++] = op;
    return cudaSuccess;
}

static void add_stream(Capture *capture, Stream *stream) {
    capture->streams = realloc(capture->streams, (capture->stream_count + 1) * sizeof *capture->streams);
    if (!capture->streams) abort();
    capture->streams[capture->stream_count++] = stream;
    stream->capture = keep_capture(capture);
}

cudaError_t join_capture(Stream *stream, Capture *capture) {
    if (capture->ended) return cudaErrorInvalidValue;
    if (stream->capture == capture) return cudaSuccess;
    if (stream->capture) return cudaErrorStreamCaptureIsolation;
    add_stream(capture, stream);
    return cudaSuccess;
}

static struct CUgraph_st *make_graph(void) {
    struct CUgraph_st *graph = calloc(1, sizeof *graph);
    if (!graph) abort();
    graph->references = 1;
    return graph;
}

static cudaError_t begin(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    Stream *stream = stream_of(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->legacy || running_count == sizeof running / sizeof *running) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture) return cudaErrorIllegalState;
    Capture *capture = malloc(sizeof *capture);
    if (!capture) abort();
    *capture = (Capture){.references = 1, .id = ++captures_made, .graph = make_graph(), .origin = stream,
                         .thread = pthread_self(), .mode = mode};
    add_stream(capture, stream);
    running[running_count++] = capture;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    ENTER();
    lock_world();
    cudaError_t error = begin(handle, mode);
    unlock_world();
    trace("begin capture: %s", cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    ENTER();
    *graph = NULL;
    lock_world();
    Stream *stream = stream_of(handle);
    Capture *capture = stream ? stream->capture : NULL;
    cudaError_t error = cudaSuccess;
    if (!stream) error = cudaErrorInvalidResourceHandle;
    else if (!capture) error = cudaErrorIllegalState;
    else if (capture->origin != stream) error = cudaErrorStreamCaptureUnmatched;
    else if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self()))
        error = cudaErrorStreamCaptureWrongThread;
    else {
        capture->ended = true;
        for (size_t i = 0; i < running_count; i++)
            if (running[i] == capture) running[i--] = running[--running_count];
        if (capture->spoiled) error = cudaErrorStreamCaptureInvalidated;
        else {
            *graph = capture->graph;
            (*graph)->references++;
        }
        for (size_t i = 0; i < capture->stream_count; i++) {
            capture->streams[i]->capture = NULL;
            drop_capture(capture); /* not the last reference: `begin` took one of its own */
        }
        drop_capture(capture);
    }
    unlock_world();
    trace("end capture: %s", cudaGetErrorName(error));
    return fail(error);
}

static enum cudaStreamCaptureStatus status_of(const Stream *stream) {
    return !stream->capture           ? cudaStreamCaptureStatusNone
           : stream->capture->spoiled ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream) *status = status_of(stream);
    unlock_world();
    return stream ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    if (stream) {
        *status = status_of(stream);
        if (id) *id = stream->capture ? stream->capture->id : 0;
        if (graph) *graph = stream->capture ? stream->capture->graph : NULL;
        if (dependencies) *dependencies = NULL;
        if (edges) *edges = NULL;
        if (count) *count = 0;
    }
    unlock_world();
    return stream ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    ENTER_ALWAYS();
    enum cudaStreamCaptureMode before = mode_of_thread;
    mode_of_thread = *mode;
    *mode = before;
    return cudaSuccess;
}

/* ---- graphs ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    ENTER();
    (void)flags;
    if (!graph) return fail(cudaErrorInvalidValue);
    *executable = malloc(sizeof **executable);
    if (!*executable) return fail(cudaErrorMemoryAllocation);
    lock_world();
    graph->references++;
    (*executable)->graph = graph;
    unlock_world();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    ENTER();
    if (nodes) {
        note_unsupported("cudaGraphGetNodes with a list");
        return fail(cudaErrorNotSupported);
    }
    *count = graph->count;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    ENTER_ALWAYS();
    lock_world();
    drop_graph(graph);
    unlock_world();
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    ENTER_ALWAYS();
    lock_world();
    drop_graph(executable->graph);
    unlock_world();
    free(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    ENTER();
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = stream ? cudaSuccess : cudaErrorInvalidResourceHandle;
    for (size_t i = 0; error == cudaSuccess && i < executable->graph->count; i++) {
        Op op = executable->graph->ops[i];
        Ticket *ticket;
        if (op.kind != OP_CALL) error = resolve_blocks(&op);
        if (error == cudaSuccess) error = submit(stream, op, &ticket);
        if (error == cudaSuccess && op.kind == OP_COPY) count_copy((CopyKind)op.copy_kind, op.width * op.height, false);
    }
    unlock_world();
    return fail(error);
}
