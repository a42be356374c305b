"""One answer: whatever the blocks, the halo, the engine, the chunks on disk.

Labels of a run in blocks are those of a run in one block and those of the oracle, ids included.
Flows are within 1e-4 of the whole volume's, and equal to the bit where the context covers the
iterations. `make nightly` repeats every property here thousands of times.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import hypothesis
import numpy as np
import pytest
from cases import SEEDS, spatial_masks
from distributed import Client, LocalCluster
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.grid import BlockGrid
from topo_dask.kernels import reference
from topo_dask.run.execute import Engine, open_engine
from topo_dask.storage import create_array
from topo_dask.testing import (
    block_shapes,
    flow_fields,
    label_volumes,
    segment_parameters,
)

pytestmark = pytest.mark.nightly

TOLERANCE = 1e-4
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where the stores of the cases are: thousands of tiny files."""

# A run costs some 20 ms a block, more through a scheduler.
MOST_BLOCKS = {"sync": 12, "threads": 12, "processes": 6, "dask": 6}
ENGINES = st.sampled_from([*["sync"] * 5, *["threads"] * 3, "processes", "dask"])


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """One of each kind for all cases: starting processes takes seconds."""
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        yield {
            "dask": stack.enter_context(open_engine(client)),
            **{
                name: stack.enter_context(open_engine(name))
                for name in ("sync", "threads", "processes")
            },
        }


