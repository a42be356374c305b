// Overlapping tiles into one block: weights, weighted mean, largest value, nearest centre, highest
// weight.
//
// One item a voxel of the tile; it takes all channels, so that its weight is made once and nothing
// but values and sums is read and written. Arrays of several types come as bytes, with the number
// of their type. A part of a block comes as the address of its first voxel and the elements
// between its channels, planes and rows. Every operation is the CPU's, in its order and type.

#include "common.h"
#include "voxels.h"

struct View {
    long long channel, plane, row;
    __device__ long long at(const Voxel& v) const { return v.z * plane + v.y * row + v.x; }
};

// RUN(T) for the type T of that number; all items of a launch take the same way.
#define BY_TYPE(type, RUN)                                                                       \
    switch (type) {                                                                              \
        case 0: RUN(signed char);                                                                \
        case 1: RUN(unsigned char);                                                              \
        case 2: RUN(short);                                                                      \
        case 3: RUN(unsigned short);                                                             \
        case 4: RUN(int);                                                                        \
        case 5: RUN(unsigned int);                                                               \
        case 6: RUN(long long);                                                                  \
        case 7: RUN(unsigned long long);                                                         \
        case 8: RUN(float);                                                                      \
        default: RUN(double);                                                                    \
    }
#define IS_FLOAT(type) ((type) == 8)

// A value of any type as a float or double.
template <typename Mean>
__device__ inline Mean loaded(const unsigned char* values, int type, long long i) {
#define LOAD(T) return (Mean)((const T*)values)[i]
    BY_TYPE(type, LOAD)
}

template <typename Mean>
__device__ inline void store(unsigned char* values, int type, long long i, Mean value) {
#define STORE(T) ((T*)values)[i] = (T)value; return
    BY_TYPE(type, STORE)
}

template <typename T>
__device__ inline void copy_one(unsigned char* to, long long i, const unsigned char* from,
                                long long j) {
    ((T*)to)[i] = ((const T*)from)[j];
}

// Copy one value of so many bytes.
__device__ inline void copy(unsigned char* to, long long i, const unsigned char* from,
                            long long j, int bytes) {
    if (bytes == 1) copy_one<unsigned char>(to, i, from, j);
    else if (bytes == 2) copy_one<unsigned short>(to, i, from, j);
    else if (bytes == 4) copy_one<unsigned int>(to, i, from, j);
    else copy_one<unsigned long long>(to, i, from, j);
}

// Larger than what is there, or not a number (which stays, in whichever order tiles come).
template <typename T>
__device__ inline bool is_larger(T value, T old) {
    return value > old || value != value;
}

__device__ inline bool larger(const unsigned char* values, long long i,
                              const unsigned char* old, long long j, int type) {
#define LARGER(T) return is_larger(((const T*)values)[i], ((const T*)old)[j])
    BY_TYPE(type, LARGER)
}

// What a tile weighs: along the last axis, times along those before. One item a voxel.
extern "C" __global__ void blend_weight(long long count, const double* __restrict__ rows,
                                        const double* __restrict__ along,
                                        float* __restrict__ weight, long long width) {
    FOR_EACH_ITEM(i, count) {
        const long long row = quotient(i, width);
        weight[i] = (float)(rows[row] * along[i - row * width]);
    }
}

template <typename Mean>
__device__ inline void move_towards(Mean* mean, Mean value, Mean share) {
    const Mean step = (value - *mean) * share;
    // An infinite value stays infinite, whichever tile comes first.
    const bool finite = step - step == (Mean)0;
    *mean += finite ? step : value;
}

template <typename Mean>
__device__ inline void add_values(long long count, Mean* mean, View m, double* weights, View w,
                                  const unsigned char* values, int type, const double* along,
                                  long long channels, long long height, long long width) {
    const double *wz = along, *wy = wz + quotient(quotient(count, width), height);
    const double* wx = wy + height;
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(i, height, width);
        const double weight = wz[v.z] * wy[v.y] * wx[v.x];
        const double sum = weights[w.at(v)] + weight;
        weights[w.at(v)] = sum;
        for (long long c = 0; c < channels; c++)
            move_towards(mean + c * m.channel + m.at(v), loaded<Mean>(values, type, c * count + i),
                         (Mean)(weight / sum));
    }
}

// `along`: the tile's weights along z, y and x.
extern "C" __global__ void add_tile(long long count, unsigned char* mean, int mean_type,
                                    long long mean_channel, long long mean_plane,
                                    long long mean_row, double* weights, long long weights_plane,
                                    long long weights_row, const unsigned char* values, int type,
                                    const double* along, long long channels, long long height,
                                    long long width) {
    const View m = {mean_channel, mean_plane, mean_row}, w = {0, weights_plane, weights_row};
    if (IS_FLOAT(mean_type))
        add_values(count, (float*)mean, m, weights, w, values, type, along, channels, height,
                   width);
    else
        add_values(count, (double*)mean, m, weights, w, values, type, along, channels, height,
                   width);
}

