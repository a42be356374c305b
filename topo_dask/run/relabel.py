"""Other labels from the evidence of a run: thresholds, vetoes, forced joins; no tracking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topo_dask.config import GROUPS, SegmentSettings, choice, number
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.check import check_same_shape
from topo_dask.graph.contacts import JoinChoice, JoinRules, Joins, names_of_parts
from topo_dask.graph.scale import check_scaled_flow, scaled_store
from topo_dask.plan.flow_field import RelabelWork
from topo_dask.run.chain import Chain, Step, View, run_steps
from topo_dask.run.evidence import Evidence, open_evidence
from topo_dask.run.files import input_mark, open_input, save_array, stored
from topo_dask.run.job import (
    RunOptions,
    geometry_of,
    open_run,
    published_already,
    volumes,
)
from topo_dask.run.ledger import fingerprint
from topo_dask.run.measured import TABLE
from topo_dask.run.orphans import orphan_step
from topo_dask.run.pieces import split_step
from topo_dask.run.refine import tables_place
from topo_dask.run.relabel_table import table_of
from topo_dask.run.segment import SegmentJob, SegmentResult


@dataclass(frozen=True)
class NamesTask:
    """One union of all parts."""

    evidence: Evidence
    choice: JoinChoice
    path: Path

    def __str__(self) -> str:
        return "all joins"


def name_parts(task: NamesTask) -> tuple[int, int]:
    """Stage names: the instance of every part; gives the number of instances, their voxels."""
    joins = task.evidence.load()
    names, instances = names_of_parts(joins, task.choice)
    save_array(task.path, names)
    return instances, int(joins.voxels[names[1:] > 0].sum())


def _pairs(value: Any, argument: str) -> tuple[tuple[int, int], ...]:
    """Pairs of different parts, the smaller first, each once."""
    allowed, do = "pairs of numbers of parts, from 1 on", f"Pass e.g. {argument}=[(3, 7)]."
    try:
        pairs = [tuple(pair) for pair in value]
    except TypeError:
        raise InvalidType(argument, repr(value), allowed, do) from None
    for pair in pairs:
        if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in pair):
            raise InvalidType(argument, repr(pair), allowed, do)
        if len(pair) != 2 or min(pair) < 1 or pair[0] == pair[1]:
            raise InvalidArgument(argument, repr(pair), allowed, do)
    return tuple(sorted({(int(min(p)), int(max(p))) for p in pairs}))


def _check_pairs(joins: Joins, chosen: JoinChoice) -> None:
    """Raise unless all parts exist and there is a join to every vetoed pair."""
    count = len(joins.voxels)
    for argument, pairs in (("veto", chosen.veto), ("force", chosen.force)):
        for pair in pairs:
            if max(pair) > count:
                do = "The array evidence/parts of the result shows their numbers."
                raise InvalidArgument(argument, repr(pair), f"numbers of parts, 1 to {count}", do)
    for pair in sorted(set(chosen.veto) & set(chosen.force)):
        do = "Leave it out of one of them."
        raise InvalidArgument("force", f"{pair}, which is vetoed too", "either of the two", do)
    table = joins.contacts
    for pair in chosen.veto:
        first, stop = (np.searchsorted(table.a, np.uint64(pair[0]), side) for side in _SIDES)
        if np.uint64(pair[1]) not in table.b[first:stop]:
            do = "The table evidence/joins.npz of the result lists all of them."
            raise InvalidArgument("veto", repr(pair), "parts that touch or are close", do)


_SIDES: Sequence[Any] = ("left", "right")


def _rules(min_dot: Any, min_area: Any, group: int) -> JoinRules | None:
    """When clusters that touch are joined: in group 2 alone."""
    number("min_dot", min_dot, lambda v: True, "a finite number", default=0.0)
    number("min_area", min_area, lambda v: v >= 1, "a whole number >= 1", whole=True, default=1)
    rules = JoinRules(float(min_dot), int(min_area))
    if group == 2:
        return rules
    for name, value in asdict(rules).items():
        if value != getattr(JoinRules(), name):
            do = "Leave it out, or pass group=2 (--group 2): only there is joined what touches."
            raise InvalidArgument(name, f"{value} in group {group}", "it in group 2", do)
    return None


def relabel(
    source: Any,
    output: Any,
    *,
    min_dot: float = 0.0,
    min_area: int = 1,
    min_size: int | None = None,
    group: int | None = None,
    veto: Any = (),
    force: Any = (),
    flows: Any = None,
    scale: float | None = None,
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
    ignore_memory: bool = False,
) -> SegmentResult:
    """Make other labels of the evidence that ``segment(..., keep_evidence=True)`` kept.

    Nothing is tracked: the union runs over the tables, then the labels are written. With the
    settings of the run and no pairs, the labels are those of the run, before its check of flows
    and its filling of holes, which are not done here.

    Parameters
    ----------
    source
        The result of the run, or its path.
    output
        Path of the OME-Zarr labels to make.
    min_dot, min_area
        In group 2, and only there, clusters that touch are joined where the mean dot product of
        their flows over the contact is above ``min_dot`` and the contact has at least
        ``min_area`` pairs of voxels.
    min_size
        Clusters with fewer voxels become background; ``None`` for that of the run.
    group
        See `postprocess_single`; ``None`` for that of the run.
    veto
        Pairs of parts, numbered as in ``evidence/parts``: they do not join what they are parts
        of. Other pairs may still.
    force
        Pairs of parts that are one cluster. Group 2 splits it again where it is disconnected, as
        `split_disconnected` does.
    flows, scale
        The flows of the run, see `segment`, for the column ``flow_error`` of the table of
        instances: it is NaN without them.
    blocks
        Shape of a block; ``None`` for that of the run.
    work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory
        See `RunOptions`.

    Returns
    -------
    SegmentResult
        As of `segment`, with its table of instances. There the convergence point is the mean over
        the voxels of an instance of where their parts end: that of `segment`, except for voxels of
        a part that several instances share (pieces in group 2, orphans in group 3).

    Raises
    ------
    TopoError
        One of its kinds that names the argument, before any work starts: also where labels and
        tables are of different runs.

    Examples
    --------
    >>> import tempfile
    >>> from topo_dask import segment
    >>> folder = tempfile.mkdtemp()
    >>> flow = np.ones((3, 1, 1, 4), np.float32)
    >>> run = {"n_steps": 0, "convergence_radius": 1.0, "min_size": 1, "group": 2}
    >>> options = {"cluster": "sync", "blocks": 2}
    >>> made = segment(flow, folder + "/a.zarr", keep_evidence=True, **run, **options)
    >>> made.array[0, 0]
    array([1, 1, 1, 1], dtype=uint32)
    >>> relabel(made, folder + "/b.zarr", veto=[(2, 3)], cluster="sync").array[0, 0]
    array([1, 1, 2, 2], dtype=uint32)
    """
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory
    )
    evidence = open_evidence(source)
    least = evidence.settings["min_size"] if min_size is None else min_size
    number("min_size", least, lambda v: v >= 0, "a whole number >= 0", whole=True)
    in_group = evidence.settings["group"] if group is None else group
    choice("group", in_group, GROUPS)
    rules = _rules(min_dot, min_area, in_group)
    chosen = JoinChoice(rules, int(least), _pairs(veto, "veto"), _pairs(force, "force"))
    _check_pairs(evidence.load(), chosen)
    shape = tuple(int(n) for n in evidence.parts.shape)
    known_blocks = evidence.settings["blocks"] if blocks is None else blocks
    grid = replace(options, blocks=known_blocks).grid(shape)
    field, known = _open_flows(flows, scale, shape)
    place = options.output(output, [evidence.path, field])
    mark = fingerprint("relabel", evidence.fingerprint, chosen, in_group, grid.chunks)
    flow_mark = None if field is None else fingerprint(input_mark(field), known)
    final = fingerprint(mark, zarr_format, flow_mark)
    title = f"Instances of {'x'.join(map(str, shape))} voxels, from the evidence of a run"
    if published_already(place, final, options):
        return SegmentResult(place.open(), place.path, title, 0.0, {})
    began = time.monotonic()
    as_made = SegmentSettings(min_size=int(least), group=in_group)
    inputs = volumes([evidence.parts, field])
    work = RelabelWork(title, grid, inputs, as_made, zarr_format=zarr_format)
    with open_run(place, options, [chosen, as_made], work) as run:
        names = run.work / "names.npy"
        task = NamesTask(evidence, chosen, names)
        ((instances, voxels),) = run.ledger.run(run.engine, "names", mark, name_parts, [task])
        view = View(evidence.parts, instances, voxels, mark, names=names)
        steps_of: dict[int, Step] = {2: split_step, 3: orphan_step}
        steps = [steps_of[in_group]] if in_group in steps_of else []
        chain = Chain(run, grid, view, zarr_format)
        made = run_steps(chain, steps)
        read = None
        if field is not None:
            flow = scaled_store(stored(field, run.work, argument="flows"), known)
            read = SegmentJob(flow, None, 0.0, as_made, grid, 0, run.work), str(flow_mark)
        (table,) = tables_place(run, [TABLE], zarr_format)
        table_of(chain, made, evidence, table, cut=bool(steps), flows=read)
        geometry = geometry_of(evidence.labels)
        array = place.publish_labels(geometry=geometry, attributes={"fingerprint": final})
    details = {"instances": made.instances, "blocks": repr(grid), "ran on": run.engine.name}
    return SegmentResult(array, place.path, title, time.monotonic() - began, details)


def _open_flows(flows: Any, scale: Any, shape: tuple[int, ...]) -> tuple[Any, float]:
    """The flows that errors are summed from, and their scale."""
    if flows is None:
        if scale is not None:
            do = "Pass the flows of the run too, or leave it out."
            raise InvalidArgument("scale", f"{scale!r} without flows", "it with flows", do)
        return None, 1.0
    field = open_input(flows, argument="flows", axes=4)
    known = check_scaled_flow(field, scale, argument="flows")
    check_same_shape(field.shape[1:], shape, argument="flows", of="source")
    return field, known
