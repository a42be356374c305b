"""The kernels on a GPU: first whether their answers are the CPU's, then how fast, and what bounds.

For each kernel one run gives:

- the answer's difference from the CPU's: none in a bit, but 1e-4 for flows;
- seconds on two cores of this machine; of a call on the device, over the bus and back; and on the
  device alone, where the arrays stay (of diffusion: what more iterations take);
- the bytes that device memory must move at least, once each (for an iteration of diffusion: its
  fields read and written once), a second, as a part of what a copy on this device reaches;
- what bounds it: memory or float64 arithmetic, where that alone explains half of the time; else
  what is named for it.

Then the whole job, store to store, on two cores and on the device. Ends with status 1 when an
answer differs.

Without a GPU nothing can be timed. TOPO_DASK_GPU_DEVICE=host runs the same lines on the CPU, one
thread after another, which shows that this script works and that answers agree; its seconds say
nothing about any GPU, and --record is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from common import Times

import topo_dask
from topo_dask.errors import BackendUnavailable
from topo_dask.kernels import cpu, gpu, resample
from topo_dask.kernels.cpu import tiles as cpu_tiles
from topo_dask.kernels.cpu.blend import axis_weight
from topo_dask.kernels.gpu import Device, find_device
from topo_dask.kernels.gpu import resample as gpu_resample
from topo_dask.kernels.gpu import tiles as gpu_tiles
from topo_dask.storage import create_array

TITLE = "GPU"
N_STEPS = 100
TOLERANCE = 1e-4
CORES = 2
HOST = (
    "**No GPU: these CUDA sources ran on the CPU, thread after thread. Nothing here was timed on a "
    "GPU, and no figure below says anything about one.**"
)
WAITS = "loads that wait for each other"

Labels = npt.NDArray[Any]
Call = Callable[[], Any]


# ── the device ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Limits:
    """What the device reaches: bytes and operations a second."""

    copy: float
    up: float
    down: float
    float64: float | None
    facts: str


def finished(device: Device, function: Call) -> Any:
    """The result, when the device has made it."""
    result = function()
    device.get(device.zeros(1, np.uint8))
    return result


def best(device: Device, function: Call, repetitions: int) -> float:
    times = Times()
    finished(device, function)
    for _ in range(repetitions):
        times.add(partial(finished, device, function))
    return times.best


def attributes(device: Device) -> tuple[str, float | None]:
    """What the device says of itself, and its float64 operations a second."""
    if device.xp is np:
        return device.name, None
    card = device.xp.cuda.Device()
    known = card.attributes
    # Newer drivers may keep clocks to themselves: 0 then.
    clock, units = 1e3 * known.get("ClockRate", 0), known["MultiProcessorCount"]
    wire = 2 * 1e3 * known.get("MemoryClockRate", 0) * known.get("GlobalMemoryBusWidth", 0) / 8
    capability = card.compute_capability
    lanes = {"80": 32, "90": 64, "100": 64}.get(capability, 2)
    free, total = card.mem_info
    return (
        f"{device.name}, compute capability {capability}, {units} multiprocessors at "
        f"{clock / 1e9:.2f} GHz, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), by its "
        f"attributes {wire / 1e12:.2f} TB/s and {units * lanes * clock / 1e12:.1f} T float64 "
        f"operations/s; CuPy {device.xp.__version__}, driver "
        f"{device.xp.cuda.runtime.driverGetVersion()}"
    ), units * lanes * clock or None


def limits_of(device: Device, repetitions: int) -> Limits:
    """Measured: a copy on the device, and the bus both ways."""
    size = 2**22 if device.xp is np else min(2**30, device.free_memory_bytes() // 8)
    one, other = device.zeros(size, np.uint8), device.zeros(size, np.uint8)
    here = np.zeros(min(size, 2**28), np.uint8)
    there = device.put(here)

    def copy() -> None:
        other[...] = one

    facts, float64 = attributes(device)
    return Limits(
        copy=2 * size / best(device, copy, repetitions),
        up=here.size / best(device, lambda: device.put(here), repetitions),
        down=here.size / best(device, lambda: device.get(there), repetitions),
        float64=float64,
        facts=facts,
    )


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """Meanwhile this thread, and those it starts, have two cores."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


