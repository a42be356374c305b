"""Tracking and cells from the CUDA sources: every bit is the CPU's, wherever the array ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from topo_dask.config import SegmentSettings
from topo_dask.errors import DeviceMemoryError
from topo_dask.graph.merge import paint, resolve
from topo_dask.grid import BlockGrid
from topo_dask.kernels import cpu, gpu
from topo_dask.kernels.gpu import Device
from topo_dask.kernels.gpu.host import MEMORY

# One device serves all examples of a test.
few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert_array_equal(one, other)
    assert one.tobytes() == other.tobytes()


@st.composite
def journeys(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Part of a flow, particles anywhere in the volume, steps, and the rest of what track takes."""
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    low = [draw(st.integers(0, n - 1)) for n in shape]
    high = [draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = [b - a for a, b in zip(low, high, strict=True)]
    flow = rng.normal(size=(3, *size)) * draw(st.sampled_from([0.1, 1.0, 9.0]))
    flow *= rng.random(size) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    starts = rng.random((draw(st.integers(0, 70)), 3)) * (np.array(shape) - 1)
    if draw(st.booleans()):
        starts = np.rint(starts)
    options = {
        "origin": tuple(low),
        "shape": shape,
        "step_size": draw(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
        "interpolation": draw(st.sampled_from(["nearest", "linear"])),
    }
    steps = rng.integers(0, 40, len(starts)).astype(np.int32)
    return flow.astype(np.float32), starts, steps, options


@few
@given(journey=journeys())
def test_particles_go_where_they_go_on_the_cpu(
    device: Device, journey: tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
) -> None:
    flow, starts, steps, options = journey
    expected, expected_left = starts.copy(), steps.copy()
    cpu.track(cpu.interleave(flow), expected, expected_left, **options)
    ready = gpu.interleave(flow)
    same_bits(device.get(ready), cpu.interleave(flow))
    for field in (ready, cpu.interleave(flow)):
        ends, left = starts.copy(), steps.copy()
        gpu.track(field, ends, left, **options)
        same_bits(ends, expected)
        same_bits(left, expected_left)


def test_labels_of_the_case(device: Device) -> None:
    """From flows to labels, all that the device does on the way: the original's answers."""
    arrays = case("ellipsoids")
    mask, radius = arrays["instances"] > 0, float(arrays["convergence_radius"])
    ends, left = gpu.track_voxels(
        gpu.interleave(arrays["noisy_flow"]),
        mask,
        start=(0, 0, 0),
        n_steps=int(arrays["track_steps"]),
        origin=(0, 0, 0),
        shape=mask.shape,
        step_size=float(arrays["track_step_size"]),
    )
    assert_allclose(ends, arrays["final_positions"], rtol=0, atol=1e-9)
    assert not left.any()
    chosen = SegmentSettings(convergence_radius=radius, min_size=int(arrays["min_size"]))
    cells = gpu.cell_table(ends, shape=mask.shape, radius=radius)
    _, of_cell = resolve([cells], BlockGrid(mask.shape, mask.shape), chosen)
    assert_array_equal(paint(mask, cells[1], of_cell, np.int32), arrays["cluster_labels"])


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_particles_that_are_handed_over_end_where_they_do_in_the_whole(
    device: Device, interpolation: str
) -> None:
    flow = np.random.default_rng(0).normal(size=(3, 20, 9, 9)).astype(np.float32)
    shape = flow.shape[1:]
    options: Any = {"shape": shape, "step_size": 0.8, "interpolation": interpolation}
    mask = np.ones(shape, bool)
    start: Any = {"start": (0, 0, 0), "n_steps": 30, "origin": (0, 0, 0)}
    whole, left = gpu.track_voxels(gpu.interleave(flow), mask, **start, **options)
    same_bits(whole, cpu.track_voxels(cpu.interleave(flow), mask, **start, **options)[0])
    assert not left.any()
    ends, left = gpu.foreground_voxels(mask), np.full(mask.size, 30, np.int32)
    half = shape[0] // 2
    parts = [
        (gpu.interleave(flow[:, a : b + 1]), a) for a, b in ((0, half), (half, shape[0]))
    ]  # one more plane, which what lies between planes needs
    rounds = 0
    while left.any():
        for part, first in parts:
            gpu.track(part, ends, left, origin=(first, 0, 0), **options)
        rounds += 1
    assert rounds > 1
    same_bits(ends, whole)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1"])
def test_flow_of_any_type_is_made_ready(device: Device, dtype: str) -> None:
    flow = (np.random.default_rng(1).normal(size=(3, 4, 5, 6)) * 9).astype(dtype)
    same_bits(device.get(gpu.interleave(flow)), cpu.interleave(flow))
    same_bits(device.get(gpu.interleave(flow[:, ::2, 1:])), cpu.interleave(flow[:, ::2, 1:]))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_voxels_are_listed_in_order(device: Device, dtype: Any) -> None:
    mask = (np.random.default_rng(2).random((5, 6, 7)) < 0.3).astype(dtype)
    for empty in (mask, np.zeros_like(mask)):
        for made in (np.float64, np.int64):
            origin = (7, 0, 10**10)
            found = gpu.foreground_voxels(empty, origin=origin, dtype=made)
            same_bits(found, cpu.foreground_voxels(empty, origin=origin, dtype=made))


def test_what_is_on_the_device_stays_there(device: Device) -> None:
    """One crossing each way: arrays that were put are changed in place, results stay."""
    rng = np.random.default_rng(3)
    flow = rng.normal(size=(3, 6, 6, 6)).astype(np.float32)
    mask = np.ones((6, 6, 6), bool)
    field, there = gpu.interleave(device.put(flow)), gpu.foreground_voxels(device.put(mask))
    assert isinstance(field, device.xp.ndarray)
    assert isinstance(there, device.xp.ndarray)
    expected, left = cpu.foreground_voxels(mask), np.full(mask.size, 9, np.int32)
    steps = device.put(left)
    place: Any = {"origin": (0, 0, 0), "shape": (6, 6, 6), "step_size": 1.0}
    gpu.track(field, there, steps, **place)
    cpu.track(cpu.interleave(flow), expected, left, **place)
    same_bits(device.get(there), expected)
    table, index = gpu.cell_table(there, shape=(6, 6, 6), radius=3.0)
    assert isinstance(index, device.xp.ndarray)
    same_bits(device.get(index), cpu.cell_table(expected, shape=(6, 6, 6), radius=3.0)[1])
    assert isinstance(table.cells, np.ndarray)


@few
@given(
    shape=st.tuples(*[st.sampled_from([1, 3, 30, 10**6])] * 3),
    radius=st.sampled_from([0.5, 1.5, 4.0, 7.3]),
    count=st.integers(0, 99),
    seed=st.integers(0, 2**32 - 1),
)
def test_cells_are_those_of_the_cpu(
    device: Device, shape: tuple[int, int, int], radius: float, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ends = rng.random((max(1, count // 9), 3)) * (np.array(shape) - 1)
    ends = ends[rng.integers(0, len(ends), count)] + rng.normal(size=(count, 3)) * (seed % 3)
    ends = np.clip(ends, 0, np.array(shape) - 1.0)
    place: Any = {"shape": shape, "radius": radius}
    same_bits(gpu.cell_numbers(ends, **place), cpu.cell_numbers(ends, **place))
    (found, index), (table, rows) = gpu.cell_table(ends, **place), cpu.cell_table(ends, **place)
    same_bits(index, rows)
    for column in ("cells", "counts", "offsets"):
        same_bits(getattr(found, column), getattr(table, column))


def test_too_little_memory_is_told_and_changes_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.xp is not np:
        pytest.skip("only the host's memory can be made small")
    field = cpu.interleave(np.ones((3, 8, 8, 8), np.float32))
    ends, left = np.zeros((4, 3)), np.full(4, 5, np.int32)
    monkeypatch.setenv(MEMORY, "4000")
    with pytest.raises(DeviceMemoryError, match="Use smaller blocks"):
        gpu.track(field, ends, left, origin=(0, 0, 0), shape=(8, 8, 8), step_size=1.0)
    assert not ends.any()
    assert (left == 5).all()
