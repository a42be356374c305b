"""Options of commands that run something: where its tasks run, and how its output is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import click

from topo_dask.cli.dry_run import DRY_RUN, plannable
from topo_dask.cli.options import PROGRESS, Command, flag, option, several
from topo_dask.cli.parameter_types import LENGTHS, PATH
from topo_dask.config import BACKENDS
from topo_dask.run.cluster_options import ClusterOptions, read_options

CLUSTER_HELP = (
    "Where tasks run: local (default: a dask cluster of this machine's processes, with a "
    "dashboard), threads, processes, sync, gpu (a process a GPU), slurm, pbs, lsf, sge, htcondor, "
    "oar (jobs of that batch system), or the tcp://... address of a dask scheduler."
)


def cluster_file_options(file: str, key: str) -> tuple[Callable[[Command], Command], ...]:
    """The options that `read_options` reads; ``file`` and ``key`` are their texts in the help."""
    return (
        option("--cluster-file", PATH, file),
        option("--cluster-option", str, key, metavar="KEY=VALUE", multiple=True),
    )


def cluster_options(command: Command) -> Command:
    """Add the options that say where tasks run; the command gets them as ``cluster``."""

    @wraps(command)
    def with_cluster(
        *,
        cluster: str | None,
        cluster_file: str | None,
        cluster_option: tuple[str, ...],
        performance_report: str | None,
        **options: Any,
    ) -> Any:
        more = {} if performance_report is None else {"performance_report": performance_report}
        where: str | ClusterOptions | None = cluster
        if cluster_file is not None or cluster_option or more:
            where = read_options(cluster, cluster_file, cluster_option, **more)
        return command(cluster=where, **options)

    return several(
        option("--cluster", str, CLUSTER_HELP, metavar="NAME"),
        *cluster_file_options(
            "Its options, as YAML.",
            "One of its options, e.g. jobs=4, cores=8, memory=32GB, walltime=02:00:00.",
        ),
        option("--performance-report", PATH, "HTML file that dask writes."),
    )(cast(Command, with_cluster))


def run_options(command: Command, *, arrays: bool = True, computes: bool = True) -> Command:
    """Add the options that every run on disk has.

    ``arrays`` is whether it makes zarr arrays, ``computes`` whether a GPU would be of use.
    """
    layout = option("--zarr-format", click.IntRange(2, 3), "Of the output.", default=3)
    what = "What computes; auto: a GPU where a worker has one."
    backend = option("--backend", click.Choice(BACKENDS), what, default="auto")
    return several(
        option("--blocks", LENGTHS, "Shape of a block. [default: 128,128,128]"),
        option("--work-dir", PATH, "Where scratch data goes."),
        flag("--resume", "Go on with an unfinished run."),
        flag("--overwrite", "Replace an existing output."),
        *([layout] if arrays else []),
        PROGRESS,
        flag("--ignore-memory", "Begin also where memory may not suffice."),
        *([backend] if computes else []),
        DRY_RUN,
    )(cluster_options(plannable(command)))
