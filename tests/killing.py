"""Runs in processes of their own that are really killed: what tests of them share."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Process = multiprocessing.process.BaseProcess

# Processes of their own that need not import everything anew.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["topo_dask"])


def tree(path: Path) -> dict[str, bytes]:
    """The files of a result, but for the record of the run, which tells the time."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def lines_of(out: Path, stage: str) -> int:
    """Blocks that the ledger holds of a stage."""
    file = out.with_name(f"{out.name}.work") / "ledger" / f"{stage}.jsonl"
    # The first line is the fingerprint; what follows the last line end is not yet written.
    return max(0, file.read_text().count("\n") - 1) if file.exists() else 0


def stages_done(shown: str) -> dict[str, int]:
    """Blocks that each stage of a run did, from what it showed."""
    found = re.findall(r"^(\S+) +(\d+)/(\d+) blocks", shown, flags=re.MULTILINE)
    return {stage: int(done) for stage, done, _ in found}


@contextmanager
def process_of(function: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Process]:
    """A call in a process of its own, which is gone in the end."""
    process = PROCESSES.Process(target=function, args=args, kwargs=options)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(process: Process, reached: Callable[[], bool]) -> bool:
    """Wait until something is reached; whether that was before the process ended."""
    until = time.monotonic() + 240
    while not reached():
        if not process.is_alive():
            assert process.exitcode == 0
            return False
        assert time.monotonic() < until
        time.sleep(0.001)
    return True


def killed_at(
    stage: str, blocks: int, out: Path, function: Callable[..., Any], *args: Any, **options: Any
) -> int:
    """Kill a run when some blocks of a stage are done; give how many were in the end."""
    work = out.with_name(f"{out.name}.work")
    before = out.with_name("before")
    if work.exists():
        shutil.copytree(work, before)
    for _ in range(10):
        with process_of(function, *args, **options) as process:
            wait_for(process, lambda: lines_of(out, stage) >= blocks)
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL and not out.exists():
            shutil.rmtree(before, ignore_errors=True)
            return lines_of(out, stage)
        # It was done before it could be killed: once more.
        for path in (out, work):
            shutil.rmtree(path, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, work)
    raise AssertionError("every run was faster than this process")
