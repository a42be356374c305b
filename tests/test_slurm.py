"""Runs on a real Slurm: jobs that are cancelled, refused, that die, that outlive nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zarr
from slurm import Slurm, wait_until

import topo_dask
from topo_dask.cluster import ClusterOptions, start
from topo_dask.errors import BackendUnavailable, TaskFailed
from topo_dask.run.execute import open_engine
from topo_dask.run.memory import KEEP
from topo_dask.storage import create_array
from topo_dask.testing import synthetic_tissue

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = (8, 8, 8)
SHAPE = (16, 24, 16)
N_BLOCKS = 12
SLOW: dict[str, Any] = {"n_iter": 3000, "adaptive_iters": False, "blocks": BLOCKS}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slurm") / "labels.zarr"
    volume = synthetic_tissue(SHAPE, n_instances=30, seed=4)
    create_array(path, SHAPE, BLOCKS, "uint16")[...] = volume
    return path


def options(folder: Path, **changed: Any) -> ClusterOptions:
    """Small jobs on loopback; their processes begin in a second or two."""
    settings: dict[str, Any] = {
        "cores": 1,
        "memory": "1GB",
        "walltime": "00:10:00",
        "interface": "lo",
        "death_timeout": 10,
        "log_directory": str(folder / "logs"),
        "local_directory": str(folder / "local"),
        "prologue": ("export OMP_NUM_THREADS=1", f"export PYTHONPATH={ROOT}"),
    }
    return ClusterOptions("slurm", **{**settings, **changed})


@contextmanager
def all_gone(slurm: Slurm, seconds: float = 15) -> Iterator[None]:
    """No job is there before, and none is left behind."""
    assert slurm.jobs() == {}
    yield
    wait_until(lambda: not slurm.jobs("PD,CF,R,CG"), seconds, "no job is left")


def lines_of(out: Path, stage: str) -> int:
    file = out.with_name(f"{out.name}.work") / "ledger" / f"{stage}.jsonl"
    return max(0, file.read_text().count("\n") - 1) if file.exists() else 0


def test_a_cancelled_job_is_made_up_for(slurm: Slurm, labels: Path, tmp_path: Path) -> None:
    """Two jobs, one cancelled midway: the same labels as on this machine alone."""
    out, lines = tmp_path / "flows.zarr", list[str]()
    with all_gone(slurm), start(options(tmp_path, jobs=2), say=lines.append) as running:
        assert running.client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert running.dashboard_link.startswith("http://127.0.0.1:")
        assert len(slurm.jobs()) == 2
        running.client.wait_for_workers(2, timeout=60)
        for name, value in KEEP.items():
            told = running.client.run(os.getenv, name)
            assert set(told.values()) == {str(value)}
        killer = threading.Thread(target=cancel_one, args=(slurm, out))
        killer.start()
        flow = topo_dask.flows(labels, out, cluster=running, **SLOW)
        killer.join()
        found = topo_dask.segment(flow.array, tmp_path / "labels.zarr", cluster=running)
        jobs = running.jobs
        assert jobs is not None
        wait_until(lambda: jobs.lost == 1 and len(slurm.jobs()) == 2, 30, "another job")
    assert any("another takes its place" in line for line in lines)
    alone = topo_dask.flows(labels, tmp_path / "alone.zarr", cluster="sync", **SLOW)
    assert (flow.array[...] == alone.array[...]).all()
    same = topo_dask.segment(alone.array, tmp_path / "same.zarr", cluster="sync")
    assert (found.array[...] == same.array[...]).all()
    assert (tmp_path / "logs").is_dir()


def cancel_one(slurm: Slurm, out: Path) -> None:
    """Cancel a job when some blocks are done."""
    wait_until(lambda: lines_of(out, "flows") >= 2 or out.exists(), 60, "blocks")
    slurm.cancel(sorted(slurm.jobs("R"))[0])


def test_a_refused_job_is_reported_with_the_message_of_slurm(
    slurm: Slurm, labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "flows.zarr"
    began = time.monotonic()
    with (
        all_gone(slurm),
        pytest.raises(BackendUnavailable, match="invalid partition"),
    ):
        topo_dask.flows(labels, out, cluster=options(tmp_path, queue="nowhere"))
    assert time.monotonic() - began < 30
    assert not out.exists()
    assert not out.with_name("flows.zarr.work").exists()


def test_a_job_that_dies_at_start_is_reported_with_its_log(
    slurm: Slurm, labels: Path, tmp_path: Path
) -> None:
    lines = ("echo the module is not there >&2", "exit 3")
    began = time.monotonic()
    with (
        all_gone(slurm),
        pytest.raises(BackendUnavailable) as caught,
    ):
        topo_dask.flows(
            labels, tmp_path / "flows.zarr", cluster=options(tmp_path, jobs=2, prologue=lines)
        )
    assert time.monotonic() - began < 30
    assert "the module is not there" in str(caught.value)
    assert "ExitCode=3:0" in str(caught.value)
    again = topo_dask.flows(labels, tmp_path / "flows.zarr", resume=True, cluster="sync")
    assert again.array.shape == (3, *SHAPE)


@pytest.mark.slow
def test_jobs_that_cannot_begin_are_told_of(slurm: Slurm, tmp_path: Path) -> None:
    """More jobs than fit wait; the run goes on with those that are there."""
    lines = list[str]()
    with (
        all_gone(slurm),
        start(options(tmp_path, jobs=3, cores=4, processes=1), say=lines.append) as running,
    ):
        wait_until(lambda: any("waits: PENDING" in line for line in lines), 30, "a waiting job")
        with open_engine(running) as engine:
            assert len(list(engine.run("abs", abs, range(20)))) == 20
            assert "jobs wait: PENDING" in engine.about() or "1 jobs wait" in engine.about()


@pytest.mark.slow
def test_as_many_jobs_as_there_is_work_for(slurm: Slurm, tmp_path: Path) -> None:
    made = options(tmp_path, jobs=1, max_jobs=3)
    with all_gone(slurm), start(made) as running, open_engine(running) as engine:
        assert len(slurm.jobs()) == 1
        results = engine.run("sleep", time.sleep, [1.0] * 60)
        next(results)
        wait_until(lambda: len(slurm.jobs()) == 3, 60, "three jobs")
        assert len(list(results)) == 59


@pytest.mark.slow
def test_workers_leave_and_come_again(slurm: Slurm, tmp_path: Path) -> None:
    made = options(tmp_path, jobs=2, lifetime="10 s")
    with all_gone(slurm), start(made) as running, open_engine(running) as engine:
        assert len(list(engine.run("sleep", time.sleep, [1.0] * 50))) == 50
        assert running.jobs is not None
        assert running.jobs.lost >= 2


def command(labels: Path, out: Path, folder: Path, *more: str) -> list[str]:
    """A run on the command line with two jobs."""
    pairs = ["jobs=2", "cores=1", "memory=1GB", "interface=lo", "death_timeout=10"]
    pairs += [f"log_directory={folder / 'logs'}", f"prologue=export PYTHONPATH={ROOT}"]
    given = [word for pair in pairs for word in ("--cluster-option", pair)]
    slow = ["--n-iter", "2500", "--no-adaptive-iters", "--blocks", "8"]
    words = [sys.executable, "-m", "topo_dask", "flows", str(labels), str(out)]
    return [*words, *slow, "--cluster", "slurm", *given, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "seconds"),
    [
        (signal.SIGINT, 1, 15),
        (signal.SIGTERM, 128 + signal.SIGTERM, 15),
        (signal.SIGHUP, 128 + signal.SIGHUP, 15),
        (signal.SIGKILL, -signal.SIGKILL, 60),  # the workers notice by themselves
    ],
)
def test_no_job_is_left_of_a_driver_that_ends(
    slurm: Slurm, labels: Path, tmp_path: Path, number: signal.Signals, status: int, seconds: float
) -> None:
    out = tmp_path / "flows.zarr"
    with all_gone(slurm, seconds):
        driver = subprocess.Popen(
            command(labels, out, tmp_path),
            cwd=ROOT,
            env=slurm.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            begun = lambda: lines_of(out, "flows") >= 2 or driver.poll() is not None  # noqa: E731
            wait_until(begun, 240, "blocks")
            assert driver.poll() is None
            assert len(slurm.jobs()) == 2
            driver.send_signal(number)
            _, shown = driver.communicate(timeout=60)
        finally:
            driver.kill()
        assert driver.returncode == status, shown
    assert not out.exists()
    done = lines_of(out, "flows")
    assert done >= 2
    settings: dict[str, Any] = {**SLOW, "n_iter": 2500, "blocks": 8, "cluster": "threads"}
    made = topo_dask.flows(labels, out, resume=True, **settings)
    alone = topo_dask.flows(labels, tmp_path / "alone.zarr", **settings)
    assert (made.array[...] == alone.array[...]).all()


def test_no_job_is_left_of_a_run_that_fails(slurm: Slurm, tmp_path: Path) -> None:
    with (
        all_gone(slurm),
        pytest.raises(TaskFailed, match="invalid literal"),
        start(options(tmp_path, jobs=2)) as running,
        open_engine(running) as engine,
    ):
        list(engine.run("numbers", int, ["1", "one"]))


@pytest.mark.slow
def test_the_demo_on_slurm_makes_the_labels_of_a_machine_alone(
    slurm: Slurm, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"system: slurm\njobs: 2\ncores: 1\nmemory: 1GB\ninterface: lo\nwalltime: 00:10:00\n"
        f"log_directory: {tmp_path / 'logs'}\nprologue: [export PYTHONPATH={ROOT}]\n"
    )
    demo = [sys.executable, "-m", "topo_dask", "demo", "--shape", "64,96,96", "--blocks", "32"]
    with all_gone(slurm):
        driver = subprocess.Popen(
            [*demo, str(tmp_path / "a"), "--cluster-file", str(file)],
            cwd=ROOT,
            env=slurm.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        out = tmp_path / "a" / "flows.zarr"
        wait_until(lambda: lines_of(out, "flows") >= 2 or driver.poll() is not None, 90, "blocks")
        wait_until(lambda: len(slurm.jobs("R")) == 2 or driver.poll() is not None, 30, "two jobs")
        cancelled = sorted(slurm.jobs("R"))[0]
        slurm.cancel(cancelled)
        wait_until(lambda: cancelled not in slurm.jobs("R"), 30, "a job that is cancelled")
        assert driver.poll() is None
        told = ("scontrol", "show", "job", cancelled)  # it is COMPLETING for a while
        wait_until(lambda: "JobState=CANCELLED" in slurm.call(*told), 30, "its end")
        shown, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, shown
    assert "slurm jobs; dashboard: http://127.0.0.1:" in shown
    subprocess.run(
        [*demo, str(tmp_path / "b"), "--cluster", "threads", "--no-progress"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found, expected = (
        zarr.open_array(tmp_path / name / "labels.zarr" / "s0", mode="r")[...] for name in "ab"
    )
    assert (found == expected).all()
