"""Running out of device memory: what does not fit is computed in parts, to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from topo_dask.kernels import cpu
from topo_dask.kernels.computed import PROCESSOR, noting
from topo_dask.kernels.gpu import split
from topo_dask.kernels.gpu.device import CHOICE
from topo_dask.kernels.gpu.host import MEMORY

SHAPE = (16, 18, 20)
RNG = np.random.default_rng(3)
FLOW = RNG.normal(size=(3, *SHAPE)).astype(np.float32)
MASK = RNG.random(SHAPE) < 0.8
LABELS = RNG.integers(0, 4, SHAPE).astype(np.uint16) * 3
IDS = np.array([3, 6, 9], np.uint64)
CENTRES = RNG.random((3, 3)) * 16
ENDS = RNG.random((5000, 3)) * (np.array(SHAPE) - 1)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "host")


def tracked(kernels: Any, interpolation: str) -> list[np.ndarray]:
    """Particles of every voxel, and others that begin anywhere, in a part of a larger volume."""
    where = {"origin": (2, 0, 1), "shape": (20, 18, 30), "interpolation": interpolation}
    flow = kernels.interleave(FLOW)
    made = kernels.track_voxels(flow, MASK, start=(2, 0, 1), n_steps=30, step_size=0.7, **where)
    ends, left = ENDS.copy(), np.full(len(ENDS), 25, np.int32)
    kernels.track(flow, ends, left, step_size=1.3, **where)
    return [*made, ends, left]


def cells(kernels: Any) -> list[np.ndarray]:
    table, index = kernels.cell_table(ENDS, shape=SHAPE, radius=4.0)
    return [table.cells, table.counts, table.offsets, index]


def directed(kernels: Any) -> list[np.ndarray]:
    how = {"ids": IDS, "centres": CENTRES, "origin": (1, 2, 3)}
    errors = kernels.flow_errors(LABELS, kernels.interleave(FLOW), **how)
    return [kernels.direct_flow(LABELS, **how, spacing=(2, 1, 1)), errors.ids, errors.sums]


JOBS: dict[str, Any] = {
    "nearest": lambda k: tracked(k, "nearest"),
    "linear": lambda k: tracked(k, "linear"),
    "cells": cells,
    "direct": directed,
}


@pytest.mark.parametrize("memory", [90_000, 0])
@pytest.mark.parametrize("job", JOBS)
def test_parts_give_the_bits_of_the_whole(
    job: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noting() as computed:
        whole = JOBS[job](split)
    assert computed.in_parts == 0
    monkeypatch.setenv(MEMORY, str(memory))
    with noting() as computed:
        parts = JOBS[job](split)
    assert computed.in_parts > 0
    assert (PROCESSOR in computed.where) == (memory == 0)
    for one, other, plain in zip(whole, parts, JOBS[job](cpu), strict=True):
        assert one.dtype == other.dtype == plain.dtype
        if one.dtype == np.float32:  # flows agree with the processor's to 1e-4
            np.testing.assert_allclose(one, plain, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, plain)
        np.testing.assert_array_equal(one, other)
