"""Where: regions, block grids, tiles and their overlaps. Pure integers, no arrays of voxels.

Axes are ``z, y, x``. A region is half open: ``start <= voxel < stop``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument, InvalidType

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Region:
    """A box of voxels, half open.

    Examples
    --------
    >>> r = Region((0, 0, 4), (2, 3, 8))
    >>> r.shape, r.size
    ((2, 3, 4), 24)
    >>> r.grow(2, within=(10, 10, 10))
    Region(start=(0, 0, 2), stop=(4, 5, 10))
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis, never negative."""
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> Slices:
        """The region as a tuple of slices, to index an array with."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, by: int | Sequence[int], *, within: Sequence[int]) -> Region:
        """The region grown by ``by`` voxels a side, clipped to a volume of shape ``within``."""
        widths = (by,) * len(self.start) if isinstance(by, int) else tuple(by)
        return Region(
            tuple(max(0, a - w) for a, w in zip(self.start, widths, strict=True)),
            tuple(min(n, b + w) for b, w, n in zip(self.stop, widths, within, strict=True)),
        )

    def intersect(self, other: Region) -> Region:
        """The common part; its ``size`` is 0 where there is none."""
        return Region(
            tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True)),
            tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True)),
        )

    def relative_to(self, origin: Sequence[int]) -> Region:
        """The same box in the coordinates of an array whose first voxel is ``origin``."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@dataclass(frozen=True)
class BlockGrid:
    """A volume cut into blocks; the last block of an axis may be shorter.

    Parameters
    ----------
    shape
        Shape of the volume.
    blocks
        For each axis the length of a block, or the lengths of all blocks as dask writes chunks.
        A block longer than the volume means the whole axis.

    Examples
    --------
    >>> grid = BlockGrid((5, 4), (2, 4))
    >>> grid
    BlockGrid(5x4 in 3 blocks of 2x4)
    >>> grid.region(2)
    Region(start=(4, 0), stop=(5, 4))
    >>> grid.owner(np.array([[3.9, 1.0]]))
    array([1])
    """

    shape: tuple[int, ...]
    blocks: tuple[int | tuple[int, ...], ...]

    @cached_property
    def edges(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each axis the first voxel of every block, and the end of the last."""
        return tuple(
            np.cumsum((0, *b)) if isinstance(b, tuple) else np.append(np.arange(0, n, b), n)
            for b, n in zip(self.blocks, self.shape, strict=True)
        )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(len(e) - 1 for e in self.edges)

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Lengths of the blocks along each axis, as dask writes them."""
        return tuple(tuple(np.diff(e).tolist()) for e in self.edges)

    @property
    def largest(self) -> tuple[int, ...]:
        """Shape of the largest block."""
        return tuple(max(c) for c in self.chunks)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of voxels of every block."""
        sizes = np.ones(1, dtype=np.int64)
        for axis in self.edges:
            sizes = np.multiply.outer(sizes, np.diff(axis)).ravel()
        return sizes.tolist()

    @cached_property
    def _bounds(self) -> tuple[list[int], ...]:
        return tuple(e.tolist() for e in self.edges)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is cached does not travel in every task."""
        return BlockGrid, (self.shape, self.blocks)

    def __len__(self) -> int:
        return math.prod(self.counts)

    def region(self, number: int) -> Region:
        """The block with this number (C order)."""
        start, stop, left = list[int](), list[int](), number
        for bounds in reversed(self._bounds):
            left, i = divmod(left, len(bounds) - 1)
            start.append(bounds[i])
            stop.append(bounds[i + 1])
        if left:
            raise IndexError(f"{self!r} has no block {number}")
        return Region(tuple(reversed(start)), tuple(reversed(stop)))

    def __iter__(self) -> Iterator[Region]:
        return (self.region(i) for i in range(len(self)))

    def owner(self, voxels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Number of the block in which each voxel or position ``[N, axes]`` lies (truncated)."""
        index = [
            np.searchsorted(e, voxels[:, axis].astype(np.int64), side="right") - 1
            for axis, e in enumerate(self.edges)
        ]
        return np.ravel_multi_index(tuple(index), self.counts).astype(np.int64)

    def touching(self, region: Region) -> list[int]:
        """Numbers of the blocks that share voxels with ``region``, ascending."""
        if region.size == 0:
            return []
        numbers = [0]
        for a, b, e in zip(region.start, region.stop, self._bounds, strict=True):
            along = range(bisect_right(e, max(0, a)) - 1, bisect_left(e, min(b, e[-1])))
            numbers = [n * (len(e) - 1) + i for n in numbers for i in along]
        return numbers

    def __repr__(self) -> str:
        def cross(lengths: Sequence[int]) -> str:
            return "x".join(map(str, lengths))

        return f"BlockGrid({cross(self.shape)} in {len(self)} blocks of {cross(self.largest)})"


def as_lengths(value: Any, *, argument: str, axes: int, least: int) -> tuple[int, ...]:
    """Check a block shape, overlap or the like: one whole number, or one for each axis.

    Raises
    ------
    InvalidArgument
        Wrong number of entries, or an entry below ``least``.
    InvalidType
        Entries that are not whole numbers.

    Examples
    --------
    >>> as_lengths(64, argument="blocks", axes=3, least=1)
    (64, 64, 64)
    """
    allowed = f"one whole number >= {least} or {axes} of them, in the order z, y, x"
    example = f"Pass e.g. {argument}=({', '.join(['64'] * axes)})."
    entries = list(value) if isinstance(value, (Sequence, np.ndarray)) else [value] * axes
    if isinstance(value, str) or not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in entries
    ):
        raise InvalidType(argument, repr(value), allowed, example)
    if len(entries) != axes or min(entries) < least:
        raise InvalidArgument(argument, repr(value), allowed, example)
    return tuple(int(v) for v in entries)
