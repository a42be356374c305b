"""What a run will take, before it begins: stages, memory, bytes, files, choices and problems."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from topo_dask.grid import BlockGrid

IMPORTED = 180 * 2**20
"""Bytes of a process that has imported everything and computed nothing."""

COMPILED = 110 * 2**20
"""Bytes of the compiled kernels and of the libraries' pools once every stage has run."""

ONCE = ", once workers are there"
"""What is said of an expected time: it is that of the stages."""

WARN_ABOVE = 0.8
"""Part of a worker's memory limit beyond which a run warns."""


def readable_bytes(count: float) -> str:
    """A number of bytes for people.

    Examples
    --------
    >>> readable_bytes(0), readable_bytes(1536), readable_bytes(3 * 2**30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.{0 if count >= 100 else 1}f} {unit}"


def readable_seconds(seconds: float | None) -> str:
    """A time for people.

    Examples
    --------
    >>> readable_seconds(0.4), readable_seconds(75), readable_seconds(7320), readable_seconds(None)
    ('< 1 s', '1 min 15 s', '2 h 02 min', '?')
    """
    if seconds is None:
        return "?"
    if seconds < 1:
        return "< 1 s"
    minutes, left = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


@dataclass(frozen=True)
class DeviceFacts:
    """The GPU of a worker, as a plan knows it.

    Parameters
    ----------
    name
        Empty where the processor computes.
    memory
        Bytes that it has.
    why
        Why this one, or why none.
    known
        Whether that can be known before workers begin.
    """

    name: str = ""
    memory: int | None = None
    why: str = ""
    known: bool = True


UNKNOWN = DeviceFacts(why="every worker takes a GPU that it has, else the processor", known=False)
"""Workers that cannot be asked yet."""

PROCESSOR = DeviceFacts()


@dataclass(frozen=True)
class Machine:
    """Where a run would go.

    Parameters
    ----------
    name
        For people.
    workers
        Processes that run tasks.
    threads
        Tasks that each runs at once.
    memory
        Limit of each process in bytes; ``None`` where none is known.
    base
        Bytes of a process that runs no task.
    device
        What computes in each.
    """

    name: str
    workers: int
    threads: int = 1
    memory: int | None = None
    base: int = IMPORTED + COMPILED
    device: DeviceFacts = PROCESSOR

    @property
    def on_a_card(self) -> int:
        """Tasks that share a GPU at once: those of all workers, unless each has its own."""
        return 1 if self.name.startswith("gpu") else self.slots

    @property
    def slots(self) -> int:
        """Tasks that run at once."""
        return self.workers * self.threads

    def __str__(self) -> str:
        where = "one process" if self.workers == 1 else f"{self.workers} processes"
        limit = "" if self.memory is None else f" of at most {readable_bytes(self.memory)}"
        at_once = "one task" if self.threads == 1 else f"{self.threads} tasks"
        return f"{self.name}: {where}{limit}, {at_once} at a time{' each' * (self.workers > 1)}"


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Parameters
    ----------
    name
        As in the run's progress.
    tasks
        How many tasks.
    task_bytes
        Most memory of one of them, beyond what the process has anyway.
    read_bytes, write_bytes
        Of all tasks, uncompressed: at most.
    files
        Written by all tasks.
    seconds
        Of all tasks on one core; ``None`` where nothing was sampled.
    device_bytes
        Most memory of one of them on a GPU, where one computes; 0 where no kernel of it does.
    """

    name: str
    tasks: int
    task_bytes: int
    read_bytes: int = 0
    write_bytes: int = 0
    files: int = 0
    seconds: float | None = None
    device_bytes: int = 0


