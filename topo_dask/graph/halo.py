"""How wide a halo tracking reads around a block: wide ones read more, narrow ones more often.

A few blocks are tried: how far particles go beyond their block says how many of them leave each
halo, and so how many rounds there are, how many blocks each round reads again, and how many
particles are handed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import BlockGrid, Region

HALOS = (0, 4, 8, 16, 32, 48, 64)
"""Widths to choose from, in voxels."""

ALWAYS = 32
"""A width that blocks of any size may have; wider ones only where it is at most half a block: what
is read, and so memory, is then at most eight times the block."""

COPIED = 0.25
"""What putting a voxel's flow in order for tracking takes, where decoding it takes 1."""

HANDED_OVER = 20
"""The same for a particle that is sorted, written, read and sorted again. Both as measured on real
tissue in zstd."""

TRIED = 20_000
"""Particles of a block that are followed to see how far they go."""


@dataclass(frozen=True)
class HaloChoice:
    """A halo and what speaks for it. Made by `choose_halo`.

    Parameters
    ----------
    halo
        In voxels.
    reason
        For people.
    """

    halo: int
    reason: str


def tried_blocks(grid: BlockGrid) -> list[int]:
    """The blocks to try: none of a single one, one of a few, else three, spread evenly.

    Examples
    --------
    >>> tried_blocks(BlockGrid((64, 64, 64), (16, 16, 16))), tried_blocks(BlockGrid((9,), (9,)))
    ([10, 32, 53], [])
    """
    count = 0 if len(grid) == 1 else 1 if len(grid) < 8 else 3
    return [int((k + 0.5) * len(grid) / count) for k in range(count)]


def halos_for(travel: float, blocks: Sequence[int]) -> list[int]:
    """Widths worth trying for blocks where no particle goes farther than ``travel`` voxels.

    Examples
    --------
    >>> halos_for(5, (64, 64, 64)), halos_for(1000, (64, 64, 64)), halos_for(50, (99, 128, 128))
    ([0, 4, 5], [0, 4, 8, 16, 32], [0, 4, 8, 16, 32, 48, 49])
    """
    widest = min(HALOS[-1], max(ALWAYS, min(blocks) // 2))
    farthest = min(widest, math.ceil(travel))
    return [*(h for h in HALOS if h < farthest), farthest]


def voxels_read(grid: BlockGrid, chunks: Sequence[int], halo: int) -> float:
    """Voxels that are decoded to read every block with its halo, for each voxel of the volume.

    Parameters
    ----------
    grid
        The blocks.
    chunks
        Chunk (or shard) shape of the flow, which is decoded whole.
    halo
        Voxels around a block.

    Examples
    --------
    >>> grid = BlockGrid((64, 64, 64), (32, 32, 32))
    >>> [voxels_read(grid, (32, 32, 32), halo) for halo in (0, 1)]
    [1.0, 8.0]
    """
    share = 1.0
    for n, edges, chunk in zip(grid.shape, grid.edges, chunks, strict=True):
        low = np.maximum(edges[:-1] - halo, 0) // chunk * chunk
        high = np.minimum(-(-np.minimum(edges[1:] + halo, n) // chunk) * chunk, n)
        share *= float((high - low).sum()) / n
    return share


def beyond(positions: npt.NDArray[np.float64], core: Region) -> npt.NDArray[np.int64]:
    """How many voxels beyond a block particles are, 0 within: the halo that holds them.

    Examples
    --------
    >>> beyond(np.array([[2.0, 2, 2], [2, 8.9, 1]]), Region((2, 2, 2), (6, 6, 6)))
    array([0, 3])
    """
    voxels = positions.astype(np.int64)
    out = np.maximum(np.asarray(core.start) - voxels, voxels - (np.asarray(core.stop) - 1))
    farthest: npt.NDArray[np.int64] = np.maximum(out, 0).max(axis=1, initial=0)
    return farthest


def handed_over(
    shares: Sequence[float], halos: Sequence[int], halo: int, travel: float
) -> list[float]:
    """The share of the particles that is handed over once more, each time that any may be.

    Parameters
    ----------
    shares
        The share that goes beyond each of ``halos``; what goes beyond the last may go on.
    halos
        Widths, ascending.
    halo
        Of the tracking: from one hand-over to the next a particle crosses it and one voxel more.
    travel
        Most voxels that a particle goes.

    Examples
    --------
    >>> handed_over([0.5, 0.2], [0, 4], 0, 5.0)
    [0.5, 0.5, 0.5, 0.2, 0.2]
    >>> handed_over([0.5, 0.2], [0, 4], 4, 12.0)
    [0.2, 0.2]
    """
    gone = np.arange(halo + 1, travel + 1, halo + 1)
    rows = np.searchsorted(halos, gone, side="right") - 1
    return [shares[row] for row in rows]


def expected_reads(particles: int, away: Sequence[float]) -> float:
    """How often a block is read: once, and for each time that one of its particles is handed over.

    Parameters
    ----------
    particles
        Of a block.
    away
        See `handed_over`.

    Examples
    --------
    >>> expected_reads(1000, []), expected_reads(1000, [0.1, 0.0001])
    (1.0, 2.1)
    """
    return 1.0 + sum(min(1.0, particles * share) for share in away)


def choose_halo(
    grid: BlockGrid, chunks: Sequence[int], travel: float, tries: Sequence[Sequence[Any]]
) -> HaloChoice:
    """The halo with which tracking takes least, all rounds together.

    It takes what decoding the flow takes for each read of a block: once, and for each time that one
    of its particles is handed over; a part of it for each voxel that is read; and more for each
    particle that is handed over.

    Parameters
    ----------
    grid, chunks
        See `voxels_read`.
    travel
        Most voxels that a particle goes.
    tries
        For each block tried: its particles, how many of them were followed, and how many of these
        went beyond each halo of `halos_for`, for the largest of the blocks.

    Examples
    --------
    >>> grid = BlockGrid((64, 64, 64), (32, 32, 32))
    >>> choose_halo(grid, (8, 8, 8), 4, [(9999, 100, [10, 0])])
    HaloChoice(halo=4, reason='0.0 % of particles leave it: 1.0 reads of 2.0 times the volume')
    """
    if len(grid) == 1:
        return HaloChoice(0, "there is one block")
    halos = halos_for(travel, grid.largest)
    followed = sum(t[1] for t in tries)
    if followed == 0:
        return HaloChoice(halos[min(2, len(halos) - 1)], "the blocks tried hold no particle")
    particles = sum(t[0] for t in tries) // len(tries)
    best, reason = math.inf, ""
    shares = [sum(t[2][row] for t in tries) / followed for row in range(len(halos))]
    for halo, share in zip(halos, shares, strict=True):
        if halo == 0 and share > 0:
            continue  # what ends on a face goes to and fro across it, handed over at every step
        away = handed_over(shares, halos, halo, travel)
        reads = expected_reads(particles, away)
        voxels = voxels_read(grid, chunks, halo)
        taken = reads * (voxels + COPIED * voxels_read(grid, (1, 1, 1), halo))
        taken += HANDED_OVER * particles / math.prod(grid.largest) * sum(away)
        if taken < best:
            best, chosen = taken, halo
            reason = (
                f"{share:.1%} of particles leave it: {reads:.1f} reads of {voxels:.1f} times "
                "the volume"
            ).replace("%", " %")
    return HaloChoice(chosen, reason)
