"""Worker processes of ours keep the memory that they have had, as long as their limit allows.

glibc gives the memory of every large array back to the system when it is freed, and dask tells it
to give back smaller pieces too. The next task then touches all of its memory for the first time
again: the kernel clears every page, and where the host of a virtual machine has taken free pages
back, that costs more than the task's own work, most of all when several processes want pages.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client, Nanny, Worker, WorkerPlugin

SHARE = 0.5
"""Part of its limit that a worker without work may hold; what is free beyond it is given back."""

# One arena: what one thread has freed another can use. No mappings: they end with their array.
KEEP = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1}
"""What glibc is told, as environment variables that it reads when a process begins."""

KEEP_IN_SHELL = f"export {' '.join(f'{name}={value}' for name, value in KEEP.items())}"
"""The same in the script of a job; dask's nanny lets its own setting go where one is exported."""

OPTIONS = {"MALLOC_ARENA_MAX": -8, "MALLOC_MMAP_MAX_": -4, "MALLOC_TRIM_THRESHOLD_": -1}
"""The numbers that malloc.h has for them."""


def glibc() -> Any:
    """The C library, if it has the functions that are wanted here."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_memory() -> None:
    """Let this process keep the memory of arrays that are freed, for later ones; with glibc.

    It works for the main thread, and for threads that begin later where none began before.
    """
    library = glibc()
    if library is not None:
        for name, value in KEEP.items():
            library.mallopt(OPTIONS[name], value)


def give_memory_back() -> None:
    """Give all memory that is free back to the system."""
    library = glibc()
    if library is not None:
        library.malloc_trim(0)


class KeepingNanny(Nanny):
    """Begins workers that keep their memory: tasks run in threads, so glibc must know at once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pre_spawn_env = {**self.pre_spawn_env, **{k: str(v) for k, v in KEEP.items()}}


@contextmanager
def environment_kept() -> Iterator[None]:
    """Undo what nannies of this process write into its environment for the workers they begin."""
    before = {name: os.environ.get(name) for name in KEEP}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class GiveMemoryBack(WorkerPlugin):
    """A dask worker that gives free memory back when a task leaves it holding too much.

    dask pauses a worker that holds too much of its limit, free memory included, and nothing would
    wake it.
    """

    name = "topo_dask: give memory back"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """A worker begins."""
        self.worker = worker

    def transition(self, key: Any, start: str, finish: str, **more: Any) -> None:
        """A task is over, or goes another step of its way."""
        if finish not in ("memory", "error"):
            return
        limit = self.worker.memory_manager.memory_limit
        if limit and self.worker.monitor.get_process_memory() > SHARE * limit:
            give_memory_back()


def watch_memory(client: Client) -> None:
    """Have all workers of a cluster of ours give memory back, those that come later too."""
    # Where a worker ends just then, all others have the plugin, and the one in its place gets it.
    with suppress(OSError):
        client.register_plugin(GiveMemoryBack())
