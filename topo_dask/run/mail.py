"""What blocks hand to blocks: particles in files, and who has written to whom in few bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.graph.track import AT_ONCE, Particles, by_block
from topo_dask.grid import BlockGrid
from topo_dask.run.files import read_rows, save_rows

PARTICLE = np.dtype(
    [("position", np.float64, (3,)), ("steps", np.int32), ("home", np.int64), ("row", np.int64)]
)
"""How particles under way are written, 44 bytes each."""

Mail = tuple[int, ...]
"""Particles handed over: round and block that wrote them, first row, end."""

Sent = list[tuple[int, int, int]]
"""Rows of a message by the block they are for: (block, first row, end)."""


def message(work: Path, sent_in: int, sender: int) -> Path:
    """Where the particles are that a block handed over in a round."""
    return work / f"mail-{sent_in}" / f"{sender}.npy"


def post(
    path: Path, batches: Iterable[Particles], total: int, grid: BlockGrid
) -> tuple[Sent, Sent]:
    """Write particles for other blocks.

    Parameters
    ----------
    path
        The file.
    batches, total
        The particles, some at a time, and how many they are.
    grid
        The blocks.

    Returns
    -------
    Which rows are for which block: of particles under way, and of those on their way home.
    """
    under_way: Sent = []
    home: Sent = []
    if total:
        save_rows(path, _in_rows(batches, grid, under_way, home), total, PARTICLE)
    return under_way, home


def _in_rows(
    batches: Iterable[Particles], grid: BlockGrid, under_way: Sent, home: Sent
) -> Iterator[npt.NDArray[Any]]:
    """The rows of a message; says what is where in it."""
    before = 0
    for particles in batches:
        ordered, blocks, starts = by_block(particles, grid)
        rows = np.empty(len(ordered), dtype=PARTICLE)
        rows["position"], rows["steps"] = ordered.positions, ordered.steps
        rows["home"], rows["row"] = ordered.home, ordered.row
        moving = (ordered.steps[starts[:-1]] > 0).tolist()
        starts += before
        sent = zip(blocks.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        for part, goes_on in zip(sent, moving, strict=True):
            (under_way if goes_on else home).append(part)
        before += len(rows)
        yield rows


def collect(work: Path, mail: Sequence[Mail], most: int = AT_ONCE) -> Iterator[Particles]:
    """The particles that others handed to a block, so many at a time."""
    room = np.empty(min(most, number_of(mail)), dtype=PARTICLE)
    held = 0
    for sent_in, sender, first, end in mail:
        path = message(work, sent_in, sender)
        while first < end:
            stop = min(end, first + most - held)
            read_rows(path, first, room[held : held + stop - first])
            held, first = held + stop - first, stop
            if held == most:
                yield _particles(room)
                held = 0
    if held:
        yield _particles(room[:held])


def number_of(mail: Sequence[Mail]) -> int:
    """How many particles mail holds."""
    return sum(end - first for _, _, first, end in mail)


def _particles(rows: npt.NDArray[Any]) -> Particles:
    position, steps, home, row = (rows[n].copy() for n in PARTICLE.names or ())
    return Particles(position, steps, home, row)


class Grouped:
    """Rows of a few whole numbers for each of many blocks, added in any order.

    A row takes 4 bytes and 4 for each of its numbers (8 where one of them is large); Python's
    lists of tuples take 30 times that.

    Parameters
    ----------
    width
        Numbers of a row.

    Examples
    --------
    >>> rows = Grouped(2)
    >>> rows.add(7, 3, 1)
    >>> rows.add(5, 2, 2)
    >>> rows.add(7, 0, 2**40)
    >>> rows.blocks(), rows.of(7), rows.of(6)
    ([5, 7], ((0, 1099511627776), (3, 1)), ())
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: tuple[npt.NDArray[Any], npt.NDArray[Any]]  # ascending
        self._new: tuple[array[int], array[int]]
        self.clear()

    def __len__(self) -> int:
        return len(self._rows[0]) + len(self._new[0])

    def add(self, block: int, *numbers: int) -> None:
        """A row for a block."""
        blocks, rows = self._new
        try:
            more = array(rows.typecode, numbers)
        except OverflowError:
            more, rows = array("q", numbers), array("q", rows)
            self._new = blocks, rows
        blocks.append(block)
        rows.extend(more)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = np.zeros(0, np.int32), np.zeros((0, self.width), np.int32)
        self._new = array("i"), array("i")

    def _sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Blocks and rows, ascending; whatever the order in which they came."""
        if self._new[0]:
            blocks, rows = np.asarray(self._new[0]), np.asarray(self._new[1])
            rows = rows.reshape(-1, self.width)
            if len(self._rows[0]):
                blocks = np.concatenate([self._rows[0], blocks])
                rows = np.concatenate([self._rows[1], rows])
            self._new = array("i"), array("i")
            order = np.lexsort((*rows.T[::-1], blocks))
            self._rows = blocks[order], rows[order]
        return self._rows

    def blocks(self) -> list[int]:
        """Those that have rows, ascending."""
        blocks, _ = self._sorted()
        found: list[int] = blocks[_firsts(blocks)].tolist()
        return found

    def of(self, block: int) -> tuple[tuple[int, ...], ...]:
        """The rows of a block, ascending."""
        blocks, numbers = self._sorted()
        first, stop = (blocks.searchsorted(np.int32(block), side) for side in _SIDES)
        return tuple(map(tuple, numbers[first:stop].tolist()))


class Pairs:
    """A few numbers below 2**31 for each of many blocks, added in any order: 8 bytes each.

    Examples
    --------
    >>> pairs = Pairs()
    >>> pairs.add(7, 3)
    >>> pairs.add(5, 2)
    >>> pairs.add(7, 0)
    >>> pairs.blocks(), pairs.of(7), pairs.of(6)
    ([5, 7], [0, 3], [])
    """

    def __init__(self) -> None:
        self._new, self._all = array("q"), np.zeros(0, np.int64)

    def add(self, block: int, number: int) -> None:
        """A number for a block."""
        self._new.append(block << 32 | number)

    def _sorted(self) -> npt.NDArray[np.int64]:
        if self._new:
            new = np.asarray(self._new)
            self._all = np.concatenate([self._all, new]) if len(self._all) else new
            self._new = array("q")
            self._all.sort()
        return self._all

    def blocks(self) -> list[int]:
        """Those that have numbers, ascending."""
        blocks = self._sorted() >> 32
        found: list[int] = blocks[_firsts(blocks)].tolist()
        return found

    def of(self, block: int) -> list[int]:
        """The numbers of a block, ascending."""
        known, low = self._sorted(), block << 32
        first, stop = known.searchsorted(low), known.searchsorted(low + 2**32)
        numbers: list[int] = (known[first:stop] - low).tolist()
        return numbers


def _firsts(ascending: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where another value begins."""
    first = np.ones(len(ascending), dtype=bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


_SIDES: Sequence[Any] = ("left", "right")
