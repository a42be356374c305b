// Tiles under a transform, sampled and blended into a block of the output; spline coefficients.
//
// One item a voxel of the output box. Every operation is the CPU's, in its order and type.

#include "common.h"
#include "voxels.h"

// How far a sample may lie outside the tile and still count: rounding.
#define EDGE 1e-9

#define MOST_CHANNELS 3

struct Whole3 {
    long long z, y, x;
};

__device__ inline Whole3 three(const long long* at) { return {at[0], at[1], at[2]}; }

// Position along one axis, from 0 to the last voxel; false beyond.
__device__ inline bool along_axis(double at, long long length, double* c) {
    const double last = (double)length - 1.0;
    const double above = at > 0.0 ? at : 0.0;
    *c = above < last ? above : last;
    return at >= -EDGE && at <= last + EDGE;
}

// Where a voxel of the output lies in the tile; false outside of it.
__device__ inline bool position(double c[3], const double* m, Whole3 lengths, double z, double y,
                                double x) {
    const double b0 = m[0] * z + m[1] * y + m[3], b1 = m[4] * z + m[5] * y + m[7];
    const double b2 = m[8] * z + m[9] * y + m[11], b3 = m[12] * z + m[13] * y + m[15];
    const double w = b3 + m[14] * x;  // 1 for affine transforms
    const bool in0 = along_axis((b0 + m[2] * x) / w, lengths.z, c);
    const bool in1 = along_axis((b1 + m[6] * x) / w, lengths.y, c + 1);
    const bool in2 = along_axis((b2 + m[10] * x) / w, lengths.x, c + 2);
    return w > 0.0 && in0 && in1 && in2;
}

template <typename Part>
__device__ inline double in_plane(const Part* at, long long right, long long down, double fy,
                                  double fx) {
    double a = (double)at[0], b = (double)at[right];
    const double low = a + fx * (b - a);
    a = (double)at[down], b = (double)at[down + right];
    return low + fy * (a + fx * (b - a) - low);
}

template <typename Part>
__device__ inline double linear(const Part* part, const double c[3], Whole3 start, Whole3 size) {
    const long long gz = (long long)c[0], gy = (long long)c[1], gx = (long long)c[2];
    const double fz = c[0] - (double)gz, fy = c[1] - (double)gy, fx = c[2] - (double)gx;
    const long long iz = gz - start.z, iy = gy - start.y, ix = gx - start.x;
    // The last voxel has no next one, and needs none.
    const long long right = ix + 1 < size.x ? 1 : 0, down = iy + 1 < size.y ? size.x : 0;
    const Part* at = part + (iz * size.y + iy) * size.x + ix;
    const double value = in_plane(at, right, down, fy, fx);
    if (size.z == 1 || !(fz > 0.0)) return value;
    return value + fz * (in_plane(at + size.y * size.x, right, down, fy, fx) - value);
}

// Weights and places of the (up to) four voxels around a position.
struct Spline {
    double weight[4];
    long long index[4];
    int count;
};

__device__ inline void spline(Spline* s, double position, long long length, long long start) {
    const long long i = (long long)position;
    const double f = position - (double)i, g = 1.0 - f;
    s->count = length == 1 ? 1 : 4;
    s->weight[0] = length == 1 ? 1.0 : g * g * g / 6.0;
    s->weight[1] = (4.0 - 6.0 * f * f + 3.0 * f * f * f) / 6.0;
    s->weight[2] = (4.0 - 6.0 * g * g + 3.0 * g * g * g) / 6.0;
    s->weight[3] = f * f * f / 6.0;
    for (int k = 0; k < 4; k++) {
        // Mirrored at the faces; what is still outside then has the weight 0.
        long long j = i + k - 1;
        j = j < 0 ? -j : j;
        j = j > length - 1 ? 2 * (length - 1) - j : j;
        s->index[k] = (j > 0 ? j : 0) - start;
    }
}

