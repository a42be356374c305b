"""What is kept of a run, so that other thresholds give other labels without any tracking.

In ``evidence`` beside the labels: ``parts``, an array with the part of every voxel of the
foreground, and two tables: what is known of each part (size, box, coordinates, endpoints), and of
each two parts that touch or end close together. All three bear the fingerprint of the run that
made them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType, TopoError
from topo_dask.graph.contacts import ROWS, Joins, label_ranges, with_close
from topo_dask.kernels.tables import ContactTable
from topo_dask.run.chain import Chain
from topo_dask.run.contacts import contact_tables, load_contacts, rows_between
from topo_dask.run.files import load_array, save_array, save_pieces
from topo_dask.run.job import RunResult
from topo_dask.run.ledger import fingerprint
from topo_dask.run.merge import edges_in
from topo_dask.run.refine import added_up, columns_of, few
from topo_dask.storage import MARK, AnyArray, load_table, local_path, save_table

UInt64 = npt.NDArray[np.uint64]

FOLDER = "evidence"
"""Its name in the output's group."""

_CONTACTS = tuple(ContactTable.__dataclass_fields__)


@dataclass(frozen=True)
class EvidenceTask:
    """One table of all joins; ``work`` is where the parts are, and room for what is between."""

    contacts: tuple[Path, ...]
    edges: tuple[Path, ...]
    work: Path
    sums: tuple[Path, ...]
    folder: Path
    fingerprint: str

    def __str__(self) -> str:
        return "all joins"


@dataclass(frozen=True)
class Evidence:
    """The evidence of a run, opened and checked.

    Parameters
    ----------
    path
        Where the run's result is.
    labels
        The labels that the run made.
    parts
        ``[Z,Y,X]``, the part of every voxel of the foreground.
    joins, sizes
        Files of the tables.
    fingerprint
        Of the run.
    settings
        ``min_size``, ``group`` and ``blocks`` of the run.
    """

    path: Path
    labels: AnyArray
    parts: AnyArray
    joins: Path
    sizes: Path
    fingerprint: str
    settings: dict[str, Any]

    def load(self) -> Joins:
        """Read the tables."""
        columns = _columns(self.joins, (*_CONTACTS, "close"))
        table = ContactTable(*(columns[name] for name in _CONTACTS))
        return Joins(table, columns["close"], _columns(self.sizes, ("voxels",))["voxels"])


def in_runs(pairs: Iterable[UInt64], rows: int) -> Iterator[UInt64]:
    """Pairs that come in pieces, some ``rows`` at a time.

    Parameters
    ----------
    pairs
        uint64 ``[E,2]``.
    rows
        About how many at a time.

    Yields
    ------
    uint64 ``[2,E]``: the smaller of each pair first; these ascend.

    Examples
    --------
    >>> list(in_runs([np.array([[7, 2], [1, 9]], np.uint64)], 5))
    [array([[1, 2],
           [9, 7]], dtype=uint64)]
    """

    def ascending() -> UInt64:
        both = np.sort(np.concatenate([np.zeros((0, 2), np.uint64), *held]), axis=1)
        return np.ascontiguousarray(both[np.argsort(both[:, 0])].T)

    held: list[UInt64] = []
    room = rows
    for some in pairs:
        held.append(some)
        room -= len(some)
        if room <= 0:
            yield ascending()
            held, room = [], rows
    yield ascending()


def close_pairs(task: EvidenceTask) -> list[UInt64]:
    """Pairs of parts that are close, in files: see `in_runs`."""
    parts, first = (
        load_array(task.work / "parts" / f"{name}.npy", memory_map=True)
        for name in ("of-owner", "first")
    )
    found = []
    pairs = (parts[places] for places in edges_in(task.edges, first))
    for number, run in enumerate(in_runs(pairs, ROWS)):
        path = task.work / "close" / f"{number}.npy"
        save_array(path, run)
        found.append(load_array(path, memory_map=True))
    return found


def joins_in(
    contacts: Sequence[ContactTable], close: Sequence[UInt64], rows: int = ROWS
) -> Iterator[tuple[ContactTable, npt.NDArray[np.bool_]]]:
    """The table of all joins, those of a range of parts after the other, see `with_close`."""
    for low, end in label_ranges([*(t.a for t in contacts), *(pairs[0] for pairs in close)], rows):
        both = np.array([low, end], np.uint64)
        some = [pairs[:, slice(*np.searchsorted(pairs[0], both))] for pairs in close]
        yield with_close(rows_between(contacts, low, end), np.concatenate(some, axis=1).T)


