"""Everything that breaks, in every stage: the same bytes in the end, or an error that says what.

A run is held in the middle of a stage, in a task that is under way; then something is broken. What
breaks in jobs of a batch system is in `test_fault_jobs`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from faults import (  # noqa: F401
    OOM,
    Cell,
    Flaky,
    Holding,
    cell_of_the_matrix,
    chunks,
    everywhere,
    expected,
    inputs,
)
from killing import PROCESSES, tree
from slurm import wait_until
from test_resume import send
from zarr.storage import LocalStore

import topo_dask
from topo_dask.cluster import start
from topo_dask.errors import DamagedFile, InvalidData, InvalidType, TaskFailed
from topo_dask.run.execute import Engine, open_engine
from topo_dask.storage import create_array

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


# ----------------------------------------------------------------------------- workers, drivers


@pytest.fixture(scope="module")
def workers() -> Iterator[Engine]:
    with (
        start("local", workers=2, cores=1, memory=OOM) as running,
        open_engine(running) as engine,
    ):
        yield engine


@everywhere("relabel")
def test_a_worker_is_killed(cell: Cell, workers: Engine) -> None:
    assert cell.held(workers, lambda pid: os.kill(pid, signal.SIGKILL)) is None
    cell.check()


def test_results_that_are_lost_with_their_worker_are_made_again() -> None:
    """Those that are finished but not yet fetched, too."""
    with start("local", workers=1) as running, open_engine(running) as engine:
        results = engine.run("squares", square_and_pid, range(20))
        first, (_, worker) = next(results)
        wait_until(lambda: all_processed(running.client), 60, "results that nobody has fetched")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{worker}").exists(), 60, "the end of a worker")
        wait_until(lambda: running.client.nthreads(), 60, "another worker")
        found = {number: result for number, (result, _) in results}
    assert found == {n: n * n for n in range(20) if n != first}


def square_and_pid(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def all_processed(client: Client) -> bool:
    """Whether no task that was submitted is under way."""
    return not any(client.processing().values())


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


@everywhere("flows", "track")
@pytest.mark.parametrize("often", ["once", "for ever"])
def test_a_store_fails(cell: Cell, often: str, tmp_path: Path) -> None:
    order = tmp_path / "order"
    store = Flaky(LocalStore(cell.source), str(order))
    cell.inputs = {cell.run: zarr.open_array(store, mode="r")}
    with open_engine("sync") as engine:
        cell.held(engine, lambda _: order.write_text(often) and None)
    reads = cell.stage != "fuse"  # stages after those that merge look at the flows again
    if often == "once" or not reads:
        assert cell.error is None
    else:
        assert isinstance(cell.error, TaskFailed)
        assert "the store is not there" in str(cell.error)
    order.unlink(missing_ok=True)
    cell.check()


class Away:
    """Files that cannot be opened for a while, as when the server of a network folder is gone."""

    def __init__(self, aside: Path) -> None:
        self.aside, self.files = aside, list[Path]()
        aside.mkdir()

    def take(self, files: list[Path]) -> None:
        self.files = files
        for number, path in enumerate(files):
            path.rename(self.aside / str(number))
            path.symlink_to(path.name)  # to itself

    def bring_back(self) -> None:
        for number, path in enumerate(self.files):
            if path.is_symlink():
                os.replace(self.aside / str(number), path)


@everywhere("merge")
@pytest.mark.parametrize("often", ["once", "for ever"])
def test_a_scratch_store_fails(cell: Cell, often: str, tmp_path: Path) -> None:
    """What the later stages read are files that earlier ones wrote."""
    away, failures = Away(tmp_path / "aside"), list[int]()

    def failed() -> None:
        failures.append(1)
        if often == "once":
            away.bring_back()

    work = cell.out.with_name("out.zarr.work")
    with open_engine("sync") as engine:
        cell.held(engine, lambda _: away.take(scratch_files(work)), failed=failed)
    assert failures
    if often == "once":
        assert cell.error is None
    else:
        assert isinstance(cell.error, TaskFailed)
        assert os.strerror(errno.ELOOP) in str(cell.error)
    away.bring_back()
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
        stage = "write" if cell.stage in ("cells", "labels") else cell.stage
        assert f"stage {stage}, block [" in str(cell.error)
    assert (cell.error is not None) == (cell.stage != "fuse")
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
    # Where blocks are merged no flow is looked at, but where they are written.
    assert isinstance(cell.error, InvalidData)
    assert "nan at voxel (15, 23, 15), component z" in str(cell.error)
    array[...] = before
    cell.check()


# ------------------------------------------------------------ tiles that are fused from stores


class Tiles(Cell):
    """Tiles of flow anywhere: where they are fused, stores are read."""

    def __init__(self, folder: Path) -> None:
        self.stage, self.folder, self.options = "fuse", folder, {}
        self.out, self.error = folder / "out" / "out.zarr", None
        self.places = [np.array(at) * 7.5 for at in np.ndindex(2, 3, 2)]
        rng = np.random.default_rng(0)
        self.tiles: list[Any] = []
        for number in range(len(self.places)):
            tile = create_array(folder / f"{number}.zarr", (3, 10, 10, 10), (3, 10, 10, 10), "f4")
            tile[...] = rng.normal(size=tile.shape)
            self.tiles.append(tile)
        self.expected: dict[str, bytes] = {}

    def call(self, **options: Any) -> Any:
        more = {"vector": True, "blocks": 8, "cluster": "sync", **options}
        return topo_dask.fuse_mosaic(self.tiles, self.places, output=self.out, **more)


@pytest.fixture
def tiles(tmp_path: Path) -> Tiles:
    cell = Tiles(tmp_path)
    cell.call()
    cell.expected = chunks(tree(cell.out))
    shutil.rmtree(cell.out)
    return cell


@pytest.mark.parametrize("often", ["once", "for ever"])
def test_the_store_of_a_tile_fails(tiles: Tiles, often: str, tmp_path: Path) -> None:
    order = tmp_path / "order"
    stores = [Flaky(LocalStore(Path(str(tile.store.root))), str(order)) for tile in tiles.tiles]
    tiles.tiles = [zarr.open_array(store, mode="r") for store in stores]
    with open_engine("sync") as engine:
        tiles.held(engine, lambda _: order.write_text(often) and None)
    if often == "once":
        assert tiles.error is None
    else:
        assert isinstance(tiles.error, TaskFailed)
        assert "stage fuse, block [" in str(tiles.error)
        assert "the store is not there (tile " in str(tiles.error)
    order.unlink(missing_ok=True)
    tiles.check()


def test_a_chunk_of_a_tile_is_cut(tiles: Tiles, tmp_path: Path) -> None:
    files = [
        p for n in range(len(tiles.tiles)) for p in (tmp_path / f"{n}.zarr").rglob("c/*/*/*/*")
    ]
    whole = {path: (path.read_bytes(), path.stat()) for path in files}

    def cut(_: int) -> None:
        for path in files:
            os.truncate(path, path.stat().st_size // 2)

    with open_engine("sync") as engine:
        tiles.held(engine, cut)
    assert isinstance(tiles.error, InvalidData)
    assert "tile " in str(tiles.error)
    assert "cut short" in str(tiles.error)
    for path, (content, known) in whole.items():
        path.write_bytes(content)
        os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    tiles.check()


def test_nan_in_a_tile(tiles: Tiles, tmp_path: Path) -> None:
    """It stays where it is, and what is made of the fused flow says where that is."""
    whole = tiles.call().array[...]
    shutil.rmtree(tiles.out)
    tiles.tiles[5][0, 4, 5, 5] = np.nan
    spoilt = tiles.call()
    found = spoilt.array[...]
    bad = np.isnan(found).any(axis=0)
    assert 0 < bad.sum() <= 8
    np.testing.assert_array_equal(found[:, ~bad], whole[:, ~bad])
    first = ", ".join(map(str, np.argwhere(bad)[0]))
    with pytest.raises(InvalidData, match="nan") as caught:
        topo_dask.segment(spoilt.array, tmp_path / "labels.zarr", cluster="sync", blocks=64)
    assert first in str(caught.value)
