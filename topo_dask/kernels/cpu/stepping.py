"""Particles along the flow of the voxel they are in: many at once in vector registers.

A particle is four float64 side by side, z, y, x and a 0, as its voxel's flow is four float32. The
vector operations are written for LLVM, of a width that it cuts to what the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from topo_dask.kernels.jit import compiled

LANES = 64
"""Particles advanced together: one alone would wait for its own last load at every step."""

CHUNK = 25
"""Steps made together before a look at who left; what leaves makes up to so many once more."""

ALONE = 3
"""Steps that are worth being made together for the sake of the particle that has no more."""

WIDTH = 16
"""Numbers in a vector operation: four particles."""

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_FLOAT32, _FLOAT64 = ir.FloatType(), ir.DoubleType()


class Place(NamedTuple):
    """Where a flow is in the volume: four numbers each, for z, y, x and what goes with them.

    The whole numbers are int32 or int64: they are those in which indices are computed.

    Parameters
    ----------
    low
        First voxel of the flow.
    last
        Index of its last voxel, from that.
    strides
        Numbers from a voxel to the next along each axis.
    top
        Last index of the volume, float64.
    """

    low: tuple[Any, ...]
    last: tuple[Any, ...]
    strides: tuple[Any, ...]
    top: tuple[float, ...]


def place_of(
    origin: Sequence[int], size: Sequence[int], shape: Sequence[int], *, index: Any = None
) -> Place:
    """Where an interleaved flow of ``size`` voxels is; ``index`` is int32 if that is enough.

    Examples
    --------
    >>> place_of((0, 0, 4), (1, 2, 4), (1, 2, 9)).strides
    (np.int32(32), np.int32(16), np.int32(4), np.int32(0))
    """
    nz, ny, nx = size
    if index is None:
        index = np.int32 if 4 * nz * ny * nx < 2**31 else np.int64

    def four(*numbers: int) -> tuple[Any, ...]:
        return (*map(index, numbers), index(0))

    return Place(
        four(*origin),
        four(nz - 1, ny - 1, nx - 1),
        four(4 * ny * nx, 4 * nx, 4),
        (*(float(n - 1) for n in shape), 0.0),
    )


# ------------------------------------------------------------------------------ vectors for LLVM


def _operation(function: Callable[..., Any]) -> Any:
    """What compiled code calls and LLVM gets from us."""
    return intrinsic(function)


def _constant(kind: Any, value: float, count: int = WIDTH) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _shuffle(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_INT32, len(order)), list(order))
    return builder.shuffle_vector(a, b, mask)


def _repeated(builder: Any, four: Any) -> Any:
    """A tuple of four numbers, again and again."""
    numbers = [builder.extract_value(four, n) for n in range(4)]
    vector = ir.Constant(ir.VectorType(numbers[0].type, WIDTH), ir.Undefined)
    for n in range(WIDTH):
        vector = builder.insert_element(vector, numbers[n % 4], _INT32(n))
    return vector


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, count: int) -> Any:
    """Where ``count`` elements of an array begin."""
    made = context.make_array(kind)(context, builder, array)
    whole = ir.VectorType(context.get_data_type(kind.dtype), count).as_pointer()
    return builder.bitcast(builder.gep(made.data, [index]), whole)


def _load(builder: Any, pointer: Any, align: int) -> Any:
    made = builder.load(pointer)
    made.align = align
    return made


def _store(builder: Any, value: Any, pointer: Any, align: int) -> None:
    builder.store(value, pointer).align = align


def _clipped(builder: Any, compare: Callable[..., Any], value: Any, low: Any, high: Any) -> Any:
    """``min(max(value, low), high)``."""
    value = builder.select(compare(">", value, low), value, low)
    return builder.select(compare("<", value, high), value, high)


@_operation
def _aim(
    typing: Any, particles: Any, at: Any, away: Any, j: Any, low: Any, last: Any, strides: Any
) -> Any:
    """Where in the flow the particles from number ``j`` are: into each one's first place of ``at``.

    One that is outside gets the nearest voxel, and a bit in ``away`` that stays. Without ``away``
    the flow is that of the whole volume, which none leaves.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kinds, place = signature.args, given[3]
        position = _pointer(context, builder, kinds[0], given[0], place, WIDTH)
        numbers = context.get_value_type(kinds[4].dtype)
        size = numbers.width // 8
        voxel = builder.fptosi(_load(builder, position, 8), ir.VectorType(numbers, WIDTH))
        if not isinstance(kinds[2], types.NoneType):
            there = builder.sub(voxel, _repeated(builder, given[4]))
            end = _repeated(builder, given[5])
            voxel = _clipped(builder, builder.icmp_signed, there, _constant(numbers, 0), end)
            mark = _pointer(context, builder, kinds[2], given[2], place, WIDTH)
            was = _load(builder, mark, size)
            _store(builder, builder.or_(was, builder.xor(there, voxel)), mark, size)
        index = builder.mul(voxel, _repeated(builder, given[6]))
        for turn in (2, 1):  # the sum over the four numbers of each particle, in all of them
            other = _shuffle(builder, index, index, [n ^ turn for n in range(WIDTH)])
            index = builder.add(index, other)
        _store(builder, index, _pointer(context, builder, kinds[1], given[1], place, WIDTH), size)
        return context.get_dummy_value()

    return types.void(particles, at, away, j, low, last, strides), generate


