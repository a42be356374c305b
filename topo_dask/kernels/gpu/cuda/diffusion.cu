#include "common.h"

// Bit 0..5 (z-, z+, y-, y+, x-, x+) where that neighbour is of the same instance; one beyond the
// array counts as such. local [nz, ny, nx]; links [nz, ny, width], 0 in the background and behind
// the end of a row.
extern "C" __global__ void neighbour_mask(long long count, const int* __restrict__ local,
                                          unsigned char* __restrict__ links, long long nz,
                                          long long ny, long long nx, long long width) {
    FOR_EACH_ITEM(i, count) {
        const long long x = i % width, row = i / width, y = row % ny, z = row / ny;
        const long long at = row * nx + x;
        const int k = x < nx ? local[at] : 0;
        unsigned bits = 0;
        if (k != 0) {
            bits |= (z == 0 || local[at - ny * nx] == k) << 0;
            bits |= (z == nz - 1 || local[at + ny * nx] == k) << 1;
            bits |= (y == 0 || local[at - nx] == k) << 2;
            bits |= (y == ny - 1 || local[at + nx] == k) << 3;
            bits |= (x == 0 || local[at - 1] == k) << 4;
            bits |= (x == nx - 1 || local[at + 1] == k) << 5;
        }
        links[i] = (unsigned char)bits;
    }
}
