"""Classes of organelles: how flows are made of their labels and instances of their flows.

The defaults, per voxel size, are in ``class_defaults.yaml``; users may write the like.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

import yaml

from topo_dask.config import METHODS, POTENTIALS, FlowSettings, boolean, choice, iterations, number
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType

EVALUATED_INSTANCE_CLASSES = ["nuc", "ves", "endo", "lyso", "ld", "perox", "mito", "mt", "cell"]
"""The classes that have defaults, in the order of a stack without names."""

FLOWS = "flow_generation"
POSTPROCESSING = "postprocessing"
GROUPS = (1, 2, 3)


@dataclass(frozen=True)
class ClassFlows:
    """How the targets of a class are made of its labels.

    Parameters
    ----------
    group
        1 convex, 2 elongated, 3 thin: how its instances are found again.
    flow_type
        "direct" or "diffusion".
    diffusion_iters
        Most iterations of an instance; ``None`` for what the caller says.
    potential
        What diffuses.
    boundary_only
        Train only near annotated background.
    boundary_width
        How near, in voxels.

    Examples
    --------
    >>> ClassFlows(flow_type="diffusion").boundary_only
    False
    """

    group: int = 1
    flow_type: str = "direct"
    diffusion_iters: int | None = None
    potential: str = "coordinate"
    boundary_only: bool = False
    boundary_width: float = 20

    @property
    def reach(self) -> float | None:
        """Distance from annotated background within which a voxel is trained on; None for any."""
        return self.boundary_width if self.boundary_only else None

    def settings(self, others: FlowSettings) -> FlowSettings:
        """The settings of this class; what it does not say is as in ``others``."""
        n_iter = others.n_iter if self.diffusion_iters is None else self.diffusion_iters
        # What accelerates one class says nothing against the methods of others.
        coordinate = self.flow_type == "diffusion" and self.potential == "coordinate"
        return replace(
            others,
            method=self.flow_type,
            potential=self.potential,
            n_iter=n_iter,
            acceleration=others.acceleration if coordinate else "none",
        )


@dataclass(frozen=True)
class ClassInstances:
    """How the instances of a class are found in its flows; see `topo_dask.postprocess_single`."""

    group: int = 1
    n_steps: int = 100
    step_size: float = 1.0
    convergence_radius: float = 4.0
    min_size: int = 50


def _iterations_or_none(argument: str, value: Any) -> None:
    if value is not None:
        iterations(argument, value)


def _whole(least: int) -> Callable[[str, Any], None]:
    text = f"a whole number >= {least}"
    return lambda argument, value: number(argument, value, lambda v: v >= least, text, whole=True)


def _length(argument: str, value: Any) -> None:
    number(argument, value, lambda v: 1e-37 < v < 1e38, "a number > 0 that float32 can hold")


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "group": lambda argument, value: choice(argument, value, GROUPS),
    "flow_type": lambda argument, value: choice(argument, value, METHODS),
    "potential": lambda argument, value: choice(argument, value, POTENTIALS),
    "diffusion_iters": _iterations_or_none,
    "boundary_only": boolean,
    "boundary_width": lambda a, value: number(a, value, lambda v: v >= 0, "a number >= 0"),
    "n_steps": iterations,
    "step_size": _length,
    "convergence_radius": _length,
    "min_size": _whole(0),
}

Settings = TypeVar("Settings", ClassFlows, ClassInstances)


def get_instance_class_config(resolution_nm: float | None = None) -> dict[str, dict[str, Any]]:
    """Default ways to make flows of labels, by class.

    Parameters
    ----------
    resolution_nm
        Edge of a voxel in nm; there are defaults for 8, 16, 32 and 64, others take the nearest.

    Returns
    -------
    dict
        For each class ``group``, ``flow_type`` and, where they matter, ``diffusion_iters``,
        ``boundary_only`` and ``boundary_width``. It is yours to change and pass on.

    Raises
    ------
    InvalidArgument, InvalidType
        Not a length.

    Examples
    --------
    >>> get_instance_class_config(8)["mito"]
    {'group': 2, 'flow_type': 'diffusion', 'diffusion_iters': 2000}
    """
    return _plain_defaults(FLOWS, resolution_nm)


def get_postprocess_config(resolution_nm: float | None = None) -> dict[str, dict[str, Any]]:
    """Default ways to find instances in flows, by class.

    Parameters
    ----------
    resolution_nm
        Edge of a voxel in nm; there are defaults for 8, 16, 32 and 64, others take the nearest.

    Returns
    -------
    dict
        For each class ``group``, ``n_steps``, ``step_size``, ``convergence_radius`` and
        ``min_size``. It is yours to change and pass on.

    Raises
    ------
    InvalidArgument, InvalidType
        Not a length.

    Examples
    --------
    >>> get_postprocess_config(20)["mito"] == get_postprocess_config(16)["mito"]
    True
    """
    return _plain_defaults(POSTPROCESSING, resolution_nm)


def flow_config(
    class_config: Any = None, resolution_nm: float | None = None
) -> dict[str, ClassFlows]:
    """How the targets of each class are made: the user's ways, then the defaults.

    Parameters
    ----------
    class_config
        A dict, or the path of a YAML file: for each class what differs from `ClassFlows`; that
        may be keyed by voxel size, and may stand under ``flow_generation``.
    resolution_nm
        Edge of a voxel in nm; may be left out where ``class_config`` says all that is needed.

    Returns
    -------
    dict of ClassFlows

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        The offending class and key are named, and what is known.

    Examples
    --------
    >>> flow_config({"axon": {"flow_type": "diffusion"}})["axon"].flow_type
    'diffusion'
    """
    return _checked(ClassFlows, FLOWS, class_config, resolution_nm)


def postprocess_config(
    class_config: Any = None, resolution_nm: float | None = None
) -> dict[str, ClassInstances]:
    """How the instances of each class are found; as `flow_config`, under ``postprocessing``.

    Examples
    --------
    >>> postprocess_config({"axon": {"n_steps": 40}})["axon"].n_steps
    40
    """
    return _checked(ClassInstances, POSTPROCESSING, class_config, resolution_nm)


def names_of_classes(class_names: Any, count: int, *, argument: str = "class_names") -> list[str]:
    """Check the names of a stack of classes: one each.

    Raises
    ------
    InvalidArgument, InvalidType
        Not as many names as classes, or no names.

    Examples
    --------
    >>> names_of_classes(("nuc", "mito"), 2)
    ['nuc', 'mito']
    """
    given = EVALUATED_INSTANCE_CLASSES if class_names is None else class_names
    unordered = isinstance(given, (str, set, frozenset)) or not isinstance(given, Iterable)
    listed = [] if unordered else list(given)
    if not (listed and all(isinstance(name, str) for name in listed)):
        raise InvalidType(argument, repr(given), "a list of names", "Pass e.g. ['nuc', 'mito'].")
    if len(listed) != count:
        came = "the default names" if class_names is None else f"{len(listed)} names"
        raise InvalidArgument(
            argument,
            f"{came} ({', '.join(listed)}) for {count} classes",
            "one name for each class of the stack",
            f"Pass {count} names, in the order of the first axis.",
        )
    return [str(name) for name in listed]


def classes_of(
    names: Sequence[str], config: Mapping[str, Settings], *, argument: str = "class_names"
) -> list[Settings]:
    """What a configuration says of each class.

    Raises
    ------
    InvalidArgument
        A class that nobody configured; the known ones are named.

    Examples
    --------
    >>> classes_of(["glia"], flow_config(resolution_nm=8))
    Traceback (most recent call last):
    topo_dask.errors.InvalidArgument: class_names: got 'glia', a class without configuration; ...
    """
    for name in names:
        if name not in config:
            raise InvalidArgument(
                argument,
                f"{name!r}, a class without configuration",
                f"the known classes: {', '.join(config) or 'none'}",
                _similar(name, config) or f"Add {name!r} to class_config.",
            )
    return [config[name] for name in names]


@dataclass(frozen=True)
class ClassMethod:
    """How the targets of one class of a stack are made.

    Parameters
    ----------
    name
        The class.
    settings
        How its flows are made.
    reach
        Distance from annotated background within which it is trained on; ``None`` for any.
    """

    name: str
    settings: FlowSettings
    reach: float | None


def class_methods(
    class_names: Any,
    count: int,
    class_config: Any,
    resolution_nm: float | None,
    others: FlowSettings,
) -> list[ClassMethod]:
    """How the targets of each class of a stack are made.

    Parameters
    ----------
    class_names, count
        See `names_of_classes`.
    class_config, resolution_nm
        See `flow_config`.
    others
        Settings that classes do not say.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        The argument, or the offending class and key, are named.

    Examples
    --------
    >>> class_methods(["cell"], 1, None, 8, FlowSettings())[0].reach
    40
    """
    names = names_of_classes(class_names, count)
    methods = []
    for name, chosen in zip(
        names, classes_of(names, flow_config(class_config, resolution_nm)), strict=True
    ):
        try:
            settings = chosen.settings(others)
        except InvalidArgument as error:  # a value that is wrong together with another
            argument = f"class_config, {error.argument} of class {name!r}"
            raise InvalidArgument(argument, error.came, error.allowed, error.do) from None
        methods.append(ClassMethod(name, settings, chosen.reach))
    return methods


def _similar(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


@lru_cache
def _defaults() -> Any:
    return yaml.safe_load(files("topo_dask").joinpath("class_defaults.yaml").read_text("utf-8"))


def _nearest(sizes: Mapping[Any, Any], resolution_nm: float | None, do: str) -> Any:
    """What is said for the nearest voxel size, the finer of two that are equally near."""
    if resolution_nm is None:
        raise InvalidArgument("resolution_nm", None, "the edge of a voxel in nm", do)
    number("resolution_nm", resolution_nm, lambda v: v > 0, "a number > 0")
    return sizes[min(sorted(sizes), key=lambda size: abs(size - resolution_nm))]


def _plain_defaults(section: str, resolution_nm: float | None) -> dict[str, dict[str, Any]]:
    chosen = _nearest(_defaults()[section], resolution_nm, "Pass e.g. resolution_nm=8.")
    return {name: dict(chosen[name]) for name in EVALUATED_INSTANCE_CLASSES}


def _checked(
    kind: type[Settings], section: str, given: Any, resolution_nm: float | None
) -> dict[str, Settings]:
    if given is None:
        do = "Pass e.g. resolution_nm=8, or class_config with every class."
        _nearest(_defaults()[section], resolution_nm, do)
    plain = {} if resolution_nm is None else _plain_defaults(section, resolution_nm)
    if given is not None:
        plain = {**plain, **_classes(given, section, resolution_nm)}
    return {name: _class(kind, name, values) for name, values in plain.items()}


def _classes(given: Any, section: str, resolution_nm: float | None) -> Mapping[str, Any]:
    """The classes of a user's configuration, wherever they stand in it."""
    if isinstance(given, (str, os.PathLike)):
        given = _read(given)
    allowed = "for each class the keys and values that differ from the defaults"
    if isinstance(given, Mapping) and given and set(given) <= {FLOWS, POSTPROCESSING}:
        given = given.get(section) or {}
    if isinstance(given, Mapping) and given and all(_is_size(key) for key in given):
        do = "Pass resolution_nm: this configuration is keyed by voxel size."
        given = _nearest(given, resolution_nm, do)
    if not isinstance(given, Mapping):
        raise InvalidType("class_config", repr(given), f"a dict or a YAML file: {allowed}")
    return given


