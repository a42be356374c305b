"""The demo: make a volume, run the whole chain on it, leave labels and a page with pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topo_dask.errors import OutputExists, OutputNotWritable
from topo_dask.graph.measure import Comparison
from topo_dask.grid import BlockGrid, as_lengths
from topo_dask.run.compare import compare
from topo_dask.run.execute import open_engine
from topo_dask.run.flows import flows
from topo_dask.run.job import RunResult
from topo_dask.run.progress import progress_display
from topo_dask.run.segment import segment
from topo_dask.storage import Geometry, Output, output_chunks
from topo_dask.testing import TissueSpec, synthetic_tissue_block
from topo_dask.view import slice_panels, slices_png, write_report

VOXEL_NM = (16.0, 8.0, 8.0)
"""Size that the demo gives its voxels, so that the metadata has something to carry."""


@dataclass(frozen=True)
class Demo:
    """What the demo left behind."""

    truth: Path
    flows: RunResult
    labels: RunResult
    comparison: Comparison
    page: Path


def tissue_of(shape: tuple[int, ...], seed: int) -> TissueSpec:
    """What the demo's volume is made of; refuses what is no shape."""
    z, y, x = as_lengths(shape, argument="shape", axes=3, least=1)
    return TissueSpec((z, y, x), max(20, z * y * x // 12_000), seed)


def make_truth(path: Path, spec: TissueSpec) -> Any:
    """Write a synthetic tissue as OME-Zarr labels, block by block; gives the zarr array."""
    grid = BlockGrid(spec.shape, (64, 64, 64))
    output = Output(path, overwrite=True)
    array = output.create(spec.shape, output_chunks(grid.largest, spec.shape), "uint32")
    for region in grid:
        array[region.slices] = synthetic_tissue_block(spec, region.start, region.stop)
    return output.publish_labels(geometry=Geometry(VOXEL_NM, (0.0, 0.0, 0.0), "nanometer"))


def _prepare(folder: Path, overwrite: bool) -> None:
    mark = folder / ".topo-dask-demo"
    try:
        there = os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
        if there and not (overwrite and mark.exists()):
            raise OutputExists(
                "folder",
                f"{folder}, which is there and not empty",
                "a new folder, or that of an earlier demo with --overwrite",
                "Choose another folder.",
            )
        if there:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OutputExists:
        raise
    except OSError as error:
        raise OutputNotWritable(
            "folder",
            f"{folder}, which cannot be written ({error.strerror or error})",
            "a folder that can be made and written",
            "Choose another folder, or change the permissions.",
        ) from error


def run_demo(
    folder: str | Path,
    *,
    shape: tuple[int, ...] = (128, 192, 192),
    blocks: Any = 64,
    seed: int = 1,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> Demo:
    """Labels, flows, labels again; compared, pictured.

    Parameters
    ----------
    folder
        Where everything goes: truth.zarr, flows.zarr, labels.zarr, index.html, slices.png.
    shape
        Shape of the volume.
    blocks
        Shape of a block; small, so that there are many and the seams would show.
    seed
        Of the synthetic tissue.
    overwrite
        Replace the folder of an earlier demo.
    cluster, progress
        See `topo_dask.run.execute.open_engine`.
    say
        Where its lines go.

    Returns
    -------
    Demo
    """
    place = Path(folder).expanduser().absolute()
    spec = tissue_of(shape, seed)
    as_lengths(blocks, argument="blocks", axes=3, least=1)
    with open_engine(cluster, display=progress_display(progress)) as engine:
        _prepare(place, overwrite)  # when nothing else can be wrong: it removes an earlier demo
        say(f"Making a synthetic tissue of {'x'.join(map(str, spec.shape))} voxels ...")
        truth = make_truth(place / "truth.zarr", spec)
        options: dict[str, Any] = {"blocks": blocks, "cluster": engine, "progress": progress}
        flow = flows(truth, place / "flows.zarr", **options)
        labels = segment(flow.array, place / "labels.zarr", foreground=truth, **options)
        comparison = compare(truth, labels.array, cluster=engine)
    say(f"\n{flow}\n\n{labels}\n\n{comparison}\n")
    panels = slice_panels(labels.array, truth=truth, flow=flow.array, spacing=VOXEL_NM)
    page = write_report(
        place,
        title="topo_dask demo",
        panels=panels,
        facts={
            "volume": f"{'x'.join(map(str, spec.shape))} voxels, synthetic",
            "blocks": flow.details["blocks"],
            "flows": f"{flow.seconds:.1f} s, {flow.details['speed']}",
            "segmentation": f"{labels.seconds:.1f} s, {labels.details['speed']}",
            "instances": f"{labels.details['instances']}",
        },
        comparison=comparison.to_dict(),
    )
    slices_png(
        place / "slices.png", labels=labels.array, truth=truth, flow=flow.array, spacing=VOXEL_NM
    )
    say(f"Labels (OME-Zarr): {labels.path}\nPage with pictures: {page}")
    return Demo(place / "truth.zarr", flow, labels, comparison, page)
