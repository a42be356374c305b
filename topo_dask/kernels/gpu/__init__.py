"""The kernels on a GPU: same names and answers as `topo_dask.kernels.cpu`.

NumPy arrays in, NumPy arrays out; in between everything stays on the device, so that data crosses
the bus once in each direction.
"""

from topo_dask.kernels.gpu.device import Device, find_device

__all__ = ["Device", "find_device"]
