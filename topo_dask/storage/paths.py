"""Where things lie: local paths, URLs and stores, and what messages call them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import zarr
from zarr.storage import LocalStore

GROUP_DEPTH = 3  # levels of groups that are searched for arrays, and of parents for metadata


def local_path(location: str | os.PathLike[str]) -> Path | None:
    """The absolute path of a path or ``file://`` URL; None for any other URL.

    Examples
    --------
    >>> local_path("file:///data/a%20b.zarr").as_posix()
    '/data/a b.zarr'
    >>> local_path("s3://bucket/a.zarr") is None
    True
    """
    text = os.fspath(location)
    if "://" in text:
        url = urlsplit(text)
        if url.scheme != "file":
            return None
        text = unquote(url.path)
    # Not resolved: on clusters the resolved path may exist on this machine only.
    return Path(text).expanduser().absolute()


def path_of(source: Any) -> Path | None:
    """Where an input lies on this machine's file systems; None if it does not."""
    if isinstance(source, (str, os.PathLike)):
        path = local_path(source)
    elif isinstance(source, (zarr.Array, zarr.Group)) and isinstance(source.store, LocalStore):
        path = source.store.root.absolute() / source.path
    elif isinstance(source, LocalStore):
        path = source.root.absolute()
    else:
        return None
    return path


def contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies below it, whatever links and mounts lead to them."""
    resolved = Path(os.path.realpath(inner))
    if Path(os.path.realpath(outer)) in (resolved, *resolved.parents):
        return True
    for path in (resolved, *resolved.parents):
        with suppress(OSError):
            if os.path.samefile(path, outer):
                return True
    return False


def is_empty_directory(path: Path) -> bool:
    """Whether a path is a directory that can be listed and holds nothing."""
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def name_of(source: Any) -> str:
    """What messages call an input: what the user passed, in quotes where it is a path."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (zarr.Array, zarr.Group)):
        return str(source.store_path)
    return str(source)


def description_of(source: Any) -> str:
    """What an input is, for people: where it lies, or the array in memory that it is."""
    path = path_of(source)
    if path is not None:
        return str(path)
    if isinstance(source, (zarr.Array, zarr.Group)):
        return str(source.store_path)
    kind, dtype = type(source).__name__, getattr(source, "dtype", "")
    return f"{kind} {'x'.join(map(str, getattr(source, 'shape', ())))} {dtype}".strip()
