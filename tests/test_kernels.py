"""The compiled kernels give what the oracle gives: property tests, one for each kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from topo_dask.kernels import cpu, reference
from topo_dask.kernels.cpu import sweep
from topo_dask.kernels.cpu.stepping import place_of, track_nearest
from topo_dask.kernels.tables import merge_instances

FLOW_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-7
FARTHEST = 10**7

# The same in their lower 32 bits, neighbours that float64 cannot tell apart, and the largest.
IDS = np.array([0, 1, 2, 2**32 + 1, 2**63 + 2, 2**63 + 3, 2**64 - 1], dtype=np.uint64)
SMALL_IDS = np.array([0, 1, 2, 3, 5, 100, 127])
DTYPES = ("uint8", "int8", "int32", "uint32", "int64", "uint16")

origins = st.tuples(*[st.one_of(st.integers(0, 20), st.integers(0, FARTHEST))] * 3)
threads = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)
spacings = st.sampled_from([(1.0, 1.0, 1.0)] * 3 + [(40.0, 8.0, 8.0), (1.0, 2.5, 0.7)])


@st.composite
def label_volumes(draw: st.DrawFn, longest: int = 5, coarsest: int = 3) -> np.ndarray:
    """Boxes of voxels that touch each other, several of one id; axes of length 1 included."""
    cells = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=longest))
    kinds = draw(st.integers(1, len(IDS)))
    which = np.random.default_rng(draw(seeds)).integers(0, kinds, size=cells)
    for axis in range(3):
        which = which.repeat(draw(st.integers(1, coarsest)), axis=axis)
    dtype = draw(st.sampled_from(["uint64", *DTYPES]))
    return IDS[which] if dtype == "uint64" else SMALL_IDS[which].astype(dtype)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray | None:
    """No mask, or one that is 1 in a share of the voxels."""
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.7, 0.95, 1.0]))
    if share is None:
        return None
    return (np.random.default_rng(draw(seeds)).random(shape) < share).astype(np.float32)


@st.composite
def sub_boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    z, y, x = (slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))
    return z, y, x


@st.composite
def positions_in_volumes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int], float]:
    """Positions, the volume's shape and a radius; many on the border between two cells."""
    radius = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.3, 16.0]))
    z, y, x = (draw(st.integers(1, 24)) for _ in range(3))
    long = draw(st.integers(1, FARTHEST))
    shape = draw(st.sampled_from([(z, y, x), (long, y, x), (z, long, x), (z, y, long)]))
    rng = np.random.default_rng(draw(seeds))
    # A cloud of a few cells somewhere in the volume, else no two positions would ever meet.
    corner = np.array([rng.integers(0, n) for n in shape])
    positions = corner + rng.uniform(
        0, draw(st.sampled_from([2, 8, 20])), size=(rng.integers(60), 3)
    )
    grain = max(1.0, radius / 2) * draw(st.sampled_from([0.5, 0.25]))
    on_border = rng.random(positions.shape) < 0.3
    positions[on_border] = (np.rint(positions / grain) * grain)[on_border]
    return np.clip(positions, 0, np.array(shape) - 1.0), shape, radius


