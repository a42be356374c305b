"""How much faster two workers are than one: `segment` on local clusters of pinned processes.

The volume is a crop of the labels, mirrored at its faces until it is as long as --size; so is its
flow, which is computed once. Every worker is a process with one thread, held on a core of its own;
the scheduler and this process run where there is room. Times are those of the call on an open
cluster whose workers are warm. The stages show where the rest goes: one that is a single task takes
as long on two workers as on one.

Ends with status 1 when the labels differ.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from overhead import Clock

import topo_dask
from topo_dask.cluster import start
from topo_dask.grid import BlockGrid
from topo_dask.kernels.parallel import available_cores
from topo_dask.run.execute import open_engine
from topo_dask.storage import create_array

TITLE = "Two workers against one"
WANTED = 1.8
CHUNK = 64


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=512, help="edge of the volume")
    made.add_argument("--crop", type=int, default=256, help="edge of the crop that is mirrored")
    made.add_argument("--blocks", type=common.lengths, default=(128, 128, 128))
    made.add_argument("--n-iter", type=int, default=200, help="of the flow")
    made.add_argument("--group", type=int, default=1, help="as in topo-dask segment")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=1)
    return made


# ── the volume ───────────────────────────────────────────────────────────────────────────────


def mirrored(array: npt.NDArray[Any], copy: Sequence[int]) -> npt.NDArray[Any]:
    """The copy number ``copy`` of a flow or of labels; every odd one is turned round."""
    turned = [axis for axis, number in enumerate(copy) if number % 2]
    result = np.flip(array, [axis + array.ndim - 3 for axis in turned])
    if array.ndim == 4 and turned:
        result = result.copy()
        result[turned] *= -1
    return result


def make_volume(labels: npt.NDArray[Any], parsed: argparse.Namespace, folder: Path) -> None:
    """Write flow and labels of the whole volume."""
    flow = topo_dask.generate_diffusion_flows(labels, parsed.n_iter)
    shape = (parsed.size,) * 3
    chunks = [min(CHUNK, n) for n in labels.shape]
    stores = (
        (create_array(folder / "flow.zarr", (3, *shape), (3, *chunks), flow.dtype), flow),
        (create_array(folder / "labels.zarr", shape, chunks, labels.dtype), labels),
    )
    for region in BlockGrid(shape, labels.shape):
        copy = [a // n for a, n in zip(region.start, labels.shape, strict=True)]
        inside = tuple(slice(n) for n in region.shape)
        for store, array in stores:
            store[(..., *region.slices)] = mirrored(array, copy)[(..., *inside)]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────


def pin(core: int) -> None:
    """Hold all threads of this process on one core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def segmented(workers: int, parsed: argparse.Namespace, folder: Path) -> tuple[float, Clock, str]:
    """Seconds, stages and digest of a run on so many workers."""
    with (
        start("local", workers=workers, cores=1) as cluster,
        open_engine(cluster) as engine,
    ):
        client = cluster.client
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            for n, address in enumerate(client.scheduler_info(n_workers=-1)["workers"]):
                client.run(pin, cores[n % len(cores)], workers=[address])
        for blocks, name in (((16,) * 3, "tiny"), (parsed.blocks, "whole")):
            clock = Clock(engine)
            source = folder / name if name == "tiny" else folder
            began = time.perf_counter()
            made = topo_dask.segment(
                source / "flow.zarr",
                folder / "out.zarr",
                foreground=source / "labels.zarr",
                blocks=blocks,
                group=parsed.group,
                cluster=clock,
                overwrite=True,
                progress=False,
            )
            seconds = time.perf_counter() - began
        return seconds, clock, common.digest(made.array)


def stage_table(one: Clock, many: Clock, workers: int) -> str:
    rows = [
        [stage, one.tasks[stage], f"{wall:.2f}", f"{many.wall[stage]:.2f}", ratio]
        for stage, wall in one.wall.items()
        for ratio in [f"{wall / many.wall[stage]:.2f}"]
    ]
    headings = ["stage", "tasks", "seconds, 1 worker", f"{workers} workers", "faster by"]
    return common.table(headings, rows)


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    labels = common.crop(parsed.labels, min(parsed.crop, parsed.size))
    with common.working_folder(parsed.folder) as folder:
        make_volume(labels, parsed, folder)
        tiny = argparse.Namespace(size=32, n_iter=8)
        (folder / "tiny").mkdir()
        make_volume(labels[:32, :32, :32], tiny, folder / "tiny")
        found: dict[int, list[Any]] = {1: [], parsed.workers: []}
        for _ in range(parsed.repetitions):
            for workers, runs in found.items():
                runs.append(segmented(workers, parsed, folder))
        shutil.rmtree(folder / "out.zarr")
    one, many = (statistics.median(run[0] for run in runs) for runs in found.values())
    same = len({run[2] for runs in found.values() for run in runs}) == 1
    body = [
        f"Crop: {common.described(labels)}; mirrored to {common.joined((parsed.size,) * 3, 'x')}, "
        f"in blocks of {common.joined(parsed.blocks, 'x')}.",
        f"1 worker {one:.1f} s, {parsed.workers} workers {many:.1f} s: {one / many:.2f} times as "
        f"fast (wanted >= {WANTED} for 2 on as many cores; here are {available_cores()}).",
        stage_table(found[1][-1][1], found[parsed.workers][-1][1], parsed.workers),
        f"Labels are {'identical' if same else 'DIFFERENT'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