def _columns_of_joins(
    table: ContactTable, close: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    columns = {name: getattr(table, name) for name in _CONTACTS}
    mean_dot = np.where(table.area > 0, table.mean_dot, np.nan)
    return {**columns, "mean_dot": mean_dot, "close": close}


def keep_joins(task: EvidenceTask) -> int:
    """Stage evidence: the tables of all joins and of all parts; gives the number of joins.

    Of the joins it holds those of a range of parts at a time.
    """
    contacts = [load_contacts(path, memory_map=True) for path in task.contacts]
    pieces = (_columns_of_joins(*some) for some in joins_in(contacts, close_pairs(task)))
    joins = save_pieces(task.folder / "joins.npz", pieces, task.work, fingerprint=task.fingerprint)
    voxels = load_array(task.work / "parts" / "voxels.npy", memory_map=True)
    facts = columns_of(**added_up(task.sums))
    save_table(task.folder / "parts.npz", voxels=voxels, fingerprint=task.fingerprint, **facts)
    return joins


def keep_evidence(
    chain: Chain,
    *,
    edges: tuple[Path, ...],
    flow: AnyArray,
    step_size: float,
    sums: list[Path],
    final: str,
    settings: dict[str, Any],
) -> None:
    """Write the evidence of a run, whose base is the array of parts, beside its labels.

    ``edges``: see `Merged.tables`; ``sums``: the files of each block with facts and endpoints of
    its parts.
    """
    base = chain.base
    paths, mark = contact_tables(chain, base.bare, flow=flow, step_size=step_size)
    folder = chain.run.output.beside(FOLDER)
    facts = few(chain, "parts", fingerprint(base.bare.mark, "parts"), sums)
    task = EvidenceTask(tuple(paths), edges, chain.work, facts, folder, final)
    chain.stage("evidence", fingerprint(mark, base.mark, final), keep_joins, [task])
    attributes: dict[str, Any] = {MARK: {"fingerprint": final, **settings}}
    base.array.update_attributes(attributes)
    group = zarr.open_group(
        store=str(folder),
        mode="a",
        zarr_format=chain.zarr_format,  # type: ignore[arg-type]
    )
    group.update_attributes(attributes)  # those of an attempt with other settings may be there


_DO = "Pass the output of segment(..., keep_evidence=True) (--keep-evidence)."


def _columns(table: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Some columns of a table; raises InputNotFound or InvalidData that names it."""
    try:
        return load_table(table, names)
    except TopoError as error:
        came = f"{str(table)!r}, which is damaged or gone"
        raise type(error)("source", came, "evidence as the run left it", _DO) from error


def _place_of(source: Any) -> Path:
    """Where a result is that is given as it is or by its path."""
    if isinstance(source, RunResult):
        return source.path
    if not isinstance(source, (str, os.PathLike)):
        came = f"an object of type {type(source).__name__}"
        raise InvalidType("source", came, "the result of a run, or its path", _DO)
    path = local_path(source)
    if path is None:
        allowed = "a path on a local or mounted file system"
        raise InvalidArgument("source", repr(os.fspath(source)), allowed, "Copy the result there.")
    return path


def open_evidence(source: Any) -> Evidence:
    """Open the evidence of a finished run, given its result or its path.

    Raises
    ------
    InvalidType, InvalidArgument
        Neither a result nor a path; a path elsewhere than on file systems of this machine.
    InputNotFound
        There is no result, or it was made without evidence.
    InvalidData
        Labels, parts and tables are not of one run; the fingerprints are named. Or tables are
        damaged.
    """
    path = _place_of(source)
    folder = path / FOLDER
    try:
        made: Any = zarr.open_group(store=str(path), mode="r").attrs[MARK]
        labels = zarr.open_array(store=str(path / "s0"), mode="r")
        parts = zarr.open_array(store=str(folder / "parts"), mode="r")
        kept: Any = parts.attrs[MARK]
        settings = {name: kept[name] for name in ("min_size", "group", "blocks")}
        own, found = str(made["fingerprint"]), {"parts": str(kept["fingerprint"])}
    except (OSError, KeyError, ValueError) as error:
        came = f"{str(path)!r}, where no evidence is"
        raise InputNotFound("source", came, "a result with its evidence", _DO) from error
    tables = {name: folder / f"{name}.npz" for name in ("joins", "parts")}
    for table in tables.values():
        found[table.name] = str(_columns(table, ("fingerprint",))["fingerprint"])
    for name, other in found.items():
        if other != own:
            raise InvalidData(
                "source",
                f"{str(folder / name)!r} of another run, with fingerprint {other}",
                f"what the run with fingerprint {own} made",
                _DO,
            )
    return Evidence(path, labels, parts, tables["joins"], tables["parts"], own, settings)
