"""Tracking: flows between voxels, flows in other numbers, halos that are chosen; one answer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.cli import main
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.halo import (
    choose_halo,
    expected_reads,
    halos_for,
    handed_over,
    tried_blocks,
    voxels_read,
)
from topo_dask.grid import BlockGrid
from topo_dask.kernels import reference
from topo_dask.storage import create_array
from topo_dask.testing import synthetic_tissue

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
STORED = [("float16", None), ("float32", None), ("float32", 5.0), ("float64", 0.5)]
STORED += [("int8", 127.0), ("int16", 30_000.0), ("int8", 20.0)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A mask, a flow as it is stored, and how it is tracked."""
    shape = tuple(draw(st.tuples(*[st.integers(1, 12)] * 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, scale = draw(st.sampled_from(STORED))
    flow = rng.normal(size=(3, *shape))
    if draw(st.booleans()):  # towards the middle, so that particles meet
        away = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
        flow = 0.3 * flow - away
    flow /= np.maximum(np.linalg.norm(flow, axis=0), 1)
    stored = flow * (scale or 1)
    if np.dtype(dtype).kind == "i":
        stored = np.rint(stored)
    return {
        "mask": rng.random(shape) < draw(st.sampled_from([0.3, 1.0])),
        "flow": stored.astype(dtype),
        "scale": scale,
        "interpolation": draw(st.sampled_from(["linear", "nearest"])),
        "n_steps": draw(st.sampled_from([0, 1, 5, 12])),
        "step_size": draw(st.sampled_from([0.4, 1.0])),
        "convergence_radius": draw(st.sampled_from([1.5, 4.0])),
        "min_size": draw(st.integers(0, 9)),
    }


def oracle(case: dict[str, Any]) -> np.ndarray:
    names = ("n_steps", "step_size", "convergence_radius", "min_size", "interpolation")
    flow = case["flow"].astype(np.float32)
    if case["scale"] is not None:
        flow = flow / np.float32(case["scale"])
    return reference.segment_group1(case["mask"], flow, **{name: case[name] for name in names})


@pytest.mark.nightly
@given(cases(), st.data())
def test_labels_in_blocks_are_those_of_the_whole(case: dict[str, Any], data: st.DataObject) -> None:
    expected = oracle(case)
    mask, flow, shape = case["mask"], case["flow"], case["mask"].shape
    options = {name: value for name, value in case.items() if name not in ("mask", "flow")}
    assert_array_equal(topo_dask.postprocess_single(mask, flow, **options), expected)
    if data.draw(st.booleans()):
        return
    blocks = tuple(data.draw(st.integers(1, n)) for n in shape)
    assume(np.prod(-(-np.array(shape) // blocks)) <= 6)
    lazy = topo_dask.postprocess_single(
        da.from_array(mask, chunks=blocks), da.from_array(flow, chunks=(3, *blocks)), **options
    )
    assert_array_equal(lazy.compute(scheduler="sync"), expected)
    if data.draw(st.integers(0, 4)):
        return  # the rest takes longer
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        made = topo_dask.segment(
            flow,
            Path(folder, "labels.zarr"),
            foreground=mask,
            blocks=blocks,
            halo=data.draw(st.sampled_from([0, 1, 4, "auto"])),
            cluster="sync",
            **options,
        )
        assert_array_equal(made.array[...], expected)


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_flow_of_networks_that_predict_five_times_it(interpolation: str) -> None:
    labels = synthetic_tissue((20, 30, 30), n_instances=12, seed=1)
    flow = topo_dask.generate_diffusion_flows(labels, n_iter=30)
    options = {"n_steps": 40, "interpolation": interpolation}
    _, ends = topo_dask.track_flows(labels, flow, **options)
    _, five = topo_dask.track_flows(labels, flow * np.float32(5), scale=5, **options)
    assert_allclose(five, ends, atol=1e-3)
    _, whole = topo_dask.track_flows(labels, np.rint(flow * 127).astype(np.int8), 1, scale=127)
    _, once = topo_dask.track_flows(labels, flow, 1)
    assert_allclose(whole, once, atol=0.5 / 127 + 1e-6)


def test_between_voxels_a_linear_field_is_itself() -> None:
    """Towards a point, slower the nearer: every particle is at (1 - 1/8)^n of its way."""
    shape, centre = (9, 10, 11), np.array([3.2, 4.7, 6.1])
    away = np.indices(shape) - centre[:, None, None, None]
    flow = (-away / 8).astype(np.float32)
    start, ends = topo_dask.track_flows(np.ones(shape), flow, 20, interpolation="linear")
    assert_allclose(ends - centre, (start - centre) * (7 / 8) ** 20, atol=1e-5)
    _, steps = topo_dask.track_flows(np.ones(shape), flow, 20)
    assert np.abs(steps - centre - (start - centre) * (7 / 8) ** 20).max() > 0.2


@pytest.mark.parametrize(
    ("error", "argument", "flow", "options"),
    [
        (InvalidType, "flow", "int8", {}),
        (InvalidArgument, "scale", "float32", {"scale": 0}),
        (InvalidArgument, "scale", "float32", {"scale": np.nan}),
        (InvalidType, "scale", "float32", {"scale": "much"}),
        (InvalidType, "flow", "uint8", {"scale": 127}),
        (InvalidArgument, "interpolation", "float32", {"interpolation": "cubic"}),
    ],
)
def test_bad_options(
    error: type[Exception], argument: str, flow: str, options: dict[str, Any], tmp_path: Path
) -> None:
    mask, field = np.ones((3, 4, 5), bool), np.zeros((3, 3, 4, 5), flow)
    for call in (
        lambda: topo_dask.track_flows(mask, field, 3, **options),
        lambda: topo_dask.postprocess_single(mask, field, **options),
        lambda: topo_dask.segment(field, tmp_path / "a.zarr", cluster="sync", **options),
    ):
        with pytest.raises(error, match=f"^{argument}s?: got"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_command_takes_them(tmp_path: Path) -> None:
    labels = synthetic_tissue((16, 20, 20), n_instances=8, seed=2)
    flow = np.rint(topo_dask.generate_diffusion_flows(labels, n_iter=20) * 127).astype(np.int8)
    create_array(tmp_path / "flow.zarr", flow.shape, (3, 8, 8, 8), "int8")[...] = flow
    words = ["segment", str(tmp_path / "flow.zarr"), str(tmp_path / "out.zarr"), "--scale", "127"]
    words += ["--interpolation", "linear", "--blocks", "8", "--cluster", "sync", "--no-progress"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "reads of" in done.output
    expected = topo_dask.postprocess_single(
        (flow != 0).any(axis=0), flow, scale=127, interpolation="linear"
    )
    made = topo_dask.segment(
        flow, tmp_path / "b.zarr", scale=127, interpolation="linear", blocks=8, cluster="threads"
    )
    assert_array_equal(made.array[...], expected)


# --------------------------------------------------------------------------------------- halos


def test_wide_halos_where_particles_go_far_and_none_where_they_stay() -> None:
    grid, chunks = BlockGrid((512, 512, 512), (128, 128, 128)), (64, 64, 64)
    halos = halos_for(100, grid.largest)
    stay = [(2_000_000, 20_000, [0] * len(halos))]
    assert choose_halo(grid, chunks, 100, stay).halo == 0
    through = [(2_000_000, 20_000, [20_000] * len(halos))]
    assert choose_halo(grid, chunks, 100, through).halo == 64
    near = [(2_000_000, 20_000, [9000, 900, 80, 0, 0, 0, 0])]
    assert choose_halo(grid, chunks, 100, near).halo == 16
    assert choose_halo(BlockGrid((9, 9, 9), (9, 9, 9)), (9, 9, 9), 100, []).halo == 0
    assert "no particle" in choose_halo(grid, chunks, 100, [(0, 0, [0] * 7)]).reason


def test_what_rests_on_faces_is_not_handed_over_at_every_step() -> None:
    grid, chunks = BlockGrid((512, 512, 512), (64, 64, 64)), (64, 64, 64)
    resting = [(260_000, 20_000, [2000, 200, 20, 2, 0])]
    assert choose_halo(grid, chunks, 100, resting).halo > 0


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), st.integers(0, 40))
def test_whole_chunks_are_read(n: int, block: int, chunk: int, halo: int) -> None:
    grid = BlockGrid((n,), (min(block, n),))
    read = 0
    for region in grid:
        wide = region.grow(halo, within=(n,))
        touched = np.unique(np.arange(wide.start[0], wide.stop[0]) // chunk)
        read += int(np.isin(np.arange(n) // chunk, touched).sum())
    assert voxels_read(grid, (chunk,), halo) == pytest.approx(read / n)


def test_more_particles_that_leave_make_more_reads() -> None:
    halos = [0, 4, 8]
    shares = ([0.0, 0, 0], [1e-7, 1e-8, 0], [1e-4, 1e-6, 0], [0.3, 0.1, 1e-7], [0.9, 0.5, 0.1])
    away = [handed_over(some, halos, 4, 100.0) for some in shares]
    reads = [expected_reads(10**6, some) for some in away]
    assert reads == sorted(reads)
    assert reads[0] == 1
    assert reads[-1] == 21
    assert all(0 <= n < 125 for n in tried_blocks(BlockGrid((5, 5, 5), (1, 1, 1))))