def assert_tables_equal(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    for name in type(one).__dataclass_fields__:
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype, name
        assert_array_equal(a, b, err_msg=name)


# ── instances and flows ──────────────────────────────────────────────────────────────────────


@given(label_volumes(), origins, threads)
def test_instance_facts(labels, origin, number):
    expected = reference.instance_facts(labels, origin=origin)
    assert_tables_equal(cpu.instance_facts(labels, origin=origin, threads=number), expected)
    half = labels.shape[0] // 2
    parts = [
        cpu.instance_facts(labels[half:], origin=(origin[0] + half, *origin[1:])),
        cpu.instance_facts(labels[:half], origin=origin),
    ]
    assert_tables_equal(merge_instances(parts), expected)


def allowed_difference(labels: np.ndarray, origin: tuple[int, ...], options: Any) -> np.ndarray:
    """By how much a component may differ: 1e-4, and more only where the flow is ill-conditioned.

    A flow is g/max(|g|, 1e-8), g a difference of values u. An error of u by a relative e moves
    the flow by e*|u|/|g|, in any arithmetic. The compiled kernel promises float32 for what
    depends on the position relative to the instance and float64 for the rest, both with the few
    roundings that iterations leave behind.
    """
    absolute = reference.diffusion_gradient(labels, origin=origin, **options)
    # Coordinates from N to 2N: at least as large as any distance inside the block.
    inside = reference.diffusion_gradient(labels, origin=labels.shape, **options)
    norm = np.linalg.norm(absolute[0], axis=0)
    if options["potential"] == "coordinate":
        norm = np.maximum(norm, 1e-8)
    rounding = 2.0**-24 * inside[1].max(axis=0) + 2.0**-53 * absolute[1].max(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        allowed = np.fmax(FLOW_TOLERANCE, 8 * rounding / norm)
    if options["potential"] == "heat":
        # Heat that was never touched is exactly 1 (or its multiple), so its flow is exactly 0.
        untouched = (np.frexp(absolute[1])[0] == 0.5).all(axis=0)
        allowed[untouched & (norm == 0)] = FLOW_TOLERANCE
    return np.asarray(allowed)


@st.composite
def diffusion_cases(draw: st.DrawFn) -> dict[str, Any]:
    labels = draw(label_volumes())
    table = reference.instance_facts(labels)
    most = draw(st.sampled_from([0, 5, 70]))
    iterations = np.random.default_rng(draw(seeds)).integers(0, most + 1, size=len(table))
    return {
        "labels": labels,
        "origin": draw(origins),
        "core": draw(st.one_of(st.none(), sub_boxes(labels.shape))),
        "threads": draw(threads),
        "ids": table.ids,
        "iterations": iterations,
        "spatial_mask": draw(masks(labels.shape)),
        "potential": draw(st.sampled_from(["coordinate", "heat"])),
        "spacing": draw(spacings),
    }


@given(diffusion_cases())
def test_diffusion_flow(case):
    labels, origin, core = case.pop("labels"), case.pop("origin"), case.pop("core")
    number_of_threads = case.pop("threads")
    centres = reference.instance_facts(labels, origin=origin).centres
    flow = cpu.diffusion_flow(
        labels,
        anchors=np.rint(centres).astype(np.int64),
        origin=origin,
        core=core,
        threads=number_of_threads,
        **case,
    )
    expected = reference.diffusion_flow(labels, origin=origin, core=core, **case)
    assert flow.dtype == np.float32
    assert flow.shape == expected.shape
    allowed = allowed_difference(labels, origin, case)[core or ...]
    different = np.abs(flow - expected) - allowed
    assert different.max() <= 0, f"{np.abs(flow - expected).max()} > {allowed.min()}"


@given(label_volumes(), origins, st.data())
def test_direct_flow(labels, origin, data):
    table = reference.instance_facts(labels, origin=origin)
    core = data.draw(sub_boxes(labels.shape))
    part = labels[core]
    first = tuple(o + s.start for o, s in zip(origin, core, strict=True))
    options = {"ids": table.ids, "centres": table.centres, "origin": first}
    options["spacing"] = data.draw(spacings)
    flow = cpu.direct_flow(part, **options)
    expected = reference.direct_flow(part, **options)
    assert flow.dtype == np.float32
    assert_allclose(flow, expected, rtol=0, atol=1e-6)


@given(label_volumes(), st.data())
def test_direct_centres(labels, data):
    mask = data.draw(masks(labels.shape))
    ids, centres = cpu.direct_centres(labels, spatial_mask=mask)
    expected_ids, expected = reference.direct_centres(labels, spatial_mask=mask)
    assert ids.dtype == np.uint64
    assert_array_equal(ids, expected_ids)
    assert_allclose(centres, expected, rtol=0, atol=1e-9)


# ── tracking ─────────────────────────────────────────────────────────────────────────────────


@given(
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
    seeds,
    st.sampled_from(["bool", "uint8", "int64", "float32"]),
    st.sampled_from(["float64", "int64"]),
    origins,
    threads,
)
def test_foreground_voxels(shape, seed, dtype, wanted, origin, number):
    mask = (np.random.default_rng(seed).integers(-1, 2, size=shape)).astype(dtype)
    for view in (mask, mask[:, ::-1], np.asfortranarray(mask)):
        got = cpu.foreground_voxels(view, origin=origin, dtype=wanted, threads=number)
        assert got.dtype == wanted
        assert_array_equal(
            got, reference.foreground_voxels(view, origin=origin, dtype=wanted), strict=True
        )


@given(
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
    seeds,
    st.sampled_from(["float16", "float32", "float64"]),
    threads,
)
def test_interleave(shape, seed, dtype, number):
    flow = np.random.default_rng(seed).normal(size=(3, *shape)).astype(dtype)
    for view in (flow, flow[:, ::-1], np.asfortranarray(flow)):
        got = cpu.interleave(view, threads=number)
        assert got.dtype == np.float32
        assert_array_equal(got, reference.interleave(view))


@given(
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
    seeds,
    st.sampled_from([0.1, 0.7, 1.0, 3.3]),
    st.integers(0, 40),
    origins,
    threads,
    st.sampled_from(["nearest", "linear"]),
    st.data(),
)
def test_tracking_is_equal_to_the_bit(
    shape, seed, step_size, n_steps, origin, number, interpolation, data
):
    """In a block of a volume that goes on around it, or ends at some of the block's faces."""
    rng = np.random.default_rng(seed)
    flow = rng.normal(size=(3, *shape)).astype(np.float32)
    flow[:, rng.random(shape) < 0.2] = 0
    beyond = data.draw(st.tuples(*[st.integers(0, 5)] * 3))
    whole = tuple(o + n + b for o, n, b in zip(origin, shape, beyond, strict=True))
    start = np.argwhere(np.ones(shape)) + np.asarray(origin, dtype=np.float64)
    start = np.concatenate([start, start + rng.uniform(-2, 2, size=start.shape)])
    start = np.clip(start, 0, np.asarray(whole) - 1.0)
    left = rng.integers(0, n_steps + 1, size=len(start)).astype(np.int32)

    results = []
    for kernels in (reference, cpu):
        positions, steps = start.copy(), left.copy()
        options = {"threads": number} if kernels is cpu else {}
        kernels.track(
            kernels.interleave(flow),
            positions,
            steps,
            origin=origin,
            shape=whole,
            step_size=step_size,
            interpolation=interpolation,
            **options,
        )
        results.append((positions, steps))
    assert_array_equal(results[1][0], results[0][0])
    assert_array_equal(results[1][1], results[0][1])


@given(
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
    seeds,
    st.integers(0, 40),
    threads,
    st.sampled_from(["nearest", "linear"]),
)
def test_particles_of_a_mask_are_tracked_like_others(shape, seed, n_steps, number, interpolation):
    """Through the whole volume, which none leaves, and through a part of it."""
    rng = np.random.default_rng(seed)
    flow = cpu.interleave(rng.normal(size=(3, *shape)).astype(np.float32))
    mask = rng.integers(-1, 2, size=shape).astype(rng.choice(["bool", "int8", "float32"]))
    how = {"step_size": 0.9, "interpolation": interpolation}
    for origin, more in (((0, 0, 0), 0), ((2, 0, 3), 4)):
        place = {"origin": origin, "shape": tuple(n + more for n in shape)}
        wanted = cpu.foreground_voxels(mask, origin=origin)
        left = np.full(len(wanted), n_steps, dtype=np.int32)
        cpu.track(flow, wanted, left, **place, **how)
        found = cpu.track_voxels(flow, mask, start=origin, n_steps=n_steps, **place, **how)
        assert_array_equal(found[0], wanted, strict=True)
        assert_array_equal(found[1], left, strict=True)
        if more == 0:
            ends = cpu.track_volume(flow, mask, n_steps=n_steps, threads=number, **how)
            assert_array_equal(ends, wanted, strict=True)


@given(st.integers(0, 70), st.lists(st.tuples(st.integers(0, 69), st.floats(width=32)), max_size=3))
def test_all_finite(count, values):
    flow = np.full((count, 1, 1, 4), np.finfo(np.float32).max, np.float32)
    for place, value in values:
        flow[place:][:1] = value
    assert cpu.all_finite(flow) == np.isfinite(flow).all()


def tracked(kernels, flow, positions, left, **options):
    """Positions and steps left after tracking copies of them."""
    positions, left = positions.copy(), left.copy()
    kernels.track(kernels.interleave(flow), positions, left, **options)
    return positions, left


@given(st.integers(1, 4), st.integers(0, 50), st.sampled_from([1.0, 0.5]), origins, threads)
def test_what_goes_in_circles_stops_where_its_steps_end(period, n_steps, step_size, origin, number):
    """Cycles of 1 to 4 voxels, whole or cut by the faces of the flow that is known."""
    ring = np.array([(0, 0), (0, 1), (1, 1), (1, 0)][:period])
    flow = np.zeros((3, 3, 6, 6), np.float32)
    for here, there in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        flow[1:, :, here[0] :: 2, here[1] :: 2] = ((there - here) / step_size)[:, None, None, None]
    start = np.argwhere(np.ones(flow.shape[1:])) + np.asarray(origin, dtype=np.float64)
    left = np.full(len(start), n_steps, dtype=np.int32)
    options = {"shape": tuple(o + 6 for o in origin), "step_size": step_size}
    for cut in (0, 1):
        known = flow[:, :, cut : 6 - cut, cut : 6 - cut]
        options["origin"] = (origin[0], origin[1] + cut, origin[2] + cut)
        ends = tracked(cpu, known, start, left, threads=number, **options)
        for got, wanted in zip(
            ends, tracked(reference, known, start, left, **options), strict=True
        ):
            assert_array_equal(got, wanted)
        if cut == 0 and n_steps % period == 0:
            assert_array_equal(ends[0], start)


@given(seeds, st.sampled_from([1.0, 7.0, 1e3, 1e30]), st.integers(0, 30), threads)
def test_flows_of_any_length_and_particles_of_any_steps(seed, length, n_steps, number):
    """Flows over many voxels, most particles outside at once, as many lanes free as there are."""
    rng = np.random.default_rng(seed)
    flow = (length * rng.normal(size=(3, 6, 7, 8))).astype(np.float32)
    start = rng.uniform(0, 29, size=(rng.integers(0, 300), 3))
    left = np.where(rng.random(len(start)) < 0.5, n_steps, rng.integers(0, 99, len(start)))
    options = {"origin": (11, 9, 10), "shape": (30, 30, 30), "step_size": 0.9}
    ends = tracked(cpu, flow, start, left.astype(np.int32), threads=number, **options)
    expected = tracked(reference, flow, start, left.astype(np.int32), **options)
    for got, wanted in zip(ends, expected, strict=True):
        assert_array_equal(got, wanted)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_tracking_in_volumes_beyond_int32(index):
    flow = np.random.default_rng(3).normal(size=(3, 5, 6, 7)).astype(np.float32)
    start = np.argwhere(np.ones((5, 6, 7))) + 0.0
    left = np.full(len(start), 20, dtype=np.int32)
    options = {"origin": (0, 1, 0), "shape": (5, 8, 7)}
    wanted = tracked(reference, flow, start, left, step_size=1.0, **options)
    place = place_of((0, 1, 0), (5, 6, 7), (5, 8, 7), index=index)
    span, ready = np.array([0, len(start)]), cpu.interleave(flow).reshape(-1)
    track_nearest(ready, start, left, place, np.float32(1), np.zeros(0, index), span)
    assert_array_equal(start, wanted[0])
    assert_array_equal(left, wanted[1])


def test_indices_are_as_wide_as_the_flow_needs():
    wide = place_of((0, 0, 0), (1024, 1024, 512), (1024, 1024, 512))
    assert wide.strides[0].dtype == np.int64
    assert place_of((0, 0, 0), (1023, 1024, 512), (1024, 1024, 512)).strides[0].dtype == np.int32


# ── cells ────────────────────────────────────────────────────────────────────────────────────


@given(positions_in_volumes())
@example((np.zeros((0, 3)), (3, 3, 3), 2.0))
def test_cells(case):
    positions, shape, radius = case
    options = {"shape": shape, "radius": radius}
    numbers = cpu.cell_numbers(positions, **options)
    assert numbers.dtype == np.int64
    assert_array_equal(numbers, reference.cell_numbers(positions, **options))
    table, row = cpu.cell_table(positions, **options)
    expected, expected_row = reference.cell_table(positions, **options)
    assert_tables_equal(table, expected)
    assert_array_equal(row, expected_row)


@given(positions_in_volumes())
@example((np.zeros((0, 3)), (3, 3, 3), 2.0))
def test_joined_cells_are_the_clusters(case):
    positions, shape, radius = case
    table, row = cpu.cell_table(positions, shape=shape, radius=radius)
    roots, pairs = cpu.join_cells(table, shape=shape, radius=radius)
    assert len(pairs) == 0
    numbers = np.unique(roots, return_inverse=True)[1] + 1
    expected = reference.cluster_labels(positions, shape=shape, radius=radius)
    assert_array_equal(numbers[row], expected)


# ── fusing and comparing ─────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8), st.integers(0, 8)), max_size=3))
def test_blend_weight(axes):
    shape = tuple(n for n, _, _ in axes)
    tapers = tuple((min(a, n), min(b, n)) for n, a, b in axes)
    weight = cpu.blend_weight(shape, tapers=tapers)
    assert weight.dtype == np.float32
    expected = reference.blend_weight(shape, tapers=tapers)
    assert_allclose(weight, expected, rtol=0, atol=WEIGHT_TOLERANCE)


@given(label_volumes(), st.data())
def test_contingency(labels, data):
    other = np.random.default_rng(data.draw(seeds)).integers(0, len(IDS), size=labels.shape)
    dtype = data.draw(st.sampled_from(["uint64", *DTYPES]))
    truth = IDS[other] if dtype == "uint64" else SMALL_IDS[other].astype(dtype)
    got = cpu.contingency(truth, labels)
    for a, b in zip(got, reference.contingency(truth, labels), strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


# ── at sizes at which compiled code takes its other paths ────────────────────────────────────


def test_threads_that_follow_each_other_through_many_strips_change_no_bit():
    """Objects that go through all strips and planes."""
    random = np.random.default_rng(0)
    labels = np.repeat(random.integers(0, 3, (64, 64, 34), dtype=np.uint8), 50, axis=2)
    ids, iterations = np.array([1, 2], np.uint64), np.array([37, 52])
    anchors = np.zeros((2, 3), np.int64)
    one, three, four = (
        cpu.diffusion_flow(labels, ids=ids, iterations=iterations, anchors=anchors, threads=n)
        for n in (1, 3, 4)
    )
    assert np.array_equal(one.view(np.uint32), three.view(np.uint32))
    assert np.array_equal(one.view(np.uint32), four.view(np.uint32))


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
@pytest.mark.parametrize("least_memory", [0, sweep.LEAST_MEMORY])
def test_many_strips_and_threads_and_little_memory_change_no_bit(
    monkeypatch, potential, least_memory
):
    """Many objects, apart, in a volume of many strips: each as if it were alone, in one strip."""
    random = np.random.default_rng(0)
    ids, iterations = np.array([1, 2], np.uint64), np.array([37, 92])
    labels = np.zeros((64, 80, 1020), dtype=np.uint16)
    expected = np.zeros((3, *labels.shape), dtype=np.float32)
    places = [(8 * z, 10 * y, 0) for z, y in np.ndindex(8, 8)]
    for number, (z, y, _) in enumerate(places):
        inner = random.integers(0, 3, (6, 8, 51), dtype=np.uint16).repeat(20, axis=2)
        here = np.pad(inner, ((1, 1), (1, 1), (0, 0)))
        at = slice(z, z + 8), slice(y, y + 10)
        labels[at] = np.where(here > 0, here + np.uint16(2 * number), 0)
        expected[(slice(None), *at)] = cpu.diffusion_flow(
            here,
            ids=ids,
            iterations=iterations,
            anchors=np.array([places[number]] * 2),
            potential=potential,
            origin=places[number],
        )
    options = {
        "ids": np.arange(1, 129, dtype=np.uint64),
        "iterations": np.tile(iterations, 64),
        "anchors": np.repeat(places, 2, axis=0),
        "potential": potential,
    }
    monkeypatch.setattr(sweep, "LEAST_MEMORY", least_memory)
    for threads in (1, 2, 4):
        flow = cpu.diffusion_flow(labels, threads=threads, **options)
        same = np.array_equal(flow.view(np.uint32), expected.view(np.uint32))
        assert same, f"{threads} threads"


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_planes_that_are_worked_on_together_change_no_bit(potential):
    """More background below: other planes come together, or fewer than all that may."""
    random = np.random.default_rng(0)
    labels = np.zeros((11, 9, 34), dtype=np.uint8)
    labels[1:-1] = random.integers(0, 4, (9, 9, 34))
    labels[4, 2:5] = 0  # rows of nothing between others
    labels[7, :, 20:] = 0
    options = {
        "ids": np.array([1, 2, 3], np.uint64),
        "iterations": np.array([11, 19, 16]),
        "anchors": np.array([[4, 4, 9], [3, 0, 20], [8, 5, 1]]),
        "potential": potential,
    }
    whole = cpu.diffusion_flow(labels, **options)
    for more in (1, 2, 3):
        below = np.zeros((more, 9, 34), dtype=np.uint8)
        moved = cpu.diffusion_flow(np.concatenate((below, labels)), origin=(-more, 0, 0), **options)
        assert_array_equal(moved[:, more:].view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize(
    ("potential", "origin"),
    [("coordinate", (0, 0, 0)), ("coordinate", (40_000, 3, 10**6)), ("heat", (0, 0, 0))],
)
def test_diffusion_of_many_iterations_on_several_threads(potential, origin):
    """Slabs, blocks of iterations, long rows: none of it in the small volumes above."""
    rng = np.random.default_rng(0)
    shape = (50, 51, 37)
    grid = np.indices(shape)
    points = rng.uniform(0, shape, size=(60, 3))
    distance = ((grid[..., None] - points.T[:, None, None, None]) ** 2).sum(axis=0)
    labels = IDS[1] + distance.argmin(axis=-1).astype(np.uint64) * np.uint64(2**40 + 1)
    labels[distance.min(axis=-1) > 80] = 0
    table = reference.instance_facts(labels, origin=origin)
    options = {
        "ids": table.ids,
        "iterations": rng.integers(20, 200, size=len(table)),
        "potential": potential,
        "spatial_mask": (rng.random(shape) < 0.97).astype(np.uint8),
    }
    anchors = np.rint(table.centres).astype(np.int64)
    one, three = (
        cpu.diffusion_flow(labels, anchors=anchors, origin=origin, threads=n, **options)
        for n in (1, 3)
    )
    assert_array_equal(one, three)
    expected = reference.diffusion_flow(labels, origin=origin, **options)
    allowed = allowed_difference(labels, origin, options)
    assert (np.abs(one - expected) <= allowed).all()
    assert (allowed == FLOW_TOLERANCE).mean() > 0.98


def test_instances_of_fewer_iterations_are_like_alone():
    """They begin later in the same sweeps, at any place of a pass, beside others in their rows."""
    labels = np.zeros((9, 40, 50), dtype=np.uint16)
    for i, (y, x) in enumerate(np.ndindex(8, 10)):
        labels[1:8, 5 * y : 5 * y + 5, 5 * x : 5 * x + 5] = i + 1
    table = reference.instance_facts(labels)
    iterations = np.arange(len(table)) % 37
    options = {"ids": table.ids, "anchors": table.lo, "threads": 2}
    together = cpu.diffusion_flow(labels, iterations=iterations, **options)
    for i in (0, 1, 8, 9, 36, 37, 79):
        only = np.where(labels == i + 1, labels, 0)
        alone = cpu.diffusion_flow(only, iterations=iterations, **options)
        assert_array_equal(together[:, labels == i + 1], alone[:, labels == i + 1])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0)])
def test_heat_of_thousands_of_iterations(spacing):
    """Far more than the range of float64; thick and thin parts, and pieces, of one instance."""
    labels = np.zeros((20, 20, 40), dtype=np.uint8)
    labels[2:10, 2:10, 2:10] = 1
    labels[5, 5, 10:38] = 1  # a thread that the block feeds
    labels[15, 15, 3:8] = 1  # a piece of its own, where 0.29 of the heat stays each time
    labels[15, 17:19, 3:8] = 2
    table = reference.instance_facts(labels)
    options = {
        "ids": table.ids,
        "iterations": np.array([3001, 2500]),
        "potential": "heat",
        "spacing": spacing,
    }
    flow = cpu.diffusion_flow(labels, anchors=table.lo, **options)
    expected = reference.diffusion_flow(labels, **options)
    # On planes of symmetry the gradient is 0 but for rounding, in any arithmetic.
    gradient, size = reference.diffusion_gradient(labels, **options)
    clear = np.linalg.norm(gradient, axis=0) > 1e-9 * size.max(axis=0)
    assert clear[5, 5, 10:38].all()
    assert clear.sum() > 0.7 * (labels > 0).sum()
    assert_allclose(flow[:, clear], expected[:, clear], rtol=0, atol=1e-4)
    assert_array_equal(flow[2, 15, 15, 3:8], [1, 1, 0, -1, -1])


@pytest.mark.parametrize("far", [0, 10**4, 10**7])
def test_coordinate_flows_anywhere_are_those_of_float64(far):
    grid = np.indices((40, 40, 40))
    points = np.random.default_rng(4).uniform(0, 40, size=(12, 3))
    labels = ((grid[..., None] - points.T[:, None, None, None]) ** 2).sum(axis=0).argmin(
        axis=-1
    ) + 1
    origin = (far,) * 3
    table = reference.instance_facts(labels, origin=origin)
    options = {"ids": table.ids, "iterations": np.full(len(table), 200), "origin": origin}
    flow = cpu.diffusion_flow(labels, anchors=(table.lo + table.hi) // 2, **options)
    expected = reference.diffusion_flow(labels, **options)
    assert_allclose(flow, expected, rtol=0, atol=FLOW_TOLERANCE)
