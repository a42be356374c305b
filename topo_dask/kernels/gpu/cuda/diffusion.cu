#include "common.h"

// Fields are [nz, ny, width], rows padded to whole groups of four voxels; what is behind the end
// of a row has no links and so is 0.

// Numbers 1.. of labels by their place among ids, ascending; one that is not there into missing.
extern "C" __global__ void number_instances(long long count,
                                            const unsigned long long* __restrict__ labels,
                                            const unsigned long long* __restrict__ ids,
                                            long long known, int* __restrict__ local,
                                            unsigned long long* missing) {
    FOR_EACH_ITEM(i, count) {
        const unsigned long long label = labels[i];
        long long low = 0, high = known;
        while (low < high) {
            const long long middle = (low + high) / 2;
            if (ids[middle] < label) low = middle + 1;
            else high = middle;
        }
        const bool found = low < known && ids[low] == label;
        if (label != 0 && !found) atomicMax(missing, label);
        local[i] = label != 0 && found ? (int)(low + 1) : 0;
    }
}

// Which numbers there are in a box of local [nz, ny, nx] that begins at (z, y, x).
extern "C" __global__ void mark_present(long long count, const int* __restrict__ local,
                                        unsigned char* present, long long ny, long long nx,
                                        long long z, long long y, long long x, long long my,
                                        long long mx) {
    FOR_EACH_ITEM(i, count) {
        const long long row = i / mx, px = i % mx + x, py = row % my + y, pz = row / my + z;
        present[local[(pz * ny + py) * nx + px]] = 1;  // all threads write the same
    }
}

// Bit 0..5 (z-, z+, y-, y+, x-, x+) where that neighbour is of the same instance; one beyond the
// array counts as such. local [nz, ny, nx].
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

// The same bits where that neighbour, inside the array, is unannotated and of another object.
extern "C" __global__ void wall_mask(long long count, const int* __restrict__ local,
                                     const unsigned char* __restrict__ annotated,
                                     unsigned char* __restrict__ walls, long long nz, long long ny,
                                     long long nx, long long width) {
    FOR_EACH_ITEM(i, count) {
        const long long x = i % width, row = i / width, y = row % ny, z = row / ny;
        const long long at = row * nx + x, plane = ny * nx;
        const int k = x < nx ? local[at] : 0;
        unsigned bits = 0;
        if (k != 0) {
            bits |= (z > 0 && !annotated[at - plane] && local[at - plane] != k) << 0;
            bits |= (z < nz - 1 && !annotated[at + plane] && local[at + plane] != k) << 1;
            bits |= (y > 0 && !annotated[at - nx] && local[at - nx] != k) << 2;
            bits |= (y < ny - 1 && !annotated[at + nx] && local[at + nx] != k) << 3;
            bits |= (x > 0 && !annotated[at - 1] && local[at - 1] != k) << 4;
            bits |= (x < nx - 1 && !annotated[at + 1] && local[at + 1] != k) << 5;
        }
        walls[i] = (unsigned char)bits;
    }
}

// Write one field's values with which the instances start that begin now: start's, if there is
// one; else along an axis the coordinate from where it is 0; else the value one.
template <typename Real>
__device__ __forceinline__ void begin_field(long long count, const int* local, const int* begin,
                                            int time, Real* field, const Real* start,
                                            const long long* zero_at, int axis, Real one,
                                            long long ny, long long nx, long long width) {
    FOR_EACH_ITEM(i, count) {
        const int k = local[i];
        if (k == 0 || begin[k] != time) continue;
        const long long x = i % nx, row = i / nx;
        const long long place = axis == 0 ? row / ny : axis == 1 ? row % ny : x;
        Real value = one;
        if (start != nullptr) value = start[i];
        else if (axis >= 0) value = (Real)(place - zero_at[3 * k + axis]);
        field[row * width + x] = value;
    }
}

extern "C" __global__ void begin_indicator(long long count, const int* __restrict__ local,
                                           const int* __restrict__ begin, int time,
                                           double* __restrict__ field,
                                           const double* __restrict__ start, double one,
                                           long long ny, long long nx, long long width) {
    begin_field<double>(count, local, begin, time, field, start, nullptr, -1, one, ny, nx, width);
}

