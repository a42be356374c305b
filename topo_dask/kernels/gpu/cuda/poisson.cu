#include "common.h"

// Directions d = 0..5: z-, z+, y-, y+, x-, x+. links: which neighbours are of the same instance,
// inside the array. open: which sides are not closed, that is links and walls; ALONE for a voxel
// that is an equation by itself; 0 in the background.

#define ALONE 64

struct Faces {
    const double* of[6];  // u beyond each face of the array, NaN or no array where nothing flows
    long long nz, ny, nx;

    // Whether the neighbour is beyond the array; if so u there, or NaN.
    __device__ __forceinline__ bool beyond(int d, long long z, long long y, long long x,
                                           double* value) const {
        const long long at[3] = {z, y, x}, n[3] = {nz, ny, nx};
        const int axis = d >> 1;
        if (at[axis] != (d & 1 ? n[axis] - 1 : 0)) return false;
        const long long place = axis == 0 ? y * nx + x : axis == 1 ? z * nx + x : z * ny + y;
        *value = of[d] == nullptr ? nan("") : of[d][place];
        return true;
    }
    __device__ __forceinline__ long long step(int d) const {
        const long long one = d < 2 ? ny * nx : d < 4 ? nx : 1;
        return d & 1 ? one : -one;
    }
};

__device__ __forceinline__ double pick(int d, double z, double y, double x) {
    return d < 2 ? z : d < 4 ? y : x;
}

extern "C" __global__ void assemble(
    long long count, const unsigned long long* __restrict__ labels,
    const unsigned char* __restrict__ annotated, const double* __restrict__ z_low,
    const double* __restrict__ z_high, const double* __restrict__ y_low,
    const double* __restrict__ y_high, const double* __restrict__ x_low,
    const double* __restrict__ x_high, long long nz, long long ny, long long nx, double wz,
    double wy, double wx, unsigned char* __restrict__ links, unsigned char* __restrict__ open,
    double* __restrict__ right) {
    const Faces faces = {{z_low, z_high, y_low, y_high, x_low, x_high}, nz, ny, nx};
    FOR_EACH_ITEM(i, count) {
        const long long row = i / nx, x = i % nx, y = row % ny, z = row / ny;
        const unsigned long long own = labels[i];
        unsigned linked = 0, opened = 0;
        double source = own != 0 ? 1.0 : 0.0;
        for (int d = 0; d < 6 && own != 0; ++d) {
            double value;
            if (faces.beyond(d, z, y, x, &value)) {
                if (isnan(value)) continue;
                opened |= 1u << d;
                source += pick(d, wz, wy, wx) * value;
            } else if (labels[i + faces.step(d)] == own) {
                linked |= 1u << d;
                opened |= 1u << d;
            } else if (annotated == nullptr || annotated[i + faces.step(d)]) {
                opened |= 1u << d;
            }
        }
        links[i] = (unsigned char)linked;
        open[i] = (unsigned char)opened;
        right[i] = source;
    }
}

// Pieces, by their roots, that touch a wall.
extern "C" __global__ void mark_walled(long long count, const unsigned char* __restrict__ links,
                                       const unsigned char* __restrict__ open,
                                       const unsigned int* __restrict__ root,
                                       unsigned char* walled) {
    FOR_EACH_ITEM(i, count) {
        if (open[i] & ~links[i]) walled[root[i]] = 1;  // all threads write the same
    }
}

// The others have no solution: each of their voxels becomes u = 0 by itself.
extern "C" __global__ void take_out_closed(long long count,
                                           const unsigned long long* __restrict__ labels,
                                           const unsigned int* __restrict__ root,
                                           const unsigned char* __restrict__ walled,
                                           unsigned char* __restrict__ links,
                                           unsigned char* __restrict__ open,
                                           double* __restrict__ right, double* __restrict__ u) {
    FOR_EACH_ITEM(i, count) {
        if (labels[i] == 0 || walled[root[i]]) continue;
        links[i] = 0, open[i] = ALONE;
        right[i] = u[i] = 0;
    }
}

// ---- A level: the voxels, whose links are bits; or what an instance has in a box, with lists.

struct Voxels {
    const unsigned char *links, *open;
    long long ny, nx;
    double w[3];

