"""How every CPU kernel is compiled: cached on disk, GIL released, arithmetic as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a loop with numba; no fast-math, so that results do not depend on vector length."""
    kernel: Any = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return cast(Function, kernel)
