"""What it costs to be distributed: `flows` and `segment` from zarr to zarr in blocks.

Wall time is that of the Python call on an open local cluster whose workers have imported the
package and loaded the compiled code; how long that took is reported separately. It includes all
that a run does: reading the input's metadata, the ledger, the scheduler, scratch files, workers
that wait for the last block of a stage, stages of one task, publishing. It is divided by the
kernels' (`topo_dask.kernels.cpu`) and the codec's (reading and writing zarr arrays) own time, as
measured in the workers in that very run, divided by the number of workers: scratch files and NumPy
in between count as cost.

The same run in this process, one block after the other, shows beside it what the cores take from
each other (memory bandwidth, caches, clock): that is no cost of distribution by software.

Every engine runs once in each repetition, in turns; the figures are medians. Ends with status 1
when the outputs differ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import common
import zarr

import topo_dask
from topo_dask.cluster import ClusterOptions
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import Kernels
from topo_dask.run.execute import Engine, open_engine
from topo_dask.storage import create_array, open_array

TITLE = "Cost of being distributed"
WANTED = 1.3
SPENT = ("kernels", "codec")
JOBS = ("flows", "segment")
TINY = (8, 8, 8)
"""Blocks of the run that warms the workers up: many, so that each gets some."""


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, help="edge of the crop, in its middle; by default all")
    made.add_argument("--blocks", type=common.lengths, default=(128, 128, 128))
    made.add_argument("--n-iter", type=int, default=200)
    made.add_argument("--workers", type=int, help="of one thread each; by default one a core")
    made.add_argument("--repetitions", type=int, default=1)
    return made


# ── clocks ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Timed:
    """A block function that also says how long it took, in all and in its parts."""

    function: Callable[[Any], Any]

    def __call__(self, item: Any) -> tuple[float, dict[str, float], Any]:
        with parts() as spent:
            began = time.perf_counter()
            result = self.function(item)
            return time.perf_counter() - began, spent, result


class Clock(Engine):
    """Runs tasks on another engine and keeps, for each stage, wall time and the calls' own."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner.name, inner.slots)
        self.inner = inner
        self.wall: dict[str, float] = defaultdict(float)
        self.own: dict[str, float] = defaultdict(float)
        self.spent: dict[str, float] = defaultdict(float)
        self.codec: dict[str, float] = defaultdict(float)
        self.cells: dict[str, float] = defaultdict(float)
        self.tasks: dict[str, int] = defaultdict(int)

    def _completed(self, function: Any, items: Any) -> Iterator[Any]:
        return self.inner._completed(function, items)

    def run(
        self, stage: str, function: Callable[[Any], Any], items: Sequence[Any], **options: Any
    ) -> Iterator[tuple[int, Any]]:
        """As the inner engine does it, timed."""
        began = time.perf_counter()
        with closing(self.inner.run(stage, Timed(function), items, **options)) as results:
            for number, (seconds, spent, result) in results:
                self.own[stage] += seconds
                for kind in spent:
                    self.spent[kind] += spent[kind]
                self.codec[stage] += spent["codec"]
                self.cells[stage] += spent["cells"]
                self.tasks[stage] += 1
                yield number, result
        self.wall[stage] += time.perf_counter() - began


