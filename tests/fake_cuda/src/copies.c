/* Copies and sets: which memory they touch, when its bytes are read, and when the call returns.
 *
 * What CUDA documents ("API synchronization behavior"), and here in its latest permitted form:
 *
 *     from       to         the call returns            the bytes are read
 *     pinned     device     at once                     when the stream gets there
 *     device     pinned     at once                     when the stream gets there
 *     device     device     at once                     when the stream gets there
 *     pageable   device     when the source was read    before the call returns
 *     device     pageable   when the copy is done       when the stream gets there
 *     host       host       when the copy is done       when the stream gets there
 *
 * Memory is pinned when cudaHostAlloc gave it or cudaHostRegister took it in. A range that only partly lies in such
 * memory, or leaves its device allocation, is refused with cudaErrorInvalidValue.
 *
 * Not simulated: arrays, textures, 3-D copies, symbols.
 */
#include "runtime.h"

typedef enum { READ_AS_DOCUMENTED, READ_NOW, READ_LATE } SourceAccess;

typedef struct Rows {
    size_t width, height, target_pitch, source_pitch;
} Rows;

static size_t span(size_t width, size_t height, size_t pitch) { return height ? (height - 1) * pitch + width : 0; }

void move_bytes(const Op *op) {
    char *target = reach(op->target);
    const char *source = op->staged ? op->staged : op->kind == OP_COPY ? reach(op->source) : NULL;
    for (size_t row = 0; row < op->height; row++) {
        char *to = target + row * op->target_pitch;
        if (op->kind == OP_COPY) memmove(to, source + row * op->source_pitch, op->width);
        else if (op->pattern_size == 1) memset(to, op->pattern[0], op->width);
        else
            for (size_t at = 0; at + op->pattern_size <= op->width; at += op->pattern_size)
                memcpy(to + at, op->pattern, op->pattern_size);
    }
}

cudaError_t resolve_blocks(Op *op) {
    const void *starts[2] = {op->target, op->kind == OP_COPY && !op->staged ? op->source : NULL};
    size_t pitches[2] = {op->target_pitch, op->source_pitch};
    for (int i = 0; i < 2; i++) {
        op->blocks[i] = NULL;
        if (!starts[i]) continue;
        bool inside = true;
        Block *block = block_at(starts[i], span(op->width, op->height, pitches[i]), &inside);
        if (block && (!inside || block->free_queued)) return cudaErrorInvalidValue;
        if (!block && reach(starts[i]) != (const char *)starts[i]) return cudaErrorInvalidValue; /* freed device memory */
        op->blocks[i] = block;
    }
    return cudaSuccess;
}

static bool on_device(const Block *block) { return block && block->kind == DEVICE_MEMORY; }

static bool direction_fits(enum cudaMemcpyKind direction, bool from_device, bool to_device) {
    switch (direction) {
    case cudaMemcpyHostToHost: return !from_device && !to_device;
    case cudaMemcpyHostToDevice: return !from_device && to_device;
    case cudaMemcpyDeviceToHost: return from_device && !to_device;
    case cudaMemcpyDeviceToDevice: return from_device && to_device;
    case cudaMemcpyDefault: return true;
    default: return false;
    }
}

static CopyKind kind_of(const Block *target, const Block *source) {
    if (on_device(source)) return !on_device(target) ? D2H : source->device == target->device ? D2D : P2P;
    return on_device(target) ? H2D : H2H;
}

/* Reads a pageable source now; lets go of the world meanwhile. The blocks of the op are held over it. */
static cudaError_t stage(Op *op) {
    char *bytes = malloc(op->width * op->height);
    if (!bytes) return cudaErrorMemoryAllocation;
    for (int i = 0; i < 2; i++) hold_block(op->blocks[i]);
    unlock_world();
    for (size_t row = 0; row < op->height; row++)
        memcpy(bytes + row * op->width, (const char *)op->source + row * op->source_pitch, op->width);
    lock_world();
    bool gone = op->blocks[0]->gone || op->blocks[0]->free_queued;
    for (int i = 0; i < 2; i++) unhold_block(op->blocks[i]);
    op->staged = bytes;
    op->source_pitch = op->width;
    op->blocks[1] = NULL;
    return gone ? cudaErrorInvalidValue : cudaSuccess;
}

/* Every copy goes through here. `blocking`: the call is one of those that wait. */
static cudaError_t copy(void *target, const void *source, Rows rows, enum cudaMemcpyKind direction, cudaStream_t handle,
                        SourceAccess access, bool blocking) {
    if (!rows.width || !rows.height) return cudaSuccess;
    if (!target || !source) return cudaErrorInvalidValue;
    Op op = {.kind = OP_COPY, .target = target, .source = source, .width = rows.width, .height = rows.height,
             .target_pitch = rows.target_pitch, .source_pitch = rows.source_pitch};
    Ticket *ticket = NULL;
    bool late = false;
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = stream ? resolve_blocks(&op) : cudaErrorInvalidResourceHandle;
    Block *to = op.blocks[0], *from = op.blocks[1];
    if (error == cudaSuccess && !direction_fits(direction, on_device(from), on_device(to)))
        /* page-locked memory is mapped: CUDA takes it as device memory too, but no program here means that */
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess && blocking) error = refuse_in_capture();
    if (error == cudaSuccess) error = injected("copy", &late);
    if (error != cudaSuccess && !late) goto out;
    op.late_error = error;
    CopyKind kind = kind_of(to, from);
    op.copy_kind = (int)kind;
    bool pageable = (kind == H2D && !from) || (kind == D2H && !to) || (kind == H2H && (!from || !to));
    bool returns_when_done = blocking || (kind == D2H && !to) || kind == H2H;
    if (stream->capture && (returns_when_done || pageable)) {
        spoil_capture(stream);
        error = cudaErrorStreamCaptureUnsupported;
        goto out;
    }
    unsigned number = stream->number;
    error = cudaSuccess;
    if (kind == H2D && (access == READ_NOW || (access == READ_AS_DOCUMENTED && !from))) error = stage(&op);
    if (error == cudaSuccess) {
        count_copy(kind, op.width * op.height, pageable);
        error = submit(stream, op, &ticket);
    } else {
        discard(&op);
    }
    if (error == cudaSuccess && returns_when_done && ticket) error = await(ticket);
    unlock_world();
    trace("copy %s %zu bytes%s on stream %u: %s", copy_kind_names[kind], rows.width * rows.height,
          pageable ? " pageable" : "", number, cudaGetErrorName(error));
    return error;
