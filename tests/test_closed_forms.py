"""Heat and Poisson flows of slabs, boxes, balls, cylinders and shells against closed forms.

The walls of a box lie in the planes of the voxel centres beside it, so its continuous solution is
known, and errors fall by four when the grid is twice as fine. Curved walls come in two ways:

- not at all: a box is cut out of the object, and the closed form is given in the voxels beyond its
  faces. Then only the equation is discrete, and the error falls by four (it is 0 where the closed
  form is a quadratic: ball, cylinder, slab);
- as a staircase of voxels, each of which puts the wall up to a voxel too far out. Of that error
  the mean over the wall, an object larger by part of a voxel, has no influence on a direction to
  the middle. Its ripple dies out within a few voxels from the wall. What is left in the inner
  third of a ball is a shift of the middle: the mean of N ~ (R/h)^2 offsets of about h, so h/sqrt(N)
  ~ h^2. Along a circle there are only N ~ R/h of them: a cylinder's error falls by 2^1.5 = 2.8. (A
  part of first order, since the offset depends on the wall's direction, has a small factor, and
  falls with the fourth power of the radius inwards.) Errors are the root mean square over random
  positions of the object between the voxels.

Lengths are in voxels where not said otherwise; heat is at the time t = n/6 after n iterations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from topo_dask.kernels import cpu

POTENTIALS = pytest.mark.parametrize("potential", ["poisson", "heat"])
INNER_RADIUS = 0.5  # of shells, over the outer one


def flow_of(labels: np.ndarray, potential: str, iterations: int) -> np.ndarray:
    if potential == "poisson":
        return cpu.poisson_flow(labels).astype(np.float64)
    return cpu.diffusion_flow(
        labels,
        ids=np.array([1], dtype=np.uint64),
        iterations=np.array([iterations]),
        anchors=np.zeros((1, 3), dtype=np.int64),
        potential="heat",
    ).astype(np.float64)


def unit(gradient: np.ndarray) -> np.ndarray:
    norm = np.sqrt((gradient**2).sum(axis=0))
    return gradient / np.where(norm == 0, 1, norm)


def angles(flow: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Between unit vectors, in radians."""
    chord = np.sqrt(((flow - wanted) ** 2).sum(axis=0))
    return 2 * np.arcsin(np.minimum(chord / 2, 1.0))


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


# ── walls in planes of voxels ────────────────────────────────────────────────────────────────


