// Lets g++ build the CUDA sources: a launch calls a kernel once for each thread of a small grid.

#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;
using std::frexp;
using std::isnan;
using std::nan;
using std::ldexp;
using std::rint;
using std::sqrt;

struct Three { unsigned x, y, z; };
static thread_local Three threadIdx, blockIdx, blockDim, gridDim;

extern "C" void topo_dask_be_thread(unsigned block, unsigned thread, unsigned blocks,
                                    unsigned threads) {
    blockIdx = {block, 0, 0};
    threadIdx = {thread, 0, 0};
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
}

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

// Threads of a launch run one after another, but two launches may run at once.
template <typename T> static inline T atomicAdd(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> static inline T atomicOr(T* at, T value) {
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> static inline T atomicExch(T* at, T value) {
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> static inline T atomicCAS(T* at, T compare, T value) {
    __atomic_compare_exchange_n(at, &compare, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return compare;
}
template <typename T> static inline T atomicMin(T* at, T value) {
    T old = *at;
    while (value < old && atomicCAS(at, old, value) != old) old = *at;
    return old;
}
template <typename T> static inline T atomicMax(T* at, T value) {
    T old = *at;
    while (value > old && atomicCAS(at, old, value) != old) old = *at;
    return old;
}
