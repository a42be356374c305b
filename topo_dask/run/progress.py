"""One line a stage: blocks done, voxels a second, time left."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

QUIET_S = 10.0
"""Where no terminal looks on (batch logs), one line every so many seconds."""


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


@dataclass
class Progress:
    """Shows how far a stage is, on a terminal as a line that renews itself.

    Parameters
    ----------
    stage
        Its name.
    blocks, voxels
        How many there are to do; ``voxels`` 0 where they do not count.
    stream
        Where to write; ``None`` writes nothing.
    """

    stage: str
    blocks: int
    voxels: int
    stream: TextIO | None
    done: int = 0
    voxels_done: int = 0
    started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0

    def step(self, voxels: int) -> None:
        """One block more is done."""
        self.done += 1
        self.voxels_done += voxels
        if self.stream is None:
            return
        now = time.monotonic()
        pause = 0.2 if self.stream.isatty() else QUIET_S
        if now - max(self._shown, 0 if self.stream.isatty() else self.started) >= pause:
            self._shown = now
            self._write(self.line())

    def line(self) -> str:
        """What is shown now."""
        spent = max(time.monotonic() - self.started, 1e-9)
        text = f"{self.stage:<8} {self.done}/{self.blocks} blocks"
        if self.voxels:
            text += f"  {readable_count(self.voxels_done / spent)} voxels/s"
        if 0 < self.done < self.blocks:
            left = spent * (self.blocks - self.done) / self.done
            return f"{text}  {readable_time(left)} left"
        return f"{text}  {readable_time(spent)}"

    def close(self) -> None:
        """The stage is over: leave its last line standing."""
        if self.stream is not None and self.blocks:
            self._write(self.line())
            if self.stream.isatty():
                self.stream.write("\n")
                self.stream.flush()

    def _write(self, text: str) -> None:
        assert self.stream is not None
        self.stream.write(f"\r\x1b[K{text}" if self.stream.isatty() else f"{text}\n")
        self.stream.flush()


def progress_stream(progress: bool | None) -> TextIO | None:
    """Where progress goes: ``None`` means to a terminal if one looks on."""
    if progress is None:
        progress = sys.stderr.isatty()
    return sys.stderr if progress else None
