// Convergence cells: where particles end. Sums are integers, so their order makes no difference.

#include "common.h"

__device__ inline long long cell_along(double position, double size, long long count) {
    const long long cell = (long long)rint(position / size);
    return cell < 0 ? 0 : cell < count ? cell : count - 1;
}

// Cells are centred on multiples of `size`; there are cz * cy * cx. One item a particle.
extern "C" __global__ void cell_numbers(long long count, const double* __restrict__ positions,
                                        long long* __restrict__ numbers, double size,
                                        long long cz, long long cy, long long cx) {
    FOR_EACH_ITEM(i, count) {
        const long long z = cell_along(positions[3 * i], size, cz);
        const long long y = cell_along(positions[3 * i + 1], size, cy);
        const long long x = cell_along(positions[3 * i + 2], size, cx);
        numbers[i] = (z * cy + y) * cx + x;
    }
}

__device__ inline void add_to(long long* sum, long long value) {
    atomicAdd((unsigned long long*)sum, (unsigned long long)value);
}

// Number of particles of each cell, and sums of their offsets from its corner in parts of a voxel.
// `index` is the row of each particle's cell. One item for `each` particles: those beside each
// other often end in the same cell, and are added up before the sums, for which all would queue.
extern "C" __global__ void cell_sums(long long count, const double* __restrict__ positions,
                                     const long long* __restrict__ index,
                                     const long long* __restrict__ corners, long long* counts,
                                     long long* offsets, double parts, long long each,
                                     long long particles) {
    FOR_EACH_ITEM(i, count) {
        const long long end = (i + 1) * each < particles ? (i + 1) * each : particles;
        for (long long j = i * each; j < end;) {
            const long long cell = index[j];
            long long number = 0, z = 0, y = 0, x = 0;
            for (; j < end && index[j] == cell; j++) {
                number++;
                z += (long long)rint((positions[3 * j] - (double)corners[3 * cell]) * parts);
                y += (long long)rint((positions[3 * j + 1] - (double)corners[3 * cell + 1]) * parts);
                x += (long long)rint((positions[3 * j + 2] - (double)corners[3 * cell + 2]) * parts);
            }
            add_to(counts + cell, number);
            add_to(offsets + 3 * cell, z);
            add_to(offsets + 3 * cell + 1, y);
            add_to(offsets + 3 * cell + 2, x);
        }
    }
}
