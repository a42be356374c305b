"""Shapes of options, and the options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from topo_dask.cli.parameter_types import CONTEXT_WIDTH, LENGTHS, NAMES, NUMBERS, PATH
from topo_dask.config import ACCELERATIONS, INTERPOLATIONS
from topo_dask.run.flows import FLOW_TYPES

Command = TypeVar("Command", bound=Callable[..., Any])


def place(name: str, **more: Any) -> Callable[[Command], Command]:
    """An argument that is a path or URL."""
    return click.argument(name, type=PATH, **more)


def option(name: str, kind: Any, text: str, **more: Any) -> Callable[[Command], Command]:
    """An option that takes a value; its help shows the default where there is one."""
    return click.option(name, type=kind, help=text, **{"show_default": "default" in more, **more})


def flag(name: str, text: str) -> Callable[[Command], Command]:
    """An option without a value, off by default."""
    return click.option(name, is_flag=True, help=text)


def switch(name: str, text: str, *, default: bool | None = True) -> Callable[[Command], Command]:
    """A flag and the one that turns it off; ``default`` where neither is given."""
    return click.option(f"--{name}/--no-{name}", default=default, help=text)


def several(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in this order in the help."""

    def with_all(command: Command) -> Command:
        for add in reversed(options):
            command = add(command)
        return command

    return with_all


LABELS = place("labels")
FLOWS = place("flows")
OUTPUT = place("output")
PROGRESS = switch("progress", "Show progress.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
SCALE = option("--scale", float, "What the numbers of FLOWS are divided by, e.g. 127.")

class_options = several(
    option("--class-names", NAMES, "One for each class. [default: the known nine]"),
    option("--class-config", PATH, "YAML file: how each class is treated."),
    option("--resolution-nm", float, "Edge of a voxel in nm, for the defaults."),
)
diffusion_options = several(
    switch("adaptive-iters", "Fewer for small instances."),
    option(
        "--adaptive-factor", float, "Iterations for each voxel of their longest side.", default=6
    ),
    option("--spatial-mask", PATH, "1 where annotated (zarr [Z,Y,X])."),
    option(
        "--origin",
        LENGTHS,
        "Global index of the first voxel.",
        default=(0, 0, 0),
        show_default=False,
    ),
    option("--context", CONTEXT_WIDTH, "Computed around blocks and thrown away.", default="auto"),
    option(
        "--tolerance",
        float,
        "Error of a component that the automatic context may leave.",
        default=1e-4,
    ),
    option(
        "--spacing",
        NUMBERS,
        "Distance of voxels: z,y,x.",
        default=(1.0, 1.0, 1.0),
        show_default=False,
    ),
    option(
        "--acceleration",
        click.Choice(ACCELERATIONS),
        "Fewer sweeps for many iterations of coordinates, within the tolerance.",
        default="none",
    ),
    option("--dtype", click.Choice(FLOW_TYPES), "Of the output.", default="float32"),
)
instance_options = several(
    option(
        "--flow-error-threshold",
        float,
        "Drop instances whose flow is farther from the direct flow; 0: none.",
        default=0.0,
    ),
    flag("--fill-holes", "Fill what one instance encloses."),
    option(
        "--interpolation",
        click.Choice(INTERPOLATIONS),
        "Of the flow, between voxels.",
        default="nearest",
    ),
    SCALE,
    option(
        "--halo",
        CONTEXT_WIDTH,
        "Read around blocks; saves hand-over rounds.",
        default="auto",
    ),
)