def _is_size(key: Any) -> bool:
    return isinstance(key, (int, float)) and not isinstance(key, bool)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key, _ in node.value if keys.count(key.value) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice.value!r} stands there twice", twice.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(path: str | os.PathLike[str]) -> Any:
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as text:
            return yaml.load(text, _Loader)
    except OSError as error:
        raise InputNotFound(
            "class_config",
            f"{name!r}, which cannot be read ({error.strerror})",
            "a dict, or the path of a YAML file",
            "Check the path.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise InvalidData(
            "class_config", f"{name!r}, which is not YAML: {why}", "a YAML file", "Mend it there."
        ) from error


def _class(kind: type[Settings], name: Any, values: Any) -> Settings:
    if not isinstance(name, str):
        raise InvalidType("class_config", f"the class {name!r}", "names of classes", "Quote it.")
    known = [f.name for f in fields(kind)]
    if not isinstance(values, Mapping):
        raise InvalidType(
            "class_config", f"{values!r} for class {name!r}", f"keys and values: {', '.join(known)}"
        )
    for key, value in values.items():
        if key not in known:
            raise InvalidArgument(
                "class_config",
                f"the key {key!r} of class {name!r}",
                f"the keys {', '.join(known)}",
                _similar(key, known) or "Remove it.",
            )
        CHECKS[key](f"class_config, {key} of class {name!r}", value)
    return kind(**values)
