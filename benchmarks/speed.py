"""Speed of the kernels on a crop of real tissue, next to the original's way and a plain stencil.

One run measures, with the compiler warm and the sides in turns:

- flows (coordinate potential, n = 200) and tracking (100 steps): the package's functions, on all
  cores, against the original `topo` package where it can be imported, else against `baseline.py`,
  which does the same work in NumPy. The baseline takes a minute and more on 128^3, so it runs once
  per --baseline-repetitions, in the middle of the package's repetitions. Its cost is that of the
  instances' bounding boxes, whose voxels are counted too: it depends on the crop (--at), and per
  voxel it grows with the crop, so with a smaller --baseline-size the ratio is too low. The other
  potentials, which the original lacks, are compared with its flows, too.
- the labelled diffusion sweep, float32, in voxel updates a second (padding not counted), against
  a plain stencil without labels of the same size on the same threads, see `stencil.py`.

Ends with status 1 when a position differs in a bit or a flow by more than 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import baseline
import common
import numpy as np
import numpy.typing as npt
import stencil
from common import Times

import topo_dask
from topo_dask.kernels.cpu import diffusion, sweep
from topo_dask.kernels.parallel import available_cores, starmap

TITLE = "Speed of the kernels"
N_ITER = 200
N_STEPS = 100
TOLERANCE = 1e-4
WANTED = {"flows": 500, "flows, heat": 1200, "flows, poisson": 300, "tracking": 25}

Labels = npt.NDArray[Any]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--size", type=int, default=128, help="edge of the crop")
    made.add_argument(
        "--at", type=common.position, help="its first voxel; by default in the middle"
    )
    made.add_argument("--baseline-size", type=int, help="edge of the baseline's crop, at most that")
    made.add_argument("--repetitions", type=int, default=9, help="of the package and the stencils")
    made.add_argument("--baseline-repetitions", type=int, default=1)
    made.add_argument("--threads", type=int, default=available_cores(), help="of the sweeps")
    return made


def original() -> tuple[str, Any]:
    """What the package is measured against, and its name."""
    if importlib.util.find_spec("topo") is not None:
        import topo

        return "topo", topo
    return "baseline.py", baseline


# ── flows and tracking ───────────────────────────────────────────────────────────────────────


def row(name: str, times: tuple[Times, Times], voxels: tuple[int, int]) -> list[str]:
    """Times and cost per voxel of the package and of the other side, and the costs' ratio."""
    own, other = (1e6 * t.median / n for t, n in zip(times, voxels, strict=True))
    return [
        name,
        f"{times[0].best:.3f}",
        f"{times[0].median:.3f}",
        f"{own:.3g}",
        f"{times[1].median:.3f}",
        f"{other:.3g}",
        f"{other / own:.0f}",
        f">= {WANTED[name]}",
    ]


def in_turns(
    package: Callable[[], Any], other: Callable[[], Any], parsed: argparse.Namespace
) -> tuple[Times, Times]:
    """The other side's repetitions, each in the middle of some of the package's."""
    times = Times(), Times()
    half = -(-parsed.repetitions // (2 * parsed.baseline_repetitions))
    for _ in range(parsed.baseline_repetitions):
        for side, function, count in ((0, package, half), (1, other, 1), (0, package, half)):
            for _ in range(count):
                times[side].add(function)
    return times


def largest_difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b)).max(initial=0.0))


def same_bits(a: Any, b: Any) -> bool:
    a, b = (np.ascontiguousarray(side, dtype=np.float64) for side in (a, b))
    return np.array_equal(a.view(np.int64), b.view(np.int64))


