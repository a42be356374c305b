"""How good a bound a plan's memory is: projected against measured, on crops of real tissue.

Each job runs on a dask cluster of its own, of one process with one thread. Measured is the most
that this process ever held (the kernel's own high-water mark of its resident set), everything that
it imports included. Wanted: measured <= projected <= 2 x measured. Ends with status 1 otherwise.
Take a crop with an object that fills a block (--at): what a plan must reckon with is there then.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt

import topo_dask
from topo_dask.cluster import RunningCluster, start
from topo_dask.plan.outline import Plan, readable_bytes
from topo_dask.storage import create_array

TITLE = "Plans: projected and measured memory of a worker"
BLOCKS = [(128, 128, 128)]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=256, help="edge of the crop")
    made.add_argument("--at", type=common.position, help="its first voxel [the middle]")
    made.add_argument("--n-iter", type=int, default=200, help="as in topo-dask flows")
    made.add_argument(
        "--shape", type=common.lengths, action="append", help="of blocks (again for more)"
    )
    made.add_argument("--only", action="append", help="cases whose names contain this")
    return made


def worker() -> RunningCluster:
    """A cluster of one process with one thread."""
    return start("local", workers=1, cores=1)


def peak_of(cluster: RunningCluster) -> int:
    """The most that the worker process held so far."""

    def high_water() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError("this system does not say what a process held at most")

    return max(cluster.client.run(high_water).values())


@dataclass(frozen=True)
class Case:
    """A job to plan and to run."""

    name: str
    job: str
    given: tuple[Any, ...]
    options: dict[str, Any]


def make_inputs(parsed: argparse.Namespace, folder: Path, crop: npt.NDArray[Any]) -> None:
    """What the jobs begin with."""
    image = (crop % 255).astype(np.float32) / 255
    arrays = {
        "labels": crop,
        "image": image,
        "classes": np.stack([crop, crop * (crop % 2)]),
        "probable": np.stack([crop > 0, crop % 2]).astype(np.float32),
    }
    for name, content in arrays.items():
        chunks = (1, 64, 64, 64)[-content.ndim :]
        create_array(folder / f"{name}.zarr", content.shape, chunks, content.dtype)[...] = content
    flow = topo_dask.flows(
        folder / "labels.zarr", folder / "flows.zarr", n_iter=parsed.n_iter, cluster="threads"
    ).array[...]
    both = create_array(folder / "both.zarr", (6, *crop.shape), (3, 64, 64, 64), flow.dtype)
    both[:3], both[3:] = flow, flow
    kept = {"foreground": folder / "labels.zarr", "keep_evidence": True, "group": 2}
    topo_dask.segment(folder / "flows.zarr", folder / "kept", cluster="threads", **kept)


def flow_cases(parsed: argparse.Namespace, folder: Path, blocks: Any) -> Iterator[Case]:
    """Jobs that begin with labels."""
    labels, named = folder / "labels.zarr", common.joined(blocks, "x")
    each: dict[str, dict[str, Any]] = {
        "": {"n_iter": parsed.n_iter},
        " heat": {"n_iter": parsed.n_iter, "potential": "heat"},
        " poisson": {"potential": "poisson"},
        " chebyshev": {"n_iter": 2 * parsed.n_iter, "acceleration": "chebyshev"},
        " overlap": {"overlap": 16, "n_iter": 40},
        " rounds": {"rounds": 16, "n_iter": 48},
        " rounds heat": {"rounds": 16, "n_iter": 48, "potential": "heat"},
        " direct": {"method": "direct"},
        " float16": {"n_iter": 40, "dtype": "float16"},
    }
    for name, options in each.items():
        yield Case(f"flows{name} {named}", "flows", (labels,), {"blocks": blocks, **options})
    names = {"class_names": ["mito", "nuc"], "resolution_nm": 16, "diffusion_iters": 60}
    given = (folder / "classes.zarr",)
    yield Case(f"targets {named}", "flow_targets", given, {"blocks": blocks, **names})
    yield Case(f"instances {named}", "instance_table", (labels,), {"blocks": blocks})
    both = (labels, folder / "kept" / "s0")
    yield Case(f"compare {named}", "compare", both, {"blocks": blocks})


def label_cases(folder: Path, blocks: Any) -> Iterator[Case]:
    """Jobs that begin with flows, or with the evidence of a run."""
    flows, named = folder / "flows.zarr", common.joined(blocks, "x")
    steps = {"foreground": folder / "labels.zarr", "blocks": blocks}
    each: dict[str, dict[str, Any]] = {
        " group 1": {"group": 1},
        " group 2": {"group": 2},
        " group 3": {"group": 3},
        ", check, holes": {"flow_error_threshold": 0.8, "fill_holes": True},
        ", evidence": {"keep_evidence": True},
    }
    for name, options in each.items():
        yield Case(f"segment{name} {named}", "segment", (flows,), {**steps, **options})
    for group in (1, 2, 3):
        options = {"group": group, "blocks": blocks}
        yield Case(f"relabel group {group} {named}", "relabel", (folder / "kept",), options)
    given = (folder / "probable.zarr", folder / "both.zarr")
    options = {"class_names": ["mito", "nuc"], "resolution_nm": 16, "blocks": blocks}
    yield Case(f"segment_classes {named}", "segment_classes", given, options)


def tile_cases(folder: Path, blocks: Any) -> Iterator[Case]:
    """Jobs on tiles and mosaics."""
    image, named = folder / "image.zarr", common.joined(blocks, "x")
    options = {"blocks": blocks, "overlap": 16, "dtype": "float32"}
    given = (np.negative, image, (64, 64, 64))
    yield Case(f"map_tiles {named}", "map_tiles", given, options)
    more = {"context": 8, "dtype": "float32", "channels": 3}
    yield Case(f"map_tiles, 3 channels {named}", "map_tiles", (three, *given[1:]), options | more)
    tiles, moved = [image, image], [(0, 0, 0), (0, 90.5, 0)]
    yield Case(f"fuse_mosaic {named}", "fuse_mosaic", (tiles, moved), {"blocks": blocks})
    turned = np.array([[1, 0, 0, 0], [0, 0.98, -0.2, 30], [0, 0.2, 0.98, 9.5]], float)
    given = (tiles, [(0, 0, 0), turned])
    yield Case(f"fuse_mosaic, turned {named}", "fuse_mosaic", given, {"blocks": blocks})


def three(tile: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A model with three channels."""
    return np.stack([tile, tile, tile])


