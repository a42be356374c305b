"""Commands that make instance labels: of one flow field, of all classes, of an earlier run."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from topo_dask.cli.dry_run import run_job
from topo_dask.cli.options import (
    FLOWS,
    OUTPUT,
    SCALE,
    class_options,
    flag,
    instance_options,
    option,
    place,
)
from topo_dask.cli.parameter_types import PAIR, PATH
from topo_dask.cli.run_options import run_options


@click.command()
@FLOWS
@OUTPUT
@option("--foreground", PATH, "Labels, mask or probability (zarr [Z,Y,X]).")
@option("--threshold", float, "Of the foreground.", default=0.0)
@option("--n-steps", int, "Of each particle.", default=100)
@option("--step-size", float, "In voxels.", default=1.0)
@option(
    "--convergence-radius",
    float,
    "Ends closer than this are one instance, in voxels.",
    default=4.0,
)
@option("--min-size", int, "In voxels.", default=50)
@option("--group", int, "1: convex, 2: elongated, 3: thin.", default=1)
@instance_options
@flag("--keep-evidence", "Keep what `topo-dask relabel` needs.")
@run_options
def segment(**options: Any) -> None:
    """Make instance labels of FLOWS (zarr [3,Z,Y,X]) at OUTPUT (OME-Zarr labels)."""
    click.echo(repr(run_job("segment", options.pop("flows"), options.pop("output"), **options)))


@click.command("segment-classes")
@place("probabilities")
@FLOWS
@OUTPUT
@class_options
@option("--threshold", float, "Of probabilities.", default=0.5)
@instance_options
@run_options
def segment_classes(probabilities: str, flows: str, output: str, **options: Any) -> None:
    """Make instance labels of PROBABILITIES [C,Z,Y,X] and FLOWS [3C,Z,Y,X] at OUTPUT (group)."""
    click.echo(repr(run_job("segment_classes", probabilities, flows, output, **options)))


@click.command()
@place("source", metavar="RESULT")
@OUTPUT
@option("--min-dot", float, "Of contacts; group 2.", default=0.0)
@option("--min-area", int, "Of contacts; group 2.", default=1)
@option("--min-size", int, "In voxels. [default: that of the run]")
@option("--group", int, "1: convex, 2: elongated, 3: thin.")
@option("--veto", PAIR, "Parts that do not join. Repeat it.", multiple=True)
@option("--force", PAIR, "Parts that are one. Repeat it.", multiple=True)
@option("--flows", PATH, "Those of the run, for the column flow_error.")
@SCALE
@partial(run_options, computes=False)
def relabel(**options: Any) -> None:
    """Make other labels at OUTPUT of the evidence that RESULT of `topo-dask segment` kept."""
    click.echo(repr(run_job("relabel", options.pop("source"), options.pop("output"), **options)))