out:
    unlock_world();
    trace("copy refused: %s", cudaGetErrorName(error));
    return error;
}

static Rows one_row(size_t bytes) { return (Rows){bytes, 1, bytes, bytes}; }

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, enum cudaMemcpyKind direction,
                            cudaStream_t stream) {
    ENTER();
    return fail(copy(target, source, one_row(bytes), direction, stream, READ_AS_DOCUMENTED, false));
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, enum cudaMemcpyKind direction) {
    ENTER();
    lock_world();
    bool device_only = on_device(block_at(target, 1, NULL)) && on_device(block_at(source, 1, NULL));
    unlock_world();
    return fail(copy(target, source, one_row(bytes), direction, NULL, READ_AS_DOCUMENTED, !device_only));
}

static cudaError_t copy_rows(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                             size_t height, enum cudaMemcpyKind direction, cudaStream_t stream, bool blocking) {
    if (width > target_pitch || width > source_pitch) return cudaErrorInvalidPitchValue;
    Rows rows = {width, height, target_pitch, source_pitch};
    return copy(target, source, rows, direction, stream, READ_AS_DOCUMENTED, blocking);
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind direction, cudaStream_t stream) {
    ENTER();
    return fail(copy_rows(target, target_pitch, source, source_pitch, width, height, direction, stream, false));
}

cudaError_t cudaMemcpy2D(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                         size_t height, enum cudaMemcpyKind direction) {
    ENTER();
    return fail(copy_rows(target, target_pitch, source, source_pitch, width, height, direction, NULL, true));
}

cudaError_t cudaMemcpyPeerAsync(void *target, int target_device, const void *source, int source_device, size_t bytes,
                                cudaStream_t stream) {
    ENTER();
    lock_world();
    const Block *to = block_at(target, 1, NULL), *from = block_at(source, 1, NULL);
    bool fits = on_device(to) && on_device(from) && to->device == target_device && from->device == source_device;
    unlock_world();
    if (!fits) return fail(cudaErrorInvalidValue);
    return fail(copy(target, source, one_row(bytes), cudaMemcpyDefault, stream, READ_AS_DOCUMENTED, false));
}

/* The copies of a batch have no order among themselves in CUDA; here they run one after the other. */
cudaError_t cudaMemcpyBatchAsync(void *const *targets, const void *const *sources, const size_t *sizes, size_t count,
                                 struct cudaMemcpyAttributes *attributes, size_t *first_of_attributes,
                                 size_t attribute_count, cudaStream_t stream) {
    ENTER();
    if (!stream || stream == cudaStreamLegacy || !count || !attribute_count || attribute_count > count ||
        first_of_attributes[0] != 0)
        return fail(cudaErrorInvalidValue);
    for (size_t a = 1; a < attribute_count; a++)
        if (first_of_attributes[a] <= first_of_attributes[a - 1] || first_of_attributes[a] >= count)
            return fail(cudaErrorInvalidValue);
    size_t a = 0;
    for (size_t i = 0; i < count; i++) {
        while (a + 1 < attribute_count && first_of_attributes[a + 1] <= i) a++;
        SourceAccess access;
        switch (attributes[a].srcAccessOrder) {
        case cudaMemcpySrcAccessOrderStream:
        case cudaMemcpySrcAccessOrderAny: access = READ_LATE; break;
        case cudaMemcpySrcAccessOrderDuringApiCall: access = READ_NOW; break;
        default: return fail(cudaErrorInvalidValue);
        }
        cudaError_t error = copy(targets[i], sources[i], one_row(sizes[i]), cudaMemcpyDefault, stream, access, false);
        if (error != cudaSuccess) return fail(error);
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t handle) {
    ENTER();
    if (!bytes) return cudaSuccess;
    Op op = {.kind = OP_SET, .copy_kind = -1, .target = target, .width = bytes, .height = 1, .target_pitch = bytes,
             .pattern = {(unsigned char)value}, .pattern_size = 1};
    Ticket *ticket;
    lock_world();
    Stream *stream = stream_of(handle);
    cudaError_t error = stream ? resolve_blocks(&op) : cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess && !op.blocks[0]) error = cudaErrorInvalidValue; /* pageable memory */
    if (error == cudaSuccess) error = submit(stream, op, &ticket);
    if (error == cudaSuccess) counters.sets++;
    unlock_world();
    return fail(error);
}

cudaError_t cudaMemset(void *target, int value, size_t bytes) {
    return cudaMemsetAsync(target, value, bytes, NULL);
}
