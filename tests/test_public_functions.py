"""The public functions on arrays: the reference cases, laziness, names, and tiles of the tutorial.

NumPy in gives NumPy out; a dask array gives a lazy dask array, of any chunks.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask.delayed import Delayed

import topo_dask
from topo_dask.kernels.tables import InstanceTable
from topo_dask.testing import ellipsoids

DATA = Path(__file__).parent / "data"
FLOW_TOLERANCE = 1e-4
POSITION_TOLERANCE = 1e-9

CHUNKINGS = {
    "numpy": None,
    "one chunk": -1,
    "even chunks": 24,
    "uneven chunks": ((17, 1, -1), (30, -1), (20, 9, -1)),
}
KINDS = pytest.mark.parametrize("kind", CHUNKINGS)


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def wrap(array: np.ndarray, kind: str) -> Any:
    """The array itself, or as dask in chunks; axes before the last three stay whole."""
    chunks = CHUNKINGS[kind]
    if chunks is None:
        return array
    before = (-1,) * (array.ndim - 3)
    if isinstance(chunks, int):
        return da.from_array(array, chunks=(*before, *(chunks,) * 3))
    lengths = [
        (*axis[:-1], n - sum(axis[:-1])) for axis, n in zip(chunks, array.shape[-3:], strict=True)
    ]
    return da.from_array(array, chunks=(*((n,) for n in array.shape[:-3]), *lengths))


def unwrap(result: Any, kind: str) -> np.ndarray:
    """The values; the result must be of the kind that went in."""
    assert type(result) is (np.ndarray if kind == "numpy" else da.Array)
    return np.asarray(result)


# ------------------------------------------------------------------------ the reference cases


@KINDS
@pytest.mark.parametrize(
    ("name", "expected", "options"),
    [
        ("ellipsoids", "diffusion_n200", {}),
        ("ellipsoids", "diffusion_n60_fixed", {"n_iter": 60, "adaptive_iters": False}),
        ("tubes", "diffusion_n400", {"n_iter": 400}),
        ("tutorial", "diffusion_n200", {"n_iter": 200}),
    ],
)
def test_diffusion_flows(name: str, expected: str, options: dict[str, Any], kind: str) -> None:
    arrays = case(name)
    flow = topo_dask.generate_diffusion_flows(wrap(arrays["instances"], kind), **options)
    assert flow.dtype == np.float32
    if kind == "uneven chunks":
        assert flow.chunks == ((3,), *wrap(arrays["instances"], kind).chunks)
    np.testing.assert_allclose(unwrap(flow, kind), arrays[expected], rtol=0, atol=FLOW_TOLERANCE)


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_direct_flows(masked: bool, kind: str) -> None:
    arrays = case("ellipsoids")
    labels = arrays["instances"]
    mask = wrap(topo_dask.build_spatial_mask(labels.shape), kind) if masked else None
    flow = topo_dask.generate_direct_flows(wrap(labels, kind), mask)
    assert flow.dtype == np.float32
    expected = arrays["direct_spatial_mask" if masked else "direct"]
    np.testing.assert_allclose(unwrap(flow, kind), expected, rtol=0, atol=FLOW_TOLERANCE)


@KINDS
def test_diffusion_within_a_spatial_mask(kind: str) -> None:
    """Nothing flows across the border of the annotated region: as if the volume ended there."""
    labels = case("ellipsoids")["instances"][:20, :30, :28]
    padded = np.pad(labels, 3)
    mask = np.pad(np.ones(labels.shape, np.float32), 3)
    flow = topo_dask.generate_diffusion_flows(
        wrap(padded, kind), 50, spatial_mask=wrap(mask, kind), origin=(2, 2, 2)
    )
    bare = topo_dask.generate_diffusion_flows(labels, 50, origin=(5, 5, 5))
    inner = (slice(None), *[slice(3, -3)] * 3)
    np.testing.assert_allclose(unwrap(flow, kind)[inner], bare, rtol=0, atol=FLOW_TOLERANCE)


@KINDS
def test_final_positions(kind: str) -> None:
    arrays = case("ellipsoids")
    mask = arrays["instances"] > 0
    coords, ends = topo_dask.track_flows(
        wrap(mask, kind),
        wrap(arrays["noisy_flow"], kind),
        int(arrays["track_steps"]),
        float(arrays["track_step_size"]),
    )
    assert (coords.dtype, ends.dtype) == (np.int64, np.float64)
    coords, ends = unwrap(coords, kind), unwrap(ends, kind)
    # Dask gives the voxels chunk by chunk.
    order = np.lexsort(coords.T[::-1])
    if kind in ("numpy", "one chunk"):
        np.testing.assert_array_equal(order, np.arange(len(coords)))
    np.testing.assert_array_equal(coords[order], np.argwhere(mask))
    expected = arrays["final_positions"]
    np.testing.assert_allclose(ends[order], expected, rtol=0, atol=POSITION_TOLERANCE)


@KINDS
def test_clusters_of_the_final_positions(kind: str) -> None:
    arrays = case("ellipsoids")
    coords, ends = np.argwhere(arrays["instances"] > 0), arrays["final_positions"]
    if kind != "numpy":
        coords, ends = (da.from_array(a, chunks=(9999, 3)) for a in (coords, ends))
    labels = topo_dask.cluster_convergence(
        coords,
        ends,
        arrays["instances"].shape,
        float(arrays["convergence_radius"]),
        int(arrays["min_size"]),
    )
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(unwrap(labels, kind), arrays["cluster_labels"])


@KINDS
@pytest.mark.parametrize(
    ("name", "flow", "steps", "step_size"),
    [
        ("ellipsoids", "noisy_flow", "track_steps", "track_step_size"),
        ("tubes", "noisy_flow", "n_steps", "step_size"),
        ("tutorial", "diffusion_n200", "n_steps", "step_size"),
    ],
)
def test_group_1_labels(name: str, flow: str, steps: str, step_size: str, kind: str) -> None:
    arrays = case(name)
    labels = topo_dask.postprocess_single(
        wrap(arrays["instances"] > 0, kind),
        wrap(arrays[flow], kind),
        n_steps=int(arrays[steps]),
        step_size=float(arrays[step_size]),
        convergence_radius=float(arrays["convergence_radius"]),
        min_size=int(arrays["min_size"]),
        group=1,
    )
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(unwrap(labels, kind), arrays["group1"])


@KINDS
def test_flows_and_group_1_labels_of_each_class(kind: str) -> None:
    arrays = case("multiclass")
    how = json.loads(str(arrays["flow_config"]))
    after = json.loads(str(arrays["postprocess_config"]))
    for row, name in enumerate(arrays["class_names"].tolist()):
        labels = wrap(arrays["instance_ids"][row], kind)
        if how[name]["flow_type"] == "direct":
            flow = topo_dask.generate_direct_flows(labels)
        else:
            flow = topo_dask.generate_diffusion_flows(labels, how[name]["diffusion_iters"])
        expected = arrays["flows"][3 * row : 3 * row + 3]
        np.testing.assert_allclose(unwrap(flow, kind), expected, rtol=0, atol=FLOW_TOLERANCE)
        if after[name]["group"] == 1:
            # Of the very flow of the case: positions on the border of two cells are possible.
            made = topo_dask.postprocess_single(labels > 0, wrap(expected, kind), **after[name])
            np.testing.assert_array_equal(unwrap(made, kind), arrays[f"instances_{name}"])


@KINDS
def test_instance_table(kind: str) -> None:
    labels = case("ellipsoids")["instances"]
    table = topo_dask.instance_table(wrap(labels, kind))
    assert isinstance(table, InstanceTable if kind == "numpy" else Delayed)
    (table,) = dask.compute(table)
    assert table.ids.tolist() == np.unique(labels[labels > 0]).tolist()
    for row, label in enumerate(table.ids.tolist()):
        voxels = np.argwhere(labels == label)
        assert table.voxels[row] == len(voxels)
        np.testing.assert_allclose(table.centres[row], voxels.mean(axis=0), rtol=1e-12)
        np.testing.assert_array_equal(table.lo[row], voxels.min(axis=0))
        np.testing.assert_array_equal(table.hi[row], voxels.max(axis=0) + 1)


def test_chunks_of_mask_and_flow_may_differ() -> None:
    arrays = case("tutorial")
    mask = da.from_array(arrays["instances"] > 0, chunks=(64, 20, 33))
    settings: dict[str, Any] = {"n_steps": 100, "min_size": 50}
    flows = [
        arrays["diffusion_n200"],
        da.from_array(arrays["diffusion_n200"], chunks=(1, 31, 64, 16)),
    ]
    for flow in flows:
        labels = topo_dask.postprocess_single(mask, flow, **settings)
        assert labels.chunks == mask.chunks
        np.testing.assert_array_equal(labels.compute(), arrays["group1"])


# ------------------------------------------------------------------------------------ laziness


class Touched(Exception):
    """A chunk was computed."""


def untouchable(shape: tuple[int, ...], chunks: Any, dtype: Any) -> da.Array:
    """A dask array whose chunks cannot be computed."""

    def touch(block_info: Any = None) -> Any:
        raise Touched

    return da.map_blocks(
        touch,
        chunks=da.core.normalize_chunks(chunks, shape),
        dtype=dtype,
        meta=np.zeros((0,) * len(shape), dtype),
    )


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    shape, chunks = (20, 30, 25), (7, 30, 11)
    labels = untouchable(shape, chunks, np.uint16)
    mask = untouchable(shape, chunks, bool)
    flow = untouchable((3, *shape), (1, *chunks), np.float32)
    coords = untouchable((50, 3), (20, 3), np.int64)
    ends = untouchable((50, 3), (20, 3), np.float64)
    made = [
        topo_dask.generate_diffusion_flows(labels),
        topo_dask.generate_diffusion_flows(labels, spatial_mask=mask, potential="heat"),
        topo_dask.generate_direct_flows(labels),
        topo_dask.generate_direct_flows(labels, mask),
        *topo_dask.track_flows(mask, flow, 10),
        topo_dask.postprocess_single(mask, flow),
        topo_dask.cluster_convergence(coords, ends, shape, 4.0, 1),
        topo_dask.instance_table(labels),
        topo_dask.filter_small(labels, 5),
        topo_dask.compact_relabel(labels),
        topo_dask.remove_bad_flow_masks(labels, flow),
        topo_dask.fill_holes(labels),
    ]
    for lazy in made:
        assert isinstance(lazy, (da.Array, Delayed))
        with pytest.raises(Touched):
            lazy.compute(scheduler="sync")
    assert made[0].chunks == ((3,), (7, 7, 6), (30,), (11, 11, 3))
    assert made[6].chunks == ((7, 7, 6), (30,), (11, 11, 3))


def test_a_lazy_array_reads_only_what_it_needs() -> None:
    """A slice of the flows computes the chunks around it, and one pass for the whole instances."""
    labels = np.zeros((8, 8, 200), dtype=np.uint8)
    labels[2:6, 2:6, 1:60] = 1
    labels[2:6, 2:6, 120:190] = 2
    seen: list[int] = []

    def note(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        seen.append(block_info[0]["chunk-location"][2])
        return block

    table = topo_dask.instance_table(labels)
    lazy = da.map_blocks(note, da.from_array(labels, chunks=(8, 8, 20)), dtype=labels.dtype)
    flow = topo_dask.generate_diffusion_flows(lazy, 10, instances=table, volume_shape=labels.shape)
    assert seen == []
    part = flow[..., 20:40].compute(scheduler="sync")
    whole = topo_dask.generate_diffusion_flows(labels, 10)
    np.testing.assert_allclose(part, whole[..., 20:40], rtol=0, atol=FLOW_TOLERANCE)
    assert sorted(set(seen)) == [0, 1, 2]


# --------------------------------------------------------------------------------------- names

REQUIRED = inspect.Parameter.empty
NAMES: dict[str, dict[str, Any]] = {
    "generate_direct_flows": {"instance_mask": REQUIRED, "spatial_mask": None},
    "generate_diffusion_flows": {
        "instance_mask": REQUIRED,
        "n_iter": 200,
        "adaptive_iters": True,
        "adaptive_factor": 6,
        "spatial_mask": None,
    },
    "compute_subcrop_slices": dict.fromkeys(("volume_shape", "crop_size", "overlap"), REQUIRED),
    "build_spatial_mask": {"shape": REQUIRED},
    "boundary_flags": {"slices": REQUIRED, "volume_shape": REQUIRED},
    "cosine_blend_weight": {"shape": REQUIRED, "at_volume_boundary": None, "overlap": None},
    "stitch_flows": dict.fromkeys(("volume_shape", "subcrop_slices", "arrays"), REQUIRED),
    "stitch_volumes": dict.fromkeys(("volume_shape", "subcrop_slices", "arrays"), REQUIRED),
    "track_flows": {"sem_mask": REQUIRED, "flow": REQUIRED, "n_steps": REQUIRED, "step_size": 1.0},
    "cluster_convergence": dict.fromkeys(
        ("fg_coords", "final_positions", "volume_shape", "convergence_radius", "min_size"), REQUIRED
    ),
    "postprocess_single": {
        "sem_mask": REQUIRED,
        "flow": REQUIRED,
        "n_steps": 100,
        "step_size": 1.0,
        "convergence_radius": 4.0,
        "min_size": 50,
        "group": 1,
    },
    "run_instance_segmentation": {
        "semantic_pred": REQUIRED,
        "flow_pred": REQUIRED,
        "class_names": None,
        "class_config": None,
        "flow_error_threshold": 0.0,
    },
    "filter_small": dict.fromkeys(("instances", "min_size"), REQUIRED),
    "compact_relabel": {"instances": REQUIRED},
    "remove_bad_flow_masks": {"instances": REQUIRED, "pred_flow": REQUIRED, "threshold": 0.4},
}


@pytest.mark.parametrize("name", NAMES)
def test_leading_parameters(name: str) -> None:
    """Code written for the topo package runs: names, order and defaults are its own."""
    parameters = inspect.signature(getattr(topo_dask, name)).parameters.values()
    leading = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(leading.items()) == list(NAMES[name].items())
    # Whatever there is beyond them must be named and may be left out.
    rest = [p for p in parameters if p.name not in leading]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not REQUIRED for p in rest)


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("flows", ["labels", "output"]),
        ("segment", ["flows", "output"]),
        ("compare", ["truth", "labels"]),
    ],
)
def test_parameters_of_runs(name: str, leading: list[str]) -> None:
    parameters = inspect.signature(getattr(topo_dask, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == leading
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if name != "compare":
        assert {"blocks", "work_dir", "resume", "overwrite", "cluster"} <= options.keys()
    # A setting has the name and the default that it has for arrays.
    of_arrays = {"flows": "generate_diffusion_flows", "segment": "postprocess_single"}.get(name)
    if of_arrays is not None:
        known = inspect.signature(getattr(topo_dask, of_arrays)).parameters
        shared = options.keys() & known.keys()
        assert len(shared) >= 5
        assert {k: options[k] for k in shared} == {k: known[k].default for k in shared}


def test_every_public_name_is_there_and_documented() -> None:
    assert set(NAMES) | {"flows", "segment", "compare", "instance_table"} <= set(topo_dask.__all__)
    for name in topo_dask.__all__:
        value = getattr(topo_dask, name)
        assert not callable(value) or (value.__doc__ or "").strip()


FUNCTIONS = [n for n in topo_dask.__all__ if inspect.isfunction(getattr(topo_dask, n))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documentation_tells_every_parameter(name: str) -> None:
    """And what comes back, what is raised, and an example, which the doctests run."""
    function = getattr(topo_dask, name)
    sections = re.split(r"^(\w+)\n-+\n", inspect.getdoc(function) or "", flags=re.MULTILINE)
    told = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert {"Parameters", "Returns", "Raises", "Examples"} <= told.keys()
    heads = [line for line in told["Parameters"].splitlines() if line and line[0] != " "]
    listed = [part.strip() for head in heads for part in head.split(",")]
    assert sorted(listed) == sorted(inspect.signature(function).parameters)


# --------------------------------------------------------------------------------------- tiles


def test_tiles_of_the_case() -> None:
    arrays = case("tiling")
    shape, crop, overlap = (tuple(arrays[k]) for k in ("volume_shape", "crop_size", "overlap"))
    tiles = topo_dask.compute_subcrop_slices(shape, crop, overlap)
    assert [[s.start for s in tile] for tile in tiles] == arrays["starts"].tolist()
    assert all(
        tuple(s.stop - s.start for s in tile) == tuple(arrays["crop_size"]) for tile in tiles
    )


@pytest.mark.parametrize("flags", [None, [True, False], [False, True], [True, True]])
def test_weights_without_an_overlap_taper_over_the_tile(flags: list[bool] | None) -> None:
    """Half the tile on each side; the whole tile where one side tapers alone."""
    weight = topo_dask.cosine_blend_weight((8,), flags)
    low, high = (not flag for flag in flags or [False, False])
    width = 4 if low and high else 8
    i = np.arange(8)
    rise = np.sin(np.pi / 2 * (i + 0.5) / width) ** 2
    expected = np.ones(8)
    expected[:width] *= rise[:width] if low else 1
    expected[8 - width :] *= rise[:width][::-1] if high else 1
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def angles(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Angle between two fields of unit vectors, in degrees."""
    dot = (one.astype(np.float64) * other).sum(axis=0)[where]
    return np.degrees(np.arccos(np.clip(dot, -1, 1)))