extern "C" __global__ void begin_coordinate(long long count, const int* __restrict__ local,
                                            const int* __restrict__ begin, int time,
                                            float* __restrict__ field,
                                            const float* __restrict__ start,
                                            const long long* __restrict__ zero_at, int axis,
                                            long long ny, long long nx, long long width) {
    begin_field<float>(count, local, begin, time, field, start, zero_at, axis, 1.0f, ny, nx, width);
}

// ---- One iteration. A thread goes along z through four columns of voxels and keeps what it has
// read of them, so that each value comes about once from memory: rows in front and behind are read
// by the threads beside it and lie in the cache.

__device__ __forceinline__ void load_four(const float* from, float* to) {
    const float4 read = *(const float4*)from;
    to[0] = read.x, to[1] = read.y, to[2] = read.z, to[3] = read.w;
}
__device__ __forceinline__ void load_four(const double* from, double* to) {
    const double2 low = *(const double2*)from, high = *(const double2*)(from + 2);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}
__device__ __forceinline__ void store_four(const float* from, float* to) {
    *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_four(const double* from, double* to) {
    *(double2*)to = make_double2(from[0], from[1]);
    *(double2*)(to + 2) = make_double2(from[2], from[3]);
}

struct Grid {
    long long nz, ny, nx, width;
};

// Where a thread works, and what it must know of the voxels there.
struct Place {
    long long at;           // in the flat field
    long long front, back;  // to the rows beside; 0 at a face, where a voxel is its own image
    long long z, x;
    unsigned links, walls;  // of the four voxels, a byte each
};

// The neighbours on either side along one axis, added up: those that are linked, and the voxel
// itself for those behind a wall.
template <bool WALLS, typename Real>
__device__ __forceinline__ Real both_sides(unsigned links, unsigned walls, int bit, Real low,
                                           Real here, Real high) {
    Real sum = 0;
    if ((links >> bit) & 1) sum = low;
    else if (WALLS && ((walls >> bit) & 1)) sum = here;
    if ((links >> (bit + 1)) & 1) sum += high;
    else if (WALLS && ((walls >> (bit + 1)) & 1)) sum += here;
    return sum;
}

// Four columns of a field.
template <typename Real> struct Columns {
    const Real* old;
    Real* now;
    Real wz, wy, wx;
    Real below[4], here[4], above[4];

    __device__ __forceinline__ void enter(const Grid& grid, const Place& p) {
        const long long stride = grid.ny * grid.width;
        load_four(old + p.at, here);
        load_four(old + (p.z > 0 ? p.at - stride : p.at), below);
    }

    template <bool WALLS>
    __device__ __forceinline__ void advance(const Grid& grid, const Place& p) {
        const long long stride = grid.ny * grid.width;
        load_four(old + (p.z < grid.nz - 1 ? p.at + stride : p.at), above);
        if (p.links | p.walls) {
            Real front[4], back[4], made[4];
            load_four(old + p.at + p.front, front);
            load_four(old + p.at + p.back, back);
            const Real left = p.x > 0 ? old[p.at - 1] : here[0];
            const Real right = p.x + 4 < grid.nx ? old[p.at + 4] : here[3];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned links = p.links >> (8 * j), walls = p.walls >> (8 * j);
                const Real before = j == 0 ? left : here[j > 0 ? j - 1 : 0];
                Real after = j == 3 ? right : here[j < 3 ? j + 1 : 3];
                if (p.x + j == grid.nx - 1) after = here[j];
                Real sum = wz * both_sides<WALLS>(links, walls, 0, below[j], here[j], above[j]);
                sum = fused(both_sides<WALLS>(links, walls, 2, front[j], here[j], back[j]), wy, sum);
                made[j] = fused(both_sides<WALLS>(links, walls, 4, before, here[j], after), wx, sum);
            }
            store_four(made, now + p.at);
        } else {
            const Real nothing[4] = {0, 0, 0, 0};
            store_four(nothing, now + p.at);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) below[j] = here[j], here[j] = above[j];
    }
};

