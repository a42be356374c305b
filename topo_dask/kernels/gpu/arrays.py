"""Arrays that may be in memory or on the device already: results stay where the arguments were.

So a caller that puts its arrays on the device once can run several kernels on them, and one that
passes NumPy arrays gets NumPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.gpu.device import Device, find_device


def placed(device: Device, array: Any) -> Any:
    """The array on the device: a copy of what is in memory, itself if it is there."""
    return device.put(array) if isinstance(array, np.ndarray) else array


def fetched(device: Device, made: Any, *, like: Any) -> Any:
    """A result where an argument was: in memory, or on the device."""
    return device.get(made) if isinstance(like, np.ndarray) else made


def write_back(device: Device, made: Any, into: Any) -> None:
    """What `placed` gave for an array that is changed in place, back into it."""
    if isinstance(into, np.ndarray):
        into[...] = device.get(made)


def zeros(shape: tuple[int, ...], dtype: Any = np.float64) -> Any:
    """An array of zeros on the device."""
    device = find_device()
    with device.working():
        return device.zeros(shape, dtype)


def there(array: npt.NDArray[Any]) -> Any:
    """The array on the device."""
    device = find_device()
    with device.working():
        return placed(device, array)


def in_memory(array: Any) -> npt.NDArray[Any]:
    """The array in memory."""
    return array if isinstance(array, np.ndarray) else find_device().get(array)