def fewer_blocks(blocks: tuple[int, ...], shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The same block shape, with longer sides where it would cut the volume too small."""
    sides = list(blocks)
    while math.prod(counts := [-(-n // b) for n, b in zip(shape, sides, strict=True)]) > most:
        axis = int(np.argmax(counts))
        sides[axis] = -(-shape[axis] // (counts[axis] - 1))
    return tuple(sides)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...], most: int) -> tuple[tuple[int, ...], ...]:
    """Dask chunks: regular ones, or each of its own length."""
    blocks = fewer_blocks(draw(block_shapes(shape)), shape, most)
    if draw(st.booleans()):
        return da.core.normalize_chunks(blocks, shape)
    at = [
        sorted(draw(st.sets(st.integers(1, n - 1), max_size=-(-n // b) - 1)) if n > 1 else [])
        for n, b in zip(shape, blocks, strict=True)
    ]
    ends = [[0, *a, n] for a, n in zip(at, shape, strict=True)]
    return tuple(tuple(b - a for a, b in itertools.pairwise(e)) for e in ends)


def stored(path: Path, values: np.ndarray, chunks: tuple[int, ...], layout: str) -> Path:
    """A store of the values: zarr v2, v3, or v3 with shards of two chunks a side."""
    chunks = tuple(min(c, n) for c, n in zip(chunks, values.shape, strict=True))
    array = create_array(
        path,
        values.shape,
        chunks,
        values.dtype,
        shards=tuple(2 * c for c in chunks) if layout == "shards" else None,
        zarr_format=2 if layout == "v2" else 3,
    )
    array[...] = values
    return path


LAYOUTS = st.sampled_from(["v3", "v2", "shards"])

# ------------------------------------------------------------------------------------- labels


@st.composite
def whirls(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """Particles that go round and round, and never stop."""
    rng = np.random.default_rng(draw(SEEDS))
    middle = (np.asarray(shape) - 1) / 2 + rng.uniform(-1, 1, size=3)
    axis = rng.normal(size=3)
    away = np.indices(shape) - middle[:, None, None, None]
    field = np.cross(axis, away, axisb=0, axisc=0) - draw(st.sampled_from([0, 0.3])) * away
    return field / np.maximum(np.linalg.norm(field, axis=0), 1e-6)


@st.composite
def currents(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """Full speed along an axis, from one end of the volume to the other."""
    field = np.zeros((3, *shape))
    field[draw(st.sampled_from([2, 1, 0]))] = draw(st.sampled_from([1, -1]))
    return field


@st.composite
def flows_to_follow(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """Any field, noise on it, parts of it 0, in half precision too."""
    kind = draw(st.sampled_from([flow_fields, flow_fields, whirls, currents]))
    hypothesis.event(f"flow: {kind.__name__}")
    field = draw(kind(shape))
    rng = np.random.default_rng(draw(SEEDS))
    if draw(st.booleans()):
        field = field + rng.normal(scale=0.3, size=field.shape)
    if draw(st.booleans()):
        field = field * (rng.random(shape) < 0.7)
    return field.astype(draw(st.sampled_from(["float32", "float16", "float64"])))


@st.composite
def volumes_with_flow(draw: st.DrawFn) -> tuple[np.ndarray | None, np.ndarray]:
    """A foreground (labels, a mask, a probability, none) and a flow."""
    labels = draw(label_volumes(max_side=11))
    if draw(st.integers(0, 3)) == 0:  # full, else much of a volume may be empty; and a long way
        sides = draw(st.permutations([1, draw(st.integers(1, 2)), draw(st.integers(1, 60))]))
        labels = np.ones(sides, dtype=labels.dtype)
    kind = draw(st.sampled_from(["labels", "mask", "probability", "none"]))
    flow = draw(flows_to_follow(labels.shape))
    foreground = {
        "labels": labels,
        "mask": labels > 0,
        "probability": (labels > 0).astype(np.float32) * np.float32(0.75),
        "none": None,
    }[kind]
    return foreground, flow


def oracle(foreground: np.ndarray | None, flow: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    mask = (flow != 0).any(axis=0) if foreground is None else foreground > 0
    how = {name: value for name, value in settings.items() if name != "group"}
    flow = flow.astype(np.float32)
    clusters = reference.segment_group1(mask, flow, **how)
    if settings.get("group") == 2:
        return reference.split_disconnected(reference.join_touching(clusters, flow))
    if settings.get("group") == 3:
        return reference.recover_orphans(mask, clusters)
    return clusters


def tell_kinds(labels: np.ndarray, blocks: tuple[int, ...], made: Any) -> None:
    """What a case is like, for ``pytest --hypothesis-show-statistics``."""
    index = np.argwhere(labels > 0) // np.minimum(blocks, labels.shape)
    found = labels[labels > 0]
    order = np.argsort(found, kind="stable")
    starts = np.flatnonzero(np.diff(found[order], prepend=0))
    grid = BlockGrid(labels.shape, blocks)
    if len(starts):
        spans = np.maximum.reduceat(index[order], starts) - np.minimum.reduceat(
            index[order], starts
        )
        if spans.max() >= 5:
            hypothesis.event("object: wider than five blocks")
        inside = [len(np.unique(part, axis=0)) for part in np.split(index[order], starts[1:])]
        if max(inside) == len(grid) > 1:
            hypothesis.event("object: in every block")
    if set(np.minimum(blocks, labels.shape)) == {1}:
        hypothesis.event("blocks: of one voxel")
    rounds = int(made.details["rounds"].split()[0])
    if rounds > 4:
        hypothesis.event("particles: handed over four times and more")


@st.composite
def methods(draw: st.DrawFn) -> dict[str, Any]:
    """Parameters and a group; the settings of `segment` and `postprocess_single`."""
    return {**draw(segment_parameters()), "group": draw(st.sampled_from([1, 2, 2, 3]))}


@given(data=st.data())
def test_labels_of_stores_are_one_answer(engines: dict[str, Engine], data: st.DataObject) -> None:
    foreground, flow = data.draw(volumes_with_flow())
    settings = data.draw(methods())
    name = data.draw(ENGINES)
    shape = flow.shape[1:]
    blocks = (1, 1, 1)  # as many as there may be, that is
    if data.draw(st.integers(0, 4)):
        blocks = data.draw(block_shapes(shape))
    blocks = fewer_blocks(blocks, shape, MOST_BLOCKS[name])
    halo = data.draw(st.sampled_from([0, 0, 1, 2, 5, 30]))
    chunks, layout = data.draw(block_shapes(shape)), data.draw(LAYOUTS)
    chunks = fewer_blocks(chunks, shape, 12)
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        field = stored(Path(path, "flow.zarr"), flow, (3, *chunks), layout)
        mask = None
        if foreground is not None:
            mask = stored(Path(path, "mask.zarr"), foreground, chunks, layout)
        made = topo_dask.segment(
            field,
            Path(path, "labels.zarr"),
            foreground=mask,
            blocks=blocks,
            halo=halo,
            cluster=engines[name],
            zarr_format=data.draw(st.sampled_from([3, 2])),
            keep_evidence=data.draw(st.sampled_from([False, False, True])),
            **settings,
        )
        labels = made.array[...]
        once = topo_dask.segment(
            field,
            Path(path, "once.zarr"),
            foreground=mask,
            blocks=shape,
            cluster=engines["sync"],
            **settings,
        ).array[...]
    assert_array_equal(labels, once)
    assert_array_equal(labels, oracle(foreground, flow, settings))
    tell_kinds(labels, blocks, made)


@settings(max_examples=max(120, settings.default.max_examples * 3 // 5))
@given(data=st.data())
def test_labels_of_tiny_blocks_are_one_answer(data: st.DataObject) -> None:
    """Volumes of a few voxels in blocks of one: every particle and every cell crosses borders."""
    shape = data.draw(st.sampled_from([(1, 1, 8), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 7, 1)]))
    flow = data.draw(flows_to_follow(shape))
    settings = {**data.draw(methods()), "min_size": data.draw(st.integers(0, 4))}
    blocks = tuple(data.draw(st.sampled_from([1, 1, 1, 2])) for _ in shape)
    halo = data.draw(st.sampled_from([0, 0, 1]))
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        made = topo_dask.segment(
            flow,
            Path(path, "labels.zarr"),
            blocks=blocks,
            halo=halo,
            cluster="sync",
            **settings,
        )
        labels = made.array[...]
    assert_array_equal(labels, oracle(None, flow, settings))
    tell_kinds(labels, blocks, made)


@st.composite
def snakes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """One thing that winds through the whole volume, with a flow along it to one or more sinks."""
    rows = draw(st.sampled_from([1, 1, 2, 3, 4]))
    length = draw(st.integers(1, 18 if rows == 1 else 9))
    path = [(2 * row, x) for row in range(rows) for x in range(length)[:: 1 - 2 * (row % 2)]]
    turns = [(2 * row + 1, (length - 1) * (1 - row % 2)) for row in range(rows - 1)]
    for row, turn in reversed(list(enumerate(turns))):
        path.insert((row + 1) * length, turn)
    voxels = np.insert(np.array(path), draw(st.sampled_from([0, 1, 2])), 0, axis=1)
    shape = tuple(voxels.max(axis=0) + 1)
    sinks = draw(st.lists(st.integers(0, len(voxels) - 1), min_size=1, max_size=4))
    flow = np.zeros((3, *shape), dtype=np.float32)
    for number, voxel in enumerate(voxels):
        sink = min(sinks, key=lambda s: (abs(s - number), s))
        step = voxels[number + np.sign(sink - number)] - voxel
        flow[(slice(None), *voxel)] = step
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(voxels.T)] = 1
    cut = draw(st.sampled_from([0, 0, 7]))  # also in pieces
    if cut:
        mask[tuple(voxels[cut::cut].T)] = 0
    return mask, flow


@settings(max_examples=30)
@given(data=st.data())
def test_one_thing_through_every_block_is_one_answer(data: st.DataObject) -> None:
    """Blocks of one or two voxels, each of them with a part of it."""
    mask, flow = data.draw(snakes())
    method = {**data.draw(methods()), "min_size": data.draw(st.sampled_from([0, 1, 3]))}
    blocks = fewer_blocks(tuple(data.draw(st.integers(1, 2)) for _ in mask.shape), mask.shape, 10)
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        made = topo_dask.segment(
            flow,
            Path(path, "labels.zarr"),
            foreground=mask,
            blocks=blocks,
            halo=data.draw(st.sampled_from([0, 1])),
            cluster=data.draw(st.sampled_from(["sync", "threads"])),
            **method,
        )
        labels = made.array[...]
    assert_array_equal(labels, oracle(mask, flow, method))
    tell_kinds(labels, blocks, made)
    lazy = topo_dask.split_disconnected(da.from_array(mask, chunks=blocks), 0.2)
    assert_array_equal(lazy, reference.split_disconnected(mask, min_fragment_ratio=0.2))


@given(data=st.data())
def test_lazy_labels_are_one_answer(data: st.DataObject) -> None:
    """A dask array in gives the labels of the NumPy array, for flows of length at most 1."""
    foreground, flow = data.draw(volumes_with_flow())
    settings = data.draw(methods())
    # In half precision a unit vector may be longer than 1; that is for stores, see above.
    flow = flow.astype(np.float32)
    flow /= np.maximum(np.sqrt((flow.astype(np.float64) ** 2).sum(axis=0)), 1)
    mask = (flow != 0).any(axis=0) if foreground is None else foreground
    shape = mask.shape
    lazy = topo_dask.postprocess_single(
        da.from_array(mask, chunks=data.draw(cuts(shape, 8))),
        da.from_array(flow, chunks=((3,), *data.draw(cuts(shape, 8)))),
        **settings,
    )
    scheduler = data.draw(st.sampled_from(["sync", "threads"]))
    labels = topo_dask.postprocess_single(mask, flow, **settings)
    with dask.config.set(scheduler=scheduler):
        assert_array_equal(lazy.compute(), labels)
    assert_array_equal(labels, oracle(mask, flow, settings))


@given(data=st.data())
def test_lazy_labels_of_thin_chunks_are_one_answer(data: st.DataObject) -> None:
    """Particles that cross chunk after chunk at full speed, as many as the graph provides for."""
    shape = data.draw(st.permutations([1, 1, data.draw(st.integers(1, 14))]))
    flow = data.draw(st.one_of(currents(shape), flow_fields(shape))).astype(np.float32)
    flow /= np.maximum(np.sqrt((flow.astype(np.float64) ** 2).sum(axis=0)), 1)
    settings = {**data.draw(segment_parameters()), "min_size": 0}
    settings["n_steps"] = data.draw(st.integers(0, 14))
    mask = np.ones(shape, dtype=bool)
    chunks = data.draw(st.sampled_from([1, 1, 2]))
    lazy = topo_dask.postprocess_single(
        da.from_array(mask, chunks=chunks), da.from_array(flow, chunks=(3, 9, 9, 9)), **settings
    )
    labels = lazy.compute(scheduler="sync")
    assert_array_equal(labels, oracle(mask, flow, settings))


# -------------------------------------------------------------------------------------- flows


@st.composite
def long_volumes(draw: st.DrawFn) -> np.ndarray:
    """Thin and long, so that there is room beyond the context; instances as long as the volume."""
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(20, 90))]
    shape = draw(st.permutations(shape))
    labels = np.zeros(shape, dtype=np.uint32)
    rng = np.random.default_rng(draw(SEEDS))
    for label in range(1, draw(st.integers(1, 4)) + 1):
        ends = np.sort(rng.integers(0, np.asarray(shape) + 1, size=(2, 3)), axis=0)
        labels[tuple(slice(a, b) for a, b in ends.T)] = label
    # Holes and roughness; 0 shrinks towards none.
    labels[rng.random(shape) < draw(st.sampled_from([0, 0.02, 0.2]))] = 0
    return labels


@st.composite
def flow_settings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "n_iter": draw(st.sampled_from([0, 1, 2, 5, 10, 20, 40, 80, 200])),
        "potential": draw(st.sampled_from(["coordinate", "heat"])),
        "adaptive_iters": draw(st.booleans()),
        "adaptive_factor": draw(st.sampled_from([6, 1, 0.5, 2.7])),
        "origin": draw(st.sampled_from([(0, 0, 0), (5, 0, 17), (1000, 30_000, 7)])),
    }


VOLUMES = st.one_of(label_volumes(max_side=12), long_volumes())


def flows_of_store(
    labels: np.ndarray,
    blocks: tuple[int, ...],
    engine: Any,
    spatial_mask: np.ndarray | None = None,
    **settings: Any,
) -> np.ndarray:
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        source = stored(Path(path, "labels.zarr"), labels, (7, 7, 7), "v3")
        mask = None
        if spatial_mask is not None:
            mask = stored(Path(path, "mask.zarr"), spatial_mask, (5, 6, 7), "v2")
        made = topo_dask.flows(
            source,
            Path(path, "flow.zarr"),
            spatial_mask=mask,
            blocks=blocks,
            cluster=engine,
            **settings,
        )
        return made.array[...]


def flows_of_chunks(
    data: st.DataObject, make: Any, labels: np.ndarray, mask: np.ndarray | None, **settings: Any
) -> np.ndarray:
    """The lazy flows of dask arrays, mask and labels each in chunks of its own."""
    lazy_mask = None
    if mask is not None:
        lazy_mask = da.from_array(mask, chunks=data.draw(cuts(labels.shape, 3)))
    lazy_labels = da.from_array(labels, chunks=data.draw(cuts(labels.shape, 6)))
    return make(lazy_labels, spatial_mask=lazy_mask, **settings).compute(scheduler="sync")


@given(data=st.data())
def test_flows_with_automatic_context_are_within_the_tolerance(
    engines: dict[str, Engine], data: st.DataObject
) -> None:
    labels = data.draw(VOLUMES)
    mask = data.draw(spatial_masks(labels.shape))
    settings = data.draw(flow_settings())
    make = topo_dask.generate_diffusion_flows
    whole = make(labels, spatial_mask=mask, **settings)
    name = data.draw(ENGINES)
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, MOST_BLOCKS[name])
    flow = flows_of_store(labels, blocks, engines[name], mask, **settings)
    assert_allclose(flow, whole, rtol=0, atol=TOLERANCE)
    flow = flows_of_chunks(data, make, labels, mask, **settings)
    assert_allclose(flow, whole, rtol=0, atol=TOLERANCE)


@given(data=st.data())
def test_flows_with_all_the_context_are_equal_to_the_bit(
    engines: dict[str, Engine], data: st.DataObject
) -> None:
    labels = data.draw(VOLUMES)
    mask = data.draw(spatial_masks(labels.shape))
    settings = data.draw(flow_settings())
    make = topo_dask.generate_diffusion_flows
    whole = make(labels, spatial_mask=mask, **settings)
    settings["context"] = settings["n_iter"] + data.draw(st.sampled_from([0, 0, 3]))
    name = data.draw(ENGINES)
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, MOST_BLOCKS[name])
    assert_array_equal(flows_of_store(labels, blocks, engines[name], mask, **settings), whole)
    assert_array_equal(flows_of_chunks(data, make, labels, mask, **settings), whole)


@hypothesis.settings(max_examples=max(25, hypothesis.settings.default.max_examples // 8))
@given(data=st.data())
def test_flows_in_rounds_are_equal_to_the_bit(
    engines: dict[str, Engine], data: st.DataObject
) -> None:
    """Of any length, in blocks down to a voxel, where instances end at iterations of their own."""
    labels = data.draw(VOLUMES)
    mask = data.draw(spatial_masks(labels.shape))
    how = data.draw(flow_settings())
    whole = topo_dask.generate_diffusion_flows(labels, spatial_mask=mask, **how)
    most = max(1, how["n_iter"])
    rounds = data.draw(st.sampled_from(["auto", 1, 2, 3, 7, 16, 64, most, most + 5]))
    if isinstance(rounds, int):
        rounds = max(rounds, -(-most // 12))  # a round costs some 10 ms a block
    name = data.draw(ENGINES)
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, 6)
    flow = flows_of_store(labels, blocks, engines[name], mask, rounds=rounds, **how)
    assert_array_equal(flow, whole)


@hypothesis.settings(max_examples=max(12, hypothesis.settings.default.max_examples // 16))
@given(data=st.data())
def test_poisson_flows_of_blocks_are_those_of_the_whole_volume(data: st.DataObject) -> None:
    """By rounds between blocks, with a halo down to a voxel; pieces without a border get none."""
    labels = data.draw(label_volumes(max_side=9))
    mask = data.draw(spatial_masks(labels.shape))
    whole = topo_dask.generate_diffusion_flows(labels, spatial_mask=mask, potential="poisson")
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, 8)
    shortest = [
        min(b, n % b or b) if b < n else n for b, n in zip(blocks, labels.shape, strict=True)
    ]
    flow = flows_of_store(
        labels,
        blocks,
        "sync",
        mask,
        potential="poisson",
        context=data.draw(st.sampled_from(["auto", 1, 2, 5])),
        overlap=tuple(data.draw(st.sampled_from([0, n])) for n in shortest),
    )
    assert_allclose(flow, whole, rtol=0, atol=TOLERANCE)


@hypothesis.settings(max_examples=max(50, hypothesis.settings.default.max_examples // 4))
@given(data=st.data())
def test_direct_flows_are_equal_to_the_bit(engines: dict[str, Engine], data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=12))
    mask = data.draw(spatial_masks(labels.shape))
    make = topo_dask.generate_direct_flows
    whole = make(labels, mask)
    name = data.draw(ENGINES)
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, MOST_BLOCKS[name])
    flow = flows_of_store(labels, blocks, engines[name], mask, method="direct")
    assert_array_equal(flow, whole)
    assert_array_equal(flows_of_chunks(data, make, labels, mask), whole)


@hypothesis.settings(max_examples=max(50, hypothesis.settings.default.max_examples // 4))
@given(data=st.data())
def test_blended_flows_are_those_of_the_whole_volume(data: st.DataObject) -> None:
    """Tiles that overlap agree where they do, so blending them changes nothing."""
    labels = data.draw(VOLUMES)
    mask = data.draw(spatial_masks(labels.shape))
    settings = data.draw(flow_settings())
    whole = topo_dask.generate_diffusion_flows(labels, spatial_mask=mask, **settings)
    exact = data.draw(st.booleans())
    if exact:
        settings["context"] = settings["n_iter"]
    shape = labels.shape
    blocks = fewer_blocks(data.draw(block_shapes(shape)), shape, 6)
    shortest = [min(b, n % b or b) if b < n else n for b, n in zip(blocks, shape, strict=True)]
    overlap = tuple(data.draw(st.integers(0, n)) for n in shortest)
    flow = flows_of_store(labels, blocks, "sync", mask, overlap=overlap, **settings)
    assert_allclose(flow, whole, rtol=0, atol=1e-6 if exact else TOLERANCE)


# ----------------------------------------------------------------------------------- blending


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """A volume of 1 to 3 axes and tiles: a regular layout, or any boxes."""
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    if draw(st.booleans()):
        crop = tuple(draw(st.integers(1, n + 2)) for n in shape)
        crop = fewer_blocks(crop, shape, 27)
        overlap = tuple(draw(st.integers(0, c - 1)) for c in crop)
        tiles = topo_dask.compute_subcrop_slices(shape, crop, overlap)
        assume(len(tiles) <= 100)
        return shape, tiles
    tiles = []
    for _ in range(draw(st.integers(1, 6))):
        starts = [draw(st.integers(0, n - 1)) for n in shape]
        tiles.append(
            tuple(slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))
        )
    return shape, tiles


@given(tilings(), SEEDS)
def test_a_constant_comes_back_constant(
    tiling: tuple[tuple[int, ...], list[tuple[slice, ...]]], seed: int
) -> None:
    shape, tiles = tiling
    value = np.random.default_rng(seed).normal(scale=1000, size=2)
    arrays = [
        np.broadcast_to(value.reshape(2, *[1] * len(shape)), (2, *(s.stop - s.start for s in tile)))
        for tile in tiles
    ]
    covered = np.zeros(shape, dtype=bool)
    for tile in tiles:
        covered[tile] = True
    whole = topo_dask.stitch_volumes(shape, tiles, arrays)
    expected = np.broadcast_to(value[:, None], (2, covered.sum()))
    assert_allclose(whole[:, covered], expected, rtol=2e-7, atol=0)
    assert not whole[:, ~covered].any()


# -------------------------------------------------------------------------------- names of ids


@hypothesis.settings(max_examples=max(50, hypothesis.settings.default.max_examples // 4))
@given(data=st.data())
def test_the_names_of_instances_change_no_flow(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=12))
    settings = data.draw(flow_settings())
    rng = np.random.default_rng(data.draw(SEEDS))
    old, where = np.unique(labels, return_inverse=True)
    new = np.zeros(len(old), dtype=np.uint64)
    names = rng.choice(
        np.array([1, 2, 3, 2**31, 2**32 + 1, 2**63, 2**63 + 1, 2**64 - 1], "u8"), 8, False
    )
    new[old > 0] = names[: (old > 0).sum()]
    renamed = new[where].reshape(labels.shape)
    for make, options in (
        (topo_dask.generate_diffusion_flows, settings),
        (topo_dask.generate_direct_flows, {}),
    ):
        assert_array_equal(make(renamed, **options), make(labels, **options))
    blocks = fewer_blocks(data.draw(block_shapes(labels.shape)), labels.shape, 3)
    assert_array_equal(
        flows_of_store(renamed, blocks, "sync", **settings),
        flows_of_store(labels, blocks, "sync", **settings),
    )
