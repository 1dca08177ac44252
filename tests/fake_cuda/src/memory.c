/* Memory: device memory that only the streams may touch, page-locked host memory, and who owns which address.
 *
 * The memory of a device is one file in RAM, mapped twice: where the program sees it every access faults, as on a GPU;
 * the streams go through the other mapping (see `reach`). Addresses are handed out in rising order and never again, so
 * a pointer into freed memory stays wrong for ever: a copy through it is refused (cudaErrorInvalidValue).
 *
 * New memory is filled with 0xA5 and freed memory with 0xDD, so that nothing is right by luck. Freed memory keeps its
 * pages until QUARANTINE bytes more were freed after it, for work that was wrongly queued before and still reads it.
 *
 * Not simulated: managed memory, IPC handles, virtual memory management (cuMem...), memory shared between pools.
 */
#include <search.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"

enum { NEW = 0xA5, FREED = 0xDD };
#define GRAIN ((size_t)512) /* what an allocation counts in */
#define QUARANTINE ((size_t)64 << 20)
#define QUARANTINE_SLOTS 4096

typedef struct Arena {
    uintptr_t start, shadow; /* the two mappings; never change, so workers read them without the world */
    size_t size;
    size_t next; /* what was handed out */
    size_t used; /* what counts against the device's memory */
} Arena;

struct CUmemPoolHandle_st {
    uint64_t used, used_high, release_threshold;
};

static Arena arenas[MAX_DEVICES];
static struct CUmemPoolHandle_st pools[MAX_DEVICES]; /* the default pools of the devices */
static void *blocks; /* all live blocks: a tree by address (see tsearch) */

static struct Freed {
    Arena *arena;
    uintptr_t start;
    size_t bytes;
} quarantine[QUARANTINE_SLOTS]; /* a ring: the oldest at quarantine_first */
static size_t quarantine_first, quarantine_count, quarantine_bytes;

static size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

/* ---- which block an address belongs to --------------------------------------------------------------------------- */

/* Live blocks never overlap, so "overlaps" serves as "equal" and the tree also answers for addresses inside. */
static int by_address(const void *a, const void *b) {
    const Block *x = a, *y = b;
    if (x->end <= y->start) return -1;
    return x->start >= y->end;
}

Block *block_at(const void *start, size_t bytes, bool *inside) {
    uintptr_t at = (uintptr_t)start;
    Block key = {.start = at, .end = at + (bytes ? bytes : 1)};
    Block **found = tfind(&key, &blocks, by_address);
    if (inside) *inside = found && (*found)->start <= key.start && key.end <= (*found)->end;
    return found ? *found : NULL;
}

static Block *block_starting_at(const void *start, BlockKind kind) {
    Block *block = block_at(start, 1, NULL);
    return block && block->start == (uintptr_t)start && block->kind == kind ? block : NULL;
}

static Block *add_block(Block values) {
    Block *block = malloc(sizeof *block);
    if (!block) return NULL;
    *block = values;
    if (!tsearch(block, &blocks, by_address)) {
        free(block);
        return NULL;
    }
    return block;
}

static void free_block(Block *block) {
    free(block->touches);
    free(block);
}

static void drop_block(Block *block) {
    tdelete(block, &blocks, by_address);
    block->gone = true;
    if (!block->pending) free_block(block);
}

void hold_block(Block *block) {
    if (block) block->pending++;
}

void unhold_block(Block *block) {
    if (block && --block->pending == 0 && block->gone) free_block(block);
}

char *reach(const void *pointer) {
    uintptr_t at = (uintptr_t)pointer;
    for (int device = 0; device < settings.devices; device++) {
        const Arena *arena = &arenas[device];
        if (at >= arena->start && at - arena->start < arena->size)
            return (char *)(arena->shadow + (at - arena->start));
    }
    return (char *)at;
}

/* ---- device memory ----------------------------------------------------------------------------------------------- */

