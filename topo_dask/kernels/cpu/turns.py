"""How threads inside compiled code wait for each other: a counter each, read and written in order.

A thread that waits turns in a loop and lets others run; that is for waits far shorter than it
takes to wake a sleeping thread.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from topo_dask.kernels.jit import compiled

APART = 8
"""int64 from one counter to the next: a cache line, so that writing one disturbs no other."""

PATIENCE = 200
"""Looks at a counter after which a waiting thread lets others run."""

YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


def counters(count: int) -> npt.NDArray[np.int64]:
    """Give a counter to each thread, all 0."""
    return np.zeros(count * APART, dtype=np.int64)


def _place(context: Any, builder: Any, kind: Any, array: Any, number: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    at = builder.mul(number, ir.Constant(ir.IntType(64), APART))
    return builder.gep(data, [at], source_etype=ir.IntType(64))


def _typed_load(_context: Any, array: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _place(context, builder, signature.args[0], *args)
        return builder.load_atomic(at, "acquire", 8, typ=ir.IntType(64))

    return types.int64(array, types.int64), generate


def _typed_store(_context: Any, array: Any, number: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(
            args[2], _place(context, builder, signature.args[0], *args[:2]), "release", 8
        )
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


def _typed_yield(_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), ())
        insert: Any = cgutils.get_or_insert_function
        builder.call(insert(builder.module, kind, YIELD), [])
        return context.get_dummy_value()

    return types.void(), generate


_load: Any = intrinsic(_typed_load)
_store: Any = intrinsic(_typed_store)
_let_others_run: Any = intrinsic(_typed_yield)


@compiled
def reach(counts: Any, number: int, value: int) -> None:
    """Say that a thread has come so far; all that it wrote before is then seen by who awaits it."""
    _store(counts, np.int64(number), np.int64(value))


@compiled
def wait_for(counts: Any, number: int, value: int) -> None:
    """Wait until a thread has come at least so far."""
    looks = 0
    while _load(counts, np.int64(number)) < value:
        looks += 1
        if looks > PATIENCE:
            _let_others_run()
