"""What computes: the processor, or a GPU for the kernels that it has.

`Kernels` are those that exist for both; `kernels_for` gives them where a task runs, so that every
worker decides for itself what it has. All other kernels are the processor's: they walk through
memory at random or merge small tables, and the code that needs them says `cpu` where it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from topo_dask.errors import BackendUnavailable
from topo_dask.kernels import cpu, gpu, resample
from topo_dask.kernels.computed import PROCESSOR, Computed, note
from topo_dask.kernels.cpu import tiles
from topo_dask.kernels.gpu import arrays, split
from topo_dask.kernels.gpu import resample as gpu_resample
from topo_dask.kernels.gpu import tiles as gpu_tiles
from topo_dask.kernels.gpu.device import Device, find_device, host_is_wanted


class Kernels:
    """The kernels that exist for the processor and for a GPU; these are the processor's."""

    diffusion_flow = staticmethod(cpu.diffusion_flow)
    chebyshev_flow = staticmethod(cpu.chebyshev_flow)
    diffusion_round = staticmethod(cpu.diffusion_round)
    poisson_flow = staticmethod(cpu.poisson_flow)
    poisson_potential = staticmethod(cpu.poisson_potential)
    flow_of_potential = staticmethod(cpu.flow_of_potential)
    direct_flow = staticmethod(cpu.direct_flow)
    flow_errors = staticmethod(cpu.flow_errors)
    interleave = staticmethod(cpu.interleave)
    track = staticmethod(cpu.track)
    track_voxels = staticmethod(cpu.track_voxels)
    cell_table = staticmethod(cpu.cell_table)
    spline_coefficients = staticmethod(resample.spline_coefficients)
    accumulate = staticmethod(resample.accumulate)
    add_tile = staticmethod(tiles.add_tile)
    add_next_tile = staticmethod(tiles.add_next_tile)
    keep_largest = staticmethod(tiles.keep_largest)
    keep_nearest = staticmethod(tiles.keep_nearest)
    keep_heaviest = staticmethod(tiles.keep_heaviest)
    rounded = staticmethod(tiles.rounded)
    # Arrays that stay where it is computed while several kernels work on them.
    zeros: Callable[..., Any] = staticmethod(np.zeros)
    there: Callable[..., Any] = staticmethod(np.ascontiguousarray)
    in_memory: Callable[..., Any] = staticmethod(np.asarray)


class DeviceKernels(Kernels):
    """Those of a GPU, in parts where its memory is too small."""

    diffusion_flow = staticmethod(gpu.diffusion_flow)
    diffusion_round = staticmethod(split.diffusion_round)
    poisson_flow = staticmethod(split.poisson_flow)
    poisson_potential = staticmethod(split.poisson_potential)
    flow_of_potential = staticmethod(split.flow_of_potential)
    direct_flow = staticmethod(split.direct_flow)
    flow_errors = staticmethod(split.flow_errors)
    interleave = staticmethod(split.interleave)
    track = staticmethod(split.track)
    track_voxels = staticmethod(split.track_voxels)
    cell_table = staticmethod(split.cell_table)
    spline_coefficients = staticmethod(gpu_resample.spline_coefficients)
    accumulate = staticmethod(gpu_resample.accumulate)
    add_tile = staticmethod(gpu_tiles.add_tile)
    add_next_tile = staticmethod(gpu_tiles.add_next_tile)
    keep_largest = staticmethod(gpu_tiles.keep_largest)
    keep_nearest = staticmethod(gpu_tiles.keep_nearest)
    keep_heaviest = staticmethod(gpu_tiles.keep_heaviest)
    rounded = staticmethod(gpu_tiles.rounded)
    zeros = staticmethod(arrays.zeros)
    there = staticmethod(arrays.there)
    in_memory = staticmethod(arrays.in_memory)


def device_for(backend: str) -> tuple[Device | None, str]:
    """The GPU that computes here, or ``None`` for the processor; and why.

    Parameters
    ----------
    backend
        "cpu"; "gpu"; or "auto", a GPU if there is one, else the processor. CUDA sources that run
        on the processor, for tests, are no GPU to "auto".

    Raises
    ------
    BackendUnavailable
        "gpu", and there is none; what is missing is named.

    Examples
    --------
    >>> device_for("cpu")
    (None, 'as asked')
    """
    if backend == "cpu":
        return None, "as asked"
    if backend == "gpu":
        return find_device(), "as asked"
    if host_is_wanted():
        return None, "the CUDA sources on the processor are no GPU"
    try:
        return find_device(), "there is a GPU"
    except BackendUnavailable as error:
        return None, str(error.came).removeprefix('"gpu", but ')


def kernels_for(backend: str) -> Kernels:
    """The kernels that compute here; see `device_for`.

    Examples
    --------
    >>> import numpy as np
    >>> int(kernels_for("cpu").interleave(np.ones((3, 1, 1, 1), np.float16)).sum())
    3
    """
    device, _ = device_for(backend)
    note(PROCESSOR if device is None else device.name)
    return Kernels() if device is None else DeviceKernels()


def give_back(computed: Computed) -> None:
    """Let other processes have the device memory that a task took, once it has ended."""
    if computed.where - {PROCESSOR}:
        find_device().release()