static void *map(int file, size_t bytes, int access) {
    void *memory = mmap(NULL, bytes, access, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (memory == MAP_FAILED) {
        perror("fake CUDA runtime: cannot lay out the memory of a device");
        exit(2);
    }
    return memory;
}

void make_arenas(void) {
    for (int device = 0; device < settings.devices; device++) {
        Arena *arena = &arenas[device];
        arena->size = settings.addresses;
        int file = memfd_create("fake_cuda_device", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, (off_t)arena->size)) {
            perror("fake CUDA runtime: cannot make the memory of a device");
            exit(2);
        }
        arena->start = (uintptr_t)map(file, arena->size, PROT_NONE);
        arena->shadow = (uintptr_t)map(file, arena->size, PROT_READ | PROT_WRITE);
        close(file);
    }
}

cudaError_t allocate_device(int device, size_t bytes, bool from_pool, void **pointer) {
    Arena *arena = &arenas[device];
    struct CUmemPoolHandle_st *pool = &pools[device];
    size_t counted = round_up(bytes, GRAIN), pages = round_up(bytes, PAGE);
    *pointer = NULL;
    if (!bytes) return cudaSuccess;
    if (bytes > settings.memory || arena->used + counted > settings.memory) return cudaErrorMemoryAllocation;
    if (arena->size - arena->next < pages) return cudaErrorMemoryAllocation;
    uintptr_t start = arena->start + arena->next;
    Block *block = add_block((Block){
        .start = start, .end = start + bytes, .kind = DEVICE_MEMORY, .device = device, .from_pool = from_pool});
    if (!block) return cudaErrorMemoryAllocation;
    memset(reach((void *)start), NEW, bytes);
    arena->next += pages;
    arena->used += counted;
    if (from_pool) {
        pool->used += counted;
        if (pool->used > pool->used_high) pool->used_high = pool->used;
    }
    counters.device_allocations++;
    counters.device_allocated_bytes += bytes;
    *pointer = (void *)start;
    return cudaSuccess;
}

static void let_pages_go(void) {
    struct Freed *freed = &quarantine[quarantine_first];
    madvise((char *)freed->arena->shadow + (freed->start - freed->arena->start), freed->bytes, MADV_REMOVE);
    quarantine_bytes -= freed->bytes;
    quarantine_first = (quarantine_first + 1) % QUARANTINE_SLOTS;
    quarantine_count--;
}

void release_device(Block *block) {
    Arena *arena = &arenas[block->device];
    size_t bytes = block->end - block->start, counted = round_up(bytes, GRAIN);
    memset(reach((void *)block->start), FREED, bytes);
    if (quarantine_count == QUARANTINE_SLOTS) let_pages_go();
    quarantine[(quarantine_first + quarantine_count++) % QUARANTINE_SLOTS] =
        (struct Freed){arena, block->start, round_up(bytes, PAGE)};
    quarantine_bytes += round_up(bytes, PAGE);
    while (quarantine_bytes > QUARANTINE) let_pages_go();
    arena->used -= counted;
    if (block->from_pool) pools[block->device].used -= counted;
    drop_block(block);
}

/* The failure that a test injected for this allocation, if any. */
static cudaError_t injected_allocation(const char *what) {
    bool late;
    lock_world();
    cudaError_t error = injected(what, &late);
    unlock_world();
    return error;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    ENTER();
    cudaError_t error = injected_allocation("allocation");
    if (error != cudaSuccess) return fail(error);
    lock_world();
    error = refuse_in_capture();
    if (error == cudaSuccess) error = allocate_device(current_device(), bytes, false, pointer);
    unlock_world();
    trace("malloc %zu bytes on device %d: %s", bytes, current_device(), cudaGetErrorName(error));
    return fail(error);
}

/* Waits for the device, as CUDA does: memory is never taken from under queued work of its own device. */
cudaError_t cudaFree(void *pointer) {
    ENTER();
    if (!pointer) return cudaSuccess;
    lock_world();
    cudaError_t error = refuse_in_capture();
    Block *block = block_starting_at(pointer, DEVICE_MEMORY);
    if (error == cudaSuccess && !block) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = await_device(block->device);
    if (error == cudaSuccess) {
        block = block_starting_at(pointer, DEVICE_MEMORY); /* the world was let go of while waiting */
        if (block) release_device(block);
        else error = cudaErrorInvalidValue;
    }
    unlock_world();
    trace("free %p: %s", pointer, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    ENTER();
    lock_world();
    size_t used = arenas[current_device()].used;
    *total = settings.memory;
    *available = used < settings.memory ? settings.memory - used : 0; /* a test may shrink the device under its load */
    unlock_world();
    return cudaSuccess;
}

/* ---- stream-ordered device memory: as much as torch's cudaMallocAsync backend needs --------------------------------- */

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t handle) {
    ENTER();
    cudaError_t error = injected_allocation("allocation");
    if (error != cudaSuccess) return fail(error);
    lock_world();
    Stream *stream = stream_of(handle);
    error = !stream             ? cudaErrorInvalidResourceHandle
            : stream->capture ? cudaErrorNotSupported
                              : allocate_device(stream->device, bytes, true, pointer);
    if (error == cudaErrorMemoryAllocation) { /* as the driver does: let queued frees give their memory back first */
        error = await_device(stream->device);
        if (error == cudaSuccess) error = allocate_device(stream->device, bytes, true, pointer);
    }
    unlock_world();
    trace("mallocAsync %zu bytes: %s", bytes, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t handle) {
    ENTER();
    if (!pointer) return cudaSuccess;
    lock_world();
    Stream *stream = stream_of(handle);
    Block *block = block_starting_at(pointer, DEVICE_MEMORY);
    cudaError_t error = !stream                         ? cudaErrorInvalidResourceHandle
                        : !block || block->free_queued ? cudaErrorInvalidValue
                        : stream->capture              ? cudaErrorNotSupported
                                                       : cudaSuccess;
    if (error == cudaSuccess) {
        Ticket *ticket;
        error = submit(stream, (Op){.kind = OP_RELEASE, .copy_kind = -1, .blocks = {block}}, &ticket);
        if (error == cudaSuccess) block->free_queued = true;
    }
    unlock_world();
    return fail(error);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    ENTER();
    if (!is_device(device)) return fail(cudaErrorInvalidDevice);
    *pool = &pools[device];
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    ENTER();
    lock_world();
    if (attribute == cudaMemPoolAttrReleaseThreshold) pool->release_threshold = *(uint64_t *)value;
    if (attribute == cudaMemPoolAttrUsedMemHigh || attribute == cudaMemPoolAttrReservedMemHigh)
        pool->used_high = pool->used;
    unlock_world();
    return cudaSuccess;
}

/* A pool reserves what is in use and no more, since addresses are never handed out again. */
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    ENTER();
    lock_world();
    switch (attribute) {
    case cudaMemPoolAttrReleaseThreshold: *(uint64_t *)value = pool->release_threshold; break;
    case cudaMemPoolAttrUsedMemCurrent:
    case cudaMemPoolAttrReservedMemCurrent: *(uint64_t *)value = pool->used; break;
    case cudaMemPoolAttrUsedMemHigh:
    case cudaMemPoolAttrReservedMemHigh: *(uint64_t *)value = pool->used_high; break;
    default: *(int *)value = 1;
    }
    unlock_world();
    return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t bytes_to_keep) {
    ENTER();
    (void)pool, (void)bytes_to_keep;
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count) {
    ENTER();
    (void)pool, (void)access, (void)count;
    return cudaSuccess;
}

/* ---- page-locked host memory ------------------------------------------------------------------------------------- */

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    ENTER();
    *pointer = NULL;
    cudaError_t error = injected_allocation("host allocation");
    if (error != cudaSuccess) return fail(error);
    if (!bytes) return cudaSuccess;
    size_t pages = round_up(bytes, PAGE);
    void *memory = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    memset(memory, NEW, bytes);
    lock_world();
    uintptr_t start = (uintptr_t)memory;
    error = refuse_in_capture();
    if (error == cudaSuccess && !add_block((Block){.start = start,
                                                   .end = start + bytes,
                                                   .kind = PINNED_MEMORY,
                                                   .device = current_device(),
                                                   .flags = flags}))
        error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) {
        counters.host_allocations++;
        counters.host_allocated_bytes += bytes;
    }
    unlock_world();
    if (error != cudaSuccess) munmap(memory, pages);
    else *pointer = memory;
    trace("host alloc %zu bytes: %s", bytes, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, cudaHostAllocDefault); }

