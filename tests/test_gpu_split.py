"""Running out of device memory: what does not fit is computed in parts, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topo_dask
from topo_dask.errors import TightMemory
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


def diffused(kernels: Any, potential: str) -> list[np.ndarray]:
    """Two rounds, of a core with what the second one sees around it, in an annotated part."""
    how: dict[str, Any] = {
        "ids": IDS,
        "iterations": np.array([3, 9, 7]),
        "anchors": np.array([[5, 3, 8], [5, 20, 8], [9, 9, 9]]),
        "origin": (5, 0, 7),
        "potential": potential,
        "spatial_mask": MASK | (LABELS > 0),
        "spacing": (1.5, 1.0, 1.0),
    }
    fields, first = kernels.diffusion_round(LABELS, None, span=cpu.Span(0, 4), **how)
    core = (slice(0, 11), slice(5, 13), slice(2, 15))
    last = kernels.diffusion_round(LABELS, fields, span=cpu.Span(4, 8), core=core, **how)
    return [first, last[1], *fields, *last[0]]


JOBS: dict[str, Any] = {
    "nearest": lambda k: tracked(k, "nearest"),
    "linear": lambda k: tracked(k, "linear"),
    "cells": cells,
    "direct": directed,
    "coordinate": lambda k: diffused(k, "coordinate"),
    "heat": lambda k: diffused(k, "heat"),
}


MEMORY_OF = {"coordinate": 300_000, "heat": 180_000}


@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_parts_give_the_bits_of_the_whole(
    job: str, none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noting() as computed:
        whole = JOBS[job](split)
    assert computed.in_parts == 0
    monkeypatch.setenv(MEMORY, str(0 if none else MEMORY_OF.get(job, 90_000)))
    with noting() as computed:
        parts = JOBS[job](split)
    assert computed.in_parts > 0
    assert (PROCESSOR in computed.where) == none
    for one, other, plain in zip(whole, parts, JOBS[job](cpu), strict=True):
        assert one.dtype == other.dtype == plain.dtype
        if job in ("coordinate", "heat", "direct") and one.dtype.kind == "f":
            np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, plain)
        if not none:
            np.testing.assert_array_equal(one, other)


BLOBS = (np.indices((40, 24, 20)) // 12 * [[[[1]]], [[[4]]], [[[8]]]]).sum(0) + 1
BLOBS[RNG.random(BLOBS.shape) < 0.05] = 0


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_flows_in_parts_see_their_context(potential: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(**options: Any) -> np.ndarray:
        made: np.ndarray = topo_dask.generate_diffusion_flows(
            BLOBS, 30, potential=potential, backend="gpu", **options
        )
        return made

    exact, near = flow(context=30), flow()
    monkeypatch.setenv(MEMORY, str((55 if potential == "coordinate" else 30) * BLOBS.size))
    with noting() as computed:
        np.testing.assert_array_equal(flow(context=5), flow(context=5))
        wide = flow(context=30)
    assert computed.in_parts > 0
    assert PROCESSOR not in computed.where
    np.testing.assert_allclose(wide, exact, atol=1e-6)
    np.testing.assert_allclose(flow(), near, atol=1e-4)


def test_a_run_in_parts_gives_the_same_labels_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = topo_dask.generate_direct_flows(BLOBS, backend="cpu")
    options: dict[str, Any] = {"foreground": BLOBS, "n_steps": 20, "blocks": 20, "cluster": "sync"}
    whole = topo_dask.segment(flow, tmp_path / "whole.zarr", backend="cpu", **options)
    monkeypatch.setenv(MEMORY, str(100_000))
    with pytest.warns(TightMemory) as said:
        parts = topo_dask.segment(flow, tmp_path / "parts.zarr", backend="gpu", **options)
    assert [str(one.message).split(":")[0] for one in said if "in parts" in str(one.message)][-1]
    assert sum("were computed in parts" in str(one.message) for one in said) == 1
    assert "in parts" in parts.details["computed on"]
    np.testing.assert_array_equal(parts.array[:], whole.array[:])
