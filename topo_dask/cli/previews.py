"""Commands that only show what would be done: plans of jobs, the script of a batch system."""

from __future__ import annotations

from copy import copy
from functools import partial

import click

from topo_dask.cli.from_labels import flows, instances, targets
from topo_dask.cli.options import AS_JSON, option, several
from topo_dask.cli.results import compare
from topo_dask.cli.run_options import cluster_file_options
from topo_dask.cli.tiles import fuse, map_tiles
from topo_dask.cli.to_labels import relabel, segment, segment_classes
from topo_dask.errors import InvalidArgument
from topo_dask.run.cluster import job_script as cluster_script
from topo_dask.run.cluster_options import read_options

PLANNED = (
    *(flows, instances, targets, segment, segment_classes, relabel, fuse, map_tiles),
    compare,
)


@click.command("job-script")
@click.argument("cluster", metavar="SYSTEM", required=False)
@several(*cluster_file_options("Options, as YAML.", "An option."))
def job_script(
    cluster: str | None, cluster_file: str | None, cluster_option: tuple[str, ...]
) -> None:
    """Print the job script that a batch SYSTEM would be given; submit nothing."""
    options = read_options(cluster, cluster_file, cluster_option)
    if cluster is None and cluster_file is None:
        known = "slurm, pbs, lsf, sge, htcondor or oar"
        raise InvalidArgument("cluster", "nothing", known, "For example: topo-dask job-script pbs.")
    click.echo(cluster_script(options), nl=False)


@click.group()
def plan() -> None:
    """Show what a job would take: memory, bytes, files, and what is chosen. Runs nothing."""


def _plan_of(run: click.Command) -> click.Command:
    """The command that plans what another one runs; the output may be left out."""
    parameters = []
    for parameter in run.params:
        if parameter.name == "dry_run":
            continue
        if parameter.name == "output":
            parameter = copy(parameter)
            parameter.required = False
        parameters.append(parameter)
    assert run.callback is not None
    show = partial(run.callback, dry_run=True)
    made = click.Command(run.name, callback=show, params=parameters, help=run.help)
    option("--sample", int, "Small parts of the input to run, for times; 0: none.", default=2)(made)
    if not any(parameter.name == "as_json" for parameter in parameters):
        AS_JSON(made)
    return made


for _run in PLANNED:
    plan.add_command(_plan_of(_run))
