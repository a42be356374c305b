"""The command line: parses, calls, prints. Options have the names of the Python parameters."""

from __future__ import annotations

from typing import Any

import click

from topo_dask.cli.demo_command import demo
from topo_dask.cli.from_labels import flows, instances, targets
from topo_dask.cli.previews import job_script, plan
from topo_dask.cli.results import compare, view
from topo_dask.cli.tiles import fuse, map_tiles
from topo_dask.cli.to_labels import relabel, segment, segment_classes
from topo_dask.errors import TopoError

__all__ = ["main"]


class _Commands(click.Group):
    """Shows our errors as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TopoError as error:
            click.echo(f"Error: {error}", err=True)
            cause = error.__cause__
            if cause is not None and not isinstance(cause, TopoError):
                click.echo(f"Cause: {type(cause).__name__}: {cause}", err=True)
            for note in getattr(error, "__notes__", ()):  # the traceback of a user's function
                click.echo(note, err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="topo_dask")
def main() -> None:
    """Flow fields and instance labels for 3-D volumes larger than memory: one answer."""


for _command in (
    *(flows, instances, targets, segment, segment_classes, relabel, fuse, map_tiles),
    *(compare, view, plan, job_script, demo),
):
    main.add_command(_command)