@_operation
def _move(typing: Any, particles: Any, at: Any, j: Any, flow: Any, top: Any, step: Any) -> Any:
    """One step of the particles from number ``j``, through the voxels at ``at``."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kinds, place = signature.args, given[2]
        parts = []
        for first in range(0, WIDTH, 4):
            element = builder.add(place, _INT64(first))
            index = _load(builder, _pointer(context, builder, kinds[1], given[1], element, 1), 4)
            index = builder.sext(builder.extract_element(index, _INT32(0)), _INT64)
            parts.append(
                _load(builder, _pointer(context, builder, kinds[3], given[3], index, 4), 4)
            )
        while len(parts) > 1:
            both = range(2 * parts[0].type.count)
            parts = [
                _shuffle(builder, a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        length = ir.Constant(ir.VectorType(_FLOAT32, WIDTH), ir.Undefined)
        for n in range(WIDTH):
            length = builder.insert_element(length, given[5], _INT32(n))
        moved = builder.fpext(builder.fmul(parts[0], length), ir.VectorType(_FLOAT64, WIDTH))
        position = _pointer(context, builder, kinds[0], given[0], place, WIDTH)
        ends = builder.fadd(_load(builder, position, 8), moved)
        zero, face = _constant(_FLOAT64, 0.0), _repeated(builder, given[4])
        ends = _clipped(builder, builder.fcmp_ordered, ends, zero, face)
        _store(builder, ends, position, 8)
        return context.get_dummy_value()

    return types.void(particles, at, j, flow, top, step), generate


# ------------------------------------------------------------------------------------- particles


@compiled
def _walk(flow: Any, particles: Any, k: Any, steps: Any, place: Any, step: Any) -> Any:
    """Advance the particle at ``particles[k]`` alone, until it leaves; gives the steps left."""
    low, last, strides, top = place.low, place.last, place.strides, place.top
    z, y, x = particles[k], particles[k + 1], particles[k + 2]
    while steps > 0:
        iz, iy, ix = np.int64(z) - low[0], np.int64(y) - low[1], np.int64(x) - low[2]
        if iz < 0 or iz > last[0] or iy < 0 or iy > last[1] or ix < 0 or ix > last[2]:
            break
        at = iz * strides[0] + iy * strides[1] + ix * strides[2]
        z = min(max(z + np.float64(step * flow[at]), 0.0), top[0])
        y = min(max(y + np.float64(step * flow[at + 1]), 0.0), top[1])
        x = min(max(x + np.float64(step * flow[at + 2]), 0.0), top[2])
        steps -= 1
    particles[k], particles[k + 1], particles[k + 2] = z, y, x
    return steps


@compiled
def _lanes(numbers: Any) -> Any:
    """Four numbers for each lane, 0, that begin where a cache line does.

    What a vector operation reads or writes would lie in two lines otherwise.
    """
    spare = 64 // numbers.itemsize
    room = np.zeros(4 * LANES + spare, numbers.dtype)
    first = (-room.ctypes.data % 64) // numbers.itemsize
    return room[first : first + 4 * LANES]


@compiled
def _steps(
    flow: Any, particles: Any, at: Any, away: Any, steps: Any, place: Any, step: Any
) -> None:
    """Make some steps in all lanes."""
    for _ in range(steps):
        for j in range(0, 4 * LANES, WIDTH):
            _aim(particles, at, away, j, place.low, place.last, place.strides)
        for j in range(0, 4 * LANES, WIDTH):
            _move(particles, at, j, flow, place.top, step)


@compiled
def _together(
    flow: Any, particles: Any, at: Any, away: Any, steps: Any, place: Any, step: Any
) -> bool:
    """Make some steps in all lanes; ``away`` is not 0 for particles that were outside meanwhile.

    Tells whether there are any.
    """
    away[:] = 0
    _steps(flow, particles, at, away, steps, place, step)
    bits = away[0]
    for j in range(4 * LANES):
        bits |= away[j]
    found: bool = bits != 0
    return found


@compiled
def _extremes(rest: Any) -> Any:
    """The fewest and the most steps that a lane still has to make, but for lanes without any."""
    fewest, most = np.int32(CHUNK), np.int32(0)
    for j in range(LANES):
        fewest = min(fewest, rest[j] if rest[j] > 0 else np.int32(CHUNK))
        most = max(most, rest[j])
    return fewest, most


@compiled
def track_nearest(
    flow: Any, positions: Any, left: Any, place: Any, step: Any, numbers: Any, span: Any
) -> None:
    """Advance the particles of a range; ``numbers`` is an empty array of the place's integers.

    All lanes make some steps together. One that left the flow on the way, or had fewer steps left,
    does them again from where it was, alone; then the next particle takes its lane.
    """
    particles, before = _lanes(positions), _lanes(positions)
    at, away = _lanes(numbers), _lanes(numbers)
    who, rest = np.full(LANES, -1), np.zeros(LANES, np.int32)
    coming, vacant = span[0], True
    while True:
        if vacant:
            for j in range(LANES):
                while who[j] < 0 and coming < span[1] and left[coming] == 0:
                    coming += 1
                if who[j] < 0 and coming < span[1]:
                    who[j], rest[j] = coming, left[coming]
                    for c in range(3):
                        particles[4 * j + c] = positions[coming, c]
                    coming += 1
        fewest, most = _extremes(rest)
        if most == 0:
            return
        steps = min(most, max(fewest, np.int32(ALONE)))
        before[:] = particles
        some_left = _together(flow, particles, at, away, steps, place, step)
        vacant = some_left or fewest <= steps
        if not vacant:
            for j in range(LANES):
                rest[j] = max(rest[j] - steps, 0)
            continue
        for j in range(LANES):
            k, i = 4 * j, who[j]
            went = (away[k] | away[k + 1] | away[k + 2]) != 0
            if rest[j] > steps and not went:
                rest[j] -= steps
            elif i >= 0:
                if went or rest[j] < steps:
                    left[i] = _walk(flow, before, k, rest[j], place, step)
                    particles[k : k + 3] = before[k : k + 3]
                else:
                    left[i] = 0
                for c in range(3):
                    positions[i, c] = particles[k + c]
                who[j], rest[j] = -1, 0


@compiled
def track_whole(
    flow: Any, positions: Any, n_steps: Any, place: Any, step: Any, numbers: Any, span: Any
) -> None:
    """Advance the particles of a range by as many steps through the flow of the whole volume."""
    particles, at = _lanes(positions), _lanes(numbers)
    for first in range(span[0], span[1], LANES):
        count = min(LANES, span[1] - first)
        for j in range(count):
            for c in range(3):
                particles[4 * j + c] = positions[first + j, c]
        _steps(flow, particles, at, None, n_steps, place, step)
        for j in range(count):
            for c in range(3):
                positions[first + j, c] = particles[4 * j + c]
