"""Dry runs: any command that runs a job can show the plan of it instead."""

from __future__ import annotations

from functools import wraps
from typing import Any

import click

from topo_dask.cli.options import Command, flag
from topo_dask.plan.outline import Plan
from topo_dask.run.dry import DryRun
from topo_dask.run.planning import JOBS
from topo_dask.run.planning import plan as make_plan

DRY_RUN = flag("--dry-run", "Show the plan; run nothing.")


class _Planned(Exception):
    """How a command that only plans comes back with its plan."""

    def __init__(self, found: Plan) -> None:
        super().__init__(found.what)
        self.found = found


def run_job(name: str, /, *arguments: Any, cluster: Any, **options: Any) -> Any:
    """Run a job; where its cluster is a dry run, leave the command with the plan instead."""
    if isinstance(cluster, DryRun):
        where = {"cluster": cluster.cluster, "sample": cluster.sample}
        raise _Planned(make_plan(name, *arguments, **where, **options))
    return JOBS[name](*arguments, cluster=cluster, **options)


def plannable(command: Command) -> Command:
    """Let a command that runs something show its plan instead."""

    @wraps(command)
    def run_or_plan(*, dry_run: bool, cluster: Any, sample: int = 0, **options: Any) -> Any:
        if not dry_run:
            return command(cluster=cluster, **options)
        as_json = options.pop("as_json", False)
        try:
            command(cluster=DryRun(cluster, sample), **options)
        except _Planned as planned:
            click.echo(planned.found.to_json() if as_json else repr(planned.found))

    made: Any = run_or_plan
    result: Command = made
    return result
