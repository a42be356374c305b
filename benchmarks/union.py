"""The one union over all owners, on generated components and edges: seconds and memory.

Owners lie on a cube and have so many components each; as many edges as asked for go from them to
components of the owners after them. They are written in the files that the workers of a run bring
together, 64 owners each. Then the real task of the run numbers the instances in a process of its
own, whose time and high-water mark of memory are measured; so are its parts: the union alone, in
memory, of these edges and of edges between any two components; and scipy's connected components
of at most --scipy edges, whose components must be the same. Needs no labels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from topo_dask.graph.merge import OWNER_BITS
from topo_dask.graph.union import Union, unite
from topo_dask.plan.outline import readable_bytes
from topo_dask.run.files import save_array
from topo_dask.run.merge import NumberTask, number_all
from topo_dask.run.together import FAN_IN
from topo_dask.storage import save_table

TITLE = "Union-find over the edges that cross faces"
CELLS = 32
"""Convergence cells along an edge of a block; a component has one in each of some columns."""


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--edges", type=int, default=100_000_000)
    made.add_argument("--components", type=int, default=1000, help="of an owner, at most 1024")
    made.add_argument("--scipy", type=int, default=10_000_000, help="most edges to compare")
    return made


def roots_of(owner: int, side: int, count: int) -> np.ndarray:
    """The smallest cells of an owner's components, ascending: one in each of some cell columns."""
    place = np.array(np.unravel_index(owner, (side,) * 3)) * CELLS
    rng = np.random.default_rng(owner)
    z, y = np.divmod(np.arange(count), CELLS)
    x = rng.integers(0, CELLS, count)
    whole = side * CELLS
    return ((z + place[0]) * whole + y + place[1]) * whole + x + place[2]


def write(folder: Path, owners: int, side: int, parsed: argparse.Namespace) -> tuple[Path, ...]:
    """The files of all owners."""
    paths, each = [], -(-parsed.edges // owners)
    for first in range(0, owners, FAN_IN):
        some = range(first, min(first + FAN_IN, owners))
        roots = [roots_of(n, side, parsed.components) for n in some]
        rng = np.random.default_rng(first)
        edges = []
        for owner in some:
            later = np.array([n for n in (1, side, side**2) if owner + n < owners] or [0])
            ends = owner + np.stack([np.zeros(each, np.int64), rng.choice(later, each)], axis=1)
            which = rng.integers(0, parsed.components, (each, 2))
            edges.append(np.unique((ends << OWNER_BITS) + which, axis=0))
        paths.append(folder / "together" / f"{first}.npz")
        whole = np.concatenate(roots)
        counts = np.full(len(some), parsed.components)
        sizes = rng.integers(1, 1000, len(whole))
        save_table(paths[-1], counts=counts, roots=whole, sizes=sizes, edges=np.concatenate(edges))
    save_array(folder / "parts" / "owners.npy", np.arange(owners))
    return tuple(paths)


def apart(function: Any, *arguments: Any) -> tuple[Any, float, int]:
    """Result, seconds and high-water mark of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return tuple(pool.apply(_measured, (function, arguments)))  # type: ignore[return-value]


def _measured(function: Any, arguments: Any) -> tuple[Any, float, int]:
    unite(np.ones(2, np.int64), [np.array([[0, 1]])])  # compile it
    began = time.perf_counter()
    result = function(*arguments)
    took = time.perf_counter() - began
    return result, took, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pieces(kind: str, count: int, edges: int) -> Iterator[np.ndarray]:
    """Edges between rows that are close, or between any two, a million at a time."""
    rng = np.random.default_rng(0)
    for first in range(0, edges, 10**6):
        size = min(10**6, edges - first)
        a = rng.integers(0, count, size)
        b = rng.integers(0, count, size) if kind == "any" else a + rng.integers(1, 3000, size)
        yield np.stack([a, np.minimum(b, count - 1)], axis=1)


def alone(kind: str, count: int, edges: int) -> float:
    """Seconds of the union without the making of its edges."""
    rows, spent = Union(count), 0.0
    for pairs in pieces(kind, count, edges):
        began = time.perf_counter()
        rows.add(pairs)
        spent += time.perf_counter() - began
    began = time.perf_counter()
    rows.roots()
    return spent + time.perf_counter() - began


def by_scipy(kind: str, count: int, edges: int) -> tuple[float, bool]:
    """Seconds of scipy's components, and whether they are the same."""
    rows = Union(count)
    every = []
    for pairs in pieces(kind, count, edges):
        rows.add(pairs)
        every.append(pairs.astype(np.int32))
    a, b = np.concatenate(every).T
    began = time.perf_counter()
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
    number, member = connected_components(graph, directed=False)
    took = time.perf_counter() - began
    first = np.full(number, count)
    np.minimum.at(first, member, np.arange(count))
    return took, bool((first[member] == rows.roots()).all())


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    owners = max(1, parsed.edges // (2 * parsed.components))
    side = 1
    while side**3 < owners:
        side += 1
    count = owners * parsed.components
    with common.working_folder(parsed.folder) as folder:
        tables = write(folder, owners, side, parsed)
        task = NumberTask(folder, owners, tables, 50)
        (instances, _), seconds, memory = apart(number_all, task)
        read = sum(path.stat().st_size for path in tables)
    rows = [[f"{parsed.edges:.3g}", f"{count:.3g}", "the task of a run", f"{seconds:.1f}"]]
    rows[0] += [readable_bytes(memory), f"{1e9 * seconds / parsed.edges:.0f}"]
    for kind in ("close", "any"):
        spent, _, most = apart(alone, kind, count, parsed.edges)
        cells = [f"{parsed.edges:.3g}", f"{count:.3g}", f"union alone, {kind} rows"]
        per_edge = f"{1e9 * spent / parsed.edges:.0f}"
        rows.append([*cells, f"{spent:.1f}", readable_bytes(most), per_edge])
    few = min(parsed.scipy, parsed.edges)
    (spent, same), _, most = apart(by_scipy, "any", max(1, few // 2), few)
    cells = [f"{few:.3g}", f"{few // 2:.3g}", "scipy, any rows", f"{spent:.1f}"]
    rows.append([*cells, readable_bytes(most), f"{1e9 * spent / few:.0f}"])
    good = same and seconds <= 60 and memory <= 8 * 2**30
    body = [
        common.table(["edges", "components", "", "seconds", "peak memory", "ns an edge"], rows),
        f"{owners} owners; {instances} instances of at least 50 voxels; the task read "
        f"{readable_bytes(read)} in {len(tables)} files.",
        f"Wanted for 10⁸ edges: at most 60 s and 8 GiB. Components as scipy finds them: "
        f"{'yes' if same else 'NO'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
