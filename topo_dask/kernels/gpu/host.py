"""The CUDA sources on the CPU: g++ builds them, one thread after another runs them. For tests.

It shows that a source computes what it should, and that its threads may run in any order; nothing
about speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import BackendUnavailable, DeviceMemoryError, TopoError
from topo_dask.kernels.gpu import sources

MEMORY = "TOPO_DASK_GPU_MEMORY"
"""Environment variable: bytes that the host device has; unset: 8 GiB."""

LANGUAGE = ("-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
FLAGS = (*LANGUAGE, "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")

GRID = (2, 3)
"""Blocks and threads of a block; the last thread runs first."""


class HostDevice:
    """A `Device` whose arrays are NumPy's.

    Arrays from `put`, `empty` and `zeros` count against the memory that it has, until they are
    let go; what NumPy makes of them does not.
    """

    name = "host (CUDA sources run on the CPU)"
    xp: Any = np

    def __init__(self) -> None:
        self._used = 0
        self._lock = threading.RLock()  # an array may be let go while another is made

    def put(self, array: npt.NDArray[Any]) -> Any:
        """See `Device`."""
        made = self.empty(array.shape, array.dtype.newbyteorder("="))
        made[...] = array
        return made

    def get(self, array: Any) -> npt.NDArray[Any]:
        """See `Device`."""
        return np.array(array)

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """See `Device`."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self._lock:
            free = self.free_memory_bytes()
            if size > free:
                raise DeviceMemoryError(
                    "device memory",
                    f"{size} bytes more on {self.name}",
                    f"{free} bytes",
                    "Use smaller blocks, or fewer tasks at once on this device.",
                )
            self._used += size
        made = np.empty(shape, dtype)
        weakref.finalize(made, self._let_go, size)
        return made

    def _let_go(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """See `Device`."""
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    def prepare(self, source: str, kernel: str, count: int, *arguments: Any) -> Callable[[], None]:
        """See `Device`."""
        passed = sources.arguments(source, kernel, count, arguments)
        library = _library(source)
        function = getattr(library, kernel)
        types = [_c_type(p) for p in sources.kernels(source)[kernel]]
        values = [
            kind(v.ctypes.data if isinstance(v, np.ndarray) else v)
            for kind, v in zip(types, passed, strict=True)
        ]
        blocks, threads = GRID

        def run() -> None:
            for block in reversed(range(blocks if count > 0 else 0)):
                for thread in reversed(range(threads)):
                    library.topo_dask_be_thread(block, thread, blocks, threads)
                    function(*values)

        # The arrays live as long as what points into them.
        weakref.finalize(run, passed.clear)
        return run

    def launch(self, source: str, kernel: str, count: int, *arguments: Any) -> None:
        """See `Device`."""
        self.prepare(source, kernel, count, *arguments)()

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Device`."""
        yield

    def free_memory_bytes(self) -> int:
        """See `Device`."""
        return self.memory_bytes() - self._used

    def memory_bytes(self) -> int:
        """See `Device`."""
        return int(os.environ.get(MEMORY, 2**33))

    def release(self) -> None:
        """See `Device`; nothing is held back."""


def _c_type(parameter: sources.Parameter) -> Any:
    return ctypes.c_void_p if parameter.array else np.ctypeslib.as_ctypes_type(parameter.dtype)


def _cache() -> Path:
    """Where built libraries are kept: the user's own, so nobody else can put one there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "topo_dask" / "host"


@functools.cache
def _library(source: str) -> ctypes.CDLL:
    """The shared library of a source, built if it is not in the cache."""
    text = (sources.FOLDER / "host.h").read_text(encoding="utf-8") + sources.text(source)
    key = hashlib.sha256("\0".join((text, *FLAGS)).encode()).hexdigest()[:24]
    built = _cache() / f"{source}-{key}.so"
    if not built.exists():
        _build(text, built)
    return ctypes.CDLL(str(built))


def _build(text: str, built: Path) -> None:
    compiler = which("g++")
    if compiler is None:
        raise BackendUnavailable(
            "g++", "nothing on the PATH", "a C++17 compiler", "Install g++, or use a real GPU."
        )
    built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        command = [compiler, *FLAGS, "-", "-o", str(made)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TopoError(built.stem, done.stderr, "a source that g++ compiles")
        made.replace(built)  # at once: other processes may be building the same
