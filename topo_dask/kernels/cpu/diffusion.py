"""Diffusion of all instances of an array at once: one sweep, whatever the number of instances.

One byte a voxel says which of its six neighbours belong to the same instance, so that the sweep
never compares labels. Sweeps run several iterations per pass over memory (a plane is advanced as
soon as its neighbours are, the planes in work stay in cache) and, on several threads, in slabs
whose iterations shrink away from the cut, the gap between them being filled afterwards. Neither
changes a single addition: the result is bit for bit that of plain Jacobi iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from topo_dask.kernels.cpu.labels import Integers, compact, rows_of
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, starmap

STEPS_PER_PASS = 8
"""Iterations made in one pass over memory: 2 * (8 + 2) planes of 200 x 200 float32 fit in 4 MB."""

TINY = 1e-8
"""Gradients below this norm are not stretched to unit length (coordinate potential)."""


def _test_bit(context: Any, byte: Any, mask: Any) -> Any:
    """Whether a bit of a byte is set, tested on the byte itself.

    numba would widen ``byte & mask`` to 64 bits, which halves the speed of the vectorised sweep.
    """
    if not isinstance(mask, types.IntegerLiteral):
        return None

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        zero, one = (ir.Constant(args[0].type, v) for v in (0, mask.literal_value))
        return builder.icmp_unsigned("!=", builder.and_(args[0], one), zero)

    return types.boolean(byte, mask), generate


_bit: Any = intrinsic(_test_bit)


@compiled
def _link(local: Any, links: Any) -> None:
    """Set bit 0..5 (z-, z+, y-, y+, x-, x+) where that neighbour belongs to the same instance.

    ``local`` is padded by one voxel. A neighbour beyond the array counts as linked: the sweep
    keeps a mirror image there, which is the no-flux condition.
    """
    nz, ny, nx = local.shape
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            for x in range(1, nx - 1):
                k = local[z, y, x]
                byte = 0
                if k != 0:
                    byte |= (z == 1 or local[z - 1, y, x] == k) << 0
                    byte |= (z == nz - 2 or local[z + 1, y, x] == k) << 1
                    byte |= (y == 1 or local[z, y - 1, x] == k) << 2
                    byte |= (y == ny - 2 or local[z, y + 1, x] == k) << 3
                    byte |= (x == 1 or local[z, y, x - 1] == k) << 4
                    byte |= (x == nx - 2 or local[z, y, x + 1] == k) << 5
                links[z, y, x] = byte


@compiled
def _wall(local: Any, annotated: Any, walls: Any) -> None:
    """Set bit 0..5 where that neighbour, inside the array, is unannotated and of another object."""
    nz, ny, nx = annotated.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                k = local[z + 1, y + 1, x + 1]
                byte = 0
                if k != 0:
                    if z > 0 and not annotated[z - 1, y, x]:
                        byte |= (local[z, y + 1, x + 1] != k) << 0
                    if z < nz - 1 and not annotated[z + 1, y, x]:
                        byte |= (local[z + 2, y + 1, x + 1] != k) << 1
                    if y > 0 and not annotated[z, y - 1, x]:
                        byte |= (local[z + 1, y, x + 1] != k) << 2
                    if y < ny - 1 and not annotated[z, y + 1, x]:
                        byte |= (local[z + 1, y + 2, x + 1] != k) << 3
                    if x > 0 and not annotated[z, y, x - 1]:
                        byte |= (local[z + 1, y + 1, x] != k) << 4
                    if x < nx - 1 and not annotated[z, y, x + 1]:
                        byte |= (local[z + 1, y + 1, x + 2] != k) << 5
                walls[z + 1, y + 1, x + 1] = byte


@compiled
def _relax(out: Any, links: Any, near: Any) -> None:
    """One iteration on a flattened plane: a sixth of the sum of the linked neighbours."""
    z0, z1, y0, y1, x0, x1 = near
    sixth = out.dtype.type(1 / 6)
    zero = out.dtype.type(0)
    for i in range(out.size):
        byte = links[i]
        total = z0[i] if _bit(byte, 1) else zero
        total = total + z1[i] if _bit(byte, 2) else total
        total = total + y0[i] if _bit(byte, 4) else total
        total = total + y1[i] if _bit(byte, 8) else total
        total = total + x0[i] if _bit(byte, 16) else total
        total = total + x1[i] if _bit(byte, 32) else total
        out[i] = total * sixth


@compiled
def _relax_walled(out: Any, links: Any, near: Any, walls: Any, here: Any) -> None:
    """The same, where each no-flux wall adds the voxel's own value to the sum."""
    z0, z1, y0, y1, x0, x1 = near
    sixth = out.dtype.type(1 / 6)
    zero = out.dtype.type(0)
    for i in range(out.size):
        byte = links[i]
        total = z0[i] if _bit(byte, 1) else zero
        total = total + z1[i] if _bit(byte, 2) else total
        total = total + y0[i] if _bit(byte, 4) else total
        total = total + y1[i] if _bit(byte, 8) else total
        total = total + x0[i] if _bit(byte, 16) else total
        total = total + x1[i] if _bit(byte, 32) else total
        closed = walls[i]
        for bit in range(6):
            total = total + here[i] if (closed >> bit) & 1 else total
        out[i] = total * sixth


