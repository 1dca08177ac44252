/* Many threads use the runtime at once; every byte is checked. Built with a thread sanitizer it also shows data races
 * of the runtime itself (see test_fake_cuda_threads.py). Prints nothing and returns 0 when all is well. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda_runtime_api.h>

enum { THREADS = 4, ROUNDS = 60, STREAMS = 3, BYTES = 5000 };

void fake_cuda_set_on_demand(int on_demand); /* control.c */
size_t fake_cuda_races(char *text, size_t room); /* races.c */

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t error_ = (call);                                                                 \
        if (error_ != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static cudaEvent_t shared; /* recorded and waited for by all threads */
static int callbacks;

static void count_callback(void *argument) {
    pthread_mutex_lock(&lock);
    callbacks += *(int *)argument;
    pthread_mutex_unlock(&lock);
}

static void check_bytes(const char *bytes, int value) {
    for (int i = 0; i < BYTES; i++)
        if (bytes[i] != (char)value) {
            fprintf(stderr, "byte %d is %d, not %d\n", i, bytes[i], (char)value);
            exit(1);
        }
}

/* host -> device on one stream, device -> device on a second, device -> host on a third, tied by events */
static void relay(cudaStream_t *streams, cudaEvent_t *events, char *source, char *target, int value) {
    char *first, *second;
    static int one = 1;
    CHECK(cudaMalloc((void **)&first, BYTES));
    CHECK(cudaMallocAsync((void **)&second, BYTES, streams[1]));
    memset(source, value, BYTES);
    CHECK(cudaMemcpyAsync(first, source, BYTES, cudaMemcpyHostToDevice, streams[0]));
    CHECK(cudaEventRecord(events[0], streams[0]));
    CHECK(cudaStreamWaitEvent(streams[1], events[0], 0));
    CHECK(cudaMemcpyAsync(second, first, BYTES, cudaMemcpyDeviceToDevice, streams[1]));
    CHECK(cudaEventRecord(events[1], streams[1]));
    CHECK(cudaStreamWaitEvent(streams[2], events[1], 0));
    CHECK(cudaMemcpyAsync(target, second, BYTES, cudaMemcpyDeviceToHost, streams[2]));
    CHECK(cudaLaunchHostFunc(streams[2], count_callback, &one));
    CHECK(cudaEventRecord(events[2], streams[2]));
    if (value % 3 == 0) CHECK(cudaStreamSynchronize(streams[2]));
    else if (value % 3 == 1) CHECK(cudaEventSynchronize(events[2]));
    else
        while (cudaEventQuery(events[2]) == cudaErrorNotReady) {}
    check_bytes(target, value);
    CHECK(cudaStreamWaitEvent(streams[1], events[2], 0));
    CHECK(cudaFreeAsync(second, streams[1]));
    CHECK(cudaFree(first));
}

static void *run(void *argument) {
    int thread = (int)(long)argument;
    cudaStream_t streams[STREAMS];
    cudaEvent_t events[STREAMS];
    char *source, *target, *registered = malloc(BYTES);
    CHECK(cudaSetDevice(thread % 2));
    for (int i = 0; i < STREAMS; i++) {
        CHECK(cudaStreamCreateWithFlags(&streams[i], i ? cudaStreamNonBlocking : cudaStreamDefault));
        CHECK(cudaEventCreate(&events[i]));
    }
    CHECK(cudaHostAlloc((void **)&source, BYTES, cudaHostAllocDefault));
    CHECK(cudaHostRegister(registered, BYTES, cudaHostRegisterDefault));
    target = registered;
    for (int round = 0; round < ROUNDS; round++) {
        if (thread == 0 && round % 16 == 8) fake_cuda_set_on_demand(round % 32 == 8);
        relay(streams, events, source, target, round + thread);
        if (thread % 2 == 0) CHECK(cudaEventRecord(shared, streams[round % STREAMS]));
        else CHECK(cudaStreamWaitEvent(streams[round % STREAMS], shared, 0));
        if (round % 7 == 0) { /* the legacy stream, and pageable memory */
            char *device, here[BYTES], back[BYTES];
            memset(here, round, BYTES);
            CHECK(cudaMalloc((void **)&device, BYTES));
            CHECK(cudaMemcpyAsync(device, here, BYTES, cudaMemcpyHostToDevice, NULL));
            memset(here, 0, BYTES);
            CHECK(cudaMemcpyAsync(back, device, BYTES, cudaMemcpyDeviceToHost, streams[0])); /* a blocking stream */
            check_bytes(back, round);
            CHECK(cudaFree(device));
        }
        if (round % 11 == 0) {
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaHostUnregister(registered));
            CHECK(cudaHostRegister(registered, BYTES, cudaHostRegisterPortable));
            CHECK(cudaStreamDestroy(streams[1]));
            CHECK(cudaStreamCreateWithPriority(&streams[1], cudaStreamNonBlocking, -1));
            CHECK(cudaEventDestroy(events[1]));
            CHECK(cudaEventCreateWithFlags(&events[1], cudaEventDisableTiming));
        }
    }
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaHostUnregister(registered));
    CHECK(cudaFreeHost(source));
    free(registered);
    for (int i = 0; i < STREAMS; i++) {
        CHECK(cudaStreamDestroy(streams[i]));
        CHECK(cudaEventDestroy(events[i]));
    }
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    CHECK(cudaEventCreate(&shared));
    for (long i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, run, (void *)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    char text[4096];
    if (fake_cuda_races(text, sizeof text)) {
        fprintf(stderr, "%s", text);
        return 1;
    }
    size_t available, total;
    for (int device = 0; device < 2; device++) {
        CHECK(cudaSetDevice(device));
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemGetInfo(&available, &total));
        if (available != total) {
            fprintf(stderr, "device %d lost %zu bytes\n", device, total - available);
            return 1;
        }
    }
    if (callbacks != THREADS * ROUNDS) {
        fprintf(stderr, "%d callbacks ran, not %d\n", callbacks, THREADS * ROUNDS);
        return 1;
    }
    return 0;
}
