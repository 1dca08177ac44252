/* Kernels: there is no processor to run them. Code is registered when torch loads and is looked up here by name, so
 * that a launch fails with the name of the kernel that the program asked for (see "unsupported" in control.c). */
#include "runtime.h"

static struct Kernel {
    const void *function;
    const char *name;
} *kernels;
static size_t kernel_count, kernel_room;

void **__cudaRegisterFatBinary(void *binary);
void __cudaRegisterFatBinaryEnd(void **handle);
void __cudaUnregisterFatBinary(void **handle);
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit,
                            void *tid, void *bid, void *block, void *grid, int *warp);
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes,
                       int constant, int global);
char __cudaInitModule(void **handle);
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream);
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream);
cudaError_t __cudaGetKernel(void **kernel, const void *function);
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream);

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    (void)binary;
    return &handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
EXPORT void __cudaUnregisterFatBinary(void **handle) { (void)handle; }

EXPORT void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name,
                                   int limit, void *tid, void *bid, void *block, void *grid, int *warp) {
    (void)handle, (void)device_function, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    lock_world();
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room ? 2 * kernel_room : 4096;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
        if (!kernels) abort();
    }
    kernels[kernel_count++] = (struct Kernel){function, name};
    unlock_world();
}

EXPORT void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes,
                              int constant, int global) {
    (void)handle, (void)variable, (void)address, (void)name, (void)external, (void)bytes, (void)constant, (void)global;
}

EXPORT char __cudaInitModule(void **handle) {
    (void)handle;
    return 0;
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    (void)grid, (void)block, (void)shared, (void)stream;
    return 0; /* so that the launch is made, and refused below */
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = *block = (dim3){1, 1, 1};
    *shared = 0;
    *(void **)stream = NULL;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return cudaSuccess;
}

static cudaError_t refuse(const void *function) {
    const char *name = "a kernel that was never registered";
    lock_world();
    for (size_t i = 0; i < kernel_count; i++)
        if (kernels[i].function == function) name = kernels[i].name;
    counters.kernels++;
    unlock_world();
    note_unsupported(name);
    return fail(cudaErrorInvalidDeviceFunction);
}

EXPORT cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    return refuse(kernel);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    ENTER();
    (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    return refuse(function);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    ENTER();
    (void)configuration, (void)arguments;
    return refuse(function);
}
