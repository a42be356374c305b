"""Flows to labels of volumes that no machine holds: memory that does not grow, time that does.

For each edge (--size, again for more) a volume is made block by block: ellipsoids on a lattice, of
different forms and not quite on its nodes, 30 % of the voxels, and the unit vectors towards their
centres, everywhere, as float16. Then runs, as a process of its own with the default local cluster,

    topo-dask segment FLOWS LABELS_OUT --foreground TRUTH

and prints its time, the peak memory of its whole process tree and the disk used at most. Its labels
must be those that the volume was made with, up to their numbers; the peak must be at most 2.5 GiB
and that of the first size, to 20 %: else this ends with status 1. 1024^3 voxels take about 20 GB of
disk. Times by the clock say something on a machine that does nothing else; the time of all
processors is less touched by others.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from tissue import gib, topo_dask
from watch import disk

from topo_dask import compare
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels.parallel import available_cores
from topo_dask.storage import create_array

TITLE = "Scale: flows to labels of volumes that no machine holds"
PITCH = 40
WARM = 128
MOST_MEMORY = 2.5 * 2**30
MOST_GROWTH = 1.2
CHUNK = 64
SEED = 5


@dataclass(frozen=True)
class Lattice:
    """Ellipsoids, one in each cell of a cubic lattice, and the way to the centre of each.

    The half axes are 0.376 to 0.4546 of the lattice's pitch, the centres up to 0.02 of it off the
    middle. So each lies within its cell, and so do all voxels that lead to its centre.
    """

    edge: int

    @property
    def cells(self) -> int:
        """Cells along an axis."""
        return max(1, round(self.edge / PITCH))

    @property
    def ellipsoids(self) -> npt.NDArray[np.float64]:
        """``[2, 3, cells, cells, cells]``: centres and half axes, the same in every process."""
        n, pitch = self.cells, self.edge / self.cells
        chance = np.random.default_rng(SEED).random((2, 3, n, n, n))
        centres = (np.indices((n, n, n)) + 0.5 + 0.04 * (chance[0] - 0.5)) * pitch - 0.5
        return np.stack([centres, (0.376 + 0.0786 * chance[1]) * pitch])

    def block(
        self, region: Region, ellipsoids: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]:
        """Labels and flows of a block."""
        along = [np.arange(a, b) for a, b in zip(region.start, region.stop, strict=True)]
        cell = np.ix_(*(((v + 0.5) * self.cells / self.edge).astype(np.int64) for v in along))
        voxels = np.ix_(*along)
        away = np.empty((3, *region.shape), dtype=np.float32)
        inside = np.zeros(region.shape, dtype=np.float32)
        for axis in range(3):
            centre, half = (ellipsoids[which, axis][cell] for which in (0, 1))
            away[axis] = centre - voxels[axis]
            inside += (away[axis] / half) ** 2
        away /= np.sqrt((away**2).sum(axis=0))  # no centre is a voxel
        number = np.ravel_multi_index(np.broadcast_arrays(*cell), (self.cells,) * 3) + 1
        return np.where(inside <= 1, number, 0).astype(np.uint32), away.astype(np.float16)


def make(edge: int, truth: Path, flows: Path) -> tuple[int, int]:
    """Write the volume; gives its foreground voxels and its instances."""
    lattice, shape = Lattice(edge), (edge,) * 3
    chunks = (min(CHUNK, edge),) * 3
    labels = create_array(truth, shape, chunks, np.uint32)
    field = create_array(flows, (3, *shape), (3, *chunks), np.float16)
    ellipsoids = lattice.ellipsoids

    def write(region: Region) -> int:
        labels[region.slices], field[(slice(None), *region.slices)] = values = lattice.block(
            region, ellipsoids
        )
        return int(np.count_nonzero(values[0]))

    with ThreadPoolExecutor(available_cores()) as pool:
        return sum(pool.map(write, BlockGrid(shape, chunks))), lattice.cells**3


@dataclass(frozen=True)
class Outcome:
    """One row of the report."""

    edge: int
    foreground: int
    instances: int
    took: Any
    scratch: int
    same: bool

    @property
    def per_voxel(self) -> tuple[float, float]:
        """Nanoseconds a voxel, by the clock and of all processors."""
        voxels = self.edge**3 / 1e9
        return self.took.seconds / voxels, self.took.processor_seconds / voxels


def one_size(edge: int, folder: Path, options: Sequence[str]) -> Outcome:
    """Make a volume, segment it, compare, remove it."""
    truth, flows, out = (folder / f"{name}.zarr" for name in ("truth", "flows", "labels"))
    began = time.perf_counter()
    foreground, instances = make(edge, truth, flows)
    print(f"{edge}³ made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    given = disk(folder)
    took = topo_dask(folder, "segment", flows, out, "--foreground", truth, *options)
    found = compare(truth, out / "s0", ignore_background=False, cluster="threads")
    same = bool(found.same_partition) and found.label_instances == instances
    print(f"{edge}³: {'the truth' if same else found}", file=sys.stderr, flush=True)
    for path in (truth, flows, out):
        shutil.rmtree(path)
    return Outcome(edge, foreground, instances, took, took.disk - given, same)


def judged(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    """The table, and whether all that is asked for holds."""
    first, good = outcomes[0], True
    rows = []
    for one in outcomes:
        growth = one.took.pss / max(first.took.pss, 1)
        fits = one.took.rss <= MOST_MEMORY and 1 / MOST_GROWTH <= growth <= MOST_GROWTH
        good &= fits and one.same
        rows.append(
            [
                f"{one.edge}³",
                f"{one.foreground:,} ({one.foreground / one.edge**3:.0%})",
                f"{one.instances:,}",
                "the truth" if one.same else "WRONG",
                f"{one.took.seconds:.0f}",
                *(
                    f"{ns:.0f} ({ns / before - 1:+.0%})"
                    for ns, before in zip(one.per_voxel, first.per_voxel, strict=True)
                ),
                gib(one.took.rss),
                f"{gib(one.took.pss)} ({growth - 1:+.0%})" + ("" if fits else " TOO MUCH"),
                one.took.processes,
                gib(one.scratch),
            ]
        )
    headings = [
        "voxels", "particles", "instances", "labels", "seconds", "ns a voxel",
        "processor ns a voxel", "peak RSS GiB", "peak PSS GiB", "processes", "scratch GiB",
    ]  # fmt: skip
    return common.table(headings, rows), good


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument(
        "--size", type=int, action="append", help="edge of the cube; by default 512 and 1024"
    )
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--blocks", type=common.lengths, help="as in topo-dask")
    made.add_argument("--cluster", help="as in topo-dask")
    return made


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    options = ["--blocks", common.joined(parsed.blocks)] if parsed.blocks else []
    options += ["--cluster", parsed.cluster] if parsed.cluster else []
    with common.working_folder(parsed.folder) as folder:
        one_size(WARM, folder, options)  # compiles, if that was not done before
        outcomes = [one_size(edge, folder, options) for edge in parsed.size or (512, 1024)]
    text, good = judged(outcomes)
    wanted = (
        "Wanted: the truth, at most 2.5 GiB (RSS, which counts what processes share once for "
        "each), the peak PSS the same to 20 % and the time a voxel to 15 %."
    )
    common.report(made, parsed, TITLE, [text, wanted])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
