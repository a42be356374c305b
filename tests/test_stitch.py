"""Stitching under the old names: any layout, NumPy and dask, ids kept apart, no seams."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType

DATA = Path(__file__).with_name("data")
seeds = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """A volume of 1 to 3 axes and tiles: a regular layout, or any boxes, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    if draw(st.booleans()):
        crop = tuple(draw(st.integers(1, n + 2)) for n in shape)
        overlap = tuple(draw(st.integers(0, c - 1)) for c in crop)
        last = draw(st.sampled_from(["move", "shrink"]))
        tiles = topo_dask.compute_subcrop_slices(shape, crop, overlap, last=last)
        assume(len(tiles) <= 60)
        return shape, draw(st.permutations(tiles))
    tiles = []
    for _ in range(draw(st.integers(1, 6))):
        starts = [draw(st.integers(0, n - 1)) for n in shape]
        pairs = zip(starts, shape, strict=True)
        tiles.append(tuple(slice(a, draw(st.integers(a + 1, n))) for a, n in pairs))
    return shape, tiles


def lazily(arrays: list[np.ndarray], chunk: int) -> list[da.Array]:
    return [da.from_array(a, chunks=chunk) for a in arrays]


@pytest.mark.nightly
@given(layouts(), seeds, st.integers(1, 9))
def test_tiles_of_one_field_come_back_as_that_field(
    layout: tuple[tuple[int, ...], list[tuple[slice, ...]]], seed: int, chunk: int
) -> None:
    shape, tiles = layout
    field = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    covered = np.zeros(shape, dtype=bool)
    for tile in tiles:
        covered[tile] = True
    arrays = [field[(slice(None), *tile)] for tile in tiles]
    whole = topo_dask.stitch_volumes(shape, tiles, arrays)
    assert_array_equal(whole, np.where(covered, field, 0))
    assert_array_equal(topo_dask.stitch_volumes(shape, tiles, [a[0] for a in arrays]), whole[0])


@pytest.mark.nightly
@given(layouts(), seeds, st.integers(1, 9))
def test_tiles_in_any_order_and_chunks_give_the_same_bytes(
    layout: tuple[tuple[int, ...], list[tuple[slice, ...]]], seed: int, chunk: int
) -> None:
    shape, tiles = layout
    largest = [max(t[a].stop - t[a].start for t in tiles) for a in range(len(shape))]
    assume(len(tiles) <= 12 and np.prod(-(-np.array(shape) // largest)) <= 8)
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(3, *(s.stop - s.start for s in tile))) for tile in tiles]
    labels = [rng.integers(0, 4, size=a.shape[1:], dtype=np.int16) * 7 for a in arrays]
    for stitch, values in (
        (topo_dask.stitch_volumes, arrays),
        (topo_dask.stitch_flows, arrays),
        (topo_dask.stitch_labels, labels),
    ):
        whole = stitch(shape, tiles, values)
        lazy = stitch(shape, tiles, lazily(values, chunk))
        assert isinstance(lazy, da.Array)
        assert lazy.dtype == whole.dtype
        assert_array_equal(lazy.compute(scheduler="sync"), whole)
        if len({str(t) for t in tiles}) == len(tiles):  # else two tiles have one place
            turned = stitch(shape, tiles[::-1], values[::-1])
            assert_array_equal(turned, whole)


@pytest.mark.nightly
@given(layouts(), seeds)
def test_ids_of_tiles_are_kept_apart_and_one_tile_wins_each_voxel(
    layout: tuple[tuple[int, ...], list[tuple[slice, ...]]], seed: int
) -> None:
    shape, tiles = layout
    rng = np.random.default_rng(seed)
    names = np.array([0, 1, 2, 2**33, 2**64 - 1], dtype=np.uint64)
    labels = [names[rng.integers(0, 5, [s.stop - s.start for s in t])] for t in tiles]
    whole = topo_dask.stitch_labels(shape, tiles, labels)
    # Each id comes from one id of one tile.
    source: dict[int, tuple[int, int]] = {}
    places = [[[s.start for s in t], [s.stop for s in t]] for t in tiles]
    order = sorted(range(len(tiles)), key=lambda n: places[n])
    expected = 0
    for number in order:
        for name in np.unique(labels[number][labels[number] > 0]).tolist():
            expected += 1
            source[expected] = (number, name)
    for new in np.unique(whole[whole > 0]).tolist():
        number, name = source[new]
        full = np.zeros(shape, dtype=np.uint64)
        full[tiles[number]] = labels[number]
        assert (full[whole == new] == name).all()


def test_the_tile_in_whose_middle_a_voxel_lies_wins() -> None:
    tiles = topo_dask.compute_subcrop_slices((14,), (8,), (2,))
    labels = [np.full(8, 5), np.full(8, 5)]
    assert topo_dask.stitch_labels((14,), tiles, labels).tolist() == [1] * 7 + [2] * 7
    stack = [np.stack([a, a * 0]) for a in labels]
    assert topo_dask.stitch_labels((14,), tiles, stack)[1].tolist() == [0] * 14


def test_flow_of_tiles_is_that_of_the_whole_volume() -> None:
    """27 tiles of 36 with overlap 12: 1.4 degrees off, and 0.008 with a context of 16."""
    with np.load(DATA / "tutorial.npz") as case:
        labels, whole = case["instances"], case["diffusion_n200"]
    shape, inside = labels.shape, labels > 0
    tiles = topo_dask.compute_subcrop_slices(shape, (36, 36, 36), (12, 12, 12))
    assert len(tiles) == 27

    def degrees(context: int) -> float:
        arrays = []
        for tile in tiles:
            wide = tuple(
                slice(max(0, s.start - context), min(n, s.stop + context))
                for s, n in zip(tile, shape, strict=True)
            )
            origin = tuple(s.start for s in wide)
            flow = topo_dask.generate_diffusion_flows(labels[wide], origin=origin)
            cut = (slice(s.start - o, s.stop - o) for s, o in zip(tile, origin, strict=True))
            arrays.append(flow[(slice(None), *cut)])
        cosine = (topo_dask.stitch_flows(shape, tiles, arrays) * whole).sum(axis=0)[inside]
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())

    assert degrees(0) <= 1.6
    assert degrees(16) <= 0.05


