"""The command that shows the whole chain on a made volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from topo_dask.cli.options import PROGRESS, flag, option
from topo_dask.cli.parameter_types import LENGTHS
from topo_dask.cli.run_options import cluster_options
from topo_dask.demo import run_demo


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("topo-dask-demo"))
@option("--shape", LENGTHS, "Of the volume.", default=(128, 192, 192), show_default=False)
@option("--blocks", LENGTHS, "Shape of a block.", default=64)
@option("--seed", int, "Of the volume.", default=1)
@cluster_options
@flag("--overwrite", "Replace the folder of an earlier demo.")
@PROGRESS
def demo(folder: Path, shape: Any, **options: Any) -> None:
    """Make a volume in FOLDER, run the whole chain on it, leave labels and pictures."""
    lengths = (shape,) * 3 if isinstance(shape, int) else shape
    run_demo(folder, shape=lengths, say=click.echo, **options)