// Item i is a run of planes of four columns: 256 threads do 2**log_lanes groups side by side, and
// as many rows as that leaves.
template <bool WALLS, typename... Fields>
__device__ __forceinline__ void relax(long long count, const unsigned char* links,
                                      const unsigned char* walls, Grid grid, int log_lanes,
                                      long long planes, Fields... fields) {
    const long long groups = grid.width / 4, lanes = 1LL << log_lanes, rows = 256 >> log_lanes;
    const long long across = (groups + lanes - 1) / lanes, down = (grid.ny + rows - 1) / rows;
    FOR_EACH_ITEM(i, count) {
        const long long tile = i / 256, run = tile / (across * down);
        const long long group = tile % across * lanes + (i & (lanes - 1));
        const long long y = tile / across % down * rows + (i % 256 >> log_lanes);
        if (group >= groups || y >= grid.ny) continue;
        const long long first = run * planes;
        const long long end = first + planes < grid.nz ? first + planes : grid.nz;
        Place p;
        p.x = 4 * group;
        p.at = (first * grid.ny + y) * grid.width + p.x;
        p.front = y > 0 ? -grid.width : 0;
        p.back = y < grid.ny - 1 ? grid.width : 0;
        p.z = first;
        (fields.enter(grid, p), ...);
        for (; p.z < end; ++p.z, p.at += grid.ny * grid.width) {
            p.links = *(const unsigned*)(links + p.at);
            p.walls = WALLS ? *(const unsigned*)(walls + p.at) : 0;
            (fields.template advance<WALLS>(grid, p), ...);
        }
    }
}

template <typename Real>
__device__ __forceinline__ Columns<Real> columns(const Real* old, Real* now, double wz, double wy,
                                                 double wx) {
    Columns<Real> made;
    made.old = old, made.now = now;
    made.wz = (Real)wz, made.wy = (Real)wy, made.wx = (Real)wx;
    return made;
}

extern "C" __global__ void relax_heat(long long count, const double* __restrict__ old,
                                      double* __restrict__ now,
                                      const unsigned char* __restrict__ links,
                                      const unsigned char* __restrict__ walls, long long nz,
                                      long long ny, long long nx, long long width, int log_lanes,
                                      long long planes, double wz, double wy, double wx) {
    const Grid grid = {nz, ny, nx, width};
    if (walls != nullptr)
        relax<true>(count, links, walls, grid, log_lanes, planes, columns(old, now, wz, wy, wx));
    else
        relax<false>(count, links, walls, grid, log_lanes, planes, columns(old, now, wz, wy, wx));
}

extern "C" __global__ void relax_coordinates(
    long long count, const double* __restrict__ old, const float* __restrict__ old_z,
    const float* __restrict__ old_y, const float* __restrict__ old_x, double* __restrict__ now,
    float* __restrict__ now_z, float* __restrict__ now_y, float* __restrict__ now_x,
    const unsigned char* __restrict__ links, long long nz, long long ny, long long nx,
    long long width, int log_lanes, long long planes, double wz, double wy, double wx) {
    const Grid grid = {nz, ny, nx, width};
    relax<false>(count, links, nullptr, grid, log_lanes, planes, columns(old, now, wz, wy, wx),
                 columns(old_z, now_z, wz, wy, wx), columns(old_y, now_y, wz, wy, wx),
                 columns(old_x, now_x, wz, wy, wx));
}

extern "C" __global__ void relax_walled_coordinates(
    long long count, const double* __restrict__ old, const float* __restrict__ old_z,
    const float* __restrict__ old_y, const float* __restrict__ old_x, double* __restrict__ now,
    float* __restrict__ now_z, float* __restrict__ now_y, float* __restrict__ now_x,
    const unsigned char* __restrict__ links, const unsigned char* __restrict__ walls, long long nz,
    long long ny, long long nx, long long width, int log_lanes, long long planes, double wz,
    double wy, double wx) {
    const Grid grid = {nz, ny, nx, width};
    relax<true>(count, links, walls, grid, log_lanes, planes, columns(old, now, wz, wy, wx),
                columns(old_z, now_z, wz, wy, wx), columns(old_y, now_y, wz, wy, wx),
                columns(old_x, now_x, wz, wy, wx));
}

// ---- The range of heat: see topo_dask/kernels/cpu/heat.py.

// The largest exponent of each piece, at its root; hottest [voxels] begins below all.
extern "C" __global__ void hottest_of_pieces(long long count, const double* __restrict__ values,
                                             const unsigned int* __restrict__ root, int* hottest) {
    FOR_EACH_ITEM(i, count) {
        if (values[i] > 0) {
            int exponent;
            frexp(values[i], &exponent);
            atomicMax(hottest + root[i], exponent);
        }
    }
}

