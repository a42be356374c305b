"""Workers keep the memory that they have had, and give it back when their limit is near."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from distributed import Worker
from slurm import wait_until

from topo_dask.cluster import start
from topo_dask.run import memory
from topo_dask.run.execute import open_engine
from topo_dask.run.memory import SHARE, GiveMemoryBack, glibc

pytestmark = pytest.mark.skipif(glibc() is None, reason="only glibc keeps memory when told to")

MIB = 2**20


class DiesOnce(GiveMemoryBack):
    """A worker that is killed just when it hears of the plugin: the first one that does."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def setup(self, worker: Worker) -> None:
        with suppress(FileNotFoundError):
            self.flag.rename(self.flag.with_name("died")).write_text(worker.address)
            os.kill(os.getpid(), signal.SIGKILL)
        super().setup(worker)


def has_plugin(dask_worker: Worker) -> bool:
    return GiveMemoryBack.name in dask_worker.plugins


@pytest.mark.usefixtures("sockets_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_when_it_is_told_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "die"
    flag.touch()
    monkeypatch.setattr(memory, "GiveMemoryBack", lambda: DiesOnce(flag))
    with start("local", workers=2, cores=1) as running:
        assert not flag.exists()
        dead = (tmp_path / "died").read_text()

        def all_live() -> bool:
            addresses = running.client.scheduler_info(n_workers=-1)["workers"].keys()
            return len(addresses) == 2 and dead not in addresses

        wait_until(all_live, 60, "another worker")
        assert sum(running.client.submit(int, 1, pure=False).result() for _ in range(4)) == 4
        assert list(running.client.run(has_plugin).values()) == [True, True]


def touch(size: int) -> tuple[int, int]:
    """Fill some arrays of so many bytes; how many pages that had to ask for, and what is held."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for part in (1, 2, 3):
        np.ones(size // part, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, held()


def held(_: int = 0) -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("cluster", ["local", "processes"])
def test_later_tasks_use_the_memory_of_earlier_ones(cluster: str) -> None:
    # 2 MiB: below what NumPy asks large pages for, so that pages are counted one by one.
    size, page = 2 * MIB, os.sysconf("SC_PAGE_SIZE")
    with open_engine(cluster) as engine:
        slots = engine.slots
        found = dict(engine.run("touch", touch, [size] * 40 * slots))
    faults = [found[n][0] for n in range(20 * slots, 40 * slots)]
    assert sum(faults) / len(faults) < 0.1 * size / page  # now and then the heap grows


def test_a_worker_whose_limit_is_near_gives_memory_back() -> None:
    limit = 1000 * MIB
    with (
        start("local", workers=1, cores=1, memory=f"{limit}B") as running,
        open_engine(running) as engine,
    ):
        ((_, (_, large)),) = engine.run("touch", touch, [700 * MIB])
        ((_, after),) = engine.run("held", held, [0])
    assert large > 700 * MIB
    assert after < SHARE * limit


def test_a_worker_far_from_its_limit_keeps_memory() -> None:
    with (
        start("local", workers=1, cores=1, memory="3000MiB") as running,
        open_engine(running) as engine,
    ):
        list(engine.run("touch", touch, [500 * MIB]))
        ((_, after),) = engine.run("held", held, [0])
    assert after > 500 * MIB
