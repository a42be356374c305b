"""Tables of many blocks brought together by workers, so that a single task opens few files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.run.files import load_table, save_table
from topo_dask.run.items import Each

FAN_IN = 64
"""Tables that are brought together in one file, where there are more than that."""


@dataclass(frozen=True)
class TablesTask:
    """Tables of which one is made."""

    paths: tuple[Path, ...]
    path: Path

    def __str__(self) -> str:
        return f"tables for {self.path.name}"


def bring_together(task: TablesTask) -> int:
    """Stage together: one table of several, one after the other; gives how many."""
    parts = [load_table(path) for path in task.paths]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    save_table(task.path, **table)
    return len(parts)


def in_few(
    paths: Sequence[Path], folder: Path, stage: Callable[[Any, Sequence[Any]], Any]
) -> tuple[Path, ...]:
    """The same rows in the same order, in fewer files where there are more than `FAN_IN`.

    Parameters
    ----------
    paths
        Tables.
    folder
        Where fewer of them go.
    stage
        Runs a function on items.
    """
    if len(paths) <= FAN_IN:
        return tuple(paths)

    def task(number: int) -> TablesTask:
        some = paths[number * FAN_IN : (number + 1) * FAN_IN]
        return TablesTask(tuple(some), made[number])

    made = Each(range(-(-len(paths) // FAN_IN)), lambda number: folder / f"{number}.npz")
    stage(bring_together, Each(made.numbers, task))
    return tuple(made)


def column(paths: Sequence[Path], name: str) -> Iterator[npt.NDArray[Any]]:
    """A column of several tables, one file after the other."""
    for path in paths:
        yield load_table(path, (name,))[name]


def first_rows(paths: Sequence[Path]) -> npt.NDArray[np.int64]:
    """The first row of each block, and the end, from a column ``counts`` with those of each."""
    none = np.zeros(1, dtype=np.int64)
    return np.cumsum(np.concatenate([none, *column(paths, "counts")]), dtype=np.int64)
