"""What every run on disk shares: its options, its block grid, its result."""

from __future__ import annotations

import html
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zarr

from topo_dask.config import BACKENDS, boolean, choice
from topo_dask.errors import (
    InvalidArgument,
    MemoryTooSmall,
    OutputExists,
    OutputNotWritable,
    TightMemory,
    TopoError,
)
from topo_dask.grid import BlockGrid, as_lengths
from topo_dask.plan.work import (
    Volume,
    Work,
    advice,
    advice_for_device,
    too_much,
    too_much_on_device,
)
from topo_dask.run.damage import damage_told
from topo_dask.run.devices import check_devices, wanted_on
from topo_dask.run.dry import DryRun, nowhere
from topo_dask.run.execute import Cluster, Engine, open_engine
from topo_dask.run.files import BLOCK, readable_by_workers
from topo_dask.run.ledger import Ledger
from topo_dask.run.machine import machine_of
from topo_dask.run.progress import progress_display, readable_count, readable_time
from topo_dask.run.record import Record
from topo_dask.storage import AnyArray, Geometry, Output, voxel_geometry


@dataclass(frozen=True)
class RunOptions:
    """How a run on disk is made, not what it computes.

    Parameters
    ----------
    blocks
        Shape of a block, in voxels; ``None`` for 128 x 128 x 128.
    work_dir
        Where scratch data goes; ``None`` for beside the output.
    resume
        Go on with an unfinished run. What was made of an input that has changed since is made
        anew: on file systems that is seen by its files' names, sizes and times; of a store
        elsewhere (a URL) by its metadata alone.
    overwrite
        Replace an existing output when the new one is complete.
    cluster
        See `topo_dask.run.execute.open_engine`.
    progress
        Show progress; ``None`` for only where a terminal looks on.
    zarr_format
        Of the output, 2 or 3.
    ignore_memory
        Begin also where a worker's memory may not suffice.
    backend
        What computes: "cpu"; "gpu", which is an error where there is none; or "auto": every
        worker takes a GPU that it has, else the processor, and the result says which. With
        ``cluster="gpu"`` "auto" means "gpu". Labels of a flow field are the same on all, flows
        agree to 1e-4: a run may go on (``resume``) with another backend than it began with. Runs
        whose stages have no kernels for a GPU take no ``backend``.
    """

    blocks: Any = None
    work_dir: Any = None
    resume: bool = False
    overwrite: bool = False
    cluster: Cluster = None
    progress: bool | None = None
    zarr_format: int = 3
    ignore_memory: bool = False
    backend: str = "cpu"

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        where = self.cluster.cluster if isinstance(self.cluster, DryRun) else self.cluster
        object.__setattr__(self, "backend", wanted_on(where, self.backend))
        if self.blocks is not None:
            as_lengths(self.blocks, argument="blocks", axes=3, least=1)
        for name in ("resume", "overwrite", "ignore_memory"):
            boolean(name, getattr(self, name))
        if self.resume and self.overwrite:
            raise InvalidArgument(
                "overwrite",
                "overwrite and resume together",
                "one of them",
                "resume goes on with an unfinished run, overwrite begins anew.",
            )
        if self.zarr_format not in (2, 3):
            raise InvalidArgument("zarr_format", repr(self.zarr_format), "2 or 3", "Pass one.")

    def grid(self, shape: tuple[int, ...]) -> BlockGrid:
        """The blocks of a volume."""
        blocks = BLOCK if self.blocks is None else self.blocks
        return BlockGrid(shape, as_lengths(blocks, argument="blocks", axes=3, least=1))

    def output(self, path: Any, inputs: list[Any]) -> Output:
        """The output's place, checked."""
        if path is None and isinstance(self.cluster, DryRun):
            path = nowhere()
        return Output(
            path,
            overwrite=self.overwrite,
            resume=self.resume,
            inputs=[i for i in inputs if i is not None],
            work_dir=self.work_dir,
        )


@dataclass(frozen=True)
class Run:
    """A run that is under way: where its tasks go and what it has done."""

    output: Output
    engine: Engine
    ledger: Ledger
    record: Record
    started: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> Path:
        """The work directory."""
        return self.output.scratch

    @property
    def where(self) -> dict[str, str]:
        """Where it ran and what computed, for the result's details."""
        computed_on = self.record.computed_on
        return {"ran on": self.engine.name} | ({"computed on": computed_on} if computed_on else {})


@dataclass(frozen=True)
class PartOfRun(Run):
    """A part of a run that has its own work and its own ledger, e.g. one class of several."""

    folder: str = ""

    @property
    def work(self) -> Path:
        """The work directory of the part."""
        return self.output.scratch / self.folder


def part_of_run(run: Run, folder: str, title: str) -> PartOfRun:
    """A part of a run; the title stands before the names of its stages."""
    ledger = Ledger(run.output.scratch / folder, title=f"{title}/")
    return PartOfRun(run.output, run.engine, ledger, run.record, run.started, folder)


