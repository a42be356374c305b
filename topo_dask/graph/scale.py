"""Flows stored in other numbers than their own: whole numbers, or what a network predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from topo_dask.config import number
from topo_dask.errors import InvalidType
from topo_dask.graph.check import Layout, check_class_flows, check_flow


def check_scaled_flow(flow: Any, scale: Any, *, argument: str = "flow") -> float:
    """Check a flow and its scale; gives the scale.

    Raises
    ------
    InvalidArgument, InvalidType
        No flow; no number > 0; whole numbers without a scale.

    Examples
    --------
    >>> check_scaled_flow(np.zeros((3, 1, 1, 1), np.int8), 127)
    127.0
    """
    check_flow(flow, argument=argument, whole=True)
    if scale is None and flow.dtype.kind == "i":
        raise InvalidType(
            argument,
            f"dtype {flow.dtype}",
            "float16, float32 or float64, or signed whole numbers with a scale",
            "Pass e.g. scale=127 if 127 stands for 1.",
        )
    if scale is None:
        return 1.0
    number("scale", scale, lambda v: 1e-30 < v < 1e30, "a number > 0", default=1)
    return float(scale)


def check_scaled_class_flows(
    flow: Any, scale: Any, probabilities: Any, *, argument: str, of: str
) -> float:
    """Check flows ``[3C,Z,Y,X]`` of probabilities ``[C,Z,Y,X]`` and their scale; gives the scale.

    Examples
    --------
    >>> probabilities = np.zeros((2, 1, 1, 1), np.float32)
    >>> flow = np.zeros((6, 1, 1, 1), np.int8)
    >>> check_scaled_class_flows(flow, 127, probabilities, argument="flow", of="probabilities")
    127.0
    """
    check_class_flows(flow, probabilities, argument=argument, of=of)
    return check_scaled_flow(Layout((3, *flow.shape[1:]), flow.dtype), scale, argument=argument)


def scaled(flow: Any, scale: float) -> Any:
    """A flow, NumPy or dask, in its own numbers: float32(stored) / float32(scale).

    Examples
    --------
    >>> scaled(np.array([127, -127], np.int8), 127.0)
    array([ 1., -1.], dtype=float32)
    """
    if scale == 1 and flow.dtype.kind == "f":
        return flow
    if isinstance(flow, da.Array):
        single = np.float32(scale)
        return flow.astype(np.float32) / single
    return _divided(np.asarray(flow), scale)


def _divided(flow: npt.NDArray[Any], scale: float) -> npt.NDArray[np.float32]:
    divided: npt.NDArray[np.float32] = flow.astype(np.float32) / np.float32(scale)
    return divided


@dataclass(frozen=True, eq=False)
class ScaledFlow:
    """A stored flow whose parts are in its own numbers when they are read; sliced like an array.

    Parameters
    ----------
    array
        What is stored.
    scale
        What its numbers are divided by.
    """

    array: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read."""
        return np.dtype(np.float32)

    def __getitem__(self, key: Any) -> npt.NDArray[np.float32]:
        return _divided(np.asarray(self.array[key]), self.scale)


def scaled_store(stored: Any, scale: float) -> Any:
    """A stored flow as it is, or one that divides what is read."""
    if scale == 1 and stored.dtype.kind == "f":
        return stored
    return ScaledFlow(stored, scale)
