"""What of a run is done: one file a stage in the work directory, one line a finished block.

A line is written after the block's data is on disk. A stage's file begins with the fingerprint of
its inputs and settings; another fingerprint begins it anew. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from topo_dask.run.execute import Engine, Order


def fingerprint(*parts: Any) -> str:
    """A short text that differs when any part does (JSON values and dataclasses).

    Examples
    --------
    >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("a", 1) == fingerprint("a", 2)
    (True, False)
    """

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {"is": type(value).__name__, **asdict(value)}
        return str(value)

    text = json.dumps(parts, default=plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Ledger:
    """The finished blocks of a run's stages.

    Parameters
    ----------
    work
        The work directory.
    title
        What stands before the names of stages where people see them.
    """

    def __init__(self, work: Path, title: str = "") -> None:
        self.folder, self.title = work / "ledger", title
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        engine: Engine,
        stage: str,
        mark: str,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        voxels: Sequence[int] | None = None,
        order: Order | None = None,
        recorded: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """Run what is not done yet of a stage; give the results of all items, in order.

        Parameters
        ----------
        engine
            Runs the tasks.
        stage
            Its name; the file's too.
        mark
            Fingerprint of all that the stage's results depend on.
        function, items, voxels, order
            As for `Engine.run`; results are JSON values.
        recorded
            Called with the position and the result of each item when both stand in the file.
        """
        path = self.folder / f"{stage}.jsonl"
        done = self._done(path, mark)
        missing = [n for n in range(len(items)) if n not in done]
        if not missing:
            return [done[n] for n in range(len(items))]
        some = None if voxels is None else [voxels[n] for n in missing]
        with path.open("a") as lines:
            left = None if order is None else order.only(missing)
            todo = [items[n] for n in missing]
            results = engine.run(self.title + stage, function, todo, voxels=some, order=left)
            with contextlib.closing(results):  # type: ignore[type-var]
                for position, result in results:
                    done[missing[position]] = result
                    lines.write(json.dumps([missing[position], result]) + "\n")
                    lines.flush()
                    if recorded is not None:
                        recorded(missing[position], result)
        return [done[n] for n in range(len(items))]

    def _done(self, path: Path, mark: str) -> dict[int, Any]:
        """Results that stand in a stage's file, which is begun anew if it is of another mark."""
        done: dict[int, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            first, *lines = path.read_text().split("\n")
            if json.loads(first) == mark:
                for line in lines[:-1]:  # what follows the last line end was cut off
                    number, result = json.loads(line)
                    done[number] = result
                if lines[-1]:
                    text = "".join(f"{line}\n" for line in [first, *lines[:-1]])
                    path.write_text(text)
                return done
        path.write_text(json.dumps(mark) + "\n")
        return {}
