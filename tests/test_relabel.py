"""Evidence of a run, and the labels that other thresholds, vetoes and forced joins make of it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import tree
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.cli import main
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.contacts import contacts_under
from topo_dask.kernels import reference
from topo_dask.kernels.tables import ContactTable
from topo_dask.run.execute import SyncEngine
from topo_dask.storage import load_table
from topo_dask.testing import block_shapes, flow_fields, segment_parameters

SHAPE = (3, 14, 16)


def flow_of(seed: int) -> np.ndarray:
    """Towards the nearest of some points, with noise: many clusters, small ones among them."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, SHAPE, size=(9, 3))
    towards = points[:, :, None, None, None] - np.indices(SHAPE)
    nearest = (towards**2).sum(axis=1).argmin(axis=0)
    flow = np.take_along_axis(towards, nearest[None, None], axis=0)[0]
    flow = flow + rng.normal(scale=0.4, size=flow.shape)
    return (flow / np.linalg.norm(flow, axis=0)).astype(np.float32)


RUN: dict[str, Any] = {
    "n_steps": 12,
    "step_size": 0.7,
    "convergence_radius": 1.5,
    "min_size": 3,
    "blocks": (3, 7, 6),
    "cluster": "sync",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for group in (1, 2):
        kept = {"group": group, "keep_evidence": True}
        topo_dask.segment(flow_of(1), folder / f"{group}.zarr", **kept, **RUN)
    topo_dask.segment(flow_of(2), folder / "other.zarr", keep_evidence=True, **RUN)
    topo_dask.segment(flow_of(1), folder / "bare.zarr", **RUN)
    return folder


def fresh(path: Path, **how: Any) -> np.ndarray:
    labels: np.ndarray = topo_dask.segment(flow_of(1), path, **{**RUN, **how}).array[...]
    return labels


def relabelled(source: Path, path: Path, **how: Any) -> np.ndarray:
    made = topo_dask.relabel(source, path, cluster="sync", **how)
    labels: np.ndarray = made.array[...]
    return labels


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{}, {"min_size": 9}, {"group": 1}, {"group": 2, "min_size": 1}, {"group": 3, "min_size": 12}],
    ids=str,
)
def test_relabelled_is_as_if_run_anew(
    runs: Path, run: int, how: dict[str, Any], tmp_path: Path
) -> None:
    options = {"cluster": "sync", "flows": flow_of(1), **how}
    made = topo_dask.relabel(runs / f"{run}.zarr", tmp_path / "new.zarr", **options)
    found = made.array[...]
    assert found.max() >= 2
    anew = topo_dask.segment(flow_of(1), tmp_path / "run.zarr", **{**RUN, "group": run, **how})
    assert_array_equal(found, anew.array[...])
    table, expected = made.instances.columns(), anew.instances.columns()
    where = [name for name in table if name.startswith("convergence")]
    for name in table.keys() - set(where):
        assert_array_equal(table[name], expected[name])
    parts = zarr.open_array(str(runs / f"{run}.zarr/evidence/parts"))[...]
    whole = ends_as_known(found, parts)
    assert whole.any()
    for name in where:
        assert_allclose(table[name][whole], expected[name][whole], atol=1e-6)
        assert_allclose(table[name], expected[name], atol=6)
    assert (tmp_path / "new.zarr/instances/table.csv").read_text().startswith("id,voxels,z_start")