@compiled
def _mirror(field: Any, plane: int, rows: int, width: int) -> None:
    """Copy a plane's outermost voxels into its padding: the image behind a no-flux face."""
    first = plane * rows * width
    for x in range(width):
        field[first + x] = field[first + width + x]
        field[first + (rows - 1) * width + x] = field[first + (rows - 2) * width + x]
    for y in range(rows):
        row = first + y * width
        field[row] = field[row + 1]
        field[row + width - 1] = field[row + width - 2]


@compiled
def _advance_plane(
    old: Any, new: Any, links: Any, walls: Any, plane: int, planes: int, rows: int, width: int
) -> None:
    area = rows * width
    a = plane * area
    b = a + area
    here = old[a:b]
    below = old[a - area : b - area] if plane > 1 else here
    above = old[a + area : b + area] if plane < planes - 2 else here
    near = (
        below,
        above,
        old[a - width : b - width],
        old[a + width : b + width],
        old[a - 1 : b - 1],
        old[a + 1 : b + 1],
    )
    if walls.size:
        _relax_walled(new[a:b], links[a:b], near, walls[a:b], here)
    else:
        _relax(new[a:b], links[a:b], near)
    _mirror(new, plane, rows, width)


@compiled
def _advance_slab(
    even: Any, odd: Any, links: Any, walls: Any, shape: Any, slab: Any, steps: int
) -> None:
    """Make ``steps`` iterations of the planes of a slab ``(first, end, cut_first, cut_end)``.

    At a cut to a neighbouring slab each iteration stops one plane earlier than the one before, so
    that slabs never read what another thread writes.
    """
    planes, rows, width = shape
    first, end, cut_first, cut_end = slab
    for front in range(first, end + steps - 1):
        for step in range(steps):
            plane = front - step
            if plane < first + step * cut_first or plane >= end - step * cut_end:
                continue
            if step % 2 == 0:
                _advance_plane(even, odd, links, walls, plane, planes, rows, width)
            else:
                _advance_plane(odd, even, links, walls, plane, planes, rows, width)


@compiled
def _advance_gap(
    even: Any, odd: Any, links: Any, walls: Any, shape: Any, cut: int, steps: int
) -> None:
    """Make the iterations that two slabs left out at the cut between them."""
    planes, rows, width = shape
    for step in range(1, steps):
        for plane in range(cut - step, cut + step):
            if step % 2 == 0:
                _advance_plane(even, odd, links, walls, plane, planes, rows, width)
            else:
                _advance_plane(odd, even, links, walls, plane, planes, rows, width)


