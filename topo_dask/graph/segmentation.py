"""Instances of several classes, from their probabilities and flows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.classes import ClassInstances, classes_of, names_of_classes, postprocess_config
from topo_dask.config import BACKENDS, INTERPOLATIONS, RefineSettings, choice
from topo_dask.errors import InvalidArgument, InvalidData
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import (
    check_between_0_and_1,
    check_probabilities,
)
from topo_dask.graph.cleanup import remove_bad_flow_masks
from topo_dask.graph.merge import postprocess_single
from topo_dask.graph.scale import check_scaled_class_flows, scaled
from topo_dask.grid import Region

PROBABLE = 0.5
"""Foreground is where the probability is larger."""


def instance_methods(
    class_names: Any, count: int, class_config: Any, resolution_nm: float | None
) -> dict[str, ClassInstances]:
    """How the instances of each class of a stack are found, by name, in its order.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        The argument, or the offending class and key, are named.

    Examples
    --------
    >>> instance_methods(["ves", "nuc"], 2, None, 8)["nuc"].group
    1
    """
    names = names_of_classes(class_names, count)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        do = "Rename one of them, and say in class_config how it is treated."
        raise InvalidArgument("class_names", f"{twice!r} twice", "different names", do)
    chosen = classes_of(names, postprocess_config(class_config, resolution_nm))
    return dict(zip(names, chosen, strict=True))


def foreground_of_class(
    probabilities: npt.NDArray[Any],
    core: Region,
    name: str,
    *,
    threshold: float = PROBABLE,
    argument: str = "semantic_pred",
) -> npt.NDArray[np.bool_]:
    """Where a class is, in a block; raises InvalidData for what is no probability."""
    where = f"class {name!r}, in block {core}"
    check_between_0_and_1(probabilities, argument=argument, origin=core.start, where=where)
    return np.asarray(probabilities > threshold)


def _lazy_foreground(probabilities: da.Array, name: str) -> da.Array:
    grid, source = grid_of(probabilities, argument="semantic_pred"), Source.of(probabilities)
    task = delayed(foreground_of_class)
    return assemble([task(source.read(c), c, name) for c in grid], grid, dtype=np.bool_)


def run_instance_segmentation(
    semantic_pred: Any,
    flow_pred: Any,
    class_names: Any = None,
    class_config: Any = None,
    flow_error_threshold: float = 0.0,
    *,
    resolution_nm: float | None = None,
    interpolation: str = "nearest",
    scale: float | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """Instances of every class, from what a network predicts.

    Parameters
    ----------
    semantic_pred
        ``[C,Z,Y,X]`` probabilities of C classes; a voxel above 0.5 is of the class. NumPy or dask.
    flow_pred
        ``[3C,Z,Y,X]`` float, or whole numbers with a ``scale``: ``(dz,dy,dx)`` of the first class,
        of the second, ...
    class_names
        C different names; without them the stack is of `EVALUATED_INSTANCE_CLASSES`.
    class_config
        How each class is treated: a dict or the path of a YAML file, for each class ``group``,
        ``n_steps``, ``step_size``, ``convergence_radius`` and ``min_size`` (see
        `postprocess_single`), e.g. ``get_postprocess_config(8)``.
    flow_error_threshold
        Above 0: instances whose flow is farther than this from the direct flow are dropped, see
        `remove_bad_flow_masks`.
    resolution_nm
        Edge of a voxel in nm: classes that ``class_config`` lacks take the defaults for it.
    interpolation, scale
        Of all classes, see `track_flows`.
    backend
        See `track_flows`.

    Returns
    -------
    dict
        For each class its labels, int32 ``[Z,Y,X]``: NumPy for NumPy, lazy for dask; the same for
        any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        The argument is named; of a configuration the class and the key. What is no probability is
        found at once in NumPy arrays and while computing in dask arrays.

    Examples
    --------
    >>> probabilities = np.ones((1, 1, 1, 8), np.float32)
    >>> flow = np.zeros((3, 1, 1, 8), np.float32)
    >>> flow[2, 0, 0] = [1, 0, -1, -1, 1, 1, 0, -1]
    >>> how = {"ves": {"convergence_radius": 2.0, "min_size": 1}}
    >>> run_instance_segmentation(probabilities, flow, ["ves"], how)["ves"]
    array([[[1, 1, 1, 1, 2, 2, 2, 2]]], dtype=int32)
    """
    check_probabilities(semantic_pred, argument="semantic_pred")
    fit = {"argument": "flow_pred", "of": "semantic_pred"}
    known = check_scaled_class_flows(flow_pred, scale, semantic_pred, **fit)
    choice("interpolation", interpolation, INTERPOLATIONS)
    RefineSettings(flow_error_threshold)
    choice("backend", backend, BACKENDS)
    count = int(semantic_pred.shape[0])
    methods = instance_methods(class_names, count, class_config, resolution_nm)
    lazy = isinstance(semantic_pred, da.Array) or isinstance(flow_pred, da.Array)
    ready = da.asarray if lazy else np.asarray
    probabilities, flows = ready(semantic_pred), ready(flow_pred)
    masks: dict[str, Any] = {}
    for row, name in enumerate(methods):
        if lazy:
            masks[name] = _lazy_foreground(probabilities[row], name)
        else:
            whole = Region((0, 0, 0), probabilities.shape[1:])
            masks[name] = foreground_of_class(probabilities[row], whole, name)
    found = {}
    for row, (name, how) in enumerate(methods.items()):
        flow = scaled(flows[3 * row : 3 * row + 3], known)
        options = {**asdict(how), "interpolation": interpolation, "backend": backend}
        with _flow_of(name):
            labels = postprocess_single(masks[name], flow, **options)
            if flow_error_threshold > 0:
                labels = remove_bad_flow_masks(labels, flow, flow_error_threshold, backend=backend)
        found[name] = labels
    return found


@contextmanager
def _flow_of(name: str) -> Iterator[None]:
    """Say of which class a flow is that cannot be used."""
    try:
        yield
    except InvalidData as error:
        if error.argument not in ("flow", "pred_flow"):
            raise
        argument = f"flow_pred of class {name!r}"
        raise InvalidData(argument, error.came, error.allowed, error.do) from None
