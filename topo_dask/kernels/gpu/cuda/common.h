// What all kernels share. Compiled by NVRTC, by nvcc, and after host.h by g++.
//
// A kernel is  extern "C" __global__ void name(long long count, ...)  and does
// FOR_EACH_ITEM(i, count): its items are independent, so threads may run in any order.
// Atomics only on whole numbers, where order makes no difference. No contraction of products and
// sums, so that device and host give the same bits; fma only where it is written.

#define FOR_EACH_ITEM(i, count)                                                                  \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (count);            \
         i += (long long)gridDim.x * blockDim.x)

// Product and sum, rounded once.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