    __device__ __forceinline__ long long neighbour(long long i, int d) const {
        const long long one = d < 2 ? ny * nx : d < 4 ? nx : 1;
        return (links[i] >> d) & 1 ? (d & 1 ? i + one : i - one) : -1;
    }
    __device__ __forceinline__ double weight(long long, int d) const { return w[d >> 1]; }
    __device__ __forceinline__ double diagonal(long long i) const {
        const unsigned code = open[i];
        double sum = code == ALONE ? 1.0 : 0.0;
        for (int d = 0; d < 6; ++d) sum += (code >> d) & 1 ? w[d >> 1] : 0.0;
        return sum;
    }
    __device__ __forceinline__ double inverse(long long i) const {
        const double sum = diagonal(i);
        return sum > 0 ? 1 / sum : 0.0;
    }
};

struct Boxes {
    const int* near;  // [N, 6], -1 where there is none
    const double *weights, *inverses;

    __device__ __forceinline__ long long neighbour(long long i, int d) const {
        return near[6 * i + d];
    }
    __device__ __forceinline__ double weight(long long i, int d) const {
        return weights[6 * i + d];
    }
    __device__ __forceinline__ double inverse(long long i) const { return inverses[i]; }
    __device__ __forceinline__ double diagonal(long long i) const { return 1 / inverses[i]; }
};

__device__ __forceinline__ Voxels voxels_of(const unsigned char* links, const unsigned char* open,
                                            long long ny, long long nx, double wz, double wy,
                                            double wx) {
    return {links, open, ny, nx, {wz, wy, wx}};
}

template <typename Level>
__device__ __forceinline__ double beside(const Level& level, const double* u, long long i) {
    double sum = 0;
    for (int d = 0; d < 6; ++d) {
        const long long j = level.neighbour(i, d);
        if (j >= 0) sum += level.weight(i, d) * u[j];
    }
    return sum;
}

// What a damped Jacobi step from 0 leaves of the right side.
template <typename Level>
__device__ __forceinline__ void leave(long long count, const Level& level, const double* right,
                                      double damping, double* left) {
    FOR_EACH_ITEM(i, count) {
        double sum = (1 - damping) * right[i];
        for (int d = 0; d < 6; ++d) {
            const long long j = level.neighbour(i, d);
            if (j >= 0) sum += level.weight(i, d) * damping * level.inverse(j) * right[j];
        }
        left[i] = level.inverse(i) > 0 ? sum : 0.0;
    }
}

// That step, and what the boxes add.
template <typename Level>
__device__ __forceinline__ void correct(long long count, const Level& level, const double* right,
                                        double damping, const int* parent, const double* coarse,
                                        double* u) {
    FOR_EACH_ITEM(i, count) {
        const int box = parent[i];
        u[i] = damping * level.inverse(i) * right[i] + (box >= 0 ? coarse[box] : 0.0);
    }
}

template <typename Level>
__device__ __forceinline__ void smooth(long long count, const Level& level, const double* right,
                                       double damping, const double* u, double* now) {
    FOR_EACH_ITEM(i, count) {
        const double inverse = level.inverse(i);
        const double wanted = (right[i] + beside(level, u, i)) * inverse;
        now[i] = inverse > 0 ? u[i] + damping * (wanted - u[i]) : 0.0;
    }
}

// Links and walls of boxes, from those of their nodes: children[starts[a]] to [starts[a + 1]].
// halved: a bit for each axis along which boxes are longer than nodes.
template <typename Level>
__device__ __forceinline__ void join(long long count, const Level& level, const double* wall,
                                     const int* starts, const int* children, const int* parent,
                                     int halved, double farther, double wall_farther, int* near,
                                     double* weights, double* walls) {
    FOR_EACH_ITEM(a, count) {
        int found[6] = {-1, -1, -1, -1, -1, -1};
        double sums[6] = {0, 0, 0, 0, 0, 0}, walled = 0;
        for (int c = starts[a]; c < starts[a + 1]; ++c) {
            const int i = children[c];
            for (int d = 0; d < 6; ++d) {
                const long long j = level.neighbour(i, d);
                if (j < 0 || parent[j] == a) continue;
                double weight = level.weight(i, d);
                if ((halved >> (d >> 1)) & 1) weight *= farther;
                if (parent[j] < 0) {
                    walled += weight;
                } else {
                    found[d] = parent[j];
                    sums[d] += weight;
                }
            }
            walled += wall_farther * wall[i];
        }
        for (int d = 0; d < 6; ++d) near[6 * a + d] = found[d], weights[6 * a + d] = sums[d];
        walls[a] = walled;
    }
}

