"""Inputs as stored arrays that any worker can open, and small files in the work directory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
from dask.base import tokenize
from numpy.lib import format as npy
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

from topo_dask import storage
from topo_dask.errors import InputNotFound, InvalidData, InvalidType
from topo_dask.graph.check import check_axes
from topo_dask.kernels.tables import InstanceTable
from topo_dask.run.damage import INPUTS, ScratchArray, damaged, note
from topo_dask.storage import create_array, open_array

BLOCK = 128
"""Edge of a block, where none is given, in voxels."""


def open_input(
    source: Any, *, argument: str, axes: int, first: str = "3 components (dz, dy, dx)"
) -> Any:
    """Open a path, URL, zarr, dask or NumPy array and check its axes; nothing is read yet.

    Of four axes ``first`` says what the first is.
    """
    if isinstance(source, (da.Array, np.ndarray)):
        names = "z, y, x" if axes == 3 else f"{first}, z, y, x"
        check_axes(source, argument=argument, axes=axes, names=names)
        return source
    if not isinstance(source, (str, os.PathLike, zarr.Array, zarr.Group, Store)):
        raise InvalidType(
            argument,
            f"an object of type {type(source).__name__}",
            "a path or URL of a zarr array, or a zarr, dask or NumPy array",
            f"Pass e.g. {argument}=numpy.asarray(...).",
        )
    return open_array(source, argument=argument, axes=(axes,))


def readable_by_workers(source: Any) -> bool:
    """Whether every worker can open it where it is; memory and dask graphs it cannot."""
    return isinstance(source, zarr.Array) and not isinstance(source.store, MemoryStore)


def stored(source: Any, scratch: Path, *, argument: str, together: int = 3) -> Any:
    """The same array where every worker can read it: memory and dask graphs go to the scratch.

    Of four axes ``together`` entries of the first are read at a time.
    """
    if readable_by_workers(source):
        return source
    path = scratch / INPUTS / f"{argument}-{input_mark(source)}.zarr"
    if path.exists():
        return _copied(path, argument, len(source.shape))
    chunks = tuple(min(BLOCK, n) for n in source.shape)
    if len(chunks) > 3:
        chunks = (min(together, chunks[0]), *chunks[1:])
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that ended here
    target = create_array(partial, source.shape, chunks, source.dtype)
    if isinstance(source, da.Array):
        # One task a chunk, so no two write the same one; dask's stub does not know zarr arrays.
        da.store(source.rechunk(chunks), target, lock=False)  # type: ignore[arg-type]
    else:
        target[...] = source[...]
    os.replace(partial, path)
    return _copied(path, argument, len(source.shape))


def _copied(path: Path, argument: str, axes: int) -> Any:
    return ScratchArray(open_array(path, argument=argument, axes=(axes,)))


def scratch_array(
    path: Path,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: npt.DTypeLike,
    *,
    identity: Path | None = None,
    zarr_format: Any = 3,
) -> tuple[Any, str]:
    """An array of zeros, or that of the run that goes on.

    With it comes a text that changes when it was made anew, kept beside it or in ``identity``.
    """
    identity = identity or path.with_suffix(".identity")
    with suppress(Exception):  # not there, or damaged: made anew
        array = zarr.open_array(store=str(path), mode="r+")
        if (array.shape, array.chunks, array.dtype) == (tuple(shape), tuple(chunks), dtype):
            return ScratchArray(array), identity.read_text()
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = create_array(path, shape, chunks, dtype, zarr_format=zarr_format)
    identity.parent.mkdir(parents=True, exist_ok=True)
    identity.write_text(uuid.uuid4().hex)
    return ScratchArray(array), identity.read_text()


def input_mark(source: Any) -> str:
    """A text that changes when an input does: metadata; names, sizes and times of its files.

    Of a store elsewhere than on file systems it is the metadata alone.

    Raises
    ------
    InvalidData
        A chunk without any byte, which zarr may take for one that was never written.
    """
    if not isinstance(source, zarr.Array):
        return str(tokenize(source))
    parts: list[Any] = [str(source.store_path), str(source.metadata.to_dict())]
    if isinstance(source.store, LocalStore):
        count, every = 0, 0  # whatever the order in which files come
        for folder, _, names in os.walk(source.store.root / source.path):
            for name in names:
                found = os.stat(os.path.join(folder, name))
                if found.st_size == 0 and re.fullmatch(r"(c[./])?\d+([./]\d+)*", name):
                    raise InvalidData(
                        "input",
                        f"{os.path.join(folder, name)!r}, a chunk of 0 bytes",
                        "whole chunks",
                        "It was cut off, as by a full disk: make it again, or delete the file "
                        "where its voxels shall be the fill value.",
                    )
                told = f"{folder}/{name}/{found.st_size}/{found.st_mtime_ns}".encode()
                every ^= int.from_bytes(hashlib.blake2b(told, digest_size=16).digest())
                count += 1
        parts += [count, every]
    elif isinstance(source.store, MemoryStore):
        parts = [source[...]]
    return str(tokenize(*parts))


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as .npy, whole or not at all."""
    note(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(partial, path)


def load_array(path: Path, *, memory_map: bool = False) -> npt.NDArray[Any]:
    """Read an array that `save_array` wrote.

    Raises
    ------
    DamagedFile
        It is damaged or gone.
    """
    try:
        loaded: npt.NDArray[Any] = np.load(
            path, mmap_mode="r" if memory_map else None, allow_pickle=False
        )
    except (EOFError, FileNotFoundError, ValueError) as error:
        raise damaged(path, error) from error
    return loaded


def save_rows(path: Path, pieces: Iterable[npt.NDArray[Any]], rows: int, dtype: Any) -> None:
    """Write a table whose rows come in pieces as `save_array` does, whole or not at all."""
    note(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    kind = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    with partial.open("wb") as file:
        npy.write_array_header_1_0(file, kind)
        for piece in pieces:
            piece.tofile(file)
    os.replace(partial, path)


def read_rows(path: Path, first: int, out: npt.NDArray[Any]) -> None:
    """Read rows of a table from ``first`` on, as many as ``out`` has, into it.

    Raises
    ------
    DamagedFile
        The file is damaged or gone.
    """
    try:
        with path.open("rb") as file:
            npy.read_magic(file)
            _, _, dtype = npy.read_array_header_1_0(file)
            file.seek(first * out.itemsize, os.SEEK_CUR)
            if dtype != out.dtype or file.readinto(out.view(np.uint8).data) != out.nbytes:
                raise ValueError(f"fewer rows than {first + len(out)}, or of another kind")
    except (EOFError, FileNotFoundError, ValueError) as error:
        raise damaged(path, error) from error


def save_table(path: Path, **columns: npt.ArrayLike) -> None:
    """Write named arrays, whole or not at all; see `storage.save_table`."""
    note(path)
    storage.save_table(path, **columns)


def save_pieces(
    path: Path, pieces: Iterable[dict[str, npt.NDArray[Any]]], scratch: Path, **more: npt.ArrayLike
) -> int:
    """Write a table of the result whose rows come in pieces, none of which is kept; gives how many.

    Parameters
    ----------
    path
        The file.
    pieces
        At least one: columns of some rows.
    scratch
        A folder that holds the columns until all rows are there.
    more
        Other arrays of the table.
    """
    # Some file systems keep what is mapped: that goes with the scratch.
    temporary = tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True)
    with temporary as folder, ExitStack() as opened:
        files: dict[str, tuple[BinaryIO, np.dtype[Any]]] = {}
        rows = 0
        for piece in pieces:
            for name, values in piece.items():
                if name not in files:
                    file = opened.enter_context(Path(folder, name).open("w+b"))
                    files[name] = file, values.dtype
                values.tofile(files[name][0])
            rows += len(values)
        columns = {
            name: np.memmap(file, dtype, "r") if rows else np.zeros(0, dtype)
            for name, (file, dtype) in files.items()
        }
        storage.save_table(path, **columns, **more)
        return rows


def load_table(path: Path, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Read arrays that `save_table` wrote, or those of them with some names.

    Raises
    ------
    DamagedFile
        The file is damaged or gone.
    """
    try:
        return storage.load_table(path, names)
    except (InputNotFound, InvalidData) as error:
        raise damaged(path, error.__cause__) from error


def save_instances(folder: Path, table: InstanceTable) -> None:
    """Write an instance table, one file a column, so that tasks can read the rows they need."""
    for name in ("ids", "voxels", "sums", "lo", "hi"):
        save_array(folder / f"{name}.npy", getattr(table, name))


def load_instances(folder: Path) -> InstanceTable:
    """Open an instance table; only rows that are used are read."""
    columns = ("ids", "voxels", "sums", "lo", "hi")
    return InstanceTable(*(load_array(folder / f"{n}.npy", memory_map=True) for n in columns))
