/* Driver functions by name: torch asks the runtime for them when it starts. All are in libcuda.so.1 (see driver.c), most
 * of them as stubs. */
#include <dlfcn.h>

#include "runtime.h"

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    ENTER_ALWAYS();
    (void)version, (void)flags;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    *function = driver ? dlsym(driver, name) : NULL;
    if (!*function) note_unsupported("a driver function that cuda.h does not declare");
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
