"""Tracking in blocks, with its hand-over, against the bare kernel on the whole volume.

The kernel has positions and flow in memory. The run, `segment` with one block after the other in
this process, reads each block's flow with its halo from a store, finds the foreground, tracks,
hands particles over, writes where they end, and goes on until none is left: all stages `track`.
Both use one thread (zarr decodes on its own) and make the same steps, so particle steps a second
compare them. What reading and decoding takes is shown beside it, for a flow as `flows` stores it
and for an uncompressed one: it is the storage's cost, and the wider the halo and the smaller the
blocks, the more often the same flow is decoded.

Ends with status 1 when the labels depend on how the flow is stored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import zarr
from overhead import Clock

import topo_dask
from topo_dask.kernels import cpu
from topo_dask.run.execute import Engine, open_engine
from topo_dask.storage import create_array

TITLE = "Tracking in blocks"
N_STEPS = 100
WANTED = 0.8

Flow = npt.NDArray[np.float32]


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--size", type=int, default=128, help="edge of the crop, in its middle")
    made.add_argument("--blocks", type=common.lengths, default=(64, 64, 64))
    made.add_argument("--chunks", type=common.lengths, default=(64, 64, 64), help="of the flow")
    made.add_argument("--halo", type=int, help="as in topo-dask segment; by default auto")
    made.add_argument("--n-iter", type=int, default=200, help="of the flow")
    made.add_argument("--repetitions", type=int, default=5)
    return made


def bare(flow: Flow, mask: npt.NDArray[Any], repetitions: int) -> common.Times:
    """The kernel alone: every particle of the volume to its end."""
    times, ready = common.Times(), cpu.interleave(flow)
    for _ in range(repetitions):
        positions = cpu.foreground_voxels(mask)
        left = np.full(len(positions), N_STEPS, dtype=np.int32)
        options = {"origin": (0, 0, 0), "shape": mask.shape, "step_size": 1.0}
        times.add(lambda p=positions, s=left, o=options: cpu.track(ready, p, s, **o))
    return times


def flow_stores(flow: Flow, chunks: Sequence[int], folder: Path) -> dict[str, Path]:
    """The flow as `flows` stores it, and as it is in memory."""
    fitting = [3, *map(min, chunks, flow.shape[1:])]
    create_array(folder / "flow.zarr", flow.shape, fitting, flow.dtype)[...] = flow
    plain = folder / "plain.zarr"
    options: dict[str, Any] = {"compressors": None, "fill_value": 0}
    zarr.create_array(plain, shape=flow.shape, chunks=fitting, dtype="f4", **options)[...] = flow
    return {"stored as by flows": folder / "flow.zarr", "stored uncompressed": plain}


def rounds(
    flow: Path, engine: Engine, parsed: argparse.Namespace, folder: Path
) -> tuple[float, float, str, str]:
    """Seconds of all rounds, of reading in them; how many rounds; digest of the labels."""
    clock = Clock(engine)
    made = topo_dask.segment(
        flow,
        folder / "out.zarr",
        foreground=folder / "labels.zarr",
        blocks=parsed.blocks,
        halo="auto" if parsed.halo is None else parsed.halo,
        n_steps=N_STEPS,
        cluster=clock,
        overwrite=True,
        progress=False,
    )
    stages = [stage for stage in clock.wall if stage.split("-")[0] == "track"]
    read = sum(clock.codec[stage] for stage in stages)
    wall = sum(clock.wall[stage] for stage in stages)
    return wall, read, str(made.details["rounds"]), common.digest(made.array)


def measure(
    labels: npt.NDArray[Any], parsed: argparse.Namespace, folder: Path
) -> tuple[list[list[str]], list[str], bool]:
    """Rows of the table, rounds of each store, and whether the labels are the same."""
    flow = topo_dask.generate_diffusion_flows(labels, parsed.n_iter)
    foreground = folder / "labels.zarr"
    chunks = [min(c, n) for c, n in zip(parsed.chunks, labels.shape, strict=True)]
    create_array(foreground, labels.shape, chunks, labels.dtype)[...] = labels
    steps = N_STEPS * np.count_nonzero(labels) / 1e6
    bare(flow[:, :8, :8, :8], labels[:8, :8, :8], 1)
    alone = bare(flow, labels > 0, parsed.repetitions).median
    table = [["kernel alone, in memory", f"{alone:.3f}", "", f"{steps / alone:.0f}", "1.00", ""]]
    notes, digests = [], set()
    for name, store in flow_stores(flow, parsed.chunks, folder).items():
        with open_engine("sync") as engine:
            runs = [rounds(store, engine, parsed, folder) for _ in range(parsed.repetitions + 1)]
        found = runs[1:]  # the first one warms up
        wall, read = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
        ratios = [f"{alone / wall:.2f}", f"{alone / (wall - read):.2f}"]
        table.append([name, f"{wall:.3f}", f"{read:.3f}", f"{steps / wall:.0f}", *ratios])
        notes.append(f"{name}: rounds: {found[-1][2]}")
        digests |= {mark for *_, mark in found}
    return table, notes, len(digests) == 1


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    labels = common.crop(parsed.labels, parsed.size)
    with common.working_folder(parsed.folder) as folder:
        table, notes, same = measure(labels, parsed, folder)
    headings = ["tracking", "seconds", "of it reading", "M steps/s", "of the kernel's"]
    body = [
        f"Labels: {common.described(labels)}, in blocks of {common.joined(parsed.blocks, 'x')}, "
        "one after the other.",
        common.table([*headings, f"reading not counted (wanted >= {WANTED})"], table),
        "\n".join(f"- {note}" for note in notes),
        f"Labels are {'identical' if same else 'DIFFERENT'}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
