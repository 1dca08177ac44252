/* Devices and errors: how many devices there are, what they say of themselves, and the words for each error code.
 *
 * The devices claim to be of compute capability 9.0, so that torch does not warn; nothing is computed on them. */
#include "runtime.h"

static _Thread_local int device_of_thread;
static _Thread_local cudaError_t last_error;

int current_device(void) { return device_of_thread; }

bool is_device(int device) { return device >= 0 && device < settings.devices; }

cudaError_t fail(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t cudaGetDeviceCount(int *count) {
    ENTER_ALWAYS();
    *count = settings.devices;
    return settings.devices ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device) {
    ENTER_ALWAYS();
    *device = device_of_thread;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    ENTER_ALWAYS();
    if (!is_device(device)) return fail(cudaErrorInvalidDevice);
    device_of_thread = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    ENTER_ALWAYS();
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    ENTER_ALWAYS();
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    ENTER_ALWAYS();
    if (!is_device(device)) return fail(cudaErrorInvalidDevice);
    lock_world();
    size_t memory = settings.memory;
    unlock_world();
    *properties = (struct cudaDeviceProp){
        .totalGlobalMem = memory,
        .major = 9,
        .multiProcessorCount = 1,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .sharedMemPerBlock = 49152,
        .sharedMemPerBlockOptin = 49152,
        .sharedMemPerMultiprocessor = 233472,
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .l2CacheSize = 1 << 20,
        .textureAlignment = 512,
        .asyncEngineCount = 2,
        .unifiedAddressing = 1,
        .canMapHostMemory = 1,
        .canUseHostPointerForRegisteredMem = 1,
        .hostRegisterSupported = 1,
        .memoryPoolsSupported = 1,
        .streamPrioritiesSupported = 1,
        .concurrentKernels = 1,
        .pciBusID = device + 1,
    };
    snprintf(properties->name, sizeof properties->name, "Fake CUDA device");
    memcpy(properties->uuid.bytes, "fake-cuda-dev-", 14);
    properties->uuid.bytes[15] = (char)device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    ENTER_ALWAYS();
    if (!is_device(device)) return fail(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMultiProcessorCount:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrStreamPrioritiesSupported: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    ENTER_ALWAYS();
    if (!is_device(device)) return fail(cudaErrorInvalidDevice);
    snprintf(text, (size_t)size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    ENTER_ALWAYS();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    ENTER_ALWAYS();
    if (!is_device(device) || !is_device(peer)) return fail(cudaErrorInvalidDevice);
    *can = settings.peer_access && device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    ENTER();
    (void)flags;
    if (!is_device(peer)) return fail(cudaErrorInvalidDevice);
    return settings.peer_access ? cudaSuccess : fail(cudaErrorPeerAccessUnsupported);
}

cudaError_t cudaProfilerStart(void); /* their header is not in every wheel */
cudaError_t cudaProfilerStop(void);

EXPORT cudaError_t cudaProfilerStart(void) {
    ENTER_ALWAYS();
    return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStop(void) {
    ENTER_ALWAYS();
    return cudaSuccess;
}

/* ---- errors ------------------------------------------------------------------------------------------------------ */

static const struct {
    cudaError_t code;
    const char *name, *text;
} errors[] = {
#define ERROR(name, text) {name, #name, text}
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInitializationError, "initialization error (the fake CUDA runtime does not survive a fork)"),
    ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    ERROR(cudaErrorInvalidDeviceFunction, "the fake CUDA runtime runs no kernels"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ERROR(cudaErrorLaunchTimeout, "the host waits for work that the test holds (fake CUDA runtime)"),
    ERROR(cudaErrorPeerAccessUnsupported, "peer access is not supported between these two devices"),
    ERROR(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    ERROR(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    ERROR(cudaErrorSymbolNotFound, "named symbol not found"),
    ERROR(cudaErrorNotSupported, "operation not supported by the fake CUDA runtime"),
    ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ERROR(cudaErrorStreamCaptureUnmatched, "capture was not begun in this stream"),
    ERROR(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing stream"),
    ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(cudaErrorStreamCaptureWrongThread, "attempt to end a capture from another thread"),
    ERROR(cudaErrorUnknown, "unknown error"),
#undef ERROR
};

cudaError_t error_of_name(const char *name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(errors[i].name, name)) return errors[i].code;
    return cudaErrorUnknown;
}

EXPORT const char *cudaGetErrorName(cudaError_t code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return errors[i].name;
    return "cudaErrorUnknown";
}

EXPORT const char *cudaGetErrorString(cudaError_t code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return errors[i].text;
    return "error without a text in the fake CUDA runtime";
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }
