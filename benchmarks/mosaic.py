"""Mosaics: turned and jittered tiles into one array, against scipy on the whole canvas.

Writes tiles of noise as zarr files and a table, runs

    topo-dask fuse TABLE OUT --cluster CLUSTER

as a process of its own, and prints its time and the peak memory of its process tree, for a quarter
of the tiles and for all of them: the memory must not grow. Then compares the mosaic with what
`scipy.ndimage.affine_transform` gives tile by tile for the canvas, values and weights; the canvas
is taken in slabs, and of each slab the part that a tile can reach, all else being 0. Ends with
status 1 if a voxel differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from watch import Watched, watched

from topo_dask import cosine_blend_weight
from topo_dask.storage import create_array, open_array, voxel_geometry

TITLE = {2: "Mosaic of images", 3: "Mosaic of volumes"}
TOLERANCE = 1e-5
STEP = 0.8  # distance of neighbours, in tiles
TURN = 0.1  # most rotation, in rad
JITTER = 0.02  # most shift, in tiles
MIB = 2**20

Transforms = list[npt.NDArray[np.float64]]


def arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--axes", type=int, choices=(2, 3), default=2, help="images or volumes")
    made.add_argument("--tiles", type=int, help="how many [1000 images, 200 volumes]")
    made.add_argument("--edge", type=int, help="of a tile [512 pixels, 128 voxels]")
    made.add_argument("--order", type=int, choices=(0, 1, 3), default=1)
    made.add_argument("--cluster", default="threads", help="as in topo-dask")
    made.add_argument("--slabs", type=int, default=16, help="that the canvas is compared in")
    made.add_argument("--compare", type=int, help="only so many of the slabs, spread evenly")
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    made.add_argument("--record", action="store_true", help="replace this section of the results")
    made.add_argument("--results", type=Path, default=common.RESULTS, help="file of --record")
    made.add_argument("--date", default=datetime.date.today().isoformat())
    return made


def layout(tiles: int, axes: int) -> tuple[int, ...]:
    """Tiles along each axis: as square as it goes, at least as many as asked for."""
    across = round(tiles ** (1 / axes))
    rest = (across,) * (axes - 1)
    return (-(-tiles // int(np.prod(rest))), *rest)


def turned(axes: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A small rotation about every axis."""
    made = np.eye(axes)
    for i in range(axes):
        for j in range(i + 1, axes):
            c, s = np.cos(angle := rng.uniform(-TURN, TURN)), np.sin(angle)
            turn = np.eye(axes)
            turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
            made = made @ turn
    return made


def write_tiles(folder: Path, count: int, edge: int, axes: int) -> Transforms:
    """Tiles of noise, `folder/<number>.zarr`, and where they lie."""
    rng = np.random.default_rng(0)
    transforms = []
    for number, at in enumerate(np.ndindex(layout(count, axes))):
        if number == count:
            break
        tile = create_array(folder / f"{number}.zarr", (edge,) * axes, (edge,) * axes, "float32")
        tile[...] = rng.random((edge,) * axes, dtype=np.float32)
        shift = np.array(at) * edge * STEP + rng.uniform(-JITTER, JITTER, axes) * edge
        transforms.append(np.column_stack([turned(axes, rng), shift]))
    return transforms


def fuse(folder: Path, transforms: Transforms, parsed: argparse.Namespace) -> Watched:
    """Run the installed command on the first of the tiles."""
    rows = [{"path": f"{n}.zarr", "matrix": t.tolist()} for n, t in enumerate(transforms)]
    (folder / "tiles.json").write_text(json.dumps(rows))
    program = shutil.which("topo-dask", path=sysconfig.get_path("scripts")) or "topo-dask"
    words = ["fuse", folder / "tiles.json", folder / "out.zarr", "--order", parsed.order]
    words += ["--cluster", parsed.cluster, "--overwrite", "--no-progress"]
    return watched([program, *map(str, words)], folder / "out.zarr.work")


