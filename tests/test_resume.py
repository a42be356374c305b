"""Runs that are killed, and go on: the same bytes, and only what was under way is done again.

The runs are real processes that are really killed, or halted while others look at what they do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from killing import Process, killed_at, lines_of, process_of, stages_done, tree, wait_for

import topo_dask
from topo_dask.errors import DamagedFile, OutputExists, RunInProgress, TaskFailed
from topo_dask.run.damage import Stages
from topo_dask.run.execute import WINDOW, Engine, PoolEngine, open_engine
from topo_dask.run.files import input_mark
from topo_dask.storage import create_array
from topo_dask.testing import synthetic_tissue

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

BLOCKS = (8, 4, 8)
SHAPE = (16, 24, 16)
N_BLOCKS = 2 * 6 * 2
SETTINGS: dict[str, dict[str, Any]] = {
    "flows": {"n_iter": 30, "blocks": BLOCKS},
    "segment": {"n_steps": 12, "min_size": 5, "halo": 1, "blocks": BLOCKS},
}
SLOW: dict[str, Any] = {"n_iter": 1500, "adaptive_iters": False}  # enough to be caught at it


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    labels = synthetic_tissue(SHAPE, n_instances=30, seed=4)
    store(folder / "labels.zarr", labels)
    topo_dask.flows(folder / "labels.zarr", folder / "flow.zarr", n_iter=30, cluster="sync")
    return {"flows": folder / "labels.zarr", "segment": folder / "flow.zarr"}


@pytest.fixture(scope="module")
def expected(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, bytes]]:
    """The files of a run that nothing disturbed."""
    known: dict[str, dict[str, bytes]] = {}

    def files(run: str, **options: Any) -> dict[str, bytes]:
        key = json.dumps([run, options])
        if key not in known:
            out = tmp_path_factory.mktemp("expected") / "out.zarr"
            call(run, inputs, out, **options)
            known[key] = tree(out)
        return known[key]

    return files


def store(path: Path, values: np.ndarray) -> Path:
    chunks = tuple(min(8, n) for n in values.shape)
    create_array(path, values.shape, chunks, values.dtype)[...] = values
    return path


def call(run: str, inputs: dict[str, Path], out: Path, **options: Any) -> Any:
    options = {"cluster": "sync", **SETTINGS[run], **options}
    return getattr(topo_dask, run)(inputs[run], out, **options)


# ------------------------------------------------------------------------- looking at the work


def started(
    run: str, inputs: dict[str, Path], out: Path, **options: Any
) -> AbstractContextManager[Process]:
    """A run in a process of its own, which is gone in the end."""
    return process_of(call, run, inputs, out, **options)


def send(process: Process, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def kill_at(run: str, inputs: dict[str, Path], out: Path, stage: str, **options: Any) -> int:
    """Kill a run when some blocks of a stage are done; give how many were in the end."""
    return killed_at(stage, 5, out, call, run, inputs, out, **options)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class Stopped(Exception):
    """Some blocks of a stage are done."""


class StoppedIn(Engine):
    """Another engine, which stops in the middle of a stage."""

    def __init__(self, inner: Engine, stage: str) -> None:
        super().__init__(inner.name, inner.slots)
        self.inner, self.stage = inner, stage

    def _completed(self, function: Any, items: Any) -> Iterator[Any]:
        return self.inner._completed(function, items)

    def run(self, stage: str, function: Any, items: Any, **options: Any) -> Iterator[Any]:
        for done, found in enumerate(self.inner.run(stage, function, items, **options)):
            if stage == self.stage and done >= min(5, len(items) - 1):
                raise Stopped
            yield found


# ------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    ("run", "stage", "options"),
    [
        ("flows", "table", {}),
        ("flows", "flows", {"cluster": "processes"}),
        ("flows", "flows", {"overlap": 4, "cluster": "threads"}),
        ("flows", "fuse", {"overlap": 4}),
        ("flows", "round-2", {"rounds": 8, "cluster": "threads"}),
        ("flows", "schwarz-3", {"potential": "poisson", "cluster": "threads"}),
        ("segment", "track", {"cluster": "threads"}),
        ("segment", "track-2", {}),
        ("segment", "cells", {"cluster": "processes"}),
        ("segment", "edges", {}),
        ("segment", "labels", {"cluster": "local"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_a_killed_run_goes_on(
    inputs: dict[str, Path],
    expected: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: str,
    stage: str,
    options: dict[str, Any],
) -> None:
    out = tmp_path / "out.zarr"
    done = kill_at(run, inputs, out, stage, **options)
    assert not out.exists()
    work = out.with_name("out.zarr.work")
    ledger = {file.stem: lines_of(out, file.stem) for file in (work / "ledger").iterdir()}
    with pytest.raises(OutputExists, match="unfinished work"):
        call(run, inputs, out)

    call(run, inputs, out, resume=True, progress=True, **{**options, "cluster": "sync"})
    again = stages_done(capsys.readouterr().err)
    # What stood in the ledger is not done again; so at most what was under way is.
    some = stage in ("edges", "track-2", "round-2", "schwarz-3")
    total = done + again.get(stage, 0) if some else N_BLOCKS
    assert done + again.get(stage, 0) == total
    for finished in ledger.keys() - {stage}:
        assert finished not in again
    assert tree(out) == expected(
        run, **{name: value for name, value in options.items() if name != "cluster"}
    )
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_under_way_is_little(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Chunks on disk that the ledger lacks are those of tasks in flight."""
    out = tmp_path / "out.zarr"
    done = kill_at("flows", inputs, out, "flows", cluster="threads")
    result = tmp_path / "out.zarr.work" / "result"
    chunks = [p for p in result.rglob("*") if p.is_file() and p.name.isdigit()]
    empty = sum(
        not zarr.open_array(str(inputs["flows"]), mode="r")[r.slices].any()
        for r in topo_dask.grid.BlockGrid(SHAPE, BLOCKS)
    )
    assert len(chunks) <= done + WINDOW * len(os.sched_getaffinity(0))
    assert done <= len(chunks) + empty


