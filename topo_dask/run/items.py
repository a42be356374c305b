"""Items of a stage that are made when they are wanted: a million of them take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload


class Each(Sequence[Any]):
    """What a function makes of each of some numbers, made anew whenever it is looked at.

    Parameters
    ----------
    numbers
        A range, a list or the like.
    make
        Gives the item of a number.

    Examples
    --------
    >>> squares = Each(range(10**6), lambda n: n * n)
    >>> len(squares), squares[3], list(squares[5:7])
    (1000000, 9, [25, 36])
    """

    def __init__(self, numbers: Sequence[int], make: Callable[[int], Any]) -> None:
        self.numbers, self.make = numbers, make

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, position: int) -> Any: ...
    @overload
    def __getitem__(self, position: slice) -> Each: ...
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return Each(self.numbers[position], self.make)
        return self.make(self.numbers[position])
