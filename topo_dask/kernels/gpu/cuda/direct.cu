#include "common.h"

// Unit vector from voxel g to centre c, or 0 where that voxel is nearest to it.
__device__ __forceinline__ void towards(const double* c, const long long* g, const double* apart,
                                        float* made) {
    made[0] = made[1] = made[2] = 0;
    if (rint(c[0]) == (double)g[0] && rint(c[1]) == (double)g[1] && rint(c[2]) == (double)g[2])
        return;
    double v[3];
    for (int d = 0; d < 3; ++d) v[d] = (c[d] - (double)g[d]) * apart[d];
    const double norm = fmax(sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]), 1e-8);
    for (int d = 0; d < 3; ++d) made[d] = (float)(v[d] / norm);
}

// local [nz, ny, nx], whose first voxel is (z, y, x) of the volume; centres [K, 3] of numbers 1..
extern "C" __global__ void direct_flow(long long count, const int* __restrict__ local,
                                       const double* __restrict__ centres, long long ny,
                                       long long nx, long long z, long long y, long long x,
                                       double apart_z, double apart_y, double apart_x,
                                       float* __restrict__ flow) {
    const double apart[3] = {apart_z, apart_y, apart_x};
    FOR_EACH_ITEM(i, count) {
        float made[3] = {0, 0, 0};
        const int k = local[i];
        if (k != 0) {
            const long long row = i / nx, g[3] = {row / ny + z, row % ny + y, i % nx + x};
            towards(centres + 3 * (k - 1), g, apart, made);
        }
        for (int d = 0; d < 3; ++d) flow[d * count + i] = made[d];
    }
}

// Squared differences in whole units, at most `most` a voxel, added up by number: the lower 32
// bits into low, the rest into high, so that no sum of 2**32 voxels leaves 64 bits. An item is a
// run of `length` voxels: what lies together is added before it goes to memory.
extern "C" __global__ void flow_errors(long long count, const int* __restrict__ local,
                                       const float* __restrict__ flow4,
                                       const double* __restrict__ centres, long long voxels,
                                       int length, long long ny, long long nx, long long z,
                                       long long y, long long x, double unit, double most,
                                       unsigned long long* low, unsigned long long* high) {
    const double apart[3] = {1, 1, 1};
    FOR_EACH_ITEM(item, count) {
        const long long first = item * length;
        const long long end = first + length < voxels ? first + length : voxels;
        unsigned long long lower = 0, upper = 0;
        for (long long i = first; i < end; ++i) {
            const int k = local[i];
            if (k != 0) {
                const long long row = i / nx, g[3] = {row / ny + z, row % ny + y, i % nx + x};
                float made[3];
                towards(centres + 3 * (k - 1), g, apart, made);
                const double a = (double)made[0] - (double)flow4[4 * i];
                const double b = (double)made[1] - (double)flow4[4 * i + 1];
                const double c = (double)made[2] - (double)flow4[4 * i + 2];
                const double square = fmin(a * a + b * b + c * c, most);
                const unsigned long long whole = (unsigned long long)rint(square / unit);
                lower += whole & 0xffffffffULL;
                upper += whole >> 32;
            }
            if (i + 1 == end || local[i + 1] != k) {
                if (k != 0 && lower) atomicAdd(low + k, lower);
                if (k != 0 && upper) atomicAdd(high + k, upper);
                lower = upper = 0;
            }
        }
    }
}
