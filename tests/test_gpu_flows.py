"""Flows on a device are those of the CPU: the host device to the bit, a GPU within 1e-4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from test_kernels import IDS, diffusion_cases, label_volumes, origins
from test_poisson import SOLVED, random_blobs
from test_poisson import cases as poisson_cases
from test_reference import iteration_counts

from topo_dask.errors import DeviceMemoryError, InvalidArgument, TopoError
from topo_dask.kernels import cpu, gpu, reference
from topo_dask.kernels.gpu import Device, poisson
from topo_dask.kernels.gpu.host import MEMORY, HostDevice

FLOW_TOLERANCE = 1e-4

# One device serves all examples of a test.
some_examples = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_same_flow(device: Device, made: np.ndarray, expected: np.ndarray) -> None:
    assert made.dtype == expected.dtype
    if isinstance(device, HostDevice):  # the same additions in the same order
        assert_array_equal(made, expected)
    else:
        assert_allclose(made, expected, rtol=0, atol=FLOW_TOLERANCE)


def tissue(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """Touching instances with large ids, and some background."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, shape, size=(count, 3))
    distance = ((np.indices(shape)[..., None] - points.T[:, None, None, None]) ** 2).sum(axis=0)
    labels = IDS[1] + distance.argmin(axis=-1).astype(np.uint64) * np.uint64(2**40 + 1)
    labels[distance.min(axis=-1) > np.quantile(distance.min(axis=-1), 0.9)] = 0
    return labels


def anchors_of(labels: np.ndarray, origin: tuple[int, ...] = (0, 0, 0)) -> np.ndarray:
    return np.rint(reference.instance_facts(labels, origin=origin).centres).astype(np.int64)


@some_examples
@given(diffusion_cases())
def test_diffusion_flow(device, case):
    """All options, origins up to 1e7, axes of length 1, every dtype."""
    labels, origin = case.pop("labels"), case["origin"]
    case |= {"anchors": anchors_of(labels, origin)}
    expected = cpu.diffusion_flow(labels, **case)
    assert_same_flow(device, gpu.diffusion_flow(labels, **case), expected)


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
@pytest.mark.parametrize("masked", [False, True])
def test_diffusion_of_larger_arrays(device, potential, masked):
    """Several runs of planes, tiles and groups of voxels, ends of rows between groups."""
    labels = tissue((37, 18, 141), 30)
    table = reference.instance_facts(labels)
    rng = np.random.default_rng(1)
    options = {
        "ids": table.ids,
        "anchors": anchors_of(labels),
        "iterations": rng.integers(10, 60, size=len(table)),
        "potential": potential,
        "spatial_mask": (rng.random(labels.shape) < 0.97).astype(np.uint8) if masked else None,
    }
    expected = cpu.diffusion_flow(labels, **options)
    assert_same_flow(device, gpu.diffusion_flow(labels, **options), expected)


@pytest.mark.parametrize(
    ("name", "made_with", "n_iter"),
    [
        ("ellipsoids", "diffusion_n200", 200),
        ("tubes", "diffusion_n400", 400),
        ("tutorial", "diffusion_n200", 200),
    ],
)
def test_diffusion_meets_the_reference_cases(device, name, made_with, n_iter):
    data = case(name)
    labels = data["instances"]
    table = reference.instance_facts(labels)
    flow = gpu.diffusion_flow(
        labels,
        ids=table.ids,
        anchors=anchors_of(labels),
        iterations=iteration_counts(labels, n_iter),
    )
    assert_allclose(flow, data[made_with], rtol=0, atol=FLOW_TOLERANCE)


def test_heat_of_thousands_of_iterations(device):
    """Far more than the range of float64; thick and thin parts, and pieces, of one instance."""
    labels = np.zeros((20, 20, 40), dtype=np.uint8)
    labels[2:10, 2:10, 2:10] = 1
    labels[5, 5, 10:38] = 1  # a thread that the block feeds
    labels[15, 15, 3:8] = 1  # a piece of its own, where 0.29 of the heat stays each time
    labels[15, 17:19, 3:8] = 2
    table = reference.instance_facts(labels)
    iterations = np.array([2000, 1500])
    options = {"ids": table.ids, "iterations": iterations, "potential": "heat"}
    flow = gpu.diffusion_flow(labels, anchors=anchors_of(labels), **options)
    gradient, size = reference.diffusion_gradient(labels, **options)
    clear = np.linalg.norm(gradient, axis=0) > 1e-9 * size.max(axis=0)
    assert clear[5, 5, 10:38].all()
    expected = reference.diffusion_flow(labels, **options)
    assert_allclose(flow[:, clear], expected[:, clear], rtol=0, atol=FLOW_TOLERANCE)
    assert_array_equal(flow[2, 15, 15, 3:8], [1, 1, 0, -1, -1])


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_rounds_are_the_whole_to_the_bit(device, potential):
    labels = tissue((9, 10, 30), 8)
    table = reference.instance_facts(labels)
    facts = {"ids": table.ids, "iterations": np.arange(len(table)) * 5 % 23}
    facts |= {"anchors": anchors_of(labels), "potential": potential}
    whole = gpu.diffusion_flow(labels, **facts)
    flow = np.zeros_like(whole)
    fields: list[np.ndarray] | None = None
    for first in range(0, 24, 8):
        made = []
        for low, high in ((0, 14), (14, 30)):  # two blocks with a halo of 9
            a, b = max(0, low - 9), min(30, high + 9)
            core = (slice(None), slice(None), slice(low - a, high - a))
            around = None if fields is None else [f[:, :, a:b] for f in fields]
            span = gpu.Span(first, first + 8)
            place = {"origin": (0, 0, a), "core": core}
            values, part = gpu.diffusion_round(
                np.ascontiguousarray(labels[:, :, a:b]), around, span=span, **facts, **place
            )
            assert tuple(v.dtype for v in values) == gpu.field_types(potential)
            flow[:, :, :, low:high] += part
            made.append(values)
        fields = [np.concatenate(pair, axis=2) for pair in zip(*made, strict=True)]
    assert_array_equal(flow, whole)


