"""Rows of the labelled seven-point stencil, a vector at a time.

Written in LLVM's own vectors, because compilers do not find this form of the loop: every load is
aligned, the neighbours along x come out of registers, and the byte that says which neighbours
count becomes one mask for a whole vector. A processor without such vectors gets shorter ones; the
arithmetic, and so every bit, stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Rows begin at multiples of so many voxels, and are worked on in groups of as many."""

VECTOR_BYTES = 64
"""A vector: 16 float32 or 8 float64."""

PLANES = 4
"""Rows above each other that are worked on together: what one reads as its own is the next one's
neighbour, and stays in registers."""

INDEX = ir.IntType(64)
BYTE = ir.IntType(8)


def aligned(size: int, dtype: Any) -> npt.NDArray[Any]:
    """Give an array whose first value, and so every row, lies on a multiple of a vector.

    The values are whatever was there.
    """
    item = np.dtype(dtype).itemsize
    raw = np.empty(size + VECTOR_BYTES // item, dtype=dtype)
    first = (-raw.ctypes.data) % VECTOR_BYTES // item
    return raw[first : first + size]


class _Rows:
    """Emits the instructions for rows of arrays that are given by name."""

    def __init__(
        self, context: Any, builder: Any, arrays: dict[str, tuple[Any, Any]], planes: int
    ) -> None:
        self.builder, self.planes = builder, planes
        self.data, self.element = {}, {}
        for name, (kind, value) in arrays.items():
            self.data[name] = context.make_array(kind)(context, builder, value).data
            self.element[name] = context.get_data_type(kind.dtype)
        self.lanes = VECTOR_BYTES // (arrays["old"][0].dtype.bitwidth // 8)
        self.real = ir.VectorType(self.element["old"], self.lanes)
        self.bytes = ir.VectorType(BYTE, self.lanes)
        self.zero = ir.Constant(self.real, [0.0] * self.lanes)

    def pointer(self, name: str, at: Any) -> Any:
        """Where a value of an array is."""
        return self.builder.gep(self.data[name], [at], source_etype=self.element[name])

    def values(self, name: str, at: Any) -> Any:
        """A vector of an array."""
        return self.builder.load(self.pointer(name, at), align=VECTOR_BYTES, typ=self.real)

    def flags(self, name: str, at: Any) -> Any:
        """A vector of bytes."""
        return self.builder.load(self.pointer(name, at), align=self.lanes, typ=self.bytes)

    def numbers(self, name: str, at: Any) -> Any:
        """A vector of int32."""
        kind = ir.VectorType(ir.IntType(32), self.lanes)
        return self.builder.load(self.pointer(name, at), align=4 * self.lanes, typ=kind)

    def has(self, flags: Any, bit: int) -> Any:
        """In which bytes a bit is set."""
        wanted = ir.Constant(self.bytes, [1 << bit] * self.lanes)
        none = ir.Constant(self.bytes, [0] * self.lanes)
        return self.builder.icmp_unsigned("!=", self.builder.and_(flags, wanted), none)

    def shuffled(self, a: Any, b: Any, order: list[int]) -> Any:
        """Take lanes of two vectors in some order."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), order)
        return self.builder.shuffle_vector(a, b, mask)

    def all_of(self, scalar: Any) -> Any:
        """A vector of the same value everywhere."""
        nothing = ir.Constant(self.real, ir.Undefined)
        one = self.builder.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0))
        return self.shuffled(one, nothing, [0] * self.lanes)

    def flushed(self, value: Any, least: Any) -> Any:
        """0 in place of what is smaller than ``least``: processors are slow with denormals."""
        absolute = self.builder.call(self.function("fabs", 1), [value])
        large = self.builder.fcmp_ordered(">=", absolute, least)
        return self.builder.select(large, value, self.zero)

    def means(
        self,
        at: list[Any],
        moved: Any,
        triples: list[tuple[Any, ...]],
        weights: list[Any],
        totals: list[Any] | None = None,
    ) -> list[Any]:
        """The weighted sums over the neighbours of a vector of each plane, on top of ``totals``.

        ``triples`` are the vectors and their two sides.
        """
        builder, lanes = self.builder, self.lanes
        centre, below, above, front, back = (builder.add(n, moved) for n in at[:5])
        stride = at[5]
        column = [self.values("old", below), *(t[1] for t in triples), self.values("old", above)]
        found = []
        for plane, (before, here, after) in enumerate(triples):
            linked = self.flags("links", self.up(centre, stride, plane))
            walls = None
            if "walls" in self.data:
                walls = self.flags("walls", self.up(centre, stride, plane))
            pairs = (
                (column[plane], column[plane + 2]),
                tuple(self.values("old", self.up(side, stride, plane)) for side in (front, back)),
                (
                    self.shuffled(before, here, list(range(lanes - 1, 2 * lanes - 1))),
                    self.shuffled(here, after, list(range(1, lanes + 1))),
                ),
            )
            total = None if totals is None else totals[plane]
            for axis, (low, high) in enumerate(pairs):
                both = self.counted(2 * axis, low, self.zero, here, linked, walls)
                both = self.counted(2 * axis + 1, high, both, here, linked, walls)
                total = self.times_plus(both, weights[axis], total)
            found.append(total)
        return found

    def up(self, at: Any, stride: Any, planes: int) -> Any:
        """Where what is so many planes farther up is."""
        for _ in range(planes):
            at = self.builder.add(at, stride)
        return at

    def counted(self, bit: int, value: Any, sum_: Any, here: Any, linked: Any, walls: Any) -> Any:
        """Add to a sum a neighbour that is linked, or behind a wall the voxel itself."""
        builder = self.builder

        def added(what: Any) -> Any:
            return what if sum_ is self.zero else builder.fadd(sum_, what)

        if walls is not None:  # nothing flows through: as if the voxel itself were there
            unlinked = builder.select(self.has(walls, bit), added(here), sum_)
        else:
            unlinked = sum_
        return builder.select(self.has(linked, bit), added(value), unlinked)

    def times_plus(self, value: Any, factor: Any, sum_: Any) -> Any:
        """Value * factor + sum, rounded once."""
        if sum_ is None:
            return self.builder.fmul(value, factor)
        return self.builder.call(self.function("fma", 3), [value, factor, sum_])

    def function(self, name: str, arguments: int) -> Any:
        """An operation of LLVM on vectors."""
        kind = ir.FunctionType(self.real, (self.real,) * arguments)
        name = f"llvm.{name}.v{self.lanes}{self.element['old'].intrinsic_name}"
        insert: Any = cgutils.get_or_insert_function
        return insert(self.builder.module, kind, name)

    def loop(
        self,
        at: list[Any],
        rows: list[Any],
        each: Callable[[Any, list[tuple[Any, ...]]], None],
    ) -> None:
        """Go through the groups of rows; what lies beyond a row's ends is a mirror image."""
        builder, lanes = self.builder, self.lanes
        count, width, first, end = rows
        centres = [self.up(at[0], at[5], plane) for plane in range(self.planes)]
        group, step = ir.Constant(INDEX, LANES), ir.Constant(INDEX, lanes)
        first = builder.mul(first, group)
        last = builder.sub(builder.mul(end, group), step)
        beyond_all = builder.mul(count, width)
        names = ("rows", "row", "head", "body", "end", "done")
        outer, row, head, body, end, done = (builder.append_basic_block(n) for n in names)
        entry = builder.block
        builder.branch(outer)
        builder.position_at_end(outer)
        begin = builder.phi(INDEX)
        begin.add_incoming(ir.Constant(INDEX, 0), entry)
        builder.cbranch(builder.icmp_signed("<", begin, beyond_all), row, done)
        builder.position_at_end(row)
        from_here, to_here = builder.add(begin, first), builder.add(begin, last)
        start = [self.values("old", builder.add(centre, from_here)) for centre in centres]
        mirrored = [self.shuffled(values, values, [0] * lanes) for values in start]
        builder.branch(head)
        builder.position_at_end(head)
        moved = builder.phi(INDEX)
        before, here = ([builder.phi(self.real) for _ in centres] for _ in range(2))
        phis = [moved, *before, *here]
        for phi, value in zip(phis, [from_here, *mirrored, *start], strict=True):
            phi.add_incoming(value, row)
        builder.cbranch(builder.icmp_signed("<", moved, to_here), body, end)
        builder.position_at_end(body)
        beyond = builder.add(moved, step)
        after = [self.values("old", builder.add(centre, beyond)) for centre in centres]
        each(moved, list(zip(before, here, after, strict=True)))
        for phi, value in zip(phis, [beyond, *here, *after], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        after = [self.shuffled(values, values, [lanes - 1] * lanes) for values in here]
        each(moved, list(zip(before, here, after, strict=True)))
        begin.add_incoming(builder.add(begin, width), builder.block)
        builder.branch(outer)
        builder.position_at_end(done)

    def prefetch(self, name: str, at: Any) -> None:
        """Bring a line of an array into the second-level cache; any address will do."""
        byte, number = BYTE.as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), (byte, number, number, number))
        insert: Any = cgutils.get_or_insert_function
        function = insert(self.builder.module, kind, "llvm.prefetch.p0")
        where = self.builder.bitcast(self.pointer(name, at), byte)
        reading, second_level, data = (ir.Constant(number, n) for n in (0, 2, 1))
        self.builder.call(function, [where, reading, second_level, data])

    def gathered(self, name: str, kinds: Any, start: Any) -> Any:
        """For each lane the value of an array at ``start`` plus the lane's kind."""
        builder, found = self.builder, ir.Constant(self.real, ir.Undefined)
        for lane in range(self.lanes):
            number = ir.Constant(ir.IntType(32), lane)
            kind = builder.zext(builder.extract_element(kinds, number), INDEX)
            where = self.pointer(name, builder.add(start, kind))
            value = builder.load(where, typ=self.element[name])
            found = builder.insert_element(found, value, number)
        return found

    def store(self, name: str, at: Any, value: Any) -> None:
        """Write a vector of an array."""
        where = self.builder.bitcast(self.pointer(name, at), self.real.as_pointer())
        self.builder.store(value, where, align=VECTOR_BYTES)


