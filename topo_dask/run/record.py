"""The record of a run: what made an output, how long each stage took, what went wrong."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIBRARIES = ("topo_dask", "numpy", "numba", "scipy", "dask", "distributed", "zarr")
UNKNOWN = "left no word: killed, or its machine was lost"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that matter."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Record:
    """What is known of a run, on disk after every stage; attempts before it are kept.

    Parameters
    ----------
    path
        The file.
    about
        What is to be said of the whole run: settings, input, output.
    cluster
        What it runs on.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], cluster: str) -> None:
        self.path = path
        before = _attempts(path)
        for attempt in before:
            attempt["ended"] = attempt.get("ended") or UNKNOWN
        self.stages: list[dict[str, Any]] = []
        self.attempt: dict[str, Any] = {
            "began": now(),
            "ended": None,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "cluster": cluster,
            "versions": versions(),
            "stages": self.stages,
        }
        self.content = {**plain(about), "attempts": [*before, self.attempt]}
        self._write()

    def add(self, stage: dict[str, Any]) -> None:
        """A stage is over."""
        self.stages.append(stage)
        self.attempt["last_word"] = now()
        with contextlib.suppress(OSError):  # a full disk: what the run itself says of it matters
            self._write()

    @property
    def computed_on(self) -> str:
        """What computed, in all attempts, and how many tasks; empty where nothing says so."""
        tasks: Counter[str] = Counter()
        in_parts = 0
        for attempt in self.content["attempts"]:
            for stage in attempt.get("stages", ()):
                tasks.update(stage.get("computed_on", {}))
                in_parts += stage.get("in_parts", 0)
        names = [f"{name} ({count} tasks)" for name, count in sorted(tasks.items())]
        text = ", ".join(names)
        if in_parts:
            text += f"; {in_parts} tasks in parts, for device memory was too small: smaller blocks"
            text += " are faster"
        return text

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note how the attempt ends, if it fails; the output's copy is of one that did not."""
        try:
            yield
        except BaseException as error:
            self.attempt["ended"] = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                self._write()
            raise

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _attempts(path: Path) -> list[dict[str, Any]]:
    """Attempts that stand in an earlier file."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        return [attempt for attempt in found if isinstance(attempt, dict)]
    return []
