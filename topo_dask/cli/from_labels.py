"""Commands that read labels: flow fields, tables of instances, targets to train on."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from topo_dask.cli.dry_run import run_job
from topo_dask.cli.options import LABELS, OUTPUT, class_options, diffusion_options, option
from topo_dask.cli.parameter_types import LENGTHS, PATH, ROUND_LENGTH
from topo_dask.cli.run_options import run_options
from topo_dask.config import METHODS, POTENTIALS


@click.command()
@LABELS
@OUTPUT
@option("--method", click.Choice(METHODS), "Of any form, or convex.", default="diffusion")
@option("--potential", click.Choice(POTENTIALS), "What diffuses.", default="coordinate")
@option("--n-iter", int, "Most iterations.", default=200)
@diffusion_options
@option("--overlap", LENGTHS, "Blended between tiles.", default=0)
@option("--rounds", ROUND_LENGTH, "Iterations a round, in place of a context.")
@option("--instances", PATH, "Table of these labels, saves a pass.")
@run_options
def flows(**options: Any) -> None:
    """Make the flow field of LABELS (zarr [Z,Y,X]) at OUTPUT (zarr [3,Z,Y,X])."""
    click.echo(repr(run_job("flows", options.pop("labels"), options.pop("output"), **options)))


@click.command()
@LABELS
@OUTPUT
@partial(run_options, arrays=False, computes=False)
def instances(**options: Any) -> None:
    """Measure the instances of LABELS (zarr [Z,Y,X]) into the table OUTPUT (.npz)."""
    output = options.pop("output")
    table = run_job("instance_table", options.pop("labels"), output, **options)
    click.echo(f"{len(table)} instances, {int(table.voxels.sum())} voxels: {output}")


@click.command()
@LABELS
@OUTPUT
@class_options
@option("--diffusion-iters", int, "Of classes without any.", default=200)
@diffusion_options
@run_options
def targets(**options: Any) -> None:
    """Make flows and foreground of LABELS (zarr [C,Z,Y,X]) at OUTPUT (zarr group), to train on."""
    made = run_job("flow_targets", options.pop("labels"), options.pop("output"), **options)
    click.echo(repr(made))
