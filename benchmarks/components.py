"""Connected components of a mask, next to scikit-image and dask-image, each a process of its own.

The mask is made block by block: sheets and blobs of a sum of waves, some 40 % of the voxels. Then,
from zarr to zarr with dask's threads,

    split_disconnected(da.from_zarr(MASK), 0)        of this package
    dask_image.ndmeasure.label(da.from_zarr(MASK))   of dask-image
    skimage.measure.label(MASK, connectivity=1)      of scikit-image, all in memory

in turns. Ends with status 1 unless all find the same components, and this package is at most as
slow as dask-image. The other two are no dependencies: pip install dask-image scikit-image
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import numpy.typing as npt
from tissue import gib
from watch import Watched, watched

from topo_dask import compare
from topo_dask.grid import BlockGrid, Region
from topo_dask.storage import create_array, open_array

TITLE = "Connected components"
OURS, DASK_IMAGE, SCIKIT_IMAGE = "topo_dask", "dask-image", "scikit-image"
NEEDED = {DASK_IMAGE: "dask_image", SCIKIT_IMAGE: "skimage"}
CHUNK = 128


def mask_of(region: Region) -> npt.NDArray[np.uint8]:
    """The mask of a block: waves of lengths that fit no block, the same however it is cut."""
    z, y, x = np.ogrid[region.slices]
    waves = np.zeros(region.shape, dtype=np.float32)
    for a, b, c in (
        (0.31, 0.12, 0.05),
        (-0.07, 0.29, 0.13),
        (0.11, -0.06, 0.33),
        (0.23, 0.2, -0.19),
    ):
        along = (a * z + b * y + c * x).astype(np.float64)
        waves += np.sin(along + 2 * np.sin(along / 7)).astype(np.float32)
    return (waves > 0.9).astype(np.uint8)


def make(edge: int, path: Path) -> None:
    """Write the mask."""
    array = create_array(path, (edge,) * 3, (min(64, edge),) * 3, np.uint8)
    for region in BlockGrid(array.shape, (min(CHUNK, edge),) * 3):
        array[region.slices] = mask_of(region)


def label(side: str, mask: Path, out: Path) -> None:
    """Label the mask in one of the ways; prints the seconds that it took once all is imported."""
    import dask
    import dask.array as da

    source = open_array(mask, argument="mask", axes=(3,))
    chunks = tuple(min(CHUNK, n) for n in source.shape)
    target = create_array(out, source.shape, chunks, np.int32)
    volume = da.from_array(source, chunks=chunks, name=False)
    if side == SCIKIT_IMAGE:
        from skimage.measure import label as whole

        began = time.perf_counter()
        target[...] = whole(source[...], connectivity=1)
    else:
        if side == OURS:
            from topo_dask import split_disconnected

            split_disconnected(da.ones((2, 2, 4), chunks=2, dtype="uint8"), 0).compute()  # compile
            began = time.perf_counter()
            made = split_disconnected(volume, 0)
        else:
            from dask_image.ndmeasure import label as by_blocks

            began = time.perf_counter()
            made = by_blocks(volume)[0]
        with dask.config.set(scheduler="threads"):
            da.store(made.astype(np.int32), target, lock=False)
    print(time.perf_counter() - began)


def measure(edge: int, repetitions: int, folder: Path) -> tuple[dict[str, list[Watched]], bool]:
    """Label one mask in all ways, in turns; gives what each took, and whether all agree."""
    mask, took = folder / "mask.zarr", {side: [] for side in (OURS, DASK_IMAGE, SCIKIT_IMAGE)}
    make(edge, mask)
    for _ in range(repetitions):
        for side, runs in took.items():
            shutil.rmtree(folder / side, ignore_errors=True)
            words = ["--side", side, "--mask", mask, "--out", folder / side]
            runs.append(watched([sys.executable, __file__, *words], folder))
            runs[-1].seconds = float(runs[-1].output)
    others = (DASK_IMAGE, SCIKIT_IMAGE)
    options = {"ignore_background": False, "cluster": "threads"}
    found = [compare(folder / OURS, folder / side, **options) for side in others]
    same = all(one.same_partition for one in found)
    print(f"{edge}³: {found[0].label_instances} components", file=sys.stderr, flush=True)
    for path in (mask, *(folder / side for side in took)):
        shutil.rmtree(path)
    return took, same


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__, labels=False)
    made.add_argument(
        "--size", type=int, action="append", help="edge of the cube; by default 256 and 512"
    )
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--folder", type=Path, help="where to work; what is made there is removed")
    for name in ("--side", "--mask", "--out"):
        made.add_argument(name, help=argparse.SUPPRESS)
    return made


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = made.parse_args(words)
    missing = [name for name, module in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        made.error(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")
    if parsed.side:
        label(parsed.side, Path(parsed.mask), Path(parsed.out))
        return 0
    rows, good = [], True
    with common.working_folder(parsed.folder) as folder:
        for edge in parsed.size or (256, 512):
            took, same = measure(edge, parsed.repetitions, folder)
            best = {side: min(run.seconds for run in runs) for side, runs in took.items()}
            good &= same and best[OURS] <= best[DASK_IMAGE]
            rows += [
                [
                    f"{edge}³",
                    side,
                    f"{best[side]:.2f}",
                    f"{best[side] / best[OURS]:.2f}",
                    f"{min(run.processor_seconds for run in runs):.1f}",
                    gib(max(run.pss for run in runs)),
                    "the same" if same else "DIFFERENT",
                ]
                for side, runs in took.items()
            ]
    headings = [
        "voxels", "by", "seconds", "of ours", "processor seconds, imports included",
        "peak PSS GiB", "components",
    ]  # fmt: skip
    common.report(made, parsed, TITLE, [common.table(headings, rows)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
