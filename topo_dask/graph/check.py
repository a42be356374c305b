"""Checks of arrays that need no look at a single voxel, the same for NumPy, dask and zarr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topo_dask.errors import InvalidArgument, InvalidData, InvalidType


def check_axes(array: Any, *, argument: str, axes: int, names: str) -> None:
    """Raise InvalidArgument unless an array has so many axes and none of length 0."""
    if len(array.shape) != axes:
        came = f"{len(array.shape)} axes, shape {tuple(array.shape)}"
        raise InvalidArgument(argument, came, f"{axes} axes: {names}")
    if 0 in array.shape:
        raise InvalidArgument(
            argument, f"shape {tuple(array.shape)}", "at least one voxel along every axis"
        )


def check_labels(labels: Any, *, argument: str = "labels", axes: int = 3) -> None:
    """Raise unless an array can hold instance labels: whole numbers, ``[Z,Y,X]`` or a stack.

    Raises
    ------
    InvalidType
        Floats, complex numbers, objects.
    InvalidArgument
        Wrong number of axes, no voxels.
    InvalidData
        Negative labels, where the array is in memory and can be looked at.
    """
    names = "z, y, x" if axes == 3 else "class, z, y, x"
    check_axes(labels, argument=argument, axes=axes, names=names)
    if labels.dtype.kind not in "iub":
        raise InvalidType(
            argument,
            f"dtype {labels.dtype}",
            "an integer type (0 is background)",
            "Convert it, e.g. labels.astype('uint32').",
        )
    if isinstance(labels, np.ndarray):
        check_not_negative(labels, argument=argument)


def check_not_negative(labels: np.ndarray[Any, Any], *, argument: str, where: str = "") -> None:
    """Raise InvalidData if an array holds a negative label."""
    if labels.dtype.kind == "i" and labels.size and int(labels.min()) < 0:
        raise InvalidData(
            argument,
            f"the negative label {int(labels.min())}{where}",
            "labels >= 0 (0 is background)",
            "Set what is not annotated to 0 and pass a spatial mask.",
        )


def check_flow(flow: Any, *, argument: str = "flow") -> None:
    """Raise unless an array can hold a flow: real numbers, ``[3,Z,Y,X]``."""
    check_axes(flow, argument=argument, axes=4, names="3 components (dz, dy, dx), z, y, x")
    if flow.shape[0] != 3:
        raise InvalidArgument(
            argument,
            f"shape {tuple(flow.shape)}",
            "3 components along the first axis (dz, dy, dx)",
            "Move the components first, e.g. numpy.moveaxis(flow, -1, 0).",
        )
    if flow.dtype.kind != "f":
        raise InvalidType(argument, f"dtype {flow.dtype}", "float16, float32 or float64")


def check_same_shape(shape: Sequence[int], other: Sequence[int], *, argument: str, of: str) -> None:
    """Raise InvalidArgument unless two spatial shapes agree."""
    if tuple(shape) != tuple(other):
        raise InvalidArgument(
            argument, f"shape {tuple(shape)}", f"the shape of {of}, {tuple(other)}"
        )


def check_finite(block: np.ndarray[Any, Any], *, argument: str, where: str) -> None:
    """Raise InvalidData if a block holds NaN or infinity; the block is named."""
    if not np.isfinite(block.sum(dtype=np.float64)) and not np.isfinite(block).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(block))[0])
        raise InvalidData(
            argument,
            f"{block[at]} in block {where} (at {at} in it)",
            "finite numbers",
            "Nothing was published. Mend the flow there, e.g. numpy.nan_to_num.",
        )
