/* What CUDA's public headers need from the compiler's own header of this name, which torch's wheels do not ship.
 * CUDARTAPI stands in front of every runtime function, so here it also makes exactly those functions visible. */
#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __annotate__(a)
#define __location__(a)
#define __inline__ inline
#define __forceinline__ inline
#define CUDARTAPI __attribute__((visibility("default")))
#define CUDARTAPI_CDECL
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
