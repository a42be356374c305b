"""What blocks hand to blocks: particles in files, and who has written to whom in few bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.graph.track import Particles, by_block, join_particles
from topo_dask.grid import BlockGrid
from topo_dask.run.files import load_array, save_array

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


def post(path: Path, particles: Particles, grid: BlockGrid) -> tuple[Sent, Sent]:
    """Write particles for other blocks: first those under way, then those on their way home."""
    if len(particles) == 0:
        return [], []
    ordered, blocks, starts = by_block(particles, grid)
    rows = np.empty(len(ordered), dtype=PARTICLE)
    rows["position"], rows["steps"] = ordered.positions, ordered.steps
    rows["home"], rows["row"] = ordered.home, ordered.row
    save_array(path, rows)
    sent = list(zip(blocks.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True))
    under_way = ordered.steps[starts[:-1]] > 0
    return (
        [part for part, moving in zip(sent, under_way, strict=True) if moving],
        [part for part, moving in zip(sent, under_way, strict=True) if not moving],
    )


def collect(work: Path, mail: Sequence[Mail]) -> Particles:
    """The particles that others handed to a block."""
    parts = []
    for sent_in, sender, first, end in mail:
        rows = load_array(message(work, sent_in, sender), memory_map=True)[first:end]
        parts.append(
            Particles(
                np.ascontiguousarray(rows["position"]),
                np.ascontiguousarray(rows["steps"]),
                np.ascontiguousarray(rows["home"]),
                np.ascontiguousarray(rows["row"]),
            )
        )
    return join_particles(parts)


class Grouped:
    """Rows of a few whole numbers for each of many blocks, added in any order.

    A row takes 4 bytes and those of its numbers; Python's lists of tuples take 30 times that.

    Parameters
    ----------
    width
        Numbers of a row.
    code
        Their type: "i" below 2**31, "q" for any.

    Examples
    --------
    >>> rows = Grouped(2)
    >>> rows.add(7, 3, 1)
    >>> rows.add(5, 2, 2)
    >>> rows.add(7, 0, 4)
    >>> rows.blocks(), rows.of(7), rows.of(6)
    ([5, 7], ((0, 4), (3, 1)), ())
    """

    def __init__(self, width: int, code: str = "q") -> None:
        self.width, self.code = width, code
        self._rows = np.zeros(0, np.int32), np.zeros((0, width), np.dtype(code))  # ascending
        self._new = array("i"), array(code)

    def __len__(self) -> int:
        return len(self._rows[0]) + len(self._new[0])

    def add(self, block: int, *numbers: int) -> None:
        """A row for a block."""
        blocks, rows = self._new
        blocks.append(block)
        rows.extend(numbers)

    def _sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Blocks and rows, ascending; whatever the order in which they came."""
        if self._new[0]:
            blocks = np.concatenate([self._rows[0], np.asarray(self._new[0])])
            rows = np.concatenate([self._rows[1], np.asarray(self._new[1]).reshape(-1, self.width)])
            self._new = array("i"), array(self.code)
            order = np.lexsort((*rows.T[::-1], blocks))
            self._rows = blocks[order], rows[order]
        return self._rows

    def blocks(self) -> list[int]:
        """Those that have rows, ascending."""
        blocks, _ = self._sorted()
        first = np.ones(len(blocks), dtype=bool)
        first[1:] = blocks[1:] != blocks[:-1]
        found: list[int] = blocks[first].tolist()
        return found

    def of(self, block: int) -> tuple[tuple[int, ...], ...]:
        """The rows of a block, ascending."""
        blocks, numbers = self._sorted()
        first, stop = (int(np.searchsorted(blocks, np.int32(block), side)) for side in _SIDES)
        return tuple(map(tuple, numbers[first:stop].tolist()))


_SIDES: Sequence[Any] = ("left", "right")
