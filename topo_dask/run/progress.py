"""One line a stage, wherever someone looks on: a terminal, a batch log, a notebook."""

from __future__ import annotations

import html
import resource
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

QUIET_S = (10.0, 60.0)
"""In batch logs, one line every so many seconds: at first, and of a stage that takes long."""


def readable_count(number: float) -> str:
    """A number with three digits and a letter for its size.

    Examples
    --------
    >>> readable_count(1234567), readable_count(87)
    ('1.23M', '87')
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def readable_time(seconds: float) -> str:
    """A duration in the unit that suits it.

    Examples
    --------
    >>> readable_time(7.34), readable_time(75), readable_time(7500)
    ('7.3 s', '1:15 min', '2:05 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class Display(ABC):
    """A place where a line can be shown and renewed."""

    @abstractmethod
    def show(self, text: str) -> None:
        """Show a line in the place of the one shown before."""

    @abstractmethod
    def leave(self, text: str) -> None:
        """Show a line that stays; the next comes below it."""

    def pause(self, spent: float) -> float:
        """Seconds to the next line, when a stage has taken so long."""
        return 0.5


class Terminal(Display):
    """A line that renews itself."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.width = stream, 0

    def show(self, text: str) -> None:
        """Renew the line."""
        self._write(f"\r\x1b[K{text}")

    def leave(self, text: str) -> None:
        """Let it stand."""
        self._write(f"\r\x1b[K{text}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class Log(Display):
    """Plain lines, now and then: where no terminal looks on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, text: str) -> None:
        """Write a line."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    leave = show

    def pause(self, spent: float) -> float:
        """Rarely, and more rarely if it takes long."""
        return min(max(QUIET_S[0], spent / 10), QUIET_S[1])


class Notebook(Display):
    """A text below a notebook's cell that renews itself."""

    def __init__(self) -> None:
        from IPython.display import HTML, display  # type: ignore[import-not-found,unused-ignore]

        self.html, self.lines = HTML, list[str]()
        self.handle: Any = display(self._page(""), display_id=True)  # type: ignore[no-untyped-call,unused-ignore]

    def show(self, text: str) -> None:
        """Renew the last line."""
        self.handle.update(self._page(text))

    def leave(self, text: str) -> None:
        """Let it stand."""
        self.lines.append(text)
        self.show("")

    def _page(self, last: str) -> Any:
        text = html.escape("\n".join([*self.lines, last]).strip())
        return self.html(f"<pre style='margin:0'>{text}</pre>")  # type: ignore[no-untyped-call,unused-ignore]


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def progress_display(progress: bool | None) -> Display | None:
    """Where progress goes: ``None`` means to a terminal or notebook if one looks on."""
    if progress is False:
        return None
    if in_notebook():
        return Notebook()
    if sys.stderr.isatty():
        return Terminal(sys.stderr)
    return Log(sys.stderr) if progress else None


# ------------------------------------------------------------------------------------- tasks


class Usage(NamedTuple):
    """Of some tasks: what their process had moved before and after, in bytes; what computed.

    ``computed_on`` counts the tasks of each place, ``in_parts`` those that device memory was too
    small for.
    """

    process: str
    seconds: float
    moved_before: int
    moved_after: int
    peak_memory: int
    computed_on: Mapping[str, int] = MappingProxyType({})
    in_parts: int = 0


def bytes_moved() -> int:
    """Bytes that this process has read and written so far, where the system tells (Linux)."""
    try:
        with open("/proc/self/io", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    return int(lines[0].split()[1]) + int(lines[1].split()[1])


def peak_memory() -> int:
    """The most memory that this process has had at once, in bytes."""
    with suppress(OSError):  # Linux; what getrusage says there began with the parent's
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Progress:
    """What a stage has done, shown as it goes on.

    Parameters
    ----------
    stage
        Its name.
    blocks, voxels
        How many there are to do; ``voxels`` 0 where they do not count.
    display
        Where to show it; ``None`` shows nothing.
    about
        Gives what else is to be said: how many workers there are, what is waited for.
    """

    def __init__(
        self,
        stage: str,
        blocks: int,
        voxels: int,
        display: Display | None,
        about: Callable[[], str] = str,
    ) -> None:
        self.stage, self.blocks, self.voxels = stage, blocks, voxels
        self.display, self.about = display, about
        self.done = self.voxels_done = self.bytes = self.peak = self.retries = self.in_parts = 0
        self.computed_on: Counter[str] = Counter()
        self.busy = 0.0
        self.started = time.monotonic()
        self._moved: dict[str, int] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if display is not None and blocks:
            self._thread = threading.Thread(target=self._renew, name="progress", daemon=True)
            self._thread.start()

    def step(self, blocks: int, voxels: int, usage: Usage) -> None:
        """Some blocks more are done."""
        process, after = usage.process, usage.moved_after
        # Tasks of one process overlap: what it has moved since the last one counts once.
        self.bytes += max(0, after - self._moved.get(process, usage.moved_before))
        self._moved[process] = max(after, self._moved.get(process, 0))
        self.peak, self.busy = max(self.peak, usage.peak_memory), self.busy + usage.seconds
        self.computed_on.update(usage.computed_on)
        self.in_parts += usage.in_parts
        self.done += blocks
        self.voxels_done += voxels

    @property
    def seconds(self) -> float:
        """Since it began."""
        return max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """What is shown now."""
        spent = self.seconds
        parts = [f"{self.stage:<8} {self.done}/{self.blocks} blocks"]
        if self.voxels:
            parts.append(f"{readable_count(self.voxels_done / spent)} voxels/s")
        if self.bytes:
            parts.append(f"{readable_count(self.bytes / spent)}B/s")
        if 0 < self.done < self.blocks:
            left = spent * (self.blocks - self.done) / self.done
            parts.append(f"{readable_time(left)} left")
        else:
            parts.append(readable_time(spent))
        parts.append(self.about())
        if self.retries:
            parts.append(f"{self.retries} tried again")
        return "  ".join(filter(None, parts))

    def record(self) -> dict[str, Any]:
        """The stage in the record of a run."""
        return {
            "stage": self.stage,
            "blocks": self.blocks,
            "done": self.done,
            "seconds": round(self.seconds, 3),
            "seconds_in_tasks": round(self.busy, 3),
            "voxels": self.voxels_done,
            "bytes_moved": self.bytes,
            "peak_memory": self.peak,
            "processes": len(self._moved),
            "tried_again": self.retries,
            "computed_on": dict(sorted(self.computed_on.items())),
            "in_parts": self.in_parts,
        }

    def close(self) -> None:
        """The stage is over: leave its last line standing."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self.display is not None and self.blocks:
            self.display.leave(self.line())

    def _renew(self) -> None:
        assert self.display is not None
        while not self._over.wait(self.display.pause(self.seconds)):
            self.display.show(self.line())