@pytest.fixture(scope="module")
def tutorial() -> tuple[np.ndarray, np.ndarray, InstanceTable, list[tuple[slice, ...]]]:
    labels = ellipsoids()
    np.testing.assert_array_equal(labels, case("tutorial")["instances"])
    tiles = topo_dask.compute_subcrop_slices(labels.shape, (36,) * 3, (12,) * 3)
    assert len(tiles) == 27
    whole = topo_dask.generate_diffusion_flows(labels)
    return labels, whole, topo_dask.instance_table(labels), tiles


def flow_of_tile(
    labels: np.ndarray, table: InstanceTable | None, tile: tuple[slice, ...], context: int
) -> np.ndarray:
    """The flow of a tile, computed with some context; alone where there is no table."""
    if table is None:
        # The objects go on behind the faces of the tile, where nothing is known.
        part = labels[tile]
        mask = topo_dask.build_spatial_mask(part.shape)
        return topo_dask.generate_diffusion_flows(part, spatial_mask=mask)
    grown = tuple(
        slice(max(0, s.start - context), min(n, s.stop + context))
        for s, n in zip(tile, labels.shape, strict=True)
    )
    flow = topo_dask.generate_diffusion_flows(
        labels[grown],
        origin=tuple(s.start for s in grown),
        volume_shape=labels.shape,
        instances=table,
    )
    inner = [slice(s.start - g.start, s.stop - g.start) for s, g in zip(tile, grown, strict=True)]
    return flow[(slice(None), *inner)]


