"""The command line: parses, calls, prints. Options have the names of the Python parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from topo_dask.config import (
    ACCELERATIONS,
    BACKENDS,
    INTERPOLATIONS,
    METHODS,
    POTENTIALS,
    lengths_of_voxel,
)
from topo_dask.demo import run_demo
from topo_dask.errors import InvalidArgument, OutputExists, OutputNotWritable, TopoError
from topo_dask.graph.blend import BEYOND, IDS, TILE_BLENDS
from topo_dask.graph.check import check_labels
from topo_dask.graph.fuse import LASTS
from topo_dask.kernels.resample import BLENDS
from topo_dask.plan.outline import Plan
from topo_dask.run.cluster import job_script as cluster_script
from topo_dask.run.cluster_options import ClusterOptions, read_options
from topo_dask.run.dry import DryRun
from topo_dask.run.flows import FLOW_TYPES
from topo_dask.run.planning import JOBS
from topo_dask.run.planning import plan as make_plan
from topo_dask.run.tile_table import read_tile_table
from topo_dask.storage import open_array, voxel_geometry
from topo_dask.view import slice_panels, write_report

Command = TypeVar("Command", bound=Callable[..., Any])

CLUSTER_HELP = (
    "Where tasks run: local (default: a dask cluster of this machine's processes, with a "
    "dashboard), threads, processes, sync, gpu (a process a GPU), slurm, pbs, lsf, sge, htcondor, "
    "oar (jobs of that batch system), or the tcp://... address of a dask scheduler."
)


CONTEXT_HELP = "Computed around blocks and thrown away."
HALO_HELP = "Read around blocks; saves hand-over rounds."


class Lengths(click.ParamType[Any]):
    """One whole number, or three separated by commas: z,y,x."""

    name = "z,y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse; what the numbers may be is checked where they are used."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or three of them, like 128,128,128")
        return numbers[0] if len(numbers) == 1 else numbers


class Numbers(click.ParamType[Any]):
    """One number, or one for each axis separated by commas."""

    name = "z,y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number or several of them, like 40,8.5,8.5")
        return numbers[0] if len(numbers) == 1 else numbers


class ContextWidth(click.ParamType[Any]):
    """A number of voxels, or "auto"."""

    name = "voxels|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither 'auto' nor a whole number")


class RoundLength(ContextWidth):
    """A number of iterations, or "auto"."""

    name = "iterations|auto"


class Names(click.ParamType[Any]):
    """Names separated by commas."""

    name = "name,name,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(",")]


class Points(click.ParamType[Any]):
    """Points separated by semicolons: y,x;y,x."""

    name = "y,x;y,x"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse; whole numbers stay whole."""
        if not isinstance(value, str):
            return value
        try:
            rows = [[float(n) for n in point.split(",")] for point in value.split(";")]
        except ValueError:
            self.fail(f"{value!r} is not a list of points, like 0,0;100,100")
        whole = all(n.is_integer() for row in rows for n in row)
        return tuple(tuple(int(n) for n in row) if whole else tuple(row) for row in rows)


