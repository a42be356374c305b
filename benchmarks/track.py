"""Tracking in blocks, with its hand-over, against the bare kernel on the whole volume.

The kernel has positions and flow in memory. The run, `segment` on an open engine, reads each
block's flow with its halo from a store, finds the foreground, tracks, hands particles over, writes
the cells in which they end, and goes on until none is left: all stages `track`. Both make the same
steps, so particle steps a second compare them. The kernel that sorts particles into cells is not
tracking, though it is called there: its time is taken off. What reading and decoding takes is shown
beside it: it is the storage's cost, and the wider the halo and the smaller the blocks, the more
often the same flow is decoded.

- A crop in small blocks, one after the other on a cluster of one worker, and the kernel on one
  thread (zarr decodes on its own); for a flow as `flows` stores it and for an uncompressed one.
- All of the volume in blocks of the usual size, once: the same, and on as many workers, of one
  thread each, as the kernel has threads.

Ends with status 1 when the labels depend on how the flow is stored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import zarr
from overhead import Clock, opened

import topo_dask
from topo_dask.kernels import cpu
from topo_dask.kernels.parallel import available_cores
from topo_dask.run.execute import Engine
from topo_dask.storage import create_array

TITLE = "Tracking in blocks"
N_STEPS = 100
WANTED = 0.8

Flow = npt.NDArray[np.float32]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=128, help="edge of the crop, in its middle")
    made.add_argument("--blocks", type=common.lengths, default=(64, 64, 64))
    made.add_argument("--chunks", type=common.lengths, default=(64, 64, 64), help="of the flow")
    made.add_argument("--halo", type=int, help="as in topo-dask segment; by default auto")
    made.add_argument("--n-iter", type=int, default=200, help="of the flow")
    made.add_argument("--repetitions", type=int, default=5, help="of the crop")
    made.add_argument("--large", type=int, help="edge of the second crop; by default all")
    made.add_argument("--large-blocks", type=common.lengths, default=(128, 128, 128))
    made.add_argument(
        "--workers", type=int, default=available_cores(), help="for the second crop; 1: no cluster"
    )
    return made


def bare(flow: Flow, mask: npt.NDArray[Any], repetitions: int, threads: int = 1) -> float:
    """Seconds of the kernel alone: every particle of the volume to its end."""
    times, ready = common.Times(), cpu.interleave(flow)
    for _ in range(repetitions):
        positions = cpu.foreground_voxels(mask)
        left = np.full(len(positions), N_STEPS, dtype=np.int32)
        options = {"origin": (0, 0, 0), "shape": mask.shape, "step_size": 1.0, "threads": threads}
        times.add(lambda p=positions, s=left, o=options: cpu.track(ready, p, s, **o))
    return times.median


def flow_stores(flow: Flow, chunks: Sequence[int], folder: Path) -> dict[str, Path]:
    """The flow as `flows` stores it, and as it is in memory."""
    fitting = [3, *map(min, chunks, flow.shape[1:])]
    create_array(folder / "flow.zarr", flow.shape, fitting, flow.dtype)[...] = flow
    plain = folder / "plain.zarr"
    options: dict[str, Any] = {"compressors": None, "fill_value": 0}
    zarr.create_array(plain, shape=flow.shape, chunks=fitting, dtype="f4", **options)[...] = flow
    return {"stored as by flows": folder / "flow.zarr", "stored uncompressed": plain}


@dataclass(frozen=True)
class Rounds:
    """All rounds of a run: seconds, those of reading by one worker, in words, the labels."""

    wall: float
    read: float
    words: str
    digest: str


def rounds(
    flow: Path, engine: Engine, parsed: argparse.Namespace, folder: Path, blocks: Sequence[int]
) -> Rounds:
    """Run `segment` and keep what its stages `track` took."""
    clock = Clock(engine)
    made = topo_dask.segment(
        flow,
        folder / "out.zarr",
        foreground=folder / "labels.zarr",
        blocks=tuple(blocks),
        halo="auto" if parsed.halo is None else parsed.halo,
        n_steps=N_STEPS,
        cluster=clock,
        overwrite=True,
        progress=False,
    )
    stages = [stage for stage in clock.wall if stage.split("-")[0] == "track"]
    read = sum(clock.codec[stage] for stage in stages) / engine.slots
    wall = sum(clock.wall[stage] - clock.cells[stage] / engine.slots for stage in stages)
    return Rounds(wall, read, str(made.details["rounds"]), common.digest(made.array))


class Measured:
    """What was measured of one volume, as rows of a table and notes."""

    def __init__(self, labels: npt.NDArray[Any], parsed: argparse.Namespace, folder: Path) -> None:
        folder.mkdir()
        self.labels, self.parsed, self.folder = labels, parsed, folder
        self.flow = topo_dask.generate_diffusion_flows(labels, parsed.n_iter)
        self.stores = flow_stores(self.flow, parsed.chunks, folder)
        chunks = [min(c, n) for c, n in zip(parsed.chunks, labels.shape, strict=True)]
        create_array(folder / "labels.zarr", labels.shape, chunks, labels.dtype)[...] = labels
        self.steps = N_STEPS * np.count_nonzero(labels) / 1e6
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.digests: set[str] = set()

    def kernel(self, repetitions: int, threads: int = 1) -> float:
        """The row of the kernel alone; its seconds."""
        bare(self.flow[:, :8, :8, :8], self.labels[:8, :8, :8], 1, threads)
        alone = bare(self.flow, self.labels > 0, repetitions, threads)
        name = f"kernel alone, in memory, threads: {threads}"
        self.rows.append([name, f"{alone:.3f}", "", f"{self.steps / alone:.0f}", "1.00", ""])
        return alone

    def run(
        self, name: str, engine: Engine, blocks: Sequence[int], alone: float, repetitions: int
    ) -> None:
        """The row of a store's flow tracked in blocks."""
        store, title = self.stores[name], f"{name}, on {engine.slots}"
        one = (store, engine, self.parsed, self.folder, blocks)
        runs = [rounds(*one) for _ in range(repetitions)]
        wall, read = (statistics.median(getattr(r, key) for r in runs) for key in ("wall", "read"))
        ratios = [f"{alone / wall:.2f}", f"{alone / (wall - read):.2f}"]
        row = [title, f"{wall:.3f}", f"{read:.3f}", f"{self.steps / wall:.0f}", *ratios]
        self.rows.append(row)
        self.notes.append(f"{title}: rounds: {runs[-1].words}")
        self.digests |= {r.digest for r in runs}

    def text(self, blocks: Sequence[int]) -> str:
        """All of it."""
        headings = ["tracking", "seconds", "of it reading", "M steps/s", "of the kernel's"]
        return "\n\n".join(
            [
                f"Labels: {common.described(self.labels)}, in blocks of "
                f"{common.joined(blocks, 'x')}.",
                common.table([*headings, f"reading not counted (wanted >= {WANTED})"], self.rows),
                "\n".join(f"- {note}" for note in self.notes),
                f"Labels are {'identical' if len(self.digests) == 1 else 'DIFFERENT'}.",
            ]
        )