@compiled
def _add_derivative(
    gradient: Any, field: Any, masks: Any, local: Any, scale: Any, axis: int, core: Any, boxes: Any
) -> None:
    """Add ``scale[instance]`` times the central difference of ``field`` along ``axis``.

    Neighbours of other instances count 0. The difference is one-sided at an outer face of the
    array and at a wall, 0 where both sides are closed. Instances whose scale is NaN are skipped;
    ``boxes`` ``[B,7]`` (first and end along each axis of the core, the instance or 0 for any) hold
    all others.
    """
    links, walls = masks
    ny, nx = local.shape[1:]
    stride = (ny * nx, nx, 1)[axis]
    last = local.shape[axis] - 2
    low_bit = np.uint8(1 << (2 * axis))
    high_bit = np.uint8(2 << (2 * axis))
    for b in range(boxes.shape[0]):
        for z in range(boxes[b, 0], boxes[b, 1]):
            for y in range(boxes[b, 2], boxes[b, 3]):
                for x in range(boxes[b, 4], boxes[b, 5]):
                    pz, py, px = z + core[0] + 1, y + core[1] + 1, x + core[2] + 1
                    number = local[pz, py, px]
                    if np.isnan(scale[number]) or (boxes[b, 6] != 0 and boxes[b, 6] != number):
                        continue
                    i = (pz * ny + py) * nx + px
                    p = (pz, py, px)[axis]
                    closed_low = p == 1
                    closed_high = p == last
                    if walls.size:
                        closed_low |= (walls[i] & low_bit) != 0
                        closed_high |= (walls[i] & high_bit) != 0
                    here = np.float64(field[i])
                    before = np.float64(field[i - stride]) if links[i] & low_bit else 0.0
                    after = np.float64(field[i + stride]) if links[i] & high_bit else 0.0
                    if closed_low and closed_high:
                        change = 0.0
                    elif closed_low:
                        change = after - here
                    elif closed_high:
                        change = here - before
                    else:
                        change = 0.5 * (after - before)
                    gradient[z, y, x] += scale[number] * change


@compiled
def _boxes_of(local: Any, core: Any, size: Any, count: int) -> Any:
    """For each number, its box in the core (first and end along each axis), and the number."""
    boxes = np.zeros((count, 7), np.int64)
    for z in range(size[0]):
        for y in range(size[1]):
            previous = 0
            for x in range(size[2]):
                k = local[z + core[0] + 1, y + core[1] + 1, x + core[2] + 1]
                if k == 0:
                    previous = 0
                    continue
                box = boxes[k]
                if box[6] == 0:
                    box[0], box[2], box[4], box[6] = z, y, x, k
                elif k != previous:
                    box[2] = min(box[2], y)
                    box[4] = min(box[4], x)
                box[1] = z + 1
                box[3] = max(box[3], y + 1)
                box[5] = max(box[5], x + 1)
                previous = k
    return boxes


@compiled
def _unit(gradient: Any, least: float, flow: Any) -> None:
    """Divide by the norm, or by ``least`` where the norm is smaller; 0 stays 0."""
    for z in range(gradient.shape[1]):
        for y in range(gradient.shape[2]):
            for x in range(gradient.shape[3]):
                a, b, c = gradient[0, z, y, x], gradient[1, z, y, x], gradient[2, z, y, x]
                big = max(abs(a), abs(b), abs(c))
                if big == 0:
                    continue
                a, b, c = a / big, b / big, c / big  # squares of tiny numbers would underflow
                norm = max(big * np.sqrt(a * a + b * b + c * c), least)
                flow[0, z, y, x] = np.float32(a * (big / norm))
                flow[1, z, y, x] = np.float32(b * (big / norm))
                flow[2, z, y, x] = np.float32(c * (big / norm))


