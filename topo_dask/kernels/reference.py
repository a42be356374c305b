"""The oracle: every kernel in NumPy, float64 inside, slow and readable, word for word as defined.

Nothing here is used in production; the compiled kernels are tested against it. Axes are
``z, y, x``, background is 0, and a block's ``origin`` is the index of its first voxel in the
whole volume. ``threads`` and ``anchors`` are taken and ignored, so that the signatures agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt, label
from scipy.sparse import coo_matrix, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve
from scipy.spatial import cKDTree

from topo_dask.kernels.tables import (
    DOT_REST,
    DOT_WHOLE,
    END_PARTS,
    FARTHEST,
    LARGEST_DOT,
    LARGEST_ERROR,
    CellTable,
    ContactTable,
    EndTable,
    ErrorTable,
    InstanceTable,
)

Labels = npt.NDArray[Any]
Mask = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Triple = tuple[int, int, int]

FIXED_POINT = 2**24
_SMALLEST_NORM = 1e-8
_FACES = tuple((axis, step) for axis in range(3) for step in (-1, 1))
_RESCALE_EVERY = 64


# ── instances ────────────────────────────────────────────────────────────────────────────────


def _voxels_of_each(labels: Labels) -> dict[int, Int64]:
    """Every instance's voxels ``[V, 3]`` (C order), by id, ids ascending."""
    voxels = np.argwhere(labels != 0).astype(np.int64)
    ids = labels[labels != 0].astype(np.uint64)
    order = np.argsort(ids, kind="stable")
    found, starts = np.unique(ids[order], return_index=True)
    return dict(zip(found.tolist(), np.split(voxels[order], starts[1:]), strict=False))


def instance_facts(labels: Labels, *, origin: Sequence[int] = (0, 0, 0)) -> InstanceTable:
    """Size, sum of coordinates and bounding box of each instance of a block.

    Examples
    --------
    >>> table = instance_facts(np.array([[[0, 7, 7]]]), origin=(10, 0, 0))
    >>> table.ids, table.centres
    (array([7], dtype=uint64), array([[10. ,  0. ,  1.5]]))
    """
    voxels = {i: v + np.asarray(origin, np.int64) for i, v in _voxels_of_each(labels).items()}

    def rows(values: list[Any]) -> Int64:
        return np.array(values, dtype=np.int64).reshape(-1, 3)

    return InstanceTable(
        ids=np.array(list(voxels), dtype=np.uint64),
        voxels=np.array([len(v) for v in voxels.values()], dtype=np.int64),
        sums=rows([v.sum(axis=0) for v in voxels.values()]),
        lo=rows([v.min(axis=0) for v in voxels.values()]),
        hi=rows([v.max(axis=0) + 1 for v in voxels.values()]),
    )


# ── diffusion flow ───────────────────────────────────────────────────────────────────────────


