// Which voxel an item is.

// Quotient of two numbers that are not negative; most fit 32 bits, which divide much faster.
__device__ inline long long quotient(long long a, long long b) {
    if ((a | b) >> 32) return a / b;
    return (long long)((unsigned)a / (unsigned)b);
}

struct Voxel {
    long long z, y, x;
};

// Voxel number i, in C order, of an array of `height` rows of `width`.
__device__ inline Voxel voxel_of(long long i, long long height, long long width) {
    const long long row = quotient(i, width), plane = quotient(row, height);
    return {plane, row - plane * height, i - row * width};
}