def weighted(
    shape: tuple[int, ...], tiles: list[tuple[slice, ...]], arrays: list[np.ndarray]
) -> np.ndarray:
    """Blended by hand, with tapers of 12 voxels also where two tiles share more of them."""
    total = np.zeros((3, *shape))
    for tile, array in zip(tiles, arrays, strict=True):
        flags = topo_dask.boundary_flags(tile, shape)
        weight = topo_dask.cosine_blend_weight(array.shape[1:], flags, overlap=12)
        total[(slice(None), *tile)] += weight * array
    return total / np.maximum(np.linalg.norm(total, axis=0), 1e-12)


@pytest.mark.parametrize(
    ("known", "context", "stitched", "by_hand"),
    [
        (False, 0, (16.6, 17.6), (17.9, 18.9)),  # a tile that does not know where it lies
        (True, 0, (0.9, 1.6), (1.2, 1.6)),
        (True, 16, (0.0, 0.05), (0.0, 0.05)),
    ],
    ids=["tile-local", "origin-aware", "with context"],
)
def test_flows_of_tiles(
    tutorial: Any,
    known: bool,
    context: int,
    stitched: tuple[float, float],
    by_hand: tuple[float, float],
) -> None:
    labels, whole, table, tiles = tutorial
    inside = labels > 0
    arrays = [flow_of_tile(labels, table if known else None, tile, context) for tile in tiles]
    fused = np.asarray(topo_dask.stitch_flows(labels.shape, tiles, arrays))
    for field, (least, most) in (
        (fused, stitched),
        (weighted(labels.shape, tiles, arrays), by_hand),
    ):
        assert least <= angles(field, whole, inside).mean() <= most
    assert not fused[:, ~inside].any()
    np.testing.assert_allclose(np.linalg.norm(fused[:, inside], axis=0), 1, rtol=1e-5)