@some_examples
@given(label_volumes(), origins, st.integers(0, 2**32 - 1))
def test_direct_flow_and_errors(device, labels, origin, seed):
    table = reference.instance_facts(labels, origin=origin)
    facts = {"ids": table.ids, "centres": table.centres, "origin": origin}
    spaced = {**facts, "spacing": (2.0, 1.0, 0.5)}
    expected = cpu.direct_flow(labels, **spaced)
    assert_same_flow(device, gpu.direct_flow(labels, **spaced), expected)
    rng = np.random.default_rng(seed)
    given_flow = rng.normal(size=(*labels.shape, 4)).astype(np.float32)
    given_flow[rng.random(labels.shape) < 0.1] = 1e7  # sums end somewhere
    one, other = (kernels.flow_errors(labels, given_flow, **facts) for kernels in (gpu, cpu))
    assert_array_equal(one.ids, other.ids)
    assert_array_equal(one.sums, other.sums)


@some_examples
@given(poisson_cases())
def test_poisson_potential_is_within_the_tolerance_in_every_voxel(device, case):
    """Walls, closed faces, pieces without a border, what is beyond the faces, a guess."""
    labels = case.pop("labels")
    potential = gpu.poisson_potential(labels, **case)
    case.pop("start", None)
    expected = reference.poisson_potential(labels, **case)
    assert potential.dtype == np.float64
    assert_allclose(potential, expected, rtol=2 * SOLVED, atol=0)
    core = tuple(slice(n // 3, None) for n in labels.shape)
    flow = gpu.flow_of_potential(labels, expected, core=core, **case)
    assert_same_flow(device, flow, cpu.flow_of_potential(labels, expected, core=core, **case))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (40.0, 32.0, 32.0), (4.0, 1.0, 1.0)])
def test_poisson_flow_of_touching_instances(device, spacing):
    labels = random_blobs(np.random.default_rng(0), (24, 30, 27))
    flow = gpu.poisson_flow(labels, spacing=spacing)
    assert_allclose(flow, cpu.poisson_flow(labels, spacing=spacing), rtol=0, atol=FLOW_TOLERANCE)


def test_poisson_gives_the_same_bits_again(device):
    labels = random_blobs(np.random.default_rng(1), (20, 30, 27))
    assert_array_equal(gpu.poisson_potential(labels), gpu.poisson_potential(labels))


def test_poisson_of_nothing_is_nothing(device):
    assert not gpu.poisson_potential(np.zeros((2, 3, 4), np.uint8)).any()
    assert not gpu.poisson_flow(np.ones((2, 3, 4), np.uint8)).any()  # no border, no solution


def test_what_is_not_solved_in_time_is_an_error(device, monkeypatch):
    monkeypatch.setattr(poisson, "MOST_ITERATIONS", 2)
    with pytest.raises(TopoError, match="not reached in 2 iterations"):
        gpu.poisson_potential(random_blobs(np.random.default_rng(1), (20, 30, 27)))


def test_a_table_of_other_labels_is_refused(device):
    with pytest.raises(InvalidArgument, match="a table without id 7"):
        gpu.diffusion_flow(
            np.array([[[5, 7]]]),
            ids=np.array([5], np.uint64),
            iterations=np.array([3]),
            anchors=np.zeros((1, 3), np.int64),
        )


def test_too_little_device_memory_is_our_error(monkeypatch):
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
    monkeypatch.setenv(MEMORY, "100000")
    labels = tissue((20, 20, 20), 4)
    table = reference.instance_facts(labels)
    facts: dict[str, Any] = {"ids": table.ids, "anchors": anchors_of(labels)}
    with pytest.raises(DeviceMemoryError, match="bytes more"):
        gpu.diffusion_flow(labels, iterations=np.full(len(table), 3), **facts)
