"""What an option takes: paths, one number for each axis, points, names, pairs."""

from __future__ import annotations

from typing import Any

import click


class Lengths(click.ParamType[Any]):
    """One whole number, or three separated by commas: z,y,x."""

    name = "z,y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse; what the numbers may be is checked where they are used."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or three of them, like 128,128,128")
        return numbers[0] if len(numbers) == 1 else numbers


class Numbers(click.ParamType[Any]):
    """One number, or one for each axis separated by commas."""

    name = "z,y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number or several of them, like 40,8.5,8.5")
        return numbers[0] if len(numbers) == 1 else numbers


class ContextWidth(click.ParamType[Any]):
    """A number of voxels, or "auto"."""

    name = "voxels|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither 'auto' nor a whole number")


class RoundLength(ContextWidth):
    """A number of iterations, or "auto"."""

    name = "iterations|auto"


class Names(click.ParamType[Any]):
    """Names separated by commas."""

    name = "name,name,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(",")]


class Points(click.ParamType[Any]):
    """Points separated by semicolons: y,x;y,x."""

    name = "y,x;y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse; whole numbers stay whole."""
        if not isinstance(value, str):
            return value
        try:
            rows = [[float(n) for n in point.split(",")] for point in value.split(";")]
        except ValueError:
            self.fail(f"{value!r} is not a list of points, like 0,0;100,100")
        whole = all(n.is_integer() for row in rows for n in row)
        return tuple(tuple(int(n) for n in row) if whole else tuple(row) for row in rows)


class Pair(click.ParamType[Any]):
    """Two whole numbers separated by a comma."""

    name = "a,b"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        try:
            a, b = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of whole numbers, like 3,7")
        return a, b


PATH = click.Path()
LENGTHS = Lengths()
NUMBERS = Numbers()
CONTEXT_WIDTH = ContextWidth()
ROUND_LENGTH = RoundLength()
NAMES = Names()
POINTS = Points()
PAIR = Pair()
