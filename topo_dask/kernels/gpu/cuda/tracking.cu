// Particles along a flow: float64 positions, one thread a particle, exact across blocks.
//
// Particles lie in C order, so threads beside each other walk through voxels beside each other and
// share cache lines. A step is one load of 16 bytes, for which the next one waits; the other
// particles of the multiprocessor hide that, hence few registers and no shared memory.

#include "common.h"
#include "voxels.h"

__device__ inline double clipped(double value, double top) {
    value = value > 0.0 ? value : 0.0;
    return value < top ? value : top;
}

// [3,Z,Y,X] to [Z,Y,X,4]. One item a voxel.
extern "C" __global__ void interleave(long long count, const float* __restrict__ flow,
                                      float* __restrict__ out) {
    FOR_EACH_ITEM(i, count)
        ((float4*)out)[i] = make_float4(flow[i], flow[count + i], flow[2 * count + i], 0.0f);
}

// Positions of voxels whose linear numbers are given. One item a voxel.
extern "C" __global__ void voxel_positions(long long count, const long long* __restrict__ numbers,
                                           double* __restrict__ positions, long long ny,
                                           long long nx, long long oz, long long oy,
                                           long long ox) {
    FOR_EACH_ITEM(i, count) {
        const Voxel v = voxel_of(numbers[i], ny, nx);
        positions[3 * i] = (double)(v.z + oz);
        positions[3 * i + 1] = (double)(v.y + oy);
        positions[3 * i + 2] = (double)(v.x + ox);
    }
}

// One step: voxel = truncation of the position; position += float(step * flow[voxel]); clip.
// One item a particle; the flow of n voxels begins at voxel o, t is the volume's last voxel.
extern "C" __global__ void track_nearest(long long count, const float* __restrict__ flow,
                                         double* __restrict__ positions, int* __restrict__ left,
                                         int oz, int oy, int ox, int nz, int ny, int nx,
                                         double tz, double ty, double tx, float step) {
    FOR_EACH_ITEM(i, count) {
        double z = positions[3 * i], y = positions[3 * i + 1], x = positions[3 * i + 2];
        int budget = left[i];
        while (budget > 0) {
            // What is below 0 is beyond any size as an unsigned number.
            const unsigned iz = (unsigned)((int)z - oz);
            const unsigned iy = (unsigned)((int)y - oy);
            const unsigned ix = (unsigned)((int)x - ox);
            if (iz >= (unsigned)nz || iy >= (unsigned)ny || ix >= (unsigned)nx) break;
            const float4 f = ((const float4*)flow)[((long long)iz * ny + iy) * nx + ix];
            z = clipped(z + (double)(step * f.x), tz);
            y = clipped(y + (double)(step * f.y), ty);
            x = clipped(x + (double)(step * f.z), tx);
            // Where the flow is 0 a particle stays for all the steps it has.
            budget = f.x == 0.0f && f.y == 0.0f && f.z == 0.0f ? 0 : budget - 1;
        }
        positions[3 * i] = z;
        positions[3 * i + 1] = y;
        positions[3 * i + 2] = x;
        left[i] = budget;
    }
}

__device__ inline double between(double a, double b, double f) { return a + (b - a) * f; }

// Between four values of a plane, and eight of two; the CPU's order of operations.
__device__ inline double in_plane(double a, double b, double c, double d, double fy, double fx) {
    const double low = between(a, b, fx);
    return low + (between(c, d, fx) - low) * fy;
}

// The same with the flow interpolated between the voxel and the next one along each axis. A
// particle goes on while these are in the array; the volume's last voxel is its own next one.
extern "C" __global__ void track_linear(long long count, const float* __restrict__ flow,
                                        double* __restrict__ positions, int* __restrict__ left,
                                        int oz, int oy, int ox, int nz, int ny, int nx, double tz,
                                        double ty, double tx, float step) {
    // Ends of the voxels at which a particle can go on.
    const int ez = (double)oz + nz > tz ? nz : nz - 1;
    const int ey = (double)oy + ny > ty ? ny : ny - 1;
    const int ex = (double)ox + nx > tx ? nx : nx - 1;
    FOR_EACH_ITEM(i, count) {
        double z = positions[3 * i], y = positions[3 * i + 1], x = positions[3 * i + 2];
        int budget = left[i];
        while (budget > 0) {
            const int gz = (int)z, gy = (int)y, gx = (int)x;
            const int iz = gz - oz, iy = gy - oy, ix = gx - ox;
            if (iz < 0 || iz >= ez || iy < 0 || iy >= ey || ix < 0 || ix >= ex) break;
            const double wz = z - gz, wy = y - gy, wx = x - gx;
            const long long dz = iz + 1 < nz ? (long long)ny * nx : 0;
            const long long dy = iy + 1 < ny ? nx : 0, dx = ix + 1 < nx ? 1 : 0;
            const float4* at = (const float4*)flow + (((long long)iz * ny + iy) * nx + ix);
            const float4 a = at[0], b = at[dx], c = at[dy], d = at[dy + dx];
            const float4 e = at[dz], f = at[dz + dx], g = at[dz + dy], h = at[dz + dy + dx];
            const float mz = (float)between(in_plane(a.x, b.x, c.x, d.x, wy, wx),
                                            in_plane(e.x, f.x, g.x, h.x, wy, wx), wz);
            const float my = (float)between(in_plane(a.y, b.y, c.y, d.y, wy, wx),
                                            in_plane(e.y, f.y, g.y, h.y, wy, wx), wz);
            const float mx = (float)between(in_plane(a.z, b.z, c.z, d.z, wy, wx),
                                            in_plane(e.z, f.z, g.z, h.z, wy, wx), wz);
            z = clipped(z + (double)(step * mz), tz);
            y = clipped(y + (double)(step * my), ty);
            x = clipped(x + (double)(step * mx), tx);
            budget = mz == 0.0f && my == 0.0f && mx == 0.0f ? 0 : budget - 1;
        }
        positions[3 * i] = z;
        positions[3 * i + 1] = y;
        positions[3 * i + 2] = x;
        left[i] = budget;
    }
}
