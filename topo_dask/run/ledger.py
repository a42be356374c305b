"""What of a run is done: one file a stage in the work directory, one line a finished block.

A line is written after the block's data is on disk. A stage's file begins with the fingerprint of
its inputs and settings; another fingerprint begins it anew. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from topo_dask.config import counting
from topo_dask.run.damage import LEDGER, STAGES, Noting, keep_kinds, kinds_of, strike_lines
from topo_dask.run.execute import Engine, Order
from topo_dask.run.items import Each


def fingerprint(*parts: Any) -> str:
    """A short text that differs when any part does (JSON values and dataclasses).

    Fields of a dataclass that do not count when it is compared do not count here either.

    Examples
    --------
    >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("a", 1) == fingerprint("a", 2)
    (True, False)
    """

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {"is": type(value).__name__, **counting(value)}
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
        self.folder, self.title = work / LEDGER, title
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STAGES).write_text("")

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
        results: list[Any] = [None] * len(items)
        options: dict[str, Any] = {"voxels": voxels, "order": order, "recorded": recorded}
        found = self._stream(engine, stage, mark, function, items, **options)
        with contextlib.closing(found):
            for number, result in found:
                results[number] = result
        return results

    def each(
        self,
        engine: Engine,
        stage: str,
        mark: str,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        use: Callable[[int, Any], None],
        voxels: Sequence[int] | None = None,
    ) -> None:
        """As `run`, but calls ``use`` with the position and the result of each item; keeps none.

        First come those that stand in the file, then others as they finish.
        """
        found = self._stream(engine, stage, mark, function, items, voxels=voxels)
        with contextlib.closing(found):
            for number, result in found:
                use(number, result)

    def _stream(
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
    ) -> Generator[tuple[int, Any]]:
        path = self.folder / f"{stage}.jsonl"
        with (self.folder / STAGES).open("a") as stages:
            stages.write(f"{stage}\n")
        strike_lines(self.folder, stage, items)
        done = bytearray(len(items))
        for number, result in _known(path, mark):
            if number < len(items) and not done[number]:
                done[number] = 1
                yield number, result
        missing = [n for n, is_done in enumerate(done) if not is_done]
        if not missing:
            return
        some = None if voxels is None else [voxels[n] for n in missing]
        left = None if order is None else order.only(missing)
        todo = Each(missing, items.__getitem__)
        with path.open("a") as lines:
            noting, known = Noting(function, self.folder.parent), kinds_of(self.folder, stage)
            options: dict[str, Any] = {"voxels": some, "order": left, "settled": lines.flush}
            results = engine.run(self.title + stage, noting, todo, **options)
            with contextlib.closing(results):  # type: ignore[type-var]
                for position, (result, kinds) in results:
                    if not known.issuperset(kinds):
                        known.update(kinds)
                        keep_kinds(self.folder, stage, known)
                    number = missing[position]
                    lines.write(json.dumps([number, result]) + "\n")
                    if recorded is not None:
                        lines.flush()
                        recorded(number, result)
                    yield number, result


def _known(path: Path, mark: str) -> Iterator[tuple[int, Any]]:
    """Results that stand in a stage's file, which is begun anew if it is of another mark.

    It is cut off where a line is not whole.
    """
    end = 0
    with contextlib.suppress(OSError, ValueError, TypeError), path.open("rb") as lines:
        first = lines.readline()
        if first.endswith(b"\n") and json.loads(first) == mark:
            end = len(first)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                number, result = json.loads(str(line, "utf-8"))
                yield number, result
                end += len(line)
    if end == 0:
        path.write_text(json.dumps(mark) + "\n")
    elif path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)
