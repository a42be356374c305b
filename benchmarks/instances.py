"""Facts of so many instances that they must be summed with care: seconds and memory.

The last task of `instance_table` sums --tables tables, whose rows are instances that stand in
--shared of them on average; then the table is written and read as a run does it. Both are measured
in processes of their own. Needs no labels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from topo_dask.config import FlowSettings
from topo_dask.grid import BlockGrid
from topo_dask.plan.outline import readable_bytes
from topo_dask.run.files import load_instances
from topo_dask.run.flow_job import FlowJob
from topo_dask.run.instances import COLUMNS, SumTask, read_instance_table, sum_tables
from topo_dask.storage import save_table

TITLE = "Facts of ten million instances"


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--instances", type=int, default=10_000_000)
    made.add_argument("--tables", type=int, default=64, help="that the last task sums")
    made.add_argument("--shared", type=float, default=2.0, help="tables an instance stands in")
    return made


def job_in(folder: Path) -> FlowJob:
    """A job that knows where its tables are."""
    grid = BlockGrid((1, 1, 1), (1, 1, 1))
    nothing: Any = None
    return FlowJob(nothing, FlowSettings(), grid, (0, 0, 0), (0, 0, 0), folder)


def write(folder: Path, parsed: argparse.Namespace) -> None:
    """The tables, with ids up to 2**64."""
    gap = 2**64 // parsed.instances - 1
    for number in range(parsed.tables):
        rng = np.random.default_rng(number)
        mine = rng.random(parsed.instances) < parsed.shared / parsed.tables
        mine[number :: parsed.tables] = True
        ids = (np.flatnonzero(mine).astype(np.uint64) + np.uint64(1)) * np.uint64(gap)
        low = rng.integers(0, 10**6, (len(ids), 3))
        voxels = rng.integers(1, 1000, len(ids))
        columns = {"ids": ids, "voxels": voxels, "sums": low * voxels[:, None]}
        path = folder / "table-1" / f"{number}.npz"
        save_table(path, **columns, lo=low, hi=low + 9, cut=np.zeros(0, np.uint64))


def summed(folder: Path, tables: int) -> int:
    """The last task of the tree."""
    return sum_tables(SumTask(job_in(folder), 1, 0, tables))


def kept(folder: Path) -> int:
    """What the driver does with it: publishes the table, reads it."""
    table = load_instances(job_in(folder).facts)
    save_table(folder / "out.npz", **{name: getattr(table, name) for name in COLUMNS})
    return len(read_instance_table(folder / "out.npz"))


def _measured(function: Any, arguments: Any) -> tuple[Any, float, int]:
    began = time.perf_counter()
    result = function(*arguments)
    took = time.perf_counter() - began
    return result, took, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    rows, good = [], True
    with common.working_folder(parsed.folder) as folder:
        write(folder, parsed)
        calls = (("sum, on a worker", summed, (folder, parsed.tables)), ("driver", kept, (folder,)))
        for name, function, given in calls:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                count, seconds, memory = pool.apply(_measured, (function, given))
            assert count == parsed.instances
            good &= memory <= 4 * 2**30
            rows.append([name, f"{count:.3g}", f"{seconds:.1f}", readable_bytes(memory)])
    body = [
        common.table(["", "instances", "seconds", "peak memory"], rows),
        "Wanted for 10⁷ instances: at most 4 GiB.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