@pytest.mark.parametrize(
    ("error", "argument", "change"),
    [
        (InvalidArgument, "arrays", lambda t, a: (t, a[1:])),
        (InvalidArgument, "arrays", lambda t, a: (t, [x[:-1] for x in a])),
        (InvalidType, "arrays", lambda t, a: (t, [x.astype(float) for x in a])),
        (InvalidData, "arrays", lambda t, a: (t, [-x for x in a])),
        (InvalidArgument, "subcrop_slices", lambda t, a: ([(slice(0, 99),)] * len(t), a)),
        (InvalidType, "subcrop_slices", lambda t, a: ([(slice(None),)] * len(t), a)),
    ],
    ids=["too few", "too small", "floats", "negative", "outside", "open"],
)
def test_bad_tiles(error: type[Exception], argument: str, change: object) -> None:
    tiles = topo_dask.compute_subcrop_slices((14,), (8,), (2,))
    labels = [np.full(8, 5), np.full(8, 5)]
    with pytest.raises(error, match=f"^{argument}: got"):
        topo_dask.stitch_labels((14,), *change(tiles, labels))  # type: ignore[operator]


def naive(shape: tuple[int, int], tiles: list[tuple[slice, ...]], arrays: list) -> np.ndarray:
    """Tiles pasted one over the other: what blending is there to avoid."""
    out = np.zeros(shape, dtype=np.float32)
    for tile, array in zip(tiles, arrays, strict=True):
        out[tile] = array
    return out


def test_no_seam_between_tiles_of_independent_offset_and_noise() -> None:
    """The jump across the faces of tiles is that of the interior, of noise and of steps.

    Every tile has white noise of its own and an offset of its own. Jumps are the differences of
    neighbouring voxels across a face, relative to those anywhere else with the same blend.
    """
    shape, size, overlap = (960, 960), 96, 32
    tiles = topo_dask.compute_subcrop_slices(shape, (size, size), (overlap, overlap))
    rng = np.random.default_rng(7)
    arrays = [
        (rng.normal() + 0.1 * rng.normal(size=(size, size))).astype(np.float32) for _ in tiles
    ]
    blended = topo_dask.stitch_volumes(shape, tiles, arrays)
    pasted = naive(shape, tiles, arrays)
    faces = sorted({s for t in tiles for s in (t[1].start, t[1].stop)} - {0, shape[1]})

    def jumps(image: np.ndarray) -> tuple[float, float]:
        """Root mean square across faces, and in the interior next to them."""
        steps = np.diff(image, axis=1) ** 2
        across = np.mean([steps[:, f - 1] for f in faces])
        beside = np.mean([steps[:, f - 1 + d] for f in faces for d in (-3, -2, 2, 3)])
        return float(np.sqrt(across)), float(np.sqrt(beside))

    across, beside = jumps(blended)
    # 20 faces of 960 voxels: the ratio of two such means scatters by less than 2 %.
    assert_allclose(across / beside, 1, atol=0.05)
    across, beside = jumps(pasted)
    assert across / beside > 3
