"""Memory of a process with all its children, and disk of a folder, sampled while a command runs.

Memory is sampled every 50 ms as the sum of the resident sets (RSS): that costs microseconds but
counts what processes share (libraries, mapped files) once for each of them, so it is an upper
bound. The proportional sets (PSS), in which a shared page is divided among its users, add up to
what the tree really takes; reading them walks every page table, 2 ms for half a GiB, so they are
read only when the sum of the RSS has grown to a new high by 2 %: the figure may be that much low.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MEMORY_EVERY_S = 0.05
DISK_EVERY_S = 0.5
NEW_HIGH = 1.02


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(processes: Sequence[psutil.Process]) -> int:
    """Sum of the resident sets, in bytes."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def proportional(processes: Sequence[psutil.Process]) -> int:
    """Sum of the proportional sets, in bytes; 0 where the system does not know them."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += getattr(process.memory_full_info(), "pss", 0)
    return total


def disk(folder: Path) -> int:
    """Bytes on disk below a folder."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


@dataclass
class Watched:
    """What a command took."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    rss: int = 0
    pss: int = 0
    processes: int = 0
    disk: int = 0
    output: str = ""
    _high: float = field(default=0.0, repr=False)

    def sample(self, pid: int) -> None:
        """Look at the memory once."""
        found = tree(pid)
        rss = resident(found)
        self.processes = max(self.processes, len(found))
        self.rss = max(self.rss, rss)
        if rss > NEW_HIGH * self._high:
            self._high = rss
            self.pss = max(self.pss, proportional(found))


def processor_seconds() -> float:
    """Of all processes that have ended and been waited for, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(arguments: Sequence[str | Path], folder: Path) -> Watched:
    """Run a command to its end and say what it took.

    Raises
    ------
    subprocess.CalledProcessError
        It failed.
    """
    result = Watched()
    began, used = time.perf_counter(), processor_seconds()
    with subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE, text=True) as process:
        over = threading.Event()

        def look() -> None:
            next_disk = 0.0
            while not over.wait(MEMORY_EVERY_S):
                result.sample(process.pid)
                if time.monotonic() >= next_disk:
                    result.disk = max(result.disk, disk(folder))
                    next_disk = time.monotonic() + DISK_EVERY_S

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        result.output, _ = process.communicate()
        result.seconds = time.perf_counter() - began
        result.processor_seconds = processor_seconds() - used
        over.set()
        thread.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(map(str, arguments)))
    return result