extern "C" __global__ void scale_pieces(long long count, double* __restrict__ values,
                                        const unsigned int* __restrict__ root,
                                        const int* __restrict__ hottest, int target) {
    FOR_EACH_ITEM(i, count) {
        if (values[i] > 0) values[i] = ldexp(values[i], target - hottest[root[i]]);
    }
}

// ---- Unit vectors up the gradient, as in topo_dask/kernels/cpu/diffusion.py.

struct Sides {
    long long low, high;  // where the neighbours are, or -1
    double half;          // what their change counts
};

__device__ __forceinline__ Sides sides_of(unsigned links, unsigned walls, int axis, long long i,
                                          long long step, bool low_face, bool high_face) {
    const bool closed_low = low_face || ((walls >> (2 * axis)) & 1);
    const bool closed_high = high_face || ((walls >> (2 * axis + 1)) & 1);
    Sides s;
    s.low = closed_low ? i : (links >> (2 * axis)) & 1 ? i - step : -1;
    s.high = closed_high ? i : (links >> (2 * axis + 1)) & 1 ? i + step : -1;
    s.half = closed_low || closed_high ? 1.0 : 0.5;
    return s;
}

template <typename Real> __device__ __forceinline__ double change(const Real* field, Sides s) {
    const double before = s.low >= 0 ? (double)field[s.low] : 0.0;
    const double after = s.high >= 0 ? (double)field[s.high] : 0.0;
    return after - before;
}

__device__ __forceinline__ void make_unit(double* g, double least) {
    const double square = g[0] * g[0] + g[1] * g[1] + g[2] * g[2];
    double scale;
    if (square > 1e-200 && square < 1e200) {
        scale = 1 / fmax(sqrt(square), least);
    } else {
        const double big = fmax(fmax(fabs(g[0]), fabs(g[1])), fabs(g[2]));
        if (big == 0) return;
        for (int d = 0; d < 3; ++d) g[d] /= big;  // the squares themselves leave the range
        scale = big / fmax(big * sqrt(g[0] * g[0] + g[1] * g[1] + g[2] * g[2]), least);
    }
    for (int d = 0; d < 3; ++d) g[d] *= scale;
}

// Of a core [mz, my, mx] from (cz, cy, cx) on; factors [K + 1, 6], NaN where no flow is wanted.
extern "C" __global__ void flow_of_fields(
    long long count, const double* __restrict__ indicator, const float* __restrict__ along_z,
    const float* __restrict__ along_y, const float* __restrict__ along_x,
    const int* __restrict__ local, const unsigned char* __restrict__ links,
    const unsigned char* __restrict__ walls, const double* __restrict__ factors, long long nz,
    long long ny, long long nx, long long width, long long cz, long long cy, long long cx,
    long long my, long long mx, double least, double floor_below, float* __restrict__ flow) {
    FOR_EACH_ITEM(i, count) {
        const long long row = i / mx, x = i % mx + cx, y = row % my + cy, z = row / my + cz;
        const int k = local[(z * ny + y) * nx + x];
        double g[3] = {0, 0, 0};
        const double* f = factors + 6 * k;
        if (k != 0 && !isnan(f[0])) {
            const long long at = (z * ny + y) * width + x;
            const unsigned linked = links[at], walled = walls != nullptr ? walls[at] : 0;
            const Sides sides[3] = {
                sides_of(linked, walled, 0, at, ny * width, z == 0, z == nz - 1),
                sides_of(linked, walled, 1, at, width, y == 0, y == ny - 1),
                sides_of(linked, walled, 2, at, 1, x == 0, x == nx - 1)};
            const float* along[3] = {along_z, along_y, along_x};
            for (int d = 0; d < 3; ++d) {
                g[d] = f[d] * change(indicator, sides[d]);
                if (along_z != nullptr) g[d] += f[3 + d] * change(along[d], sides[d]);
                g[d] *= sides[d].half;
                if (!(fabs(g[d]) >= floor_below)) g[d] = 0;
            }
            make_unit(g, least);
        }
        for (int d = 0; d < 3; ++d) flow[d * count + i] = (float)g[d];
    }
}
