"""Background of a block: its connected components and the labels around each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from topo_dask.kernels.cpu.labels import Integers, native
from topo_dask.kernels.jit import compiled

NOTHING = 2**64 - 1
"""Smallest label beside a component that touches none; no component has it beside a larger one."""


@compiled
def _look_around(components: Any, labels: Any, start: Any, lowest: Any, highest: Any) -> None:
    """Smallest and largest label among the 6-neighbours of each component's voxels."""
    for z in range(components.shape[0]):
        for y in range(components.shape[1]):
            for x in range(components.shape[2]):
                k = components[z, y, x]
                if k == 0:
                    continue
                for side in range(6):
                    step = 1 if side % 2 else -1
                    a = z + start[0] + (step if side // 2 == 0 else 0)
                    b = y + start[1] + (step if side // 2 == 1 else 0)
                    c = x + start[2] + (step if side // 2 == 2 else 0)
                    if (
                        0 <= a < labels.shape[0]
                        and 0 <= b < labels.shape[1]
                        and 0 <= c < labels.shape[2]
                    ):
                        value = np.uint64(labels[a, b, c])
                        if value != np.uint64(0):
                            lowest[k - 1] = min(lowest[k - 1], value)
                            highest[k - 1] = max(highest[k - 1], value)


def background(
    labels: Integers, *, core: tuple[slice, ...] | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The 6-connected components of the background, and which labels each touches.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; 0 is background.
    core
        Part of the array (local slices) whose background counts; what is around it is only looked
        at. ``None`` means all of it.

    Returns
    -------
    components
        int32, of the core: 0 in instances, else 1..N.
    lowest, highest
        uint64 ``[N]``: smallest and largest label beside each, 2**64 - 1 and 0 where there is none.

    Examples
    --------
    >>> components, lowest, highest = background(np.array([[[0, 3, 0, 0, 7]]]))
    >>> components, lowest, highest
    (array([[[1, 0, 2, 2, 0]]], dtype=int32), array([3, 3], dtype=uint64), \
array([3, 7], dtype=uint64))
    """
    inside = core or tuple(slice(0, n) for n in labels.shape)
    components = np.zeros(labels[inside].shape, dtype=np.int32)
    count = ndimage.label(labels[inside] == 0, output=components)
    lowest = np.full(count, NOTHING, dtype=np.uint64)
    highest = np.zeros(count, dtype=np.uint64)
    start = np.array([s.start for s in inside], dtype=np.int64)
    _look_around(components, native(labels), start, lowest, highest)
    return components, lowest, highest
