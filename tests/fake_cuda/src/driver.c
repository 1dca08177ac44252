/* libcuda.so.1: torch's lazy loader wants the driver library to be there. The few functions that answer, answer as the
 * runtime would; all others are stubs that the builder adds (see stubs.c in the build folder). */
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))
enum { CUDA_SUCCESS = 0 };

int cuInit(unsigned flags);
int cuDriverGetVersion(int *version);
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active);
int cuGetErrorString(int error, const char **text);
int cuLogsRegisterCallback(void *function, void *argument, void **handle);
int cuLogsUnregisterCallback(void *handle);
int cudaDriverGetVersion(int *version); /* libcudart.so, which is preloaded */

EXPORT int cuInit(unsigned flags) {
    (void)flags;
    return CUDA_SUCCESS;
}

EXPORT int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }

EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

EXPORT int cuGetErrorString(int error, const char **text) {
    *text = error ? "error of the fake CUDA driver" : "no error";
    return CUDA_SUCCESS;
}

EXPORT int cuLogsRegisterCallback(void *function, void *argument, void **handle) { /* there are no logs to send */
    (void)function, (void)argument;
    *handle = NULL;
    return CUDA_SUCCESS;
}

EXPORT int cuLogsUnregisterCallback(void *handle) {
    (void)handle;
    return CUDA_SUCCESS;
}
