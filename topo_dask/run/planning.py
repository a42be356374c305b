"""`plan`: what a job would take, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from topo_dask.config import choice, number
from topo_dask.errors import TopoError
from topo_dask.plan.outline import Plan
from topo_dask.run.compare import compare
from topo_dask.run.dry import DryRun, Ended, nowhere
from topo_dask.run.execute import Cluster
from topo_dask.run.flows import flows
from topo_dask.run.instances import instance_table
from topo_dask.run.machine import machine_of
from topo_dask.run.map_tiles import map_tiles
from topo_dask.run.mosaic import fuse_mosaic
from topo_dask.run.relabel import relabel
from topo_dask.run.sampling import run_samples, with_times
from topo_dask.run.segment import segment
from topo_dask.run.segment_classes import segment_classes
from topo_dask.run.targets import flow_targets

JOBS: dict[str, Callable[..., Any]] = {
    "flows": flows,
    "segment": segment,
    "segment_classes": segment_classes,
    "relabel": relabel,
    "flow_targets": flow_targets,
    "instance_table": instance_table,
    "map_tiles": map_tiles,
    "fuse_mosaic": fuse_mosaic,
    "compare": compare,
}
"""Jobs that can be planned, by name."""

SAMPLED = ("flows", "segment", "segment_classes", "flow_targets", "instance_table", "compare")
"""Those of which parts can be run."""


def plan(job: str, *arguments: Any, sample: int = 2, **named: Any) -> Plan:
    """Say what a job would take: tasks, memory, bytes, files, and what was chosen and why.

    The job makes all of its checks and stops where work would begin. Nothing is written, no
    cluster is started, no batch job is submitted.

    Parameters
    ----------
    job
        "flows", "segment", "segment_classes", "relabel", "flow_targets", "instance_table",
        "map_tiles", "fuse_mosaic" or "compare".
    arguments, named
        Those of the function of that name. ``output`` may be left out; it is checked if it is
        given. ``cluster`` is where it would run: a scheduler that runs already is asked for its
        workers and their memory.
    sample
        So many small parts of the input go through the real stages, one after the other in this
        process, to say how long the job will take and how well its result can be compressed; 0
        for none. Jobs on tiles, and `relabel`, are not sampled.

    Returns
    -------
    Plan
        Prints as tables; ``.to_json()`` gives all of it. Its memory is an upper bound, with all
        voxels taken as foreground.

    Raises
    ------
    TopoError
        What the job itself would raise before it begins.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.ones((64, 64, 64), np.uint16)
    >>> found = plan("flows", labels, blocks=32, cluster="sync", sample=0)
    >>> [(stage.name, stage.tasks) for stage in found.stages]
    [('table', 8), ('facts', 1), ('flows', 8)]
    """
    choice("job", job, tuple(JOBS))
    text = "a whole number >= 0, of parts to sample"
    number("sample", sample, lambda v: v >= 0, text, whole=True, default=2)
    function = JOBS[job]
    given = inspect.signature(function).bind_partial(*arguments, **named).arguments
    cluster, output = given.pop("cluster", None), given.pop("output", None)
    found = planned(function, given, cluster, output)
    if sample == 0 or job not in SAMPLED:
        return found
    return timed(function, given, found, int(sample))


def timed(function: Callable[..., Any], given: Mapping[str, Any], found: Plan, count: int) -> Plan:
    """A plan with the times that samples tell.

    Parameters
    ----------
    function, given
        The job and its arguments, without output and cluster.
    found
        The plan without times.
    count
        How many parts are sampled.
    """
    try:
        samples = run_samples(function, given, found.grid, count)
    except TopoError as error:
        why = f"no time is known: a sample ended with {type(error).__name__}: {error}"
        return found.with_problem(why)
    plans = [planned(function, sample.arguments, "sync") for sample in samples]
    return with_times(found, samples, plans)


def planned(
    function: Callable[..., Any], given: Mapping[str, Any], cluster: Cluster, output: Any = None
) -> Plan:
    """The plan of a job that is called with a dry run in the place of its cluster."""
    writes = "output" in inspect.signature(function).parameters
    place = {"output": output or nowhere()} if writes else {}
    try:
        function(**given, **place, cluster=DryRun(cluster))
    except Ended as ended:
        return ended.work.plan(machine_of(cluster, backend=ended.work.backend))
    raise AssertionError("the job did not end where work begins")
