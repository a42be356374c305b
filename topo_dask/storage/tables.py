"""Small tables: named arrays in an ``.npz`` file."""

from __future__ import annotations

import errno
import os
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InputNotFound, InvalidData, InvalidType, may_pass
from topo_dask.storage.paths import name_of


def save_table(path: str | os.PathLike[str], /, **arrays: npt.ArrayLike) -> None:
    """Write named arrays to an ``.npz`` file; the file appears complete or not at all.

    Raises
    ------
    InvalidType
        An array of Python objects.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/sizes.npz"
    >>> save_table(path, ids=[1, 2], voxels=[10, 20])
    >>> load_table(path)["voxels"]
    array([10, 20])
    """
    target = Path(path)
    tables = {name: np.asarray(values) for name, values in arrays.items()}
    for name, values in tables.items():
        if values.dtype.hasobject:
            raise InvalidType(name, f"dtype {values.dtype}", "numbers, booleans or text")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as bundle:
            for name, values in tables.items():
                with bundle.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_table(
    path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays that `save_table` wrote, or those of them with some names.

    Raises
    ------
    InputNotFound
        No such file.
    InvalidData
        The file is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as bundle:
            return {name: bundle[name] for name in (bundle.files if names is None else names)}
    except FileNotFoundError as error:
        raise InputNotFound(
            "table", name_of(path), "the path of a table", "Run the stage that makes it."
        ) from error
    except Exception as error:  # a damaged archive may raise anything
        if may_pass(error) and getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # of the disk, not of the file
        raise InvalidData(
            "table",
            f"{name_of(path)}, which is damaged ({error})",
            "a table as save_table writes it",
            "If it is an intermediate file of a run, pass overwrite=True (--overwrite) to begin "
            "anew: nothing of yours is lost.",
        ) from error
