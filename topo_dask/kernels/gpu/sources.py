"""The CUDA sources: their text, and what their kernels take."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "cuda"

TYPES: dict[str, Any] = {
    "unsigned char": np.uint8,
    "signed char": np.int8,
    "unsigned short": np.uint16,
    "short": np.int16,
    "unsigned int": np.uint32,
    "int": np.int32,
    "unsigned long long": np.uint64,
    "long long": np.int64,
    "float": np.float32,
    "double": np.float64,
}

_INCLUDE = re.compile(r'^#include "(\w+\.h)"$', re.MULTILINE)
_KERNEL = re.compile(r'^extern "C" __global__ void (\w+)\s*\(([^)]*)\)', re.MULTILINE)
_PARAMETER = re.compile(r"^(const )?([a-z ]+?)\s*(\*?)\s*(?:__restrict__ )?(\w+)$")


@dataclass(frozen=True)
class Parameter:
    """What a kernel takes: a number, or where an array begins."""

    name: str
    dtype: np.dtype[Any]
    array: bool


def names() -> list[str]:
    """All sources.

    Examples
    --------
    >>> "diffusion" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


@functools.cache
def text(name: str) -> str:
    """A source with what it includes from its folder put in place: compilers need no path."""
    source = (FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: (FOLDER / found[1]).read_text(encoding="utf-8"), source)


@functools.cache
def kernels(name: str) -> dict[str, tuple[Parameter, ...]]:
    """The kernels of a source, and their parameters in order.

    Examples
    --------
    >>> [p.name for p in kernels("diffusion")["neighbour_mask"]]
    ['count', 'local', 'links', 'nz', 'ny', 'nx', 'width']
    """
    return {
        found[1]: tuple(_parameter(part) for part in found[2].split(","))
        for found in _KERNEL.finditer(text(name))
    }


def _parameter(written: str) -> Parameter:
    found = _PARAMETER.match(" ".join(written.split()))
    if found is None or found[2] not in TYPES:
        raise TypeError(f"a kernel's parameter is not one of {sorted(TYPES)}: {written!r}")
    return Parameter(found[4], np.dtype(TYPES[found[2]]), found[3] == "*")


def arguments(source: str, kernel: str, count: int, given: tuple[Any, ...]) -> list[Any]:
    """What to pass: numbers of the types that the kernel declares, and arrays of these or ``None``.

    Raises
    ------
    TypeError
        An array has another type, is not contiguous, or the number of arguments is another.
    """
    wanted = kernels(source)[kernel]
    values = (count, *given)
    if len(values) != len(wanted):
        raise TypeError(f"{kernel} takes {[p.name for p in wanted]}; got {len(values)} arguments")
    made: list[Any] = []
    for parameter, value in zip(wanted, values, strict=True):
        if not parameter.array:
            made.append(parameter.dtype.type(value))
            continue
        if value is not None:
            same = value.dtype == parameter.dtype
            flags = value.dtype == np.bool_ and parameter.dtype == np.uint8
            if not (same or flags) or not value.flags.c_contiguous:
                raise TypeError(
                    f"{kernel}: {parameter.name} is {value.dtype}, contiguous "
                    f"{bool(value.flags.c_contiguous)}; it takes contiguous {parameter.dtype}"
                )
        made.append(value)
    return made
