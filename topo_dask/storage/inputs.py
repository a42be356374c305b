"""What is read: open an array, or say what is there in its place, before any work starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from topo_dask.codecs import careful
from topo_dask.errors import (
    BackendUnavailable,
    InputIsGroup,
    InputNotFound,
    InvalidArgument,
    InvalidType,
)
from topo_dask.storage.arrays import AnyArray
from topo_dask.storage.paths import GROUP_DEPTH, local_path, name_of

Source: TypeAlias = "str | os.PathLike[str] | AnyArray | zarr.Group | Store"

MAX_LISTED = 12

_AXES = {1: "x", 2: "y, x", 3: "z, y, x", 4: "channel, z, y, x", 5: "time, channel, z, y, x"}
_SOURCES = "a path, a URL, a zarr array or a zarr store"


def open_array(source: Source, *, argument: str, axes: Sequence[int] = (3,)) -> AnyArray:
    """Open an input for reading and check that it can be used, before any work starts.

    Parameters
    ----------
    source
        Path or URL of a zarr array (inside groups too: ``store.zarr/labels/s0``), or an open
        zarr array or store.
    argument
        Name of the argument, for messages.
    axes
        Allowed numbers of axes.

    Raises
    ------
    InputNotFound
        Nothing there, not zarr, or unreadable.
    InputIsGroup
        A group; its arrays are listed.
    InvalidArgument
        Wrong number of axes, or an axis of length 0.

    Examples
    --------
    >>> import tempfile
    >>> from topo_dask.storage import create_array
    >>> path = tempfile.mkdtemp() + "/labels.zarr"
    >>> _ = create_array(path, (4, 5, 6), (4, 5, 6), "uint32")
    >>> open_array(path, argument="labels").shape
    (4, 5, 6)
    """
    node = open_node(source, argument)
    if isinstance(node, zarr.Group):
        raise _group_error(node, source, argument)
    if node.ndim not in axes:
        names = " or ".join(f"{n} axes ({_AXES.get(n, '...')})" for n in axes)
        raise InvalidArgument(
            argument,
            f"an array of {node.ndim} axes, shape {node.shape}, at {name_of(source)}",
            names,
            "Pass an array with these axes: one channel and one time point of a larger one.",
        )
    if 0 in node.shape:
        raise InvalidArgument(
            argument,
            f"an array of shape {node.shape} at {name_of(source)}",
            "axes of length 1 or more",
            "Check how this array was made: it holds no voxel.",
        )
    return careful(node)


def open_node(source: Any, argument: str) -> AnyArray | zarr.Group:
    """Open the array or group at a location for reading."""
    if isinstance(source, zarr.Group):
        return source
    if isinstance(source, zarr.Array):
        store = source.store
        if isinstance(store, LocalStore) and not store.root.is_absolute():
            # Workers may run in another directory than this process.
            source = store.root.absolute() / source.path
        else:
            return source
    if not isinstance(source, (str, os.PathLike, Store)):
        raise InvalidType(argument, type(source).__name__, _SOURCES, "Pass e.g. 'labels.zarr'.")
    location: Any = source
    if not isinstance(source, Store):
        path = local_path(source)
        if path is not None:
            _require_directory(path, source, argument)
            location = str(path)
    return _zarr_open(location, source, argument)


def _zarr_open(location: Any, source: Any, argument: str) -> AnyArray | zarr.Group:
    try:
        return zarr.open(store=location, mode="r")
    except FileNotFoundError as error:
        raise InputNotFound(
            argument,
            f"{name_of(source)}, where there is no zarr array",
            "the location of a zarr array",
            _nearby(source) or "Check the path.",
        ) from error
    except ImportError as error:
        raise BackendUnavailable(
            argument,
            f"{name_of(source)}, which needs a package that is not installed ({error})",
            "a location that the installed packages can read",
            'For object stores: pip install "topo_dask[cloud]".',
        ) from error
    except Exception as error:  # whatever a store or damaged metadata may raise
        raise InputNotFound(
            argument,
            f"{name_of(source)}, which cannot be read as zarr ({type(error).__name__}: {error})",
            "the location of a readable zarr array",
            "Check its metadata and your permissions.",
        ) from error


def _require_directory(path: Path, source: Any, argument: str) -> None:
    try:
        is_directory = path.is_dir()
        exists = is_directory or path.exists()
    except (OSError, ValueError) as error:
        raise InputNotFound(
            argument,
            f"{name_of(source)}, which cannot be read ({error})",
            "the location of a readable zarr array",
            "Check the path and your permissions.",
        ) from error
    if not is_directory:
        raise InputNotFound(
            argument,
            f"{name_of(source)}, which is "
            + ("a file, not a zarr directory" if exists else "not there"),
            "the path of a zarr array",
            _nearby(source) or "Check the path.",
        )


def _group_error(group: zarr.Group, source: Any, argument: str) -> InputIsGroup:
    arrays = _list_arrays(group)
    base = name_of(source).strip("'") if isinstance(source, (str, os.PathLike)) else ""
    listed = ", ".join(f"{path} {_describe(array)}" for path, array in arrays[:MAX_LISTED])
    more = f" and {len(arrays) - MAX_LISTED} more" if len(arrays) > MAX_LISTED else ""
    if arrays:
        first = arrays[0][0]
        example = f"{base.rstrip('/')}/{first}" if base else f"group[{first!r}]"
        do = f"It holds {listed}{more}. Pass one of them, e.g. {example}."
    else:
        do = f"No array was found in it within {GROUP_DEPTH + 1} levels."
    return InputIsGroup(argument, f"{name_of(source)}, a zarr group", "a zarr array", do)


def _list_arrays(group: zarr.Group) -> list[tuple[str, AnyArray]]:
    with warnings.catch_warnings():
        # Files beside the arrays are nobody's mistake.
        warnings.simplefilter("ignore")
        try:
            # Consolidated metadata may be older than the arrays.
            fresh = zarr.open_group(
                store=group.store, path=group.path, mode="r", use_consolidated=False
            )
            members = fresh.members(max_depth=GROUP_DEPTH, use_consolidated_for_children=False)
        except Exception:  # a store that cannot list, or a damaged member
            members = group.members(max_depth=0) if group.metadata.consolidated_metadata else ()
    return sorted((path, node) for path, node in members if isinstance(node, zarr.Array))


def _nearby(source: Any) -> str:
    """What there is instead of a missing local path, as a sentence; empty where nothing is."""
    path = local_path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is None:
        return ""
    with suppress(Exception):
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix == ".zarr")[:MAX_LISTED]
            return f"It holds {', '.join(inside)}: pass one of them." if inside else ""
        parent = next(p for p in path.parents if p.is_dir())
        node = zarr.open(store=str(parent), mode="r")
        if isinstance(node, zarr.Group):
            names = [name for name, _ in _list_arrays(node)][:MAX_LISTED]
            return f"{parent} holds {', '.join(names)}." if names else ""
    return ""


def _describe(array: AnyArray) -> str:
    return f"({'x'.join(map(str, array.shape))} {array.dtype})"
