"""What the ledger and the bounded submission cost.

The job on the labels, `flows` then `segment`, on a local cluster of one process with one thread:
with a single slot nothing waits for its neighbours or for the last block of a stage, so the wall
time of all stages over the time that their tasks take in the worker is what submitting tasks,
getting their results and writing them down costs. Times are those of the runs' own records. The
driver and the scheduler have a core of their own if there are two.

Then stages of many tasks that do nothing, and the same again, resumed; and a stage of tasks that
take a known time each, on all cores. Wanted: at most 3 % of the job on the labels and of tasks of
a second; the stages of 100 000 blocks resumed within 5 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

import topo_dask
from topo_dask.grid import BlockGrid
from topo_dask.run.cluster_options import ClusterOptions
from topo_dask.run.execute import open_engine
from topo_dask.run.ledger import Ledger, fingerprint
from topo_dask.storage import create_array

TITLE = "Ledger and bounded submission"
STAGES = ("table", "flows")


@dataclass(frozen=True)
class Item:
    """A block, as small as those of real stages."""

    grid: BlockGrid
    block: int

    def __str__(self) -> str:
        return f"block {self.grid.region(self.block)}"


@dataclass(frozen=True)
class Nap:
    """A task that computes for so long."""

    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds} s"


def nothing(item: Item) -> int:
    """A stage that takes no time."""
    return item.block


def busy(item: Nap) -> float:
    """A stage whose time is known: its own processor time."""
    began, until = time.perf_counter(), time.process_time() + item.seconds
    while time.process_time() < until:
        sum(range(1000))
    return time.perf_counter() - began


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, help="edge of the crop, in its middle; by default all")
    made.add_argument("--block", type=int, default=128, help="edge of the blocks of the labels")
    made.add_argument("--n-iter", type=int, default=200, help="as in topo-dask flows")
    made.add_argument("--blocks", type=int, default=100_000, help="that compute nothing")
    made.add_argument("--tasks", type=int, default=60, help="that take --seconds each")
    made.add_argument("--seconds", type=float, default=1.0)
    return made


def resumed(count: int) -> list[list[Any]]:
    """Rows: stages of so many empty tasks, run and resumed."""
    rows = []
    side = round(count ** (1 / 3))
    grid = BlockGrid((128 * side, 128 * side, 128 * -(-count // side**2)), (128, 128, 128))
    items = [Item(grid, n) for n in range(count)]
    voxels = [128**3] * count
    with tempfile.TemporaryDirectory() as folder, open_engine("sync") as engine:
        for name in ("run", "resumed"):
            began = time.perf_counter()
            ledger = Ledger(Path(folder))
            for stage in STAGES:
                mark = fingerprint("benchmark", grid.chunks)
                found = ledger.run(engine, stage, mark, nothing, items, voxels=voxels)
                assert found == list(range(count))
            took = time.perf_counter() - began
            rows.append([name, len(STAGES), count, f"{took:.2f}", f"{1e6 * took / count / 2:.0f}"])
    return rows


def tissue(parsed: argparse.Namespace) -> tuple[list[list[Any]], float]:
    """Rows of the stages of the job on the labels, and what they cost beyond their tasks."""
    blocks: dict[str, Any] = {"blocks": parsed.block, "ignore_memory": True}
    rows, wall, own = [], 0.0, 0.0
    with common.working_folder(parsed.folder) as folder:
        labels, flows, found = (folder / f"{n}.zarr" for n in ("labels", "flows", "found"))
        crop = common.crop(parsed.labels, parsed.size)
        create_array(labels, crop.shape, (64, 64, 64), crop.dtype)[...] = crop
        with open_engine(ClusterOptions("local", workers=1, cores=1)) as engine:
            options = {**blocks, "cluster": engine}
            for again in ("warm", "measured"):
                print(again, file=sys.stderr, flush=True)
                for path in (flows, found):
                    shutil.rmtree(path, ignore_errors=True)
                topo_dask.flows(labels, flows, n_iter=parsed.n_iter, **options)
                topo_dask.segment(flows, found, foreground=labels, **options)
            for path in (flows / "run.json", found / "s0" / "run.json"):
                for stage in json.loads(path.read_text())["attempts"][-1]["stages"]:
                    took, busy = stage["seconds"], stage["seconds_in_tasks"]
                    wall, own = wall + took, own + busy
                    rows.append([stage["stage"], stage["blocks"], f"{busy:.2f}", f"{took:.2f}"])
                    each = 1e3 * (took - busy) / stage["blocks"]
                    rows[-1].append(f"{each:.1f}")
    cost = wall / own - 1
    tasks = sum(row[1] for row in rows)
    each = 1e3 * (wall - own) / tasks
    rows.append(["all", tasks, f"{own:.2f}", f"{wall:.2f}", f"{each:.1f}"])
    return rows, cost


def overhead(tasks: int, seconds: float) -> tuple[list[Any], float]:
    """Row of tasks that take a known time on a local cluster, and their overhead."""
    items = [Nap(seconds)] * tasks
    with tempfile.TemporaryDirectory() as folder, open_engine("local") as engine:
        warm = [Nap(0.01)] * engine.slots
        Ledger(Path(folder)).run(engine, "warm", "m", busy, warm)
        began = time.perf_counter()
        own = sum(Ledger(Path(folder)).run(engine, "busy", "m", busy, items))
        wall = time.perf_counter() - began
        cost = wall * engine.slots / own - 1
        return [
            tasks,
            engine.slots,
            f"{own / engine.slots:.2f}",
            f"{wall:.2f}",
            f"{cost:.1%}",
        ], cost


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    stages, share = tissue(parsed)
    rows = resumed(parsed.blocks)
    row, cost = overhead(parsed.tasks, parsed.seconds)
    took = float(rows[1][3])
    body = [
        common.table(["stage", "tasks", "their own time", "wall seconds", "ms a task"], stages),
        f"The job on the labels costs {share:.1%} more than its tasks (wanted: at most 3 %).",
        common.table(["", "stages", "tasks each", "seconds", "µs a task"], rows),
        common.table(["tasks", "slots", "their own time / slots", "wall seconds", "cost"], [row]),
        f"Wanted: 100 000 blocks resumed in 5 s, took {took:.2f} s; cost at most 3 %: {cost:.1%}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if max(cost, share) <= 0.03 and took <= 5 * parsed.blocks / 1e5 else 1


if __name__ == "__main__":
    sys.exit(main())