@dataclass(frozen=True)
class _Domain:
    """What the sweeps of one array share."""

    local: npt.NDArray[np.int32]  # padded by one voxel
    links: npt.NDArray[np.uint8]  # flattened, padded
    walls: npt.NDArray[np.uint8]  # flattened, padded; empty without a spatial mask
    iterations: npt.NDArray[np.int64]  # by local number; 0 for background
    core: tuple[tuple[int, int, int], tuple[int, int, int]]  # first voxel, shape

    def advance(
        self, fields: list[npt.NDArray[Any]], iterations: int, run: Starmap, threads: int
    ) -> None:
        """Advance ``fields[0]`` by some iterations; ``fields[1]`` is the second buffer."""
        shape = self.local.shape
        cuts = ranges(shape[0] - 2, min(threads, (shape[0] - 2) // (2 * STEPS_PER_PASS)))
        while iterations > 0:
            steps = min(STEPS_PER_PASS, iterations)
            common = (fields[0], fields[1], self.links, self.walls, shape)
            slabs = [(a + 1, b + 1, int(a > 0), int(b < shape[0] - 2)) for a, b in cuts]
            run(_advance_slab, [(*common, slab, steps) for slab in slabs])
            run(_advance_gap, [(*common, a + 1, steps) for a, _ in cuts[1:]])
            if steps % 2:
                fields.reverse()
            iterations -= steps

    def derive(
        self,
        start: npt.NDArray[Any],
        into: list[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]]],
        run: Starmap,
        threads: int,
    ) -> npt.NDArray[Any]:
        """Diffuse ``start`` and add its derivatives: ``into`` has (axis, gradient, scale) rows.

        Each instance is read at its own number of iterations; going on afterwards costs nothing
        but time, since instances do not feel each other. Gives the field after the last.
        """
        fields = [start, np.zeros_like(start)]
        planes, rows, width = self.local.shape
        for plane in range(1, planes - 1):
            _mirror(start, plane, rows, width)
        (z0, y0, x0), size = self.core
        boxes = _boxes_of(self.local, (z0, y0, x0), size, self.iterations.size)
        present = boxes[:, 6] > 0
        whole = np.array([[a, b, 0, size[1], 0, size[2], 0] for a, b in ranges(size[0], threads)])
        done = 0
        for stop in np.unique(self.iterations[present]).tolist():
            self.advance(fields, stop - done, run, threads)
            done = stop
            stopping = present & (self.iterations == stop)
            where = boxes[stopping]
            if np.prod(where[:, 1:6:2] - where[:, 0:6:2], axis=1).sum() > np.prod(size):
                where = whole  # cheaper than boxes that overlap
            parts = [where[a:b] for a, b in ranges(len(where), threads)]
            for axis, gradient, scale in into:
                chosen = np.where(stopping, scale, np.nan)
                masks = (self.links, self.walls)
                common = (gradient, fields[0], masks, self.local, chosen, axis, (z0, y0, x0))
                run(_add_derivative, [(*common, part) for part in parts])
        return fields[0]


@compiled
def _fill_relative(local: Any, anchors: Any, first: int, axis: int, field: Any) -> None:
    """Write each voxel's coordinate along ``axis`` relative to its instance's anchor, 0 outside."""
    for z in range(local.shape[0]):
        for y in range(local.shape[1]):
            for x in range(local.shape[2]):
                k = local[z, y, x]
                p = (z, y, x)[axis] - 1 + first
                field[z, y, x] = p - anchors[k] if k != 0 else 0