def sines(length: int, x: np.ndarray, modes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Modes and slopes at x in a slab with walls at 0 and ``length``, and the wave numbers."""
    waves = modes * np.pi / length
    return np.sin(np.outer(waves, x)), waves[:, None] * np.cos(np.outer(waves, x)), waves


def box_flow(
    lengths: tuple[int, ...], at: list[np.ndarray], potential: str, time: float
) -> np.ndarray:
    """Closed form: 1 = sum of (4 / pi k) sin(pi k x / L) over odd k along each axis."""
    modes = np.arange(1, 100, 2)
    axes = [sines(length, x, modes) for length, x in zip(lengths, at, strict=True)]
    # Cut off smoothly, without which the sum oscillates for long.
    start = 4 / (np.pi * modes) * np.exp(-36 * (modes / 100) ** 8)
    squares = [waves**2 for _, _, waves in axes]
    total = squares[0][:, None, None] + squares[1][:, None] + squares[2]
    # A mode decays as exp(-w^2 t); a steady source sums that over all times.
    factor = 1 / total if potential == "poisson" else np.exp(-total * time)
    factor = factor * start[:, None, None] * start[:, None] * start
    gradient = []
    for axis in range(3):
        z, y, x = (slope if a == axis else mode for a, (mode, slope, _) in enumerate(axes))
        gradient.append(np.einsum("abc,az,by,cx->zyx", factor, z, y, x, optimize=True))
    return unit(np.array(gradient))


@POTENTIALS
def test_box_is_of_second_order(potential: str) -> None:
    errors = []
    for n in (8, 16, 32):
        lengths = (n, n + n // 2, 2 * n)
        iterations = n * n // 4
        # The same points at each refinement, none of them in the middle.
        at = [np.arange(n // 8, length, n // 4) for length in lengths]
        labels = np.pad(np.ones([length - 1 for length in lengths], dtype=np.uint8), 1)
        flow = flow_of(labels, potential, iterations)[(slice(None), *np.ix_(*at))]
        wanted = box_flow(lengths, at, potential, iterations / 6)
        errors.append(rms(angles(flow, wanted)))
    assert errors[2] < 2e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 3.4 < coarse / fine < 5, errors


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slab_is_exact(axis: int) -> None:
    """With u = x (L - x) / 2: a difference of second order makes no error in a quadratic."""
    labels = np.moveaxis(np.pad(np.ones((63, 4, 5), dtype=int), ((1, 1), (0, 0), (0, 0))), 0, axis)
    x = np.arange(65)
    wanted = np.broadcast_to((x * (64 - x) / 2)[:, None, None], (65, 4, 5))
    potential = np.moveaxis(cpu.poisson_potential(labels), axis, 0)
    assert_allclose(potential, wanted, rtol=1e-9, atol=0)
    for name in ("poisson", "heat"):
        flow = np.moveaxis(flow_of(labels, name, 900), axis + 1, 1)
        expected = np.zeros((3, 65, 4, 5))
        expected[axis] = np.sign(np.where(x % 64, 32 - x, 0))[:, None, None]
        assert_allclose(flow, expected, rtol=0, atol=1e-6)


# ── curved objects, cut out with the closed form around ──────────────────────────────────────


def shell_u(r: np.ndarray, inner: float) -> np.ndarray:
    """U between spheres of the radii ``inner`` and 1."""
    slope = -(1 - inner**2) / (6 * (1 / inner - 1))
    return (1 - r**2) / 6 + slope * (1 / r - 1)


def norm_of(*axes: np.ndarray) -> np.ndarray:
    return np.sqrt(sum(a**2 for a in axes))


CUT_OUT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ball": lambda x: (1 - norm_of(*x) ** 2) / 6,
    "cylinder": lambda x: (1 - norm_of(x[1], x[2]) ** 2) / 4,
    "slab": lambda x: (1 - x[2] ** 2) / 2,
    "shell": lambda x: shell_u(norm_of(*x), 0.4),
}


def cut_out(name: str, side: int) -> tuple[float, float]:
    """Errors in a box of ``side`` intervals: of u over the largest u, and of the flow (angle)."""
    step = 0.3 / side
    lattice = np.indices((side + 1,) * 3) * step
    x = lattice + np.array([0.2, 0.25, 0.3])[:, None, None, None]
    u = CUT_OUT[name](x) / step**2
    beyond = []
    for axis in range(3):
        for end in (0, -1):
            at: list[Any] = [slice(1, -1)] * 3
            at[axis] = end
            beyond.append(u[tuple(at)])
    inner = (slice(1, -1),) * 3
    labels = np.ones((side - 1,) * 3, dtype=int)
    found = cpu.poisson_potential(labels, beyond=beyond, tolerance=1e-12)
    flow = cpu.flow_of_potential(labels, found, beyond=beyond).astype(float)
    tiny = 1e-6
    gradient = []
    for axis in range(3):
        shift = np.zeros((3, 1, 1, 1))
        shift[axis] = tiny
        gradient.append(CUT_OUT[name](x + shift) - CUT_OUT[name](x - shift))
    wanted = unit(np.array(gradient))[(slice(None), *inner)]
    quarter = side // 4  # the same points at each refinement
    there = (slice(None), *[slice(quarter - 1, None, quarter)] * 3)
    worst = float(np.abs(found - u[inner]).max() / u.max())
    return worst, rms(angles(flow[there], wanted[there]))


@pytest.mark.parametrize("name", ["ball", "cylinder", "slab"])
def test_quadratics_with_their_values_beyond_are_exact(name: str) -> None:
    for side in (8, 16, 32):
        of_u, of_flow = cut_out(name, side)
        assert of_u < 1e-11
        assert of_flow < 1e-6


def test_shell_with_its_values_beyond_is_of_second_order() -> None:
    errors = np.array([cut_out("shell", side) for side in (8, 16, 32, 64)])
    assert (errors[-1] < [1e-5, 1e-3]).all(), errors
    falls = errors[:-1] / errors[1:]
    assert (falls > 3.5).all(), errors
    assert (falls[-1] < 4.5).all(), errors


# ── curved objects of voxels ─────────────────────────────────────────────────────────────────


def shell_slope(r: np.ndarray, radius: float, potential: str, time: float) -> np.ndarray:
    """Derivative of u along the radius in a shell; r u(r) is one-dimensional heat."""
    inner = INNER_RADIUS * radius
    if potential == "poisson":
        return -r / 3 + (radius**2 - inner**2) / (6 * (1 / inner - 1 / radius)) / r**2
    width = radius - inner
    slope = np.zeros_like(r)
    for k in range(1, 20):
        wave = k * np.pi / width
        start = 2 / (k * np.pi) * (inner - (-1) ** k * radius)
        decayed = start * np.exp(-(wave**2) * time)
        x = wave * (r - inner)
        slope += decayed * (wave * np.cos(x) / r - np.sin(x) / r**2)
    return slope


def staircase_error(name: str, radius: int, potential: str, middle: np.ndarray) -> float:
    """Angle to the closed form, well inside: root mean square."""
    n = 2 * radius + 5
    lattice = np.indices((1 if name == "cylinder" else n, n, n))
    d = lattice - (n // 2 + middle)[:, None, None, None]
    if name == "cylinder":
        d[0] = 0
    r = np.sqrt((d**2).sum(axis=0))
    iterations = round((0.15 if name == "shell" else 0.6) * radius**2)
    labels = (r < radius).astype(np.uint8)
    wanted = -unit(d)
    where = (r > 0.2 * radius) & (r < 0.3 * radius)
    if name == "shell":
        labels[r < INNER_RADIUS * radius] = 0
        wanted *= -np.sign(shell_slope(np.maximum(r, 0.1), radius, potential, iterations / 6))
        where = (r > 0.8 * radius) & (r < 0.9 * radius)
    return rms(angles(flow_of(labels, potential, iterations), wanted)[where])


@POTENTIALS
@pytest.mark.parametrize(
    ("name", "radii", "positions", "least", "at_last"),
    [
        ("ball", (6, 12, 24), (60, 20, 6), 3.3, 2e-3),
        ("cylinder", (8, 16, 32, 64), (60, 60, 60, 40), 2.3, 2e-3),
        # Between its walls the direction turns: the shift of either wall is of the first order.
        ("shell", (8, 16, 32), (30, 8, 3), 2.3, 1.2e-2),
    ],
)
def test_staircase_walls(
    name: str,
    radii: tuple[int, ...],
    positions: tuple[int, ...],
    least: float,
    at_last: float,
    potential: str,
) -> None:
    rng = np.random.default_rng(0)
    errors = [
        rms(np.array([staircase_error(name, r, potential, rng.random(3) - 0.5) for _ in range(n)]))
        for r, n in zip(radii, positions, strict=True)
    ]
    whole = errors[0] / errors[-1]
    assert whole > least ** (len(radii) - 1), errors
    assert errors[-1] < at_last
