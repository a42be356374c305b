"""The main job on real tissue: labels to flows to labels, by the command line, and its answer.

Runs, each as a process of its own with the default local cluster:

    topo-dask flows LABELS OUT --n-iter 200
    topo-dask segment OUT LABELS_OUT --foreground LABELS
    topo-dask compare LABELS LABELS_OUT/s0

and prints the time of each from its start to its end (the interpreter and the cluster included),
the peak memory of its whole process tree, and the disk used at most (scratch included). With
--check-blocks it also segments that one flow store with other blocks, by threads and by processes,
and ends with status 1 unless all labels are the same to the byte.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from watch import Watched, disk, watched

TITLE = "Real tissue: the main job"
BLOCKS = [(64, 64, 64), (128, 128, 128), (96, 200, 130)]
WANTED = "Wanted for 256x512x512 voxels on 2 cores: at most 180 s and 2.5 GiB."
ENGINES = ("threads", "processes")


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--n-iter", type=int, default=200, help="as in topo-dask flows")
    made.add_argument("--blocks", type=common.lengths, help="as in topo-dask")
    made.add_argument("--cluster", help="as in topo-dask")
    made.add_argument("--check-blocks", action="store_true", help="compare blocks and engines")
    made.add_argument(
        "--check-shape",
        type=common.lengths,
        action="append",
        help="a block shape of --check-blocks (again for more); by default "
        + ", ".join(map(common.joined, BLOCKS)),
    )
    made.add_argument(
        "--check-cluster",
        action="append",
        help="where --check-blocks runs (again for more); by default " + ", ".join(ENGINES),
    )
    return made


def topo_dask(folder: Path, *words: Any) -> Watched:
    """Run the installed command."""
    program = shutil.which("topo-dask", path=sysconfig.get_path("scripts")) or "topo-dask"
    shown = [str(w) for w in words]
    print("topo-dask", *shown, file=sys.stderr, flush=True)
    return watched([program, *shown], folder)


def main_job(parsed: argparse.Namespace, folder: Path) -> dict[str, Watched]:
    """The three commands, in their order."""
    options = ["--blocks", common.joined(parsed.blocks)] if parsed.blocks else []
    options += ["--cluster", parsed.cluster] if parsed.cluster else []
    flows, labels = folder / "flows.zarr", folder / "labels.zarr"
    source = parsed.labels
    return {
        "flows": topo_dask(folder, "flows", source, flows, "--n-iter", parsed.n_iter, *options),
        "segment": topo_dask(folder, "segment", flows, labels, "--foreground", source, *options),
        "compare": topo_dask(folder, "compare", source, labels / "s0", *options),
    }


def checks(parsed: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str, float]]:
    """Segment the flow store again: blocks, engine, digest and seconds of each run."""
    for shape in parsed.check_shape or BLOCKS:
        for engine in parsed.check_cluster or ENGINES:
            out = folder / "again.zarr"
            blocks = common.joined(shape)
            words = ["--foreground", parsed.labels, "--blocks", blocks, "--cluster", engine]
            took = topo_dask(folder, "segment", folder / "flows.zarr", out, *words)
            yield common.joined(shape, "x"), engine, common.digest(out / "s0"), took.seconds
            shutil.rmtree(out)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size else "?"


def summary(job: dict[str, Watched], folder: Path) -> str:
    """A row for each command, and one for the whole job: sum of times, highest peaks."""
    whole = Watched(seconds=sum(took.seconds for took in job.values()))
    for name in ("rss", "pss", "processes", "disk"):
        setattr(whole, name, max(getattr(took, name) for took in job.values()))
    rows = [
        [name, f"{t.seconds:.1f}", gib(t.rss), gib(t.pss), t.processes, gib(t.disk)]
        for name, t in {**job, "whole job": whole}.items()
    ]
    headings = ["", "seconds", "peak RSS GiB", "peak PSS GiB", "processes", "peak disk GiB"]
    kept = ", ".join(
        f"{name} {disk(folder / f'{name}.zarr') / 2**20:.0f} MiB" for name in ("flows", "labels")
    )
    return f"{common.table(headings, rows)}\n\nOn disk at the end: {kept}."


def check_blocks(parsed: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Compare the labels of other blocks and engines with those of the main job."""
    wanted = common.digest(folder / "labels.zarr" / "s0")
    rows, same = [], True
    for blocks, engine, found, seconds in checks(parsed, folder):
        same &= found == wanted
        verdict = "OK" if found == wanted else "DIFFERENT"
        rows.append([blocks, engine, verdict, found[:16], f"{seconds:.1f}"])
    headings = ["blocks", "engine", "labels", "sha256", "seconds"]
    return f"Main job: sha256 {wanted[:16]}.\n\n{common.table(headings, rows)}", same


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    with common.working_folder(parsed.folder) as folder:
        job = main_job(parsed, folder)
        body = [
            f"Labels: {common.described(common.crop(parsed.labels))}.",
            summary(job, folder),
            "RSS: sum over the process tree, shared pages once for each process (an upper bound); "
            f"PSS: shared pages divided among their users. {WANTED}",
            f"```\n{job['compare'].output.rstrip()}\n```",
        ]
        same = True
        if parsed.check_blocks:
            text, same = check_blocks(parsed, folder)
            body.append(text)
    common.report(made, parsed, TITLE, body)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
