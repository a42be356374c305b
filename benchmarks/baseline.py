"""What the package is measured against: flows and tracking in NumPy, one instance at a time.

The same work as the CPU path of the original `topo` package, written from the definitions: for
every instance its bounding box grown by 2 voxels, three float64 fields, `numpy.pad` in every
iteration; every step of the tracking one fancy index over all particles. Nothing here is tuned,
nothing is slowed down.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

GROWN = 2
"""Voxels by which an instance's bounding box is grown."""

Floats = npt.NDArray[np.float64]


def _boxes(
    labels: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.intp], list[tuple[int, tuple[slice, ...]]]]:
    """Instances numbered from 1, and the number and the grown box of each."""
    ids, numbers = np.unique(labels, return_inverse=True)
    local = numbers.reshape(labels.shape) + int(ids[0] != 0)
    found = [(n, box) for n, box in enumerate(ndimage.find_objects(local), start=1) if box]
    return local, [(number, _grown(box, labels.shape)) for number, box in found]


def _grown(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(max(0, s.start - GROWN), min(n, s.stop + GROWN))
        for s, n in zip(box, shape, strict=True)
    )


def box_voxels(labels: npt.NDArray[Any]) -> int:
    """Voxels of all boxes: what an iteration of all instances goes through."""
    return sum(math.prod(s.stop - s.start for s in box) for _, box in _boxes(labels)[1])


def _iterated(field: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Mean over the six neighbours inside the instance, 0 outside.

    Beyond the box stands the outermost voxel itself: at a face of the volume that is the no-flux
    condition, elsewhere the outermost voxels are 0.
    """
    p = np.pad(field, 1, mode="edge")
    mean = p[:-2, 1:-1, 1:-1] + p[2:, 1:-1, 1:-1]
    mean += p[1:-1, :-2, 1:-1]
    mean += p[1:-1, 2:, 1:-1]
    mean += p[1:-1, 1:-1, :-2]
    mean += p[1:-1, 1:-1, 2:]
    mean /= 6.0
    mean *= mask
    return mean


def _instance_flow(mask: npt.NDArray[np.bool_], start: tuple[int, ...], iterations: int) -> Floats:
    """Flow of one instance in its box: unit vectors inside, 0 outside."""
    gradient = np.zeros((3, *mask.shape))
    for axis, first in enumerate(start):
        along = np.arange(first, first + mask.shape[axis], dtype=np.float64)
        field = along.reshape([-1 if a == axis else 1 for a in range(3)]) * mask
        for _ in range(iterations):
            field = _iterated(field, mask)
        if mask.shape[axis] > 1:
            gradient[axis] = np.gradient(field, axis=axis)
    norm = np.sqrt((gradient**2).sum(axis=0))
    return gradient / np.maximum(norm, 1e-8) * mask


def generate_diffusion_flows(
    instance_mask: npt.NDArray[Any],
    n_iter: int = 200,
    adaptive_iters: bool = True,
    adaptive_factor: float = 6,
) -> npt.NDArray[np.float32]:
    """Coordinate diffusion flow ``[3,Z,Y,X]`` of labels ``[Z,Y,X]``."""
    flow = np.zeros((3, *instance_mask.shape), dtype=np.float32)
    local, boxes = _boxes(instance_mask)
    for number, box in boxes:
        mask = local[box] == number
        iterations = min(int(adaptive_factor * max(mask.shape)), n_iter)
        start = tuple(s.start for s in box)
        own = _instance_flow(mask, start, iterations if adaptive_iters else n_iter)
        flow[(slice(None), *box)][:, mask] = own[:, mask]
    return flow


def track_flows(
    sem_mask: npt.NDArray[Any], flow: npt.NDArray[np.float32], n_steps: int, step_size: float = 1.0
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Foreground voxels ``[N,3]`` and where their particles end, float64 ``[N,3]``."""
    voxels = np.argwhere(sem_mask)
    positions = voxels.astype(np.float64)
    top = np.asarray(sem_mask.shape, dtype=np.float64) - 1
    for _ in range(n_steps):
        z, y, x = np.clip(positions, 0, top).astype(np.int64).T
        positions += (np.float32(step_size) * flow[:, z, y, x]).T
        np.clip(positions, 0, top, out=positions)
    return voxels, positions
