"""What the benchmarks share: the labels and their crop, timing, tables, the record of a run."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from topo_dask.grid import Region
from topo_dask.kernels.parallel import available_cores
from topo_dask.storage import open_array

VARIABLE = "TOPO_DASK_TISSUE"
"""Environment variable with the path of the labels."""

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results\n\nEach section is written by the command in it, see `README.md`.\n"
LIBRARIES = ("topo_dask", "numpy", "numba", "dask", "zarr")

# Arguments that say where, not what: they are no part of the command that is recorded.
PLACES = {"labels", "record", "results", "date", "folder"}

Rows = Sequence[Sequence[Any]]


# ── arguments ────────────────────────────────────────────────────────────────────────────────


def parser(script: str, description: str | None, *, labels: bool = True) -> argparse.ArgumentParser:
    """Arguments of every benchmark; ``labels``: whether it takes a volume of them."""
    made = argparse.ArgumentParser(
        Path(script).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if labels:
        made.add_argument(
            "labels",
            nargs="?",
            default=os.environ.get(VARIABLE),
            help=f"path of a zarr array [z,y,x] of labels; by default what {VARIABLE} says",
        )
    made.add_argument("--record", action="store_true", help="replace this section of the results")
    made.add_argument("--results", type=Path, default=RESULTS, help="file of --record")
    made.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="date that --record writes"
    )
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and insist on labels."""
    parsed = made.parse_args(arguments)
    if not parsed.labels:
        made.error(f"no labels: give the path of a zarr array, or set {VARIABLE}")
    return parsed


def position(text: str) -> tuple[int, ...]:
    """Three whole numbers, "96,200,0", or one for all axes."""
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) not in (1, 3) or min(numbers) < 0:
        raise ValueError(text)
    return numbers * (3 // len(numbers))


def lengths(text: str) -> tuple[int, ...]:
    """Three lengths, "96,200,130", or one for all axes."""
    numbers = position(text)
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def joined(numbers: Sequence[int], by: str = ",") -> str:
    """Whole numbers as text: "96,200,130", or "96x200x130"."""
    return by.join(map(str, numbers))


def command(made: argparse.ArgumentParser, parsed: argparse.Namespace) -> str:
    """The command line that makes the same figures, without the places of this machine."""
    words = ["python", f"benchmarks/{made.prog}"] + ["LABELS"] * hasattr(parsed, "labels")
    for action in made._actions:
        value = getattr(parsed, action.dest, action.default)
        if action.dest in PLACES or value == action.default:
            continue
        for one in value if isinstance(value, list) else [value]:
            text = joined(one) if isinstance(one, tuple) else str(one)
            words += action.option_strings[-1:] + ([] if action.nargs == 0 else [text])
    return " ".join(words)


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """A folder of our own inside ``folder``, or inside that of temporary files."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="topo-dask-benchmark-", dir=folder) as own:
        yield Path(own)


# ── labels ───────────────────────────────────────────────────────────────────────────────────


def cube(shape: Sequence[int], size: int | None, at: Sequence[int] | None = None) -> Region:
    """A cube in a volume, from voxel ``at`` or in the middle; all of it for size ``None``."""
    sides = [n if size is None else min(size, n) for n in shape]
    spare = [n - side for n, side in zip(shape, sides, strict=True)]
    start = [most // 2 for most in spare] if at is None else list(map(min, at, spare))
    return Region(tuple(start), tuple(a + side for a, side in zip(start, sides, strict=True)))


def crop(source: Any, size: int | None = None, at: Sequence[int] | None = None) -> npt.NDArray[Any]:
    """The labels of a `cube` of a volume."""
    array = open_array(source, argument="labels", axes=(3,))
    return np.asarray(array[cube(array.shape, size, at).slices])


def described(labels: npt.NDArray[Any]) -> str:
    """Shape, type and content of labels."""
    instances = len(np.unique(labels[labels > 0]))
    share = np.count_nonzero(labels) / labels.size
    shape = joined(labels.shape, "x")
    return f"{shape} {labels.dtype}, {instances} instances, {share:.0%} foreground"


def digest(source: Any, *, axes: int = 3) -> str:
    """SHA-256 of a stored array: type, shape and every byte in C order of z."""
    array = open_array(source, argument="array", axes=(axes,))
    found = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    before = (slice(None),) * (axes - 3)
    for first in range(0, array.shape[-3], 64):
        found.update(np.asarray(array[(*before, slice(first, first + 64))]).tobytes())
    return found.hexdigest()


# ── timing ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Times:
    """Seconds that the repetitions of one thing took, and what its last one gave."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None

    def add(self, function: Callable[[], Any]) -> None:
        """Call it once more."""
        began = time.perf_counter()
        self.result = function()
        self.seconds.append(time.perf_counter() - began)

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.seconds)


def interleaved(
    sides: dict[str, Callable[[], Any]],
    repetitions: int,
    *,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Time several things in turns, so that what else the machine does hits all of them.

    ``before`` is called, untimed, before each.
    """
    times = {name: Times() for name in sides}
    for _ in range(repetitions):
        for name, function in sides.items():
            before()
            times[name].add(function)
    return times


# ── reports ──────────────────────────────────────────────────────────────────────────────────


def table(headings: Sequence[str], rows: Rows) -> str:
    """A Markdown table whose columns line up."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def machine() -> str:
    """The machine in words, and the versions that matter."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x[:10] == "model name"), model)
    memory = psutil.virtual_memory().total / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    return (
        f"{model}, {available_cores()} cores, {memory:.0f} GiB memory, {platform.system()}; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def report(
    made: argparse.ArgumentParser, parsed: argparse.Namespace, title: str, body: Sequence[str]
) -> None:
    """Print what was measured; with ``--record`` make it the section of that title."""
    text = "\n\n".join([f"`{command(made, parsed)}`", f"{parsed.date}. {machine()}.", *body])
    print(f"\n{title}\n\n{text}")
    if parsed.record:
        replace_section(parsed.results, title, text)


def replace_section(results: Path, title: str, text: str) -> None:
    """Write a section ``## title``, in the place of the one of that title if there is one."""
    before = results.read_text(encoding="utf-8") if results.exists() else TITLE
    head, *sections = before.split("\n## ")
    named = {section.split("\n", 1)[0]: section.rstrip("\n") for section in sections}
    named[title] = f"{title}\n\n{text}"
    parts = [head.rstrip("\n"), *named.values()]
    results.write_text("\n\n## ".join(parts) + "\n", encoding="utf-8")
