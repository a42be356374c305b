"""Layouts of tiles: coverage, weights, areas of interest, owners, order, tiles alive."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.area import range_counts, touching_boxes, touching_mask, touching_polygon
from topo_dask.graph.blend import TileJob, TileSettings, fuse_parts
from topo_dask.graph.tiles import TileGrid, TilePlan, tile_blocks, tile_chunks, tile_grid
from topo_dask.grid import BlockGrid

seeds = st.integers(0, 2**32 - 1)


@st.composite
def grids(draw: st.DrawFn, *, some: bool = True) -> TileGrid:
    """Tiles of 1 to 3 axes, the last ones moved or shrunk; perhaps not all of them count."""
    shape = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    tile = tuple(draw(st.integers(1, 9)) for _ in shape)
    overlap = tuple(draw(st.integers(0, t - 1)) for t in tile)
    context = draw(st.integers(0, 3))
    last = draw(st.sampled_from(["move", "shrink"]))
    tiles = tile_grid(shape, tile, overlap, context=context, last=last)
    assume(len(tiles) <= 150)
    if some and draw(st.booleans()):
        rng = np.random.default_rng(draw(seeds))
        tiles = tiles.only(rng.random(tiles.counts) < draw(st.sampled_from([0.2, 0.7])))
    return tiles


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    """Tiles, and blocks of any shape."""
    tiles = draw(grids())
    blocks = tuple(draw(st.integers(1, n)) for n in tiles.shape)
    plan = TilePlan(tiles, BlockGrid(tiles.shape, blocks))
    assume(len(plan.blocks) <= 100)
    return plan


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.nightly
@given(grids(some=False))
def test_every_voxel_is_covered_and_every_tile_is_needed(tiles: TileGrid) -> None:
    for starts, stops, n in zip(tiles.starts, tiles.stops, tiles.shape, strict=True):
        assert starts[0] == 0
        assert stops[-1] == n
        assert (starts[1:] <= stops[:-1]).all()
        assert (np.diff(starts) > 0).all()
        assert (np.diff(stops) > 0).all()


@pytest.mark.nightly
@pytest.mark.parametrize("blend", ["cosine", "linear", "mean"])
@given(tiles=grids(some=False))
def test_weights_are_positive_and_sum_to_one(blend: str, tiles: TileGrid) -> None:
    total = np.zeros(tiles.shape)
    weights = tiles.weights(blend)
    for number in range(len(tiles)):
        region = tiles.region(number)
        index = np.unravel_index(number, tiles.counts)
        weight = np.ones(())
        for along, i, length in zip(weights, index, region.shape, strict=True):
            assert (along[i, :length] > 0).all()
            weight = weight[..., None] * along[i, :length]
        total[region.slices] += weight
    assert_allclose(total, 1, rtol=0, atol=1e-14)


@pytest.mark.nightly
@given(grids(some=False))
def test_the_old_name_gives_the_same_tiles(tiles: TileGrid) -> None:
    for last in ("move", "shrink"):
        again = tile_grid(tiles.shape, tiles.largest, 0, last=last)
        slices = topo_dask.compute_subcrop_slices(tiles.shape, tiles.largest, 0, last=last)
        assert slices == [again.region(n).slices for n in range(len(again))]


@pytest.mark.parametrize(
    ("error", "argument", "options"),
    [
        (InvalidArgument, "overlap", {"overlap": 8}),
        (InvalidArgument, "overlap", {"overlap": (9, 1)}),
        (InvalidArgument, "overlap", {"overlap": -1}),
        (InvalidArgument, "tile", {"tile": (8, 8, 8)}),
        (InvalidArgument, "tile", {"tile": 0}),
        (InvalidType, "tile", {"tile": 8.5}),
        (InvalidArgument, "context", {"context": (1, 2, 3)}),
        (InvalidArgument, "last", {"last": "cut"}),
    ],
)
def test_bad_layouts(error: type[Exception], argument: str, options: dict[str, object]) -> None:
    with pytest.raises(error, match=f"^{argument}: got"):
        tile_grid(**{"shape": (20, 30), "tile": 8, "overlap": 2, **options})


# --------------------------------------------------------------------------- areas of interest


@pytest.mark.nightly
@given(grids(some=False), seeds, st.data())
def test_a_mask_at_any_scale_touches_what_it_covers(
    tiles: TileGrid, seed: int, data: st.DataObject
) -> None:
    small = tuple(data.draw(st.integers(1, n)) for n in tiles.shape)
    mask = np.random.default_rng(seed).random(small) < 0.1
    scale = list(zip(small, tiles.shape, strict=True))
    index = [np.arange(n) * m // n for m, n in scale]
    full = mask[np.ix_(*index)]
    found = touching_mask(mask, tiles.starts, tiles.stops, scale).ravel()
    expected = [full[tiles.region(n).slices].any() for n in range(len(tiles))]
    assert_array_equal(found, expected)
    counts = range_counts(full, tiles.starts, tiles.stops).ravel()
    assert_array_equal(counts, [full[tiles.region(n).slices].sum() for n in range(len(tiles))])


@pytest.mark.nightly
@given(grids(some=False), st.data())
def test_boxes(tiles: TileGrid, data: st.DataObject) -> None:
    full, boxes = np.zeros(tiles.shape, dtype=bool), []
    for _ in range(data.draw(st.integers(0, 3))):
        low = [data.draw(st.integers(0, n - 1)) for n in tiles.shape]
        high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, tiles.shape, strict=True)]
        boxes.append((low, high))
        full[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    found = touching_boxes(boxes, tiles.starts, tiles.stops, tiles.shape).ravel()
    assert_array_equal(found, [full[tiles.region(n).slices].any() for n in range(len(tiles))])


@pytest.mark.nightly
@given(st.lists(st.tuples(st.integers(-4, 44), st.integers(-4, 44)), min_size=3, max_size=6))
def test_a_polygon_touches_the_tiles_that_hold_its_points(corners: list[tuple[int, int]]) -> None:
    tiles = tile_grid((40, 40), 7, 2)
    found = touching_polygon(corners, tiles.starts, tiles.stops)
    # Points on a fine raster inside the polygon, by the even-odd rule, none of them on an edge.
    raster = (np.arange(400) + 0.5) / 10 + 0.0123
    y, x = np.meshgrid(raster, raster + 0.0231, indexing="ij")
    inside = np.zeros(y.shape, dtype=bool)
    for (y0, x0), (y1, x1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    for i, j in itertools.product(range(tiles.counts[0]), range(tiles.counts[1])):
        a, b = tiles.region(i * tiles.counts[1] + j).slices
        within = (y > a.start) & (y < a.stop) & (x > b.start) & (x < b.stop)
        if inside[within].any():
            assert found[i, j]
    around = (np.min(corners, axis=0) - 1, np.max(corners, axis=0) + 1)
    box = touching_boxes([around], tiles.starts, tiles.stops, tiles.shape)
    assert not (found & ~box).any()


# --------------------------------------------------------------------------------------- plans


@pytest.mark.nightly
@given(plans())
def test_each_tile_is_computed_by_one_block_that_it_touches(plan: TilePlan) -> None:
    owner = {n: b for b in range(len(plan.blocks)) for n in plan.own(b)}
    assert sorted(owner) == np.flatnonzero(plan.tiles.selected.ravel()).tolist()
    done: set[int] = set()
    order = plan.order.tolist()
    for position, block in enumerate(order):
        needed = {order[p] for p in plan.after[position]}
        assert needed <= done
        region, touching = plan.blocks.region(block), plan.touching(block)
        expected = [n for n in sorted(owner) if plan.tiles.region(n).intersect(region).size]
        assert touching.numbers == expected
        assert touching.owners.tolist() == [owner[n] for n in expected]
        assert {owner[n] for n in expected} - {block} == needed
        for other in needed:
            assert block in plan.targets(other)
        done.add(block)
    touched = {b for n in owner for b in plan.blocks.touching(plan.tiles.region(n))}
    assert touched == done


@pytest.mark.nightly
@given(plans(), st.integers(1, 12), seeds)
def test_no_schedule_keeps_more_tiles_alive_than_planned(
    plan: TilePlan, ahead: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    order, count = plan.order.tolist(), len(plan.order)
    planned = plan.alive(ahead=ahead)
    place = {b: p for p, b in enumerate(order)}
    last = {
        n: max(place[b] for b in plan.blocks.touching(plan.tiles.region(n)))
        for b in order
        for n in plan.own(b)
    }
    pending = {n: set(plan.blocks.touching(plan.tiles.region(n))) for n in last}
    unfinished, running, alive = list(range(count)), set(), set()
    while unfinished:
        first = unfinished[0]
        ready = [
            p
            for p in unfinished
            if p < first + ahead and p not in running and not set(plan.after[p]) & set(unfinished)
        ]
        if ready and (not running or rng.random() < 0.6):
            started = ready[0]
            running.add(started)
            alive |= set(plan.own(order[started]))
            assert len(alive) <= planned
        else:
            ended = int(rng.choice(sorted(running)))
            running.remove(ended)
            unfinished.remove(ended)
            for n in plan.touching(order[ended]).numbers:
                pending[n].discard(order[ended])
                if not pending[n]:
                    alive.discard(n)
    assert not alive


@pytest.mark.parametrize(("side", "seconds"), [(40_000, 1.0), (100_000, 10.0)])
def test_large_images_are_planned_at_once_and_keep_few_tiles_alive(
    side: int, seconds: float
) -> None:
    ahead = 6  # two workers
    best = np.inf
    for _ in range(3):  # what else the machine does is not ours
        began = time.perf_counter()
        tiles = tile_grid((side, side), 256, 64)
        blocks = BlockGrid(tiles.shape, tile_blocks(tiles, tile_chunks(tiles), ahead=ahead))
        plan = TilePlan(tiles, blocks)
        alive, after = plan.alive(ahead=ahead), plan.after
        best = min(best, time.perf_counter() - began)
    assert best < seconds
    assert len(after) == len(plan.blocks)
    assert alive <= 0.01 * len(tiles)


@pytest.mark.parametrize("shape", [(2_000, 60_000), (60_000, 2_000)])
def test_long_images_keep_no_more_tiles_alive_than_they_are_wide(shape: tuple[int, ...]) -> None:
    tiles = tile_grid(shape, 256, 64)
    plan = TilePlan(tiles, BlockGrid(shape, tile_blocks(tiles, tile_chunks(tiles), ahead=6)))
    assert plan.alive(ahead=6) < 0.12 * len(tiles)


# ------------------------------------------------------------------------------------ blending


def run_plan(plan: TilePlan, image: np.ndarray, settings: TileSettings, rng: object) -> np.ndarray:
    """Blocks in any order that their needs allow."""
    job = TileJob(lambda part: part, plan, settings, {})
    parts, out = {}, np.zeros(plan.tiles.shape, dtype=settings.dtype)
    blocks = plan.order.tolist()
    for block in rng.permutation(blocks):
        for target, flat in job.parts(int(block), lambda r: image[r.slices]).items():
            parts[int(block), target] = flat
    for position in rng.permutation(len(blocks)):
        block, owners = blocks[position], job.owners(int(position))
        mine = {o: parts[o, block] for o in owners}
        out[plan.blocks.region(block).slices] = fuse_parts(plan, block, mine, settings)
    return out


@pytest.mark.parametrize("blend", ["cosine", "linear", "mean", "max", "nearest"])
@pytest.mark.nightly
@given(plan=plans(), seed=seeds, dtype=st.sampled_from(["f2", "f4", "f8", "u1", "i4", "?"]))
def test_where_tiles_agree_their_value_comes_back_exactly(
    blend: str, plan: TilePlan, seed: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    image = (rng.normal(size=plan.tiles.shape) * 50).astype(dtype)
    covered = np.zeros(plan.tiles.shape, dtype=bool)
    for number in np.flatnonzero(plan.tiles.selected.ravel()):
        covered[plan.tiles.region(int(number)).slices] = True
    got = run_plan(plan, image, TileSettings(blend=blend, dtype=str(np.dtype(dtype))), rng)
    assert_array_equal(got, np.where(covered, image, 0).astype(dtype))


def test_infinite_and_missing_values_stay_what_they_are() -> None:
    tiles = tile_grid((12,), 6, 3)
    plan = TilePlan(tiles, BlockGrid((12,), (4,)))
    image = np.array([0, np.inf, 1, 2, -np.inf, 3, np.nan, 4, 5, np.inf, 6, 7])
    for blend in ("cosine", "linear", "mean", "max", "nearest"):
        settings = TileSettings(blend=blend, dtype="float64")
        assert_array_equal(run_plan(plan, image, settings, np.random.default_rng(0)), image)
