"""Settings of the methods: frozen, checked when made, and part of every run's fingerprint."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from topo_dask.errors import InvalidArgument, InvalidType

METHODS = ("diffusion", "direct")
POTENTIALS = ("coordinate", "heat", "poisson")
INTERPOLATIONS = ("nearest", "linear")
GROUPS = (1, 2, 3)
ACCELERATIONS = ("none", "chebyshev", "auto")
BACKENDS = ("auto", "cpu", "gpu")


def choice(argument: str, value: Any, known: Sequence[Any]) -> None:
    """Raise InvalidArgument unless ``value`` is one of ``known``."""
    if not isinstance(value, Hashable) or value not in known:  # arrays compare by their elements
        names = ", ".join(map(str, known))
        raise InvalidArgument(argument, repr(value), f"one of: {names}", "Choose one of these.")


def counting(settings: Any) -> dict[str, Any]:
    """The fields of frozen settings that count when they are compared: what says what is made.

    Examples
    --------
    >>> "backend" in counting(FlowSettings())
    False
    """
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.compare}


def number(
    argument: str,
    value: Any,
    allowed: Callable[[float], bool],
    text: str,
    *,
    whole: bool = False,
    default: Any = None,
) -> None:
    """Raise InvalidType or InvalidArgument unless ``value`` is a finite number that is allowed.

    Examples
    --------
    >>> number("n_steps", -1, lambda v: v >= 0, "a whole number >= 0", whole=True, default=100)
    Traceback (most recent call last):
    topo_dask.errors.InvalidArgument: n_steps: got -1; allowed: a whole number >= 0. Leave it out \
for 100.
    """
    do = "Choose such a number." if default is None else f"Leave it out for {default}."
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        raise InvalidType(argument, repr(value), text, do) from None
    except OverflowError:
        as_float = math.inf
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise InvalidType(argument, repr(value), text, do)
    if not math.isfinite(as_float) or not allowed(as_float) or (whole and as_float != int(value)):
        raise InvalidArgument(argument, repr(value), text, do)


def boolean(argument: str, value: Any) -> None:
    """Raise InvalidType unless ``value`` is true or false: "no" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidType(argument, repr(value), "true or false", "Pass one of these.")


def iterations(argument: str, value: Any, *, default: Any = None) -> None:
    """Raise unless ``value`` is a number of iterations or steps."""
    text = "a whole number >= 0 and <= 2147483647"
    number(argument, value, lambda v: 0 <= v < 2**31, text, whole=True, default=default)


def lengths_of_voxel(argument: str, value: Any) -> tuple[float, float, float]:
    """Three lengths z, y, x that are numbers > 0, as floats; raise unless ``value`` is that.

    Examples
    --------
    >>> lengths_of_voxel("spacing", (40, 8, 8))
    (40.0, 8.0, 8.0)
    """
    text = "three numbers > 0, along z, y, x"
    try:
        z, y, x = value
    except (TypeError, ValueError) as error:
        kind = InvalidArgument if isinstance(error, ValueError) else InvalidType
        raise kind(argument, repr(value), text, "Pass e.g. (40, 8, 8).") from None
    allowed = "a number > 0 that float32 can hold"
    for axis, length in zip("zyx", (z, y, x), strict=True):
        number(f"{argument} along {axis}", length, lambda v: 1e-37 < v < 1e38, allowed)
    return float(z), float(y), float(x)


