"""Resampling of tiles: the same as scipy on the whole tile, whatever part of it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from topo_dask.kernels import resample
from topo_dask.kernels.cpu.blend import axis_weight
from topo_dask.kernels.resample import (
    BLENDS,
    ORDERS,
    accumulate,
    needed_part,
    part_to_read,
    spline_coefficients,
)

Matrix = npt.NDArray[np.float64]


def weights_of(lengths: tuple[int, ...]) -> npt.NDArray[np.float64]:
    tables = np.zeros((3, max(lengths)))
    for axis, n in enumerate(lengths):
        tables[axis, :n] = axis_weight(n, (n // 2, n // 2))
    return tables


def weight_volume(lengths: tuple[int, ...]) -> npt.NDArray[np.float64]:
    z, y, x = (row[:n] for row, n in zip(weights_of(lengths), lengths, strict=True))
    return z[:, None, None] * y[:, None] * x


def sampled(
    tile: npt.NDArray[Any],
    inverse: Matrix,
    out: tuple[int, ...],
    *,
    order: int,
    blend: str = "cosine",
    blocks: tuple[int, ...] | None = None,
    vector: bool = False,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of values and of weights, block by block; voxels that are not read are NaN."""
    lengths = tile.shape[1:]
    total, weights = np.zeros((len(tile), *out)), np.zeros(out)
    step = blocks or out
    maps = np.stack([inverse, np.linalg.inv(inverse)])
    for start in np.ndindex(*(-(-n // b) for n, b in zip(out, step, strict=True))):
        low = tuple(i * b for i, b in zip(start, step, strict=True))
        high = tuple(min(a + b, n) for a, b, n in zip(low, step, out, strict=True))
        part = needed_part((low, high), inverse, lengths, order=order)
        if part is None:
            continue
        read = part_to_read(part, lengths, order=order)
        inside = tuple(slice(a, b) for a, b in zip(*read, strict=True))
        values = tile[(slice(None), *inside)].astype(np.float32)
        if order == 3:
            values = spline_coefficients(values, start=read[0], part=part, lengths=lengths)
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        block = np.zeros((len(tile), *(b - a for a, b in zip(low, high, strict=True))))
        mass = np.zeros(block.shape[1:])
        place = np.array([low, low, high, part[0], lengths])
        modes = np.array([order, BLENDS.index(blend), int(vector)])
        values = np.ascontiguousarray(values)
        accumulate(block, mass, values, maps, place, weights_of(lengths), modes)
        total[(slice(None), *here)], weights[here] = block, mass
    return total, weights


def turned(angles: tuple[float, float, float], scale: float, shift: Any) -> Matrix:
    inverse = np.eye(4)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(4)
        turn[[i, i, j, j], [i, j, i, j]] = (
            np.cos(angle),
            np.sin(angle),
            -np.sin(angle),
            np.cos(angle),
        )
        inverse = inverse @ turn
    inverse[:3, :3] *= scale
    inverse[:3, 3] = shift
    return inverse


def against_scipy(
    tile: npt.NDArray[Any], inverse: Matrix, out: tuple[int, ...], order: int
) -> None:
    total, weights = sampled(tile, inverse, out, order=order)
    matrix, offset = inverse[:3, :3], inverse[:3, 3]
    weight = ndimage.affine_transform(weight_volume(tile.shape[1:]), matrix, offset, out, order=1)
    np.testing.assert_allclose(weights, weight, atol=1e-12)
    for channel, values in zip(total, tile, strict=True):
        wanted = ndimage.affine_transform(values.astype(float), matrix, offset, out, order=order)
        np.testing.assert_allclose(channel, wanted * weight, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_images_are_those_of_scipy(order: int) -> None:
    tile = np.random.default_rng(0).random((2, 1, 40, 53))
    against_scipy(
        tile.astype(np.float32), turned((0, 0, 0.31), 0.93, (0, -9.13, 12.71)), (1, 70, 80), order
    )


@pytest.mark.parametrize("order", ORDERS)
def test_volumes_are_those_of_scipy(order: int) -> None:
    tile = np.random.default_rng(1).integers(0, 255, (1, 14, 17, 19)) / 255
    against_scipy(
        tile.astype(np.float32),
        turned((0.2, -0.31, 0.5), 0.81, (2.13, -3.71, 1.17)),
        (22, 25, 24),
        order,
    )


@given(
    lengths=st.tuples(*[st.integers(1, 9)] * 3),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    scale=st.floats(0.3, 3),
    shift=st.tuples(*[st.floats(-6, 9)] * 3),
    order=st.sampled_from(ORDERS),
    blocks=st.tuples(*[st.integers(1, 12)] * 3),
)
def test_blocks_do_not_matter_to_the_byte(
    lengths: tuple[int, int, int],
    angles: tuple[float, float, float],
    scale: float,
    shift: tuple[float, float, float],
    order: int,
    blocks: tuple[int, int, int],
) -> None:
    tile = np.random.default_rng(2).random((1, *lengths)).astype(np.float32)
    inverse = turned(angles, scale, shift)
    whole = sampled(tile, inverse, (7, 8, 12), order=order)
    cut = sampled(tile, inverse, (7, 8, 12), order=order, blocks=blocks)
    for one, other in zip(whole, cut, strict=True):
        assert one.tobytes() == other.tobytes()


def test_windows_of_the_spline_filter_give_that_of_the_whole_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resample, "WINDOW", {2: 40, 3: 40})
    tile = np.random.default_rng(3).random((1, 1, 300, 170)) * 1000
    whole = ndimage.spline_filter(tile[0, 0], order=3, mode="mirror")
    for part in (((0, 0, 0), (1, 300, 170)), ((0, 95, 3), (1, 170, 44)), ((0, 7, 99), (1, 8, 100))):
        read = part_to_read(part, (1, 300, 170), order=3)
        assert part[1][1] - part[0][1] > 250 or read[1][1] - read[0][1] < 250
        inside = tuple(slice(a, b) for a, b in zip(*read, strict=True))
        found = spline_coefficients(
            tile[(slice(None), *inside)], start=read[0], part=part, lengths=(1, 300, 170)
        )
        wanted = whole[part[0][1] : part[1][1], part[0][2] : part[1][2]]
        np.testing.assert_allclose(found[0, 0], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_projective_is_that_of_scipy(order: int) -> None:
    tile = np.random.default_rng(4).random((1, 1, 30, 33)).astype(np.float32)
    inverse = turned((0, 0, 0.2), 0.8, (0, -2.1, 3.3))
    inverse[3] = (0, 0.004, -0.006, 1.02)
    total, weights = sampled(
        tile, inverse, (1, 40, 44), order=order, blend="mean", blocks=(1, 9, 44)
    )
    y, x = np.mgrid[:40, :44].astype(float)
    positions = np.stack([np.zeros_like(y), y, x, np.ones_like(y)])
    at = np.einsum("ij,j...->i...", inverse, positions)
    wanted = ndimage.map_coordinates(tile[0, 0].astype(float), at[1:3] / at[3], order=order)
    assert 0.2 < weights.mean() < 1
    np.testing.assert_allclose(total[0, 0], wanted, atol=1e-11)


def test_vectors_turn_with_the_derivative() -> None:
    """A path drawn in the tile and its velocity: both come out where the map moves them."""
    inverse = turned((0, 0, 0.4), 0.8, (0, -2.0, 6.0))
    inverse[3, 1:3] = 0.003, -0.004
    forward = np.linalg.inv(inverse)
    velocity = np.array([0.6, -0.8])
    tile = np.broadcast_to(velocity[:, None, None, None], (2, 1, 40, 40)).astype(np.float32)
    total, weights = sampled(tile, inverse, (1, 30, 30), order=1, blend="mean", vector=True)

    def moved(p: npt.NDArray[Any]) -> npt.NDArray[Any]:
        image = forward @ [0, *p, 1]
        return np.asarray(image[1:3] / image[3])

    checked = 0
    for y, x in ((3, 4), (12, 20), (25, 9)):
        at = inverse @ [0, y, x, 1]
        p = at[1:3] / at[3]
        if weights[0, y, x]:
            slope = (moved(p + 1e-5 * velocity) - moved(p - 1e-5 * velocity)) / 2e-5
            np.testing.assert_allclose(total[:, 0, y, x], slope, atol=1e-6)
            checked += 1
    assert checked >= 2


def test_nothing_is_needed_of_a_tile_elsewhere() -> None:
    inverse = turned((0, 0, 0), 1, (0, -100, 0))
    assert needed_part(((0, 0, 0), (1, 50, 50)), inverse, (1, 20, 20), order=1) is None


def test_rounding_at_a_face_counts_as_inside() -> None:
    """A tile shifted by what is a whole number but for rounding covers its first and last row."""
    inverse = turned((0, 0, 0), 1, (0, -3 - 1e-10, -3 + 1e-10))
    _, weights = sampled(np.ones((1, 1, 4, 4)), inverse, (1, 10, 10), order=1)
    assert (weights[0] > 0).sum() == 16


def test_what_is_outside_by_more_than_rounding_is_outside() -> None:
    """As for scipy: of 10^8 voxels at tiles' faces some come as near as this."""
    inverse = turned((0, 0, 0), 1, (0, -3 - 1e-7, -3))
    _, weights = sampled(np.ones((1, 1, 4, 4)), inverse, (1, 10, 10), order=1)
    assert (weights[0] > 0).sum() == 12