def _clocked(function: Callable[..., Any], spent: dict[str, float], kind: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[kind] += time.perf_counter() - began

    return call


@contextmanager
def parts() -> Iterator[dict[str, float]]:
    """Seconds spent in this process in the kernels, and in reading and writing zarr arrays.

    And in one of the kernels, "cells", which is a part of what they all took.
    """
    spent = dict.fromkeys([*SPENT, "cells"], 0.0)
    targets: list[tuple[Any, str, str]] = [(cpu, name, "kernels") for name in cpu.__all__]
    targets += [(Kernels, name, "kernels") for name in vars(Kernels) if name[0] != "_"]
    targets += [(Kernels, "cell_table", "cells")]
    targets += [(zarr.Array, name, "codec") for name in ("__getitem__", "__setitem__")]
    with ExitStack() as stack:
        for owner, name, kind in targets:
            call = _clocked(getattr(owner, name), spent, kind)
            call = staticmethod(call) if owner is Kernels else call
            stack.enter_context(mock.patch.object(owner, name, call))
        yield spent


# ── runs ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    """One job on one engine."""

    seconds: float
    clock: Clock
    digest: str

    @property
    def own(self) -> float:
        """Seconds inside the block functions."""
        return sum(self.clock.own.values())


def jobs(labels: Path, folder: Path, engine: Engine, options: dict[str, Any]) -> list[Measured]:
    """Run flows and segment on an engine, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flows, out = folder / "flows.zarr", folder / "labels.zarr"
    blocks, measured = options["blocks"], []
    for name in JOBS:
        clock = Clock(engine)
        began = time.perf_counter()
        if name == "flows":
            made = topo_dask.flows(labels, flows, cluster=clock, **options)
        else:
            made = topo_dask.segment(flows, out, foreground=labels, cluster=clock, blocks=blocks)
        seconds = time.perf_counter() - began
        mark = common.digest(made.array, axes=made.array.ndim)
        measured.append(Measured(seconds, clock, mark))
    return measured


@contextmanager
def opened(workers: int | None) -> Iterator[Engine]:
    """The default local cluster, or one of so many workers."""
    cluster = "local" if workers is None else ClusterOptions("local", workers=workers, cores=1)
    with open_engine(cluster) as engine:
        yield engine


def stored(source: Any, size: int | None, path: Path) -> Path:
    """Labels as a zarr array of their own, in the chunks of their source."""
    labels, chunks = common.crop(source, size), open_array(source, argument="labels").chunks
    fitting = [min(c, n) for c, n in zip(chunks, labels.shape, strict=True)]
    create_array(path, labels.shape, fitting, labels.dtype)[...] = labels
    return path


def measure(
    parsed: argparse.Namespace, folder: Path
) -> tuple[int, tuple[float, float], dict[str, list[tuple[Measured, Measured]]]]:
    """Workers; seconds of start and warm-up; (distributed, serial) of each job's repetitions."""
    labels = stored(parsed.labels, parsed.size, folder / "labels-in.zarr")
    tiny = stored(parsed.labels, 4 * TINY[0], folder / "tiny.zarr")
    options = {"blocks": parsed.blocks, "n_iter": parsed.n_iter}
    few = {"blocks": TINY, "n_iter": 8}
    began = time.perf_counter()
    found: dict[str, list[tuple[Measured, Measured]]] = {name: [] for name in JOBS}
    with opened(parsed.workers) as engine, open_engine("sync") as serial:
        started = time.perf_counter()
        jobs(tiny, folder / "run", engine, few)
        warm = time.perf_counter()
        jobs(tiny, folder / "run", serial, few)
        for _ in range(parsed.repetitions):
            pairs = zip(
                jobs(labels, folder / "run", engine, options),
                jobs(labels, folder / "run", serial, options),
                strict=True,
            )
            for name, pair in zip(JOBS, pairs, strict=True):
                found[name].append(pair)
        return engine.slots, (started - began, warm - started), found


# ── tables ───────────────────────────────────────────────────────────────────────────────────


def costs(pairs: list[tuple[Measured, Measured]], workers: int) -> list[float]:
    """Seconds of one job, medians: by the clock; own, kernels, codec, of both sides."""

    def median(side: int, seconds: Callable[[Measured], float]) -> float:
        return statistics.median(seconds(pair[side]) for pair in pairs) / workers

    seconds = [statistics.median(run.seconds for run, _ in pairs)]
    for side in (0, 1):
        seconds.append(median(side, lambda run: run.own))
        seconds += [median(side, lambda run, of=of: run.clock.spent[of]) for of in SPENT]
    return seconds


def column(seconds: Sequence[float]) -> list[str]:
    """A column of the table."""
    wall, *sides = seconds
    cells = [f"{wall:.2f}"]
    for own, kernels, codec in (sides[:3], sides[3:]):
        cells += [f"{s:.2f}" for s in (own, kernels, codec, own - kernels - codec)]
        cells.append(f"{wall / (kernels + codec):.2f}")
    return cells


def cost_table(found: dict[str, list[tuple[Measured, Measured]]], workers: int) -> str:
    names = [f"wall seconds on {workers} workers"]
    for where, ratio in (
        ("in the workers", f"wall / (kernels + zarr) (wanted <= {WANTED})"),
        ("one at a time", "wall / (kernels + zarr), cores not sharing memory"),
    ):
        names += [
            f"block functions {where}, / {workers}",
            "- of it kernels",
            "- of it zarr read and write",
            "- of it scratch files and the rest",
            ratio,
        ]
    jobs_s = [costs(pairs, workers) for pairs in found.values()]
    columns = [
        column(seconds) for seconds in (*jobs_s, [sum(s) for s in zip(*jobs_s, strict=True)])
    ]
    return common.table(["", *found, "both"], list(zip(names, *columns, strict=True)))


def stage_table(found: dict[str, list[tuple[Measured, Measured]]], workers: int) -> str:
    """Where the cost is: every stage of the last repetition."""
    rows = [
        [
            job,
            stage,
            run.clock.tasks[stage],
            f"{wall:.2f}",
            f"{run.clock.own[stage] / workers:.2f}",
            f"{alone.clock.own[stage] / workers:.2f}",
        ]
        for job, pairs in found.items()
        for run, alone in pairs[-1:]
        for stage, wall in run.clock.wall.items()
    ]
    headings = [
        "job",
        "stage",
        "tasks",
        "wall s",
        f"in the workers / {workers}",
        f"alone / {workers}",
    ]
    return common.table(headings, rows)


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    with common.working_folder(parsed.folder) as folder:
        workers, (start, warm), found = measure(parsed, folder)
        labels = common.described(common.crop(folder / "labels-in.zarr"))
    same = all(run.digest == alone.digest for pairs in found.values() for run, alone in pairs)
    body = [
        f"Labels: {labels}, in blocks of {common.joined(parsed.blocks, 'x')}.",
        cost_table(found, workers),
        stage_table(found, workers),
        f"Not counted: {start:.1f} s to start the cluster, {warm:.1f} s until its workers had "
        "imported the package and loaded the compiled code.",
        f"Flows and labels of both ways are {'identical' if same else 'DIFFERENT'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
