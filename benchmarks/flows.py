"""Flows of every potential, of many iterations, far from the origin, and of every size.

- Each potential, and the coordinate potential with ten times the iterations (with and without
  `adaptive_iters`) and at other origins: seconds, and how often the first row fits into them.
- Those iterations by sums of Chebyshev polynomials against plain ones: seconds, and how far a
  component is from plain iteration, and both from plain iteration in float64.
- The same flows of cubes of several sizes: cost per voxel, which should be flat. Once crops of the
  labels, whose instances are the larger the larger the crop; a cube larger than the volume is
  filled with mirror images of it, whose instances are apart. Once nothing but such images of the
  smallest crop, so that nothing differs but the size. Memory that one
  call has freed the next one uses again (glibc is told so), as in the workers of a run: touching a
  page for the first time is a cost of the machine, on a virtual one any. The first call of each
  size, which pays it, stands beside the best.

All are calls of `generate_diffusion_flows` on arrays in memory, warm, in turns, on all cores. An
update is a voxel of one field replaced by the mean of its neighbours; instances with fewer
iterations than the most count with the most. Beside them stands the plain stencil of `stencil.py`,
float32 without labels, of the same size on all cores: what the machine can do. The Poisson
potential has no iterations of that kind; for it, as for the others, stands how many updates of
every voxel the plain stencil makes in the same time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import stencil

import topo_dask
from topo_dask.kernels.cpu.diffusion import TINY, domain_of, weights_of
from topo_dask.kernels.cpu.sweep import Start
from topo_dask.kernels.parallel import available_cores, starmap
from topo_dask.run.memory import OPTIONS, glibc, keep_memory

TITLE = "Flows: potentials, iterations, origins, sizes"
TOLERANCE = 1e-4
FIELDS = {"coordinate": 4, "heat": 1}
POTENTIALS = ("coordinate", "heat", "poisson")
PLAIN_ITERATIONS = 40
FLAT = 1.15

Labels = npt.NDArray[Any]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--size", type=int, default=128, help="edge of the crop of the first table")
    made.add_argument("--n-iter", type=int, default=200, help="most iterations; ten times, too")
    made.add_argument("--sizes", default="64,128,256", help="edges of the cubes of the second")
    made.add_argument("--repetitions", type=int, default=5)
    return made


def cube(source: Any, size: int) -> Labels:
    """A cube of a volume, or of its mirror images where it is too small; their ids differ."""
    return filled(common.crop(source, size), size)


def filled(inner: Labels, size: int) -> Labels:
    """A cube of a crop and its mirror images; their ids differ."""
    if min(inner.shape) == size:
        return inner
    ids, numbers = np.unique(inner, return_inverse=True)
    inner = numbers.reshape(inner.shape).astype(np.uint32) + np.uint32(ids[0] > 0)
    most = int(inner.max(initial=0)) + 1
    for axis in range(3):
        parts, copy = [inner], 1
        while sum(part.shape[axis] for part in parts) < size:
            image = np.flip(inner, axis) if copy % 2 else inner
            parts.append(np.where(image > 0, image + np.uint32(copy * most), image))
            copy += 1
        inner = np.concatenate(parts, axis=axis)
        inner = np.take(inner, range(size), axis=axis)
        most *= copy
    return inner


def plain_speed(shape: tuple[int, ...], repetitions: int) -> float:
    """Updates a second of the plain stencil, in the faster of its two forms."""
    fields = [np.zeros([n + 2 for n in shape], dtype=np.float32) for _ in range(2)]
    fields[0][1:-1, 1:-1, 1:-1] = np.arange(shape[0], dtype=np.float32)[:, None, None]
    threads = available_cores()
    with starmap(threads) as run:
        sides: dict[str, Any] = {
            "simple": lambda: stencil.simple(fields, PLAIN_ITERATIONS, threads)[0, 0, 0],
            "blocked": lambda: stencil.blocked(fields, PLAIN_ITERATIONS, threads, run)[0, 0, 0],
        }
        times = common.interleaved(sides, repetitions)
    best = min(took.best for took in times.values())
    return float(PLAIN_ITERATIONS * np.prod(shape) / best)


def rows(
    times: dict[str, common.Times], labels: Labels, updates: dict[str, int], plain: float
) -> list[Any]:
    first = next(iter(times.values()))
    made = []
    for name, took in times.items():
        done = updates.get(name)
        made.append(
            [
                name,
                f"{took.best:.3f}",
                f"{took.median:.3f}",
                f"{1e6 * took.best / labels.size:.3g}",
                f"{took.best / first.best:.2f}",
                "" if done is None else f"{done / took.best / 1e9:.2f}",
                f"{took.best * plain / labels.size:.0f}",
            ]
        )
    return made


def potentials(parsed: argparse.Namespace) -> str:
    labels = common.crop(parsed.labels, parsed.size)
    n = parsed.n_iter
    make = topo_dask.generate_diffusion_flows
    sides: dict[str, Any] = {f"coordinate, n = {n}": partial(make, labels, n)}
    for potential in POTENTIALS[1:]:
        sides[f"{potential}, n = {n}"] = partial(make, labels, n, potential=potential)
    sides[f"coordinate, n = {10 * n}"] = partial(make, labels, 10 * n)
    sides[f"coordinate, n = {10 * n} for all"] = partial(make, labels, 10 * n, False)
    for far in (10**4, 10**7):
        sides[f"coordinate, n = {n}, origin {far:.0e}"] = partial(
            make, labels, n, origin=(far,) * 3
        )
    times = common.interleaved(sides, parsed.repetitions)
    updates = {
        name: FIELDS[potential] * labels.size * n
        for name in sides
        for potential in FIELDS
        if name.startswith(f"{potential}, n = {n}") and f"{10 * n}" not in name
    }
    headings = ["", "best s", "median s", "us/voxel", "times the first", "G updates/s, all fields"]
    headings.append("updates a voxel of the plain stencil in that time")
    plain = plain_speed(labels.shape, parsed.repetitions)
    table = common.table(headings, rows(times, labels, updates, plain))
    stands = f"The plain stencil of this size makes {plain / 1e9:.2f} G updates/s."
    return f"Labels: {common.described(labels)}.\n\n{table}\n\n{stands}"


def in_float64(labels: Labels, n: int) -> npt.NDArray[np.float32]:
    """Flows of n plain iterations for all instances, with nothing in float32 before the end."""
    table = topo_dask.instance_table(labels)
    with starmap(available_cores()) as run:
        threads, weights = available_cores(), weights_of((1.0, 1.0, 1.0))
        total = np.full(len(table), n)
        domain = domain_of(labels, None, None, table.ids, total, run, threads)
        layout, origin = domain.layout, np.zeros(len(table) + 1, dtype=np.int64)
        starts = [Start(np.float64, origin, axis, tiniest=0.0) for axis in range(3)]
        fields = layout.fields(starts, run, threads)
        fields = layout.advance(fields, (0, layout.total), weights, run)
        values = [np.zeros(0), *(field.values for field in fields)]
        return domain.flow(values, np.ones((len(table) + 1, 6)), TINY, run, threads)


def accelerated(parsed: argparse.Namespace) -> str:
    labels, n = common.crop(parsed.labels, parsed.size), 10 * parsed.n_iter
    make = partial(topo_dask.generate_diffusion_flows, labels, adaptive_iters=False)
    fast = partial(make, n, acceleration="chebyshev", tolerance=TOLERANCE)
    first = f"plain, n = {n // 10}"
    sides = {first: partial(make, n // 10), f"Chebyshev, n = {n}": fast}
    times = common.interleaved(sides, parsed.repetitions)
    plain = common.interleaved({f"plain, n = {n}": partial(make, n)}, 1)
    times |= plain
    exact, foreground = in_float64(labels, n), labels > 0
    made = []
    for name, took in times.items():
        cells = [name, f"{took.best:.3f}", f"{took.median:.3f}"]
        cells.append(f"{took.median / times[first].median:.2f}")
        for other in (next(iter(plain.values())).result, exact):
            off = np.abs(took.result - other).max(axis=0)[foreground]
            far = f"{off.max():.1e}, {np.mean(off > TOLERANCE):.1e}"
            cells.append("" if name == first else far)
        made.append(cells)
    headings = ["", "best s", "median s", "times the first, medians"]
    headings += [f"off plain n = {n}: most, share > {TOLERANCE:g}", "off the same in float64"]
    allowed = f"Wanted: Chebyshev with tolerance {TOLERANCE:g} at most 4 times the first."
    return f"Iterations of all instances, whatever their size. {allowed}\n\n" + common.table(
        headings, made
    )


def keep_all_memory() -> None:
    """Let this process keep all memory that is freed, for later arrays; with glibc."""
    keep_memory()
    library = glibc()
    if library is not None:
        library.mallopt(OPTIONS["MALLOC_TRIM_THRESHOLD_"], -1)


def sizes(parsed: argparse.Namespace) -> str:
    keep_all_memory()
    edges = [int(size) for size in parsed.sizes.split(",")]
    smallest = common.crop(parsed.labels, edges[0])
    crops = cost_by_size(parsed, {size: partial(cube, parsed.labels, size) for size in edges})
    images = cost_by_size(parsed, {size: partial(filled, smallest, size) for size in edges})
    wanted = f"Wanted: ns/voxel within {FLAT - 1:.0%}."
    return f"{wanted} Crops:\n\n{crops}\n\nImages of the smallest crop:\n\n{images}"


def cost_by_size(parsed: argparse.Namespace, volumes: dict[int, Callable[[], Labels]]) -> str:
    """Table of seconds and ns a voxel for volumes by their edge."""
    repetitions = max(1, parsed.repetitions - 1)
    made: list[list[Any]] = []
    costs: dict[str, list[float]] = {potential: [] for potential in POTENTIALS}
    for size, volume in volumes.items():
        labels = volume()
        cells: list[Any] = [f"{size}³"]
        for potential in POTENTIALS:
            side = partial(
                topo_dask.generate_diffusion_flows, labels, parsed.n_iter, potential=potential
            )
            took = common.interleaved({potential: side}, repetitions)[potential]
            costs[potential].append(1e9 * took.best / labels.size)
            cells.append(f"{took.best:.3f} ({took.seconds[0]:.3f})")
            cells.append(f"{costs[potential][-1]:.0f}")
        speed = plain_speed(labels.shape, repetitions)
        cells.append(f"{speed / 1e9:.2f}")
        cells += [f"{cost[-1] * 1e-9 * speed:.0f}" for cost in costs.values()]
        made.append(cells)
    most: list[Any] = ["most / least"]
    last: list[Any] = ["largest cube / smallest"]
    for cost in costs.values():
        most += ["", f"{max(cost) / min(cost):.2f}"]
        last += ["", f"{cost[-1] / cost[0]:.2f}"]
    made += [row + [""] * (1 + len(POTENTIALS)) for row in (most, last)]
    headings = [""]
    for potential in POTENTIALS:
        headings += [f"{potential} s (first call)", "ns/voxel"]
    headings.append("plain stencil, G updates/s")
    headings += [f"its updates a voxel in the time of {potential}" for potential in POTENTIALS]
    return common.table(headings, made)


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    tiny = common.crop(parsed.labels, 32)
    for potential in POTENTIALS:  # compiled now
        topo_dask.generate_diffusion_flows(tiny, potential=potential)
    topo_dask.generate_diffusion_flows(tiny, 1000, False, acceleration="chebyshev")
    in_float64(tiny, 10)
    plain_speed(tiny.shape, 1)
    common.report(made, parsed, TITLE, [potentials(parsed), accelerated(parsed), sizes(parsed)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
