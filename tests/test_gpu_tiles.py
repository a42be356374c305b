"""Tiles blended and resampled by the CUDA sources: every bit is the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from topo_dask import (
    compute_subcrop_slices,
    fuse_mosaic,
    map_tiles,
    stitch_flows,
    stitch_labels,
    stitch_volumes,
)
from topo_dask.errors import TightMemory
from topo_dask.kernels import cpu, gpu, resample
from topo_dask.kernels.computed import noting
from topo_dask.kernels.cpu import tiles as cpu_tiles
from topo_dask.kernels.cpu.blend import axis_weight
from topo_dask.kernels.gpu import Device
from topo_dask.kernels.gpu import resample as gpu_resample
from topo_dask.kernels.gpu import tiles as gpu_tiles
from topo_dask.kernels.gpu.host import MEMORY
from topo_dask.kernels.resample import BLENDS, needed_part, part_to_read

few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
Three = tuple[np.ndarray, np.ndarray, np.ndarray]


def same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert_array_equal(one, other)
    assert one.tobytes() == other.tobytes()


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    widths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=4),
)
@few
def test_weights(device: Device, shape: list[int], widths: list[tuple[int, int]]) -> None:
    tapers = tuple(widths[: len(shape)])
    expected = cpu.blend_weight(tuple(shape), tapers=tapers)
    same_bits(gpu.blend_weight(tuple(shape), tapers=tapers), expected)


# ------------------------------------------------------------------------------------- tiles


@st.composite
def overlaps(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]], Any]:
    """A block ``[C,z,y,x]``, and where tiles lie in it; a source of numbers."""
    shape = draw(st.tuples(st.integers(1, 3), *[st.integers(1, 7)] * 3))
    places = []
    for _ in range(draw(st.integers(1, 4))):
        cut: list[slice] = [slice(None)]
        for n in shape[1:]:
            low = draw(st.integers(0, n - 1))
            cut.append(slice(low, draw(st.integers(low + 1, n))))
        places.append(tuple(cut))
    return shape, places, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def values_of(rng: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if np.dtype(dtype).kind == "b":
        return rng.random(shape) < 0.5
    if np.dtype(dtype).kind == "f":
        values = rng.normal(size=shape).astype(dtype)
        special = np.array([np.nan, np.inf, -np.inf, 0], dtype)
        odd = rng.random(shape) < 0.1
        values[odd] = special[rng.integers(0, 4, odd.sum())]
        return values
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def along_of(rng: Any, shape: tuple[int, ...]) -> Three:
    z, y, x = (axis_weight(n, (n, 1)) * rng.random(n) for n in shape)
    return z, y, x


@pytest.mark.parametrize(("of_mean", "dtype"), [("f4", "u1"), ("f8", "f4")])
@given(case=overlaps())
@few
def test_means(device: Device, of_mean: str, dtype: str, case: Any) -> None:
    shape, places, rng = case
    one, other = ((np.zeros(shape, of_mean), np.zeros(shape[1:])) for _ in range(2))
    for place in places:
        values = values_of(rng, one[0][place].shape, dtype)
        along = along_of(rng, values.shape[1:])
        cpu_tiles.add_tile(one[0][place], one[1][place[1:]], values, along)
        gpu_tiles.add_tile(other[0][place], other[1][place[1:]], values, along)
    same_bits(other[1], one[1])
    assert_array_equal(other[0], one[0])


@pytest.mark.parametrize("of_mean", ["f4", "f8"])
@pytest.mark.parametrize("dtype", ["?", *gpu_tiles.TYPES])
def test_values_of_every_type(device: Device, dtype: str, of_mean: str) -> None:
    rng = np.random.default_rng(5)
    values = values_of(rng, (2, 3, 4, 5), dtype)
    along = along_of(rng, values.shape[1:])
    sums = [device.zeros((2, 3, 4, 9), of_mean) for _ in range(4)]
    weights = [device.zeros((3, 4, 9), "f8") for _ in range(2)]
    there = (..., slice(2, 7))
    as_mean = values.astype(of_mean)
    for i, tile in enumerate((values, as_mean)):
        on_device = device.put(tile)
        gpu_tiles.add_tile(sums[i][there], weights[i][there], tile, along)
        gpu_tiles.add_next_tile(sums[2 + i][there], on_device, along, along)
    for i in (0, 2):
        found, expected = device.get(sums[i]), device.get(sums[i + 1])
        same_bits(found, expected)
    if np.dtype(dtype).kind == "u":
        assert device.get(sums[0])[there].any()
    assert not device.get(sums[0])[..., 7:].any()
    np.testing.assert_allclose(device.get(sums[0])[there], as_mean, rtol=1e-6)


@pytest.mark.parametrize("of_mean", ["f4", "f8"])
@given(case=overlaps())
@few
def test_next_tile_of_a_grid(device: Device, of_mean: str, case: Any) -> None:
    shape, places, rng = case
    start = values_of(rng, shape, of_mean)
    one, other = start.copy(), start.copy()
    for place in places:
        values = values_of(rng, one[place].shape, "f4")
        along = along_of(rng, values.shape[1:])
        before = along_of(rng, values.shape[1:])
        for vector in before:
            vector[rng.integers(0, len(vector) + 1) :] = 0
        cpu_tiles.add_next_tile(one[place], values, along, before)
        gpu_tiles.add_next_tile(other[place], values, along, before)
    assert_array_equal(other, one)


@pytest.mark.parametrize("dtype", ["?", *gpu_tiles.TYPES])
@given(case=overlaps())
@settings(few, max_examples=6)
def test_largest_and_nearest(device: Device, dtype: str, case: Any) -> None:
    shape, places, rng = case
    largest, nearest = np.zeros((2, *shape), dtype), np.zeros((2, *shape), dtype)
    seen, distance = np.zeros((2, *shape[1:]), bool), np.full((2, *shape[1:]), 99)
    chosen, heaviest = np.zeros((2, *shape), dtype), np.zeros((2, *shape[1:]))
    for place in places:
        values = values_of(rng, shape, dtype)[place]
        flags, away = seen[0][place[1:]], distance[0][place[1:]]
        old = largest[0][place]
        larger = (values > old) | (values != values) | ~flags
        old[larger], flags[...] = values[larger], True
        z, y, x = (rng.integers(0, 9, n) for n in values.shape[1:])
        here = z[:, None, None] + y[:, None] + x
        nearer = here < away
        nearest[0][place][:, nearer], away[nearer] = values[:, nearer], here[nearer]
        gpu_tiles.keep_largest(largest[1][place], seen[1][place[1:]], values)
        gpu_tiles.keep_nearest(nearest[1][place], distance[1][place[1:]], values, (z, y, x))
        along, heavy = along_of(rng, values.shape[1:]), heaviest[0][place[1:]]
        weight = along[0][:, None, None] * along[1][:, None] * along[2]
        higher = weight > heavy
        chosen[0][place][:, higher], heavy[higher] = values[:, higher], weight[higher]
        gpu_tiles.keep_heaviest(chosen[1][place], heaviest[1][place[1:]], values, along)
    for one, other in (largest, nearest, chosen, seen, distance, heaviest):
        same_bits(other, one)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f4"])
def test_halves_are_rounded_to_even(device: Device, dtype: str) -> None:
    for of_mean in ("f4", "f8"):
        values = np.arange(0, 40, 0.25).reshape(2, -1).astype(of_mean)
        same_bits(gpu_tiles.rounded(values, dtype), cpu_tiles.rounded(values, dtype))


# ---------------------------------------------------------------------------------- resampling


def transform(angles: tuple[float, ...], scale: float, shift: Any, bend: float) -> np.ndarray:
    """Voxels of the output to voxels of the tile, back, and the same the other way round."""
    inverse = np.eye(4)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(4)
        turn[[i, i, j, j], [i, j, i, j]] = [
            np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
        ]  # fmt: skip
        inverse = inverse @ turn
    inverse[:3, :3] *= scale
    inverse[:3, 3] = shift
    inverse[3, :3] = bend
    return np.stack([inverse, np.linalg.inv(inverse)])


@given(
    lengths=st.tuples(st.sampled_from([1, 1, 6]), *[st.integers(2, 9)] * 2),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    scale=st.floats(0.3, 2),
    shift=st.tuples(*[st.floats(-6, 9)] * 3),
    kind=st.sampled_from([(0, "f4"), (1, "f4"), (1, "f8"), (3, "f4")]),
    blend=st.sampled_from(BLENDS),
    vector=st.booleans(),
    bend=st.sampled_from([0.0, 0.0, 0.01]),
)
@few
def test_resampled_tiles_are_those_of_the_cpu(
    device: Device,
    lengths: tuple[int, ...],
    angles: tuple[float, ...],
    scale: float,
    shift: tuple[float, ...],
    kind: tuple[int, str],
    blend: str,
    vector: bool,
    bend: float,
) -> None:
    order, dtype = kind
    turning = (0.0, 0.0, angles[2]) if lengths[0] == 1 else angles
    maps = transform(turning, scale, (0.0, *shift[1:]) if lengths[0] == 1 else shift, bend)
    rng = np.random.default_rng(0)
    tile = rng.random((3, *lengths))
    low, high = (0, 1, 2), (3, 7, 9)
    part = needed_part((low, high), maps[0], lengths, order=order)
    assume(part is not None)
    assert part is not None
    read = part_to_read(part, lengths, order=order)
    cut = tuple(slice(a, b) for a, b in zip(*read, strict=True))
    values = np.ascontiguousarray(tile.astype(dtype)[(slice(None), *cut)])
    if order == 3:
        given_of_part: Any = {"start": read[0], "part": part, "lengths": lengths}
        found = gpu_resample.spline_coefficients(values, **given_of_part)
        values = resample.spline_coefficients(values, **given_of_part)
        same_bits(found, values)
    blocks = [[np.zeros((3, 4, 9, 10)), np.zeros((4, 9, 10))] for _ in range(2)]
    tables = np.zeros((3, max(lengths)))
    for axis, n in enumerate(lengths):
        tables[axis, :n] = axis_weight(n, (n // 2, n // 2))
    place = np.array([(0, 0, 1), low, high, part[0], lengths])
    modes = np.array([order, BLENDS.index(blend), int(vector)])
    for _ in range(2):  # the second time there is something to blend with
        resample.accumulate(*blocks[0], values, maps, place, tables, modes)
        gpu_resample.accumulate(*blocks[1], values, maps, place, tables, modes)
    same_bits(blocks[1][1], blocks[0][1])
    same_bits(blocks[1][0], blocks[0][0])


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_ids_that_no_float_holds_stay_whole(device: Device, dtype: str) -> None:
    tile = np.random.default_rng(6).integers(2**62, 2**63 - 1, (2, 3, 4, 5)).astype(dtype)
    maps = transform((0, 0, 0), 1.0, (0, 0, -1.4), 0.0)
    place = np.array([(0, 0, 0), (0, 0, 0), (3, 4, 8), (0, 0, 0), (3, 4, 5)])
    for blend in ("max", "first"):
        total, mass = np.zeros((2, 3, 4, 8), dtype), np.zeros((3, 4, 8))
        for values in (tile, tile - tile.dtype.type(1)):
            modes = np.array([0, BLENDS.index(blend), 0])
            gpu_resample.accumulate(total, mass, values, maps, place, np.ones((3, 5)), modes)
        same_bits(total[..., 2:6], tile[..., 1:])
        assert not total[..., [0, 1, 6, 7]].any()


def test_splines_of_windows_are_those_of_scipy(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "WINDOW", {2: 40, 3: 40})
    tile = np.random.default_rng(3).random((1, 1, 150, 90)) * 1000
    whole = ndimage.spline_filter(tile[0, 0], order=3, mode="mirror")
    part = ((0, 45, 3), (1, 120, 44))
    read = part_to_read(part, (1, 150, 90), order=3)
    cut = tuple(slice(a, b) for a, b in zip(*read, strict=True))
    found = gpu_resample.spline_coefficients(
        tile[(slice(None), *cut)], start=read[0], part=part, lengths=(1, 150, 90)
    )
    assert_allclose(found[0, 0], whole[45:120, 3:44], rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_resampled_volume_is_that_of_scipy(device: Device, order: int) -> None:
    tile = np.random.default_rng(1).random((1, 14, 17, 19)).astype(np.float32)
    maps, lengths = transform((0.2, -0.3, 0.5), 0.81, (2.1, -3.7, 1.2), 0.0), tile.shape[1:]
    out = (16, 18, 17)
    values: Any = tile
    if order == 3:
        everything = ((0, 0, 0), lengths)
        values = gpu_resample.spline_coefficients(
            tile, start=(0, 0, 0), part=everything, lengths=lengths
        )
    total, mass = np.zeros((1, *out)), np.zeros(out)
    place = np.array([(0, 0, 0), (0, 0, 0), out, (0, 0, 0), lengths])
    tables, modes = np.ones((3, max(lengths))), np.array([order, 1, 0])
    gpu_resample.accumulate(total, mass, values, maps, place, tables, modes)
    matrix, offset = maps[0][:3, :3], maps[0][:3, 3]
    wanted = ndimage.affine_transform(tile[0].astype(float), matrix, offset, out, order=order)
    assert 0.1 < mass.mean() < 1
    assert_allclose(total[0], wanted, rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------- mosaics


def turned_tiles() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(7)
    tiles = [(rng.random((2, 6, 20, 20)) * 255).astype(np.uint8) for _ in range(3)]
    moved = [transform((0, 0, 0.1 * n), 1.0, (0, 0, 0), 0.0)[1] for n in range(3)]
    for n, matrix in enumerate(moved):
        matrix[:3, 3] += (0, 0, 9 * n)
    return tiles, moved


@pytest.mark.parametrize("order", [0, 1, 3])
def test_mosaics_are_those_of_the_cpu(device: Device, order: int, tmp_path: Path) -> None:
    tiles, matrices = turned_tiles()
    options: Any = {"order": order, "blend": "cosine", "blocks": (4, 16, 16)}
    expected = fuse_mosaic(tiles, matrices, **options, backend="cpu")
    lazy = fuse_mosaic(tiles, matrices, **options, backend="gpu")
    same_bits(lazy.compute(scheduler="sync"), expected.compute(scheduler="sync"))
    made = fuse_mosaic(
        tiles, matrices, output=tmp_path / "a.zarr", cluster="sync", **options, backend="gpu"
    )
    same_bits(made.array[...], expected.compute(scheduler="sync"))
    assert device.name in repr(made)


def test_blocks_of_a_mosaic_that_do_not_fit_are_made_of_halves(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if device.xp is not np:
        pytest.skip("only the host's memory can be made small")
    tiles, matrices = turned_tiles()
    options: Any = {"order": 1, "blocks": (6, 64, 64), "cluster": "sync"}
    expected = fuse_mosaic(tiles, matrices, **options, backend="cpu")
    monkeypatch.setenv(MEMORY, "90000")
    with (
        pytest.warns(TightMemory, match="fuse may need"),
        pytest.warns(TightMemory, match="1 of 1 tasks, which were computed in parts"),
    ):
        made = fuse_mosaic(tiles, matrices, output=tmp_path / "a.zarr", **options, backend="gpu")
    same_bits(made.array[...], expected.compute(scheduler="sync"))
    assert "in parts" in repr(made)


# ------------------------------------------------------------------------------ tiles of models


def image_of_two(dtype: str) -> np.ndarray:
    values = np.random.default_rng(3).normal(scale=60, size=(2, 7, 22, 26))
    return np.abs(values).astype(dtype)


@pytest.mark.parametrize(
    ("blend", "dtype", "boxes"),
    [
        ("cosine", "uint8", None),
        ("mean", "float16", [((0, 0, 0), (2, 9, 9)), ((4, 12, 15), (7, 20, 26))]),
        ("nearest", "uint64", None),
    ],
)
def test_tiles_of_a_model_are_blended_as_by_the_cpu(
    device: Device, blend: str, dtype: str, boxes: Any, tmp_path: Path
) -> None:
    image = image_of_two(dtype)
    tiles: Any = {"tile": (4, 9, 10), "overlap": (1, 3, 4), "blend": blend, "boxes": boxes}
    tiles |= {"blocks": (4, 16, 16), "channels": 2, "dtype": dtype}
    expected = map_tiles(np.square, image, **tiles, backend="cpu")
    where: Any = {"output": tmp_path / "a.zarr", "cluster": "sync"}
    made = map_tiles(np.square, image, **tiles, **where, backend="gpu")
    same_bits(made.array[...], expected)
    assert f"{device.name} (8 tasks)" in repr(made)
    again = map_tiles(np.square, image, **tiles, **where, backend="cpu", resume=True)
    assert again.seconds < 1  # it was there already: the same run, whatever blends
    assert "computed on" not in repr(again)


@pytest.mark.parametrize(("blend", "normalise"), [("cosine", True), ("max", False)])
def test_blocks_of_tiles_that_do_not_fit_are_made_of_halves(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blend: str, normalise: bool
) -> None:
    if device.xp is not np:
        pytest.skip("only the host's memory can be made small")
    image = np.concatenate([image_of_two("float32")] * 3, axis=-1)
    tiles: Any = {"tile": (4, 9, 10), "overlap": (1, 3, 4), "blend": blend, "normalise": normalise}
    tiles |= {"blocks": (7, 22, 78), "channels": 2, "dtype": "float32"}
    expected = map_tiles(np.negative, image, **tiles, backend="cpu")
    monkeypatch.setenv(MEMORY, "100000")
    where: Any = {"output": tmp_path / "a.zarr", "cluster": "sync"}
    with (
        pytest.warns(TightMemory, match="tiles may need"),
        pytest.warns(TightMemory, match="1 of 1 tasks, which were computed in parts"),
    ):
        made = map_tiles(np.negative, image, **tiles, **where, backend="gpu")
    same_bits(made.array[...], expected)
    assert device.name in repr(made)
    assert "in parts" in repr(made)


@pytest.mark.parametrize(
    ("stitch", "dtype"), [(stitch_volumes, "f4"), (stitch_flows, "f2"), (stitch_labels, "i4")]
)
def test_stitched_tiles_are_those_of_the_cpu(
    device: Device, monkeypatch: pytest.MonkeyPatch, stitch: Any, dtype: str
) -> None:
    rng, shape = np.random.default_rng(5), (9, 30, 34)
    places = compute_subcrop_slices(shape, (6, 16, 15), (2, 5, 4))
    lengths = [tuple(s.stop - s.start for s in place) for place in places]
    arrays = [rng.integers(0, 9, (3, *n)).astype(dtype) for n in lengths]
    expected = stitch(shape, places, arrays, backend="cpu")
    lazy = [da.from_array(a, chunks=8) for a in arrays]
    with noting() as computed:
        same_bits(stitch(shape, places, arrays, backend="gpu"), expected)
        same_bits(stitch(shape, places, lazy, backend="gpu").compute(scheduler="sync"), expected)
    assert computed.where == {device.name}
    assert not computed.in_parts
    if device.xp is np:  # whose memory can be made small
        monkeypatch.setenv(MEMORY, "350000")
        with noting() as computed:
            same_bits(stitch(shape, places, arrays, backend="gpu"), expected)
        assert computed.where == {device.name}
        assert computed.in_parts