template <typename Part>
__device__ inline double cubic(const Part* part, const Spline s[3], Whole3 size) {
    double total = 0.0;
    for (int z = 0; z < s[0].count; z++) {
        for (int y = 0; y < s[1].count; y++) {
            const Part* row = part + (s[0].index[z] * size.y + s[1].index[y]) * size.x;
            double along = 0.0;
            for (int x = 0; x < s[2].count; x++)
                along += s[2].weight[x] * (double)row[s[2].index[x]];
            total += s[0].weight[z] * s[1].weight[y] * along;
        }
    }
    return total;
}

__device__ inline double weight_along(double c, const double* table, long long length) {
    const long long i = (long long)c, next = i + 1 < length ? i + 1 : length - 1;
    return table[i] + (c - (double)i) * (table[next] - table[i]);
}

// Vectors of the tile, turned by the transform's derivative where each is.
template <typename Total>
__device__ inline void turn(Total v[MOST_CHANNELS], int axes, const double* forward,
                            const double c[3], const double here[3]) {
    const int skip = 3 - axes;
    Total old[MOST_CHANNELS];
    double scale = forward[15];
    for (int j = 0; j < 3; j++) scale += forward[12 + j] * c[j];
    for (int j = 0; j < axes; j++) old[j] = v[j];
    for (int i = 0; i < axes; i++) {
        double total = 0.0;
        for (int j = 0; j < axes; j++) {
            const double slope =
                forward[4 * (i + skip) + j + skip] - here[i + skip] * forward[12 + j + skip];
            total += slope * (double)old[j];
        }
        v[i] = (Total)(total / scale);
    }
}

// Blends are numbered as on the CPU: cosine, mean, max, first.
template <typename Total>
__device__ inline void blend_into(Total* total, Total value, double weight, double mass,
                                  int blend) {
    if (blend < 2)
        *total = (Total)((double)*total + weight * (double)value);
    else if (mass == 0.0 || (blend == 2 && value > *total))
        *total = value;
}

// A sample of one channel. Of `s` only order 3 makes use.
template <typename Part>
__device__ inline double sample(const Part* part, const double c[3], const Spline s[3],
                                Whole3 start, Whole3 size, int order) {
    return order == 1 ? linear(part, c, start, size) : cubic(part, s, size);
}

// `place` holds the first voxel of the block; the first voxel, and the one after the last, of the
// output box to fill; the first voxel of the part; the shapes of tile, block and part.
template <typename Total, typename Part>
__device__ inline void sample_part(long long count, Total* total, double* weights,
                                   const Part* part, const double* maps, const long long* place,
                                   const double* tables, long long longest, long long channels,
                                   int order, int blend, int vector) {
    const Whole3 block = three(place), low = three(place + 3), high = three(place + 6);
    const Whole3 start = three(place + 9), lengths = three(place + 12);
    const Whole3 shape = three(place + 15), size = three(place + 18);
    FOR_EACH_ITEM(i, count) {
        const Voxel box = voxel_of(i, high.y - low.y, high.x - low.x);
        const long long z = box.z + low.z, y = box.y + low.y, x = box.x + low.x;
        double c[3];
        if (!position(c, maps, lengths, (double)z, (double)y, (double)x)) continue;
        double weight = 1.0;
        if (blend == 0) {
            weight *= weight_along(c[0], tables, lengths.z);
            weight *= weight_along(c[1], tables + longest, lengths.y);
            weight *= weight_along(c[2], tables + 2 * longest, lengths.x);
        }
        if (!(weight > 0.0)) continue;
        Spline s[3] = {};
        if (order == 3) {
            spline(s, c[0], lengths.z, start.z);
            spline(s + 1, c[1], lengths.y, start.y);
            spline(s + 2, c[2], lengths.x, start.x);
        }
        const long long nearest =
            (((long long)(c[0] + 0.5) - start.z) * size.y + (long long)(c[1] + 0.5) - start.y) *
                size.x + (long long)(c[2] + 0.5) - start.x;
        const long long at =
            ((z - block.z) * shape.y + y - block.y) * shape.x + x - block.x;
        const double mass = weights[at];
        Total v[MOST_CHANNELS] = {};
        for (long long channel = 0; channel < channels; channel++) {
            const Part* values = part + channel * size.z * size.y * size.x;
            const Total value = order == 0 ? (Total)values[nearest]
                                           : (Total)sample(values, c, s, start, size, order);
            Total* here = total + channel * shape.z * shape.y * shape.x + at;
            if (vector)
                v[channel] = value;
            else
                blend_into(here, value, weight, mass, blend);
        }
        if (vector) {
            const double here[3] = {(double)z, (double)y, (double)x};
            turn(v, (int)channels, maps + 16, c, here);
            for (long long channel = 0; channel < channels; channel++)
                blend_into(total + channel * shape.z * shape.y * shape.x + at, v[channel], weight,
                           mass, blend);
        }
        weights[at] = blend < 2 ? mass + weight : 1.0;
    }
}

