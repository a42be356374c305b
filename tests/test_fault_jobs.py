"""Jobs of a real Slurm that end while a stage is under way: the same bytes in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults import (  # noqa: F401
    STAGES,
    Cell,
    cell_of_the_matrix,
    everywhere,
    expected,
    inputs,
)
from slurm import Slurm, wait_until

from topo_dask.cluster import ClusterOptions, RunningCluster, start
from topo_dask.run.execute import open_engine

ROOT = Path(__file__).resolve().parents[1]


def jobs_of_slurm(folder: Path, **more: Any) -> RunningCluster:
    settings: dict[str, Any] = {"jobs": 2, "cores": 1, "memory": "1GB", "interface": "lo"}
    settings["prologue"] = (f"export PYTHONPATH={ROOT}:{ROOT / 'tests'}",)
    places = {"log_directory": str(folder / "logs"), "local_directory": str(folder / "local")}
    return start(ClusterOptions("slurm", **{**settings, **places, **more}))


@pytest.fixture(scope="module")
def long_jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with jobs_of_slurm(tmp_path_factory.mktemp("jobs")) as running:
        yield running


def _job_of(pid: int) -> str:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(p.split(b"=")[1].decode() for p in pairs if p.startswith(b"SLURM_JOB_ID="))


@pytest.fixture(scope="module")
def walltimes(
    slurm: Slurm,
    inputs: dict[str, Path],  # noqa: F811
    expected: Any,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Any]]]:
    """Runs on jobs that Slurm ends, as their workers do not leave in time; they wait together.

    One run for each stage, held there until its only job ends, and one of short tasks on two jobs.
    """
    folders = {name: tmp_path_factory.mktemp(f"walltime-{name}") for name in (*STAGES, "short")}
    cells = {name: Cell(name, inputs, folders[name], expected) for name in STAGES}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(folders)))
        made = {}
        for name, folder in folders.items():  # here: they mind signals
            more = {"jobs": 1 + (name == "short"), "walltime": "00:01:00", "lifetime": "none"}
            running = stack.enter_context(jobs_of_slurm(folder, **more))
            work = _held_until_its_job_ends if name in cells else _short_tasks
            made[name] = pool.submit(work, running, cells.get(name))
        yield made


def _held_until_its_job_ends(running: RunningCluster, cell: Cell) -> tuple[Cell, Any]:
    def ended(pid: int) -> None:
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 150, "Slurm ends the job")

    with open_engine(running) as engine:
        cell.held(engine, ended)
    return cell, running.jobs


def _short_tasks(running: RunningCluster, _: None) -> tuple[int, Any]:
    with open_engine(running) as engine:
        done = len(list(engine.run("sleep", time.sleep, [4.0] * 50)))
    return done, running.jobs


@pytest.fixture(scope="module")
def meanwhile(request: pytest.FixtureRequest) -> None:
    """Walltimes run while other tests of this module do, if their tests are to come."""
    if any("walltime" in item.name for item in request.session.items):
        request.getfixturevalue("walltimes")


@everywhere()
@pytest.mark.usefixtures("meanwhile")
def test_a_slurm_job_is_cancelled(cell: Cell, slurm: Slurm, long_jobs: RunningCluster) -> None:
    with open_engine(long_jobs) as engine:
        assert cell.held(engine, lambda pid: slurm.cancel(_job_of(pid))) is None
    cell.check()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", STAGES)
def test_a_slurm_job_hits_its_walltime(stage: str, walltimes: dict[str, Future[Any]]) -> None:
    cell, jobs = walltimes[stage].result()
    assert cell.error is None
    assert jobs.lost >= 1
    cell.check()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_walltime_is_survived(walltimes: dict[str, Future[Any]]) -> None:
    done, jobs = walltimes["short"].result()
    assert done == 50
    assert jobs.lost >= 2
