"""Commands to judge a result by: compare labels with truth, look at slices of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from topo_dask.cli.dry_run import DRY_RUN, plannable, run_job
from topo_dask.cli.options import AS_JSON, LABELS, PROGRESS, flag, option, place
from topo_dask.cli.parameter_types import LENGTHS, NUMBERS, PATH
from topo_dask.cli.run_options import cluster_options
from topo_dask.config import lengths_of_voxel
from topo_dask.errors import OutputExists, OutputNotWritable
from topo_dask.graph.check import check_labels
from topo_dask.storage import open_array, voxel_geometry
from topo_dask.view import slice_panels, write_report


@click.command()
@place("truth")
@LABELS
@option("--blocks", LENGTHS, "Shape of a block.")
@click.option(
    "--ignore-background/--count-background",
    default=True,
    help="Whether voxels without truth count in the information scores.",
)
@option("--largest", int, "Splits, merges to list.", default=10)
@AS_JSON
@PROGRESS
@DRY_RUN
@cluster_options
@plannable
def compare(truth: str, labels: str, as_json: bool = False, **options: Any) -> None:
    """Compare LABELS with TRUTH (zarr arrays [Z,Y,X]), exactly."""
    result = run_job("compare", truth, labels, **options)
    click.echo(result.to_json() if as_json else repr(result))


@click.command()
@LABELS
@click.argument("folder", type=click.Path(path_type=Path))
@option("--truth", PATH, "Labels to compare with (zarr [Z,Y,X]).")
@option("--flows", PATH, "Their flow field (zarr [3,Z,Y,X]).")
@option("--at", LENGTHS, "Indices of the slices. [default: the middle]")
@option("--spacing", NUMBERS, "Size of a voxel. [default: that of LABELS]")
@flag("--overwrite", "Replace a page that is there.")
def view(
    labels: str, folder: Path, truth: str | None, flows: str | None, overwrite: bool, **slices: Any
) -> None:
    """Leave a page with pictures of three slices of LABELS (zarr [Z,Y,X]) in FOLDER."""
    shown = open_array(labels, argument="labels")
    beside: dict[str, Any] = {
        "truth": None if truth is None else open_array(truth, argument="truth"),
        "flow": None if flows is None else open_array(flows, argument="flows", axes=(4,)),
    }
    for argument, array in (("labels", shown), ("truth", beside["truth"])):
        if array is not None:
            check_labels(array, argument=argument)
    if isinstance(slices["at"], int):
        slices["at"] = (slices["at"],) * 3
    if slices["spacing"] is None:
        slices["spacing"] = voxel_geometry(shown).scale
    slices["spacing"] = lengths_of_voxel("spacing", slices["spacing"])
    page = folder / "index.html"
    if page.exists() and not overwrite:
        came, do = f"{str(page)!r}, which is already there", "Choose another, or pass --overwrite."
        raise OutputExists("folder", came, "a folder without a page", do)
    panels = slice_panels(shown, **beside, **slices)
    facts = {"labels": labels, "array": f"{'x'.join(map(str, shown.shape))} {shown.dtype}"}
    facts |= {name: path for name, path in (("truth", truth), ("flows", flows)) if path}
    title = f"Slices of {Path(labels).name}"
    try:
        click.echo(str(write_report(folder, title=title, panels=panels, facts=facts)))
    except OSError as error:
        came = f"{str(folder)!r}, which cannot be written ({error.strerror or error})"
        do = "Choose another place, or change the permissions."
        raise OutputNotWritable("folder", came, "a folder that can be written", do) from error
