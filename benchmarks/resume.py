"""Resuming a finished run: `flows` and `segment` of a real store of many tiny blocks, run again.

Blocks have --edge³ voxels, an instance lies in every few of them; the labels are stored in larger
chunks, and tracking reads no halo: so that making so many blocks takes minutes. Each job is run to
the step that publishes its result, then with resume=True to the end: so every stage is looked up
in its ledger and nothing is computed; then with resume=True once more, when the result is there.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np

import topo_dask
from topo_dask.plan.outline import readable_bytes
from topo_dask.storage import Output, create_array

TITLE = "Resuming a finished run"
WANTED_S = 5.0
CHUNK = 32
"""Edge of the chunks of the labels."""


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--blocks", type=int, default=100_000, help="a cube of so many, at least")
    made.add_argument("--edge", type=int, default=4, help="of a block, in voxels")
    made.add_argument("--cluster", default="local", help="as in topo-dask")
    return made


def write(path: Path, side: int, edge: int) -> None:
    """Labels of side³ blocks: balls, one in every 3³ blocks."""
    length = side * edge
    labels = create_array(path, (length,) * 3, (min(length, CHUNK),) * 3, "uint32")
    place = np.arange(length) // (3 * edge)
    apart = (np.arange(length) % (3 * edge) - 1.5 * edge) ** 2
    count = int(place[-1]) + 1
    for z in range(0, length, CHUNK):
        some = slice(z, z + CHUNK)
        inside = apart[some, None, None] + apart[:, None] + apart < (1.2 * edge) ** 2
        ids = 1 + (place[some, None, None] * count + place[:, None]) * count + place
        labels[some] = np.where(inside, ids, 0).astype(np.uint32)


class Halted(Exception):
    """The run has come to its last step."""


def halt(*arguments: Any, **named: Any) -> Any:
    """In the place of publishing."""
    raise Halted


def timed(job: Any, *arguments: Any, **options: Any) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    job(*arguments, **options)
    return time.perf_counter() - began


def measure(name: str, source: Path, folder: Path, options: dict[str, Any]) -> list[float]:
    """Seconds of the run, of the one that only publishes, of the one that does nothing."""
    job, out = getattr(topo_dask, name), folder / "out" / f"{name}.zarr"
    began = time.perf_counter()
    method = "publish_labels" if name == "segment" else "publish"
    with contextlib.suppress(Halted), patch.object(Output, method, halt):
        job(source, out, **options)
    seconds = [time.perf_counter() - began]
    return [*seconds, *(timed(job, source, out, resume=True, **options) for _ in range(2))]


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    side, rows, good = 1, [], True
    while side**3 < parsed.blocks:
        side += 1
    with common.working_folder(parsed.folder) as folder:
        labels = folder / "labels.zarr"
        write(labels, side, parsed.edge)
        shared = {"blocks": parsed.edge, "cluster": parsed.cluster}
        few = {**shared, "n_steps": 2, "foreground": labels, "min_size": 1, "halo": 0}
        for name, source, options in (
            ("flows", labels, {**shared, "n_iter": 4}),
            ("segment", folder / "out" / "flows.zarr", few),
        ):
            seconds = measure(name, source, folder, options)
            good &= side**3 < 10_000 or max(seconds[1:]) <= WANTED_S * max(1, side**3 / 1e5)
            rows.append([name, f"{seconds[0]:.0f}", *(f"{s:.2f}" for s in seconds[1:])])
    headings = ["", "run, s", "resumed when all stages were done, s", "resumed when published, s"]
    memory = readable_bytes(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    body = [
        f"{side}³ = {side**3} blocks of {parsed.edge}³ voxels, cluster {parsed.cluster} (its start "
        f"is part of the time).",
        common.table(headings, rows),
        f"The driver held at most {memory}. Wanted for 10⁵ blocks: resumed within {WANTED_S:g} s.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
