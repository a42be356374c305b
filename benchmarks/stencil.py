"""A plain float32 stencil without labels: what the labelled diffusion sweep is measured against.

Each value becomes the mean of its six neighbours, 0 beyond the array: the least arithmetic that a
stencil over seven points can have. Written twice: as anyone would with numba (a parallel loop over
the planes, once for each iteration), and with cache blocking (several iterations per pass over
memory, as in the labelled sweep; slabs of planes on threads). Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.sweep import STEPS_PER_PASS
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges

Floats = npt.NDArray[np.float32]


@compiled
def _plane(old: Any, new: Any, z: Any) -> None:
    sixth = np.float32(1 / 6)
    for y in range(1, old.shape[1] - 1):
        for x in range(1, old.shape[2] - 1):
            total = old[z - 1, y, x] + old[z + 1, y, x]
            total += old[z, y - 1, x] + old[z, y + 1, x]
            total += old[z, y, x - 1] + old[z, y, x + 1]
            new[z, y, x] = total * sixth


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _iterate(even: Any, odd: Any, iterations: int) -> None:
    for i in range(iterations):
        old, new = (even, odd) if i % 2 == 0 else (odd, even)
        for z in numba.prange(1, old.shape[0] - 1):
            _plane(old, new, z)


@compiled
def _slab(even: Any, odd: Any, slab: Any, steps: int) -> None:
    """Several iterations of a slab ``(first, end, cut_first, cut_end)``, less at each cut."""
    first, end, cut_first, cut_end = slab
    for front in range(first, end + steps - 1):
        for step in range(steps):
            z = front - step
            if first + step * cut_first <= z < end - step * cut_end:
                if step % 2 == 0:
                    _plane(even, odd, z)
                else:
                    _plane(odd, even, z)


@compiled
def _gap(even: Any, odd: Any, cut: int, steps: int) -> None:
    """What the slabs on both sides of a cut left out."""
    for step in range(1, steps):
        for z in range(cut - step, cut + step):
            if step % 2 == 0:
                _plane(even, odd, z)
            else:
                _plane(odd, even, z)


def simple(fields: list[Floats], iterations: int, threads: int) -> Floats:
    """Iterate over padded arrays, all planes in every iteration; ``fields[1]`` is a buffer."""
    numba.set_num_threads(threads)
    _iterate(fields[0], fields[1], iterations)
    return fields[iterations % 2]


def blocked(fields: list[Floats], iterations: int, threads: int, run: Starmap) -> Floats:
    """The same in passes of several iterations, a slab a thread, the gaps between filled after."""
    planes = fields[0].shape[0] - 2
    cuts = ranges(planes, min(threads, planes // (2 * STEPS_PER_PASS)))
    for done in range(0, iterations, STEPS_PER_PASS):
        steps = min(STEPS_PER_PASS, iterations - done)
        slabs = [(a + 1, b + 1, int(a > 0), int(b < planes)) for a, b in cuts]
        run(_slab, [(*fields, slab, steps) for slab in slabs])
        run(_gap, [(*fields, a + 1, steps) for a, _ in cuts[1:]])
        if steps % 2:
            fields = fields[::-1]
    return fields[0]