def duels(labels: Labels, parsed: argparse.Namespace) -> tuple[str, bool]:
    """Flows and tracking against the other side; also whether the answers agree."""
    name, other = original()
    small = labels[common.cube(labels.shape, parsed.baseline_size).slices]
    make, track = topo_dask.generate_diffusion_flows, topo_dask.track_flows
    flows = in_turns(
        partial(make, labels, N_ITER),
        partial(other.generate_diffusion_flows, small, N_ITER),
        parsed,
    )
    field = flows[0].result
    pairs = {"flows": flows}
    for potential in ("heat", "poisson"):
        side = {potential: partial(make, labels, N_ITER, potential=potential)}
        pairs[f"flows, {potential}"] = (
            common.interleaved(side, parsed.repetitions)[potential],
            flows[1],
        )
    small_field = field if small.shape == labels.shape else make(small, N_ITER)
    tracking = in_turns(
        partial(track, labels > 0, field, N_STEPS),
        partial(other.track_flows, small > 0, small_field, N_STEPS),
        parsed,
    )
    pairs["tracking"] = tracking
    worst = largest_difference(small_field, flows[1].result)
    ends = track(small > 0, small_field, N_STEPS)[1]
    identical = same_bits(ends, tracking[1].result[1])
    sizes = labels.size, small.size
    headings = ["", "best s", "median s", "us/voxel", f"{name} s", "us/voxel", "ratio", "wanted"]
    steps = N_STEPS * np.count_nonzero(labels) / tracking[0].median
    text = [
        common.table(headings, [row(name, took, sizes) for name, took in pairs.items()]),
        f"{name} ran on {common.joined(small.shape, 'x')} voxels of it; its instances' boxes hold "
        f"{baseline.box_voxels(small) / small.size:.1f} times as many.",
        f"Flows differ by at most {worst:.1e} in a component; positions are "
        f"{'identical bit for bit' if identical else 'DIFFERENT'}; {steps / 1e6:.0f} M particle "
        f"steps/s on {available_cores()} threads.",
    ]
    return "\n\n".join(text), identical and worst <= TOLERANCE


# ── the sweep ────────────────────────────────────────────────────────────────────────────────


def sweeps(labels: Labels, threads: int, repetitions: int) -> dict[str, Times]:
    """Time ``N_ITER`` iterations, labelled and plain, from the same coordinates."""
    ids = np.unique(labels[labels > 0]).astype(np.uint64)
    most = np.full(ids.size, N_ITER)
    start = np.zeros([n + 2 for n in labels.shape], dtype=np.float32)
    start[1:-1, 1:-1, 1:-1] = np.arange(labels.shape[0], dtype=np.float32)[:, None, None]
    start[1:-1, 1:-1, 1:-1][labels == 0] = 0
    plain = [np.zeros_like(start), np.zeros_like(start)]
    weights = diffusion.weights_of((1.0, 1.0, 1.0))
    with starmap(threads) as run:
        domain = diffusion.domain_of(labels, None, None, ids, most, run, threads)
        along_z = sweep.Start(np.float32, np.zeros(ids.size + 1, dtype=np.int64), axis=0)
        fields = [domain.layout.fields([along_z], run, threads)]

        def reset() -> None:
            plain[0][...], plain[1][...] = start, 0
            fields[0] = domain.layout.fields([along_z], run, threads)
            fields[0][0].memory[: fields[0][0].first] = 0  # it is there, as that of the stencil

        return common.interleaved(
            {
                "labelled": lambda: domain.layout.advance(fields[0], (0, N_ITER), weights, run),
                "plain, simple loops": lambda: stencil.simple(plain, N_ITER, threads),
                "plain, same cache blocking": lambda: stencil.blocked(plain, N_ITER, threads, run),
            },
            repetitions,
            before=reset,
        )


def sweep_table(labels: Labels, parsed: argparse.Namespace) -> str:
    rows = []
    for threads in sorted({1, parsed.threads}):
        times = sweeps(labels, threads, parsed.repetitions)
        updates = labels.size * N_ITER / 1e9
        labelled = times["labelled"]
        for name, took in times.items():
            speeds = [f"{updates / s:.2f}" for s in (took.best, took.median)]
            ratios = [f"{took.best / labelled.best:.2f}", f"{took.median / labelled.median:.2f}"]
            rows.append([name, threads, *speeds, *(["", ""] if took is labelled else ratios)])
    headings = [
        "sweep",
        "threads",
        "best G updates/s",
        "median",
        "labelled is faster by (best)",
        "(median)",
    ]
    return common.table(headings, rows)


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    labels = common.crop(parsed.labels, parsed.size, parsed.at)
    tiny = labels[:32, :8, :8]  # high enough to be cut among threads
    topo_dask.track_flows(tiny > 0, topo_dask.generate_diffusion_flows(tiny), 1)
    sweeps(tiny, parsed.threads, 1)
    measured, agree = duels(labels, parsed)
    body = [
        f"Labels: {common.described(labels)}.",
        measured,
        f"Float32 sweeps of the same size, {parsed.repetitions} repetitions in turns (wanted: the "
        "labelled one at least as fast):",
        sweep_table(labels, parsed),
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