template <typename Mean>
__device__ inline void add_next_values(long long count, Mean* mean, View m,
                                       const unsigned char* values, int type, const double* along,
                                       long long channels, long long height, long long width,
                                       long long reached) {
    const long long depth = quotient(quotient(count, width), height);
    const double *wz = along, *wy = wz + depth, *wx = wy + height;
    const double *bz = wx + width, *by = bz + depth, *bx = by + height;
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(i, height, width);
        const double row = wz[v.z] * wy[v.y], base = bz[v.z] + wz[v.z] * by[v.y];
        const bool later = base > 0;
        const double of_row = bx[v.x] + wx[v.x];
        const Mean share =
            (Mean)(later ? row * wx[v.x] / (base + row * of_row) : wx[v.x] / of_row);
        for (long long c = 0; c < channels; c++) {
            Mean* here = mean + c * m.channel + m.at(v);
            const Mean value = loaded<Mean>(values, type, c * count + i);
            if (later || v.x < reached)
                move_towards(here, value, share);
            else
                *here = value;
        }
    }
}

// The next tile of a full grid, where the weights along each axis sum to 1. After the tile's
// weights `along` holds the sums of those of earlier tiles; along x these end at `reached`.
extern "C" __global__ void add_next_tile(long long count, unsigned char* mean, int mean_type,
                                         long long mean_channel, long long mean_plane,
                                         long long mean_row, const unsigned char* values,
                                         int type, const double* along, long long channels,
                                         long long height, long long width, long long reached) {
    const View m = {mean_channel, mean_plane, mean_row};
    if (IS_FLOAT(mean_type))
        add_next_values(count, (float*)mean, m, values, type, along, channels, height, width,
                        reached);
    else
        add_next_values(count, (double*)mean, m, values, type, along, channels, height, width,
                        reached);
}

extern "C" __global__ void keep_largest(long long count, unsigned char* best,
                                        long long best_channel, long long best_plane,
                                        long long best_row, unsigned char* seen,
                                        long long seen_plane, long long seen_row,
                                        const unsigned char* values, int type, int bytes,
                                        long long channels, long long height, long long width) {
    const View b = {best_channel, best_plane, best_row}, s = {0, seen_plane, seen_row};
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(i, height, width);
        const bool before = seen[s.at(v)];
        for (long long c = 0; c < channels; c++) {
            const long long here = c * b.channel + b.at(v), there = c * count + i;
            if (!before || larger(values, there, best, here, type))
                copy(best, here, values, there, bytes);
        }
        seen[s.at(v)] = 1;
    }
}

// `along`: the tile's distances along z, y and x, which are summed.
extern "C" __global__ void keep_nearest(long long count, unsigned char* best,
                                        long long best_channel, long long best_plane,
                                        long long best_row, long long* distance,
                                        long long distance_plane, long long distance_row,
                                        const unsigned char* values, int bytes,
                                        const long long* along, long long channels,
                                        long long height, long long width) {
    const View b = {best_channel, best_plane, best_row};
    const View d = {0, distance_plane, distance_row};
    const long long *dz = along, *dy = dz + quotient(quotient(count, width), height);
    const long long* dx = dy + height;
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(i, height, width);
        const long long here = dz[v.z] + dy[v.y] + dx[v.x];
        if (here >= distance[d.at(v)]) continue;
        distance[d.at(v)] = here;
        for (long long c = 0; c < channels; c++)
            copy(best, c * b.channel + b.at(v), values, c * count + i, bytes);
    }
}

// `along`: the tile's weights along z, y and x, whose product is its own.
extern "C" __global__ void keep_heaviest(long long count, unsigned char* best,
                                         long long best_channel, long long best_plane,
                                         long long best_row, double* heaviest,
                                         long long heaviest_plane, long long heaviest_row,
                                         const unsigned char* values, int bytes,
                                         const double* along, long long channels,
                                         long long height, long long width) {
    const View b = {best_channel, best_plane, best_row};
    const View h = {0, heaviest_plane, heaviest_row};
    const double *wz = along, *wy = wz + quotient(quotient(count, width), height);
    const double* wx = wy + height;
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(i, height, width);
        const double weight = wz[v.z] * wy[v.y] * wx[v.x];
        if (!(weight > heaviest[h.at(v)])) continue;
        heaviest[h.at(v)] = weight;
        for (long long c = 0; c < channels; c++)
            copy(best, c * b.channel + b.at(v), values, c * count + i, bytes);
    }
}

// Whole numbers, halves to the even one. One item a value.
extern "C" __global__ void rounded(long long count, const unsigned char* values, int mean_type,
                                   unsigned char* out, int type) {
    FOR_EACH_ITEM(i, count) {
        if (IS_FLOAT(mean_type))
            store(out, type, i, rint(((const float*)values)[i]));
        else
            store(out, type, i, rint(((const double*)values)[i]));
    }
}