def in_small_blocks(parsed: argparse.Namespace, folder: Path) -> Measured:
    """A crop, several times."""
    made = Measured(common.crop(parsed.labels, parsed.size), parsed, folder)
    alone = made.kernel(parsed.repetitions)
    with opened(1) as engine:
        for name, store in made.stores.items():
            rounds(store, engine, parsed, folder, parsed.blocks)  # warms up
            made.run(name, engine, parsed.blocks, alone, parsed.repetitions)
    return made


def in_usual_blocks(parsed: argparse.Namespace, folder: Path, warm: Measured) -> Measured:
    """The volume, once; ``warm`` is what the workers begin with."""
    made = Measured(common.crop(parsed.labels, parsed.large), parsed, folder)
    name = next(iter(made.stores))
    for workers in sorted({1, parsed.workers}):
        alone = made.kernel(1, workers)
        with opened(workers) as engine:
            rounds(warm.stores[name], engine, parsed, warm.folder, parsed.blocks)
            made.run(name, engine, parsed.large_blocks, alone, 1)
    return made


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    with common.working_folder(parsed.folder) as folder:
        small = in_small_blocks(parsed, folder / "small")
        large = in_usual_blocks(parsed, folder / "large", small)
    body = [small.text(parsed.blocks), large.text(parsed.large_blocks)]
    common.report(made, parsed, TITLE, body)
    return 0 if len(small.digests) == len(large.digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