@pytest.mark.parametrize("cluster", ["processes", "local"])
def test_no_process_is_left_of_a_killed_run(
    inputs: dict[str, Path], tmp_path: Path, cluster: str
) -> None:
    out = tmp_path / "out.zarr"
    with started("flows", inputs, out, cluster=cluster, **SLOW) as process:
        wait_for(process, lambda: lines_of(out, "flows") >= 1)
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        )
        children = [int(pid) for pid in found.stdout.split()]
        assert len(children) >= 2
        process.kill()
    until = time.monotonic() + 60
    while not all(map(gone, children)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_twice_killed(
    inputs: dict[str, Path],
    expected: Callable[..., dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """And with a ledger whose last line was cut off in the middle."""
    out = tmp_path / "out.zarr"
    kill_at("segment", inputs, out, "track")
    kill_at("segment", inputs, out, "cells", resume=True)
    file = tmp_path / "out.zarr.work" / "ledger" / "cells.jsonl"
    *whole, last = file.read_text().splitlines()
    file.write_text("\n".join([*whole, last[: len(last) // 2]]))
    call("segment", inputs, out, resume=True)
    assert tree(out) == expected("segment")


def test_a_worker_that_dies_fails_the_run_which_goes_on(
    inputs: dict[str, Path], expected: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    with open_engine("processes") as engine:
        assert isinstance(engine, PoolEngine)
        list(engine.run("warm up", abs, [1, 2]))  # the processes are there
        pool: Any = engine.pool

        def kill_one() -> None:
            while lines_of(out, "flows") < 3 and not out.exists():
                time.sleep(0.001)
            os.kill(next(iter(pool._processes)), signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        with pytest.raises(TaskFailed, match=r"stage flows, block \[.*resume=True"):
            call("flows", inputs, out, cluster=engine, **SLOW)
        killer.join()
    assert not out.exists()
    done = lines_of(out, "flows")
    assert done >= 3
    call("flows", inputs, out, resume=True, **SLOW)
    assert tree(out) == expected("flows", **SLOW)


def test_a_dask_worker_that_dies_is_made_up_for(
    inputs: dict[str, Path], expected: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    """The scheduler gives its tasks to another: nobody notices."""
    out = tmp_path / "out.zarr"
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))

        def kill_one() -> None:
            while lines_of(out, "flows") < 3 and not out.exists():
                time.sleep(0.001)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        call("flows", inputs, out, cluster=client, **SLOW)
        killer.join()
        assert gone(victim)
    assert tree(out) == expected("flows", **SLOW)


# ------------------------------------------------------------------------------ damaged scratch


@pytest.mark.parametrize(
    ("run", "options", "killed_in", "file", "again"),
    [
        ("segment", {}, "number", "cells/7.npz", {"cells": 1}),
        ("segment", {}, "cells", "begun/7.npz", {"track": 1}),
        ("segment", {}, "labels", "index/7.npy", {"track": 1}),
        ("segment", {"group": 3}, "measure", "ends/7.npy", {"track": 1}),
        ("segment", {"group": 3}, "orphans", "parts/parts/c/1/3/1", {"labels": 1}),
        ("segment", {"group": 2}, "measure", "steps/split.zarr/c/1/3/1", {"split": 1}),
        ("flows", {"overlap": 4}, "fuse", "tiles/20.npy", {"flows": 1}),
        ("flows", {"overlap": 4}, "flows", "instances/hi.npy", {"facts": 1}),
        ("flows", {"rounds": 8}, "round-3", "rounds-*/after-16/12.npy", None),
        ("flows", {"potential": "poisson"}, "schwarz-3", "rounds-*/12/*.npy", None),
    ],
    ids=str,
)
def test_damaged_scratch_is_made_again_and_no_more(
    inputs: dict[str, Path],
    expected: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: str,
    options: dict[str, Any],
    killed_in: str,
    file: str,
    again: dict[str, int] | None,
) -> None:
    """Where what went before it is removed already, it is made from the beginning."""
    out, told = tmp_path / "out.zarr", ""
    with open_engine("sync") as engine, pytest.raises(Stopped):
        call(run, inputs, out, cluster=StoppedIn(engine, killed_in), **options)
    damaged = list(out.with_name("out.zarr.work").glob(file))
    assert damaged
    for path in damaged:
        os.truncate(path, path.stat().st_size // 3)
    for _ in range(3):
        try:
            call(run, inputs, out, resume=True, progress=True, **options)
            break
        except DamagedFile as error:
            told = str(error)
    assert "resume=True" in told
    if again is not None:
        assert stages_done(capsys.readouterr().err).items() >= again.items()
    assert tree(out) == expected(run, **options)


def test_what_others_may_have_read_in_between_is_all_made_again() -> None:
    kinds = {
        "track": {"ends/#.npy", "mask/#.npy"},
        "cells": {"index/#.npy", "cells/#.npz"},
        "split": {"split.zarr"},
        "absorb": {"found/#.npz"},
        "fill": {"split.zarr"},
        "write": {"s0"},
    }
    stages = Stages(Path(), tuple(kinds), kinds)
    assert stages.again([0], whole=False) == {0: False}
    assert stages.again([1], whole=True) == {1: True}
    whole = {2: True, 3: True, 4: True}
    assert all(stages.again([n], whole=False) == whole for n in whole)
    assert stages.again([5], whole=False) == {5: False}
    assert stages.again([0, 3], whole=False) == {0: False} | whole


# ----------------------------------------------------------------------------- changed settings


@pytest.fixture(scope="module")
def almost(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were killed in their last stage."""
    folder = tmp_path_factory.mktemp("almost")
    kill_at("flows", inputs, folder / "flows.zarr", "flows")
    kill_at("segment", inputs, folder / "segment.zarr", "write")
    return {run: folder / f"{run}.zarr.work" for run in ("flows", "segment")}


LAST = {"facts", "write", "table"}
MERGE = {"cells", "own", "edges", "number", "labels"} | LAST
TRACK = {"track", *(f"track-{n}" for n in range(2, 40))}


@pytest.mark.parametrize(
    ("run", "changed", "redone"),
    [
        ("segment", {}, set()),
        ("segment", {"convergence_radius": 3.0}, MERGE | TRACK),
        ("segment", {"min_size": 40}, {"number"} | LAST),
        ("segment", {"flow_error_threshold": 0.3}, {"errors", "check", "write", "table"}),
        ("segment", {"fill_holes": True}, {"background", "hole-edges", "holes", "write", "table"}),
        ("segment", {"group": 3}, {"orphans", "measure"} | MERGE | TRACK),
        ("segment", {"n_steps": 25}, MERGE | TRACK),
        ("segment", {"step_size": 0.7}, MERGE | TRACK),
        ("segment", {"threshold": 0.5}, MERGE | TRACK),
        ("segment", {"blocks": (8, 8, 8)}, MERGE | TRACK),
        ("segment", {"zarr_format": 2}, {"write", "table"}),
        ("flows", {}, set()),
        ("flows", {"n_iter": 20}, {"flows"}),
        ("flows", {"potential": "heat"}, {"flows"}),
        ("flows", {"dtype": "float16"}, {"flows"}),
        ("flows", {"overlap": 4}, {"flows", "fuse"}),
        ("flows", {"rounds": 8}, {"round-1", "round-2", "round-3", "round-4", "flows"}),
        ("flows", {"method": "direct"}, {"flows"}),
        ("flows", {"blocks": (24, 6, 8)}, {"table", "facts", "flows"}),
        ("flows", {"zarr_format": 2}, {"flows"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_changed_setting_does_again_what_it_touches(
    inputs: dict[str, Path],
    almost: dict[str, Path],
    expected: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: str,
    changed: dict[str, Any],
    redone: set[str],
) -> None:
    out = tmp_path / "out.zarr"
    shutil.copytree(almost[run], tmp_path / "out.zarr.work")
    last = "flows" if run == "flows" else "write"
    left = N_BLOCKS - lines_of(out, last)
    call(run, inputs, out, resume=True, progress=True, **changed)
    done = stages_done(capsys.readouterr().err)
    if redone:
        assert done.keys() - TRACK == redone - TRACK
        assert bool(done.keys() & TRACK) == bool(redone & TRACK)
        whole = topo_dask.grid.BlockGrid(SHAPE, changed.get("blocks", BLOCKS))
        assert done[last] == len(whole)
    else:
        table = {"table": 1} if run == "segment" else {}
        assert done == ({last: left} if left else {}) | table
    again = tmp_path / "again" / "out.zarr"
    call(run, inputs, again, **changed)
    assert tree(out) == tree(again)


@pytest.mark.parametrize("lost", ["result", "identity*"])
@pytest.mark.parametrize("run", ["flows", "segment"])
def test_a_lost_result_is_written_anew(
    inputs: dict[str, Path],
    almost: dict[str, Path],
    expected: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    run: str,
    lost: str,
) -> None:
    """The ledger says that blocks are written, but the array that they were written to is gone."""
    out, work = tmp_path / "out.zarr", tmp_path / "out.zarr.work"
    shutil.copytree(almost[run], work)
    found = list(work.glob(lost))
    assert found
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    call(run, inputs, out, resume=True)
    assert tree(out) == expected(run)


def test_a_changed_input_is_noticed(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = zarr.open_array(str(inputs["segment"]), mode="r")[...]
    source = {**inputs, "segment": store(tmp_path / "flow.zarr", flow)}
    out = tmp_path / "out.zarr"
    kill_at("segment", source, out, "cells")
    flow[:, :8] = flow[:, 8:]
    zarr.open_array(str(source["segment"]), mode="r+")[...] = flow
    call("segment", source, out, resume=True, progress=True)
    assert stages_done(capsys.readouterr().err)["track"] == N_BLOCKS
    call("segment", source, tmp_path / "again" / "out.zarr")
    assert tree(out) == tree(tmp_path / "again" / "out.zarr")


def test_a_chunk_put_back_from_a_copy_is_a_change(tmp_path: Path) -> None:
    """Also where it is as long as the one before and older than others."""
    path = store(tmp_path / "a.zarr", np.ones((8, 8, 24), np.uint8))
    array = zarr.open_array(str(path), mode="r")
    before = input_mark(array)
    assert input_mark(zarr.open_array(str(path), mode="r")) == before
    chunk = next(p for p in sorted((path / "c").rglob("*")) if p.is_file())
    written = chunk.stat().st_mtime_ns
    os.utime(chunk, ns=(written, written - 10**10))
    assert input_mark(array) != before


@pytest.mark.parametrize("kind", [np.asarray, lambda a: da.from_array(a, chunks=7)])
def test_inputs_in_memory_are_kept_for_a_resumed_run(tmp_path: Path, kind: Any) -> None:
    """Also where the run ended while it copied them."""
    labels = synthetic_tissue(SHAPE, n_instances=30, seed=4).astype(np.int64)
    bad = labels.copy()
    bad[-1, -1, -1] = -1
    out = tmp_path / "out.zarr"
    options: dict[str, Any] = {**SETTINGS["flows"], "cluster": "sync"}
    lazy = da.from_array(bad, chunks=7)
    with pytest.raises(ValueError, match="negative"):
        topo_dask.flows(lazy, out, **options)
    copies = tmp_path / "out.zarr.work" / "inputs"
    (copy,) = copies.iterdir()
    copy.rename(copy.with_name(f"{copy.name}.partial"))
    with pytest.raises(ValueError, match="negative"):
        topo_dask.flows(lazy, out, resume=True, **options)
    assert list(copies.iterdir()) == [copy]
    made = topo_dask.flows(kind(labels), out, resume=True, **options)
    np.testing.assert_array_equal(
        made.array[...], topo_dask.generate_diffusion_flows(labels, n_iter=30)
    )


# ----------------------------------------------------------------------------------- finished


@pytest.mark.parametrize("run", ["flows", "segment"])
def test_a_finished_run_returns_at_once(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    out = tmp_path / "out.zarr"
    first = call(run, inputs, out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    # Nothing is started either: there is no scheduler at this address.
    again = call(run, inputs, out, resume=True, progress=True, cluster="tcp://127.0.0.1:9")
    assert stages_done(capsys.readouterr().err) == {}
    assert (again.seconds, again.path) == (0, first.path)
    assert "was there already" in repr(again)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
    np.testing.assert_array_equal(again.array[...], first.array[...])
    # Other settings make another result: it takes the place of the first only if asked to.
    changed = {"flows": {"n_iter": 3}, "segment": {"min_size": 1000}}[run]
    with pytest.raises(OutputExists, match="other settings"):
        call(run, inputs, out, resume=True, **changed)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
    call(run, inputs, out, overwrite=True, **changed)
    call(run, inputs, tmp_path / "other" / "out.zarr", **changed)
    assert tree(out) == tree(tmp_path / "other" / "out.zarr")


# ------------------------------------------------------------------------------- two at a time


@pytest.mark.parametrize("run", ["flows", "segment"])
def test_two_runs_on_one_output(
    inputs: dict[str, Path], expected: Callable[..., dict[str, bytes]], tmp_path: Path, run: str
) -> None:
    """The second is refused, whatever it was to do, and the first never notices."""
    out = tmp_path / "out.zarr"
    stage, slow = {"flows": ("flows", SLOW), "segment": ("track", {})}[run]
    with started(run, inputs, out, **slow) as process:
        wait_for(process, lambda: lines_of(out, stage) >= 3)
        send(process, signal.SIGSTOP)
        before = tree(tmp_path)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            for work_dir in (None, tmp_path / "elsewhere"):
                with pytest.raises(RunInProgress) as caught:
                    call(run, inputs, out, work_dir=work_dir, **options)
                assert f"process {process.pid} on host {socket.gethostname()}" in str(caught.value)
        assert tree(tmp_path) == before
        send(process, signal.SIGCONT)
        process.join()
        assert process.exitcode == 0
    assert tree(out) == expected(run, **slow)
    assert list(tmp_path.iterdir()) == [out]


def test_two_outputs_of_one_name_share_no_work_directory(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    options = {"work_dir": str(tmp_path / "work")}
    with started("flows", inputs, tmp_path / "a" / "out.zarr", **options, **SLOW) as process:
        ledger = tmp_path / "work" / "out.zarr"  # as if it were an output
        wait_for(process, lambda: lines_of(ledger, "flows") >= 3)
        send(process, signal.SIGSTOP)
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunInProgress, match=str(process.pid)):
                call("flows", inputs, tmp_path / "b" / "out.zarr", **options, **more)
        send(process, signal.SIGCONT)
        process.join()
        assert process.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "work"]


def test_a_lock_of_the_dead_is_taken_over(
    inputs: dict[str, Path], almost: dict[str, Path], tmp_path: Path
) -> None:
    """Killed runs above leave theirs; here its number is that of another process by now."""
    out = tmp_path / "out.zarr"
    shutil.copytree(almost["flows"], tmp_path / "out.zarr.work")
    lock = tmp_path / "out.zarr.work" / "lock.json"
    left = json.loads(lock.read_text())
    assert left["host"] == socket.gethostname()
    if left["since"] is None:
        pytest.skip("this system does not tell when a process began")
    lock.write_text(json.dumps({**left, "pid": os.getpid()}))
    call("flows", inputs, out, resume=True)
    assert out.exists()


@pytest.mark.parametrize("written", ['{"host": "elsewhere", "pid": 1, "since": "9"}', "", "{"])
def test_a_lock_that_may_be_alive_is_respected(
    inputs: dict[str, Path], almost: dict[str, Path], tmp_path: Path, written: str
) -> None:
    out = tmp_path / "out.zarr"
    shutil.copytree(almost["flows"], tmp_path / "out.zarr.work")
    lock = tmp_path / "out.zarr.work" / "lock.json"
    lock.write_text(written)
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(RunInProgress, match=f"remove {lock}"):
            call("flows", inputs, out, **options)
    lock.unlink()
    call("flows", inputs, out, resume=True)


# ------------------------------------------------------------------------------------ replaced


@pytest.mark.parametrize("run", ["flows", "segment"])
def test_the_old_output_is_there_until_the_new_one_is(
    inputs: dict[str, Path], expected: Callable[..., dict[str, bytes]], tmp_path: Path, run: str
) -> None:
    out = tmp_path / "out.zarr"
    changed = {"flows": {"n_iter": 3}, "segment": {"min_size": 1000}}[run]
    call(run, inputs, out, **changed)
    old = tree(out)
    stage = {"flows": "flows", "segment": "write"}[run]
    for _ in range(10):
        with started(run, inputs, out, overwrite=True) as process:
            wait_for(process, lambda: lines_of(out, stage) >= 3)
            send(process, signal.SIGSTOP)
            caught = lines_of(out, stage) >= 3
            assert not caught or tree(out) == old
            process.kill()
        if caught:
            break
        call(run, inputs, out, overwrite=True, **changed)  # it was done before it was stopped
    assert caught
    assert tree(out) == old
    with started(run, inputs, out, overwrite=True) as process:
        process.join()
        assert process.exitcode == 0
    assert tree(out) == expected(run)
    assert list(tmp_path.iterdir()) == [out]
