"""The exceptions. Each is also the builtin that fits it, so ``except ValueError`` keeps working.

Every message names the argument, what came, what is allowed and what to do.
"""

from __future__ import annotations

import errno
from gzip import BadGzipFile
from typing import Any

FOR_GOOD = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG, errno.ENAMETOOLONG),
)
"""Errors of a file system that a second try does not mend."""

STORES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "obstore", "requests", "s3fs")
"""Libraries whose errors are those of a store far away."""


class TopoError(Exception):
    """Base of every error that topo_dask raises on purpose.

    Parameters
    ----------
    argument
        Name of the argument, option or file at fault.
    came
        What was given or found.
    allowed
        What would have been accepted.
    do
        What to do about it, as a sentence.

    Examples
    --------
    >>> print(TopoError("radius", "-1", "a number > 0", "Pass e.g. radius=4."))
    radius: got -1; allowed: a number > 0. Pass e.g. radius=4.
    """

    def __init__(self, argument: str, came: object, allowed: str, do: str = "") -> None:
        # All four go into `args`: exceptions travel between processes by pickling them.
        super().__init__(argument, came, allowed, do)
        self.argument = argument
        self.came = came
        self.allowed = allowed
        self.do = do

    def __str__(self) -> str:
        text = f"{self.argument}: got {self.came}; allowed: {self.allowed}."
        return f"{text} {self.do}" if self.do else text


class InvalidArgument(TopoError, ValueError):
    """An argument has a value that makes no sense."""


class InvalidType(TopoError, TypeError):
    """An argument, or an array's dtype, is of a type that cannot be used."""


class InvalidData(TopoError, ValueError):
    """The content of an array is unusable (NaN in a flow, negative labels)."""


class DamagedFile(InvalidData):
    """A file between the stages of a run is damaged or gone; what to do is said.

    Parameters
    ----------
    argument, came, allowed, do
        See `TopoError`.
    path
        The file.
    array, at
        Where it is a chunk: the path of its array, its first voxel.
    """

    def __init__(
        self,
        argument: str,
        came: object,
        allowed: str,
        do: str = "",
        *,
        path: str = "",
        array: str = "",
        at: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(argument, came, allowed, do)
        self.path, self.array, self.at = path, array, at

    def __reduce__(self) -> Any:
        return _damaged_file, (self.args, {"path": self.path, "array": self.array, "at": self.at})


def _damaged_file(words: tuple[Any, ...], named: dict[str, Any]) -> DamagedFile:
    return DamagedFile(*words, **named)


class InputNotFound(TopoError, FileNotFoundError):
    """An input does not exist or cannot be read as zarr."""


class InputIsGroup(TopoError, ValueError):
    """A path names a zarr group where an array is needed; its arrays are listed."""


class OutputExists(TopoError, FileExistsError):
    """The output is already there and neither overwriting nor resuming was asked for."""


class OutputNotWritable(TopoError, PermissionError):
    """The output or the work directory cannot be written."""


class RunInProgress(TopoError, RuntimeError):
    """Another run holds the lock of this output."""


class TaskFailed(TopoError, RuntimeError):
    """A block's task failed; the block's position is named, nothing was published."""


class BackendUnavailable(TopoError, RuntimeError):
    """The backend or optional package asked for is not there."""


class MemoryTooSmall(TopoError, MemoryError):
    """A worker's memory limit is below what a stage is projected to need."""


class DeviceMemoryError(TopoError, MemoryError):
    """A device's memory does not hold what a kernel needs."""


class TightMemory(UserWarning):
    """A worker's memory comes near its limit in some stage."""


def may_pass(error: BaseException) -> bool:
    """Whether an error is one of a store that may be gone at a second try.

    Examples
    --------
    >>> may_pass(ConnectionResetError()), may_pass(FileNotFoundError(2, "gone"))
    (True, False)
    """
    if isinstance(error, TopoError):
        return False
    if isinstance(error, OSError):
        return error.errno not in FOR_GOOD and not isinstance(
            error, (FileNotFoundError, BadGzipFile)
        )
    return type(error).__module__.split(".")[0] in STORES
