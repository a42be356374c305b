"""Checks of an output's place before work starts: nothing of the user's is replaced or mixed in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import zarr

from topo_dask.errors import (
    InvalidArgument,
    InvalidType,
    OutputExists,
    OutputNotWritable,
    TopoError,
)
from topo_dask.storage.inputs import open_node
from topo_dask.storage.metadata import MARK, TABLE_MARK
from topo_dask.storage.paths import contains, is_empty_directory, local_path, path_of
from topo_dask.storage.tables import load_table


def output_path(path: Any, argument: str) -> Path:
    """The absolute local path of an output; what it links to where it is a link."""
    allowed = "a path on a local or mounted file system"
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidType(argument, type(path).__name__, allowed, "Pass e.g. 'result.zarr'.")
    text = os.fspath(path)
    local = local_path(text) if text and "\0" not in text else None
    if local is None or not local.name:
        raise InvalidArgument(argument, repr(text), allowed, "Copy the result there afterwards.")
    # What is replaced is the target of a link, not the link.
    linked = os.path.islink(local) or ".." in local.parts
    return Path(os.path.realpath(local)) if linked else local


def refuse_overlap(places: Iterable[Path], source: Any, argument: str) -> None:
    """Raise InvalidArgument where a place of ours is an input, inside or around one."""
    path = path_of(source)
    if path is None:
        return
    for ours in places:
        inside, around = contains(path, ours), contains(ours, path)
        if inside or around:
            relation = "equal to" if inside and around else "inside" if inside else "around"
            raise InvalidArgument(
                argument,
                f"{str(ours)!r}, which is {relation} the input {str(path)!r}",
                "a place apart from every input",
                "Choose another output.",
            )


def refuse_existing(path: Path, argument: str, *, may_replace: bool) -> None:
    """Raise OutputExists or OutputNotWritable where something is that stays as it is."""
    if not os.path.lexists(path):
        return
    if not may_replace:
        raise OutputExists(
            argument,
            f"{str(path)!r}, which is already there",
            "a path where nothing is",
            "Choose another output, or pass overwrite=True (--overwrite) to replace it or "
            "resume=True (--resume) to go on with it.",
        )
    if not _replaceable(path):
        raise OutputExists(
            argument,
            f"{str(path)!r}, which is neither a zarr array nor an image or a table "
            "that topo_dask wrote",
            "a path where nothing is, or such a result to replace",
            "Choose another output, or remove it yourself.",
        )
    if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
        raise OutputNotWritable(
            argument,
            f"{str(path)!r}, which is read-only",
            "an existing output that may be replaced",
            "Choose another output, or change its permissions.",
        )


def _replaceable(path: Path) -> bool:
    """Whether overwriting may remove it: ours, a zarr array, or empty; never a mere directory."""
    if is_empty_directory(path):
        return True
    if path.is_file():
        with suppress(TopoError):
            return TABLE_MARK in load_table(path, (TABLE_MARK,))
        return False
    try:
        node = open_node(path, "output")
    except TopoError:
        return False
    return isinstance(node, zarr.Array) or MARK in node.attrs


def refuse_leftovers(directory: Path, argument: str, *, may_drop: bool) -> None:
    """Raise OutputExists where a work directory holds what stays as it is."""
    if not os.path.lexists(directory) or is_empty_directory(directory):
        return
    if not os.path.isfile(directory / MARK):
        raise OutputExists(
            argument,
            f"{str(directory)!r}, which topo_dask needs for its work but did not make",
            "a work directory that is not there yet",
            "Choose another output or work_dir, or move it away.",
        )
    if not may_drop:
        raise OutputExists(
            argument,
            f"unfinished work of an earlier run in {str(directory)!r}",
            "no leftovers",
            "Pass resume=True (--resume) to go on with it, or overwrite=True "
            "(--overwrite) to start again.",
        )


def probe(directory: Path, argument: str) -> None:
    """Write into a directory that may not exist yet; leave everything as it was."""
    missing = [p for p in (directory, *directory.parents) if not os.path.lexists(p)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        # Trying is the only test that is right for root, quotas and network file systems.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
    except OSError as error:
        raise OutputNotWritable(
            argument,
            f"{str(directory)!r}, which cannot be written ({error.strerror or error})",
            "a directory that can be made and written",
            "Choose another place, or change the permissions.",
        ) from error
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another run may have started in it
                path.rmdir()
