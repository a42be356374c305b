"""Cost of map_tiles beyond the model and the reading and writing: plan, tiles alive, time a tile.

The image is generated (a pattern of 8 bits) and the model returns what it gets, so that all time
is our own or the storage's. The storage's share is measured by copying the same image by the same
blocks on the same engine, with nothing in between.

Then runs

    topo-dask map-tiles numpy:positive IMAGE OUT --cluster CLUSTER

as a process of its own on images of a quarter, half and all of the side, and prints the peak memory
of its process tree: it must not grow.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import PLACES, machine, replace_section, table, working_folder
from watch import watched

import topo_dask
from topo_dask.graph.tiles import TilePlan, tile_blocks, tile_chunks, tile_grid
from topo_dask.grid import BlockGrid, Region
from topo_dask.run.execute import WINDOW, Engine, open_engine
from topo_dask.storage import create_array, open_array

MIB = 2**20
TITLE = "Tiles: what map_tiles costs beyond model and storage"


@dataclass(frozen=True)
class Copy:
    """One block to copy, or to generate."""

    source: Any
    out: Any
    region: Region


def copy(task: Copy) -> None:
    task.out[task.region.slices] = task.source[task.region.slices]


def generate(task: Copy) -> None:
    (y, x), (h, w) = task.region.start, task.region.shape
    rows, columns = np.arange(y, y + h)[:, None], np.arange(x, x + w)
    task.out[task.region.slices] = ((rows // 7) ^ (columns // 5)).astype(np.uint8)


def identity(part: np.ndarray) -> np.ndarray:
    return part


def processor_seconds() -> float:
    """Of this process and its workers, so far."""
    own = psutil.Process()
    times = [p.cpu_times() for p in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def timed(function: Any) -> tuple[float, float, Any]:
    """Seconds by the clock and of all processors, and the result."""
    began, used = time.perf_counter(), processor_seconds()
    result = function()
    return time.perf_counter() - began, processor_seconds() - used, result


def run_all(engine: Engine, function: Any, tasks: list[Copy]) -> None:
    for _ in engine.run("copy", function, tasks):
        pass


def plan_of(side: int, tile: int, overlap: int, ahead: int) -> tuple[TilePlan, float, int]:
    """A plan, the seconds it took, the most tiles alive."""
    began = time.perf_counter()
    tiles = tile_grid((side, side), tile, overlap)
    plan = TilePlan(
        tiles, BlockGrid(tiles.shape, tile_blocks(tiles, tile_chunks(tiles), ahead=ahead))
    )
    alive = plan.alive(ahead=ahead)
    assert len(plan.after) == len(plan.order)
    return plan, time.perf_counter() - began, alive


def measure(folder: Path, options: argparse.Namespace) -> list[list[Any]]:
    side, rows = options.side, []
    with open_engine(options.cluster) as engine:
        plan, took, alive = plan_of(side, options.tile, options.overlap, WINDOW * engine.slots)
        image = create_array(folder / "image.zarr", (side, side), (1024, 1024), "uint8")
        blocks = BlockGrid((side, side), (4096, 4096))
        run_all(engine, generate, [Copy(None, image, region) for region in blocks])
        count = len(plan.tiles)
        for repetition in range(options.repetitions):
            out = create_array(
                folder / f"copy{repetition}.zarr", image.shape, tile_chunks(plan.tiles), "uint8"
            )
            copies = [Copy(image, out, region) for region in plan.blocks]
            alone, alone_used, _ = timed(lambda c=copies: run_all(engine, copy, c))
            target = folder / f"out{repetition}.zarr"
            whole, whole_used, result = timed(
                lambda target=target: topo_dask.map_tiles(
                    identity,
                    folder / "image.zarr",
                    (options.tile, options.tile),
                    options.overlap,
                    target,
                    cluster=engine,
                    dtype="uint8",
                    progress=False,
                )
            )
            measured = result.details["alive, measured"]
            rows.append(
                [
                    f"{side:,}²",
                    f"{count:,}",
                    f"{took:.2f} s",
                    f"{alive / count:.2%}",
                    f"{measured / count:.2%}",
                    f"{alone:.1f} s",
                    f"{whole:.1f} s",
                    f"{(whole - alone) / count * 1e3:.3f} ms",
                    f"{(whole_used - alone_used) / count * 1e3:.3f} ms",
                ]
            )
        same = open_array(folder / "out0.zarr", argument="out", axes=(2,))
        for region in (Region((0, 0), (999, 999)), Region((side - 999, 17), (side, 1016))):
            assert np.array_equal(same[region.slices], image[region.slices])
    return rows


def memory(folder: Path, options: argparse.Namespace) -> list[list[Any]]:
    """Peak memory of the command as the image grows."""
    program = shutil.which("topo-dask", path=sysconfig.get_path("scripts")) or "topo-dask"
    given = ["--tile", f"{options.tile},{options.tile}", "--overlap", options.overlap]
    given += ["--cluster", options.cluster, "--dtype", "uint8", "--no-progress", "--overwrite"]
    rows, out = [], folder / "out.zarr"
    for side in (options.side // 4, options.side // 2, options.side):
        path = folder / f"image of {side}.zarr"
        image = create_array(path, (side, side), (1024, 1024), "uint8")
        with open_engine(options.cluster) as engine:
            blocks = BlockGrid((side, side), (4096, 4096))
            run_all(engine, generate, [Copy(None, image, region) for region in blocks])
        words = [program, "map-tiles", "numpy:positive", path, out, *given]
        took = watched(list(map(str, words)), out.with_name("out.zarr.work"))
        count = len(tile_grid((side, side), options.tile, options.overlap))
        sizes = [f"{n / MIB:.0f}" for n in (took.rss, took.pss)]
        rows.append([f"{side:,}²", f"{count:,}", f"{took.seconds:.1f}", *sizes, took.processes])
        shutil.rmtree(path)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--side", type=int, default=40_000, help="of the square image")
    made.add_argument("--tile", type=int, default=256)
    made.add_argument("--overlap", type=int, default=64)
    made.add_argument("--cluster", default="processes")
    made.add_argument("--repetitions", type=int, default=1)
    made.add_argument("--folder", type=Path, help="where the stores are made")
    made.add_argument("--record", action="store_true", help="replace this section of the results")
    made.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    made.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    options = made.parse_args(arguments)
    with working_folder(options.folder) as folder:
        rows = measure(folder, options)
    with working_folder(options.folder) as folder:
        peaks = memory(folder, options)
    headings = [
        "image", "tiles", "plan", "alive, planned", "alive, measured", "copy", "map_tiles",
        "more, a tile", "more processor time, a tile",
    ]  # fmt: skip
    _, took, alive = plan_of(100_000, options.tile, options.overlap, 2 * WINDOW)
    count = len(tile_grid((100_000, 100_000), options.tile, options.overlap))
    words = [
        f"--{name} {value}"
        for name, value in vars(options).items()
        if name not in PLACES and value != made.get_default(name)
    ]
    command = " ".join(["python benchmarks/tiles.py", *words])
    text = "\n\n".join(
        [
            f"`{command}`",
            f"{options.date}. {machine()}.",
            table(headings, rows),
            f"100,000² pixels, {count:,} tiles: planned in {took:.2f} s, at most "
            f"{alive / count:.2%} alive.",
            "The command as a process of its own, and the peak memory of its process tree:",
            table(["image", "tiles", "seconds", "RSS MiB", "PSS MiB", "processes"], peaks),
        ]
    )
    print(f"\n{TITLE}\n\n{text}")
    if options.record:
        replace_section(options.results, TITLE, text)


if __name__ == "__main__":
    main()