/* Takes a page-locked block out of the books once nothing uses it. A block with work pending is a bug of the program
 * that CUDA need not report: it is counted as a hazard, then waited for. */
static cudaError_t forget_host(void *pointer, BlockKind kind, cudaError_t unknown, size_t *bytes) {
    Block *block = block_starting_at(pointer, kind);
    cudaError_t error = refuse_in_capture();
    if (error != cudaSuccess) return error;
    if (!block) return unknown;
    if (block->pending) {
        counters.hazards++;
        trace("HAZARD: host memory %p is given back while %u copies of it are pending", pointer, block->pending);
    }
    error = await_all_devices();
    if (error != cudaSuccess) return error;
    block = block_starting_at(pointer, kind); /* the world was let go of while waiting */
    if (!block) return unknown;
    *bytes = block->end - block->start;
    drop_block(block);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
    ENTER();
    if (!pointer) return cudaSuccess;
    size_t bytes = 0;
    lock_world();
    cudaError_t error = forget_host(pointer, PINNED_MEMORY, cudaErrorInvalidValue, &bytes);
    unlock_world();
    if (error == cudaSuccess) munmap(pointer, round_up(bytes, PAGE));
    trace("host free %p: %s", pointer, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    ENTER();
    const unsigned known = cudaHostRegisterPortable | cudaHostRegisterMapped | cudaHostRegisterReadOnly;
    if (!pointer || !bytes || flags & ~known) return fail(cudaErrorInvalidValue);
    uintptr_t start = (uintptr_t)pointer;
    bool late;
    lock_world();
    cudaError_t error = injected("host registration", &late);
    if (error == cudaSuccess) error = refuse_in_capture();
    if (error == cudaSuccess && block_at(pointer, bytes, NULL)) error = cudaErrorHostMemoryAlreadyRegistered;
    if (error == cudaSuccess) {
        Block *block = add_block((Block){.start = start,
                                         .end = start + bytes,
                                         .kind = REGISTERED_MEMORY,
                                         .device = current_device(),
                                         .flags = flags});
        if (!block) error = cudaErrorMemoryAllocation;
    }
    if (error == cudaSuccess) {
        counters.host_registrations++;
        counters.host_registered_bytes += bytes;
    }
    unlock_world();
    trace("host register %zu bytes at %p: %s", bytes, pointer, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaHostUnregister(void *pointer) {
    ENTER();
    size_t bytes = 0;
    lock_world();
    cudaError_t error = forget_host(pointer, REGISTERED_MEMORY, cudaErrorHostMemoryNotRegistered, &bytes);
    unlock_world();
    trace("host unregister %p: %s", pointer, cudaGetErrorName(error));
    return fail(error);
}

cudaError_t cudaHostGetDevicePointer(void **device_pointer, void *pointer, unsigned flags) {
    ENTER();
    lock_world();
    Block *block = block_at(pointer, 1, NULL);
    unlock_world();
    if (!block || block->kind == DEVICE_MEMORY || flags) return fail(cudaErrorInvalidValue);
    *device_pointer = pointer;
    return cudaSuccess;
}

cudaError_t cudaHostGetFlags(unsigned *flags, void *pointer) {
    ENTER();
    lock_world();
    Block *block = block_at(pointer, 1, NULL);
    bool known = block && block->kind != DEVICE_MEMORY;
    if (known) *flags = block->flags;
    unlock_world();
    return known ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    ENTER();
    lock_world();
    Block *block = block_at(pointer, 1, NULL);
    *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -2};
    if (block) {
        bool on_device = block->kind == DEVICE_MEMORY;
        attributes->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
        attributes->device = block->device;
        attributes->devicePointer = (void *)pointer;
        attributes->hostPointer = on_device ? NULL : (void *)pointer;
    }
    unlock_world();
    return cudaSuccess;
}