#define VOXELS                                                                                    \
    voxels_of(links, open, ny, nx, wz, wy, wx)
#define BOXES (Boxes{near, weights, inverses})

extern "C" __global__ void leave_voxels(long long count, const unsigned char* __restrict__ links,
                                        const unsigned char* __restrict__ open, long long ny,
                                        long long nx, double wz, double wy, double wx,
                                        const double* __restrict__ right, double damping,
                                        double* __restrict__ left) {
    leave(count, VOXELS, right, damping, left);
}
extern "C" __global__ void leave_boxes(long long count, const int* __restrict__ near,
                                       const double* __restrict__ weights,
                                       const double* __restrict__ inverses,
                                       const double* __restrict__ right, double damping,
                                       double* __restrict__ left) {
    leave(count, BOXES, right, damping, left);
}
extern "C" __global__ void correct_voxels(long long count, const unsigned char* __restrict__ links,
                                          const unsigned char* __restrict__ open, long long ny,
                                          long long nx, double wz, double wy, double wx,
                                          const double* __restrict__ right, double damping,
                                          const int* __restrict__ parent,
                                          const double* __restrict__ coarse,
                                          double* __restrict__ u) {
    correct(count, VOXELS, right, damping, parent, coarse, u);
}
extern "C" __global__ void correct_boxes(long long count, const int* __restrict__ near,
                                         const double* __restrict__ weights,
                                         const double* __restrict__ inverses,
                                         const double* __restrict__ right, double damping,
                                         const int* __restrict__ parent,
                                         const double* __restrict__ coarse,
                                         double* __restrict__ u) {
    correct(count, BOXES, right, damping, parent, coarse, u);
}
extern "C" __global__ void smooth_voxels(long long count, const unsigned char* __restrict__ links,
                                         const unsigned char* __restrict__ open, long long ny,
                                         long long nx, double wz, double wy, double wx,
                                         const double* __restrict__ right, double damping,
                                         const double* __restrict__ u, double* __restrict__ now) {
    smooth(count, VOXELS, right, damping, u, now);
}
extern "C" __global__ void smooth_boxes(long long count, const int* __restrict__ near,
                                        const double* __restrict__ weights,
                                        const double* __restrict__ inverses,
                                        const double* __restrict__ right, double damping,
                                        const double* __restrict__ u, double* __restrict__ now) {
    smooth(count, BOXES, right, damping, u, now);
}
extern "C" __global__ void join_voxels(
    long long count, const unsigned char* __restrict__ links, const unsigned char* __restrict__ open,
    long long ny, long long nx, double wz, double wy, double wx, const double* __restrict__ wall,
    const int* __restrict__ starts, const int* __restrict__ children,
    const int* __restrict__ parent, int halved, double farther, double wall_farther,
    int* __restrict__ near_made, double* __restrict__ sums, double* __restrict__ walls) {
    join(count, VOXELS, wall, starts, children, parent, halved, farther, wall_farther, near_made,
         sums, walls);
}
extern "C" __global__ void join_boxes(
    long long count, const int* __restrict__ near, const double* __restrict__ weights,
    const double* __restrict__ inverses, const double* __restrict__ wall,
    const int* __restrict__ starts, const int* __restrict__ children,
    const int* __restrict__ parent, int halved, double farther, double wall_farther,
    int* __restrict__ near_made, double* __restrict__ sums, double* __restrict__ walls) {
    join(count, BOXES, wall, starts, children, parent, halved, farther, wall_farther, near_made,
         sums, walls);
}

extern "C" __global__ void gather(long long count, const int* __restrict__ starts,
                                  const int* __restrict__ children,
                                  const double* __restrict__ values, double* __restrict__ sums) {
    FOR_EACH_ITEM(a, count) {
        double sum = 0;
        for (int c = starts[a]; c < starts[a + 1]; ++c) sum += values[children[c]];
        sums[a] = sum;
    }
}

// ---- Conjugate gradients; scalars: 0 r*z of now, 1 of before, 2 p*q, 3 the largest |r|.

// q = A p, and where minus is given, q = minus - A p.
extern "C" __global__ void apply_voxels(long long count, const unsigned char* __restrict__ links,
                                        const unsigned char* __restrict__ open, long long ny,
                                        long long nx, double wz, double wy, double wx,
                                        const double* __restrict__ p,
                                        const double* __restrict__ minus, double* __restrict__ q) {
    const Voxels level = VOXELS;
    FOR_EACH_ITEM(i, count) {
        const double made = level.diagonal(i) * p[i] - beside(level, p, i);
        q[i] = minus != nullptr ? minus[i] - made : made;
    }
}

