"""The oracle against results of the original in-memory package, and against its definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topo_dask.kernels import reference
from topo_dask.kernels.tables import (
    CellTable,
    InstanceTable,
    merge_cells,
    merge_instances,
)

DATA = Path(__file__).parent / "data"
FLOW_TOLERANCE = 1e-4
POSITION_TOLERANCE = 1e-9


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def inner_mask(shape: tuple[int, ...]) -> np.ndarray:
    """1 inside, 0 on the outer faces."""
    mask = np.zeros(shape)
    mask[1:-1, 1:-1, 1:-1] = 1
    return mask


def iteration_counts(
    labels: np.ndarray, n_iter: int, *, adaptive: bool = True, factor: int = 6
) -> np.ndarray:
    """n = min(factor * E, n_iter) with E the longest side of the box grown by 2 and clipped."""
    table = reference.instance_facts(labels)
    if not adaptive:
        return np.full(len(table), n_iter)
    grown = np.minimum(table.hi + 2, labels.shape) - np.maximum(table.lo - 2, 0)
    return np.minimum(factor * grown.max(axis=1), n_iter)


def diffusion(labels: np.ndarray, n_iter: int, **how: Any) -> np.ndarray:
    ids = reference.instance_facts(labels).ids
    return reference.diffusion_flow(
        labels, ids=ids, iterations=iteration_counts(labels, n_iter, **how)
    )


def direct(labels: np.ndarray, spatial_mask: np.ndarray | None = None) -> np.ndarray:
    ids, centres = reference.direct_centres(labels, spatial_mask=spatial_mask)
    return reference.direct_flow(labels, ids=ids, centres=centres)


# ── results of the original package ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "expected", "n_iter", "adaptive"),
    [
        ("ellipsoids", "diffusion_n200", 200, True),
        ("ellipsoids", "diffusion_n60_fixed", 60, False),
        ("tubes", "diffusion_n400", 400, True),
        ("tutorial", "diffusion_n200", 200, True),
    ],
)
def test_diffusion_flow_of_the_cases(name, expected, n_iter, adaptive):
    arrays = case(name)
    flow = diffusion(arrays["instances"], n_iter, adaptive=adaptive)
    np.testing.assert_allclose(flow, arrays[expected], rtol=0, atol=FLOW_TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_direct_flow_of_the_cases(masked):
    arrays = case("ellipsoids")
    labels = arrays["instances"]
    flow = direct(labels, inner_mask(labels.shape) if masked else None)
    expected = arrays["direct_spatial_mask" if masked else "direct"]
    np.testing.assert_allclose(flow, expected, rtol=0, atol=FLOW_TOLERANCE)


def test_flows_of_each_class():
    arrays = case("multiclass")
    settings = json.loads(str(arrays["flow_config"]))
    for row, name in enumerate(arrays["class_names"].tolist()):
        labels, how = arrays["instance_ids"][row], settings[name]
        is_direct = how["flow_type"] == "direct"
        flow = direct(labels) if is_direct else diffusion(labels, how["diffusion_iters"])
        expected = arrays["flows"][3 * row : 3 * row + 3]
        np.testing.assert_allclose(flow, expected, rtol=0, atol=FLOW_TOLERANCE)


def test_final_positions_and_clusters_of_the_case():
    arrays = case("ellipsoids")
    mask = arrays["instances"] > 0
    positions = np.argwhere(mask).astype(np.float64)
    reference.track(
        reference.interleave(arrays["noisy_flow"]),
        positions,
        np.full(len(positions), arrays["track_steps"], dtype=np.int32),
        origin=(0, 0, 0),
        shape=mask.shape,
        step_size=float(arrays["track_step_size"]),
    )
    expected = arrays["final_positions"]
    np.testing.assert_allclose(positions, expected, rtol=0, atol=POSITION_TOLERANCE)

    clusters = reference.cluster_labels(
        expected, shape=mask.shape, radius=float(arrays["convergence_radius"])
    )
    labels = np.zeros(mask.shape, dtype=np.int64)
    labels[mask] = reference.drop_small(clusters, min_size=int(arrays["min_size"]))
    np.testing.assert_array_equal(labels, arrays["cluster_labels"])


@pytest.mark.parametrize(
    ("name", "flow", "steps", "step_size"),
    [
        ("ellipsoids", "noisy_flow", "track_steps", "track_step_size"),
        ("tubes", "noisy_flow", "n_steps", "step_size"),
        ("tutorial", "diffusion_n200", "n_steps", "step_size"),
    ],
)
def test_group_1_labels_of_the_cases(name, flow, steps, step_size):
    arrays = case(name)
    labels = reference.segment_group1(
        arrays["instances"] > 0,
        arrays[flow],
        n_steps=int(arrays[steps]),
        step_size=float(arrays[step_size]),
        convergence_radius=float(arrays["convergence_radius"]),
        min_size=int(arrays["min_size"]),
    )
    np.testing.assert_array_equal(labels, arrays["group1"])


def test_group_1_labels_of_each_class():
    arrays = case("multiclass")
    settings = json.loads(str(arrays["postprocess_config"]))
    for row, name in enumerate(arrays["class_names"].tolist()):
        how = settings[name]
        if how.pop("group") == 1:
            flow = arrays["flows"][3 * row : 3 * row + 3]
            labels = reference.segment_group1(arrays["instance_ids"][row] > 0, flow, **how)
            np.testing.assert_array_equal(labels, arrays[f"instances_{name}"])


# ── diffusion as defined ─────────────────────────────────────────────────────────────────────


def blobs(seed: int, shape: tuple[int, int, int] = (12, 10, 11), count: int = 6) -> np.ndarray:
    """Touching instances without background between them, and some holes."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, shape, size=(count, 3))
    distance = ((np.indices(shape)[..., None] - seeds.T[:, None, None, None]) ** 2).sum(axis=0)
    labels = distance.argmin(axis=-1) + 1
    labels[distance.min(axis=-1) > 12] = 0
    return labels.astype(np.uint64)


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_context_of_one_more_than_the_iterations_is_exact(potential):
    """The gradient looks one voxel further than the field was averaged."""
    labels, iterations, origin = blobs(1, (20, 7, 8)), 5, (40, 0, 9)
    ids = reference.instance_facts(labels).ids
    options = {"ids": ids, "iterations": np.full(len(ids), iterations), "potential": potential}
    whole = reference.diffusion_flow(labels, origin=origin, **options)
    context = iterations + 1
    a, b = 8, 12
    part = reference.diffusion_flow(
        labels[a - context : b + context],
        origin=(origin[0] + a - context, *origin[1:]),
        core=(slice(context, -context), slice(None), slice(None)),
        **options,
    )
    if potential == "heat":  # scaled by other powers of two, of the same direction
        np.testing.assert_allclose(part, whole[:, a:b], rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(part, whole[:, a:b])


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_unannotated_surroundings_are_like_the_outside_of_the_volume(potential):
    labels = blobs(2)
    ids = reference.instance_facts(labels).ids
    options = {"ids": ids, "iterations": np.full(len(ids), 30), "potential": potential}
    bare = reference.diffusion_flow(labels, origin=(5, 5, 5), **options)
    padded = reference.diffusion_flow(
        np.pad(labels, 2),
        spatial_mask=np.pad(np.ones(labels.shape), 2),
        origin=(3, 3, 3),
        core=(slice(2, -2),) * 3,
        **options,
    )
    np.testing.assert_array_equal(bare, padded)


def test_an_unannotated_voxel_of_the_same_instance_conducts():
    labels = np.zeros((3, 3, 9), dtype=np.int32)
    labels[1, 1, 1:8] = 4
    mask = np.ones(labels.shape)
    options = {"ids": np.array([4], np.uint64), "iterations": np.array([7])}
    expected = reference.diffusion_flow(labels, spatial_mask=mask, **options)
    mask[1, 1, 3:6] = 0
    np.testing.assert_array_equal(
        reference.diffusion_flow(labels, spatial_mask=mask, **options), expected
    )


def test_heat_is_what_coordinates_become_far_from_the_origin():
    labels = blobs(3)
    ids = reference.instance_facts(labels).ids
    options = {"ids": ids, "iterations": np.full(len(ids), 40)}
    heat = reference.diffusion_flow(labels, potential="heat", **options)
    far = reference.diffusion_flow(labels, origin=(10**7,) * 3, **options)
    gradient, size = reference.diffusion_gradient(labels, potential="heat", **options)
    # Along a ridge of the heat there is nothing for the far coordinates to agree with.
    slope = np.linalg.norm(gradient, axis=0) / np.maximum(size.max(axis=0), 1e-300)
    clear = (labels > 0) & (slope > 0.01)
    assert clear.sum() > 0.8 * (labels > 0).sum()
    np.testing.assert_allclose(far[:, clear], heat[:, clear], rtol=0, atol=FLOW_TOLERANCE)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_spacing_is_like_resampling(axis, potential):
    """Every other plane of a box, with twice the spacing, gets the flow of the whole box.

    The error of sampling falls by four with each refinement. A step of the coarse box is 4/3 of a
    fine one's time, so that it takes 3/4 of the iterations.
    """
    errors = []
    for n in (8, 16):
        fine = np.pad(np.ones((2 * n - 1, 2 * n + 3, 2 * n - 1), dtype=np.uint8), 1)
        spacing = np.where(np.arange(3) == axis, 2.0, 1.0)
        every = tuple(slice(None, None, 2 if a == axis else None) for a in range(3))
        ids, time = np.array([1], np.uint64), n * n
        whole = reference.diffusion_flow(
            fine, ids=ids, iterations=np.array([time]), potential=potential
        )[:, *every]
        coarse = reference.diffusion_flow(
            fine[every],
            ids=ids,
            iterations=np.array([3 * time // 4]),
            potential=potential,
            spacing=spacing,
        )
        deep = tuple(slice(m // 4, -(m // 4)) for m in fine[every].shape)
        difference = np.linalg.norm(whole.astype(np.float64) - coarse, axis=0)
        errors.append(difference[deep].mean())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] > 2.5, errors


def test_only_the_ratios_of_a_spacing_matter():
    labels = blobs(4)
    ids = reference.instance_facts(labels).ids
    options = {"ids": ids, "iterations": np.full(len(ids), 30), "origin": (5, 6, 7)}
    one = reference.diffusion_flow(labels, spacing=(2.0, 1.0, 1.5), **options)
    eight = reference.diffusion_flow(labels, spacing=(16.0, 8.0, 12.0), **options)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-6)


def test_heat_gives_unit_vectors_however_little_is_left():
    labels = np.zeros((9, 9, 9), dtype=np.int32)
    labels[4, 4, 2:7] = 1  # 0.29 of it stays each time: 1e-1078 in the end
    options = {"ids": np.array([1], np.uint64), "iterations": np.array([2000])}
    flow = reference.diffusion_flow(labels, potential="heat", **options)
    np.testing.assert_array_equal(flow[2, 4, 4, 2:7], [1, 1, 0, -1, -1])


def test_no_iterations_give_the_gradient_of_the_coordinates():
    labels = np.ones((4, 1, 5), dtype=np.uint8)
    flow = reference.diffusion_flow(labels, ids=np.array([1], np.uint64), iterations=np.array([0]))
    expected = np.broadcast_to(np.array([0.5, 0, 0.5])[:, None, None, None] ** 0.5, flow.shape)
    np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-7)


# ── direct flow as defined ───────────────────────────────────────────────────────────────────


def test_the_sink_is_the_nearest_voxel_rounded_half_to_even_in_the_whole_volume():
    labels = np.ones((1, 1, 4), dtype=np.int8)
    options = {"ids": np.array([1], np.uint64)}
    at_zero = reference.direct_flow(labels, centres=np.array([[0.0, 0.0, 1.5]]), **options)
    np.testing.assert_array_equal(at_zero[2, 0, 0], [1, 1, 0, -1])
    moved = reference.direct_flow(
        labels, centres=np.array([[0.0, 0.0, 2.5]]), origin=(0, 0, 1), **options
    )
    np.testing.assert_array_equal(moved[2, 0, 0], [1, 0, -1, -1])


def test_a_sink_outside_the_instance_changes_nothing():
    labels = np.array([[[1, 0, 1], [1, 2, 1]]])
    flow = direct(labels)
    assert (np.linalg.norm(flow, axis=0)[labels == 1] > 0.99).all()


def test_an_instance_that_leaves_the_annotation_points_to_its_deepest_voxel():
    labels = np.zeros((7, 7, 9), dtype=np.int32)
    labels[1:6, 1:6, 0:4] = 3
    ids, centres = reference.direct_centres(labels)
    np.testing.assert_array_equal(centres, [[3, 3, 1.5]])
    ids, centres = reference.direct_centres(labels, spatial_mask=inner_mask(labels.shape))
    assert ids.tolist() == [3]
    # It goes on beyond x = 0, so x = 0 and x = 1 are equally deep, and the first one counts.
    np.testing.assert_array_equal(centres, [[3, 3, 0]])


# ── tracking, cells, clusters ────────────────────────────────────────────────────────────────


def test_particles_handed_from_block_to_block_end_where_they_end_in_one():
    rng = np.random.default_rng(5)
    shape = (6, 7, 8)
    flow = reference.interleave(rng.normal(size=(3, *shape)).astype(np.float32))
    start = np.argwhere(np.ones(shape)).astype(np.float64)
    options = {"shape": shape, "step_size": 0.9}

    whole, steps = start.copy(), np.full(len(start), 25, dtype=np.int32)
    reference.track(flow, whole, steps, origin=(0, 0, 0), **options)
    assert not steps.any()

    handed, steps = start.copy(), np.full(len(start), 25, dtype=np.int32)
    while steps.any():
        reference.track(flow[:3], handed, steps, origin=(0, 0, 0), **options)
        reference.track(flow[3:], handed, steps, origin=(3, 0, 0), **options)
    np.testing.assert_array_equal(handed, whole)


def test_a_cell_beyond_the_last_is_the_last():
    numbers = reference.cell_numbers(np.array([[0, 0, 6.0]]), shape=(1, 1, 7), radius=8.0)
    assert numbers.tolist() == [1]  # 6/4 rounds to 2, but floor(7/4) is 1


def test_cells_at_exactly_the_radius_are_not_joined():
    where = np.array([[0, 0, 0], [0, 0, 4.0]])
    shape = (1, 1, 9)
    assert reference.cluster_labels(where, shape=shape, radius=4.0).tolist() == [1, 2]
    where[1, 2] -= 2.0**-20
    assert reference.cluster_labels(where, shape=shape, radius=4.0).tolist() == [1, 1]


def test_a_cluster_is_a_chain_and_numbered_by_its_first_cell():
    x = np.array([20.0, 9.0, 3.0, 6.0, 0.0])
    where = np.stack([0 * x, 0 * x, x], axis=1)
    numbers = reference.cluster_labels(where, shape=(1, 1, 30), radius=4.0)
    assert numbers.tolist() == [2, 1, 1, 1, 1]


def test_nothing_gives_nothing():
    nothing = np.zeros((0, 3))
    table, row = reference.cell_table(nothing, shape=(3, 3, 3), radius=2.0)
    assert len(table) == len(row) == 0
    assert len(reference.cluster_labels(nothing, shape=(3, 3, 3), radius=2.0)) == 0
    empty = np.zeros((2, 3, 4), dtype=np.uint16)
    assert len(reference.instance_facts(empty)) == 0
    labels = reference.segment_group1(
        empty,
        np.zeros((3, 2, 3, 4), np.float32),
        n_steps=3,
        step_size=1.0,
        convergence_radius=2.0,
        min_size=1,
    )
    assert not labels.any()


# ── tables ───────────────────────────────────────────────────────────────────────────────────


def assert_tables_equal(one: Any, two: Any) -> None:
    for name in type(one).__dataclass_fields__:
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_instance_tables_of_blocks_make_the_table_of_the_whole():
    labels = blobs(6) + np.uint64(2**63) * (blobs(6) == 2)
    parts = [
        reference.instance_facts(labels[a:b, :, c:d], origin=(a, 0, c))
        for a, b in ((0, 5), (5, 12))
        for c, d in ((7, 11), (0, 7))
    ]
    whole = reference.instance_facts(labels)
    assert_tables_equal(merge_instances(parts), whole)
    assert_tables_equal(merge_instances([*reversed(parts), merge_instances([])]), whole)
    np.testing.assert_allclose(
        whole.centres[0], np.argwhere(labels == whole.ids[0]).mean(axis=0), rtol=1e-12
    )


def test_cell_tables_of_parts_make_the_table_of_the_whole():
    positions = np.random.default_rng(7).uniform(0, 9, size=(300, 3))
    options = {"shape": (10, 10, 10), "radius": 4.0}
    whole, row = reference.cell_table(positions, **options)
    parts = [reference.cell_table(p, **options)[0] for p in np.split(positions, [100, 130])]
    assert_tables_equal(merge_cells(parts), whole)
    assert_tables_equal(merge_cells(parts[::-1]), whole)
    np.testing.assert_array_equal(whole.cells[row], reference.cell_numbers(positions, **options))


def test_tables_of_nothing():
    none = np.zeros(0, np.int64)
    assert_tables_equal(merge_cells([]), CellTable(none, none, np.zeros((0, 3), np.int64)))
    merged = merge_instances([])
    assert isinstance(merged, InstanceTable)
    assert merged.ids.dtype == np.uint64
    assert merged.centres.shape == (0, 3)


# ── fusing and comparing ─────────────────────────────────────────────────────────────────────


def test_weights_of_a_regular_grid_sum_to_one():
    length, overlap, step = 10, 4, 6
    total = np.zeros(3 * step + overlap)
    for tile in range(3):
        tapers = [(overlap if tile else 0, overlap if tile < 2 else 0)]
        total[tile * step : tile * step + length] += reference.blend_weight(
            (length,), tapers=tapers
        )
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-6)


def test_weight_is_the_product_over_the_axes():
    tapers = [(2, 3), (0, 1), (0, 0)]
    weight = reference.blend_weight((6, 4, 3), tapers=tapers)
    assert weight.dtype == np.float32
    axes = [
        reference.blend_weight((n,), tapers=[t]) for n, t in zip((6, 4, 3), tapers, strict=True)
    ]
    np.testing.assert_allclose(weight, np.einsum("i,j,k", *axes), rtol=1e-6)
    assert weight.min() > 0


def test_contingency_counts_every_voxel_once():
    truth, labels = blobs(8), blobs(9)
    labels[labels == 1] = 2**64 - 1
    one, two, counts = reference.contingency(truth, labels)
    assert counts.sum() == truth.size
    for a, b, count in zip(one, two, counts, strict=True):
        assert count == ((truth == a) & (labels == b)).sum()
    pairs = list(zip(one.tolist(), two.tolist(), strict=True))
    assert pairs == sorted(pairs)