def ends_as_known(labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """For each label whether it shares none of its parts with another."""
    pairs = np.unique(np.stack([parts[parts > 0], labels[parts > 0]]), axis=1)
    shared = pairs[0][1:][pairs[0][1:] == pairs[0][:-1]]
    alone = np.ones(int(labels.max()) + 1, dtype=bool)
    alone[pairs[1][np.isin(pairs[0], shared)].astype(int)] = False
    return alone[1:]


def test_without_flows_their_error_is_not_known(runs: Path, tmp_path: Path) -> None:
    for group in (1, 2, 3):
        out = tmp_path / f"{group}.zarr"
        made = topo_dask.relabel(runs / "1.zarr", out, group=group, cluster="sync")
        table = made.instances
        assert np.isnan(table.flow_error).all()
        labels = made.array[...]
        assert_array_equal(table.voxels, np.bincount(labels.ravel())[1:])
        found = [np.argwhere(labels == label) for label in table.ids]
        assert_allclose(table.centroid, [voxels.mean(axis=0) for voxels in found])
        assert_array_equal(table.lo, [voxels.min(axis=0) for voxels in found])


def test_relabelling_to_nothing_leaves_an_empty_table(runs: Path, tmp_path: Path) -> None:
    for group in (1, 2, 3):
        out, options = tmp_path / f"{group}.zarr", {"group": group, "min_size": 10**6}
        made = topo_dask.relabel(runs / "1.zarr", out, cluster="sync", **options)
        assert len(made.instances) == 0
        assert not made.array[...].any()


def test_keeping_evidence_changes_no_label(runs: Path) -> None:
    kept, bare = (zarr.open_array(str(runs / f"{n}.zarr/s0"))[...] for n in ("1", "bare"))
    assert_array_equal(kept, bare)


@settings(max_examples=15)
@given(data=st.data())
def test_relabelled_is_one_answer(data: st.DataObject) -> None:
    """For any blocks of the run and of the relabelling, and other least sizes and dot products."""
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    flow = data.draw(flow_fields(shape))
    how = {**data.draw(segment_parameters()), "group": 2}
    drawn = data.draw(block_shapes(shape))
    blocks = tuple(max(-(-n // 2), b) for b, n in zip(drawn, shape, strict=True))
    new = {
        "min_size": data.draw(st.integers(0, 4)),
        "min_dot": data.draw(st.sampled_from([0, 0.5])),
    }
    with tempfile.TemporaryDirectory() as path:
        made = topo_dask.segment(
            flow, Path(path, "a.zarr"), blocks=blocks, cluster="sync", keep_evidence=True, **how
        )
        labels = relabelled(made.path, Path(path, "b.zarr"), **new)
    settings_ = {k: v for k, v in {**how, **new}.items() if k not in ("group", "min_dot")}
    clusters = reference.segment_group1((flow != 0).any(axis=0), flow, **settings_)
    joined = reference.join_touching(clusters, flow, min_dot=new["min_dot"])
    assert_array_equal(labels, reference.split_disconnected(joined))


def test_the_tables_hold_every_contact(runs: Path) -> None:
    parts = zarr.open_array(str(runs / "2.zarr/evidence/parts"))[...]
    joins = load_table(runs / "2.zarr/evidence/joins.npz")
    table = reference.contacts(parts, reference.interleave(flow_of(1)), core=SHAPE, step_size=0.7)
    touch = joins["area"] > 0
    for name in ("a", "b", "area", "crossing"):
        assert_array_equal(joins[name][touch], getattr(table, name))
    assert_array_equal(joins["mean_dot"][touch], table.mean_dot)
    assert joins["crossing"].sum() > 0
    assert joins["close"].sum() > 2  # instances of several blocks
    assert np.isnan(joins["mean_dot"][~touch]).all()
    voxels = load_table(runs / "2.zarr/evidence/parts.npz")["voxels"]
    assert_array_equal(np.bincount(parts.ravel().astype(int))[1:], voxels)


@pytest.mark.parametrize("blocks", [SHAPE, (1, 14, 5)])
def test_contacts_of_clusters_do_not_depend_on_the_blocks(
    runs: Path, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    """Parts are those of blocks; what is known of two clusters that touch is not."""
    one = topo_dask.segment(
        flow_of(1), tmp_path / "a.zarr", **{**RUN, "blocks": blocks, "keep_evidence": True}
    )
    clusters = one.array[...].astype(np.uint64)
    tables = []
    for path in (runs / "2.zarr", one.path):
        parts = zarr.open_array(str(path / "evidence/parts"))[...]
        names = np.zeros(int(parts.max()) + 1, np.uint64)
        names[parts] = clusters
        joins = load_table(path / "evidence/joins.npz")
        columns = (joins[name] for name in ContactTable.__dataclass_fields__)
        tables.append(contacts_under(ContactTable(*columns), names))
    flow4 = reference.interleave(flow_of(1))
    expected = reference.contacts(clusters, flow4, core=SHAPE, step_size=RUN["step_size"])
    assert len(expected) > 3
    for table in tables:
        for name in (*ContactTable.__dataclass_fields__, "mean_dot"):
            assert_array_equal(getattr(table, name), getattr(expected, name))


def test_a_vetoed_and_a_forced_join(runs: Path, tmp_path: Path) -> None:
    source = runs / "1.zarr"
    parts = zarr.open_array(str(source / "evidence/parts"))[...]
    joins = load_table(source / "evidence/joins.npz")
    pairs = np.stack([joins["a"], joins["b"]], axis=1)[joins["close"]].tolist()
    before = relabelled(source, tmp_path / "before.zarr", min_size=1)

    # All joins of one part by the radius: it is alone then.
    part = pairs[0][0]
    veto = [pair for pair in pairs if part in pair]
    after = relabelled(source, tmp_path / "veto.zarr", min_size=1, veto=veto)
    assert len(np.unique(after[parts == part])) == 1
    assert set(np.unique(parts[after == after[parts == part][0]]).tolist()) == {part}
    assert after.max() > before.max()

    one, two = parts[before == 1][0], parts[before == 2][0]
    forced = relabelled(source, tmp_path / "force.zarr", min_size=1, force=[(two, one)])
    assert_array_equal(forced, np.where(before > 1, before - 1, before))


def test_the_command(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.zarr"
    options = ["--min-size", "0", "--group", "2", "--min-dot", "0.3", "--min-area", "2"]
    command = ["relabel", str(runs / "1.zarr"), str(out), *options, "--cluster", "sync"]
    done = CliRunner().invoke(main, [*command, "--force", "1,2", "--no-progress"])
    assert done.exit_code == 0, done.output
    how = {"min_size": 0, "group": 2, "min_dot": 0.3, "min_area": 2, "force": [(1, 2)]}
    expected = relabelled(runs / "1.zarr", tmp_path / "same.zarr", **how)
    assert_array_equal(zarr.open_array(str(out / "s0"))[...], expected)


@pytest.mark.parametrize("name", ["joins.npz", "parts.npz", "parts"])
def test_tables_of_another_run_are_refused(runs: Path, name: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.zarr"
    shutil.copytree(runs / "1.zarr", mixed)
    target = mixed / "evidence" / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    source = runs / "other.zarr" / "evidence" / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    marks = [
        zarr.open_group(str(runs / run)).attrs["topo_dask"]["fingerprint"]
        for run in ("1.zarr", "other.zarr")
    ]
    with pytest.raises(InvalidData, match=f"(?s){name}.*fingerprint {marks[1]}.*{marks[0]}"):
        topo_dask.relabel(mixed, tmp_path / "new.zarr", cluster="sync")
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(
    ("source", "how", "error", "text"),
    [
        ("bare.zarr", {}, InputNotFound, "keep_evidence=True"),
        ("nothing.zarr", {}, InputNotFound, "nothing.zarr"),
        ("1.zarr", {"veto": [(1, 10**6)]}, InvalidArgument, "numbers of parts, 1 to"),
        ("1.zarr", {"force": [(1, 1)]}, InvalidArgument, "force"),
        ("1.zarr", {"force": [(1, 0)]}, InvalidArgument, "force"),
        ("1.zarr", {"force": [(1, 2, 3)]}, InvalidArgument, "force"),
        ("1.zarr", {"veto": [(1, 2.5)]}, InvalidType, "veto"),
        ("1.zarr", {"veto": 7}, InvalidType, "veto"),
        ("1.zarr", {"min_dot": float("nan")}, InvalidArgument, "min_dot"),
        ("1.zarr", {"min_area": 0}, InvalidArgument, "min_area"),
        ("1.zarr", {"min_size": -1}, InvalidArgument, "min_size"),
        ("1.zarr", {"group": 7}, InvalidArgument, "group"),
        ("1.zarr", {"min_dot": 0.5}, InvalidArgument, "min_dot: got 0.5 in group 1"),
        ("2.zarr", {"min_area": 2, "group": 3}, InvalidArgument, "min_area: got 2 in group 3"),
        ("1.zarr", {"veto": [(1, 2)], "force": [(2, 1)]}, InvalidArgument, "vetoed too"),
        ("1.zarr", {"scale": 127}, InvalidArgument, "scale: got 127 without flows"),
        ("1.zarr", {"flows": np.zeros((3, 2, 2, 2), "f4")}, InvalidArgument, "shape of source"),
        ("1.zarr", {"flows": np.zeros((3, *SHAPE), "i1")}, InvalidType, "scale"),
    ],
)
def test_bad_input(
    runs: Path, source: str, how: dict[str, Any], error: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        topo_dask.relabel(runs / source, tmp_path / "new.zarr", cluster="sync", **how)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (5, InvalidType, "source: got an object of type int"),
        (np.zeros((2, 2, 2), int), InvalidType, "type ndarray"),
        ("s3://bucket/a.zarr", InvalidArgument, "source: got 's3://bucket/a.zarr'"),
    ],
)
def test_sources_that_are_none(source: Any, error: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        topo_dask.relabel(source, tmp_path / "new.zarr", cluster="sync")


@pytest.mark.parametrize("name", ["joins.npz", "parts.npz"])
@pytest.mark.parametrize("how", ["gone", "cut", "another table"])
def test_tables_that_are_damaged(runs: Path, name: str, how: str, tmp_path: Path) -> None:
    source = tmp_path / "damaged.zarr"
    shutil.copytree(runs / "1.zarr", source)
    table = source / "evidence" / name
    if how == "cut":
        table.write_bytes(table.read_bytes()[:99])
    else:
        table.unlink()
    if how == "another table":
        np.savez(table, a=[1])
    with pytest.raises((InputNotFound, InvalidData), match=f"source: got .*{name}.*keep_evidence"):
        topo_dask.relabel(source, tmp_path / "new.zarr", cluster="sync")
    assert not (tmp_path / "new.zarr").exists()


def test_nothing_is_written_into_the_source(runs: Path, tmp_path: Path) -> None:
    before = tree(runs / "1.zarr")
    for place, how in (("1.zarr", "equal to"), ("1.zarr/new.zarr", "inside")):
        with pytest.raises(InvalidArgument, match=f"output: got .*{how} the input"):
            topo_dask.relabel(runs / "1.zarr", runs / place, overwrite=True, cluster="sync")
    assert tree(runs / "1.zarr") == before


def test_a_shape_of_blocks_may_be_an_array(runs: Path, tmp_path: Path) -> None:
    made = topo_dask.relabel(
        f"file://{runs / '1.zarr'}", tmp_path / "a.zarr", blocks=np.array([2, 9, 4]), cluster="sync"
    )
    assert_array_equal(made.array[...], zarr.open_array(str(runs / "1.zarr/s0"))[...])


def test_a_veto_needs_a_join(runs: Path, tmp_path: Path) -> None:
    joins = load_table(runs / "1.zarr/evidence/joins.npz")
    known = set(zip(joins["a"].tolist(), joins["b"].tolist(), strict=True))
    count = len(load_table(runs / "1.zarr/evidence/parts.npz")["voxels"])
    pair = next((1, n) for n in range(2, count + 1) if (1, n) not in known)
    with pytest.raises(InvalidArgument, match="parts that touch or are close"):
        topo_dask.relabel(runs / "1.zarr", tmp_path / "new.zarr", veto=[pair], cluster="sync")


def test_a_finished_relabelling_returns_at_once(runs: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"min_size": 2, "cluster": "sync", "resume": True}
    first = topo_dask.relabel(runs / "2.zarr", tmp_path / "new.zarr", **how)
    again = topo_dask.relabel(runs / "2.zarr", tmp_path / "new.zarr", **how)
    assert first.seconds > 0
    assert again.seconds == 0


class Halting(SyncEngine):
    """Runs until a stage has done some of its blocks, and then no more."""

    def __init__(self, stage: str, after: int) -> None:
        super().__init__()
        self.stage, self.after = stage, after
        self.stages: list[str] = []

    def run(self, stage: str, function: Any, items: Any, **options: Any) -> Any:
        self.stages.append(stage)
        for done, result in enumerate(super().run(stage, function, items, **options)):
            if stage == self.stage and done == self.after:
                raise KeyboardInterrupt
            yield result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    path = tmp_path_factory.mktemp("undisturbed") / "a.zarr"
    engine = Halting("none", 0)
    how: dict[str, Any] = {**RUN, "cluster": engine, "group": 2, "keep_evidence": True}
    topo_dask.segment(fragments(), path, **how)
    return tree(path), engine.stages


def fragments() -> np.ndarray:
    """A flow whose instances have small pieces apart from large ones."""
    flow = flow_of(1)
    flow[:, :, :, ::5] = 0
    flow[:, :, ::6] = 0
    return flow


AFTER = ("labels", "contacts", "evidence", "join", "pieces", "faces", "plan", "split", "absorb")


def test_every_stage_of_group_2_is_halted(undisturbed: tuple[Any, list[str]]) -> None:
    merged = undisturbed[1].index("labels")
    assert undisturbed[1][merged : merged + 10] == [*AFTER, "fill"]


@pytest.mark.parametrize("stage", [*AFTER, "fill"])
def test_a_halted_run_of_group_2_goes_on(
    undisturbed: tuple[dict[str, bytes], list[str]], stage: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.zarr"
    how: dict[str, Any] = {**RUN, "group": 2, "keep_evidence": True}
    with pytest.raises(KeyboardInterrupt):
        topo_dask.segment(fragments(), path, **{**how, "cluster": Halting(stage, 0)})
    assert not path.exists()
    topo_dask.segment(fragments(), path, resume=True, **how)
    assert tree(path) == undisturbed[0]


@pytest.mark.parametrize("group", [1, 2])
def test_a_run_goes_on_with_another_least_size(group: int, tmp_path: Path) -> None:
    """Contacts are those of parts: they are found once. What is published tells the new size."""
    path, how = tmp_path / "a.zarr", {**RUN, "group": group, "keep_evidence": True}
    with pytest.raises(KeyboardInterrupt):
        topo_dask.segment(flow_of(1), path, **{**how, "cluster": Halting("write", 0)})
    how |= {"min_size": 9}
    engine = Halting("none", 0)
    topo_dask.segment(flow_of(1), path, resume=True, **{**how, "cluster": engine})
    assert not {"labels", "contacts"} & set(engine.stages)
    assert {"number", "evidence"} <= set(engine.stages)
    anew = Path(tmp_path, "anew") / "a.zarr"
    topo_dask.segment(flow_of(1), anew, **how)
    assert tree(path) == tree(anew)


def test_a_run_goes_on_with_and_without_evidence(
    undisturbed: tuple[dict[str, bytes], list[str]], tmp_path: Path
) -> None:
    """What was kept by halves does not count, nor is it published."""
    path = tmp_path / "a.zarr"
    how: dict[str, Any] = {**RUN, "group": 2}
    for number, kept in enumerate([False, True, False, True]):
        halted = {
            **how,
            "keep_evidence": kept,
            "cluster": Halting("labels", 1),
            "resume": number > 0,
        }
        with pytest.raises(KeyboardInterrupt):
            topo_dask.segment(fragments(), path, **halted)
    bare = tmp_path / "bare.zarr"
    shutil.copytree(tmp_path / "a.zarr.work", tmp_path / "bare.zarr.work")
    (tmp_path / "bare.zarr.work" / "lock.json").unlink(missing_ok=True)
    topo_dask.segment(fragments(), bare, resume=True, **how)
    assert not (bare / "evidence").exists()
    topo_dask.segment(fragments(), path, resume=True, keep_evidence=True, **how)
    assert tree(path) == undisturbed[0]
    assert_array_equal(
        zarr.open_array(str(bare / "s0"))[...], zarr.open_array(str(path / "s0"))[...]
    )
