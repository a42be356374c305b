"""Locks: one run at a time in a work directory; that of a process that is gone is taken over."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from topo_dask.errors import RunInProgress

LOCK = "lock.json"


def refuse_running(directory: Path, output: Path, argument: str) -> None:
    """Raise RunInProgress where another run on the output works in its directory."""
    holder = _holder(directory / LOCK)
    if holder is not None:
        raise RunInProgress(
            argument,
            f"{str(output)!r}, on which process {holder.get('pid', '(unknown)')} on host "
            f"{holder.get('host', '(unknown)')} is working",
            "one run at a time on an output",
            f"Wait for it; if it is gone for certain, remove {directory / LOCK}.",
        )


@contextmanager
def locked(directory: Path, output: Path, argument: str) -> Iterator[None]:
    """Hold the lock of a directory in which a run on the output works; see `refuse_running`."""
    path, me = directory / LOCK, _this_process()
    while True:
        try:
            with path.open("x") as file:
                try:
                    json.dump(me, file)
                    file.flush()
                except OSError:  # a full disk; nobody could tell whose lock it was
                    path.unlink()
                    raise
            break
        except FileExistsError:
            refuse_running(directory, output, argument)
            path.unlink(missing_ok=True)
    try:
        yield
    finally:
        # After publication the directory is gone, and may be another run's already.
        if _read_json(path) == me:
            path.unlink(missing_ok=True)


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock; None if nobody does, or a process of this machine that is gone."""
    if not os.path.lexists(lock):
        return None
    holder, me = _read_json(lock), _this_process()
    if holder.get("host") != me["host"]:
        return holder  # who can tell?
    # Numbers of processes are given again, so the time counts where there is one.
    if me["since"] is not None:
        return holder if holder.get("since") == _started(int(holder["pid"])) else None
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return holder


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "since": _started(pid)}


def _started(pid: int) -> str | None:
    """When a process began, in ticks of the machine; None if it is gone or that cannot be read."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """What is in a small file of ours; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}