def measure(case: Case, folder: Path) -> tuple[Plan, int]:
    """The plan of a job, and what its worker held at most."""
    run: Callable[..., Any] = getattr(topo_dask, case.job)
    with worker() as cluster:
        plan = topo_dask.plan(case.job, *case.given, cluster=cluster, sample=0, **case.options)
        output = folder / ("out.npz" if case.job == "instance_table" else "out")
        writes = "output" in inspect.signature(run).parameters
        run(*case.given, **({"output": output} if writes else {}), cluster=cluster, **case.options)
        measured = peak_of(cluster)
    if writes:
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    return plan, measured


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    rows, good = [], True
    with common.working_folder(parsed.folder) as folder:
        crop = common.crop(parsed.labels, parsed.size, parsed.at)
        make_inputs(parsed, folder, crop)
        with worker() as cluster:
            cluster.client.submit(topo_dask.run.execute.may_pass, OSError()).result()
            idle = peak_of(cluster)
        for blocks in parsed.shape or BLOCKS:
            for case in (
                *flow_cases(parsed, folder, blocks),
                *label_cases(folder, blocks),
                *tile_cases(folder, blocks),
            ):
                if parsed.only and not any(word in case.name for word in parsed.only):
                    continue
                plan, measured = measure(case, folder)
                ratio = plan.worker_bytes / measured
                good &= 1 <= ratio <= 2
                sizes = [readable_bytes(n) for n in (plan.worker_bytes, measured)]
                rows.append([case.name, plan.largest.name, *sizes, f"{ratio:.2f}"])
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