@contextmanager
def open_run(
    output: Output, options: RunOptions, settings: Any = None, work: Work | None = None
) -> Iterator[Run]:
    """Open the engine, lock the output, open the ledger and the record.

    ``settings`` are for the record: what is computed. ``work`` is what the run takes: a dry run
    ends here with its plan, any other is checked against the workers' memory.

    Raises
    ------
    MemoryTooSmall
        A worker's memory limit is below what a stage needs.
    BackendUnavailable
        A GPU is asked for and workers have none.
    """
    if isinstance(options.cluster, DryRun):
        options.cluster.end(work)
    display = progress_display(options.progress)
    # The engine first: where there is none, or none large enough, nothing is left behind.
    with open_engine(options.cluster, display=display) as engine:
        check_devices(engine, options.backend)
        if work is not None and not options.ignore_memory:
            check_memory(work, engine)
        with output.lock():
            folder = output.scratch
            about = {
                "output": output.path,
                "inputs": _few(output.inputs),
                "settings": settings,
                "blocks": options.blocks,
            }
            record = Record(output.record, about, repr(engine))
            outer, engine.recorder = engine.recorder, _Recorder(record)
            try:
                with record.watching(), _disks_named(output), damage_told():
                    yield Run(output, engine, Ledger(folder), record)
            finally:
                engine.recorder = outer


def _few(names: list[str], most: int = 100) -> list[str]:
    """Names for the record: of thousands of tiles the first ones."""
    more = len(names) - most
    return names if more <= 0 else [*names[:most], f"and {more} more"]


@dataclass
class _Recorder:
    """Keeps what stages say; the first that lacks device memory is said aloud."""

    record: Record
    said: bool = False

    def __call__(self, stage: dict[str, Any]) -> None:
        """A stage is over."""
        self.record.add(stage)
        if stage["in_parts"] and not self.said:
            self.said = True
            text = f"stage {stage['stage']}: device memory was too small for {stage['in_parts']} "
            text += f"of {stage['done']} tasks, which were computed in parts. The result is the "
            text += "same; smaller blocks, or fewer tasks at once on a GPU, would be faster."
            warnings.warn(text, TightMemory, stacklevel=2)


def check_memory(work: Work, engine: Engine) -> None:
    """Warn where a worker's memory is tight.

    Raises
    ------
    MemoryTooSmall
        It does not suffice; the blocks that would fit are named.
    """
    machine = machine_of(engine, backend=work.backend)
    plan = work.plan(machine)
    if plan.device_tight:
        text = f"{too_much_on_device(plan)}. {advice_for_device(work, machine)}"
        warnings.warn(text, TightMemory, stacklevel=5)
    if not plan.tight:
        return
    if plan.fits:
        warnings.warn(f"{too_much(plan)}. {advice(work, machine)}", TightMemory, stacklevel=5)
        return
    go_on = "Or pass ignore_memory=True (--ignore-memory) to begin all the same."
    raise MemoryTooSmall(
        "blocks",
        f"{work.grid!r}: {too_much(plan)}",
        "blocks that fit",
        f"{advice(work, machine)} {go_on}",
    )


@contextmanager
def _disks_named(output: Output) -> Iterator[None]:
    """Say what to do where a disk fails outside of a task, as when it is full."""
    try:
        yield
    except TopoError:
        raise
    except OSError as error:
        raise OutputNotWritable(
            "output",
            f"{str(output.path)!r}, whose disk or that of its work fails: {error}",
            "disks that can be written and have space",
            "Nothing was published. Finished blocks are kept: pass resume=True to go on from here.",
        ) from error


@dataclass(frozen=True)
class RunResult:
    """What a run on disk made.

    Parameters
    ----------
    array
        The zarr array at full resolution.
    path
        Where it is.
    what
        One line: what was made of how many voxels.
    seconds
        How long it took; 0 where it was there already.
    details
        Numbers worth knowing, by name.
    """

    array: AnyArray
    path: Path
    what: str
    seconds: float
    details: dict[str, Any]

    def _rows(self) -> list[tuple[str, str]]:
        took = readable_time(self.seconds) if self.seconds else "was there already"
        layout = f"{'x'.join(map(str, self.array.shape))} {self.array.dtype}"
        return [
            ("output", str(self.path)),
            ("array", f"{layout}, chunks {'x'.join(map(str, self.array.chunks))}"),
            ("time", took),
            *((name, str(value)) for name, value in self.details.items()),
        ]

    def __repr__(self) -> str:
        rows = "\n".join(f"  {name:<16} {value}" for name, value in self._rows())
        return f"{self.what}\n{rows}"

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<div><b>{html.escape(self.what)}</b><table>{rows}</table></div>"


def speed(voxels: int, seconds: float) -> str:
    """Voxels a second, for people."""
    return f"{readable_count(voxels / max(seconds, 1e-9))} voxels/s"


def published_already(output: Output, mark: str, options: RunOptions) -> bool:
    """Whether, when resuming, the finished result of the very same run is there.

    Raises
    ------
    OutputExists
        Another run's finished result is there, and no unfinished run to go on with.
    """
    if not (options.resume and output.exists):
        return False
    if output.made_by().get("fingerprint") == mark:
        return True
    if not output.unfinished:
        raise OutputExists(
            "output",
            f"{str(output.path)!r}, made of other inputs or with other settings",
            "with resume, an unfinished run or the result of this very run",
            "Choose another output, or pass overwrite=True (--overwrite) to replace it.",
        )
    return False


def volumes(inputs: list[Any]) -> tuple[Volume, ...]:
    """What a plan needs to know of the inputs that there are."""
    return tuple(
        Volume(tuple(int(n) for n in i.shape), i.dtype.itemsize, readable_by_workers(i))
        for i in inputs
        if i is not None
    )


def geometry_of(source: Any) -> Geometry:
    """Scale and translation of an input, if it is stored and says so."""
    return voxel_geometry(source) if isinstance(source, zarr.Array) else Geometry()