def _domain(
    labels: Integers,
    spatial_mask: npt.NDArray[Any] | None,
    core: tuple[slice, ...] | None,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
) -> tuple[_Domain, npt.NDArray[np.intp]]:
    """Lay out an array for the sweeps; also give each local number's row in the tables."""
    local, present = compact(labels, pad=1)
    rows = rows_of(present, ids)
    links = np.zeros(local.shape, dtype=np.uint8)
    _link(local, links)
    walls = np.zeros(0, dtype=np.uint8)
    if spatial_mask is not None:
        walls = np.zeros(local.shape, dtype=np.uint8)
        _wall(local, np.ascontiguousarray(spatial_mask > 0.5), walls)
    box = [slice(0, n).indices(n)[:2] for n in labels.shape]
    if core is not None:
        box = [s.indices(n)[:2] for s, n in zip(core, labels.shape, strict=True)]
    first, size = tuple(a for a, _ in box), tuple(b - a for a, b in box)
    of_local = np.concatenate((np.zeros(1, np.int64), np.asarray(iterations, np.int64)[rows]))
    corner = ((first[0], first[1], first[2]), (size[0], size[1], size[2]))
    return _Domain(local, links.ravel(), walls.ravel(), of_local, corner), rows


def diffusion_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    potential: str = "coordinate",
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Flow of every instance of an array by diffusion, all instances in the same sweeps.

    With u_d the coordinate along d inside the instance, n times replaced by the mean of its six
    neighbours (0 in other instances, u itself beyond a face of the array), the flow is
    g/max(|g|, 1e-8) with g_d = du_d/dd. Since that is linear, u_d is taken as the diffused
    coordinate relative to ``anchors`` (float32) plus the anchor times the diffused indicator
    (float64): absolute coordinates in float32 would lose the gradient in large volumes.
    ``potential="heat"`` diffuses the indicator alone, and divides by |g| however small.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; 0 is background. Each outer face is a no-flux face: a face
        of the volume, or a cut whose effect the caller throws away with the context.
    ids, iterations, anchors
        Of all instances of the array, ascending by id: uint64 ``[K]``, the number n of
        iterations ``[K]``, and a global voxel near the instance ``[K,3]``.
    origin
        Global index of ``labels[0,0,0]``.
    core
        Slices of the part to return; ``None`` for all. What lies around it is context: n + 1
        voxels of it (one for the difference) make the core exact to the bit.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated. An unannotated neighbour of another instance is a no-flux
        wall.
    potential
        "coordinate" or "heat".
    threads
        Threads to use; the result is the same to the bit.

    Returns
    -------
    float32 ``[3, *core shape]``: unit vectors ``(dz,dy,dx)`` inside instances, 0 outside.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> one = np.array([5], dtype=np.uint64), np.array([10]), np.array([[0, 0, 2]])
    >>> flow = diffusion_flow(
    ...     labels, ids=one[0], iterations=one[1], anchors=one[2], potential="heat"
    ... )
    >>> flow[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    domain, rows = _domain(labels, spatial_mask, core, ids, iterations)
    gradient = np.zeros((3, *domain.core[1]), dtype=np.float64)
    nowhere = np.zeros((1, 3), dtype=np.int64)
    anchor = np.concatenate((nowhere, np.asarray(anchors, dtype=np.int64)[rows]))
    relative = potential == "coordinate"
    factors = anchor.astype(np.float64) if relative else np.ones(anchor.shape)
    # A sixth in float32 is too large by 2**-27 or so, every iteration; undo that.
    undo = (6.0 * np.float64(np.float32(1 / 6))) ** -domain.iterations.astype(np.float64)
    with starmap(threads) as run:
        indicator = (domain.local > 0).astype(np.float64).ravel()
        everywhere = [(axis, gradient[axis], factors[:, axis]) for axis in range(3)]
        domain.derive(indicator, everywhere, run, threads)
        del indicator
        for axis in range(3) if relative else ():
            field = np.empty(domain.local.shape, dtype=np.float32)
            _fill_relative(domain.local, anchor[:, axis], origin[axis], axis, field)
            domain.derive(field.ravel(), [(axis, gradient[axis], undo)], run, threads)
    flow = np.zeros(gradient.shape, dtype=np.float32)
    _unit(gradient, TINY if relative else 0.0, flow)
    return flow
