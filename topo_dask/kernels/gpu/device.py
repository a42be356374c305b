"""The device that kernels run on: an NVIDIA GPU through CuPy, or for tests this machine's CPU.

The only module that imports CuPy, and only when a device is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from topo_dask.errors import BackendUnavailable, DeviceMemoryError, InvalidArgument
from topo_dask.kernels.gpu import sources
from topo_dask.kernels.gpu.host import HostDevice

CHOICE = "TOPO_DASK_GPU_DEVICE"
"""Environment variable: "host" runs the CUDA sources on the CPU, slowly. For tests."""

SHARE = "CUPY_GPU_MEMORY_LIMIT"
"""Environment variable of CuPy: bytes, or a part like "90%", that this process may take."""

THREADS = 256
"""Threads of a block."""

MOST_BLOCKS = 2**30
"""Items beyond so many blocks are done by the same threads."""


class Device(Protocol):
    """Where kernels run. Arrays are of ``xp``: all that is no kernel is written against it."""

    @property
    def name(self) -> str:
        """What people know it by."""

    @property
    def xp(self) -> Any:
        """Array module: cupy, or numpy for the host."""

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Copy an array to the device, contiguous and in native byte order."""

    def get(self, array: Any) -> npt.NDArray[Any]:
        """Copy an array from the device; waits for what makes it."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """Give an array of whatever was there."""

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """Give an array of zeros."""

    def prepare(self, source: str, kernel: str, count: int, *arguments: Any) -> Callable[[], None]:
        """Give what runs a kernel of a source once for each of ``count`` items, again and again.

        Numbers become what the kernel declares; arrays must have its types; ``None`` is no array.
        """

    def launch(self, source: str, kernel: str, count: int, *arguments: Any) -> None:
        """Run a kernel now, see `prepare`."""

    def working(self) -> AbstractContextManager[None]:
        """Turn running out of device memory, anywhere inside, into our error."""

    def free_memory_bytes(self) -> int:
        """How much more can be taken now."""

    def memory_bytes(self) -> int:
        """How much this process may take at most."""

    def release(self) -> None:
        """Let other processes have what is not used now."""


class CudaDevice:
    """The current GPU of this process, through CuPy."""

    def __init__(self) -> None:
        self.xp: Any = _cupy()
        number = self.xp.cuda.Device().id
        facts = self.xp.cuda.runtime.getDeviceProperties(number)
        self.name: str = facts["name"].decode()
        self._memory = int(facts["totalGlobalMem"])
        self._modules: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, array: npt.NDArray[Any]) -> Any:
        """See `Device`."""
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return self.xp.asarray(np.ascontiguousarray(native))

    def get(self, array: Any) -> npt.NDArray[Any]:
        """See `Device`."""
        copied: npt.NDArray[Any] = self.xp.asnumpy(array)
        return copied

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """See `Device`."""
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """See `Device`."""
        return self.xp.zeros(shape, dtype)

    def prepare(self, source: str, kernel: str, count: int, *arguments: Any) -> Callable[[], None]:
        """See `Device`."""
        checked = sources.arguments(source, kernel, count, arguments)
        passed = tuple(np.uint64(0) if value is None else value for value in checked)
        blocks = (min(-(-count // THREADS), MOST_BLOCKS),)
        function = self._kernel(source, kernel)

        def run() -> None:
            if count > 0:
                function(blocks, (THREADS,), passed)

        return run

    def launch(self, source: str, kernel: str, count: int, *arguments: Any) -> None:
        """See `Device`."""
        self.prepare(source, kernel, count, *arguments)()

    def _kernel(self, source: str, kernel: str) -> Any:
        with self._lock:
            if source not in self._modules:
                self._modules[source] = self.xp.RawModule(
                    code=sources.text(source), options=("--std=c++17", "--fmad=false")
                )
            return self._modules[source].get_function(kernel)

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Device`."""
        try:
            yield
        except self.xp.cuda.memory.OutOfMemoryError as error:
            self.xp.get_default_memory_pool().free_all_blocks()
            raise DeviceMemoryError(
                "device memory",
                f"{error} on {self.name}",
                "a block that fits",
                "Use smaller blocks, or fewer tasks at once on this device.",
            ) from error

    def free_memory_bytes(self) -> int:
        """See `Device`."""
        pool = self.xp.get_default_memory_pool()
        free = self.xp.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
        limit = pool.get_limit()
        return int(min(free, limit - pool.used_bytes()) if limit else free)

    def memory_bytes(self) -> int:
        """See `Device`."""
        limit = int(self.xp.get_default_memory_pool().get_limit())
        return min(self._memory, limit) if limit else self._memory

    def release(self) -> None:
        """See `Device`; a process that was given a share of the memory keeps it."""
        if SHARE not in os.environ:
            self.xp.get_default_memory_pool().free_all_blocks()


def _no_driver() -> str:
    """Why the driver has no GPU to offer; empty where it has. Asked before CuPy is imported."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver: Any = ctypes.CDLL(name)
    except OSError:
        return f"there is no NVIDIA driver ({name} cannot be loaded)"
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failed:
        return f"the NVIDIA driver fails with error {failed}"
    return "" if count.value else "the NVIDIA driver shows no GPU"


def _cupy() -> Any:
    """CuPy, if it is there and sees a GPU."""
    needed = "an NVIDIA GPU with its driver, and CuPy"
    why = _no_driver()
    if why:
        raise BackendUnavailable(
            "backend", f'"gpu", but {why}', needed,
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or choose backend=\"cpu\".",
        )  # fmt: skip
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(
            "backend", f'"gpu", but CuPy cannot be imported ({error})', needed,
            "Install it with pip install 'topo_dask[gpu]', or choose backend=\"cpu\".",
        ) from error  # fmt: skip
    if not cupy.cuda.is_available():
        raise BackendUnavailable(
            "backend", '"gpu", but CuPy sees no GPU', needed,
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or choose backend=\"cpu\".",
        )  # fmt: skip
    return cupy


def host_is_wanted() -> bool:
    """Whether the environment asks for the CPU in the place of a GPU."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "host"):
        raise InvalidArgument(CHOICE, repr(choice), '"host", or unset', "Unset it to use a GPU.")
    return bool(choice)


def find_device() -> Device:
    """The device to run on; the same one each time.

    Raises
    ------
    BackendUnavailable
        No GPU, or no CuPy.

    Examples
    --------
    >>> find_device().name  # with TOPO_DASK_GPU_DEVICE=host
    'host (CUDA sources run on the CPU)'
    """
    if host_is_wanted():
        return _host()
    found = _cuda()
    if isinstance(found, BackendUnavailable):
        raise BackendUnavailable(found.argument, found.came, found.allowed, found.do)
    return found


@functools.cache
def _host() -> Device:
    return HostDevice()


@functools.cache
def _cuda() -> Device | BackendUnavailable:
    """The GPU, or why there is none: looked for once in a process."""
    try:
        return CudaDevice()
    except BackendUnavailable as error:
        # Another one: this holds the frames that asked, and with them what they compute on.
        return BackendUnavailable(error.argument, error.came, error.allowed, error.do)