class Pair(click.ParamType[Any]):
    """Two whole numbers separated by a comma."""

    name = "a,b"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse."""
        try:
            a, b = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of whole numbers, like 3,7")
        return a, b


LENGTHS = Lengths()
POINTS = Points()
NUMBERS = Numbers()
PAIR = Pair()


def several(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in this order in the help."""

    def with_all(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return with_all


class_options = several(
    click.option(
        "--class-names", type=Names(), help="One for each class. [default: the known nine]"
    ),
    click.option("--class-config", type=click.Path(), help="YAML file: how each class is treated."),
    click.option("--resolution-nm", type=float, help="Edge of a voxel in nm, for the defaults."),
)
diffusion_options = several(
    click.option(
        "--adaptive-iters/--no-adaptive-iters", default=True, help="Fewer for small instances."
    ),
    click.option(
        "--adaptive-factor",
        type=float,
        default=6,
        show_default=True,
        help="Iterations for each voxel of their longest side.",
    ),
    click.option("--spatial-mask", type=click.Path(), help="1 where annotated (zarr [Z,Y,X])."),
    click.option(
        "--origin", type=LENGTHS, default=(0, 0, 0), help="Global index of the first voxel."
    ),
    click.option(
        "--context", type=ContextWidth(), default="auto", show_default=True, help=CONTEXT_HELP
    ),
    click.option(
        "--tolerance",
        type=float,
        default=1e-4,
        show_default=True,
        help="Error of a component that the automatic context may leave.",
    ),
    click.option(
        "--spacing", type=NUMBERS, default=(1.0, 1.0, 1.0), help="Distance of voxels: z,y,x."
    ),
    click.option(
        "--acceleration",
        type=click.Choice(ACCELERATIONS),
        default="none",
        show_default=True,
        help="Fewer sweeps for many iterations of coordinates, within the tolerance.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(FLOW_TYPES),
        default="float32",
        show_default=True,
        help="Of the output.",
    ),
)
instance_options = several(
    click.option(
        "--flow-error-threshold",
        type=float,
        default=0.0,
        show_default=True,
        help="Drop instances whose flow is farther from the direct flow; 0: none.",
    ),
    click.option("--fill-holes", is_flag=True, help="Fill what one instance encloses."),
    click.option(
        "--interpolation",
        type=click.Choice(INTERPOLATIONS),
        default="nearest",
        show_default=True,
        help="Of the flow, between voxels.",
    ),
    click.option("--scale", type=float, help="What the numbers of FLOWS are divided by, e.g. 127."),
    click.option("--halo", type=ContextWidth(), default="auto", show_default=True, help=HALO_HELP),
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
        click.option("--cluster", metavar="NAME", help=CLUSTER_HELP),
        click.option("--cluster-file", type=click.Path(), help="Its options, as YAML."),
        click.option(
            "--cluster-option",
            metavar="KEY=VALUE",
            multiple=True,
            help="One of its options, e.g. jobs=4, cores=8, memory=32GB, walltime=02:00:00.",
        ),
        click.option("--performance-report", type=click.Path(), help="HTML file that dask writes."),
    )(cast(Command, with_cluster))


class _Planned(Exception):
    """How a command that only plans comes back with its plan."""

    def __init__(self, found: Plan) -> None:
        super().__init__(found.what)
        self.found = found


def _job(name: str) -> Callable[..., Any]:
    """A job that is planned instead where its cluster is a dry run."""

    def run_or_plan(*arguments: Any, cluster: Any, **options: Any) -> Any:
        if isinstance(cluster, DryRun):
            where = {"cluster": cluster.cluster, "sample": cluster.sample}
            raise _Planned(make_plan(name, *arguments, **where, **options))
        return JOBS[name](*arguments, cluster=cluster, **options)

    return run_or_plan


run_flows, run_segment, run_classes = _job("flows"), _job("segment"), _job("segment_classes")
run_relabel, run_targets = _job("relabel"), _job("flow_targets")
run_instance_table = _job("instance_table")
run_map_tiles, fuse_mosaic = _job("map_tiles"), _job("fuse_mosaic")
run_compare = _job("compare")


def _plannable(command: Command) -> Command:
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


DRY_RUN = click.option("--dry-run", is_flag=True, help="Show the plan; run nothing.")


def run_options(command: Command, *, arrays: bool = True, computes: bool = True) -> Command:
    """Add the options that every run on disk has.

    ``arrays`` is whether it makes zarr arrays, ``computes`` whether a GPU would be of use.
    """
    what = "What computes; auto: a GPU where a worker has one."
    backend = click.option(
        "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help=what
    )
    layout = click.option(
        "--zarr-format",
        type=click.IntRange(2, 3),
        default=3,
        show_default=True,
        help="Of the output.",
    )
    return several(
        click.option("--blocks", type=LENGTHS, help="Shape of a block. [default: 128,128,128]"),
        click.option("--work-dir", type=click.Path(), help="Where scratch data goes."),
        click.option("--resume", is_flag=True, help="Go on with an unfinished run."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        *([layout] if arrays else []),
        click.option("--progress/--no-progress", default=True, help="Show progress."),
        click.option(
            "--ignore-memory", is_flag=True, help="Begin also where memory may not suffice."
        ),
        *([backend] if computes else []),
        DRY_RUN,
    )(cluster_options(_plannable(command)))


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


@main.command()
@click.argument("labels", type=click.Path())
@click.argument("output", type=click.Path())
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="diffusion",
    show_default=True,
    help="Of any form, or convex.",
)
@click.option(
    "--potential",
    type=click.Choice(POTENTIALS),
    default="coordinate",
    show_default=True,
    help="What diffuses.",
)
@click.option("--n-iter", type=int, default=200, show_default=True, help="Most iterations.")
@diffusion_options
@click.option(
    "--overlap", type=LENGTHS, default=0, show_default=True, help="Blended between tiles."
)
@click.option("--rounds", type=RoundLength(), help="Iterations a round, in place of a context.")
@click.option("--instances", type=click.Path(), help="Table of these labels, saves a pass.")
@run_options
def flows(**options: Any) -> None:
    """Make the flow field of LABELS (zarr [Z,Y,X]) at OUTPUT (zarr [3,Z,Y,X])."""
    click.echo(repr(run_flows(options.pop("labels"), options.pop("output"), **options)))


@main.command()
@click.argument("labels", type=click.Path())
@click.argument("output", type=click.Path())
@partial(run_options, arrays=False, computes=False)
def instances(**options: Any) -> None:
    """Measure the instances of LABELS (zarr [Z,Y,X]) into the table OUTPUT (.npz)."""
    output = options.pop("output")
    table = run_instance_table(options.pop("labels"), output, **options)
    click.echo(f"{len(table)} instances, {int(table.voxels.sum())} voxels: {output}")


@main.command()
@click.argument("labels", type=click.Path())
@click.argument("output", type=click.Path())
@class_options
@click.option(
    "--diffusion-iters", type=int, default=200, show_default=True, help="Of classes without any."
)
@diffusion_options
@run_options
def targets(**options: Any) -> None:
    """Make flows and foreground of LABELS (zarr [C,Z,Y,X]) at OUTPUT (zarr group), to train on."""
    click.echo(repr(run_targets(options.pop("labels"), options.pop("output"), **options)))


@main.command()
@click.argument("flows", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--foreground", type=click.Path(), help="Labels, mask or probability (zarr [Z,Y,X]).")
@click.option("--threshold", type=float, default=0.0, show_default=True, help="Of the foreground.")
@click.option("--n-steps", type=int, default=100, show_default=True, help="Of each particle.")
@click.option("--step-size", type=float, default=1.0, show_default=True, help="In voxels.")
@click.option(
    "--convergence-radius",
    type=float,
    default=4.0,
    show_default=True,
    help="Ends closer than this are one instance, in voxels.",
)
@click.option("--min-size", type=int, default=50, show_default=True, help="In voxels.")
@click.option(
    "--group", type=int, default=1, show_default=True, help="1: convex, 2: elongated, 3: thin."
)
@instance_options
@click.option("--keep-evidence", is_flag=True, help="Keep what `topo-dask relabel` needs.")
@run_options
def segment(**options: Any) -> None:
    """Make instance labels of FLOWS (zarr [3,Z,Y,X]) at OUTPUT (OME-Zarr labels)."""
    click.echo(repr(run_segment(options.pop("flows"), options.pop("output"), **options)))


@main.command("segment-classes")
@click.argument("probabilities", type=click.Path())
@click.argument("flows", type=click.Path())
@click.argument("output", type=click.Path())
@class_options
@click.option("--threshold", type=float, default=0.5, show_default=True, help="Of probabilities.")
@instance_options
@run_options
def segment_classes(probabilities: str, flows: str, output: str, **options: Any) -> None:
    """Make instance labels of PROBABILITIES [C,Z,Y,X] and FLOWS [3C,Z,Y,X] at OUTPUT (group)."""
    click.echo(repr(run_classes(probabilities, flows, output, **options)))


@main.command()
@click.argument("source", metavar="RESULT", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--min-dot", type=float, default=0.0, show_default=True, help="Of contacts; group 2.")
@click.option("--min-area", type=int, default=1, show_default=True, help="Of contacts; group 2.")
@click.option("--min-size", type=int, help="In voxels. [default: that of the run]")
@click.option("--group", type=int, help="1: convex, 2: elongated, 3: thin.")
@click.option("--veto", type=PAIR, multiple=True, help="Parts that do not join. Repeat it.")
@click.option("--force", type=PAIR, multiple=True, help="Parts that are one. Repeat it.")
@click.option("--flows", type=click.Path(), help="Those of the run, for the column flow_error.")
@click.option("--scale", type=float, help="What the numbers of FLOWS are divided by, e.g. 127.")
@partial(run_options, computes=False)
def relabel(**options: Any) -> None:
    """Make other labels at OUTPUT of the evidence that RESULT of `topo-dask segment` kept."""
    click.echo(repr(run_relabel(options.pop("source"), options.pop("output"), **options)))


@main.command()
@click.argument("table", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--order", type=int, default=1, show_default=True, help="Of splines: 0, 1 or 3.")
@click.option(
    "--blend",
    type=click.Choice(BLENDS),
    default="cosine",
    show_default=True,
    help="Weights where tiles overlap.",
)
@click.option("--overlap", type=LENGTHS, help="Width of the cosine tapers. [default: half a tile]")
@click.option("--vector", is_flag=True, help="Channels are a vector: turn it with its tile.")
@click.option("--unit/--no-unit", default=None, help="Give vectors length 1. [default: --vector]")
@click.option("--shape", type=LENGTHS, help="Of the output. [default: all that tiles cover]")
@click.option("--origin", type=NUMBERS, help="Position of its first voxel. [default: the lowest]")
@click.option("--spacing", type=NUMBERS, help="Size of its voxels. [default: the smallest]")
@click.option("--tile-spacing", type=NUMBERS, help="Size of the tiles' voxels.")
@click.option("--background", type=float, default=0, show_default=True, help="Where no tile is.")
@click.option("--dtype", help="Of the output. [default: that of the tiles]")
@click.option("--check/--no-check", default=True, help="Read every zarr tile once before.")
@run_options
def fuse(**options: Any) -> None:
    """Fuse the tiles of TABLE (CSV, JSON, OME-TIFF, OME-XML) into one zarr array at OUTPUT."""
    table = read_tile_table(options.pop("table"))
    click.echo(repr(fuse_mosaic(table, **options)))


@main.command("map-tiles")
@click.argument("model", metavar="MODEL")
@click.argument("image", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--tile", type=LENGTHS, required=True, help="Shape of a tile, e.g. 256,256.")
@click.option("--overlap", type=LENGTHS, default=0, show_default=True, help="Shared and blended.")
@click.option("--context", type=LENGTHS, default=0, show_default=True, help="Seen, thrown away.")
@click.option(
    "--last",
    type=click.Choice(LASTS),
    default="move",
    show_default=True,
    help="What is done with the last tile of an axis.",
)
@click.option(
    "--blend",
    type=click.Choice(TILE_BLENDS),
    default="cosine",
    show_default=True,
    help="Weights where tiles overlap.",
)
@click.option("--ids", type=click.Choice(IDS), default="keep", show_default=True, help="Of labels.")
@click.option("--normalise", is_flag=True, help="Scale vectors along the channels to length 1.")
@click.option("--channels", type=int, help="Of the result. [default: from one tile]")
@click.option("--dtype", help="Of the result. [default: from one tile]")
@click.option("--batch", type=int, help="Tiles a call, along a first axis. [default: no such axis]")
@click.option("--pass-origin", is_flag=True, help="Call the function with origin=.")
@click.option(
    "--beyond",
    type=click.Choice(BEYOND),
    default="reflect",
    show_default=True,
    help="What a tile sees beyond the image.",
)
@click.option("--mask", type=click.Path(), help="Area of interest: zarr array at any scale.")
@click.option("--box", "boxes", type=POINTS, multiple=True, help="Area of interest: first;end.")
@click.option("--polygon", type=POINTS, help="Area of interest: corners y,x;y,x;y,x.")
@click.option("--skip-empty", is_flag=True, help="Leave out tiles of which no chunk is on disk.")
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
    click.echo(repr(run_map_tiles(model, image, tile, overlap, output, **options)))


@main.command()
@click.argument("truth", type=click.Path())
@click.argument("labels", type=click.Path())
@click.option("--blocks", type=LENGTHS, help="Shape of a block.")
@click.option(
    "--ignore-background/--count-background",
    default=True,
    help="Whether voxels without truth count in the information scores.",
)
@click.option("--largest", type=int, default=10, show_default=True, help="Splits, merges to list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--progress/--no-progress", default=True, help="Show progress.")
@DRY_RUN
@cluster_options
@_plannable
def compare(truth: str, labels: str, as_json: bool = False, **options: Any) -> None:
    """Compare LABELS with TRUTH (zarr arrays [Z,Y,X]), exactly."""
    result = run_compare(truth, labels, **options)
    click.echo(result.to_json() if as_json else repr(result))


@main.command()
@click.argument("labels", type=click.Path())
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--truth", type=click.Path(), help="Labels to compare with (zarr [Z,Y,X]).")
@click.option("--flows", type=click.Path(), help="Their flow field (zarr [3,Z,Y,X]).")
@click.option("--at", type=LENGTHS, help="Indices of the slices. [default: the middle]")
@click.option("--spacing", type=NUMBERS, help="Size of a voxel. [default: that of LABELS]")
@click.option("--overwrite", is_flag=True, help="Replace a page that is there.")
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


@main.command("job-script")
@click.argument("cluster", metavar="SYSTEM", required=False)
@click.option("--cluster-file", type=click.Path(), help="Options, as YAML.")
@click.option("--cluster-option", metavar="KEY=VALUE", multiple=True, help="An option.")
def job_script(
    cluster: str | None, cluster_file: str | None, cluster_option: tuple[str, ...]
) -> None:
    """Print the job script that a batch SYSTEM would be given; submit nothing."""
    options = read_options(cluster, cluster_file, cluster_option)
    if cluster is None and cluster_file is None:
        known = "slurm, pbs, lsf, sge, htcondor or oar"
        raise InvalidArgument("cluster", "nothing", known, "For example: topo-dask job-script pbs.")
    click.echo(cluster_script(options), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("topo-dask-demo"))
@click.option("--shape", type=LENGTHS, default=(128, 192, 192), help="Of the volume.")
@click.option("--blocks", type=LENGTHS, default=64, show_default=True, help="Shape of a block.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the volume.")
@cluster_options
@click.option("--overwrite", is_flag=True, help="Replace the folder of an earlier demo.")
@click.option("--progress/--no-progress", default=True, help="Show progress.")
def demo(folder: Path, shape: Any, **options: Any) -> None:
    """Make a volume in FOLDER, run the whole chain on it, leave labels and pictures."""
    lengths = (shape,) * 3 if isinstance(shape, int) else shape
    run_demo(folder, shape=lengths, say=click.echo, **options)


@main.group()
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
    of_parts = "Small parts of the input to run, for times; 0: none."
    parameters.append(
        click.Option(["--sample"], type=int, default=2, show_default=True, help=of_parts)
    )
    if not any(parameter.name == "as_json" for parameter in parameters):
        parameters.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))

    assert run.callback is not None
    show = partial(run.callback, dry_run=True)
    return click.Command(run.name, callback=show, params=parameters, help=run.help)


for _run in (
    *(flows, instances, targets, segment, segment_classes, relabel, fuse, map_tiles),
    compare,
):
    plan.add_command(_plan_of(_run))