@dataclass(frozen=True)
class FlowSettings:
    """How flows are made of labels.

    Parameters
    ----------
    method
        "diffusion" (objects of any form) or "direct" (convex objects).
    potential
        What diffuses: "coordinate" or "heat"; or "poisson", the steady state of a heated instance.
    n_iter
        Most iterations of an instance; of no account to "poisson", as are the next two.
    adaptive_iters
        Whether a small instance gets fewer: adaptive_factor times its longest side.
    adaptive_factor
        See there.
    context
        Voxels computed around each block and thrown away; "auto" follows from the other settings.
    tolerance
        How far, with context "auto", a component may be from that of the whole volume.
    rounds
        Instead of a context: rounds of so many iterations, between which blocks read each other's
        fields; "auto" takes the cheapest number. ``None``: rounds where they are cheaper than the
        automatic context.
    spacing
        Distance of voxels along z, y, x, in any unit: flows are unit vectors in it.
    acceleration
        "chebyshev": long diffusions of coordinates take some sqrt(n) sweeps in the place of n, and
        are within ``tolerance`` of those; "auto": where that is possible and cheaper than rounds.
    backend
        What computes, see `topo_dask.kernels.backends`. It says nothing of the result, so it
        counts neither where settings are compared nor in fingerprints.

    Examples
    --------
    >>> FlowSettings(n_iter=100).potential
    'coordinate'
    """

    method: str = "diffusion"
    potential: str = "coordinate"
    n_iter: int = 200
    adaptive_iters: bool = True
    adaptive_factor: float = 6
    context: int | Literal["auto"] = "auto"
    tolerance: float = 1e-4
    rounds: int | Literal["auto"] | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    acceleration: str = "none"
    backend: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        choice("acceleration", self.acceleration, ACCELERATIONS)
        choice("method", self.method, METHODS)
        choice("potential", self.potential, POTENTIALS)
        iterations("n_iter", self.n_iter, default=200)
        boolean("adaptive_iters", self.adaptive_iters)
        text = "a number > 0"
        number("adaptive_factor", self.adaptive_factor, lambda v: v > 0, text, default=6)
        if self.context != "auto":
            text = "'auto' or a whole number >= 0"
            number("context", self.context, lambda v: v >= 0, text, whole=True, default="'auto'")
        text = "a number between 0 and 1"
        number("tolerance", self.tolerance, lambda v: 0 < v < 1, text, default=1e-4)
        if self.rounds not in (None, "auto"):
            text = "'auto', None or a whole number >= 1"
            number("rounds", self.rounds, lambda v: v >= 1, text, whole=True, default=None)
        if self.rounds is not None and self.context != "auto":
            raise InvalidArgument(
                "rounds",
                f"{self.rounds!r} with context={self.context!r}",
                "rounds, or a context",
                "Leave out one of them: rounds have a context of their own.",
            )
        self._check_acceleration()
        object.__setattr__(self, "spacing", lengths_of_voxel("spacing", self.spacing))

    def _check_acceleration(self) -> None:
        if self.acceleration != "chebyshev":
            return
        if self.method != "diffusion" or self.potential != "coordinate":
            raise InvalidArgument(
                "acceleration",
                f"'chebyshev' with method={self.method!r}, potential={self.potential!r}",
                "'chebyshev' with method='diffusion' and potential='coordinate'",
                "Choose 'auto' or 'none': heat needs every iteration, the others make none.",
            )
        if self.rounds is not None:
            raise InvalidArgument(
                "acceleration",
                f"'chebyshev' with rounds={self.rounds!r}",
                "acceleration, or rounds",
                "Leave out one of them: rounds are of plain iterations.",
            )


@dataclass(frozen=True)
class SegmentSettings:
    """How instances are made of flows.

    Parameters
    ----------
    n_steps
        Steps that each particle makes.
    step_size
        Length of a step, in voxels, where the flow has length 1.
    convergence_radius
        Particles whose cells end closer than this are one instance, in voxels.
    min_size
        Instances with fewer voxels become background.
    group
        1, convex objects: tracking and clustering. 2, elongated objects: then joining what
        touches and agrees, and splitting what is disconnected. 3, thin objects: as 1, then
        every foreground voxel without a label takes that of the nearest labelled one.
    interpolation
        What the flow is between voxels: that of the voxel below ("nearest"), or trilinear
        ("linear").
    backend
        What computes; see `FlowSettings`.

    Examples
    --------
    >>> SegmentSettings().n_steps
    100
    """

    n_steps: int = 100
    step_size: float = 1.0
    convergence_radius: float = 4.0
    min_size: int = 50
    group: int = 1
    interpolation: str = "nearest"
    backend: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        iterations("n_steps", self.n_steps, default=100)
        text = "a number > 0 that float32 can hold"
        number("step_size", self.step_size, lambda v: 1e-37 < v < 1e38, text, default=1.0)
        radius = self.convergence_radius
        number("convergence_radius", radius, lambda v: 1e-37 < v < 1e38, text, default=4.0)
        text = "a whole number >= 0, and at most 2**62"
        number("min_size", self.min_size, lambda v: 0 <= v <= 2**62, text, whole=True, default=50)
        choice("group", self.group, GROUPS)
        choice("interpolation", self.interpolation, INTERPOLATIONS)

    @property
    def travel(self) -> float:
        """Most voxels that a particle goes along flows of length 1."""
        return self.n_steps * self.step_size


@dataclass(frozen=True)
class RefineSettings:
    """What is done with instances once they are found.

    Parameters
    ----------
    flow_error_threshold
        Instances whose flow is farther than this from the direct flow are dropped; 0 drops none.
    fill_holes
        Whether background that one instance encloses becomes its own.

    Examples
    --------
    >>> RefineSettings().fill_holes
    False
    """

    flow_error_threshold: float = 0.0
    fill_holes: bool = False

    def __post_init__(self) -> None:
        text = "a number >= 0, where 0 drops nothing"
        check, name = (lambda v: v >= 0), "flow_error_threshold"
        number(name, self.flow_error_threshold, check, text, default=0.0)
        boolean("fill_holes", self.fill_holes)
