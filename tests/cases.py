"""Reference cases, arrays in memory or in chunks, blocks that stay few: what tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
KINDS = pytest.mark.parametrize("kind", ["numpy", "one chunk", "chunks"])


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def wrap(array: np.ndarray, kind: str) -> Any:
    """The array itself, or dask with one chunk, or with chunks that divide nothing evenly."""
    if kind == "numpy":
        return array
    chunks = [n if kind == "one chunk" else -(-n // 2) + 1 for n in array.shape]
    return da.from_array(array, chunks=tuple(chunks))


def unwrap(array: Any, kind: str) -> np.ndarray:
    assert isinstance(array, np.ndarray if kind == "numpy" else da.Array)
    values: np.ndarray = array if kind == "numpy" else array.compute(scheduler="sync")
    assert values.dtype == array.dtype
    return values


def fewer(blocks: tuple[int, ...], shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The same block shape, with longer sides where it would cut the volume too small."""
    sides = list(blocks)
    while np.prod(counts := [-(-n // b) for n, b in zip(shape, sides, strict=True)]) > most:
        sides[int(np.argmax(counts))] += 1
    return tuple(sides)
