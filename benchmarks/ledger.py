"""What the ledger and the bounded submission cost: stages that compute nothing, real ledger.

A stage of many tasks that do nothing, then the same run again, resumed, of which everything is
done; and a stage of tasks that take a known time each, on a local cluster, against the time that
the workers need at least. Wanted: a finished run of 100 000 blocks resumed within 5 s; 3 % at most
of tasks of a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

import topo_dask
from topo_dask.grid import BlockGrid
from topo_dask.run.execute import open_engine
from topo_dask.run.ledger import Ledger, fingerprint

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
    made.add_argument("--blocks", type=int, default=100_000)
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


def finished(side: int) -> float:
    """Seconds that a finished run of flows takes to say so; its volume has side^3 blocks."""
    with tempfile.TemporaryDirectory() as folder:
        labels = np.zeros((side, side, side), dtype=np.uint8)
        out = Path(folder) / "flows.zarr"
        options: dict[str, Any] = {"cluster": "sync", "method": "direct"}
        topo_dask.flows(labels, out, blocks=side, **options)
        began = time.perf_counter()
        topo_dask.flows(labels, out, blocks=side, resume=True, **options)
        return time.perf_counter() - began


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
    rows = resumed(parsed.blocks)
    row, cost = overhead(parsed.tasks, parsed.seconds)
    took = float(rows[1][3])
    body = [
        common.table(["", "stages", "tasks each", "seconds", "µs a task"], rows),
        common.table(["tasks", "slots", "their own time / slots", "wall seconds", "cost"], [row]),
        f"Wanted: 100 000 blocks resumed in 5 s, took {took:.2f} s; cost at most 3 %: {cost:.1%}.",
        f"A finished run says so in {finished(8):.2f} s.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if cost <= 0.03 and took <= 5 * parsed.blocks / 1e5 else 1


if __name__ == "__main__":
    sys.exit(main())