def _neighbours(voxels: Int64, shape: Sequence[int], spatial_mask: Mask | None) -> Int64:
    """For each voxel of an instance, the numbers of its six neighbours, ``[3, 2, V]``.

    Voxels are numbered by their row. A neighbour in the same instance has its own number; one
    outside the volume (or not annotated) is the voxel itself, which is what no flux means; any
    other has number V, where the field is 0.
    """
    count, absent = len(voxels), -1
    lo, hi = voxels.min(axis=0) - 1, voxels.max(axis=0) + 2
    number = np.full(hi - lo, absent, dtype=np.int64)
    inside = tuple(slice(max(0, a), min(n, b)) for a, b, n in zip(lo, hi, shape, strict=True))
    local = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, lo, strict=True))
    number[local] = count
    if spatial_mask is not None:
        number[local][spatial_mask[inside] < 0.5] = absent
    own = np.arange(count, dtype=np.int64)
    number[tuple((voxels - lo).T)] = own

    result = np.empty((3, 2, count), dtype=np.int64)
    for axis, step in _FACES:
        there = voxels - lo
        there[:, axis] += step
        neighbour = number[tuple(there.T)]
        result[axis, (step + 1) // 2] = np.where(neighbour == absent, own, neighbour)
    return result


def _diffuse(
    u: Float64, neighbours: Int64, iterations: int, pieces: Int64 | None, weights: Float64
) -> Float64:
    """``iterations`` times the weighted mean of the neighbours; ``u`` is ``[fields, V + 1]``.

    The two neighbours of an axis are added first, so that a mirrored instance gets exactly the
    mirrored field. With ``pieces`` (the connected piece of each voxel) every piece is scaled by
    a power of two now and then: its shape stays what it was and nothing sinks below the
    smallest float.
    """
    for i in range(iterations):
        z, y, x = (u[:, neighbours[a, 0]] + u[:, neighbours[a, 1]] for a in range(3))
        u[:, :-1] = weights[0] * z + weights[1] * y + weights[2] * x
        if pieces is not None and i % _RESCALE_EVERY == 0:
            peak = np.zeros(pieces.max() + 1)
            np.maximum.at(peak, pieces, u[0, :-1])
            u[0, :-1] = np.ldexp(u[0, :-1], -np.frexp(peak)[1][pieces])
    return u


def _pieces(voxels: Int64) -> Int64:
    """Number of the 6-connected piece of its instance that each voxel is in."""
    lo = voxels.min(axis=0)
    box = np.zeros(voxels.max(axis=0) - lo + 1, dtype=bool)
    box[tuple((voxels - lo).T)] = True
    return np.asarray(label(box)[0][tuple((voxels - lo).T)], dtype=np.int64)


def diffusion_gradient(
    labels: Labels,
    *,
    ids: UInt64,
    iterations: Int64,
    origin: Sequence[int] = (0, 0, 0),
    spatial_mask: Mask | None = None,
    potential: str = "coordinate",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Float64, Float64]:
    """The gradient before it is made a unit vector, and the size of what was subtracted for it.

    Returns
    -------
    gradient
        ``float64[3, Z, Y, X]``. For ``"heat"`` only its direction means anything: the field is
        scaled within each connected piece.
    magnitude
        ``float64[3, Z, Y, X]``, largest ``|u|`` that entered each component. Rounding errors of
        the gradient are a small multiple of ``eps * magnitude``, so a voxel where the gradient
        is not much larger than that has no well-defined flow in that arithmetic.

    Examples
    --------
    >>> line = np.array([[[0, 5, 5, 5, 0]]])
    >>> options = {"ids": np.array([5], np.uint64), "iterations": np.array([0])}
    >>> gradient, magnitude = diffusion_gradient(line, **options)
    >>> gradient[2]  # u = 1, 2, 3 and 0 beside it
    array([[[ 0.,  1.,  1., -1.,  0.]]])
    """
    gradient = np.zeros((3, *labels.shape))
    magnitude = np.zeros((3, *labels.shape))
    apart = np.asarray(spacing) / min(spacing)
    weights = apart**-2 / (2 * (apart**-2).sum())
    wanted = dict(zip(ids.tolist(), iterations.tolist(), strict=True))
    for number, voxels in _voxels_of_each(labels).items():
        if number not in wanted:
            continue
        neighbours = _neighbours(voxels, labels.shape, spatial_mask)
        if potential == "heat":
            u = np.zeros((1, len(voxels) + 1))
            u[0, :-1] = 1.0
            u = np.repeat(
                _diffuse(u, neighbours, wanted[number], _pieces(voxels), weights), 3, axis=0
            )
        else:
            u = np.zeros((3, len(voxels) + 1))
            u[:, :-1] = ((voxels + np.asarray(origin)) * apart).T
            u = _diffuse(u, neighbours, wanted[number], None, weights)
        own = np.arange(len(voxels))
        for axis in range(3):
            before, after = neighbours[axis]
            # A missing neighbour is the voxel itself: the difference is then one-sided (or 0).
            width = np.where((before == own) | (after == own), 1.0, 2.0)
            where = (axis, *voxels.T)
            gradient[where] = (u[axis, after] - u[axis, before]) / (width * apart[axis])
            magnitude[where] = np.maximum(np.abs(u[axis, after]), np.abs(u[axis, before]))
            magnitude[where] /= apart[axis]
    return gradient, magnitude


def diffusion_flow(
    labels: Labels,
    *,
    ids: UInt64,
    iterations: Int64,
    anchors: Int64 | None = None,
    origin: Sequence[int] = (0, 0, 0),
    core: tuple[slice, slice, slice] | None = None,
    spatial_mask: Mask | None = None,
    potential: str = "coordinate",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> Float32:
    """Unit vectors up the gradient of coordinates (or of heat) diffused inside each instance.

    Every outer face of the array is a face without flux.

    Parameters
    ----------
    labels
        ``[Z, Y, X]``, any integer type.
    ids, iterations
        The instances of the array, ascending, and how often each is averaged.
    core
        Part of the array (local slices) that is returned; None means all of it.
    spatial_mask
        1 where annotated. A neighbour that is not, and is not of the same instance, counts
        like one outside the volume.
    potential
        ``"coordinate"`` or ``"heat"``.
    spacing
        Distance of voxels along z, y, x: coordinates and gradients are in its unit, over that of
        the nearest voxels, and the mean weights an axis by 1/s^2.

    Examples
    --------
    >>> line = np.array([[[0, 5, 5, 5, 0]]])
    >>> options = {"ids": np.array([5], np.uint64), "iterations": np.array([9])}
    >>> diffusion_flow(line, potential="heat", **options)[2]
    array([[[ 0.,  1.,  0., -1.,  0.]]], dtype=float32)
    """
    g, _ = diffusion_gradient(
        labels,
        ids=ids,
        iterations=iterations,
        origin=origin,
        spatial_mask=spatial_mask,
        potential=potential,
        spacing=spacing,
    )
    norm = np.sqrt((g**2).sum(axis=0))
    if potential == "heat":
        norm[norm == 0] = 1.0
    else:
        norm = np.maximum(norm, _SMALLEST_NORM)
    flow: Float32 = (g / norm).astype(np.float32)
    return flow if core is None else flow[(slice(None), *core)]


def _power(
    u: Float64, neighbours: Int64, iterations: int, tail_bits: int, weights: Float64
) -> Float64:
    """``iterations`` means of the neighbours as one sum of Chebyshev polynomials of the first kind.

    The coefficient of T_k is the probability that a random walk of so many steps on the line ends
    k from where it began; the sum ends where less than 2^-tail_bits is left of them.
    """
    walks, left, total = 2**iterations, 2**iterations, np.zeros_like(u)
    before, now = u, _diffuse(u.copy(), neighbours, 1, None, weights)  # T_0 u and T_1 u
    for k in range(iterations + 1):
        if (iterations - k) % 2 == 0:
            ends = (1 if k == 0 else 2) * math.comb(iterations, (iterations - k) // 2)
            total += ends / walks * before
            left -= ends
            if left * 2**tail_bits <= walks:
                break
        after = 2 * _diffuse(now.copy(), neighbours, 1, None, weights) - before
        before, now = now, after
    return total


def chebyshev_flow(
    labels: Labels,
    *,
    ids: UInt64,
    iterations: Int64,
    powers: Int64,
    tail_bits: Int64,
    origin: Sequence[int] = (0, 0, 0),
    core: tuple[slice, slice, slice] | None = None,
    spatial_mask: Mask | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> Float32:
    """`diffusion_flow` of coordinates, the first ``powers`` iterations of each instance as a sum.

    Examples
    --------
    >>> line = np.array([[[0, 5, 5, 5, 0]]])
    >>> options = {"ids": np.array([5], np.uint64), "iterations": np.array([9])}
    >>> options |= {"powers": np.array([8]), "tail_bits": np.array([60])}
    >>> chebyshev_flow(line, **options)[2].round(3)
    array([[[ 0.,  1.,  1., -1.,  0.]]], dtype=float32)
    """
    apart = np.asarray(spacing) / min(spacing)
    weights = apart**-2 / (2 * (apart**-2).sum())
    gradient = np.zeros((3, *labels.shape))
    facts = zip(iterations.tolist(), powers.tolist(), tail_bits.tolist(), strict=True)
    wanted = dict(zip(ids.tolist(), facts, strict=True))
    for number, voxels in _voxels_of_each(labels).items():
        total, power, bits = wanted[number]
        neighbours = _neighbours(voxels, labels.shape, spatial_mask)
        u = np.zeros((3, len(voxels) + 1))
        u[:, :-1] = (voxels + np.asarray(origin)).T
        u = _power(u, neighbours, power, bits, weights)
        u = _diffuse(u, neighbours, total - power, None, weights)
        own = np.arange(len(voxels))
        for axis, (before, after) in enumerate(neighbours):
            width = np.where((before == own) | (after == own), 1.0, 2.0)
            gradient[(axis, *voxels.T)] = (u[axis, after] - u[axis, before]) / width
    norm = np.maximum(np.sqrt((gradient**2).sum(axis=0)), _SMALLEST_NORM)
    flow: Float32 = (gradient / norm).astype(np.float32)
    return flow if core is None else flow[(slice(None), *core)]


# ── Poisson flow ─────────────────────────────────────────────────────────────────────────────


def _values_beyond(
    voxels: Int64, shape: Sequence[int], beyond: Sequence[Mask | None] | None
) -> Float64:
    """The u of the neighbours beyond the faces of the array, ``[3, 2, V]``; NaN: none, no flux."""
    values = np.full((3, 2, len(voxels)), np.nan)
    for number, (axis, step) in enumerate(_FACES):
        face = None if beyond is None else beyond[number]
        if face is not None:
            at_face = voxels[:, axis] == (0 if step < 0 else shape[axis] - 1)
            rest = np.delete(voxels[at_face], axis, axis=1)
            values[axis, (step + 1) // 2, at_face] = np.asarray(face)[tuple(rest.T)]
    return values


def poisson_potential(
    labels: Labels,
    *,
    spatial_mask: Mask | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    start: Float64 | None = None,
    beyond: Sequence[Mask | None] | None = None,
    tolerance: float = 1e-9,
    threads: int = 1,
) -> Float64:
    """The solution u of Poisson's equation in every instance, by a sparse direct solver.

    In each voxel v: sum over its six neighbours w of (u(v) - u(w)) / spacing**2 = 1. A neighbour
    of another instance has u = 0; one beyond a face of the array, or unannotated and of another
    instance, has u(v). ``beyond`` gives u beyond the faces z-, z+, ..., NaN for u(v). Connected
    pieces that no u but their own enters get 0. ``start`` and ``tolerance`` are ignored.

    Examples
    --------
    >>> poisson_potential(np.array([[[0, 5, 5, 5, 0]]]))[0, 0]
    array([0. , 1.5, 2. , 1.5, 0. ])
    """
    potential = np.zeros(labels.shape)
    for voxels in _voxels_of_each(labels).values():
        count = len(voxels)
        own = np.arange(count)
        neighbours = _neighbours(voxels, labels.shape, spatial_mask)
        outside = _values_beyond(voxels, labels.shape, beyond)
        neighbours[~np.isnan(outside)] = count
        right = np.ones(count)
        walls = np.zeros(count)
        rows, columns, values = [], [], []
        for axis, step in _FACES:
            weight = spacing[axis] ** -2.0
            neighbour = neighbours[axis, (step + 1) // 2]
            walls += weight * (neighbour == count)
            right += weight * np.nan_to_num(outside[axis, (step + 1) // 2])
            linked = np.flatnonzero((neighbour != own) & (neighbour != count))
            rows += [linked, linked]
            columns += [linked, neighbour[linked]]
            values += [np.full(len(linked), weight), np.full(len(linked), -weight)]
        pieces = _pieces(voxels)
        closed = np.bincount(pieces, walls) == 0
        walls[closed[pieces]], right[closed[pieces]] = 1.0, 0.0
        where = np.concatenate(rows), np.concatenate(columns)
        laplacian = coo_matrix((np.concatenate(values), where), (count, count)) + diags_array(walls)
        potential[tuple(voxels.T)] = spsolve(laplacian.tocsc(), right)
    return potential


def flow_of_potential(
    labels: Labels,
    potential: Float64,
    *,
    core: tuple[slice, slice, slice] | None = None,
    spatial_mask: Mask | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    beyond: Sequence[Mask | None] | None = None,
    tolerance: float = 1e-9,
    threads: int = 1,
) -> Float32:
    """Unit vectors up the gradient of a potential, by the differences of `diffusion_flow`.

    A difference of two values that is at most ``tolerance`` times their sum counts 0.

    Examples
    --------
    >>> line = np.array([[[0, 5, 5, 5, 0]]])
    >>> flow_of_potential(line, np.array([[[0, 1.5, 2, 1.5, 0]]]))[2]
    array([[[ 0.,  1.,  0., -1.,  0.]]], dtype=float32)
    """
    flow = np.zeros((3, *labels.shape))
    for voxels in _voxels_of_each(labels).values():
        own = np.arange(len(voxels))
        neighbours = _neighbours(voxels, labels.shape, spatial_mask)
        outside = _values_beyond(voxels, labels.shape, beyond)
        u = np.append(potential[tuple(voxels.T)], 0.0)
        gradient = np.zeros((3, len(voxels)))
        for axis in range(3):
            missing = (neighbours[axis] == own) & np.isnan(outside[axis])
            before, after = np.where(np.isnan(outside[axis]), u[neighbours[axis]], outside[axis])
            change = after - before
            change[np.abs(change) <= tolerance * (after + before)] = 0.0
            gradient[axis] = change / np.where(missing.any(axis=0), 1.0, 2.0) / spacing[axis]
        largest = np.abs(gradient).max(axis=0)
        gradient /= np.where(largest == 0, 1.0, largest)  # squares of tiny numbers would underflow
        norm = np.sqrt((gradient**2).sum(axis=0))
        flow[(slice(None), *voxels.T)] = gradient / np.where(norm == 0, 1.0, norm)
    flow = flow.astype(np.float32)
    return flow if core is None else flow[(slice(None), *core)]


def poisson_flow(
    labels: Labels,
    *,
    core: tuple[slice, slice, slice] | None = None,
    spatial_mask: Mask | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    beyond: Sequence[Mask | None] | None = None,
    tolerance: float = 1e-9,
    threads: int = 1,
) -> Float32:
    """`flow_of_potential` of `poisson_potential`.

    Examples
    --------
    >>> poisson_flow(np.array([[[0, 5, 5, 5, 0]]]))[2]
    array([[[ 0.,  1.,  0., -1.,  0.]]], dtype=float32)
    """
    options: dict[str, Any] = {"spatial_mask": spatial_mask, "spacing": spacing, "beyond": beyond}
    potential = poisson_potential(labels, **options)
    return flow_of_potential(labels, potential, core=core, tolerance=tolerance, **options)


# ── direct flow ──────────────────────────────────────────────────────────────────────────────


def direct_flow(
    labels: Labels,
    *,
    ids: UInt64,
    centres: Float64,
    origin: Sequence[int] = (0, 0, 0),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Float32:
    """Unit vectors from each voxel to its instance's centre; 0 at the voxel nearest to it.

    Examples
    --------
    >>> line = np.array([[[5, 5, 5]]])
    >>> direct_flow(line, ids=np.array([5], np.uint64), centres=np.array([[0.0, 0.0, 1.0]]))[2]
    array([[[ 1.,  0., -1.]]], dtype=float32)
    """
    flow = np.zeros((3, *labels.shape))
    centre_of = dict(zip(ids.tolist(), centres.astype(np.float64), strict=True))
    for number, voxels in _voxels_of_each(labels).items():
        if number not in centre_of:
            continue
        centre = centre_of[number]
        here = voxels + np.asarray(origin)
        towards = (centre - here) * np.asarray(spacing)
        norm = np.sqrt((towards**2).sum(axis=1, keepdims=True))
        vectors = towards / np.where(norm == 0, 1.0, norm)
        vectors[(here == np.rint(centre)).all(axis=1)] = 0.0
        flow[(slice(None), *voxels.T)] = vectors.T
    return flow.astype(np.float32)


def direct_centres(labels: Labels, *, spatial_mask: Mask | None = None) -> tuple[UInt64, Float64]:
    """Where the direct flow of each instance of a whole volume points to.

    That is the centre of mass, or, for an instance with an unannotated neighbour, the voxel
    deepest inside it (:func:`_deepest_voxel`).

    Examples
    --------
    >>> direct_centres(np.array([[[5, 5, 0]]]))
    (array([5], dtype=uint64), array([[0. , 0. , 0.5]]))
    """
    table = instance_facts(labels)
    centres = table.centres
    if spatial_mask is not None:
        annotated = np.asarray(spatial_mask) >= 0.5
        for row, voxels in enumerate(_voxels_of_each(labels).values()):
            mine = np.zeros(labels.shape, dtype=bool)
            mine[tuple(voxels.T)] = True
            if _leaves_annotation(voxels, mine, annotated):
                centres[row] = _deepest_voxel(mine, annotated)
    return table.ids, centres


def _leaves_annotation(voxels: Int64, mine: Mask, annotated: Mask) -> bool:
    for axis, step in _FACES:
        there = voxels.copy()
        there[:, axis] += step
        there = there[(there[:, axis] >= 0) & (there[:, axis] < mine.shape[axis])]
        if (~mine & ~annotated)[tuple(there.T)].any():
            return True
    return False


def _deepest_voxel(mine: Mask, annotated: Mask) -> Int64:
    """First maximum (C order) of the distance transform of one instance's mask.

    The mask is padded by one voxel, with 0; but with 1 beside those of its voxels that lie in
    an outer face of the volume and are not annotated, as if the instance went on there.
    """
    padded = np.pad(mine, 1)
    for axis, step in _FACES:
        face: list[Any] = [slice(None)] * 3
        face[axis] = 0 if step < 0 else -1
        beside: list[Any] = [slice(1, -1)] * 3
        beside[axis] = face[axis]
        padded[tuple(beside)] = (mine & ~annotated)[tuple(face)]
    depth = distance_transform_edt(padded)[1:-1, 1:-1, 1:-1]
    return np.array(np.unravel_index(np.argmax(depth), depth.shape), dtype=np.int64)


# ── tracking ─────────────────────────────────────────────────────────────────────────────────


def foreground_voxels(
    mask: npt.NDArray[Any],
    *,
    origin: Sequence[int] = (0, 0, 0),
    dtype: npt.DTypeLike = np.float64,
) -> npt.NDArray[Any]:
    """Global indices of the voxels that are not 0, in C order: ``[N, 3]``.

    Examples
    --------
    >>> foreground_voxels(np.array([[[0, 1, 1]]]), origin=(5, 0, 0), dtype=np.int64)
    array([[5, 0, 1],
           [5, 0, 2]])
    """
    voxels: npt.NDArray[Any] = (np.argwhere(mask) + np.asarray(origin)).astype(dtype)
    return voxels


def interleave(flow: npt.NDArray[Any]) -> Float32:
    """``[3, Z, Y, X]`` to ``float32[Z, Y, X, 4]``; the last channel is 0.

    Examples
    --------
    >>> interleave(np.ones((3, 1, 1, 1), np.float32))
    array([[[[1., 1., 1., 0.]]]], dtype=float32)
    """
    out = np.zeros((*flow.shape[1:], 4), dtype=np.float32)
    out[..., :3] = np.moveaxis(flow, 0, -1)
    return out


def track(
    flow4: Float32,
    positions: Float64,
    steps_left: npt.NDArray[np.int32],
    *,
    origin: Sequence[int],
    shape: Sequence[int],
    step_size: float,
    interpolation: str = "nearest",
    threads: int = 1,
) -> None:
    """Advance particles in place until they have no steps left or stand outside the block.

    Parameters
    ----------
    flow4
        ``[Z, Y, X, 4]``, the flow of the block (see :func:`interleave`).
    positions, steps_left
        ``float64[N, 3]`` in coordinates of the whole volume and ``int32[N]``; both are changed.
    origin
        The block's first voxel.
    shape
        Shape of the whole volume, to which positions are clipped.
    interpolation
        "nearest" or "linear": the flow of the voxel, or trilinear between it and the next ones,
        which have to be in the block then.

    Examples
    --------
    >>> flow = interleave(np.ones((3, 1, 1, 2), np.float32))
    >>> positions, steps = np.zeros((1, 3)), np.array([5], np.int32)
    >>> track(flow, positions, steps, origin=(0, 0, 0), shape=(1, 1, 9), step_size=1.0)
    >>> positions, steps
    (array([[0., 0., 2.]]), array([3], dtype=int32))
    """
    step = np.float32(step_size)
    last = np.asarray(shape, dtype=np.float64) - 1.0
    while True:
        voxel = np.clip(positions, 0.0, last).astype(np.int64) - np.asarray(origin)
        ends = np.asarray(flow4.shape[:3])
        if interpolation == "linear":
            ends = ends - (np.asarray(origin) + ends < np.asarray(shape))
        here = ((voxel >= 0) & (voxel < ends)).all(axis=1)
        moving = np.flatnonzero(here & (steps_left > 0))
        if len(moving) == 0:
            return
        if interpolation == "linear":
            vector = between_voxels(flow4, voxel[moving], positions[moving] % 1.0)
        else:
            vector = flow4[tuple(voxel[moving].T)]
        move = step * vector[:, :3]  # a float32 product, added to a float64 position
        positions[moving] = np.clip(positions[moving] + move, 0.0, last)
        steps_left[moving] -= 1


def between_voxels(flow4: Float32, voxels: Int64, part: Float64) -> Float32:
    """Trilinear flow at voxels plus parts of a voxel ``[N, 3]``, along x, then y, then z.

    Examples
    --------
    >>> flow = interleave(np.arange(2.0).reshape(1, 1, 1, 2).repeat(3, axis=0).astype("f4"))
    >>> between_voxels(flow, np.zeros((1, 3), int), np.array([[0, 0, 0.25]]))[0, 0]
    np.float32(0.25)
    """
    follows = np.minimum(voxels + 1, np.asarray(flow4.shape[:3]) - 1)
    (z, y, x), (z1, y1, x1) = voxels.T, follows.T
    fz, fy, fx = (part[:, axis, None] for axis in range(3))
    values = flow4.astype(np.float64)

    def lerp(a: Float64, b: Float64, f: Float64) -> Float64:
        return a + (b - a) * f

    low, high = (
        lerp(
            lerp(values[k, y, x], values[k, y, x1], fx),
            lerp(values[k, y1, x], values[k, y1, x1], fx),
            fy,
        )
        for k in (z, z1)
    )
    return lerp(low, high, fz).astype(np.float32)


# ── convergence cells and clusters ───────────────────────────────────────────────────────────


def _cell_size(radius: float) -> float:
    return max(1.0, radius / 2.0)


def _cell_counts(shape: Sequence[int], radius: float) -> Triple:
    z, y, x = (math.floor(n / _cell_size(radius)) + 1 for n in shape)
    return z, y, x


def _cell_indices(positions: Float64, shape: Sequence[int], radius: float) -> Int64:
    most = np.asarray(_cell_counts(shape, radius), dtype=np.int64) - 1
    return np.clip(np.rint(positions / _cell_size(radius)).astype(np.int64), 0, most)


def _cell_corners(indices: Int64, radius: float) -> Float64:
    return np.asarray(np.floor(indices * _cell_size(radius)), dtype=np.float64)


def cell_numbers(positions: Float64, *, shape: Sequence[int], radius: float) -> Int64:
    """Linear number (C order) of the convergence cell of each position.

    Examples
    --------
    >>> cell_numbers(np.array([[0.0, 0.0, 2.9]]), shape=(8, 8, 8), radius=4.0)  # cells of 2
    array([1])
    """
    index = _cell_indices(positions, shape, radius)
    return np.asarray(np.ravel_multi_index(tuple(index.T), _cell_counts(shape, radius)), np.int64)


def cell_table(
    positions: Float64, *, shape: Sequence[int], radius: float
) -> tuple[CellTable, Int64]:
    """The occupied cells, and for each position the row of its cell.

    Examples
    --------
    >>> where = np.array([[0.0, 0.0, 2.5], [0.0, 0.0, 2.0]])
    >>> table, row = cell_table(where, shape=(8, 8, 8), radius=4.0)
    >>> table.counts, table.offsets[0, 2] / FIXED_POINT, row
    (array([2]), np.float64(0.5), array([0, 0]))
    """
    index = _cell_indices(positions, shape, radius)
    offset = positions - _cell_corners(index, radius)
    fixed = np.rint(offset * FIXED_POINT).astype(np.int64)
    numbers = cell_numbers(positions, shape=shape, radius=radius)
    cells, row, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    offsets = np.zeros((len(cells), 3), dtype=np.int64)
    np.add.at(offsets, row, fixed)
    return CellTable(cells.astype(np.int64), counts.astype(np.int64), offsets), row.astype(np.int64)


def cluster_labels(positions: Float64, *, shape: Sequence[int], radius: float) -> Int64:
    """Cluster of each position: 1..K, numbered by smallest cell in C order.

    Examples
    --------
    >>> where = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> cluster_labels(where, shape=(1, 1, 10), radius=4.0)
    array([2, 1, 1])
    """
    table, row = cell_table(positions, shape=shape, radius=radius)
    if len(table) == 0:
        return row
    index = np.stack(np.unravel_index(table.cells, _cell_counts(shape, radius)), axis=1)
    corner = _cell_corners(index, radius)
    inside = table.offsets / (table.counts[:, None] * FIXED_POINT)

    # The tree only proposes pairs, some too many; the definition decides.
    tree = cKDTree(corner + inside)
    one, two = tree.query_pairs(radius * (1 + 1e-9) + 1e-6, output_type="ndarray").T
    apart = (corner[one] - corner[two]) + (inside[one] - inside[two])
    joined = np.sqrt((apart**2).sum(axis=1)) < radius
    edges = (one[joined], two[joined])
    graph = coo_matrix((np.ones(len(edges[0])), edges), shape=(len(table), len(table)))
    component = connected_components(graph, directed=False)[1]

    _, first_cell = np.unique(component, return_index=True)
    rank = np.argsort(np.argsort(first_cell))  # components by the first cell they own
    return np.asarray(rank[component][row] + 1, dtype=np.int64)


def segment_group1(
    mask: Mask,
    flow: npt.NDArray[Any],
    *,
    n_steps: int,
    step_size: float,
    convergence_radius: float,
    min_size: int,
    interpolation: str = "nearest",
) -> Int64:
    """Instance labels of a whole volume from its flow: track, cluster, drop the small.

    Examples
    --------
    >>> flow = np.zeros((3, 1, 1, 8), np.float32)
    >>> flow[2] = [1, 0, -1, 0, 0, 1, 0, -1]
    >>> mask = np.array([[[1, 1, 1, 0, 0, 1, 1, 1]]])
    >>> options = {"step_size": 1.0, "convergence_radius": 2.0, "min_size": 2}
    >>> segment_group1(mask, flow, n_steps=4, **options)
    array([[[1, 1, 1, 0, 0, 2, 2, 2]]])
    """
    foreground = np.asarray(mask) != 0
    positions = np.argwhere(foreground).astype(np.float64)
    steps_left = np.full(len(positions), n_steps, dtype=np.int32)
    track(
        interleave(flow),
        positions,
        steps_left,
        origin=(0, 0, 0),
        shape=foreground.shape,
        step_size=step_size,
        interpolation=interpolation,
    )
    clusters = cluster_labels(positions, shape=foreground.shape, radius=convergence_radius)
    labels = np.zeros(foreground.shape, dtype=np.int64)
    labels[foreground] = drop_small(clusters, min_size=min_size)
    return labels


def drop_small(clusters: Int64, *, min_size: int) -> Int64:
    """Numbers 1..K with those that occur fewer than ``min_size`` times 0, the rest 1..K again.

    Examples
    --------
    >>> drop_small(np.array([1, 2, 2, 3, 3]), min_size=2)
    array([0, 1, 1, 2, 2])
    """
    sizes = np.bincount(clusters)
    kept = sizes >= min_size
    kept[:1] = False
    return np.asarray(np.where(kept, np.cumsum(kept), 0)[clusters], dtype=np.int64)


# ── contacts, pieces, nearest labels ─────────────────────────────────────────────────────────


def contacts(
    labels: Labels, flow4: Float32, *, core: Sequence[int], step_size: float = 1.0
) -> ContactTable:
    """Pairs of labels that touch by a face whose first voxel lies in the block.

    Examples
    --------
    >>> labels = np.array([[[7, 3, 3]]])
    >>> flow4 = interleave(np.ones((3, 1, 1, 3), np.float32))
    >>> table = contacts(labels, flow4, core=(1, 1, 3))
    >>> table.a, table.b, table.area, table.mean_dot, table.crossing
    (array([3], dtype=uint64), array([7], dtype=uint64), array([1]), array([3.]), array([1]))
    """
    rows: dict[tuple[int, int], list[int]] = {}
    step = np.float32(step_size)
    for voxel in np.argwhere(np.asarray(labels) != 0).tolist():
        for axis in range(3):
            beside = [v + (i == axis) for i, v in enumerate(voxel)]
            if any(v >= c for v, c in zip(voxel, core, strict=True)):
                continue
            if beside[axis] >= labels.shape[axis]:
                continue
            one, two = int(labels[tuple(voxel)]), int(labels[tuple(beside)])
            if one == two or two == 0:
                continue
            f, g = flow4[tuple(voxel)], flow4[tuple(beside)]
            z, y, x = (float(f[i]) * float(g[i]) for i in range(3))
            scaled = min(max((z + y) + x, -LARGEST_DOT), LARGEST_DOT) * DOT_WHOLE
            row = rows.setdefault((min(one, two), max(one, two)), [0, 0, 0, 0])
            row[0] += 1
            row[1] += math.floor(scaled)
            row[2] += round((scaled - math.floor(scaled)) * DOT_REST)
            row[3] += bool(step * f[axis] >= 0.5) + bool(step * g[axis] <= -0.5)
    pairs = sorted(rows)
    columns = np.array([rows[p] for p in pairs], dtype=np.int64).reshape(-1, 4).T.copy()
    ids = np.array(pairs, dtype=np.uint64).reshape(-1, 2).T.copy()
    return ContactTable(ids[0], ids[1], *columns)


def join_touching(labels: Labels, flow: npt.NDArray[Any], *, min_dot: float = 0.0) -> Int64:
    """Join instances whose flows agree where they touch; number by smallest id.

    Examples
    --------
    >>> flow = np.ones((3, 1, 1, 3), np.float32)
    >>> join_touching(np.array([[[3, 1, 0]]]), flow)
    array([[[1, 1, 0]]])
    """
    dots: dict[tuple[int, int], list[float]] = {}
    field = np.asarray(flow, dtype=np.float32).astype(np.float64)
    for axis in range(3):
        low: list[Any] = [slice(None)] * 3
        high = low.copy()
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        a, b = labels[tuple(low)], labels[tuple(high)]
        touch = (a != b) & (a != 0) & (b != 0)
        f, g = field[(slice(None), *low)], field[(slice(None), *high)]
        products = (f[:, touch] * g[:, touch]).sum(axis=0)
        for one, two, dot in zip(a[touch].tolist(), b[touch].tolist(), products, strict=True):
            dots.setdefault((min(one, two), max(one, two)), []).append(float(dot))
    ids = np.unique(labels[labels != 0])
    number = {old: row for row, old in enumerate(ids.tolist())}
    joined = [p for p, values in dots.items() if math.fsum(values) / len(values) > min_dot]
    pairs = np.array([[number[a], number[b]] for a, b in joined], dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(ids), len(ids)))
    component = connected_components(graph, directed=False)[1]
    _, first = np.unique(component, return_index=True)
    rank = np.argsort(np.argsort(first))[component] + 1 if len(ids) else component
    out = np.zeros(labels.shape, dtype=np.int64)
    inside = labels != 0
    out[inside] = rank[np.searchsorted(ids, labels[inside])]
    return out


def pieces(labels: Labels) -> tuple[npt.NDArray[np.int32], UInt64, Int64, Int64]:
    """6-connected pieces of equal labels, numbered 1.. by first voxel in C order.

    Returns
    -------
    number, ids, voxels, first
        Of each voxel its piece; of each piece its label, its size and the linear index of its
        first voxel.

    Examples
    --------
    >>> pieces(np.array([[[4, 4, 0, 4]]]))[0]
    array([[[1, 1, 0, 2]]], dtype=int32)
    """
    number = np.zeros(labels.shape, dtype=np.int64)
    found = 0
    for own in np.unique(labels[labels != 0]):
        parts, count = label(labels == own)
        number[parts > 0] = parts[parts > 0] + found
        found += count
    kinds, first, voxels = np.unique(number, return_index=True, return_counts=True)
    some = kinds > 0
    order = np.argsort(first[some])
    rank = np.zeros(found + 1, dtype=np.int32)
    rank[kinds[some][order]] = np.arange(1, found + 1)
    first, voxels = first[some][order].astype(np.int64), voxels[some][order].astype(np.int64)
    ids: UInt64 = labels.ravel()[first].astype(np.uint64)
    return rank[number], ids, voxels, first


def nearest_labels(
    points: Int64, labels: Labels, *, groups: Int64 | None = None, group_of: Labels | None = None
) -> tuple[Int64, UInt64]:
    """Squared distance and label of the nearest labelled voxel; the smallest label of a tie.

    Parameters
    ----------
    points
        int64 ``[N, 3]``.
    labels
        ``[Z, Y, X]``.
    groups, group_of
        int64 ``[N]`` and ``[Z, Y, X]``: only voxels of a point's group count.

    Examples
    --------
    >>> nearest_labels(np.array([[0, 0, 1]]), np.array([[[9, 0, 4]]]))
    (array([1]), array([4], dtype=uint64))
    """
    voxels = np.argwhere(labels != 0)
    found = labels[labels != 0].astype(np.uint64)
    squared = np.full(len(points), FARTHEST, dtype=np.int64)
    best = np.zeros(len(points), dtype=np.uint64)
    for row, point in enumerate(points):
        some = slice(None)
        if groups is not None and group_of is not None:
            some = group_of[labels != 0] == groups[row]
        if len(voxels[some]):
            apart = ((voxels[some] - point) ** 2).sum(axis=1)
            squared[row] = apart.min()
            best[row] = found[some][apart == apart.min()].min()
    return squared, best


def split_disconnected(labels: Labels, *, min_fragment_ratio: float = 0.1) -> Int64:
    """Pieces that are large parts of their instance become instances, the others join these.

    Examples
    --------
    >>> split_disconnected(np.array([[[8, 8, 0, 8, 8]]]))
    array([[[1, 1, 0, 2, 2]]])
    """
    out = np.zeros(labels.shape, dtype=np.int64)
    last = 0
    for own in np.unique(labels[labels != 0]):
        number, _, voxels, _ = pieces(np.where(labels == own, labels, 0))
        large = voxels >= max(1, int(voxels.sum() * min_fragment_ratio))
        if not large.any():  # all of them are small: they stay together
            large[:] = True
            number = np.minimum(number, 1)
            voxels, large = voxels[:1], large[:1]
        new = np.concatenate([[0], np.where(large, np.cumsum(large) + last, 0)])
        last += int(large.sum())
        mine = new[number]
        points = np.argwhere((number > 0) & (mine == 0))
        _, nearest = nearest_labels(points, mine)
        mine[tuple(points.T)] = nearest
        out += mine
    return out


def segment_group2(mask: Mask, flow: npt.NDArray[Any], **settings: Any) -> Int64:
    """As `segment_group1`; then touching instances are joined, disconnected ones are split.

    Examples
    --------
    >>> flow = np.ones((3, 1, 1, 9), np.float32)
    >>> options = {"n_steps": 0, "step_size": 1.0, "convergence_radius": 1.0, "min_size": 1}
    >>> segment_group2(np.array([[[1, 1, 1, 1, 0, 1, 1, 1, 1]]]), flow, **options)
    array([[[1, 1, 1, 1, 0, 2, 2, 2, 2]]])
    """
    clusters = segment_group1(mask, flow, **settings)
    return split_disconnected(join_touching(clusters, flow))


# ── fusing and comparing ─────────────────────────────────────────────────────────────────────


def blend_weight(shape: Sequence[int], *, tapers: Sequence[tuple[int, int]]) -> Float32:
    """Weight of each voxel of a tile, tapering where it overlaps a neighbour.

    Parameters
    ----------
    shape
        Shape of the tile.
    tapers
        For each axis the width of the overlap at its low and at its high face; 0 is no taper.

    Examples
    --------
    >>> blend_weight((4,), tapers=[(2, 0)]).round(3)
    array([0.146, 0.854, 1.   , 1.   ], dtype=float32)
    """
    weight = np.ones(tuple(shape))
    for axis, (length, (low, high)) in enumerate(zip(shape, tapers, strict=True)):
        along = np.ones(length)
        for i in range(length):
            for from_face, width in ((i, low), (length - 1 - i, high)):
                if from_face < width:
                    along[i] *= math.sin(math.pi / 2 * (from_face + 0.5) / width) ** 2
        weight *= along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return weight.astype(np.float32)


def contingency(truth: Labels, labels: Labels) -> tuple[UInt64, UInt64, Int64]:
    """How many voxels each pair of ids shares, sorted by pair, background included.

    Examples
    --------
    >>> contingency(np.array([[[0, 4, 4]]]), np.array([[[0, 2, 2]]]))
    (array([0, 4], dtype=uint64), array([0, 2], dtype=uint64), array([1, 2]))
    """
    pairs = np.stack([truth.ravel().astype(np.uint64), labels.ravel().astype(np.uint64)])
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    return found[0], found[1], counts.astype(np.int64)


# ── cleaning up ──────────────────────────────────────────────────────────────────────────────


def flow_errors(
    labels: Labels,
    flow4: Float32,
    *,
    ids: UInt64,
    centres: Float64,
    origin: Sequence[int] = (0, 0, 0),
) -> ErrorTable:
    """Squared differences between the direct flow and a given one, summed over each instance.

    Examples
    --------
    >>> line, flow = np.array([[[5, 5, 5]]]), np.zeros((1, 1, 3, 4), np.float32)
    >>> ids, centres = np.array([5], np.uint64), np.array([[0.0, 0.0, 1.0]])
    >>> flow_errors(line, flow, ids=ids, centres=centres).sums / FIXED_POINT
    array([2.])
    """
    wanted = direct_flow(labels, ids=ids, centres=centres, origin=origin).astype(np.float64)
    square = ((wanted - np.moveaxis(flow4[..., :3], -1, 0)) ** 2).sum(axis=0)
    present = _voxels_of_each(labels)
    sums = [
        min(sum(round(s * FIXED_POINT) for s in square[tuple(v.T)].tolist()), LARGEST_ERROR)
        for v in present.values()
    ]
    return ErrorTable(np.array(list(present), np.uint64), np.array(sums, np.int64))


def recover_orphans(mask: Mask, labels: Labels) -> Labels:
    """Foreground without a label takes that of the nearest labelled voxel, the smallest of a tie.

    Examples
    --------
    >>> recover_orphans(np.array([[[1, 1, 1, 1, 0, 1]]]), np.array([[[0, 4, 0, 9, 0, 0]]]))
    array([[[4, 4, 4, 9, 0, 9]]])
    """
    full = labels.copy()
    there = np.argwhere(labels != 0)
    for voxel in np.argwhere((mask != 0) & (labels == 0)) if len(there) else ():
        squared = ((there - voxel) ** 2).sum(axis=1)
        nearest = there[squared == squared.min()]
        full[tuple(voxel)] = labels[tuple(nearest.T)].min()
    return full


def end_sums(labels: Labels, ends: Float64) -> EndTable:
    """Number of particles of each label and the sums of their final positions.

    Examples
    --------
    >>> end_sums(np.array([5, 5, 0]), np.array([[0, 0, 1.5], [0, 0, 2], [9, 9, 9]])).means
    array([[0.  , 0.  , 1.75]])
    """
    ids = np.unique(labels[labels != 0]).astype(np.uint64)
    fixed = [np.rint(ends[labels == i] * END_PARTS).astype(np.int64) for i in ids.tolist()]
    sums = np.array([f.sum(axis=0) for f in fixed], np.int64).reshape(-1, 3)
    counts = np.array([len(f) for f in fixed], np.int64)
    return EndTable(ids, counts, sums // END_PARTS, sums % END_PARTS)


def background(
    labels: Labels, *, core: tuple[slice, ...] | None = None
) -> tuple[npt.NDArray[np.int32], UInt64, UInt64]:
    """The 6-connected components of the background, and the extremes of the labels beside each.

    Examples
    --------
    >>> background(np.array([[[0, 3, 0, 0, 7]]]))[0]
    array([[[1, 0, 2, 2, 0]]], dtype=int32)
    """
    inside = core or tuple(slice(0, n) for n in labels.shape)
    components = label(labels[inside] == 0)[0].astype(np.int32)
    lowest, highest = [], []
    for number in range(1, components.max(initial=0) + 1):
        beside = set()
        for axis, step in _FACES:
            there = np.argwhere(components == number) + [s.start for s in inside]
            there[:, axis] += step
            there = there[(there[:, axis] >= 0) & (there[:, axis] < labels.shape[axis])]
            beside |= set(labels[tuple(there.T)].tolist()) - {0}
        lowest.append(min(beside, default=2**64 - 1))
        highest.append(max(beside, default=0))
    return components, np.array(lowest, np.uint64), np.array(highest, np.uint64)


def fill_holes(labels: Labels) -> Labels:
    """Background that one instance encloses, apart from the volume's border, becomes its own.

    Examples
    --------
    >>> fill_holes(np.pad(np.pad(np.zeros((1, 1, 1), int), 1, constant_values=4), 1))[2, 2]
    array([0, 4, 4, 4, 0])
    """
    components, lowest, highest = background(labels)
    filled = labels.copy()
    for number, (low, high) in enumerate(zip(lowest, highest, strict=True), start=1):
        mine = components == number
        core = np.zeros_like(mine)
        core[1:-1, 1:-1, 1:-1] = mine[1:-1, 1:-1, 1:-1]
        if low == high and (core == mine).all():
            filled[mine] = low
    return filled


def remove_bad_flow_masks(labels: Labels, flow: npt.NDArray[Any], *, threshold: float) -> Int64:
    """Drop instances whose flow is far from the direct flow, number the others 1..K.

    Examples
    --------
    >>> flow = np.zeros((3, 1, 1, 5), np.float32)
    >>> flow[2] = [1, 0, -1, -9, -9]
    >>> remove_bad_flow_masks(np.array([[[7, 7, 7, 3, 3]]]), flow, threshold=0.4)
    array([[[1, 1, 1, 0, 0]]])
    """
    table = instance_facts(labels)
    errors = flow_errors(labels, interleave(flow), ids=table.ids, centres=table.centres)
    kept = errors.sums / (3.0 * FIXED_POINT * table.voxels) <= threshold
    new = np.zeros(labels.shape, dtype=np.int64)
    for number, instance in enumerate(table.ids[kept].tolist(), start=1):
        new[labels == instance] = number
    return new
