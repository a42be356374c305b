"""Rounds against one context: what each takes on a crop of real tissue, and which is chosen.

Both run with the same table of instances, in threads of this process. Wanted: the one that is
chosen by itself is the faster, or within --slack of it. Ends with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

import topo_dask
from topo_dask.config import FlowSettings
from topo_dask.graph.context import automatic_width
from topo_dask.graph.context_or_rounds import ContextChoice, choose_context
from topo_dask.grid import BlockGrid
from topo_dask.storage import create_array

TITLE = "Flows on disk: rounds against one context"
CASES = ["coordinate:200:64", "heat:200:64", "coordinate:200:128", "heat:200:128"]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=256, help="edge of the crop, in its middle")
    made.add_argument("--case", action="append", help="potential:iterations:edge of a block")
    made.add_argument("--slack", type=float, default=0.15, help="part by which times may differ")
    return made


def choices(how: FlowSettings, grid: BlockGrid, table: Any) -> tuple[ContextChoice, ...]:
    """What is chosen, the best rounds, and the context."""
    chosen = choose_context(how, grid, table=table)
    width = automatic_width(how.n_iter, how, max(grid.shape))
    rounds = choose_context(replace(how, rounds="auto"), grid, table=table)
    return chosen, rounds, choose_context(replace(how, context=width), grid, table=table)


def seconds_of(folder: Path, table: Any, how: FlowSettings, edge: int, **options: Any) -> float:
    """Of a run."""
    began = time.perf_counter()
    given: dict[str, Any] = {"potential": how.potential, "n_iter": how.n_iter, "blocks": edge}
    given |= {"instances": table, "cluster": "threads", "progress": False, "overwrite": True}
    topo_dask.flows(folder / "labels.zarr", folder / "out.zarr", **given, **options)
    return time.perf_counter() - began


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    rows, good = [], True
    with common.working_folder(parsed.folder) as folder:
        crop = common.crop(parsed.labels, parsed.size)
        chunks = tuple(min(64, n) for n in crop.shape)
        create_array(folder / "labels.zarr", crop.shape, chunks, crop.dtype)[...] = crop
        table = topo_dask.instance_table(crop)
        for case in parsed.case or CASES:
            potential, count, edge = case.split(":")
            how = FlowSettings(potential=potential, n_iter=int(count))
            grid = BlockGrid(crop.shape, (int(edge),) * 3)
            chosen, rounds, context = choices(how, grid, table)
            sides = {"rounds": rounds.rounds}, {"context": context.width}
            small = replace(how, n_iter=2)
            for side in ({"rounds": 1}, {"context": 2}):  # load what is compiled
                seconds_of(folder, table, small, int(edge), **side)
            took = [seconds_of(folder, table, how, int(edge), **side) for side in sides]
            index = 0 if chosen.rounds else 1
            good &= took[index] <= (1 + parsed.slack) * min(took)
            expected = [f"{side.seconds:,.0f}" for side in (rounds, context)]
            what = f"rounds of {rounds.rounds}", f"context of {context.width}"
            row = [f"{potential}, n = {count}, blocks of {edge}", what[index]]
            row += [f"{t:.1f} s" for t in took] + [f"{took[1] / took[0]:.2f}", " / ".join(expected)]
            rows.append(row)
            print(*row, file=sys.stderr, flush=True)
    headings = ["flows", "chosen", "rounds", "context", "context / rounds", "expected core seconds"]
    body = [
        f"Labels: {common.described(np.asarray(crop))}.",
        common.table(headings, rows),
        f"The choice is the faster everywhere: {'yes' if good else 'NO'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
