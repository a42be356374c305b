"""The table of instances beside the labels: what the passes of a run find out about each."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.tables import EndTable, InstanceTable
from topo_dask.storage import load_table, save_table

AXES = "zyx"
CSV_COLUMNS = (
    "id",
    "voxels",
    *(f"{axis}_start" for axis in AXES),
    *(f"{axis}_stop" for axis in AXES),
    *AXES,
    *(f"touches_{axis}_{side}" for axis in AXES for side in ("lo", "hi")),
    *(f"convergence_{axis}" for axis in AXES),
    "flow_error",
)
"""Names of the columns of the CSV file; positions and lengths are in voxels."""

TABLES = "instances"
"""Name of the folder of tables in an output."""

TABLE = "table"
"""Name of the files of a single table, without their endings."""

ROWS = 100_000
"""Rows of a CSV file that are made at a time."""


@dataclass(frozen=True, eq=False)
class MeasuredInstances:
    """What a run knows of its instances; every column has a row for each, ascending by id.

    Parameters
    ----------
    ids
        ``uint64[K]``: 1..K, the labels.
    voxels
        ``int64[K]``.
    lo, hi
        ``int64[K, 3]``: bounding box, half open.
    centroid
        ``float64[K, 3]``: centre of mass, in voxels.
    border
        ``bool[K, 6]``: whether it has voxels in the faces z_lo, z_hi, y_lo, y_hi, x_lo, x_hi of
        the volume.
    convergence
        ``float64[K, 3]``: mean final position of the particles that began in it.
    flow_error
        ``float64[K]``: mean squared difference between its flow and the direct flow, see
        `topo_dask.remove_bad_flow_masks`; without holes that were filled.

    Examples
    --------
    >>> facts = InstanceTable(
    ...     np.array([1], np.uint64), np.array([2]), np.array([[0, 0, 3]]),
    ...     np.array([[0, 0, 1]]), np.array([[1, 1, 3]]),
    ... )
    >>> one = np.array([1])
    >>> ends = EndTable(one.view("u8"), one, np.array([[0, 0, 2]]), np.array([[0, 0, 0]]))
    >>> table = measured(facts, ends, np.array([0.1]), (1, 1, 9))
    >>> table.centroid, table.border[0].tolist()
    (array([[0. , 0. , 1.5]]), [True, True, True, True, False, False])
    >>> print(table)
    1 instances: id, voxels, z_start, y_start, x_start, z_stop, y_stop, x_stop, z, y, x, ...
    """

    ids: npt.NDArray[np.uint64]
    voxels: npt.NDArray[np.int64]
    lo: npt.NDArray[np.int64]
    hi: npt.NDArray[np.int64]
    centroid: npt.NDArray[np.float64]
    border: npt.NDArray[np.bool_]
    convergence: npt.NDArray[np.float64]
    flow_error: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{len(self)} instances: {', '.join(CSV_COLUMNS[:11])}, ..."

    def columns(self, rows: slice = slice(None)) -> dict[str, npt.NDArray[Any]]:
        """The columns of the CSV file by name, of some rows."""
        wide = (
            self.ids[:, None],
            self.voxels[:, None],
            self.lo,
            self.hi,
            self.centroid,
            self.border.view(np.uint8),
            self.convergence,
            self.flow_error[:, None],
        )
        narrow = [block[rows, n] for block in wide for n in range(block.shape[1])]
        return dict(zip(CSV_COLUMNS, narrow, strict=True))


def measured(
    facts: InstanceTable,
    ends: EndTable,
    flow_error: npt.NDArray[np.float64],
    shape: tuple[int, ...],
) -> MeasuredInstances:
    """The table of instances, from the sums over all blocks of a volume of some shape."""
    whole = facts.take(slice(None))  # out of its files
    return MeasuredInstances(
        whole.ids,
        whole.voxels,
        whole.lo,
        whole.hi,
        whole.centres,
        whole.faces(shape),
        ends.means,
        flow_error,
    )


def save_measured(path: Path, table: MeasuredInstances) -> None:
    """Write a table as ``path.npz`` and, for people and spreadsheets, as ``path.csv``."""
    save_table(f"{path}.npz", **{f.name: getattr(table, f.name) for f in fields(table)})
    partial = Path(f"{path}.csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(_rows(table))
    os.replace(partial, f"{path}.csv")


def _rows(table: MeasuredInstances) -> Iterator[tuple[Any, ...]]:
    """Rows of plain numbers; floats are written with as many digits as give them back."""
    for first in range(0, len(table), ROWS):
        columns = table.columns(slice(first, first + ROWS))
        yield from zip(*(column.tolist() for column in columns.values()), strict=True)


def load_measured(path: Path) -> MeasuredInstances:
    """Read a table that `save_measured` wrote; ``path`` is without its ending."""
    return MeasuredInstances(**load_table(f"{path}.npz"))
