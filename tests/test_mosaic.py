"""Mosaics: as scipy on the whole canvas, for any blocks and workers; and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from topo_dask import cosine_blend_weight, fuse_mosaic, read_tile_table
from topo_dask.cli import main
from topo_dask.errors import (
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    OutputExists,
    TopoError,
)
from topo_dask.graph.alive import measured_alive, planned_alive
from topo_dask.graph.mosaic import mosaic_blocks, place_tiles, transform_matrices
from topo_dask.grid import BlockGrid
from topo_dask.storage import create_array, open_array, voxel_geometry

Array = npt.NDArray[Any]


def rotation(angle: float, axes: int = 2) -> Array:
    turn = np.eye(axes)
    turn[-2:, -2:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def scattered(
    per_axis: tuple[int, ...], edge: int, seed: int = 0, dtype: Any = np.float32
) -> tuple[list[Array], list[Array]]:
    """Tiles of noise on a grid with overlap, jitter and rotation."""
    rng = np.random.default_rng(seed)
    axes = len(per_axis)
    tiles, transforms = [], []
    for at in np.ndindex(per_axis):
        high = 1 if np.dtype(dtype).kind == "f" else 200
        tiles.append((rng.random((edge,) * axes) * high).astype(dtype))
        turn = rotation(rng.uniform(-0.1, 0.1), axes)
        shift = np.array(at) * edge * 0.8 + rng.uniform(-2, 2, axes)
        transforms.append(np.column_stack([turn, shift]))
    return tiles, transforms


def on_canvas(
    tiles: list[Array], transforms: list[Array], shape: tuple[int, ...], origin: Any, order: int
) -> list[tuple[Array, Array, Array]]:
    """By scipy, tile by tile on the whole canvas: values, weights, where the tile is."""
    out = []
    for tile, transform in zip(tiles, transforms, strict=True):
        matrix = np.linalg.inv(transform[:, :-1])
        offset = matrix @ (np.asarray(origin) - transform[:, -1])
        weight = cosine_blend_weight(tile.shape).astype(float)

        def moved(
            values: Array, order: int, matrix: Array = matrix, offset: Array = offset
        ) -> Array:
            return ndimage.affine_transform(
                values.astype(float), matrix, offset, output_shape=shape, order=order
            )

        out.append((moved(tile, order), moved(weight, 1), moved(np.ones(tile.shape), 1) > 0.5))
    return out


def blended(placed: list[tuple[Array, Array, Array]], blend: str) -> Array:
    if blend in ("cosine", "mean"):
        weights = [w if blend == "cosine" else inside.astype(float) for _, w, inside in placed]
        total = sum(v * w for (v, _, _), w in zip(placed, weights, strict=True))
        mass = sum(weights)
        return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)
    out = np.zeros_like(placed[0][0])
    covered = np.zeros(out.shape, dtype=bool)
    for values, _, inside in placed:
        take = inside & ~covered
        if blend == "max":
            take |= inside & (values > out)
        out[take] = values[take]
        covered |= inside
    return out


@pytest.mark.parametrize("blend", ["cosine", "mean", "max", "first"])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("per_axis", [(3, 4), (2, 2, 2)])
def test_same_pixels_as_scipy_on_the_whole_canvas(
    tmp_path: Path, per_axis: tuple[int, ...], order: int, blend: str
) -> None:
    axes = len(per_axis)
    tiles, transforms = scattered(per_axis, 32 if axes == 2 else 14)
    result = fuse_mosaic(
        tiles,
        transforms,
        output=tmp_path / "out.zarr",
        order=order,
        blend=blend,
        blocks=(25,) * axes,
        cluster="sync",
    )
    origin = voxel_geometry(result.array).translation[3 - axes :]
    placed = on_canvas(tiles, transforms, result.array.shape, origin, order)
    np.testing.assert_allclose(result.array[...], blended(placed, blend), atol=1e-5)
    assert (result.array[...] == 0).any()
    lazy = fuse_mosaic(tiles, transforms, order=order, blend=blend, blocks=(17,) * axes)
    assert isinstance(lazy, da.Array)
    assert np.asarray(lazy.compute(scheduler="sync")).tobytes() == result.array[...].tobytes()


def test_the_same_bytes_for_any_engine_and_kind_of_tile(tmp_path: Path) -> None:
    arrays, transforms = scattered((2, 3), 24, dtype=np.uint16)
    stored: list[Any] = []
    for number, tile in enumerate(arrays):
        if number % 3 == 0:
            np.save(tmp_path / f"{number}.npy", tile)
            stored.append(str(tmp_path / f"{number}.npy"))
        elif number % 3 == 1:
            create_array(tmp_path / f"{number}.zarr", tile.shape, (10, 9), tile.dtype)[...] = tile
            stored.append(tmp_path / f"{number}.zarr")
        else:
            stored.append(da.from_array(tile, chunks=7))
    found = set()
    for tiles in (arrays, stored):
        for cluster in ("sync", "threads"):
            result = fuse_mosaic(
                tiles,
                transforms,
                output=tmp_path / "out.zarr",
                blocks=(20, 31),
                cluster=cluster,
                overwrite=True,
            )
            assert result.array.dtype == np.uint16
            found.add(result.array[...].tobytes())
        found.add(np.asarray(fuse_mosaic(tiles, transforms, blocks=16).compute()).tobytes())
    assert len(found) == 1


@given(
    axes=st.sampled_from([2, 3]),
    value=st.floats(-100, 100, allow_subnormal=False),
    order=st.sampled_from([0, 1, 3]),
    blend=st.sampled_from(["cosine", "mean", "max", "first"]),
    seed=st.integers(0, 99),
    blocks=st.integers(3, 20),
)
@settings(max_examples=60)
def test_a_constant_comes_back_constant(
    axes: int, value: float, order: int, blend: str, seed: int, blocks: int
) -> None:
    tiles, transforms = scattered((2,) * axes, 7, seed)
    tiles = [np.full(t.shape, value) for t in tiles]
    options: dict[str, Any] = {"order": order, "blend": blend, "background": 1e6}
    out = fuse_mosaic(tiles, transforms, blocks=blocks, **options).compute(scheduler="sync")
    covered = out != 1e6
    assert covered.any()
    np.testing.assert_allclose(out[covered], value, rtol=1e-6, atol=1e-9)
    if blend != "first":
        again = fuse_mosaic(tiles[::-1], transforms[::-1], blocks=blocks + 1, **options)
        np.testing.assert_allclose(again.compute(scheduler="sync"), out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 3])
def test_a_linear_field_comes_back_where_tiles_agree(order: int) -> None:
    _, transforms = scattered((3, 3), 30)
    y, x = np.mgrid[:30, :30].astype(float)
    tiles = []
    for t in transforms:
        at = np.einsum("ij,jyx->iyx", t, np.stack([y, x, np.ones_like(y)]))
        tiles.append(2 * at[0] - 3 * at[1] + 5)
    out = fuse_mosaic(tiles, transforms, (60, 60), origin=(5, 5)).compute()
    wanted = 2 * (np.mgrid[:60, :60][0] + 5) - 3 * (np.mgrid[:60, :60][1] + 5) + 5
    np.testing.assert_allclose(out, wanted, atol=1e-9)


def test_a_regular_grid_of_tiles_gives_the_image_back() -> None:
    image = np.random.default_rng(0).integers(0, 2**16, (3, 50, 70), dtype=np.uint16)
    places = [(y, x) for y in (0, 20, 30) for x in (0, 25, 50)]
    tiles = [image[:, y : y + 20, x : x + 25] for y, x in places]
    out = fuse_mosaic(tiles, np.array(places) * 0.325, spacing=0.325)
    np.testing.assert_array_equal(out.compute()[:, :40], image[:, :40])


def test_physical_units_and_voxel_sizes() -> None:
    """A tile of half the resolution shows the same scene at the same place."""
    y, x = np.mgrid[:40, :40].astype(float)
    scene = 3 * y - x
    fine, coarse = scene[:, :20], scene[::2, 20::2]
    out = fuse_mosaic([fine, coarse], [(0, 0), (0, 10)], tile_spacing=[(0.5, 0.5), (1, 1)])
    assert out.shape == (40, 39)
    np.testing.assert_allclose(out.compute()[:38], scene[:38, :39])


def test_labels_of_64_bits_keep_their_ids() -> None:
    ids = np.array([[2**63 + 1, 5], [2**64 - 1, 2**53 + 1]], dtype=np.uint64)
    tile = np.kron(ids, np.ones((4, 4), dtype=np.uint64))
    for blend in ("first", "max"):
        out = fuse_mosaic([tile, tile], [(0, 0), (0, 0)], order=0, blend=blend).compute()
        np.testing.assert_array_equal(out, tile)


def test_projective_transforms_meet() -> None:
    """Two pictures of one plane from two sides fit together."""
    y, x = np.mgrid[:50, :50].astype(float)
    maps = [np.array([[1, 0, 0], [0, 1, 0], [4e-3, k, 1]]) for k in (0.0, 3e-3)]
    tiles = []
    for m in maps:
        h = np.einsum("ij,jyx->iyx", m, np.stack([y, x, np.ones_like(y)]))
        tiles.append(7 * h[0] / h[2] + h[1] / h[2])
    out = fuse_mosaic(tiles, maps, (35, 35), order=3).compute()
    rows, columns = np.mgrid[:35, :35]
    np.testing.assert_allclose(out[8:, 8:], (7 * rows + columns)[8:, 8:], atol=1e-3)


@pytest.mark.parametrize("axes", [2, 3])
def test_vectors_turn_with_their_tile(axes: int) -> None:
    """A field that points to one place does so again after the tiles were cut out turned."""
    tiles, transforms = scattered((2,) * axes, 20 if axes == 2 else 12, seed=3)
    centre = np.full(axes, 7.3)
    flows = []
    for tile, t in zip(tiles, transforms, strict=True):
        at = np.indices(tile.shape).astype(float)
        toward = np.linalg.inv(t[:, :-1]) @ (centre - t[:, -1])
        away = toward.reshape(-1, *[1] * axes) - at
        flows.append((away / np.maximum(np.linalg.norm(away, axis=0), 1e-9)).astype(np.float32))
    shape = (24,) * axes
    out = fuse_mosaic(flows, transforms, shape, origin=0, vector=True).compute()
    at = np.indices(shape) - centre.reshape(-1, *[1] * axes)
    far = (np.linalg.norm(at, axis=0) > 4) & (np.linalg.norm(out, axis=0) > 0)
    cosine = -(out * at).sum(axis=0) / np.linalg.norm(at, axis=0)
    assert far.mean() > 0.4
    assert np.degrees(np.arccos(np.clip(cosine[far], -1, 1))).max() < 1
    np.testing.assert_allclose(np.linalg.norm(out, axis=0)[far], 1, atol=1e-6)


def test_many_tiles_are_planned_fast_and_found_by_every_block() -> None:
    rng = np.random.default_rng(0)
    shifts = rng.uniform(0, 2000, (3000, 2))
    placement = place_tiles(transform_matrices(shifts, count=3000), [(50, 60)] * 3000)
    grid = BlockGrid(placement.shape, (128, 100))
    starts, tiles = placement.index(grid)
    for number in rng.integers(0, len(grid), 20):
        region = grid.region(int(number))
        low, high = np.array(region.start), np.array(region.stop)
        reach = (placement.low[:, 1:] < high) & (placement.high[:, 1:] > low)
        found = tiles[starts[number] : starts[number + 1]]
        np.testing.assert_array_equal(found, np.flatnonzero(reach.all(axis=1)))


class Counted:
    """A tile that says what was read of it."""

    def __init__(self, array: Array) -> None:
        self.array, self.read = array, 0
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key: tuple[slice, ...]) -> Array:
        self.read = max(self.read, self.array[key].size)
        return self.array[key]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_block_reads_only_what_it_needs(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Counted(np.ones((2600, 2600), dtype=np.float32))
    monkeypatch.setattr("topo_dask.run.mosaic.open_tile", lambda source: source)
    turn = np.column_stack([rotation(0.3), (0, 0)])
    out = fuse_mosaic([tile], [turn], blocks=100, order=order)
    assert out.blocks[12, 12].compute(scheduler="sync").min() == 1
    assert 0 < tile.read < (150**2 if order < 3 else 1500**2)


def test_memory_does_not_grow_with_the_mosaic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", rng.random((64, 64), dtype=np.float32))

    def peak(across: int) -> int:
        places = [(y * 50.5, x * 50.5) for y in range(across) for x in range(across)]
        tiles = [tmp_path / f"{n % 4}.npy" for n in range(len(places))]
        tracemalloc.start()
        fuse_mosaic(tiles, places, output=tmp_path / f"{across}.zarr", blocks=128, cluster="sync")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    small, large = peak(4), peak(16)
    assert large < 2 * small + 2**20, (small, large)


@pytest.mark.parametrize("cluster", ["sync", "threads"])
@pytest.mark.parametrize("per_axis", [(2, 14), (14, 2), (3, 3, 3)])
def test_few_tiles_are_alive_at_once(
    per_axis: tuple[int, ...], cluster: str, tmp_path: Path
) -> None:
    """Blocks come so that a long mosaic is walked along, not across."""
    tiles, transforms = scattered(per_axis, 16)
    result = fuse_mosaic(tiles, transforms, output=tmp_path / "out.zarr", blocks=8, cluster=cluster)
    planned, measured = (result.details[f"alive, {name}"] for name in ("planned", "measured"))
    assert 0 < measured <= planned <= len(tiles)
    if len(per_axis) == 2:
        assert planned <= len(tiles) / 2
    whole = fuse_mosaic(tiles, transforms).compute()
    np.testing.assert_array_equal(result.array[...], whole)


@given(st.integers(0, 999), st.integers(1, 9), st.integers(4, 20))
@settings(max_examples=40)
def test_no_schedule_keeps_more_tiles_alive_than_planned(seed: int, ahead: int, edge: int) -> None:
    rng = np.random.default_rng(seed)
    shifts = rng.uniform(0, 50, (15, 2))
    placement = place_tiles(transform_matrices(shifts, count=15), [(9, 12)] * 15)
    blocks = mosaic_blocks(placement, BlockGrid(placement.shape, (edge, edge + 3)))
    positions = np.arange(len(blocks.numbers))
    planned = planned_alive(*blocks.lives(positions, positions), ahead=ahead)
    # Any schedule in which no block begins so far behind the first unfinished one.
    began, ended = np.full((2, len(positions)), np.nan)
    clock = itertools.count()
    running: list[int] = []
    while np.isnan(ended).any():
        first = int(np.flatnonzero(np.isnan(ended))[0])
        ready = [p for p in range(first, min(first + ahead, len(positions))) if np.isnan(began[p])]
        if ready and (not running or rng.random() < 0.6):
            began[ready[0]] = next(clock)
            running.append(ready[0])
        else:
            ended[running.pop(int(rng.integers(len(running))))] = next(clock)
    assert 0 < measured_alive(*blocks.lives(began, ended)) <= planned <= 15


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    tiles, transforms = scattered((2, 2), 16)
    options: dict[str, Any] = {"output": tmp_path / "out.zarr", "cluster": "sync"}
    assert fuse_mosaic(tiles, transforms, **options).seconds > 0
    with pytest.raises(OutputExists):
        fuse_mosaic(tiles, transforms, **options)
    assert fuse_mosaic(tiles, transforms, resume=True, **options).seconds == 0
    with pytest.raises(OutputExists, match="other settings"):
        fuse_mosaic(tiles, transforms, resume=True, order=0, **options)
    assert fuse_mosaic(tiles, transforms, overwrite=True, order=0, **options).seconds > 0


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("transforms", "named"),
    [
        ([(0, 0), (1, 2, 3), (0, 0)], "transform 1 of shape (3,)"),
        ([(0, 0), np.eye(2), (0, 0)], "transform 1 of shape (2, 2)"),
        ([(0, 0), (0, np.nan), (0, 0)], "transform 1 with NaN"),
        ([(0, 0), [[1, 2, 0], [2, 4, 0]], [[0, 0, 1], [0, 0, 1]]], "transform 1, which is singu"),
        ([(0, 0), [[1, 0, 0], [0, 1, 0], [-0.5, 0, 1]], (0, 0)], "transform 1, which moves a par"),
        ([(0, 0), [[1, 0, 0], [0, 1, 0], [1, 0, 0]], (0, 0)], "transform 1, which moves a part"),
        ([(0, 0), "ab", (0, 0)], "transform 1, which is not numbers"),
        ([(0, 0), [(1, 2), (3,)], (0, 0)], "transform 1, which is not numbers"),
        ([(0, 0), (0, 0)], "2 for 3 tiles"),
    ],
)
def test_wrong_transforms_are_named(transforms: Any, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        fuse_mosaic([np.ones((4, 4))] * 3, transforms)
    assert named in str(caught.value)


def test_a_large_shift_is_not_singular() -> None:
    far = np.array([[1, 0, 1e9], [0, 1, 0], [0, 1e-12, 1]])
    assert fuse_mosaic([np.ones((4, 4))], [far]).compute().max() == 1


@pytest.mark.parametrize(
    ("tiles", "options", "kind", "named"),
    [
        ([], {}, InvalidArgument, "no tile at all"),
        ("tiles.csv", {}, InvalidType, "list"),
        ([3], {}, InvalidType, "int"),
        ([np.ones((2, 4, 4)), np.ones((4, 4)), np.ones((2, 4, 4))], {}, InvalidArgument, "tile 1"),
        ([np.ones((0, 4))], {}, InvalidArgument, "tile 0"),
        ([np.ones((4, 4), dtype=complex)], {}, InvalidType, "tile 0 of complex128"),
        ([np.ones((4, 4))], {"vector": True}, InvalidArgument, "2 components"),
        ([np.ones((2, 4, 4))], {"vector": True, "blend": "max"}, InvalidArgument, "blend"),
        ([np.ones((4, 4))], {"unit": True}, InvalidArgument, "unit"),
        ([np.ones((4, 4))], {"order": 2}, InvalidArgument, "order"),
        ([np.ones((4, 4))], {"blend": "min"}, InvalidArgument, "blend"),
        ([np.ones((4, 4))], {"spacing": 0}, InvalidArgument, "spacing"),
        ([np.ones((4, 4))], {"tile_spacing": (1, 2, 3)}, InvalidArgument, "tile_spacing"),
        ([np.ones((4, 4))], {"origin": "here"}, InvalidArgument, "origin"),
        ([np.ones((4, 4))], {"shape": (4,)}, InvalidArgument, "shape"),
        ([np.ones((4, 4))], {"blocks": 0}, InvalidArgument, "blocks"),
        ([np.ones((4, 4))], {"dtype": "text"}, InvalidType, "dtype"),
        ([np.ones((4, 4))], {"background": "sky"}, InvalidType, "background"),
        ([np.ones((4, 4), np.uint8)], {"background": 256}, InvalidArgument, "background"),
        ([np.ones((4, 4))], {"shape": (4, 4), "origin": 9}, InvalidArgument, "none of which"),
        ([np.ones((4, 4))], {"origin": 9}, InvalidArgument, "shape"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiles: Any, options: dict[str, Any], kind: type[TopoError], named: str
) -> None:
    with pytest.raises(kind) as caught:
        fuse_mosaic(tiles, [(0, 0)] * len(tiles), **options)
    assert named in str(caught.value)
    assert caught.value.do


def test_big_endian_and_boolean_tiles() -> None:
    tile = np.arange(12).reshape(3, 4)
    for dtype in (">u2", ">f4", ">i8", bool):
        for order in (0, 1):
            out = fuse_mosaic([tile.astype(dtype)], [(0, 0)], order=order, blend="first")
            np.testing.assert_array_equal(out.compute(), tile.astype(dtype))


def test_tiles_that_touch_nothing_are_named() -> None:
    ones = np.ones((4, 4))
    places = [(0, 0), (100, 0), (3, 3), (0, -5.5)]
    with pytest.warns(UserWarning, match=r"2 of 4 tiles touch nothing.*tile 1 .*tile 3 "):
        out = fuse_mosaic([ones] * 4, places, (6, 6), origin=0)
    assert out.compute().sum() == 16 + 9 - 1


def test_missing_and_truncated_tiles_are_all_listed_before_work_starts(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        path = tmp_path / f"{number}.zarr"
        create_array(path, (16, 16), (8, 8), "uint16")[...] = np.arange(256).reshape(16, 16)
        paths.append(path)
    np.save(tmp_path / "5.npy", np.ones((16, 16)))
    paths.append(tmp_path / "5.npy")
    places = [(0, 10 * n) for n in range(len(paths))]
    out = tmp_path / "out.zarr"

    for number in (1, 4):
        chunk = paths[number] / "c" / "1" / "0"
        chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(InvalidData) as damaged:
        fuse_mosaic(paths, places, output=out, cluster="sync")
    assert "2 of 6" in str(damaged.value)
    assert "tile 1 (" in str(damaged.value)
    assert "tile 4 (" in str(damaged.value)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []

    with pytest.raises(InvalidData, match="tile 1"):
        fuse_mosaic(paths, places, output=out, cluster="sync", check=False)

    paths[5].write_bytes(paths[5].read_bytes()[:-1])
    paths[2] = tmp_path / "nowhere.zarr"
    with pytest.raises(InputNotFound) as missing:
        fuse_mosaic(paths, places, output=out)
    assert "2 of 6" in str(missing.value)
    assert "tile 2: " in str(missing.value)
    assert "tile 5: " in str(missing.value)


# ------------------------------------------------------------------------------------ tables


def written(tmp_path: Path) -> tuple[list[Array], list[Array], Array]:
    tiles, transforms = scattered((2, 2), 20, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        np.save(tmp_path / f"{number}.npy", tile)
    return tiles, transforms, np.asarray(fuse_mosaic(tiles, transforms).compute())


def test_csv_and_json_tables(tmp_path: Path) -> None:
    _, transforms, wanted = written(tmp_path)
    with (tmp_path / "tiles.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["Path", "m00", "m01", "m02", "m10", "m11", "m12", "note"])
        lines.writerows([f"{n}.npy", *t.ravel(), "x"] for n, t in enumerate(transforms))
    rows = [{"path": f"{n}.npy", "matrix": t.tolist()} for n, t in enumerate(transforms)]
    (tmp_path / "tiles.json").write_text(json.dumps(rows))
    for name in ("tiles.csv", "tiles.json"):
        table = read_tile_table(tmp_path / name)
        assert len(table) == 4
        np.testing.assert_array_equal(fuse_mosaic(table).compute(), wanted)
    named = {"tiles": rows, "shape": [25, 30], "origin": [3, 4], "spacing": 1}
    (tmp_path / "tiles.json").write_text(json.dumps(named))
    assert fuse_mosaic(read_tile_table(tmp_path / "tiles.json")).shape == (25, 30)


def test_the_command_fuses_a_table(tmp_path: Path) -> None:
    _, transforms, wanted = written(tmp_path)
    rows = [{"path": f"{n}.npy", "matrix": t.tolist()} for n, t in enumerate(transforms)]
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps(rows))
    out = tmp_path / "out.zarr"
    words = ["fuse", str(table), str(out), "--cluster", "sync", "--blocks", "16,20"]
    done = CliRunner().invoke(main, [*words, "--order", "1", "--no-progress"])
    assert done.exit_code == 0, done.output
    assert "Mosaic of 4 tiles" in done.output
    np.testing.assert_array_equal(open_array(out, argument="x", axes=(2,))[...], wanted)
    again = CliRunner().invoke(main, [*words, "--shape", "5,5", "--origin", "900.5,0"])
    assert again.exit_code == 1
    assert "none of which reaches" in again.output


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("t.csv", "path,y,x\na,1,2\nb,,3\nc,one,2\n,1,2\n", "line 3: neither"),
        ("t.csv", "path,y,x\na,1,2\nb,,3\nc,one,2\n,1,2\n", "line 4: could not"),
        ("t.csv", "path,y,x\na,1,2\nb,,3\nc,one,2\n,1,2\n", "line 5: no path"),
        ("t.csv", "name,y,x\na,1,2\n", "a column 'path'"),
        ("t.csv", "path,y,x\n", "no tile at all"),
        ("t.json", "{", "JSONDecodeError"),
        ("t.json", '{"a": 1}', "a list of tiles"),
        ("t.json", '[{"path": "a"}]', "tile 0: neither"),
        ("t.json", '[{"path": "a", "translation": [0, NaN]}]', "tile 0: a position that is not"),
        ("t.ome.xml", "<OME", "ParseError"),
        ("t.txt", "", ".csv"),
    ],
)
def test_bad_tables_are_explained(tmp_path: Path, name: str, text: str, named: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        read_tile_table(tmp_path / name)
    assert named in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="not there"):
        read_tile_table(tmp_path / "t.csv")


def stage(number: int) -> dict[str, Any]:
    return {
        "axes": "YX",
        "PhysicalSizeX": 500,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm",
        "Plane": {
            "PositionX": 0.01 * number,
            "PositionXUnit": "mm",
            "PositionY": 2.25 * number,
            "PositionYUnit": "µm",
        },
    }


def test_ome_tiffs_bring_their_stage_positions(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tiles = [np.random.default_rng(n).integers(0, 255, (30, 32), np.uint8) for n in range(3)]
    places = [(2.25 * n, 10.0 * n) for n in range(3)]
    wanted = fuse_mosaic(tiles, places, spacing=0.5).compute()
    with tifffile.TiffWriter(tmp_path / "all.ome.tif") as file:
        for number, tile in enumerate(tiles):
            file.write(tile, metadata=stage(number), tile=(16, 16), compression="zlib")
            tifffile.imwrite(tmp_path / f"{number}.ome.tif", tile, metadata=stage(number))
    (tmp_path / "tiles.csv").write_text("path\n" + "".join(f"{n}.ome.tif\n" for n in range(3)))
    for name in ("all.ome.tif", "tiles.csv"):
        table = read_tile_table(tmp_path / name)
        assert table.tile_spacing is not None
        np.testing.assert_allclose(np.array(table.tile_spacing), 0.5)
        np.testing.assert_allclose(np.array(table.transforms), places)
        np.testing.assert_array_equal(fuse_mosaic(table, blocks=16).compute(), wanted)
    result = fuse_mosaic(
        read_tile_table(tmp_path / "all.ome.tif"), output=tmp_path / "o.zarr", cluster="threads"
    )
    np.testing.assert_array_equal(result.array[...], wanted)


def test_ome_xml_beside_its_tiffs(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tiles = [np.random.default_rng(n).integers(0, 255, (20, 24), np.uint8) for n in range(3)]
    images = []
    for number, tile in enumerate(tiles):
        tifffile.imwrite(tmp_path / f"{number}.tif", tile)
        images.append(
            f'<Image ID="Image:{number}"><Pixels ID="Pixels:{number}" DimensionOrder="XYCZT" '
            'Type="uint8" SizeX="24" SizeY="20" SizeZ="1" SizeC="1" SizeT="1" '
            'PhysicalSizeX="0.5" PhysicalSizeY="0.5"><TiffData>'
            f'<UUID FileName="{number}.tif">urn:uuid:{number}</UUID></TiffData>'
            f'<Plane TheZ="0" TheC="0" TheT="0" PositionX="{8 * number}" PositionY="2.5"/>'
            "</Pixels></Image>"
        )
    name = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    (tmp_path / "all.ome.xml").write_text(f'<OME xmlns="{name}">{"".join(images)}</OME>')
    table = read_tile_table(tmp_path / "all.ome.xml")
    assert table.transforms == tuple((2.5, 8.0 * n) for n in range(3))
    wanted = fuse_mosaic(tiles, table.transforms, tile_spacing=0.5).compute()
    np.testing.assert_array_equal(fuse_mosaic(table).compute(), wanted)


def test_ome_without_positions_is_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((8, 8), np.uint8), metadata={"axes": "YX"})
    with pytest.raises(InvalidArgument, match="no stage position in image 0"):
        read_tile_table(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(("shape", "axes"), [((5, 20, 22), "ZYX"), ((2, 20, 22), "CYX")])
def test_stacks_and_channels_of_tiffs(tmp_path: Path, shape: tuple[int, ...], axes: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    tile = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    path = tmp_path / "tile.ome.tif"
    tifffile.imwrite(path, tile, metadata={"axes": axes})
    place = (0,) * (3 if axes[0] == "Z" else 2)
    np.testing.assert_array_equal(fuse_mosaic([path], [place], blocks=8).compute(), tile)
    colours = tmp_path / "colours.tif"
    tifffile.imwrite(colours, np.moveaxis(tile[:3].astype(np.uint8), 0, -1))
    if len(tile) >= 3:
        out = fuse_mosaic([colours], [(0, 0)]).compute()
        np.testing.assert_array_equal(out, tile[:3].astype(np.uint8))


def test_truncated_tiffs_are_all_listed(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.tif")
        tifffile.imwrite(paths[-1], np.ones((5, 40, 40), np.uint16), metadata={"axes": "ZYX"})
    paths[1].write_bytes(paths[1].read_bytes()[:-3000])
    paths[2].write_bytes(b"")
    with pytest.raises(InputNotFound) as caught:
        fuse_mosaic(paths, [(0, 0, n) for n in range(4)])
    assert "2 of 4" in str(caught.value)
    assert "tile 1: " in str(caught.value)
    assert "tile 2: " in str(caught.value)


def test_the_benchmark_runs_and_compares(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "mosaic.py"
    words = ["--axes", "3", "--tiles", "6", "--edge", "12", "--slabs", "2", "--cluster", "sync"]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(OK)" in done.stdout
    assert "Mosaic of 6 tiles" in done.stdout
