/* Driver functions by name: torch asks the runtime for them when it starts. Those that driver.c has are handed out;
 * the others become a function that says "not supported", since torch insists on getting an address for each. */
#include <dlfcn.h>

#include "runtime.h"

static int not_supported(void) {
    note_unsupported("a driver function");
    return cudaErrorNotSupported;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    ENTER_ALWAYS();
    (void)version, (void)flags;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    *function = driver ? dlsym(driver, name) : NULL;
    trace("driver function %s: %s", name, *function ? "here" : "not supported");
    if (!*function) *function = (void *)not_supported;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

