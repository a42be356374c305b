"""Checks of arrays that need no look at a single voxel, the same for NumPy, dask and zarr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.grid import as_lengths
from topo_dask.kernels import cpu


def check_array(array: Any, *, argument: str) -> None:
    """Raise InvalidType unless something is an array."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise InvalidType(
            argument,
            f"an object of type {type(array).__name__}",
            "a NumPy, dask or zarr array",
            f"Pass e.g. {argument}=numpy.asarray(...).",
        )
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidType(
            argument,
            "a MaskedArray, whose mask would be lost",
            "a plain array",
            f"Say what stands behind the mask, e.g. {argument}=array.filled(0).",
        )


def check_axes(array: Any, *, argument: str, axes: int, names: str) -> None:
    """Raise InvalidArgument unless an array has so many axes, of known length, and none of 0."""
    check_array(array, argument=argument)
    came = f"{len(array.shape)} axes, shape {tuple(array.shape)}"
    if len(array.shape) != axes:
        do = "Select what belongs to these axes, e.g. array[0], or add one, e.g. array[None]."
        raise InvalidArgument(argument, came, f"{axes} axes: {names}", do)
    if 0 in array.shape:
        do = "Pass an array that has voxels."
        raise InvalidArgument(argument, came, "at least one voxel along every axis", do)
    if any(np.isnan(n) for n in array.shape):
        do = "Call compute_chunk_sizes() on the dask array first."
        raise InvalidArgument(argument, came, "axes of known length", do)


def check_mask(mask: Any, *, argument: str) -> None:
    """Raise unless an array can be a mask or a probability: real numbers, ``[Z,Y,X]``."""
    check_axes(mask, argument=argument, axes=3, names="z, y, x")
    if mask.dtype.kind not in "biuf":
        raise InvalidType(
            argument,
            f"dtype {mask.dtype}",
            "bool, integers or real numbers",
            "Convert it, e.g. mask.astype(bool).",
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
            "Set these voxels to 0, e.g. with numpy.maximum(labels, 0).",
        )


def check_flow(flow: Any, *, argument: str = "flow", whole: bool = False) -> None:
    """Raise unless an array can hold a flow: real numbers, ``[3,Z,Y,X]``.

    With ``whole``, signed whole numbers are allowed too.
    """
    check_axes(flow, argument=argument, axes=4, names="3 components (dz, dy, dx), z, y, x")
    if flow.shape[0] != 3:
        raise InvalidArgument(
            argument,
            f"shape {tuple(flow.shape)}",
            "3 components along the first axis (dz, dy, dx)",
            "Move the components first, e.g. numpy.moveaxis(flow, -1, 0).",
        )
    kinds, names = ("fi", ", or signed whole numbers with a scale") if whole else ("f", "")
    if flow.dtype.kind not in kinds or flow.dtype.itemsize > 8:
        raise InvalidType(
            argument,
            f"dtype {flow.dtype}",
            f"float16, float32 or float64{names}",
            "Convert it, e.g. flow.astype('float32').",
        )