class Reference:
    """What scipy gives for slabs of the canvas."""

    def __init__(self, folder: Path, transforms: Transforms, order: int) -> None:
        self.folder, self.order = folder, order
        out = open_array(folder / "out.zarr", argument="output", axes=(2, 3))
        self.shape = out.shape
        tile = open_array(folder / "0.zarr", argument="tile", axes=(2, 3))
        self.weight = cosine_blend_weight(tile.shape).astype(np.float64)
        origin = np.array(voxel_geometry(out).translation[3 - out.ndim :])
        self.maps = []
        for transform in transforms:
            matrix = np.linalg.inv(transform[:, :-1])
            ends = np.array(list(np.ndindex((2,) * out.ndim))) * (np.array(tile.shape) - 1)
            corners = ends @ transform[:, :-1].T + transform[:, -1] - origin
            low = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
            high = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 2, out.shape)
            self.maps.append((matrix, matrix @ (origin - transform[:, -1]), low, high))

    def slab(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Rows of the canvas."""
        total = np.zeros((stop - start, *self.shape[1:]))
        weights = np.zeros_like(total)
        for number, (matrix, offset, low, high) in enumerate(self.maps):
            first = np.maximum(low, [start, *[0] * (len(low) - 1)])
            last = np.minimum(high, [stop, *self.shape[1:]])
            if (last <= first).any():
                continue
            tile = open_array(self.folder / f"{number}.zarr", argument="tile", axes=(2, 3))[...]
            there = matrix @ first + offset
            size = tuple(last - first)
            value, weight = (
                ndimage.affine_transform(image, matrix, there, size, order=order)
                for image, order in ((np.float64(tile), self.order), (self.weight, 1))
            )
            here = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
            here = (slice(here[0].start - start, here[0].stop - start), *here[1:])
            total[here] += value * weight
            weights[here] += weight
        return np.divide(total, weights, out=total, where=weights > 0)


def compared(
    folder: Path, transforms: Transforms, parsed: argparse.Namespace
) -> Iterator[tuple[float, int, float]]:
    """Largest difference, voxels and scipy's seconds of each slab that is compared."""
    reference = Reference(folder, transforms, parsed.order)
    out = open_array(folder / "out.zarr", argument="output", axes=(2, 3))
    edges = np.linspace(0, out.shape[0], parsed.slabs + 1).astype(int)
    wanted = parsed.compare or parsed.slabs
    for k in np.unique(np.linspace(0, parsed.slabs - 1, wanted).round().astype(int)):
        began = time.perf_counter()
        slab = reference.slab(edges[k], edges[k + 1])
        seconds = time.perf_counter() - began
        found = np.asarray(out[edges[k] : edges[k + 1]])
        yield float(np.abs(found - slab).max()), slab.size, seconds


def body_of(parsed: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    transforms = write_tiles(folder, parsed.tiles, parsed.edge, parsed.axes)
    rows: list[list[Any]] = []
    fuse(folder, transforms[:2], parsed)  # compiles what is not compiled yet
    for count in (-(-len(transforms) // 4), len(transforms)):
        took = fuse(folder, transforms[:count], parsed)
        shape = open_array(folder / "out.zarr", argument="output", axes=(2, 3)).shape
        rate = np.prod(shape, dtype=float) / took.seconds / 1e6
        sampled = count * parsed.edge**parsed.axes / took.seconds / 1e6
        size = common.joined(shape, "x")
        rows.append(
            [count, size, f"{took.seconds:.1f}", f"{rate:.1f}", f"{sampled:.1f}",
             f"{took.rss / MIB:.0f}"]
        )  # fmt: skip
    slabs = list(compared(folder, transforms, parsed))
    worst = max(d for d, _, _ in slabs)
    voxels, seconds = sum(n for _, n, _ in slabs), sum(s for _, _, s in slabs)
    whole = f"{len(slabs)} of {parsed.slabs} slabs of the canvas"
    headings = ["tiles", "voxels", "seconds", "Mvoxel/s written", "Mvoxel/s of tiles", "RSS MiB"]
    return [
        common.table(headings, rows),
        f"```\n{took.output.rstrip()}\n```",
        f"Against scipy, {whole}: {voxels / 1e6:.1f} M voxels, largest difference {worst:.1e} "
        f"({'OK' if worst <= TOLERANCE else 'TOO MUCH'}); scipy on one thread "
        f"{voxels / seconds / 1e6:.2f} Mvoxel/s.",
    ], worst <= TOLERANCE


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    text = common.command(made, parsed).replace(" LABELS", "")
    parsed.tiles = parsed.tiles or {2: 1000, 3: 200}[parsed.axes]
    parsed.edge = parsed.edge or {2: 512, 3: 128}[parsed.axes]
    with common.working_folder(parsed.folder) as folder:
        body, fine = body_of(parsed, folder)
    lines = [f"`{text}`", f"{parsed.date}. {common.machine()}.", *body]
    text = "\n\n".join(lines)
    print(f"\n{TITLE[parsed.axes]}\n\n{text}")
    if parsed.record:
        common.replace_section(parsed.results, TITLE[parsed.axes], text)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