def test_flows_of_tiles_with_their_context_are_those_of_the_volume(tutorial: Any) -> None:
    labels, whole, _, _ = tutorial
    lazy = topo_dask.generate_diffusion_flows(da.from_array(labels, chunks=30), context=200)
    np.testing.assert_array_equal(lazy.compute(), whole)


@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_chunks_that_overlap_are_blended(tutorial: Any, potential: str) -> None:
    """As `flows` blends the same tiles, and as nothing else where the context is exact."""
    labels, *_ = tutorial
    lazy = da.from_array(labels, chunks=(32, 64, 40))
    how: dict[str, Any] = {"n_iter": 40, "potential": potential, "overlap": (8, 0, 3)}
    make = topo_dask.generate_diffusion_flows
    whole = make(labels, **how)
    exact = make(lazy, context=40, **how).compute()
    np.testing.assert_allclose(exact, whole, rtol=0, atol=1e-6)
    rough = make(lazy, context=0, **how).compute()
    assert np.abs(rough - whole).max() > 1e-3
    seamed = make(lazy, context=0, **{**how, "overlap": 0}).compute()
    inside = labels > 0
    assert angles(rough, whole, inside).mean() < angles(seamed, whole, inside).mean()
    lengths = np.linalg.norm(rough[:, inside], axis=0)
    assert (lengths > 0.99999).sum() >= inside.sum() - 4  # but the middle of each, for heat
    assert lengths.max() < 1.00001
    for bad in ((33, 0, 0), -1, (1, 1)):
        with pytest.raises(ValueError, match="overlap: got"):
            make(lazy, overlap=bad)
    with pytest.raises(ValueError, match="overlap: got"):
        make(labels, overlap=-1)


def test_a_tile_needs_the_table_of_its_volume(tutorial: Any) -> None:
    labels, _, table, _ = tutorial
    other = topo_dask.instance_table(np.where(labels == 2, 0, labels))
    with pytest.raises(ValueError, match=r"instances: got a table without ids \[2\]"):
        topo_dask.generate_diffusion_flows(labels, instances=other, volume_shape=labels.shape)
    with pytest.raises(ValueError, match=r"volume_shape: got \(64, 64, 64\).*Check the origin"):
        topo_dask.generate_diffusion_flows(
            labels, instances=table, volume_shape=labels.shape, origin=(1, 0, 0)
        )
