"""Probabilities and flows of several classes on disk to instance labels of each on disk."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, cast

import numpy as np

from topo_dask.classes import ClassInstances
from topo_dask.config import RefineSettings, SegmentSettings, counting, number
from topo_dask.errors import InvalidArgument
from topo_dask.graph.check import check_probabilities
from topo_dask.graph.scale import check_scaled_class_flows, scaled_store
from topo_dask.graph.segmentation import PROBABLE, instance_methods
from topo_dask.grid import BlockGrid
from topo_dask.plan.flow_field import ClassesWork, SegmentWork
from topo_dask.run.files import input_mark, open_input, stored
from topo_dask.run.halo import check_halo
from topo_dask.run.job import (
    Run,
    RunOptions,
    RunResult,
    geometry_of,
    open_run,
    part_of_run,
    published_already,
    speed,
    volumes,
)
from topo_dask.run.ledger import fingerprint
from topo_dask.run.measured import TABLES, MeasuredInstances, load_measured
from topo_dask.run.refine import Target, tables_place
from topo_dask.run.rows import Row
from topo_dask.run.segment import Prepared, SegmentJob, marks_of, prepare, write
from topo_dask.storage import AnyArray, output_chunks

LABELS = "labels"
"""Name of the array."""


@dataclass(frozen=True, repr=False)
class ClassesResult(RunResult):
    """What `segment_classes` made: ``array`` are the labels ``[C,Z,Y,X]``.

    Parameters
    ----------
    class_names
        The classes, in the order of the first axis.
    """

    class_names: tuple[str, ...]

    @property
    def instances(self) -> dict[str, MeasuredInstances]:
        """For each class the table of its instances, as in ``instances/<class>.csv``."""
        return {name: load_measured(self.path / TABLES / name) for name in self.class_names}


def segment_classes(
    probabilities: Any,
    flows: Any,
    output: Any,
    *,
    class_names: Any = None,
    class_config: Any = None,
    resolution_nm: float | None = None,
    threshold: float = PROBABLE,
    flow_error_threshold: float = 0.0,
    fill_holes: bool = False,
    interpolation: str = "nearest",
    scale: float | None = None,
    halo: Any = "auto",
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
    ignore_memory: bool = False,
    backend: str = "auto",
) -> ClassesResult:
    """Make instance labels of every class of a stack that need not fit in memory.

    Parameters
    ----------
    probabilities
        ``[C,Z,Y,X]`` of C classes, from 0 to 1: path, URL, zarr, dask or NumPy array.
    flows
        ``[3C,Z,Y,X]`` float, or whole numbers with a ``scale``: ``(dz,dy,dx)`` of the first class,
        of the second, ...
    output
        Path of the zarr group to make, of the array ``labels [C,Z,Y,X]`` and of a table of
        instances for each class, ``instances/<class>.csv`` and ``.npz``.
    class_names, class_config, resolution_nm
        See `run_instance_segmentation`.
    threshold
        A voxel is of a class where its probability is larger.
    flow_error_threshold, fill_holes, interpolation, scale, halo
        Of all classes, see `segment`.
    blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
        See `RunOptions`.

    Returns
    -------
    ClassesResult
        ``.array`` is the zarr array of labels, ``.instances`` the tables. The labels of a class
        are those that `segment` makes of it alone.

    Raises
    ------
    TopoError
        One of its kinds that names the argument: before any work starts, or, for what is no
        probability and for NaN and infinity in the flows, while running; then nothing is published.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> flow = np.zeros((3, 1, 1, 8), np.float32)
    >>> flow[2, 0, 0] = [1, 0, -1, -1, 1, 1, 0, -1]
    >>> made = segment_classes(
    ...     np.ones((1, 1, 1, 8), np.float32),
    ...     flow,
    ...     folder + "/labels.zarr",
    ...     class_names=["ves"],
    ...     class_config={"ves": {"convergence_radius": 2.0, "min_size": 1}},
    ...     cluster="sync",
    ... )
    >>> made.array[0, 0, 0], made.instances["ves"].voxels
    (array([1, 1, 1, 1, 2, 2, 2, 2], dtype=uint32), array([4, 4]))
    """
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    number("threshold", threshold, lambda v: True, "a finite number", default=PROBABLE)
    check_halo(halo)
    refine = RefineSettings(flow_error_threshold, fill_holes)
    semantic, field, scale = _open_inputs(probabilities, flows, scale)
    count, *lengths = (int(n) for n in semantic.shape)
    known = instance_methods(class_names, count, class_config, resolution_nm)
    methods = _settings(known, interpolation, options.backend)
    grid = options.grid(tuple(lengths))
    place = options.output(output, [semantic, field])
    inputs = [input_mark(field), input_mark(semantic), threshold, scale]
    mark = fingerprint("classes", inputs, list(methods.items()), refine, grid.chunks)
    final = fingerprint(mark, zarr_format)
    title = f"Instances of {count} classes of {'x'.join(map(str, lengths))} voxels"
    names = tuple(methods)
    if published_already(place, final, options):
        return ClassesResult(place.open(LABELS), place.path, title, 0.0, {}, class_names=names)
    began = time.monotonic()
    work = _work(title, grid, [field, semantic], methods, refine, halo)
    with open_run(place, options, [methods, refine], work) as run:
        read = stored(semantic, run.work, argument="probabilities", together=1)
        along = stored(field, run.work, argument="flows")
        prepared = []
        for c, (name, how) in enumerate(methods.items()):
            part = part_of_run(run, f"class-{c}", name)
            job = SegmentJob(
                scaled_store(Row(along, 3 * c, 3), scale),
                cast(AnyArray, Row(read, c)),
                threshold,
                how,
                grid,
                halo,
                part.work,
                name=name,
            )
            marks = marks_of([*inputs, c, name], job.settings, grid, job.halo)
            prepared.append(prepare(part, job, marks, refine, zarr_format=zarr_format))
        found = _write_all(run, prepared, names, refine, zarr_format)
        place.publish_group(
            geometry=geometry_of(semantic),
            attributes={
                "fingerprint": final,
                "classes": {n: counting(m) for n, m in methods.items()},
            },
        )
    seconds = time.monotonic() - began
    details = _details(methods, found) | {
        "blocks": repr(grid),
        "speed": speed(count * math.prod(grid.shape), seconds),
        **run.where,
    }
    array = place.open(LABELS)
    return ClassesResult(array, place.path, title, seconds, details, class_names=names)


def _open_inputs(probabilities: Any, flows: Any, scale: Any) -> tuple[Any, Any, float]:
    semantic = open_input(probabilities, argument="probabilities", axes=4, first="class")
    check_probabilities(semantic, argument="probabilities")
    field = open_input(flows, argument="flows", axes=4, first="3 components of each class")
    fit = {"argument": "flows", "of": "probabilities"}
    return semantic, field, check_scaled_class_flows(field, scale, semantic, **fit)


def _settings(
    methods: dict[str, ClassInstances], interpolation: str, backend: str
) -> dict[str, SegmentSettings]:
    """Those of each class; raises unless every class can name a file."""
    for name in methods:
        if name in ("", ".", "..") or PurePath(name).name != name or "\0" in name:
            do = "Rename the class: its table of instances is a file of that name."
            raise InvalidArgument("class_names", repr(name), "names that files can have", do)
    return {
        n: SegmentSettings(**asdict(m), interpolation=interpolation, backend=backend)
        for n, m in methods.items()
    }


def _work(
    title: str,
    grid: BlockGrid,
    inputs: list[Any],
    methods: dict[str, SegmentSettings],
    refine: RefineSettings,
    halo: Any,
) -> ClassesWork:
    """What the run takes."""
    both = volumes(inputs)
    shapes = (3, *grid.shape), grid.shape
    each = tuple(replace(v, shape=shape) for v, shape in zip(both, shapes, strict=True))
    return ClassesWork(
        title,
        grid,
        both,
        tuple(
            (
                name,
                SegmentWork(name, grid, each, how, halo=halo, refine=refine),
            )
            for name, how in methods.items()
        ),
    )


def _write_all(
    run: Run,
    prepared: list[Prepared],
    names: tuple[str, ...],
    refine: RefineSettings,
    zarr_format: int,
) -> list[dict[str, Any]]:
    """Make the array of all classes, in chunks of one class, and write it class by class."""
    grid = prepared[0].job.grid
    most = max(p.view.instances for p in prepared)
    out = run.output.create(
        (len(names), *grid.shape),
        (1, *output_chunks(grid.largest, grid.shape)),
        np.uint32 if most < 2**32 else np.uint64,
        zarr_format=zarr_format,  # type: ignore[arg-type]
        name=LABELS,
    )
    tables = tables_place(run, names, zarr_format)
    return [
        write(p, Target(cast(AnyArray, Row(out, c)), table, run.output.identity), refine)
        for c, (p, table) in enumerate(zip(prepared, tables, strict=True))
    ]


def _details(methods: dict[str, SegmentSettings], found: list[dict[str, Any]]) -> dict[str, Any]:
    """One line a class."""
    return {
        name: f"{facts['instances']} instances, group {how.group}, {facts['foreground']}"
        for (name, how), facts in zip(methods.items(), found, strict=True)
    }