@dataclass(frozen=True)
class Decision:
    """Something that the program chooses, or was told, and why."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}" if self.reason else self.value


@dataclass(frozen=True)
class Space:
    """Room on disk.

    Parameters
    ----------
    size
        Bytes, uncompressed: at most.
    files
        How many, metadata included.
    in_folder
        Most of them in one directory.
    stored
        Bytes after compression, from sampled blocks; ``None`` where nothing was sampled.
    """

    size: int
    files: int
    in_folder: int
    stored: int | None = None

    def __str__(self) -> str:
        if self.files == 0:
            return "none"
        size = f"at most {readable_bytes(self.size)}"
        if self.stored is not None:
            size = f"about {readable_bytes(self.stored)}, {size}"
        return f"{size}; {self.files:,} files, up to {self.in_folder:,} in a directory"


def space_of(
    shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int, *, zarr_format: int = 3
) -> Space:
    """Room that a zarr array takes.

    Examples
    --------
    >>> space_of((100, 100), (40, 60), 2)
    Space(size=20000, files=7, in_folder=2, stored=None)
    """
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    metadata = 1 if zarr_format == 3 else 2
    return Space(
        math.prod(shape) * itemsize, math.prod(counts) + metadata, max(counts[-1], metadata)
    )


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will take; made by `topo_dask.plan`. Nothing was written for it.

    Parameters
    ----------
    what
        The job in a line.
    grid
        Its blocks, one task each in most stages.
    stages
        In their order.
    decisions
        What the program chose, and why.
    machine
        Where it would run.
    output, scratch
        Room on disk; the scratch is gone after the run.
    problems
        What stands against it, with what to do.
    """

    what: str
    grid: BlockGrid
    stages: tuple[StagePlan, ...]
    decisions: tuple[Decision, ...]
    machine: Machine
    output: Space
    scratch: Space
    problems: tuple[str, ...] = ()

    @property
    def tasks(self) -> int:
        """Of all stages."""
        return sum(stage.tasks for stage in self.stages)

    @property
    def largest(self) -> StagePlan:
        """The stage whose tasks need the most memory."""
        return max(self.stages, key=lambda stage: stage.task_bytes)

    @property
    def worker_bytes(self) -> int:
        """Most memory of one worker process: what it has anyway, and all its tasks."""
        most = max(
            stage.task_bytes * min(self.machine.threads, stage.tasks) for stage in self.stages
        )
        return self.machine.base + most

    @property
    def read_bytes(self) -> int:
        """Read by all stages, uncompressed."""
        return sum(stage.read_bytes for stage in self.stages)

    @property
    def write_bytes(self) -> int:
        """Written by all stages, uncompressed."""
        return sum(stage.write_bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Expected time of the whole run; ``None`` where nothing was sampled."""
        known = [s.seconds / min(self.machine.slots, s.tasks) for s in self.stages if s.seconds]
        return sum(known) if known else None

    @property
    def fits(self) -> bool | None:
        """Whether a worker's memory suffices; ``None`` where its limit is not known."""
        limit = self.machine.memory
        return None if limit is None else self.worker_bytes <= limit

    @property
    def tight(self) -> bool:
        """Whether a worker comes near its limit, or passes it."""
        limit = self.machine.memory
        return limit is not None and self.worker_bytes > WARN_ABOVE * limit

    @property
    def device_largest(self) -> StagePlan:
        """The stage whose tasks need the most memory of a GPU."""
        return max(self.stages, key=lambda stage: stage.device_bytes)

    @property
    def device_bytes(self) -> int:
        """Most memory that tasks take at once on a GPU, if one computes."""
        most = self.device_largest
        return most.device_bytes * min(self.machine.on_a_card, most.tasks)

    @property
    def device_tight(self) -> bool:
        """Whether that is more than the GPU has."""
        limit = self.machine.device.memory
        return limit is not None and self.device_bytes > limit

    def with_problem(self, problem: str) -> Plan:
        """The same with one more problem."""
        return replace(self, problems=(*self.problems, problem))

    def timed(self, seconds: dict[str, float], stored: int | None = None) -> Plan:
        """The same with the seconds of stages, by name, and the output's size on disk."""
        stages = tuple(replace(s, seconds=seconds.get(s.name, s.seconds)) for s in self.stages)
        return replace(self, stages=stages, output=replace(self.output, stored=stored))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "what": self.what,
            "shape": list(self.grid.shape),
            "blocks": list(self.grid.largest),
            "number_of_blocks": len(self.grid),
            "stages": [asdict(stage) for stage in self.stages],
            "decisions": [asdict(decision) for decision in self.decisions],
            "machine": asdict(self.machine),
            "tasks": self.tasks,
            "task_bytes": self.largest.task_bytes,
            "worker_bytes": self.worker_bytes,
            "fits": self.fits,
            "device_bytes": self.device_bytes,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "output": asdict(self.output),
            "scratch": asdict(self.scratch),
            "seconds": self.seconds,
            "problems": list(self.problems),
        }

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _facts(self) -> list[tuple[str, str]]:
        largest, machine = self.largest, self.machine
        limit = (
            "no limit is known"
            if machine.memory is None
            else "fits"
            if self.fits
            else "DOES NOT FIT"
        )
        at_once = f" x {machine.threads}" if machine.threads > 1 else ""
        memory = (
            f"at most {readable_bytes(self.worker_bytes)} a worker ({limit}): "
            f"{readable_bytes(machine.base)} + {readable_bytes(largest.task_bytes)}{at_once} "
            f"in {largest.name}"
        )
        timed = self.seconds is not None
        return [
            ("blocks", repr(self.grid).removeprefix("BlockGrid(").removesuffix(")")),
            *((decision.name, str(decision)) for decision in self.decisions),
            ("runs on", str(machine)),
            ("memory", memory),
            *self._device(),
            ("output", str(self.output)),
            ("scratch", str(self.scratch)),
            ("time", f"about {readable_seconds(self.seconds)}{ONCE}" if timed else "not sampled"),
            *(("problem", problem) for problem in self.problems),
        ]

    def _device(self) -> list[tuple[str, str]]:
        """The line about a GPU's memory."""
        device, most = self.machine.device, self.device_largest
        if not device.name or device.memory is None:
            return []
        at_once = min(self.machine.on_a_card, most.tasks)
        fits = "blocks are computed in parts" if self.device_tight else "fits"
        text = (
            f"at most {readable_bytes(self.device_bytes)} of its {readable_bytes(device.memory)} "
            f"({fits}): {readable_bytes(most.device_bytes)}{f' x {at_once}' * (at_once > 1)} "
            f"in {most.name}"
        )
        return [("GPU", text)]

    def _table(self) -> list[tuple[str, ...]]:
        head = ("stage", "tasks", "memory/task", "reads", "writes", "files", "core time")
        rows: list[tuple[str, ...]] = [head]
        for s in self.stages:
            sizes = (readable_bytes(n) for n in (s.task_bytes, s.read_bytes, s.write_bytes))
            rows.append(
                (s.name, f"{s.tasks:,}", *sizes, f"{s.files:,}", readable_seconds(s.seconds))
            )
        sums = (readable_bytes(n) for n in (self.read_bytes, self.write_bytes))
        known = [s.seconds for s in self.stages if s.seconds is not None]
        total = readable_seconds(sum(known)) if known else "?"
        files = sum(s.files for s in self.stages)
        rows.append(("total", f"{self.tasks:,}", "", *sums, f"{files:,}", total))
        return rows

    def __repr__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        named = self._facts()
        margin = max(9, *(len(name) for name, _ in named))
        facts = [line for name, text in named for line in _wrapped(name, text, margin)]
        return "\n".join([f"Plan: {self.what}", *facts, "", *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        facts = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self._facts()
        )
        head, *rows, total = self._table()
        headings = _html_row(head, "th")
        body = "".join(_html_row(row, "td") for row in rows)
        title = html.escape(f"Plan: {self.what}")
        return (
            f"<div><b>{title}</b><table>{facts}</table>"
            f"<table><thead>{headings}</thead><tbody>{body}</tbody>"
            f"<tfoot>{_html_row(total, 'th')}</tfoot></table></div>"
        )


def _html_row(cells: Sequence[str], tag: str) -> str:
    """A row of a table: the first cell on the left, the numbers on the right."""
    first, *others = map(html.escape, cells)
    left = f'<{tag} style="text-align:left">{first}</{tag}>'
    style = 'style="text-align:right"'
    return f"<tr>{left}{''.join(f'<{tag} {style}>{cell}</{tag}>' for cell in others)}</tr>"


WIDTH = 96
"""Columns of the text."""


def _wrapped(name: str, text: str, margin: int) -> list[str]:
    """A name, in a column of some width, and its text, in lines of a terminal's width."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > WIDTH - 3 - margin:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    lines.append(line)
    return [f"  {name if not n else '':<{margin}} {line}" for n, line in enumerate(lines)]
