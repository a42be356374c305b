"""Commands on tiles: fuse them into one array, apply a model to those of an image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from topo_dask.cli.dry_run import run_job
from topo_dask.cli.options import OUTPUT, flag, option, place, switch
from topo_dask.cli.parameter_types import LENGTHS, NUMBERS, PATH, POINTS
from topo_dask.cli.run_options import run_options
from topo_dask.graph.blend import BEYOND, IDS, TILE_BLENDS
from topo_dask.graph.fuse import LASTS
from topo_dask.kernels.resample import BLENDS
from topo_dask.run.tile_table import read_tile_table

BLENDING = "Weights where tiles overlap."


@click.command()
@place("table")
@OUTPUT
@option("--order", int, "Of splines: 0, 1 or 3.", default=1)
@option("--blend", click.Choice(BLENDS), BLENDING, default="cosine")
@option("--overlap", LENGTHS, "Width of the cosine tapers. [default: half a tile]")
@flag("--vector", "Channels are a vector: turn it with its tile.")
@switch("unit", "Give vectors length 1. [default: --vector]", default=None)
@option("--shape", LENGTHS, "Of the output. [default: all that tiles cover]")
@option("--origin", NUMBERS, "Position of its first voxel. [default: the lowest]")
@option("--spacing", NUMBERS, "Size of its voxels. [default: the smallest]")
@option("--tile-spacing", NUMBERS, "Size of the tiles' voxels.")
@option("--background", float, "Where no tile is.", default=0)
@option("--dtype", str, "Of the output. [default: that of the tiles]")
@switch("check", "Read every zarr tile once before.")
@run_options
def fuse(**options: Any) -> None:
    """Fuse the tiles of TABLE (CSV, JSON, OME-TIFF, OME-XML) into one zarr array at OUTPUT."""
    table = read_tile_table(options.pop("table"))
    click.echo(repr(run_job("fuse_mosaic", table, **options)))


@click.command("map-tiles")
@click.argument("model", metavar="MODEL")
@place("image")
@OUTPUT
@option("--tile", LENGTHS, "Shape of a tile, e.g. 256,256.", required=True)
@option("--overlap", LENGTHS, "Shared and blended.", default=0)
@option("--context", LENGTHS, "Seen, thrown away.", default=0)
@option(
    "--last", click.Choice(LASTS), "What is done with the last tile of an axis.", default="move"
)
@option("--blend", click.Choice(TILE_BLENDS), BLENDING, default="cosine")
@option("--ids", click.Choice(IDS), "Of labels.", default="keep")
@flag("--normalise", "Scale vectors along the channels to length 1.")
@option("--channels", int, "Of the result. [default: from one tile]")
@option("--dtype", str, "Of the result. [default: from one tile]")
@option("--batch", int, "Tiles a call, along a first axis. [default: no such axis]")
@flag("--pass-origin", "Call the function with origin=.")
@option("--beyond", click.Choice(BEYOND), "What a tile sees beyond the image.", default="reflect")
@option("--mask", PATH, "Area of interest: zarr array at any scale.")
@click.option("--box", "boxes", type=POINTS, multiple=True, help="Area of interest: first;end.")
@option("--polygon", POINTS, "Area of interest: corners y,x;y,x;y,x.")
@flag("--skip-empty", "Leave out tiles of which no chunk is on disk.")
@run_options
def map_tiles(
    model: str, image: str, output: str, skip_empty: bool, boxes: Any, **options: Any
) -> None:
    """Apply MODEL to overlapping tiles of IMAGE, blended into OUTPUT (zarr arrays).

    MODEL is module:function, from NumPy array to NumPy array, or the path of an .onnx file.
    """
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    tile, overlap = options.pop("tile"), options.pop("overlap")
    options |= {"skip": "empty" if skip_empty else None, "boxes": boxes or None}
    click.echo(repr(run_job("map_tiles", model, image, tile, overlap, output, **options)))