def checked_origin(origin: Any) -> tuple[int, int, int]:
    """The global index of a first voxel, if it is one: sums of coordinates stay exact."""
    z, y, x = as_lengths(origin, argument="origin", axes=3, least=0)
    if max(z, y, x) >= 2**31:
        allowed = "whole numbers from 0 to 2147483647, in the order z, y, x"
        raise InvalidArgument("origin", repr(origin), allowed, "Count voxels, not lengths.")
    return z, y, x


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of a part of an array that need not be read to be checked."""

    shape: tuple[int, ...]
    dtype: Any


def check_class_flows(flow: Any, probabilities: Any, *, argument: str, of: str) -> None:
    """Raise unless flows ``[3C,Z,Y,X]`` fit probabilities ``[C,Z,Y,X]`` and can hold flows.

    Signed whole numbers can, with a scale.
    """
    check_axes(flow, argument=argument, axes=4, names="3 components of each class, z, y, x")
    wanted = 3 * int(probabilities.shape[0])
    if flow.shape[0] != wanted:
        raise InvalidArgument(
            argument,
            f"{flow.shape[0]} channels",
            f"3 (dz, dy, dx) for each of the {wanted // 3} classes of {of}: {wanted}",
            "Pass the flows of the same classes, in the same order, one class after the other.",
        )
    check_flow(Layout((3, *flow.shape[1:]), flow.dtype), argument=argument, whole=True)
    check_same_shape(flow.shape[1:], probabilities.shape[1:], argument=argument, of=of)


def check_probabilities(values: Any, *, argument: str) -> None:
    """Raise unless an array can hold the probabilities of classes: real numbers, ``[C,Z,Y,X]``."""
    check_axes(values, argument=argument, axes=4, names="class, z, y, x")
    check_mask(Layout(tuple(values.shape[1:]), values.dtype), argument=argument)


def check_between_0_and_1(
    values: np.ndarray[Any, Any], *, argument: str, origin: Sequence[int], where: str
) -> None:
    """Raise InvalidData if a probability is not one; voxel, class and block are named.

    Parameters
    ----------
    values
        ``[Z,Y,X]``, of a block.
    argument
        What it is called.
    origin
        Index of the block's first voxel.
    where
        Its class and block, for the message.
    """
    # NaN is neither
    if values.size == 0 or (values.min() >= 0 and values.max() <= 1):
        return
    at = np.argwhere(~((values >= 0) & (values <= 1)))[0].tolist()
    voxel = tuple(a + int(o) for a, o in zip(at, origin, strict=True))
    raise InvalidData(
        argument,
        f"{values[tuple(at)]} at voxel {voxel}, {where}",
        "probabilities from 0 to 1",
        "Nothing was published. Scale them, e.g. by 1/255, or pass scores through a sigmoid.",
    )


def check_same_shape(shape: Sequence[int], other: Sequence[int], *, argument: str, of: str) -> None:
    """Raise InvalidArgument unless two spatial shapes agree."""
    if tuple(shape) != tuple(other):
        raise InvalidArgument(
            argument,
            f"shape {tuple(shape)}",
            f"the shape of {of}, {tuple(other)}",
            "Cut or pad one of them so that both cover the same voxels.",
        )


def check_no_nan(
    mask: np.ndarray[Any, Any], *, origin: Sequence[int], block: object, argument: str
) -> None:
    """Raise InvalidData if a mask or a probability ``[Z,Y,X]`` from ``origin`` on holds NaN.

    NaN is neither foreground nor background; the voxel and the block are named.
    """
    if mask.dtype.kind != "f" or not np.isnan(mask).any():
        return
    at = np.argwhere(np.isnan(mask))[0].tolist()
    voxel = tuple(a + int(o) for a, o in zip(at, origin, strict=True))
    raise InvalidData(
        argument,
        f"nan at voxel {voxel}, in block {block}",
        "numbers",
        "Nothing was published. Mend it there, e.g. with numpy.nan_to_num.",
    )


def check_finite(
    flow: np.ndarray[Any, Any], *, origin: Sequence[int], block: object, argument: str
) -> None:
    """Raise InvalidData if a flow ``[Z,Y,X,4]`` from ``origin`` on holds NaN or infinity.

    The voxel and the block that needed it are named.
    """
    if cpu.all_finite(flow) if isinstance(flow, np.ndarray) else np.isfinite(flow).all():
        return
    *at, component = np.argwhere(~np.isfinite(flow))[0].tolist()
    voxel = tuple(a + int(o) for a, o in zip(at, origin, strict=True))
    raise InvalidData(
        argument,
        f"{flow[(*at, component)]} at voxel {voxel}, component {'zyx'[component]}, "
        f"in block {block}",
        "finite numbers",
        "Nothing was published. Mend the flow there, e.g. with numpy.nan_to_num.",
    )