def _offsets(builder: Any, arguments: Any) -> Iterator[list[Any]]:
    """The values of the tuples that follow the arrays."""
    for values in arguments:
        yield [builder.extract_value(values, i) for i in range(len(values.type.elements))]


def _rows_of(names: tuple[str, ...], *, walled: bool, flush: bool, planes: int = 1) -> Any:
    """What numba calls for rows: arrays by name, then offsets, which rows, and weights."""

    def typed(kinds: tuple[Any, ...]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given = zip(signature.args, args, strict=True)
            row = _Rows(context, builder, dict(zip(names, given, strict=False)), planes)
            at, rows, weights = _offsets(builder, args[len(names) :])
            scale = [row.all_of(weight) for weight in weights]

            def each(moved: Any, triples: list[tuple[Any, ...]]) -> None:
                for name, soon in zip(("old", "links"), at[6:], strict=False):
                    row.prefetch(name, builder.add(soon, moved))
                for plane, value in enumerate(row.means(at, moved, triples, scale)):
                    kept = row.flushed(value, scale[3]) if flush else value
                    row.store("new", builder.add(row.up(at[0], at[5], plane), moved), kept)

            row.loop(at, rows, each)
            return context.get_dummy_value()

        return types.void(*kinds), generate

    # numba reads the names of the arguments
    if walled:

        def with_walls(
            _context: Any, new: Any, old: Any, links: Any, walls: Any, at: Any, rows: Any, by: Any
        ) -> Any:
            return typed((new, old, links, walls, at, rows, by))

        return with_walls

    def without(_context: Any, new: Any, old: Any, links: Any, at: Any, rows: Any, by: Any) -> Any:
        return typed((new, old, links, at, rows, by))

    return without


_FREE = ("new", "old", "links")
_WALLED = ("new", "old", "links", "walls")


relax_rows: Any = intrinsic(_rows_of(_FREE, walled=False, flush=False))
"""Replace rows by the weighted means of the linked neighbours.

Arguments: the flat arrays ``new`` and ``old``; ``links``, of which bit 0..5 of a voxel say whether
its neighbour z-, z+, y-, y+, x-, x+ counts; the offsets of the first row, and of the rows below,
above, in front of and behind it, and from plane to plane; how many rows, from one to the next, and
the first and end of their groups of `LANES`; the weights along z, y, x, and the size below which a
mean becomes 0 in the functions that flush.
"""

flush_rows: Any = intrinsic(_rows_of(_FREE, walled=False, flush=True))
"""`relax_rows`; tiny means become 0, because processors are slow with the tiniest."""

relax_walled_rows: Any = intrinsic(_rows_of(_WALLED, walled=True, flush=False))
"""`relax_rows` where a voxel itself stands for the neighbours whose bit is in ``walls``.

``walls`` is the argument after ``links``.
"""

relax_planes: Any = intrinsic(_rows_of(_FREE, walled=False, flush=False, planes=PLANES))
"""`relax_rows` in `PLANES` planes at once, of which the offset above is that above the last.

Two more offsets say where values of ``old`` and ``links`` lie that will be needed soon: of one row
each, so that a loop that is made for each plane of a front brings the next front near. Without, a
processor waits wherever a front begins.
"""

flush_planes: Any = intrinsic(_rows_of(_FREE, walled=False, flush=True, planes=PLANES))
"""`relax_planes`; tiny means become 0."""

flush_walled_rows: Any = intrinsic(_rows_of(_WALLED, walled=True, flush=True))
"""`relax_walled_rows`; tiny means become 0."""


# ── a three-term recurrence ──────────────────────────────────────────────────────────────────


def _recurrence_of(*, walled: bool, adding: bool, planes: int = 1) -> Any:
    """What numba calls for rows of a recurrence: arrays, then offsets, which rows, and weights."""
    names: tuple[str, ...] = ("new", "old", "links", "walls" if walled else "no walls")
    if adding:
        names += ("total", "kinds", "factors")

    def typed(kinds: tuple[Any, ...]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given = zip(signature.args, args, strict=True)
            row = _Rows(context, builder, dict(zip(names, given, strict=False)), planes)
            at, rows, weights = _offsets(builder, args[len(names) :])
            scale = [row.all_of(weight) for weight in weights]

            def each(moved: Any, triples: list[tuple[Any, ...]]) -> None:
                lowest = builder.add(at[0], moved)
                places = [row.up(lowest, at[5], plane) for plane in range(planes)]
                before = [builder.fneg(row.values("new", here)) for here in places]
                values = row.means(at, moved, triples, scale, before)
                for here, value in zip(places, values, strict=True):
                    row.store("new", here, value)
                    if adding:
                        factor = row.gathered("factors", row.numbers("kinds", here), at[6])
                        total = row.times_plus(value, factor, row.values("total", here))
                        row.store("total", here, total)

            row.loop(at, rows, each)
            return context.get_dummy_value()

        return types.void(*kinds), generate

    # numba reads the names of the arguments
    if adding:

        def add(
            _context: Any, new: Any, old: Any, links: Any, walls: Any,
            total: Any, kinds: Any, factors: Any, at: Any, rows: Any, by: Any,
        ) -> Any:  # fmt: skip
            return typed((new, old, links, walls, total, kinds, factors, at, rows, by))

        return add

    def step(
        _context: Any, new: Any, old: Any, links: Any, walls: Any, at: Any, rows: Any, by: Any
    ) -> Any:
        return typed((new, old, links, walls, at, rows, by))

    return step


recur_rows: Any = intrinsic(_recurrence_of(walled=False, adding=False))
"""Replace rows of ``new`` by the weighted sums of the linked neighbours minus what they are.

Arguments as of `relax_walled_rows`; walls do not count here.
"""

recur_walled_rows: Any = intrinsic(_recurrence_of(walled=True, adding=False))
"""`recur_rows` with walls."""

recur_planes: Any = intrinsic(_recurrence_of(walled=False, adding=False, planes=PLANES))
"""`recur_rows` in `PLANES` planes at once, of which the offset above is that above the last."""

add_rows: Any = intrinsic(_recurrence_of(walled=False, adding=True))
"""`recur_rows`; then the new values times a factor are added to ``total``.

After ``walls`` come the flat arrays ``total``; ``kinds`` (int32) of the voxels; and ``factors``,
of which that of kind k is at k plus the last offset.
"""

add_walled_rows: Any = intrinsic(_recurrence_of(walled=True, adding=True))
"""`add_rows` with walls."""

add_planes: Any = intrinsic(_recurrence_of(walled=False, adding=True, planes=PLANES))
"""`add_rows` in `PLANES` planes at once."""
