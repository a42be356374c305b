"""How long a job takes, from running it on a few small parts of its input.

The stages are the real ones. What a stage takes is scaled by the bytes that the plan of the part
and the plan of the whole say it reads.
"""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np

from topo_dask.grid import BlockGrid, Region
from topo_dask.plan.outline import Plan
from topo_dask.run.execute import SyncEngine
from topo_dask.storage import open_array

VOLUMES = ("labels", "truth", "flows", "foreground", "spatial_mask", "probabilities")
"""Arguments that are cut to the sampled part."""

NOT_FOR_SAMPLES = (
    *("instances", "blocks", "origin", "work_dir", "resume", "overwrite", "progress"),
    "ignore_memory",
)
"""Arguments that a sample runs without: it is a volume of its own, of one block."""

LONGEST = 128
"""Edge of a sampled part, at most."""

TASK_SECONDS = 0.02
"""What a task costs beside what it computes: scheduling, the ledger."""


class _Clock(SyncEngine):
    """Keeps the seconds of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def run(
        self, stage: str, function: Callable[[Any], Any], items: Sequence[Any], **options: Any
    ) -> Iterator[tuple[int, Any]]:
        """As any engine does, timed."""
        began = time.perf_counter()
        with closing(super().run(stage, function, items, **options)) as results:  # type: ignore[type-var]
            yield from results
        self.seconds[stage.rpartition("/")[2]] += time.perf_counter() - began


def sampled_parts(grid: BlockGrid, count: int) -> list[Region]:
    """Parts in the middles of blocks at even distances; the same for the same grid.

    Examples
    --------
    >>> sampled_parts(BlockGrid((256, 256, 256), (64, 64, 64)), 1)
    [Region(start=(128, 0, 0), stop=(192, 64, 64))]
    """
    count = min(count, len(grid))
    parts = []
    for number in range(count):
        block = grid.region((2 * number + 1) * len(grid) // (2 * count))
        middle = [(a + b) // 2 for a, b in zip(block.start, block.stop, strict=True)]
        start = [max(a, m - LONGEST // 2) for a, m in zip(block.start, middle, strict=True)]
        stop = [min(b, a + LONGEST) for a, b in zip(start, block.stop, strict=True)]
        parts.append(Region(tuple(start), tuple(stop)))
    return parts


def _cut(source: Any, name: str, part: Region) -> Any:
    """A part of an input, in memory."""
    if source is None:
        return None
    opened = hasattr(source, "ndim")
    array: Any = source if opened else open_array(source, argument=name, axes=(3, 4))
    found = array[(..., *part.slices)]
    return found.compute() if isinstance(found, da.Array) else np.asarray(found)


@dataclass(frozen=True, eq=False)
class Sample:
    """A part that was run.

    Parameters
    ----------
    part
        Where it lies.
    arguments
        Of the job, as it was run.
    seconds
        Of each stage.
    stored
        Bytes of its result on disk.
    """

    part: Region
    arguments: dict[str, Any]
    seconds: dict[str, float]
    stored: int


def _run_part(
    job: Callable[..., Any], named: Mapping[str, Any], part: Region, output: Path
) -> Sample:
    clock = _Clock()
    own = {name: value for name, value in named.items() if name not in NOT_FOR_SAMPLES}
    own |= {name: _cut(own[name], name, part) for name in VOLUMES if name in own}
    own["blocks"] = part.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"output": output, "cluster": clock, "progress": False, "ignore_memory": True}
        known = inspect.signature(job).parameters
        job(**own, **{name: value for name, value in how.items() if name in known})
    size = sum(
        os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(output)
        for name in names
    )
    return Sample(part, own, dict(clock.seconds), size)


def run_samples(
    job: Callable[..., Any], named: Mapping[str, Any], grid: BlockGrid, count: int
) -> list[Sample]:
    """Run a job on some parts of its input, in this process, into a folder that goes away.

    Parameters
    ----------
    job
        Its function; the arguments among `VOLUMES` are cut.
    named
        The arguments, without output and cluster.
    grid
        The blocks of the whole.
    count
        How many parts.
    """
    parts = sampled_parts(grid, count)
    ends = zip(parts[0].start, parts[0].stop, strict=True)
    small = Region(parts[0].start, tuple(min(a + 16, b) for a, b in ends))
    with tempfile.TemporaryDirectory(prefix="topo-dask-sample-") as folder:
        # The first loads the compiled code.
        _, *samples = (
            _run_part(job, named, part, Path(folder) / f"{number}.zarr")
            for number, part in enumerate([small, *parts])
        )
    return samples


def with_times(whole: Plan, samples: Sequence[Sample], plans: Sequence[Plan]) -> Plan:
    """A plan with the seconds of its stages and the size of its output on disk.

    Parameters
    ----------
    whole
        The plan.
    samples, plans
        Of parts; a stage takes as long for a byte that it reads as in the samples, and one that
        they lack as long as all their stages.
    """
    seconds: dict[str, float] = defaultdict(float)
    read: dict[str, float] = defaultdict(float)
    for sample, plan in zip(samples, plans, strict=True):
        for stage in plan.stages:
            if stage.name in sample.seconds:
                seconds[stage.name] += sample.seconds[stage.name]
                read[stage.name] += stage.read_bytes
    mean = sum(seconds.values()) / max(1.0, sum(read.values()))
    found = {}
    for stage in whole.stages:
        known = read.get(stage.name)
        rate = seconds[stage.name] / known if known else mean
        found[stage.name] = rate * stage.read_bytes + TASK_SECONDS * stage.tasks
    voxels = sum(sample.part.size for sample in samples)
    stored = sum(sample.stored for sample in samples)
    return whole.timed(found, round(stored * math.prod(whole.grid.shape) / voxels))
