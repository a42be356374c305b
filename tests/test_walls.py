"""Walls without flux: where annotation ends, and where an instance has no others.

An instance that fills its volume has no wall at all: what is left of its slopes is no noise.
"""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest

import topo_dask
from topo_dask.kernels import reference

SPACINGS = pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 1.5)])


@SPACINGS
@pytest.mark.parametrize("n_iter", [0, 1, 7, 40, 3000])
def test_flow_is_that_of_the_definition(n_iter: int, spacing: tuple[float, float, float]) -> None:
    labels = np.full((3, 5, 8), 9, np.uint16)
    settings = {"n_iter": n_iter, "adaptive_iters": False, "spacing": spacing}
    flow = topo_dask.generate_diffusion_flows(labels, **settings)
    expected = reference.diffusion_flow(
        labels, ids=np.array([9], np.uint64), iterations=np.array([n_iter]), spacing=spacing
    )
    np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-5)
    # However far the volume is from the origin, of which the definition itself makes nothing.
    far = topo_dask.generate_diffusion_flows(labels, origin=(10**7,) * 3, **settings)
    np.testing.assert_array_equal(far, flow)


def test_nothing_is_stretched_where_nothing_is_left() -> None:
    """Sweeps in float32 would leave a difference of 1e-7 here, which is more than 1e-8."""
    labels = np.ones((4, 4, 4), np.uint8)
    flow = topo_dask.generate_diffusion_flows(labels, 1000, adaptive_iters=False)
    assert np.abs(flow).max() < 1e-6


@pytest.mark.parametrize(
    "how", [{}, {"rounds": 3}, {"overlap": 2}, {"acceleration": "auto"}], ids=str
)
def test_blocks_change_no_bit(tmp_path: Path, how: dict[str, object]) -> None:
    labels = np.ones((4, 6, 9), np.uint8)
    whole = topo_dask.generate_diffusion_flows(labels, 500, adaptive_iters=False)
    made = topo_dask.flows(
        labels, tmp_path / "f.zarr", n_iter=500, adaptive_iters=False, blocks=(4, 3, 5),
        cluster="sync", **how,
    )  # fmt: skip
    lazy = topo_dask.generate_diffusion_flows(
        da.from_array(labels, chunks=(4, 3, 5)), 500, adaptive_iters=False
    )
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), whole)
    np.testing.assert_allclose(made.array[...], whole, rtol=0, atol=1e-6)
    assert "overlap" in how or np.array_equal(made.array[...], whole)


def mirrored(part: np.ndarray, fields: np.ndarray, n_iter: int) -> np.ndarray:
    """Fields of an object that goes on behind its last plane in z as its mirror image."""
    whole = np.concatenate([part, part[::-1]])
    u = np.pad(np.concatenate([fields, fields[:, ::-1]], axis=1) * whole, ((0, 0), *[(1, 1)] * 3))
    for _ in range(n_iter):
        mean = sum(np.roll(u, step, axis) for axis in (1, 2, 3) for step in (-1, 1)) / 6
        u[:, 1:-1, 1:-1, 1:-1] = mean[:, 1:-1, 1:-1, 1:-1] * whole
    return u[:, : len(part) + 2]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("potential", ["coordinate", "heat"])
def test_diffusion_in_each_part_of_a_cut_object_is_that_of_a_mirror(
    potential: str, axis: int
) -> None:
    """Coordinates or heat of the mirror image are those of what it is the image of."""
    grid = np.indices((14, 16, 15))
    inside = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, (7, 8, 7), (6, 5, 6), strict=True)) < 1
    inside &= ~((abs(grid[0] - 6) < 3) & (grid[1] > 9))  # not convex
    cut, n_iter = 8, 30
    for first in (True, False):
        annotated = (np.arange(14) < cut) == first
        part = inside[annotated] if first else inside[annotated][::-1]
        known = np.broadcast_to(annotated[:, None, None], inside.shape)
        # Where the axis that is cut comes to lie in the volume; coordinates go with it.
        labels = np.moveaxis(np.where(known, inside, 0), 0, axis).astype(np.uint8)
        order = np.moveaxis(np.indices(labels.shape), axis + 1, 1)
        order = order[:, annotated] if first else order[:, annotated][:, ::-1]
        start = order + 1.0 if potential == "coordinate" else np.ones_like(order, dtype=float)
        u = mirrored(part, start, n_iter)
        gradient = np.empty_like(u[:, 1:-1, 1:-1, 1:-1])
        for component in range(3):
            along = (axis, *(a for a in range(3) if a != axis)).index(component)
            slope = (np.roll(u, -1, along + 1) - np.roll(u, 1, along + 1))[component] / 2
            gradient[component] = slope[1:-1, 1:-1, 1:-1]
        gradient[axis, -1] *= 2  # one-sided at the wall: (u - before), not half of that
        gradient[axis] *= 1 if first else -1  # the order was turned round
        gradient *= part
        norm = np.sqrt((gradient**2).sum(axis=0))
        expected = gradient / np.where(norm == 0, 1, norm)
        flow = topo_dask.generate_diffusion_flows(
            labels, n_iter, adaptive_iters=False, potential=potential, origin=(1, 1, 1),
            spatial_mask=np.moveaxis(known, 0, axis),
        )  # fmt: skip
        found = np.moveaxis(flow, axis + 1, 1)
        found = found[:, annotated] if first else found[:, annotated][:, ::-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
