"""How wide a halo tracking reads around a block: wide ones read more, narrow ones more often.

A few blocks are tried: how far particles go beyond their block says how many of them leave each
halo, and so how many rounds there are and how many blocks each round reads again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import BlockGrid, Region

HALOS = (0, 4, 8, 16, 32)
"""Widths to choose from, in voxels."""

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


def halos_for(travel: float) -> list[int]:
    """Widths worth trying where no particle goes farther than ``travel`` voxels.

    Examples
    --------
    >>> halos_for(5), halos_for(1000)
    ([0, 4, 5], [0, 4, 8, 16, 32])
    """
    farthest = min(HALOS[-1], math.ceil(travel))
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


def expected_reads(
    particles: int, shares: Sequence[float], halos: Sequence[int], halo: int, travel: float
) -> float:
    """How often a block is read: once, and for each time that one of its particles is handed over.

    Parameters
    ----------
    particles
        Of a block.
    shares
        The share of them that goes beyond each of ``halos``; what goes beyond the last may go on.
    halos
        Widths, ascending.
    halo
        Of the tracking: from one hand-over to the next a particle crosses it and one voxel more.
    travel
        Most voxels that a particle goes.

    Examples
    --------
    >>> expected_reads(1000, [0.5, 0.0], [0, 4], 4, 100.0)
    1.0
    >>> expected_reads(1000, [0.5, 0.1], [0, 4], 4, 100.0)
    21.0
    """
    reads = 1.0
    for gone in np.arange(halo + 1, travel + 1, halo + 1):
        row = int(np.searchsorted(halos, gone, side="right")) - 1
        reads += min(1.0, particles * shares[row])
    return reads


def choose_halo(
    grid: BlockGrid, chunks: Sequence[int], travel: float, tries: Sequence[Sequence[Any]]
) -> HaloChoice:
    """The halo with which tracking decodes the fewest voxels, all rounds together.

    Parameters
    ----------
    grid, chunks
        See `voxels_read`.
    travel
        Most voxels that a particle goes.
    tries
        For each block tried: its particles, how many of them were followed, and how many of these
        went beyond each halo of `halos_for`.

    Examples
    --------
    >>> grid = BlockGrid((64, 64, 64), (32, 32, 32))
    >>> choose_halo(grid, (8, 8, 8), 4, [(9999, 100, [10, 0])])
    HaloChoice(halo=4, reason='0.0 % of particles leave it: 1.0 reads of 2.0 times the volume')
    """
    if len(grid) == 1:
        return HaloChoice(0, "there is one block")
    halos = halos_for(travel)
    followed = sum(t[1] for t in tries)
    if followed == 0:
        return HaloChoice(halos[min(2, len(halos) - 1)], "the blocks tried hold no particle")
    particles = sum(t[0] for t in tries) // len(tries)
    best, reason = math.inf, ""
    shares = [sum(t[2][row] for t in tries) / followed for row in range(len(halos))]
    for halo, share in zip(halos, shares, strict=True):
        if halo == 0 and share > 0:
            continue  # what ends on a face goes to and fro across it, handed over at every step
        reads = expected_reads(particles, shares, halos, halo, travel)
        voxels = voxels_read(grid, chunks, halo)
        if reads * voxels < best:
            best, chosen = reads * voxels, halo
            reason = (
                f"{share:.1%} of particles leave it: {reads:.1f} reads of {voxels:.1f} times "
                "the volume"
            ).replace("%", " %")
    return HaloChoice(chosen, reason)
