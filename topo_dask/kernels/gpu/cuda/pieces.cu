#include "common.h"

// 6-connected pieces, by the links of neighbour_mask: each voxel gets the first voxel of its
// piece. Indices are into the padded array and fit 32 bits: more voxels fit no device.
//
// Source: Komura (2015), Comput. Phys. Commun. 194, 54 (label equivalence without iterations).

__device__ __forceinline__ unsigned find_root(const volatile unsigned int* parent,
                                              unsigned i) {
    unsigned up = parent[i];  // others may be changing it: read once
    while (up != i) i = up, up = parent[i];
    return i;
}

// The larger root is hung below the smaller one, so the result does not depend on any order.
__device__ __forceinline__ void unite(unsigned int* parent, unsigned a, unsigned b) {
    while (true) {
        a = find_root(parent, a);
        b = find_root(parent, b);
        if (a == b) return;
        if (a < b) {
            const unsigned swapped = a;
            a = b, b = swapped;
        }
        const unsigned before = atomicMin(parent + a, b);
        if (before == a) return;
        a = before;
    }
}

extern "C" __global__ void each_its_own(long long count, unsigned int* __restrict__ parent) {
    FOR_EACH_ITEM(i, count) parent[i] = (unsigned)i;
}

extern "C" __global__ void unite_linked(long long count, unsigned int* parent,
                                        const unsigned char* __restrict__ links, long long nz,
                                        long long ny, long long nx, long long width) {
    FOR_EACH_ITEM(i, count) {
        const unsigned bits = links[i];
        const long long x = i % width, row = i / width, y = row % ny, z = row / ny;
        if ((bits & 2) && z < nz - 1) unite(parent, (unsigned)i, (unsigned)(i + ny * width));
        if ((bits & 8) && y < ny - 1) unite(parent, (unsigned)i, (unsigned)(i + width));
        if ((bits & 32) && x < nx - 1) unite(parent, (unsigned)i, (unsigned)(i + 1));
    }
}

// Each entry is written by its own thread alone, and whatever others read of it meanwhile leads to
// the same root.
extern "C" __global__ void point_to_roots(long long count, unsigned int* parent) {
    FOR_EACH_ITEM(i, count) parent[i] = find_root(parent, (unsigned)i);
}
