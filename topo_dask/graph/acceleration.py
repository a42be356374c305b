"""Which diffusions are made by sums of Chebyshev polynomials, and what that takes.

An instance's share of it follows from the instance as a whole, the number of iterations and the
tolerance, never from blocks. Gradients shorter than 1e-8 are not stretched, so an absolute error
that is small beside that leaves every direction right, however far a field has faded. Of the
tolerance a quarter goes to what the sum leaves out, a half to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings
from topo_dask.kernels.cpu.chebyshev import degree_of
from topo_dask.kernels.cpu.diffusion import TINY
from topo_dask.kernels.tables import InstanceTable

ROUNDING = 2e-16
"""Error of a gradient for coordinates up to 1, before it is smoothed; measured: up to 7e-17."""

FEWEST = 8
"""Plain iterations at the end, at least: one pass over memory."""

SWEEP_COST = 2.0
"""What a sweep of a sum takes, in plain sweeps; measured: 1.7. Nothing less is gained."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """How the iterations of each instance are made.

    Parameters
    ----------
    powers
        How many are made by a sum; 0: none.
    tail_bits
        How exact it is, see `chebyshev_flow`.
    sweeps
        Sweeps in the place of the iterations, which is how far a voxel sees.
    """

    powers: Int64
    tail_bits: Int64
    sweeps: Int64

    @property
    def fast(self) -> npt.NDArray[np.bool_]:
        """Which are made by a sum."""
        fast: npt.NDArray[np.bool_] = self.powers > 0
        return fast


def applies(settings: FlowSettings) -> bool:
    """Whether any instance may be accelerated.

    Heat is stretched however far it has faded, so no absolute error would do; the other methods do
    not iterate; and rounds are of plain iterations.
    """
    diffuses = settings.method == "diffusion" and settings.potential == "coordinate"
    return settings.acceleration != "none" and diffuses and settings.rounds is None


def _exponents(values: npt.NDArray[Any]) -> Int64:
    """The least whole e with value < 2^e: exact, and so the same on every machine."""
    return np.asarray(np.frexp(values)[1], dtype=np.int64)


def shares_of(table: InstanceTable, iterations: Int64, settings: FlowSettings) -> Shares:
    """How the iterations of whole instances are made.

    With s the largest absolute coordinate of an instance and V its voxels, the sum leaves out at
    most 2^-b s sqrt(V) of the field in the sum of squares, and a difference of two voxels errs by
    sqrt(2) times as much. Rounding leaves an error of up to `ROUNDING` s, which p plain iterations
    diminish by p^(3/4), as diffusion does with noise in three dimensions.

    Parameters
    ----------
    table, iterations
        The instances, in global coordinates, and n of each.
    settings
        ``tolerance`` and ``acceleration``.

    Examples
    --------
    >>> from topo_dask.kernels.tables import InstanceTable
    >>> one = np.ones((2, 3), np.int64)
    >>> table = InstanceTable(
    ...     ids=np.array([1, 2], np.uint64),
    ...     voxels=np.array([10**6, 10**6]),
    ...     sums=one,
    ...     lo=0 * one,
    ...     hi=128 * one,
    ... )
    >>> shares_of(table, np.array([100, 2000]), FlowSettings(acceleration="auto")).sweeps
    array([100, 406])
    """
    plain = np.zeros(len(iterations), dtype=np.int64)
    total = np.asarray(iterations, dtype=np.int64)
    if not applies(settings) or len(total) == 0:
        return Shares(plain, plain, total)
    allowed = settings.tolerance * TINY
    size = np.maximum(np.abs(table.lo), np.abs(table.hi)).max(axis=1).astype(np.float64)
    left_out = np.sqrt(2.0 * table.voxels) * size / (allowed / 8)
    bits = np.clip(_exponents(left_out), 1, 300)
    rough = np.minimum(ROUNDING * size / (allowed / 4), 1e9)
    doublings = -(-_exponents(rough**4) // 3)  # p^3 >= rough^4
    rest = np.maximum(FEWEST, 2 ** np.clip(doublings, 0, 40))
    rest += (total - rest) % 2
    powers = np.maximum(total - rest, 0)
    pairs, which = np.unique(np.stack((powers, bits), axis=1), axis=0, return_inverse=True)
    degrees = np.array([degree_of(*pair) for pair in pairs.tolist()], dtype=np.int64)
    sweeps = degrees[which.ravel()] + rest
    fast = (powers > 0) & (SWEEP_COST * sweeps <= total)
    return Shares(np.where(fast, powers, 0), np.where(fast, bits, 0), np.where(fast, sweeps, total))


def sweeps_of(iterations: int, farthest: int, settings: FlowSettings) -> int:
    """Sweeps for an instance of so many iterations that fills a cube up to a coordinate.

    Examples
    --------
    >>> settings = FlowSettings(acceleration="auto")
    >>> [sweeps_of(n, 512, settings) for n in (200, 2000, 20000)]
    [200, 422, 1324]
    """
    corner = np.full((1, 3), farthest, dtype=np.int64)
    voxels = np.array([min(farthest**3, 2**62)], dtype=np.int64)
    cube = InstanceTable(
        ids=np.ones(1, np.uint64), voxels=voxels, sums=corner, lo=corner, hi=corner
    )
    return int(shares_of(cube, np.array([iterations]), settings).sweeps[0])


def most_sweeps(iterations: int, farthest: int, settings: FlowSettings) -> int:
    """Sweeps that no instance of at most so many iterations, up to a coordinate, exceeds."""
    sweeps = sweeps_of(iterations, farthest, settings)
    # Fewer iterations take fewer sweeps; those that would gain nothing are no more than that.
    return min(iterations, int(SWEEP_COST * (sweeps + 1)) + 1)


def explained(settings: FlowSettings, sweeps: int, rounds: int) -> tuple[str, str]:
    """What is done about acceleration, and why.

    Parameters
    ----------
    settings
        With an ``acceleration`` other than "none".
    sweeps
        Of the instance with most iterations; 0 where it gains nothing.
    rounds
        Iterations a round, where the flows are made in rounds; else 0.

    Examples
    --------
    >>> what, why = explained(FlowSettings(n_iter=2000, acceleration="auto"), 444, 0)
    >>> what, why.split(";")[0]
    ('chebyshev', 'at most 444 sweeps for 2000 iterations, within 0.0001, on the processor')
    """
    if not applies(settings):
        if settings.method != "diffusion" or settings.potential == "poisson":
            return "none", "there are no iterations"
        if settings.potential == "heat":
            return "none", "heat needs every iteration: its direction counts however faint it is"
        return "none", "rounds are of plain iterations"
    if rounds:
        return "none", f"rounds of {rounds} plain iterations are cheaper"
    if sweeps == 0:
        why = f"{settings.n_iter} iterations are few, for coordinates as large as these"
        return "where it helps", why
    within = f"within {settings.tolerance:g}, on the processor; plain where it gains nothing"
    return "chebyshev", f"at most {sweeps} sweeps for {settings.n_iter} iterations, {within}"
