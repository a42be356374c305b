"""What a block costs that computes nothing: the whole machinery of `segment` on a million blocks.

The real job runs on stores without data, with task functions that do nothing but give what real
ones give: every block hands particles to its six neighbours, which send them home; its cells have
27 owners. So what is left is checks, plan, submission, ledger, messages and steps. Printed are
the milliseconds of wall time per block and stage, the high-water mark of the driver, which is the
scheduler's process too with --cluster local, and how long it takes to go on with the run when all
of its stages are done and only the last, of one task, is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blocks
import common

import topo_dask
from topo_dask.errors import InvalidArgument
from topo_dask.plan.outline import readable_bytes
from topo_dask.run import merge, refine, segment, together
from topo_dask.run.execute import open_engine
from topo_dask.storage import create_array

TITLE = "A million blocks that compute nothing"
EDGE = 8
"""Of a block in voxels: as with blocks of a usual size, only those that touch have close cells."""
STOP = "stop"


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--blocks", type=int, default=1_000_000, help="a cube of so many, at least")
    made.add_argument("--cluster", action="append", help="again for more; by default both")
    return made


def around(task: Any, reach: int) -> list[int]:
    """Blocks around one: those that share a face (1), or a corner too (3)."""
    side = task.job.grid.counts[0]
    plane, x = divmod(task.block, side)
    z, y = divmod(plane, side)
    zs, ys, xs = (range(max(0, n - 1), min(side, n + 2)) for n in (z, y, x))
    if reach == 3:
        return [(i * side + j) * side + k for i in zs for j in ys for k in xs]
    lines = [(i, y, x) for i in zs if i != z]
    lines += [(z, j, x) for j in ys if j != y]
    lines += [(z, y, k) for k in xs if k != x]
    return sorted((i * side + j) * side + k for i, j, k in lines)


def start_block(task: Any) -> Any:
    """Stage track: particles to all neighbours."""
    sent = [(n, 7 * i, 7 * i + 7) for i, n in enumerate(around(task, 1))]
    return EDGE**3, (sent, [])


def continue_block(task: Any) -> Any:
    """Stage track-2: what came goes home."""
    return len(task.mail), ([], [(sender, a, b) for _, sender, a, b in task.mail])


def cells_of_block(task: Any) -> list[int]:
    """Stage cells."""
    return around(task, 3)


def some(task: Any) -> int:
    """Any stage of which the driver wants a number."""
    return 1000


def number_all(task: Any) -> tuple[int, int]:
    """Stage number."""
    return 1000, 2000


def write_table(task: Any) -> int:
    """Stage table, the last: ends the run where a file says so."""
    if any((folder / STOP).exists() for folder in task.path.parents):
        raise InvalidArgument("benchmark", "the end", "no more", "Resume it.")
    return 1000


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """The machinery without the work."""
    replaced = [
        (segment, "start_block", blocks.start_block),
        (segment, "continue_block", blocks.continue_block),
        (segment, "label_block", blocks.some),
        (merge, "cells_of_block", blocks.cells_of_block),
        (merge, "number_all", blocks.number_all),
        (refine, "write_table", blocks.write_table),
        (together, "bring_together", blocks.some),
        *((merge, name, blocks.some) for name in ("own_block", "edges_of_block")),
        *((refine, name, blocks.some) for name in ("write_block", "sum_tables", "gather")),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, function in replaced:
            stack.enter_context(patch.object(module, name, function))
        yield


def high_water() -> int:
    """The most that this process held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(folder: Path, side: int, cluster: str) -> tuple[list[list[Any]], float, float, int]:
    """Rows of stages, processor seconds of the driver, seconds of the resumed run, memory."""
    shape = (EDGE * side,) * 3
    flows, mask = folder / "flows.zarr", folder / "mask.zarr"
    create_array(flows, (3, *shape), (3, 64, 64, 64), "float32")
    create_array(mask, shape, (64, 64, 64), "uint8")
    options: dict[str, Any] = {"foreground": mask, "halo": 0, "blocks": EDGE}
    out = folder / "out" / "labels.zarr"
    (folder / STOP).touch()
    with hollow(), open_engine(cluster) as engine:
        began = time.process_time()
        with contextlib.suppress(InvalidArgument):
            topo_dask.segment(flows, out, cluster=engine, **options)
        busy = time.process_time() - began
        record = json.loads(next(folder.rglob("run.json")).read_text())["attempts"][-1]
        (folder / STOP).unlink()
        began = time.perf_counter()
        topo_dask.segment(flows, out, cluster=engine, resume=True, **options)
        resumed = time.perf_counter() - began
    rows = [
        [
            *(cluster, s["stage"], s["blocks"], f"{s['seconds']:.1f}"),
            *(f"{1e3 * s['seconds'] / count:.3f}" for count in (s["blocks"], side**3)),
        ]
        for s in record["stages"]
    ]
    return rows, busy, resumed, high_water()


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    side = 1
    while side**3 < parsed.blocks:
        side += 1
    rows, lines, good = [], [], True
    for cluster in parsed.cluster or ("threads", "local"):
        with common.working_folder(parsed.folder) as folder:
            began = time.perf_counter()
            found, busy, resumed, memory = run(folder, side, cluster)
            took = time.perf_counter() - began - resumed
        rows += found
        worst = max(float(row[-1]) for row in found)
        good &= worst <= 2 and memory <= 2 * 2**30
        lines.append(
            f"{cluster}: {took:.0f} s in all, at most {worst:.3f} ms a block and stage; the "
            f"driver's process computed for {busy:.0f} s, {1e3 * busy / side**3:.3f} ms a block "
            f"for all stages; resumed when all but the last task was done in {resumed:.1f} s; the "
            f"driver held at most {readable_bytes(memory)}."
        )
    headings = ["cluster", "stage", "tasks", "seconds", "ms a task", "ms a block"]
    body = [
        f"{side}³ = {side**3} blocks.",
        common.table(headings, rows),
        *lines,
        "Wanted for 10⁶ blocks: at most 2 ms a block and stage, 2 GiB of driver and scheduler.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
