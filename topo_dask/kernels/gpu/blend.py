"""Blend weights of overlapping tiles, made on the device."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.blend import Tapers, axis_weight
from topo_dask.kernels.gpu.device import find_device


def blend_weight(shape: tuple[int, ...], *, tapers: Tapers) -> npt.NDArray[np.float32]:
    """Cosine blend weight of a tile; see `kernels.cpu.blend_weight`.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> blend_weight((1, 2), tapers=((0, 0), (0, 2))).round(3)
    array([[0.854, 0.146]], dtype=float32)
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    along = [axis_weight(n, taper) for n, taper in zip(shape, tapers, strict=True)]
    rows = reduce(np.multiply.outer, along[:-1], np.ones(()))
    with device.working():
        weight = device.empty(shape, np.float32)
        tables = device.put(rows.reshape(-1)), device.put(along[-1])
        device.launch("tiles", "blend_weight", math.prod(shape), *tables, weight, shape[-1])
        return device.get(weight)
