"""6-connected pieces of instances, on the device."""

from __future__ import annotations

from typing import Any

from topo_dask.kernels.gpu.device import Device


def roots(device: Device, links: Any, grid: tuple[int, int, int, int]) -> Any:
    """The first voxel of each voxel's piece, as an index into the padded flat array.

    Parameters
    ----------
    links
        uint8 ``[nz * ny * width]`` on the device, see ``neighbour_mask`` in diffusion.cu.
    grid
        nz, ny, nx, width.

    Returns
    -------
    uint32, like ``links``; voxels of the background are each their own.
    """
    parent = device.empty(links.size, "uint32")
    device.launch("pieces", "each_its_own", links.size, parent)
    device.launch("pieces", "unite_linked", links.size, parent, links, *grid)
    device.launch("pieces", "point_to_roots", links.size, parent)
    return parent
