"""One class of a stack of arrays, as an array of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from topo_dask.storage import AnyArray


@dataclass(frozen=True)
class Row:
    """Some entries of the first axis of a stored array, read and written like an array.

    Parameters
    ----------
    array
        The stack.
    first
        The first of the entries.
    count
        How many; ``None`` for one without an axis.

    Examples
    --------
    >>> import zarr
    >>> stack = zarr.array(np.arange(8).reshape(4, 2))
    >>> Row(stack, 1).shape, Row(stack, 1)[:].tolist()
    ((2,), [2, 3])
    >>> Row(stack, 1, 2).shape, Row(stack, 1, 2)[:, 0].tolist()
    ((2, 2), [2, 4])
    """

    array: AnyArray
    first: int
    count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        first = () if self.count is None else (self.count,)
        return (*first, *self.array.shape[1:])

    @property
    def dtype(self) -> Any:
        """Dtype of the stack."""
        return self.array.dtype

    def _whole(self, key: Any) -> tuple[Any, ...]:
        key = key if isinstance(key, tuple) else (key,)
        if self.count is None:
            return (self.first, *key)
        start, stop, _ = key[0].indices(self.count)
        return (slice(self.first + start, self.first + stop), *key[1:])

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self.array[self._whole(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[self._whole(key)] = value
