"""How good a bound a plan's memory is: projected against measured, on crops of real tissue.

Each job runs on a dask cluster of its own, of one process with one thread. Measured is the most
that this process ever held (the kernel's own high-water mark of its resident set), everything that
it imports included. Wanted: measured <= projected <= 2 x measured. Ends with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
from distributed import Client, LocalCluster

import topo_dask
from topo_dask.plan.outline import readable_bytes
from topo_dask.storage import create_array

TITLE = "Plans: projected and measured memory of a worker"
BLOCKS = [(64, 64, 64), (128, 128, 128), (96, 200, 130)]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=200, help="edge of the crop, in its middle")
    made.add_argument("--n-iter", type=int, default=200, help="as in topo-dask flows")
    made.add_argument(
        "--shape", type=common.lengths, action="append", help="of blocks (again for more)"
    )
    made.add_argument("--only", help="cases whose names contain this")
    return made


@contextmanager
def worker() -> Iterator[Client]:
    """A client of a cluster of one process."""
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "host": "127.0.0.1"}
    with (
        LocalCluster(dashboard_address="127.0.0.1:0", **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def peak_of(client: Client) -> int:
    """The most that the worker process held so far."""

    def high_water() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError("this system does not say what a process held at most")

    return max(client.run(high_water).values())


def cases(
    parsed: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """Name, job, arguments and options of each."""
    labels, flows, image = (folder / f"{name}.zarr" for name in ("labels", "flows", "image"))
    with worker() as client:
        topo_dask.flows(labels, flows, n_iter=parsed.n_iter, cluster=client)
    steps = {"foreground": labels}
    for shape in parsed.shape or BLOCKS:
        blocks, named = {"blocks": shape}, common.joined(shape, "x")
        yield f"flows {named}", "flows", (labels,), {**blocks, "n_iter": parsed.n_iter}
        yield f"flows overlap {named}", "flows", (labels,), {**blocks, "overlap": 16, "n_iter": 40}
        yield f"flows rounds {named}", "flows", (labels,), {**blocks, "rounds": 16, "n_iter": 48}
        yield f"flows direct {named}", "flows", (labels,), {**blocks, "method": "direct"}
        for group in (1, 2, 3):
            options = {**steps, **blocks, "group": group}
            yield f"segment group {group} {named}", "segment", (flows,), options
        more = {**steps, **blocks, "flow_error_threshold": 0.8, "fill_holes": True}
        yield f"segment, check, holes {named}", "segment", (flows,), more
        options = {**blocks, "overlap": 16, "dtype": "float32"}
        yield f"map_tiles {named}", "map_tiles", (np.negative, image, (64, 64, 64)), options
        tiles = [image, image]
        yield f"fuse_mosaic {named}", "fuse_mosaic", (tiles, [(0, 0, 0), (0, 90.5, 0)]), blocks


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    rows, good = [], True
    with common.working_folder(parsed.folder) as folder:
        crop = common.crop(parsed.labels, parsed.size)
        for name, content in (("labels", crop), ("image", crop % 255 / np.float32(255))):
            kept = content.astype(np.float32 if name == "image" else content.dtype)
            create_array(folder / f"{name}.zarr", crop.shape, (64, 64, 64), kept.dtype)[...] = kept
        with worker() as client:
            client.submit(topo_dask.run.execute.may_pass, OSError()).result()
            idle = peak_of(client)
        for name, job, given, options in cases(parsed, folder):
            if parsed.only and parsed.only not in name:
                continue
            run: Callable[..., Any] = getattr(topo_dask, job)
            with worker() as client:
                plan = topo_dask.plan(job, *given, cluster=client, sample=0, **options)
                run(*given, output=folder / "out", cluster=client, **options)
                measured = peak_of(client)
            shutil.rmtree(folder / "out")
            ratio = plan.worker_bytes / measured
            good &= 1 <= ratio <= 2
            sizes = [readable_bytes(n) for n in (plan.worker_bytes, measured)]
            rows.append([name, plan.largest.name, *sizes, f"{ratio:.2f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    headings = ["job, blocks", "largest stage", "projected", "measured", "ratio (wanted 1 to 2)"]
    body = [
        f"Labels: {common.described(crop)}.",
        common.table(headings, rows),
        f"A worker that has imported everything and run nothing: {readable_bytes(idle)}.",
        f"All bounds hold: {'yes' if good else 'NO'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