# ── the kernels ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Kernel:
    """One kernel, and what it must move and compute.

    ``alone`` works on arrays that are on the device. ``fewer`` is ``call`` with only ``few`` of
    ``of`` iterations: the device's own time is then that of the others.
    """

    name: str
    processor: Call
    call: Call
    items: float
    item: str
    moved: float  # bytes of the device's memory, an item
    operations: float  # of float64, an item, about
    alone: Call | None = None
    fewer: Call | None = None
    few: tuple[int, int] = (0, 1)
    tolerance: float = 0.0
    else_bound: str = "launches and what is between them"
    really: float | None = None  # bytes that this kernel moves, where these are more


def flows(labels: Labels, n_iter: int) -> Iterator[Kernel]:
    """Flows of all instances at once, each with all iterations."""
    facts = cpu.instance_facts(labels, threads=CORES)
    some = max(1, n_iter // 10)
    place: dict[str, Any] = {"ids": facts.ids, "anchors": facts.lo}
    # Of the fields an iteration reads and writes each once, and what is linked to what. The kernel
    # moves 16 bytes more for coordinates: the indicator in float64, exact far from the origin.
    for potential, fields, beside in (("coordinate", 3 * 4, 8), ("heat", 8, 0)):

        def make(kernels: Any, n: int, potential: str = potential, threads: int = CORES) -> Any:
            iterations = np.full(len(facts.ids), n)
            options = {"potential": potential, "threads": threads}
            return kernels.diffusion_flow(labels, iterations=iterations, **place, **options)

        yield Kernel(
            name=f"diffusion, {potential}, n = {n_iter}",
            processor=partial(make, cpu, n_iter),
            call=partial(make, gpu, n_iter),
            fewer=partial(make, gpu, some),
            few=(some, n_iter),
            items=labels.size * n_iter,
            item="voxel iterations",
            moved=2 * fields + 1,
            really=2 * (fields + beside) + 1,
            operations=24.0 if potential == "coordinate" else 8.0,
            tolerance=TOLERANCE,
        )
    centres: dict[str, Any] = {"ids": facts.ids, "centres": facts.centres}
    yield Kernel(
        name="direct flow",
        processor=partial(cpu.direct_flow, labels, **centres),
        call=partial(gpu.direct_flow, labels, **centres),
        items=labels.size,
        item="voxels",
        moved=labels.itemsize + 12,
        operations=20,
        tolerance=TOLERANCE,
        else_bound="the bus",
    )
    yield Kernel(
        name="poisson flow",
        processor=partial(cpu.poisson_flow, labels, threads=CORES),
        call=partial(gpu.poisson_flow, labels),
        items=labels.size,
        item="voxels",
        moved=labels.itemsize + 12,  # and some 250 an iteration, of which there are 30 to 60
        operations=3000,
        tolerance=TOLERANCE,
        else_bound="iterations over more vectors than these",
    )


def tracking(device: Device, labels: Labels, flow: npt.NDArray[np.float32]) -> Iterator[Kernel]:
    """From flow to cells."""
    mask = labels > 0
    field, ready = cpu.interleave(flow, threads=CORES), gpu.interleave(flow)
    there = device.put(flow)
    yield Kernel(
        name="interleave",
        processor=partial(cpu.interleave, flow, threads=CORES),
        call=lambda: device.get(gpu.interleave(flow)),
        alone=partial(gpu.interleave, there),
        items=labels.size,
        item="voxels",
        moved=28,
        operations=0,
    )
    starts = cpu.foreground_voxels(mask, threads=CORES)
    on_device = device.put(starts)
    steps = np.full(len(starts), N_STEPS, np.int32)
    for interpolation, operations in (("nearest", 9), ("linear", 75)):
        options: dict[str, Any] = {"origin": (0, 0, 0), "shape": mask.shape, "step_size": 1.0}
        options["interpolation"] = interpolation

        def on_processor(options: Any = options) -> Any:
            ends, left = starts.copy(), steps.copy()
            cpu.track(field, ends, left, **options, threads=CORES)
            return ends

        def call(options: Any = options) -> Any:
            made = gpu.interleave(flow)
            return gpu.track_voxels(made, mask, start=(0, 0, 0), n_steps=N_STEPS, **options)[0]

        def alone(options: Any = options) -> Any:
            ends, left = on_device.copy(), device.zeros(len(starts), np.int32)
            left[...] = N_STEPS
            gpu.track(ready, ends, left, **options)
            return ends

        yield Kernel(
            name=f"tracking, {interpolation}, {N_STEPS} steps",
            processor=on_processor,
            call=call,
            alone=alone,
            items=float(len(starts)) * N_STEPS,
            item="particle steps",
            moved=(16 * labels.size / max(1, len(starts)) + 56) / N_STEPS,
            operations=operations,
            else_bound=f"{WAITS}, out of the caches",
        )
    ends = on_processor()
    ends_there, place = device.put(ends), {"shape": mask.shape, "radius": 4.0}

    def columns(kernels: Any, positions: Any) -> Any:
        table, index = kernels.cell_table(positions, **place)
        return table.cells, table.counts, table.offsets, index

    yield Kernel(
        name="cells",
        processor=partial(columns, cpu, ends),
        call=partial(columns, gpu, ends),
        alone=partial(columns, gpu, ends_there),
        items=len(ends),
        item="particles",
        moved=24 + 8,
        operations=12,
        else_bound="the sort of the cells' numbers",
    )


def blending(device: Device, edge: int) -> Iterator[Kernel]:
    """A tile of three channels into a block."""
    rng = np.random.default_rng(0)
    tile = rng.random((3, edge, edge, edge), np.float32)
    tapers = ((edge // 4, edge // 4),) * 3
    along = tuple(axis_weight(edge, taper) for taper in tapers)
    before = tuple(1 - vector for vector in along)
    there = device.put(tile)
    shapes = tile.shape, tile.shape[1:]
    blocks = [np.zeros(shape) for shape in shapes], [device.zeros(s, "f8") for s in shapes]
    yield Kernel(
        name="blend weights",
        processor=partial(cpu.blend_weight, tile.shape[1:], tapers=tapers),
        call=partial(gpu.blend_weight, tile.shape[1:], tapers=tapers),
        items=edge**3,
        item="voxels",
        moved=4,
        operations=1,
        else_bound="the bus",
    )

    def add(kernels: Any, next_one: bool, values: Any, fresh: bool, block: Any = None) -> Any:
        mean, weights = block or [np.zeros(shape) for shape in shapes]
        if next_one:
            kernels.add_next_tile(mean, values, along, before)
        else:
            kernels.add_tile(mean, weights, values, along)
        return mean if fresh else None

    for name, next_one, moved in (("add_tile", False, 76), ("add_next_tile", True, 60)):
        yield Kernel(
            name=f"blending, {name}, 3 channels",
            processor=partial(add, cpu_tiles, next_one, tile, True),
            call=partial(add, gpu_tiles, next_one, tile, True),
            alone=partial(add, gpu_tiles, next_one, there, False, blocks[1]),
            items=edge**3,
            item="voxels",
            moved=moved,
            operations=14,
        )


def resampling(device: Device, edge: int) -> Iterator[Kernel]:
    """A turned tile into a block."""
    tile = np.random.default_rng(1).random((1, edge, edge, edge)).astype(np.float32)
    lengths = tile.shape[1:]
    inverse = np.eye(4)
    inverse[1:3, 1:3] = [[0.96, -0.28], [0.28, 0.96]]
    inverse[2, 3] = -0.2 * edge
    maps = np.stack([inverse, np.linalg.inv(inverse)])
    tables = np.stack([axis_weight(edge, (edge // 2, edge // 2))] * 3)
    place = np.array([(0, 0, 0), (0, 0, 0), lengths, (0, 0, 0), lengths])
    everything: Any = {"start": (0, 0, 0), "part": ((0, 0, 0), lengths), "lengths": lengths}
    block = device.zeros(tile.shape, "f8"), device.zeros(lengths, "f8")
    for order, moved, operations in ((1, 36, 60), (3, 40, 300)):
        modes = np.array([order, 0, 0])

        def made(kernels: Any, modes: Any = modes, order: int = order) -> Any:
            values = kernels.spline_coefficients(tile, **everything) if order == 3 else tile
            total, mass = np.zeros(tile.shape), np.zeros(lengths)
            kernels.accumulate(total, mass, values, maps, place, tables, modes)
            return total

        values = gpu_resample.spline_coefficients(tile, **everything) if order == 3 else tile
        there = device.put(values)

        def alone(values: Any = there, modes: Any = modes) -> None:
            gpu_resample.accumulate(*block, values, maps, place, tables, modes)

        yield Kernel(
            name=f"resampling, order {order}",
            processor=partial(made, resample),
            call=partial(made, gpu_resample),
            alone=alone,
            items=edge**3,
            item="voxels",
            moved=moved,
            operations=operations,
        )


# ── checks and times ─────────────────────────────────────────────────────────────────────────


def difference(one: Any, other: Any) -> float:
    """Largest difference of answers; 0 where no bit differs, infinity for other shapes."""
    if isinstance(one, tuple):
        return max(difference(a, b) for a, b in zip(one, other, strict=True))
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if one.tobytes() == other.tobytes():
        return 0.0
    away = np.abs(one.astype(np.float64) - other)
    # Not a number, or a zero of the other sign.
    return max(float(away.max()), np.finfo(np.float64).tiny) if np.isfinite(away).all() else np.inf


def measured(device: Device, kernel: Kernel, repetitions: int) -> tuple[list[float | None], float]:
    """Seconds on two cores, of a call, on the device alone; and the answers' difference."""
    with two_cores():
        kernel.processor()
        times = Times()
        times.add(kernel.processor)
    differs = difference(times.result, kernel.call())
    called = best(device, kernel.call, repetitions)
    alone = None
    if kernel.alone is not None:
        alone = best(device, kernel.alone, repetitions)
    elif kernel.fewer is not None:
        some, all_of_them = kernel.few
        rest = called - best(device, kernel.fewer, repetitions)
        if rest > 0.1 * called:  # else there is too little to tell
            alone = rest * all_of_them / (all_of_them - some)
    return [times.best, called, alone], differs


def bound(kernel: Kernel, seconds: float, limits: Limits) -> tuple[float, float | None, str]:
    """Parts of the time that memory and arithmetic explain, and what bounds the kernel."""
    memory = kernel.items * kernel.moved / limits.copy / seconds
    arithmetic = None
    if limits.float64 is not None:
        arithmetic = kernel.items * kernel.operations / limits.float64 / seconds
    moved = kernel.really or kernel.moved
    all_memory = memory * moved / kernel.moved
    if max(all_memory, arithmetic or 0) < 0.5:
        by = kernel.else_bound
    elif all_memory >= (arithmetic or 0):
        by = f"memory, {all_memory:.0%} of a copy with the {moved:.3g} bytes that it moves"
    else:
        by = "float64 arithmetic"
    return memory, arithmetic, by


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def kernel_tables(
    device: Device, kernels: Iterator[Kernel], limits: Limits, repetitions: int
) -> tuple[list[str], bool]:
    """Checks, times and bounds of all kernels; and whether all answers agree."""
    rows, bounds, agree = [], [], True
    for kernel in kernels:
        (processor, call, alone), differs = measured(device, kernel, repetitions)
        assert processor is not None
        assert call is not None
        fine = differs <= kernel.tolerance
        agree &= fine
        verdict = "identical" if differs == 0 else f"{differs:.1e}"
        seconds = alone or call
        rows.append(
            [
                kernel.name,
                verdict if fine else f"{verdict} DIFFERENT",
                *map(shown, (processor, call, alone)),
                f"{processor / call:.1f}",
                f"{processor / seconds:.1f}",
            ]
        )
        memory, arithmetic, by = bound(kernel, seconds, limits)
        bounds.append(
            [
                kernel.name,
                f"{kernel.items / seconds / 1e9:.3g} G {kernel.item}/s",
                f"{kernel.moved:.3g}",
                f"{kernel.operations:.0f}",
                f"{kernel.items * kernel.moved / seconds / 1e9:.0f}",
                f"{memory:.0%}",
                "" if arithmetic is None else f"{arithmetic:.0%}",
                by,
            ]
        )
    headings = ["kernel", "answer", f"{CORES} cores s", "call s", "device s", "ratio, call"]
    measures = ["kernel", "speed", "bytes an item", "float64 ops", "GB/s", "of a copy"]
    return [
        common.table([*headings, "ratio, device"], rows),
        common.table([*measures, "of arithmetic", "bound by"], bounds),
    ], agree


# ── end to end ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """What the whole job took, and what it made."""

    seconds: tuple[float, float]
    flow: Any
    labels: Any


def run_both(store: Path, flow: Any, parsed: Any, side: str) -> Job:
    """Labels to flows to labels again, or from another flow; all in stores."""
    flows_took, labels_took = Times(), Times()
    options: dict[str, Any] = {"backend": side, "cluster": parsed.cluster, "progress": False}
    options |= {"overwrite": True, "blocks": parsed.blocks}
    made = store.with_name(f"flows-{side}.zarr")
    flows_took.add(lambda: topo_dask.flows(store, made, n_iter=parsed.n_iter, **options))
    source = flows_took.result.array if flow is None else flow
    found = store.with_name(f"labels-{side}.zarr")
    labels_took.add(lambda: topo_dask.segment(source, found, foreground=store, **options))
    seconds = flows_took.best, labels_took.best
    return Job(seconds, flows_took.result.array, labels_took.result.array)


def stored(path: Path, labels: Labels) -> Path:
    chunks = tuple(min(64, n) for n in labels.shape)
    create_array(path, labels.shape, chunks, labels.dtype)[...] = labels
    return path


def end_to_end(labels: Labels, parsed: Any) -> tuple[str, bool]:
    """The whole job on two cores and on the device; and whether the answers agree."""
    with common.working_folder(parsed.folder) as folder:
        store = stored(folder / "truth.zarr", labels)
        tiny = stored(folder / "tiny.zarr", labels[:16, :16, :16])
        for side in ("cpu", "gpu"):
            run_both(tiny, None, parsed, side)
        with two_cores():
            one = run_both(store, None, parsed, "cpu")
        # The same flow for both, so that labels are identical; flows are compared themselves.
        other = run_both(store, one.flow, parsed, "gpu")
        worst = max(
            float(np.abs(one.flow[:, z : z + 32] - other.flow[:, z : z + 32]).max())
            for z in range(0, labels.shape[0], 32)
        )
        same = common.digest(one.labels) == common.digest(other.labels)
    stages = ("flows", "segment", "store to labels")
    totals = [[*side.seconds, sum(side.seconds)] for side in (one, other)]
    rows = [
        [name, shown(a), shown(b), f"{a / b:.1f}"]
        for name, a, b in zip(stages, *totals, strict=True)
    ]
    text = common.table(["job", f"{CORES} cores s", "device s", "ratio"], rows)
    verdict = "identical" if same else "DIFFERENT"
    text += f"\n\nLabels of the same flows are {verdict}; flows differ by at most {worst:.1e}."
    return text, same and worst <= TOLERANCE


# ── the script ───────────────────────────────────────────────────────────────────────────────


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--size", type=int, default=256, help="edge of the crop")
    made.add_argument("--tile", type=int, default=128, help="edge of the tiles")
    made.add_argument("--n-iter", type=int, default=200, help="iterations of diffusion")
    made.add_argument("--repetitions", type=int, default=5, help="on the device, after a first one")
    made.add_argument("--blocks", type=int, help="edge of the blocks, store to store")
    made.add_argument("--cluster", default="threads", help="store to store")
    made.add_argument("--folder", type=Path, help="where the stores are made")
    return made


def all_kernels(device: Device, labels: Labels, parsed: Any) -> Iterator[Kernel]:
    yield from flows(labels, parsed.n_iter)
    flow = topo_dask.generate_diffusion_flows(labels, parsed.n_iter, backend="cpu")
    yield from tracking(device, labels, flow)
    yield from blending(device, parsed.tile)
    yield from resampling(device, parsed.tile)


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    try:
        device = find_device()
    except BackendUnavailable as error:
        print(f"Nothing was timed: {error}", file=sys.stderr)
        return 1
    host = device.xp is np
    if host and parsed.record:
        made.error("--record needs a GPU: what runs on the CPU is no timing of one")
    if host:
        print(HOST)
    labels = common.crop(parsed.labels, parsed.size)
    limits = limits_of(device, parsed.repetitions)
    tables, agree = kernel_tables(
        device, all_kernels(device, labels, parsed), limits, parsed.repetitions
    )
    whole, same = end_to_end(labels, parsed)
    body = [
        *([HOST] if host else []),
        f"{limits.facts}.",
        f"Measured: a copy on it {limits.copy / 1e9:.0f} GB/s (read and written); over the bus "
        f"{limits.up / 1e9:.1f} GB/s there, {limits.down / 1e9:.1f} GB/s back.",
        f"Labels: {common.described(labels)}. Tiles: {parsed.tile}³.",
        *tables,
        "Wanted of an NVIDIA H200: diffusion of 256³ voxels, n = 200, at 60 % of a copy or more; "
        "20 G particle steps/s or more; from store to labels 30 times two of its cores or more.",
        "Store to store:",
        whole,
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if agree and same else 1


if __name__ == "__main__":
    sys.exit(main())