extern "C" __global__ void new_direction(long long count, const double* __restrict__ scalars,
                                         int first, const double* __restrict__ z,
                                         double* __restrict__ p) {
    FOR_EACH_ITEM(i, count) p[i] = first ? z[i] : z[i] + scalars[0] / scalars[1] * p[i];
}

extern "C" __global__ void step_along(long long count, const double* __restrict__ scalars,
                                      const double* __restrict__ p, const double* __restrict__ q,
                                      double* __restrict__ u, double* __restrict__ r) {
    const double alpha = scalars[2] > 0 ? scalars[0] / scalars[2] : 0.0;
    FOR_EACH_ITEM(i, count) {
        u[i] += alpha * p[i];
        r[i] -= alpha * q[i];
    }
}

// Item i sums every count-th product from i on: always the same ones in the same order.
extern "C" __global__ void products(long long count, long long size, const double* __restrict__ a,
                                    const double* __restrict__ b, double* __restrict__ sums) {
    FOR_EACH_ITEM(i, count) {
        double sum = 0;
        for (long long j = i; j < size; j += count) sum += a[j] * b[j];
        sums[i] = sum;
    }
}
extern "C" __global__ void largest(long long count, long long size, const double* __restrict__ a,
                                   double* __restrict__ most) {
    FOR_EACH_ITEM(i, count) {
        double found = 0;
        for (long long j = i; j < size; j += count) {
            if (!(fabs(a[j]) <= found)) found = fabs(a[j]);  // NaN too
        }
        most[i] = found;
    }
}
// The end of both; add: to what is there before goes what was there.
extern "C" __global__ void finish(long long count, long long size, const double* __restrict__ parts,
                                  int is_sum, int into, double* scalars) {
    FOR_EACH_ITEM(i, count) {
        double all = 0;
        for (long long j = 0; j < size; ++j) {
            if (is_sum) all += parts[j];
            else if (!(parts[j] <= all)) all = parts[j];
        }
        if (into == 0) scalars[1] = scalars[0];
        scalars[into] = all;
    }
}

// ---- Unit vectors, as in topo_dask/kernels/cpu/poisson.py.

extern "C" __global__ void flow_of_potential(
    long long count, const unsigned long long* __restrict__ labels, const double* __restrict__ u,
    const unsigned char* __restrict__ annotated, const double* __restrict__ z_low,
    const double* __restrict__ z_high, const double* __restrict__ y_low,
    const double* __restrict__ y_high, const double* __restrict__ x_low,
    const double* __restrict__ x_high, long long nz, long long ny, long long nx, long long cz,
    long long cy, long long cx, long long my, long long mx, double sz, double sy, double sx,
    double tolerance, float* __restrict__ flow) {
    const Faces faces = {{z_low, z_high, y_low, y_high, x_low, x_high}, nz, ny, nx};
    FOR_EACH_ITEM(i, count) {
        const long long row = i / mx, x = i % mx + cx, y = row % my + cy, z = row / my + cz;
        const long long at = (z * ny + y) * nx + x;
        const unsigned long long own = labels[at];
        double g[3] = {0, 0, 0};
        for (int axis = 0; axis < 3 && own != 0; ++axis) {
            double side[2];
            bool closed = false;
            for (int high = 0; high < 2; ++high) {
                const int d = 2 * axis + high;
                const long long j = at + faces.step(d);
                if (!faces.beyond(d, z, y, x, side + high)) {
                    if (labels[j] == own) side[high] = u[j];
                    else side[high] = annotated == nullptr || annotated[j] ? 0.0 : nan("");
                }
                if (isnan(side[high])) side[high] = u[at], closed = true;
            }
            const double change = side[1] - side[0], scale = 1 / pick(2 * axis, sz, sy, sx);
            const bool sure = fabs(change) > tolerance * (side[1] + side[0]);
            g[axis] = sure ? change * (closed ? 2 * scale : scale) : 0.0;
        }
        const double norm = g[0] * g[0] + g[1] * g[1] + g[2] * g[2];
        const double unit = norm > 0 ? 1 / sqrt(norm) : 0.0;
        for (int d = 0; d < 3; ++d) flow[d * count + i] = (float)(g[d] * unit);
    }
}
