"""The Poisson potential: the oracle, closed forms, where an object lies, masks, spacing, blocks."""

from __future__ import annotations

import re
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.kernels import cpu, reference
from topo_dask.testing import ellipsoids

IDS = np.array([0, 1, 2, 2**32 + 1, 2**63 + 2, 2**63 + 3, 2**64 - 1], dtype=np.uint64)
SMALL_IDS = np.array([0, 1, 2, 3, 5, 100, 127])
SOLVED = 1e-9

seeds = st.integers(0, 2**32 - 1)


def random_blobs(rng: np.random.Generator, shape: tuple[int, ...], kinds: int = 6) -> np.ndarray:
    """Touching instances of every width: the same few labels at several scales."""
    coarse = rng.integers(0, kinds, size=[-(-n // 5) for n in shape])
    for axis in range(3):
        coarse = coarse.repeat(5, axis=axis)
    labels = coarse[tuple(slice(n) for n in shape)]
    fine = rng.random(shape)
    return np.where(fine < 0.05, rng.integers(0, kinds, size=shape), labels)


def angles(flow: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Between unit vectors ``[3, ...]``, in radians."""
    chord = np.sqrt(((flow.astype(np.float64) - wanted) ** 2).sum(axis=0))
    return 2 * np.arcsin(np.minimum(chord / 2, 1.0))


# ── the oracle ───────────────────────────────────────────────────────────────────────────────


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Touching boxes of voxels, with or without masks, cut faces, a guess and a spacing."""
    cells = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5))
    rng = np.random.default_rng(draw(seeds))
    labels = rng.integers(0, draw(st.integers(1, 7)), size=cells)
    for axis in range(3):
        labels = labels.repeat(draw(st.integers(1, 4)), axis=axis)
    if draw(st.booleans()):
        labels = np.where(rng.random(labels.shape) < 0.1, 0, labels)
    small = draw(st.sampled_from(["uint8", "int32", "uint64"]))
    labels = IDS[labels] if small == "uint64" else SMALL_IDS[labels].astype(small)
    shape = labels.shape
    case: dict[str, Any] = {"labels": labels, "threads": draw(st.integers(1, 3))}
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    if share is not None:
        case["spatial_mask"] = (rng.random(shape) < share).astype(np.float32)
    if draw(st.booleans()):
        case["spacing"] = tuple(draw(st.sampled_from([0.5, 1.0, 1.7, 4.0, 40.0])) for _ in "zyx")
    if draw(st.booleans()):
        case["beyond"] = []
        for axis in range(3):
            for _ in range(2):
                face = rng.choice([0.0, 0.3, 5.0, np.nan], size=np.delete(shape, axis))
                case["beyond"].append(draw(st.sampled_from([None, face])))
    if draw(st.booleans()):
        case["start"] = rng.random(shape) * draw(st.sampled_from([1.0, 100.0]))
    return case


@given(cases())
def test_potential_is_within_the_tolerance_in_every_voxel(case: dict[str, Any]) -> None:
    labels = case.pop("labels")
    potential = cpu.poisson_potential(labels, **case)
    case.pop("start", None)
    expected = reference.poisson_potential(labels, **case)
    assert potential.dtype == np.float64
    assert_allclose(potential, expected, rtol=2 * SOLVED, atol=0)


@given(cases(), st.data())
def test_flow_of_a_potential(case: dict[str, Any], data: st.DataObject) -> None:
    labels = case.pop("labels")
    case.pop("start", None)
    core = None
    if data.draw(st.booleans()):
        starts = [data.draw(st.integers(0, n - 1)) for n in labels.shape]
        core = tuple(slice(a, data.draw(st.integers(a + 1, n)))
                     for a, n in zip(starts, labels.shape, strict=True))  # fmt: skip
    potential = reference.poisson_potential(labels, **case)
    flow = cpu.flow_of_potential(labels, potential, core=core, **case)
    expected = reference.flow_of_potential(labels, potential, core=core, **case)
    assert flow.dtype == np.float32
    assert flow.shape == expected.shape
    assert_allclose(flow, expected, rtol=0, atol=1e-6)


def test_flow_of_touching_instances_is_that_of_the_oracle() -> None:
    labels = random_blobs(np.random.default_rng(0), (24, 30, 27))
    flow = topo_dask.generate_diffusion_flows(labels, potential="poisson")
    assert_allclose(flow, reference.poisson_flow(labels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    labels = random_blobs(np.random.default_rng(1), (30, 30, 30), kinds=40)
    one = cpu.poisson_flow(labels)
    assert_array_equal(cpu.poisson_flow(labels, threads=threads), one)


# ── where an object lies, and what is around it ──────────────────────────────────────────────


def worm(shape: tuple[int, ...] = (21, 26, 23)) -> np.ndarray:
    """One crooked object: several balls along a path, joined; background all around."""
    axes = np.indices(shape)
    inside = np.zeros(shape, dtype=bool)
    for t in np.linspace(0, 1, 30):
        middle = [5 + 11 * t, 6 + 14 * t**2, 6 + 5 * np.sin(6 * t) ** 2 + 6 * t]
        inside |= sum((a - m) ** 2 for a, m in zip(axes, middle, strict=True)) < (3 + 2 * t) ** 2
    return inside


@pytest.mark.parametrize("potential", ["poisson", "heat"])
def test_the_same_object_anywhere_gets_the_same_flow(potential: str) -> None:
    inside = worm()
    rng = np.random.default_rng(2)
    flows = []
    for corner, origin in [((1, 1, 1), 0), ((4, 3, 8), 10**7), ((7, 2, 5), 12345)]:
        labels = random_blobs(rng, (40, 40, 40)) + 7
        at = tuple(slice(c, c + n) for c, n in zip(corner, inside.shape, strict=True))
        labels[at] = np.where(inside, 1, labels[at])
        flow = topo_dask.generate_diffusion_flows(
            labels, 100, adaptive_iters=False, potential=potential, origin=(origin,) * 3
        )
        flows.append(np.where(inside, flow[:, *at], 0))
    for flow in flows[1:]:
        assert_allclose(flow, flows[0], rtol=0, atol=1e-5)
    if potential == "poisson":
        assert_array_equal(flows[1], flows[0])
        assert_array_equal(flows[2], flows[0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_annotated_region_cuts_like_a_mirror(axis: int) -> None:
    """The potential in each part is that of the part and its mirror image as one object.

    So is the flow, except that in voxels at the cut the difference along the axis is one-sided
    by definition, of twice the size that the mirror makes it.
    """
    inside = np.moveaxis(worm(), 0, axis)
    cut = 11
    first, second = np.split(inside, [cut], axis=axis)
    mask = np.zeros(inside.shape, dtype=np.uint8)
    np.moveaxis(mask, axis, 0)[:cut] = 1
    for part, annotated, flipped in ((first, mask, True), (second, 1 - mask, False)):
        labels = np.where(annotated, inside, 0)
        whole = np.concatenate([part, np.flip(part, axis)][:: 1 if flipped else -1], axis=axis)
        there = slice(0, part.shape[axis]) if flipped else slice(part.shape[axis], None)
        here = slice(0, cut) if flipped else slice(cut, None)
        expected = np.moveaxis(cpu.poisson_potential(whole.astype(int)), axis, 0)[there]
        found = cpu.poisson_potential(labels, spatial_mask=annotated)
        assert_allclose(np.moveaxis(found, axis, 0)[here], expected, rtol=2 * SOLVED, atol=0)

        flow = topo_dask.generate_diffusion_flows(
            labels, potential="poisson", spatial_mask=annotated
        )
        mirror = topo_dask.generate_diffusion_flows(whole.astype(int), potential="poisson")
        flow = np.moveaxis(flow, axis + 1, 1)[:, here].astype(float)
        mirror = np.moveaxis(mirror, axis + 1, 1)[:, there].astype(float)
        at_cut = -1 if flipped else 0
        mirror[axis, at_cut] *= 2
        norm = np.sqrt((mirror[:, at_cut] ** 2).sum(axis=0))
        mirror[:, at_cut] /= np.where(norm == 0, 1, norm)
        assert_allclose(flow, mirror, rtol=0, atol=1e-5)


def test_pieces_without_a_border_get_no_flow() -> None:
    assert not topo_dask.generate_diffusion_flows(
        np.ones((3, 4, 5), int), potential="poisson"
    ).any()
    labels = np.zeros((5, 5, 20), int)
    labels[1:4, 1:4, 1:4] = labels[..., 10:] = 3  # two pieces: the second fills the volume's end
    labels[..., 9] = 4
    mask = labels > 0
    mask[..., 9] = False  # and 4, which is not annotated, is no border to it
    potential = cpu.poisson_potential(np.where(labels == 4, 0, labels), spatial_mask=mask)
    assert (potential[..., 10:] == 0).all()
    expected = reference.poisson_potential(np.where(labels == 4, 0, labels), spatial_mask=mask)
    assert_allclose(potential, expected, rtol=2 * SOLVED, atol=0)


def test_a_part_with_the_values_beyond_its_faces_is_like_the_whole() -> None:
    labels = random_blobs(np.random.default_rng(3), (20, 24, 22))
    whole = cpu.poisson_potential(labels, tolerance=1e-12)
    part = (slice(4, 15), slice(0, 13), slice(6, 22))
    beyond: list[Any] = []
    for axis, box in enumerate(part):
        for at, step in ((box.start, -1), (box.stop - 1, 1)):
            if not 0 <= at + step < labels.shape[axis]:
                beyond.append(None)
                continue
            here, there = list(part), list(part)
            here[axis], there[axis] = at, at + step
            same = labels[tuple(here)] == labels[tuple(there)]
            beyond.append(np.where(same, whole[tuple(there)], 0.0))
    found = cpu.poisson_potential(labels[part], beyond=beyond, tolerance=1e-12)
    assert_allclose(found, whole[part], rtol=1e-10, atol=0)
    flow = cpu.flow_of_potential(labels[part], found, beyond=beyond)
    expected = cpu.flow_of_potential(labels, whole, core=part)
    assert_allclose(flow, expected, rtol=0, atol=1e-5)


def test_a_solution_is_a_start_that_stays() -> None:
    labels = random_blobs(np.random.default_rng(4), (16, 16, 16))
    solution = cpu.poisson_potential(labels, tolerance=1e-10)
    assert_array_equal(cpu.poisson_potential(labels, start=solution, tolerance=1e-9), solution)


# ── spacing ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_spacing_is_like_resampling(axis: int) -> None:
    """Every other plane of an object, with twice the spacing, gets the flow of the whole object.

    A box whose walls are sampled: the same walls at both samplings. The flows differ by the
    difference of two second-order errors, which in the end falls by four with each refinement.
    """
    errors = []
    for n in (8, 16, 32):
        inside = np.pad(np.ones((2 * n - 1, 2 * n + 3, 2 * n - 1), dtype=int), 1)
        spacing = np.ones(3)
        spacing[axis] = 2
        every = tuple(slice(None, None, 2 if a == axis else None) for a in range(3))
        fine = topo_dask.generate_diffusion_flows(inside, potential="poisson")[:, *every]
        coarse = topo_dask.generate_diffusion_flows(
            inside[every], potential="poisson", spacing=tuple(spacing)
        )
        deep = tuple(slice(m // 4, -(m // 4)) for m in inside[every].shape)
        errors.append(float(angles(coarse, fine.astype(float))[deep].mean()))
    assert errors[0] < 0.1
    assert 3.0 < errors[0] / errors[1] < 4.5, errors
    assert 3.5 < errors[1] / errors[2] < 4.5, errors


def test_an_isotropic_spacing_changes_nothing() -> None:
    labels = ellipsoids()[:30, :30, :30]
    one = topo_dask.generate_diffusion_flows(labels, potential="poisson")
    eight = topo_dask.generate_diffusion_flows(labels, potential="poisson", spacing=(8, 8, 8))
    assert_allclose(eight, one, rtol=0, atol=1e-5)


# ── arrays, dask, and what is refused ────────────────────────────────────────────────────────


def test_numpy_dask_and_disk_give_one_answer(tmp_path: Any) -> None:
    labels = ellipsoids()
    options = {"potential": "poisson", "spacing": (2, 1, 1)}
    whole = topo_dask.generate_diffusion_flows(labels, **options)
    assert np.isin(np.round(np.linalg.norm(whole, axis=0), 5), (0, 1)).all()
    lazy = topo_dask.generate_diffusion_flows(da.from_array(labels, chunks=-1), **options)
    assert_array_equal(lazy.compute(), whole)
    plain = topo_dask.generate_diffusion_flows(labels, potential="poisson")
    made = topo_dask.flows(labels, tmp_path / "out.zarr", potential="poisson", cluster="sync")
    assert_array_equal(made.array[...], plain)


@pytest.mark.parametrize(
    ("spacing", "error", "part"),
    [
        ((0, 1, 1), InvalidArgument, "spacing along z"),
        ((1, -1, 1), InvalidArgument, "spacing along y"),
        ((1, 1, float("nan")), InvalidArgument, "spacing along x"),
        ((1, 1, float("inf")), InvalidArgument, "spacing along x"),
        ((1, 1), InvalidArgument, "spacing"),
        ((1, 1, 1, 1), InvalidArgument, "spacing"),
        (2.0, InvalidType, "spacing"),
        (("a", 1, 1), InvalidType, "spacing along z"),
        (None, InvalidType, "spacing"),
    ],
)
def test_bad_spacing_is_refused(spacing: Any, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        topo_dask.generate_diffusion_flows(
            np.ones((3, 3, 3), int), potential="poisson", spacing=spacing
        )


def test_dask_arrays_of_several_chunks_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="poisson"):
        topo_dask.generate_diffusion_flows(
            da.from_array(ellipsoids(), chunks=20), potential="poisson"
        )


def test_what_is_refused_lazily_names_the_way_on_disk(tmp_path: Any) -> None:
    labels = ellipsoids()
    lazy = da.from_array(labels, chunks=20)
    with pytest.raises(InvalidArgument, match=r"topo_dask\.flows\(labels, output, potential="):
        topo_dask.generate_diffusion_flows(lazy, potential="poisson")
    made = topo_dask.flows(
        lazy, tmp_path / "f.zarr", potential="poisson", blocks=20, cluster="sync"
    )
    whole = topo_dask.generate_diffusion_flows(labels, potential="poisson")
    assert_allclose(made.array[...], whole, atol=1e-4)
    one = topo_dask.generate_diffusion_flows(lazy.rechunk(labels.shape), potential="poisson")
    assert_allclose(one.compute(), whole, atol=1e-7)


def test_objects_wider_than_blocks_are_solved_in_rounds(tmp_path: Any) -> None:
    """What is left between the last two rounds must be far below what the flow tells apart."""
    z, y, x = np.indices((26, 28, 30))
    labels = (((z - 12.3) ** 2 + (y - 13.1) ** 2 + (x - 16.4) ** 2) < 11.6**2).astype("u1")
    labels[20:, 20:] = 2
    labels[3:9, 13, 14:17] = 0
    mask = np.ones(labels.shape, dtype="u1")
    mask[:, :, 26:] = 0
    for spatial_mask, spacing in ((None, (1, 1, 1)), (mask, (2, 1, 1))):
        whole = topo_dask.generate_diffusion_flows(
            labels, potential="poisson", spatial_mask=spatial_mask, spacing=spacing
        )
        made = topo_dask.flows(
            labels,
            tmp_path / "out.zarr",
            potential="poisson",
            spatial_mask=spatial_mask,
            spacing=spacing,
            blocks=(13, 14, 15),
            context=2,
            cluster="sync",
            overwrite=True,
        )
        assert_allclose(made.array[...], whole, rtol=0, atol=1e-4)
        said = re.fullmatch(
            r"a halo of 2 voxels, (\d+) rounds, (\d+) blocks solved: "
            r"potential within (.*) of itself",
            made.details["context"],
        )
        assert said is not None
        rounds, solves, bound = int(said[1]), int(said[2]), float(said[3])
        assert 10 < rounds < 80
        assert 8 <= solves <= 8 * rounds
        assert bound <= 1e-8
