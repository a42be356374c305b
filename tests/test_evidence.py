"""The table of all joins, made by ranges of parts: as of all at once, in few bytes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from topo_dask.graph.contacts import NAME_BYTES, ROWS, memory_of_ranges, names_along
from topo_dask.graph.merge import numbers_in
from topo_dask.kernels.tables import ContactTable, merge_contacts
from topo_dask.run.contacts import contacts_in, load_contacts, save_contacts, under_names
from topo_dask.run.evidence import EvidenceTask, in_runs, joins_in, keep_joins
from topo_dask.run.files import load_array, load_table, save_array, save_pieces
from topo_dask.run.refine import save_sums
from topo_dask.storage import save_table

COLUMNS = tuple(ContactTable.__dataclass_fields__)


def some_contacts(rng: np.random.Generator, parts: int, size: int) -> ContactTable:
    """Contacts between some of 1..parts."""
    a, b = np.sort(rng.integers(1, parts + 1, (2, size)), axis=0).astype(np.uint64)
    return merge_contacts([ContactTable(a, b, *rng.integers(1, 9, (4, size))).take(a < b)])


def some_pairs(rng: np.random.Generator, parts: int, size: int) -> np.ndarray:
    """Pairs of different parts, in any order."""
    pairs = rng.integers(1, parts + 1, (size, 2)).astype(np.uint64)
    return pairs[pairs[:, 0] != pairs[:, 1]]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 40))
def test_joins_of_ranges_are_those_of_all_parts(seed: int, parts: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    contacts = [some_contacts(rng, parts, int(n)) for n in rng.integers(0, 20, 3)]
    close = [some_pairs(rng, parts, int(n)) for n in rng.integers(0, 20, 4)]
    known: dict[tuple[int, int], np.ndarray] = {}
    for table in contacts:
        values = np.stack([getattr(table, name) for name in COLUMNS[2:]], axis=1)
        for a, b, row in zip(table.a.tolist(), table.b.tolist(), values, strict=True):
            known[a, b] = known.get((a, b), 0) + row
    near = {tuple(sorted(pair)) for some in close for pair in some.tolist()}
    for pair in near:
        known.setdefault(pair, np.zeros(4, np.int64))
    found = list(joins_in(contacts, list(in_runs(close, rows)), rows))
    for n, name in enumerate(COLUMNS):
        column = np.concatenate([getattr(table, name) for table, _ in found])
        at = [pair[n] if n < 2 else known[pair][n - 2] for pair in sorted(known)]
        assert_array_equal(column, at)
    both = np.concatenate([flags for _, flags in found])
    assert both.tolist() == [pair in near for pair in sorted(known)]


def test_memory_of_joins_is_that_of_a_range(tmp_path: Path) -> None:
    """Of 8 tables of contacts in files, as many pairs, and the contacts between other names."""
    rng, parts, rows = np.random.default_rng(0), 100_000, 2**16
    tables, close = [], []
    for n in range(8):
        save_contacts(tmp_path / f"{n}.npy", some_contacts(rng, parts, 64_000))
        tables.append(load_contacts(tmp_path / f"{n}.npy", memory_map=True))
        (run,) = in_runs([some_pairs(rng, parts, 64_000)], 2**30)
        save_array(tmp_path / f"{n}-close.npy", run)
        close.append(load_array(tmp_path / f"{n}-close.npy", memory_map=True))
    names = rng.integers(0, parts // 3, parts + 1).astype(np.uint64)
    for make in (
        lambda: joins_in(tables, close, rows),
        lambda: contacts_in(tables, rows),
        lambda: contacts_in(under_names(tables, names, tmp_path / "renamed", rows), rows),
    ):
        tracemalloc.start()
        try:
            assert sum(1 for _ in make()) > 5
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < memory_of_ranges(2**40) / ROWS * rows


def test_memory_of_names_is_a_few_bytes_a_label() -> None:
    rng, count, block = np.random.default_rng(0), 1_000_000, 5_000
    pairs = (some_pairs(rng, count, block) for _ in range(count // block // 2))
    names_along([], 1)  # compiles
    tracemalloc.start()
    try:
        names, instances = names_along(pairs, count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(names) == count + 1
    assert 0 < instances == names.max() < count
    assert peak <= NAME_BYTES * count + 2**20


def test_a_table_is_written_in_pieces(tmp_path: Path) -> None:
    count, size = 40, 100_000
    pieces = ({"a": np.full(size, n), "b": np.arange(size) == n} for n in range(count))
    tracemalloc.start()
    try:
        assert save_pieces(tmp_path / "a.npz", pieces, tmp_path, more="told") == count * size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 18 * 2**20  # what is copied into the file at a time
    made = load_table(tmp_path / "a.npz")
    assert list(made) == ["a", "b", "more"]
    assert_array_equal(made["a"], np.repeat(np.arange(count), size))
    assert np.flatnonzero(made["b"]).tolist() == [n * size + n for n in range(count)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_evidence_of_no_parts_and_of_some(tmp_path: Path) -> None:
    """Files as the stages before leave them: parts that are close, or touch, or both."""
    for count in (0, 4):
        work, folder = tmp_path / f"{count}.work", tmp_path / f"{count}"
        roots = np.arange(count)
        edges = numbers_in(np.array([[2, 0], [1, 3]])[: count // 2], [(0, roots)])
        save_table(work / "together" / "0.npz", edges=edges)
        save_array(work / "parts" / "of-owner.npy", 1 + roots.astype(np.uint64))
        save_array(work / "parts" / "first.npy", np.array([0, count]))
        save_array(work / "parts" / "voxels.npy", 10 + roots)
        table = some_contacts(np.random.default_rng(1), 2, count)
        save_contacts(work / "contacts.npy", table)
        save_sums(work / "sums.npz")
        places = (work / "contacts.npy",), (work / "together" / "0.npz",), work
        joins = keep_joins(EvidenceTask(*places, (work / "sums.npz",), folder, "mark"))
        made, sizes = load_table(folder / "joins.npz"), load_table(folder / "parts.npz")
        assert list(made) == [*COLUMNS, "mean_dot", "close", "fingerprint"]
        assert sizes["voxels"].tolist() == [10, 11, 12, 13][:count]
        assert str(made["fingerprint"]) == str(sizes["fingerprint"]) == "mark"
        expected = [(1, 2), (1, 3), (2, 4)] if count else []
        assert list(zip(made["a"].tolist(), made["b"].tolist(), strict=True)) == expected
        assert made["close"].tolist() == [False, True, True][: len(expected)]
        assert np.isnan(made["mean_dot"]).tolist() == made["close"].tolist()
        assert joins == len(expected)
        types = [made[name].dtype.str for name in (*COLUMNS[:3], "mean_dot", "close")]
        assert types == ["<u8", "<u8", "<i8", "<f8", "|b1"]
