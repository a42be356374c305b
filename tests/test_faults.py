"""Everything that breaks, in every stage: the same bytes in the end, or an error that says what.

A run is held in the middle of a stage, in a task that is under way; then something is broken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from killing import PROCESSES, tree
from slurm import Slurm, wait_until
from test_resume import call, expected, inputs, send  # noqa: F401
from zarr.storage import LocalStore, WrapperStore

import topo_dask
from topo_dask.cluster import ClusterOptions, RunningCluster, start
from topo_dask.errors import DamagedFile, InvalidData, InvalidType, TaskFailed, TopoError
from topo_dask.run.execute import Engine, open_engine

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

ROOT = Path(__file__).resolve().parents[1]
# The run, the stage in its ledger, and the options that the stage needs.
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "table": ("flows", "table", {}),
    "flows": ("flows", "flows", {}),
    "fuse": ("flows", "fuse", {"overlap": 4}),
    "track": ("segment", "track", {}),
    "merge": ("segment", "cells", {}),
    "relabel": ("segment", "labels", {}),
}
OOM = 400 * 2**20
"""Bytes of a worker's memory limit, where it is to run out of it."""


# ------------------------------------------------------------------------------ holding a stage


@dataclass(frozen=True)
class Held:
    """A block function that waits, once, in one of its calls; or runs out of memory there."""

    function: Callable[[Any], Any]
    folder: Path
    greedy: bool = False

    def __call__(self, item: Any) -> Any:
        if len(list(self.folder.glob("done-*"))) >= 3:
            with contextlib.suppress(FileExistsError), (self.folder / "held").open("x") as file:
                file.write(str(os.getpid()))
                file.flush()
                self._wait()
        result = self.function(item)
        (self.folder / f"done-{time.monotonic_ns()}-{os.getpid()}").touch()
        return result

    def _wait(self) -> None:
        taken = []
        until = time.monotonic() + 100
        while not (self.folder / "go").exists():
            if self.greedy:
                taken.append(np.ones(OOM // 20, np.uint8))
            assert time.monotonic() < until
            time.sleep(0.02)


class Holding(Engine):
    """Another engine, which holds a stage."""

    def __init__(self, inner: Engine, stage: str, folder: Path, *, greedy: bool = False) -> None:
        super().__init__(inner.name, inner.slots)
        self.inner, self.stage, self.folder, self.greedy = inner, stage, folder, greedy

    def _completed(self, function: Any, items: Any) -> Iterator[Any]:
        return self.inner._completed(function, items)

    def run(self, stage: str, function: Any, items: Any, **options: Any) -> Iterator[Any]:
        held = Held(function, self.folder, self.greedy) if stage == self.stage else function
        return self.inner.run(stage, held, items, **options)


def chunks(files: dict[str, bytes]) -> dict[str, bytes]:
    """All bytes of an array; its metadata tell which input it is made of."""
    return {name: content for name, content in files.items() if name[-9:] != "zarr.json"}


class Cell:
    """A cell of the matrix: a run that is held in a stage."""

    def __init__(
        self, stage: str, sources: dict[str, Path], folder: Path, known: Any, **options: Any
    ) -> None:
        self.run, self.stage, more = STAGES[stage]
        # An input of its own, which may be broken.
        self.source = folder / "input.zarr"
        shutil.copytree(sources[self.run], self.source)
        self.inputs: dict[str, Any] = {self.run: self.source}
        self.out, self.folder = folder / "out" / "out.zarr", folder
        self.options = {**more, **options}
        self.expected = chunks(known(self.run, **more))
        self.error: BaseException | None = None

    def call(self, **options: Any) -> None:
        call(self.run, self.inputs, self.out, **{**self.options, **options})

    def held(self, engine: Engine, break_it: Callable[[int], None], *, greedy: bool = False) -> Any:
        """Run until the stage is held in some process, break something, and let it go on."""

        def work() -> None:
            try:
                self.call(cluster=Holding(engine, self.stage, self.folder, greedy=greedy))
            except BaseException as error:
                self.error = error

        thread = threading.Thread(target=work)
        thread.start()
        mark = self.folder / "held"
        try:
            wait_until(
                lambda: (mark.exists() and mark.read_text()) or not thread.is_alive(), 240, "held"
            )
            assert thread.is_alive(), self.error
            break_it(int(mark.read_text()))
        finally:
            (self.folder / "go").touch()
            thread.join()
        return self.error

    def check(self, **options: Any) -> None:
        """The result is there to the byte, at once or when the run goes on."""
        if self.error is not None:
            assert isinstance(self.error, TopoError), self.error
            assert not self.out.exists()
            self.call(resume=True, cluster="sync", **options)
        assert chunks(tree(self.out)) == self.expected
        assert list(self.out.parent.iterdir()) == [self.out]


@pytest.fixture
def cell(
    request: pytest.FixtureRequest,
    inputs: dict[str, Path],  # noqa: F811
    expected: Any,  # noqa: F811
    tmp_path: Path,
) -> Cell:
    return Cell(request.param, inputs, tmp_path, expected)


def everywhere(*quick: str) -> pytest.MarkDecorator:
    """All stages; those that are not named only in `make test-all`."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in STAGES}
    cells = [pytest.param(name, marks=marks[name], id=name) for name in STAGES]
    return pytest.mark.parametrize("cell", cells, indirect=True)


# ----------------------------------------------------------------------------- workers, drivers


@pytest.fixture(scope="module")
def workers() -> Iterator[Engine]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=OOM,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        open_engine(client) as engine,
    ):
        yield engine


@everywhere("relabel")
def test_a_worker_is_killed(cell: Cell, workers: Engine) -> None:
    assert cell.held(workers, lambda pid: os.kill(pid, signal.SIGKILL)) is None
    cell.check()


@everywhere()
def test_a_worker_runs_out_of_memory(cell: Cell, workers: Engine) -> None:
    def gone(pid: int) -> None:
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, "the nanny ends the worker")

    assert cell.held(workers, gone, greedy=True) is None
    cell.check()


def drive(cell: Cell, number: signal.Signals) -> None:
    """The run in a process of its own, which gets a signal while it is held."""
    process = PROCESSES.Process(target=_hold_in_processes, args=(cell,))
    process.start()
    try:
        mark = cell.folder / "held"
        wait_until(lambda: mark.exists() or not process.is_alive(), 60, "held")
        assert process.is_alive()
        send(process, number)
        if number != signal.SIGKILL:  # it waits for what is under way
            (cell.folder / "go").touch()
        process.join(60)
        assert process.exitcode is not None
        assert process.exitcode != 0
    finally:
        process.kill()
        process.join()


def _hold_in_processes(cell: Cell) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_engine("processes") as engine:
        cell.call(cluster=Holding(engine, cell.stage, cell.folder))


@everywhere()
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_the_driver_ends(cell: Cell, number: signal.Signals) -> None:
    drive(cell, number)
    assert not cell.out.exists()
    cell.call(resume=True)
    cell.check()


# ----------------------------------------------------------------------------------------- Slurm


def jobs_of_slurm(folder: Path, **more: Any) -> RunningCluster:
    settings: dict[str, Any] = {"jobs": 2, "cores": 1, "memory": "1GB", "interface": "lo"}
    lines = (f"export PYTHONPATH={ROOT}:{ROOT / 'tests'}",)
    places = {"log_directory": str(folder / "logs"), "local_directory": str(folder / "local")}
    return start(ClusterOptions("slurm", prologue=lines, **settings, **places, **more))


@pytest.fixture(scope="module")
def long_jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with jobs_of_slurm(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture(scope="module")
def short_jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    more = {"walltime": "00:01:00", "lifetime": "none"}
    with jobs_of_slurm(tmp_path_factory.mktemp("jobs"), **more) as running:
        yield running


def _job_of(pid: int) -> str:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(p.split(b"=")[1].decode() for p in pairs if p.startswith(b"SLURM_JOB_ID="))


@everywhere()
def test_a_slurm_job_is_cancelled(cell: Cell, slurm: Slurm, long_jobs: RunningCluster) -> None:
    with open_engine(long_jobs) as engine:
        assert cell.held(engine, lambda pid: slurm.cancel(_job_of(pid))) is None
    cell.check()


@everywhere()
@pytest.mark.timeout(300)
def test_a_slurm_job_hits_its_walltime(
    cell: Cell, slurm: Slurm, short_jobs: RunningCluster
) -> None:
    def ended(pid: int) -> None:
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 95, "Slurm ends the job")

    with open_engine(short_jobs) as engine:
        assert cell.held(engine, ended) is None
    cell.check()


# ----------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no space in a file system."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


@everywhere("flows", "relabel")
@pytest.mark.parametrize("where", ["output", "scratch"])
def test_a_disk_is_full(cell: Cell, where: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as disk, open_engine("sync") as engine:
        if where == "output":
            cell.out = disk / "out" / "out.zarr"
            cell.options["work_dir"] = str(tmp_path / "scratch")
        else:
            cell.options["work_dir"] = str(disk)
        filler: list[Path] = []
        cell.held(engine, lambda _: filler.append(fill(disk)))
        full = cell.error
        filler[0].unlink()
        cell.check()
        # The stages that write nothing there do not notice, but later ones do.
        if full is not None:
            assert os.strerror(errno.ENOSPC) in str(full) or "resume=True" in str(full), full


# ---------------------------------------------------------------------------------------- stores


class Flaky(WrapperStore[LocalStore]):
    """A store that fails while a file says so: as often as that has lines."""

    def __init__(self, store: LocalStore, order: str) -> None:
        super().__init__(store)
        self.order = order

    def __reduce__(self) -> Any:
        return Flaky, (self._store, self.order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flaky) and self._store == other._store

    __hash__ = None  # type: ignore[assignment]

    def _with_store(self, store: LocalStore) -> Flaky:
        return Flaky(store, self.order)

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        path = Path(self.order)
        if path.exists() and not key.endswith((".json", ".zarray", ".zattrs")):
            often = path.read_text()
            if often != "for ever":
                path.unlink()
            raise ConnectionResetError(errno.ECONNRESET, "the store is not there")
        return await super().get(key, *arguments, **options)


@everywhere("flows", "track")
@pytest.mark.parametrize("often", ["once", "for ever"])
def test_a_store_fails(cell: Cell, often: str, tmp_path: Path) -> None:
    order = tmp_path / "order"
    store = Flaky(LocalStore(cell.source), str(order))
    cell.inputs = {cell.run: zarr.open_array(store, mode="r")}
    with open_engine("sync") as engine:
        cell.held(engine, lambda _: order.write_text(often) and None)
    reads = cell.stage in ("table", "flows", "track")
    if often == "once" or not reads:
        assert cell.error is None
    else:
        assert isinstance(cell.error, TaskFailed)
        assert "the store is not there" in str(cell.error)
    order.unlink(missing_ok=True)
    cell.check()


# ---------------------------------------------------------------------------------- broken files


@everywhere("track")
def test_an_input_chunk_is_cut(cell: Cell) -> None:
    files = [p for p in cell.source.rglob("*") if p.is_file() and p.name.isdigit()]
    whole = {path: (path.read_bytes(), path.stat()) for path in files}

    def cut(_: int) -> None:
        for path in files:
            os.truncate(path, path.stat().st_size // 2)

    with open_engine("sync") as engine:
        cell.held(engine, cut)
    if cell.error is not None:
        assert isinstance(cell.error, TaskFailed)
        assert f"stage {cell.stage}, block [" in str(cell.error)
    assert (cell.error is not None) == (cell.stage in ("table", "flows", "track"))
    for path, (content, known) in whole.items():
        path.write_bytes(content)
        os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    cell.check()


def scratch_files(work: Path) -> list[Path]:
    """What the stages hand to each other: tables, and chunks of arrays that are not the result."""
    chunks = [p for p in work.rglob("c/*/*/*") if p.is_file() and "result" not in p.parts]
    return [*work.rglob("*.np[yz]"), *chunks]


@everywhere("merge", "relabel")
@pytest.mark.parametrize("which", ["one", "all"])
def test_a_scratch_file_is_cut(cell: Cell, which: str) -> None:
    """It is named, and what wrote it is done again by the run that goes on."""
    work = cell.out.with_name("out.zarr.work")

    def cut(_: int) -> None:
        files = sorted(scratch_files(work), key=lambda path: path.stat().st_mtime_ns)
        for path in files if which == "all" else files[-1:]:
            os.truncate(path, path.stat().st_size // 2)

    with open_engine("sync") as engine:
        cell.held(engine, cut)
    if which == "all":
        assert cell.error is not None or cell.stage == "track"  # what was cut may be needed no more
    for _ in range(5):
        if cell.error is None:
            break
        assert isinstance(cell.error, DamagedFile)
        assert "damaged" in str(cell.error)
        assert "resume=True" in str(cell.error)
        assert "overwrite=True" in str(cell.error)
        assert not cell.out.exists()
        cell.error = None
        try:
            cell.call(resume=True)
        except DamagedFile as error:
            cell.error = error
    cell.check()


@everywhere("track")
def test_nan_in_one_block(cell: Cell) -> None:
    before = zarr.open_array(str(cell.source), mode="r")[...]
    if cell.run == "flows":
        labels = before.astype(np.float32)
        labels[0, 0, 0] = np.nan
        with pytest.raises(InvalidType, match="labels"):
            topo_dask.flows(labels, cell.out)
        assert not cell.out.parent.exists()
        return
    array = zarr.open_array(str(cell.source), mode="r+")

    def spoil(_: int) -> None:
        array[0, -1, -1, -1] = np.nan

    with open_engine("sync") as engine:
        cell.held(engine, spoil)
    if cell.stage == "track":
        assert isinstance(cell.error, InvalidData)
        assert "NaN" in str(cell.error) or "nan" in str(cell.error)
    else:  # flows are not looked at any more
        assert cell.error is None
    array[...] = before
    cell.check()