extern "C" __global__ void accumulate_f8_f4(long long count, double* total, double* weights,
                                            const float* part, const double* maps,
                                            const long long* place, const double* tables,
                                            long long longest, long long channels, int order,
                                            int blend, int vector) {
    sample_part(count, total, weights, part, maps, place, tables, longest, channels, order, blend,
                vector);
}

extern "C" __global__ void accumulate_f8_f8(long long count, double* total, double* weights,
                                            const double* part, const double* maps,
                                            const long long* place, const double* tables,
                                            long long longest, long long channels, int order,
                                            int blend, int vector) {
    sample_part(count, total, weights, part, maps, place, tables, longest, channels, order, blend,
                vector);
}

// 64-bit integers, which no float64 holds: nearest voxel, largest or first value.
extern "C" __global__ void accumulate_i8_i8(long long count, long long* total, double* weights,
                                            const long long* part, const double* maps,
                                            const long long* place, const double* tables,
                                            long long longest, long long channels, int order,
                                            int blend, int vector) {
    sample_part(count, total, weights, part, maps, place, tables, longest, channels, order, blend,
                vector);
}

extern "C" __global__ void accumulate_u8_u8(long long count, unsigned long long* total,
                                            double* weights, const unsigned long long* part,
                                            const double* maps, const long long* place,
                                            const double* tables, long long longest,
                                            long long channels, int order, int blend,
                                            int vector) {
    sample_part(count, total, weights, part, maps, place, tables, longest, channels, order, blend,
                vector);
}

// Cubic spline coefficients along one axis, mirrored at both ends, in place; the operations of
// scipy.ndimage.spline_filter1d. One item a line, whose voxels are `stride` apart.
extern "C" __global__ void spline_lines(long long count, double* __restrict__ values,
                                        long long length, long long stride, double pole,
                                        double power_of_last) {
    const double gain = (1.0 - pole) * (1.0 - 1.0 / pole);
    FOR_EACH_ITEM(i, count) {
        const long long group = quotient(i, stride), end = (length - 1) * stride;
        double* c = values + group * length * stride + (i - group * stride);
        for (long long k = 0; k <= end; k += stride) c[k] *= gain;
        double first = c[0] + power_of_last * c[end], power = pole;
        for (long long k = stride; k < end; k += stride) {
            first += power * (c[k] + power_of_last * c[end - k]);
            power *= pole;
        }
        c[0] = first / (1.0 - power_of_last * power_of_last);
        for (long long k = stride; k <= end; k += stride) c[k] += pole * c[k - stride];
        c[end] = (pole * c[end - stride] + c[end]) * pole / (pole * pole - 1.0);
        for (long long k = end - stride; k >= 0; k -= stride)
            c[k] = pole * (c[k + stride] - c[k]);
    }
}
