"""What is kept of a run, so that other thresholds give other labels without any tracking.

In ``evidence`` beside the labels: ``parts``, an array with the part of every voxel of the
foreground, and two tables: what is known of each part (size, box, coordinates, endpoints), and of
each two parts that touch or end close together. All three bear the fingerprint of the run that
made them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType, TopoError
from topo_dask.graph.contacts import Joins, all_joins
from topo_dask.kernels.tables import ContactTable, merge_contacts
from topo_dask.run.chain import Chain
from topo_dask.run.contacts import contact_tables, load_contacts
from topo_dask.run.files import load_array
from topo_dask.run.job import RunResult
from topo_dask.run.ledger import fingerprint
from topo_dask.run.merge import edges_in
from topo_dask.run.refine import added_up, columns_of, few
from topo_dask.storage import MARK, AnyArray, load_table, local_path, save_table

FOLDER = "evidence"
"""Its name in the output's group."""

_CONTACTS = tuple(ContactTable.__dataclass_fields__)


@dataclass(frozen=True)
class EvidenceTask:
    """One table of all joins."""

    contacts: tuple[Path, ...]
    edges: tuple[Path, ...]
    parts: Path
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


def keep_joins(task: EvidenceTask) -> int:
    """Stage evidence: the tables of all joins and of all parts; gives the number of joins."""
    contacts = merge_contacts([load_contacts(path) for path in task.contacts])
    parts, first, voxels = (
        load_array(task.parts / f"{name}.npy") for name in ("of-owner", "first", "voxels")
    )
    places = np.concatenate([np.zeros((0, 2), np.int64), *edges_in(task.edges, first)])
    joins = all_joins(contacts, parts[places], voxels)
    columns = {name: getattr(joins.contacts, name) for name in _CONTACTS}
    save_table(
        task.folder / "joins.npz",
        **columns,
        mean_dot=np.where(columns["area"] > 0, joins.contacts.mean_dot, np.nan),
        close=joins.close,
        fingerprint=task.fingerprint,
    )
    facts = columns_of(**added_up(task.sums))
    save_table(
        task.folder / "parts.npz", voxels=joins.voxels, fingerprint=task.fingerprint, **facts
    )
    return len(joins.close)


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
    task = EvidenceTask(tuple(paths), edges, chain.work / "parts", facts, folder, final)
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
