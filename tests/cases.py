"""Reference cases, arrays in memory or in chunks, blocks that stay few: what tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data"
SEEDS = st.integers(0, 2**32 - 1)
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


@st.composite
def spatial_masks(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray | None:
    """None, or 1 in a box that leaves a margin, or 1 here and there."""
    kind = draw(st.sampled_from(["none", "none", "box", "noise"]))
    if kind == "none":
        return None
    if kind == "noise":
        rng = np.random.default_rng(draw(SEEDS))
        return (rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))).astype(np.uint8)
    mask = np.zeros(shape, dtype=np.float32)
    mask[tuple(slice(draw(st.integers(0, 2)), n - draw(st.integers(0, 2))) for n in shape)] = 1
    return mask
