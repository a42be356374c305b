"""Diffusion by sums of Chebyshev polynomials: what plain iteration gives, in fewer sweeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dask.array as da
import hypothesis
import numpy as np
import pytest
from cases import spatial_masks
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument
from topo_dask.graph.acceleration import shares_of
from topo_dask.graph.context import iterations_of
from topo_dask.graph.context_or_rounds import choose_context
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu, reference
from topo_dask.kernels.cpu.chebyshev import walk_ends
from topo_dask.testing import label_volumes

TOLERANCE = 1e-4
FAST = FlowSettings(acceleration="chebyshev")


def beside_a_large_one() -> np.ndarray:
    """Many small instances, of sizes of their own, beside a large one with a thin arm."""
    labels = np.zeros((20, 24, 80), dtype=np.uint32)
    labels[8:, 4:20, :40] = 1
    labels[12:15, 10:12, 40:78] = 1
    for number in range(12):
        x, side = 6 * number, 1 + number % 5
        labels[1 : 2 + side, 2 : 3 + side, x : x + side] = number + 2
    return labels


LABELS = beside_a_large_one()
TABLE = topo_dask.instance_table(LABELS)


def iterated(labels: np.ndarray, n_iter: int, origin: int = 0, **options: Any) -> np.ndarray:
    """The flow of plain iteration in float64, and nothing else."""
    table = topo_dask.instance_table(labels).moved((origin,) * 3)
    named = ("adaptive_iters", "adaptive_factor")
    settings = FlowSettings(n_iter=n_iter, **{k: options.pop(k) for k in named if k in options})
    volume = Region((origin,) * 3, tuple(origin + n for n in labels.shape))
    return reference.diffusion_flow(
        labels,
        ids=table.ids,
        iterations=iterations_of(table, settings, volume=volume),
        origin=(origin,) * 3,
        **options,
    )


def fast(labels: Any, n_iter: int, origin: int = 0, **options: Any) -> Any:
    return topo_dask.generate_diffusion_flows(
        labels, n_iter, origin=(origin,) * 3, acceleration="chebyshev", **options
    )


def are_fast(n_iter: int, origin: int = 0, **options: Any) -> np.ndarray:
    """Which instances of `LABELS` are accelerated."""
    settings = FlowSettings(n_iter=n_iter, acceleration="chebyshev", **options)
    table = TABLE.moved((origin,) * 3)
    volume = Region((origin,) * 3, tuple(origin + n for n in LABELS.shape))
    return shares_of(table, iterations_of(table, settings, volume=volume), settings).fast


# ------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("steps", [2, 14, 60, 1000])
def test_coefficients_are_those_of_a_random_walk_and_end_where_little_is_left(steps: int) -> None:
    ends = walk_ends(steps, 40)
    exact = [math.comb(steps, (steps - k) // 2) / 2**steps for k in range(0, steps + 1, 2)]
    exact[1:] = [2 * value for value in exact[1:]]
    assert list(ends) == exact[: len(ends)]
    assert sum(exact[len(ends) :]) <= 2.0**-40
    if len(ends) < len(exact):
        assert sum(exact[len(ends) - 1 :]) > 2.0**-40


@hypothesis.settings(max_examples=max(20, hypothesis.settings.default.max_examples // 8))
@given(data=st.data())
def test_kernel_is_the_reference(data: st.DataObject) -> None:
    """Whatever the powers and the degrees: also where the sum leaves out what matters."""
    labels = data.draw(label_volumes(max_side=8))
    ids = np.unique(labels[labels > 0]).astype(np.uint64)
    counts = st.lists(st.integers(0, 20), min_size=len(ids), max_size=len(ids))
    powers = 2 * np.array(data.draw(counts), dtype=np.int64)
    how: dict[str, Any] = {
        "ids": ids,
        "powers": powers,
        "iterations": powers + np.array(data.draw(counts), dtype=np.int64),
        "tail_bits": 1 + 3 * np.array(data.draw(counts), dtype=np.int64),
        "origin": data.draw(st.tuples(*[st.integers(0, 30)] * 3)),
        "spatial_mask": data.draw(spatial_masks(labels.shape)),
        "spacing": data.draw(st.sampled_from([(1.0, 1.0, 1.0), (4.0, 1.0, 1.5)])),
    }
    found = cpu.chebyshev_flow(labels, **how)
    assert_allclose(found, reference.chebyshev_flow(labels, **how), rtol=0, atol=2e-5)


def test_threads_and_context_change_no_bit() -> None:
    labels = np.random.default_rng(3).integers(0, 3, (50, 9, 21)).astype(np.uint8)
    labels[:, :, 3:18] = np.where(labels[:, :, 3:18] > 0, 1, 0)
    ids = np.unique(labels[labels > 0]).astype(np.uint64)
    how: dict[str, Any] = {"ids": ids, "iterations": np.array([70, 45])}
    how |= {"powers": np.array([60, 38]), "tail_bits": np.array([9, 12])}
    whole = cpu.chebyshev_flow(labels, threads=1, **how)
    for threads in (2, 3):
        assert_array_equal(cpu.chebyshev_flow(labels, threads=threads, **how), whole)
    # Degree and rest of the first are 20 + 10, the second is in the core and has more.
    part = cpu.chebyshev_flow(
        labels[10:], origin=(10, 0, 0), core=np.s_[31:35, :, 2:9], threads=2, **how
    )
    assert_array_equal(part, whole[:, 41:45, :, 2:9])


# ---------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("n_iter", "options"),
    [
        (2000, {"adaptive_iters": False}),
        (800, {"adaptive_factor": 10}),
        (600, {"adaptive_iters": False, "spacing": (3.0, 1.0, 1.0)}),
        (600, {"adaptive_iters": False, "origin": 10_000}),
    ],
    ids=str,
)
def test_flows_are_within_the_tolerance_of_plain_iteration(
    n_iter: int, options: dict[str, Any]
) -> None:
    found = fast(LABELS, n_iter, **options)
    # Far inside: the tolerance holds for every voxel of anything, and this is one case.
    assert_allclose(found, iterated(LABELS, n_iter, **options), rtol=0, atol=TOLERANCE / 10)


def test_small_instances_beside_a_large_one_keep_their_bits() -> None:
    chosen = are_fast(800, adaptive_factor=10)
    assert chosen[0]
    assert not chosen[1:].any()
    found = fast(LABELS, 800, adaptive_factor=10)
    plain = topo_dask.generate_diffusion_flows(LABELS, 800, adaptive_factor=10)
    small = LABELS > 1
    assert_array_equal(found[:, small], plain[:, small])
    assert (found != plain)[:, LABELS == 1].any()


def test_what_exact_arithmetic_cannot_hold_is_iterated() -> None:
    """At 10^7 an error of 1e-16 of a coordinate is not small beside a gradient of 1e-8."""
    assert not are_fast(2000, 10**7, adaptive_iters=False).any()
    found = fast(LABELS, 300, 10**7, adaptive_iters=False)
    plain = topo_dask.generate_diffusion_flows(LABELS, 300, False, origin=(10**7,) * 3)
    assert_array_equal(found, plain)


@hypothesis.settings(max_examples=max(8, hypothesis.settings.default.max_examples // 20))
@given(data=st.data())
def test_any_volume_is_within_the_tolerance(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=7))
    mask = data.draw(spatial_masks(labels.shape))
    tolerance, n_iter = data.draw(st.sampled_from([1e-5, 1e-4, 1e-2])), 1401
    origin = data.draw(st.sampled_from([0, 77, 5000]))
    table = topo_dask.instance_table(labels).moved((origin,) * 3)
    iterations = np.full(len(table), n_iter)
    settings = FlowSettings(tolerance=tolerance, acceleration="chebyshev")
    assert shares_of(table, iterations, settings).fast.all()
    how: dict[str, Any] = {"origin": (origin,) * 3, "spatial_mask": mask}
    gradient, magnitude = reference.diffusion_gradient(
        labels, ids=table.ids, iterations=iterations, **how
    )
    longest = np.maximum(np.sqrt((gradient**2).sum(axis=0)), 1e-8)
    # Not where a gradient is lost in the values it is taken of, as in an object without a wall.
    known = 8 * np.finfo(float).eps * magnitude.max(axis=0) <= tolerance * longest
    found = topo_dask.generate_diffusion_flows(
        labels, n_iter, False, tolerance=tolerance, acceleration="chebyshev", **how
    )
    wanted = gradient / longest
    assert_allclose(found[:, known], wanted[:, known], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------- blocks


def test_with_all_the_context_blocks_are_equal_to_the_bit(tmp_path: Path) -> None:
    n_iter = 700
    whole = fast(LABELS, n_iter, adaptive_iters=False)
    lazy = fast(da.from_array(LABELS, (11, 24, 27)), n_iter, adaptive_iters=False, context=n_iter)
    assert_array_equal(lazy.compute(scheduler="sync"), whole)
    made = topo_dask.flows(
        LABELS,
        tmp_path / "f.zarr",
        n_iter=n_iter,
        adaptive_iters=False,
        context=n_iter,
        acceleration="chebyshev",
        blocks=(20, 13, 30),
        cluster="sync",
    )
    assert_array_equal(made.array[...], whole)
    again = {"acceleration": "chebyshev", "n_iter": n_iter, "adaptive_iters": False}
    assert again.items() <= dict(made.array.attrs)["topo_dask"].items()


def test_with_automatic_context_blocks_are_within_the_tolerance(tmp_path: Path) -> None:
    labels = np.concatenate([LABELS, np.where(LABELS > 0, LABELS + 13, 0)], axis=2)
    whole = iterated(labels, 900)
    lazy = fast(da.from_array(labels, (20, 13, 40)), 900)
    assert_allclose(lazy.compute(scheduler="sync"), whole, rtol=0, atol=TOLERANCE)
    made = topo_dask.flows(
        labels,
        tmp_path / "f.zarr",
        n_iter=900,
        acceleration="chebyshev",
        blocks=(20, 24, 40),
        cluster="sync",
    )
    assert_allclose(made.array[...], whole, rtol=0, atol=TOLERANCE)
    assert "acceleration needs one" in made.details["context"]
    assert "sweeps for 900 iterations" in made.details["acceleration"]


def test_the_exact_context_is_no_wider_than_the_sweeps() -> None:
    """Beyond 4000 iterations nothing else bounds the automatic context but n."""
    settings = FlowSettings(n_iter=20_000, adaptive_iters=False, acceleration="chebyshev")
    grid = BlockGrid((512, 512, 512), (256, 256, 256))
    chosen = choose_context(settings, grid)
    assert (chosen.rounds, chosen.width) == (0, chosen.sweeps)
    assert chosen.sweeps < 1500


# ------------------------------------------------------------------------------------ choices


def test_auto_takes_what_is_cheaper(tmp_path: Path) -> None:
    """Narrow blocks in a large volume go in rounds; one block, whatever its size, never does."""
    how = FlowSettings(n_iter=2000, acceleration="auto")
    narrow = choose_context(how, BlockGrid((512, 512, 512), (64, 64, 64)))
    single = choose_context(how, BlockGrid((512, 512, 512), (512, 512, 512)))
    assert narrow.rounds > 0
    assert narrow.sweeps == 0
    assert single.rounds == 0
    assert 0 < single.sweeps < 500
    plan = topo_dask.plan(
        "flows", LABELS, n_iter=2000, acceleration="auto", sample=0, cluster="sync"
    )
    (found,) = (d for d in plan.decisions if d.name == "acceleration")
    assert "sweeps for 2000 iterations" in found.reason
    made = topo_dask.flows(
        LABELS, tmp_path / "f.zarr", n_iter=50, acceleration="auto", rounds=9, blocks=16,
        cluster="sync",
    )  # fmt: skip
    assert made.details["acceleration"] == "none: rounds are of plain iterations"
    assert_array_equal(made.array[...], topo_dask.generate_diffusion_flows(LABELS, 50))


def test_auto_leaves_other_potentials_alone() -> None:
    small = LABELS[:8, :8, :16]
    for options in ({"potential": "heat"}, {"potential": "poisson"}):
        plain = topo_dask.generate_diffusion_flows(small, 900, **options)
        found = topo_dask.generate_diffusion_flows(small, 900, acceleration="auto", **options)
        assert_array_equal(found, plain)


def test_classes_are_accelerated_where_their_method_allows() -> None:
    stack = np.stack([LABELS, LABELS])
    config = {"mito": {"flow_type": "diffusion"}, "nuc": {"flow_type": "direct"}}
    how: dict[str, Any] = {"class_config": config, "diffusion_iters": 700, "adaptive_iters": False}
    flows, _ = topo_dask.compute_flow_targets(
        stack, ["mito", "nuc"], acceleration="chebyshev", **how
    )
    assert_array_equal(flows[:3], fast(LABELS, 700, adaptive_iters=False))
    assert_array_equal(flows[3:], topo_dask.generate_direct_flows(LABELS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceleration": "fast"}, "acceleration: got 'fast'; allowed: one of: none, chebyshev"),
        ({"acceleration": "chebyshev", "potential": "heat"}, "with potential='heat'|potential="),
        ({"acceleration": "chebyshev", "method": "direct"}, "heat needs every iteration"),
        ({"acceleration": "chebyshev", "rounds": 9}, "rounds are of plain iterations"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        topo_dask.flows(LABELS, tmp_path / "f.zarr", cluster="sync", **options)
    assert list(tmp_path.iterdir()) == []
