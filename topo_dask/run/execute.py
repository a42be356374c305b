"""Runs block tasks on whatever is there, a bounded window at a time.

A stage is a module-level function and a list of small items. At most a few tasks per worker slot
are known to the scheduler at any moment, so that its memory does not grow with the volume; what a
task returns is small, the voxels stay on disk.
"""

from __future__ import annotations

import concurrent.futures as cf
import heapq
import multiprocessing
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from distributed import Client, LocalCluster, as_completed, get_client

from topo_dask.errors import BackendUnavailable, InvalidArgument, TaskFailed, TopoError
from topo_dask.kernels.parallel import available_cores
from topo_dask.run.progress import Progress

Cluster = Any
"""``None``, a name, a ``tcp://`` address, a dask ``Client`` or an open `Engine`."""

CLUSTERS = ("sync", "threads", "processes", "local", "tcp://HOST:PORT")

WINDOW = 3
"""Tasks in flight per slot: one that runs, one that waits, one on its way."""


@dataclass(frozen=True)
class Order:
    """Which items of a stage wait for which, and how far the stage may run ahead.

    Parameters
    ----------
    after
        For each item the positions of earlier items that it needs.
    ahead
        No item is begun that lies so far or farther behind the first unfinished one; ``None``
        for no limit.
    """

    after: Sequence[Sequence[int]]
    ahead: int | None = None

    def only(self, positions: Sequence[int]) -> Order:
        """The order of some of the items, where all others are done."""
        place = {position: number for number, position in enumerate(positions)}
        some = [[place[n] for n in self.after[p] if n in place] for p in positions]
        return Order(some, self.ahead)


class _Ready(Iterator[tuple[int, Any]]):
    """Gives items that may run now; stops where there is none, and goes on when there is."""

    def __init__(self, items: Sequence[Any], order: Order | None) -> None:
        self.items, self.stopped = items, False
        self.ahead = len(items) if order is None or order.ahead is None else max(1, order.ahead)
        after = [()] * len(items) if order is None else order.after
        self.waits = [len(needed) for needed in after]
        self.wanted: dict[int, list[int]] = {}
        for number, needed in enumerate(after):
            for other in needed:
                self.wanted.setdefault(other, []).append(number)
        self.ready = [n for n, count in enumerate(self.waits) if count == 0]
        self.finished = bytearray(len(items))
        self.first = 0

    def __next__(self) -> tuple[int, Any]:
        if self.stopped or not self.ready or self.ready[0] >= self.first + self.ahead:
            raise StopIteration
        number = heapq.heappop(self.ready)
        return number, self.items[number]

    def finish(self, number: int) -> None:
        """An item is done: what waited for it may run."""
        self.finished[number] = 1
        while self.first < len(self.items) and self.finished[self.first]:
            self.first += 1
        for other in self.wanted.pop(number, ()):
            self.waits[other] -= 1
            if self.waits[other] == 0:
                heapq.heappush(self.ready, other)


class Engine(ABC):
    """Something that runs tasks. Made by `open_engine`.

    Parameters
    ----------
    name
        What it is, for people.
    slots
        How many tasks it runs at once.
    stream
        Where progress is shown; ``None`` for nowhere.
    """

    def __init__(self, name: str, slots: int, stream: TextIO | None = None) -> None:
        self.name = name
        self.slots = max(1, slots)
        self.stream = stream

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.slots} slots)"

    @abstractmethod
    def _completed(
        self, function: Callable[[Any], Any], items: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        """Run ``function(item)`` for each item; give (number, result, error) as they finish."""

    def run(
        self,
        stage: str,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        voxels: Sequence[int] | None = None,
        order: Order | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run a stage, giving (position in ``items``, result) as tasks finish, in any order.

        Parameters
        ----------
        stage
            Its name, for progress and errors.
        function
            Module-level; called with one item.
        items
            Small, picklable; ``str(item)`` is what an error calls it.
        voxels
            Voxels of each item, for the progress line.
        order
            Which items wait for which.

        Raises
        ------
        TopoError
            What a task raised on purpose, as it is. Tasks that are under way end first, so that
            what they did is not lost; no others are begun.
        TaskFailed
            Anything else; stage and item are named and the original is its cause.
        """
        bar = Progress(stage, len(items), sum(voxels or ()), self.stream)
        ready = _Ready(items, order)
        results = self._completed(function, ready)
        failed: tuple[BaseException, int] | None = None
        try:
            for number, result, error in results:
                if error is not None:
                    failed = failed or (error, number)
                    ready.stopped = True
                    continue
                ready.finish(number)
                bar.step(voxels[number] if voxels is not None else 0)
                yield number, result
            if failed is not None:
                _raise(failed[0], stage, items[failed[1]])
        finally:
            results.close()  # type: ignore[attr-defined]
            bar.close()


def _raise(error: BaseException, stage: str, item: Any) -> NoReturn:
    if isinstance(error, (TopoError, KeyboardInterrupt)):
        raise error  # with the cause that it has
    raise TaskFailed(
        f"stage {stage}, {item}",
        f"{type(error).__name__}: {error}",
        "a task that ends",
        "Nothing was published. Finished blocks are kept: pass resume=True to go on from here.",
    ) from error


class SyncEngine(Engine):
    """Runs tasks one after the other in the calling thread: for debugging and tests."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__("sync", 1, stream)

    def _completed(
        self, function: Callable[[Any], Any], items: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        for number, item in items:
            try:
                result = function(item)
            except Exception as error:
                yield number, None, error
                return
            yield number, result, None


class PoolEngine(Engine):
    """Runs tasks on threads or processes of this machine, without any server."""

    def __init__(self, name: str, pool: cf.Executor, slots: int, stream: TextIO | None) -> None:
        super().__init__(name, slots, stream)
        self.pool = pool

    def _completed(
        self, function: Callable[[Any], Any], items: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        running: dict[cf.Future[Any], int] = {}
        try:
            while True:
                while len(running) < WINDOW * self.slots:
                    number, item = next(items, (-1, None))
                    if number < 0:
                        break
                    running[self.pool.submit(function, item)] = number
                if not running:
                    return
                finished, _ = cf.wait(running, return_when=cf.FIRST_COMPLETED)
                for future in finished:
                    number, error = running.pop(future), future.exception()
                    yield number, None if error else future.result(), error
        finally:
            for future in running:
                future.cancel()
            cf.wait(running)


class DaskEngine(Engine):
    """Runs tasks on a dask cluster through its client."""

    def __init__(self, client: Client, stream: TextIO | None) -> None:
        threads = client.scheduler_info(n_workers=-1)["workers"].values()
        slots = sum(worker["nthreads"] for worker in threads)
        super().__init__(
            str(client.scheduler.address if client.scheduler else "dask"), slots, stream
        )
        self.client = client

    def _completed(
        self, function: Callable[[Any], Any], items: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        numbers: dict[Any, int] = {}
        running = as_completed(loop=self.client.loop, with_results=False, raise_errors=False)

        def fill_window() -> None:
            while len(numbers) < WINDOW * self.slots:
                number, item = next(items, (-1, None))
                if number < 0:
                    return
                future = self.client.submit(function, item, pure=False)
                numbers[future.key] = number
                running.add(future)

        fill_window()
        waiting: list[Any] = []
        try:
            for future in running:
                waiting = [future]
                number = numbers.pop(future.key)
                error = future.exception() if future.status == "error" else None
                if future.status == "cancelled":
                    error = RuntimeError("the task was cancelled, or its scheduler was lost")
                yield number, None if error else future.result(), error
                fill_window()
        finally:
            running.clear()
            self.client.cancel(waiting)


def _end_with_parent() -> None:
    """Make a pool's process end when the one that began it is gone, also if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _dashboard_address() -> str:
    """Port 8787 of loopback if it is free, else any: what is shown is for this machine's user."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8787))
        except OSError:
            return "127.0.0.1:0"
    return "127.0.0.1:8787"


def _local_client(stack: ExitStack, stream: TextIO | None) -> Client:
    """A cluster of processes sized to the machine: one a core, threads only beyond 8 cores."""
    cores = available_cores()
    workers = min(cores, 8)
    cluster = stack.enter_context(
        LocalCluster(
            n_workers=workers,
            threads_per_worker=-(-cores // workers),
            host="127.0.0.1",
            dashboard_address=_dashboard_address(),
        )
    )
    if stream is not None:
        print(f"{workers} worker processes; dashboard: {cluster.dashboard_link}", file=stream)
    client: Client = stack.enter_context(Client(cluster, set_as_default=False))
    return client


def _connected(address: str) -> Client:
    try:
        return Client(address, set_as_default=False, timeout="30s")
    except (OSError, ValueError) as error:
        raise BackendUnavailable(
            "cluster",
            f"{address!r}, where no dask scheduler answers ({error})",
            "the address of a running dask scheduler",
            "Start one with `dask scheduler`, or leave cluster out to use this machine.",
        ) from error


def _active_client() -> Client | None:
    try:
        client: Client = get_client()
    except ValueError:
        return None
    return client


@contextmanager
def open_engine(cluster: Cluster = None, *, stream: TextIO | None = None) -> Iterator[Engine]:
    """Get something to run tasks on, and close what was opened for it.

    Parameters
    ----------
    cluster
        ``None``: the active dask client if there is one, else ``"local"``. ``"local"``: a dask
        cluster of this machine's processes with its dashboard. ``"threads"`` or ``"processes"``:
        a pool without any server. ``"sync"``: the calling thread. ``"tcp://..."``: a running dask
        scheduler. A dask ``Client`` or an open engine is used as it is and left open.
    stream
        Where to show progress.

    Raises
    ------
    InvalidArgument
        Unknown name.
    BackendUnavailable
        No scheduler at the address.

    Examples
    --------
    >>> with open_engine("sync") as engine:
    ...     print(engine, sorted(engine.run("abs", abs, [-1, 2])))
    SyncEngine(sync, 1 slots) [(0, 1), (1, 2)]
    """
    with ExitStack() as stack:
        if cluster is None:
            cluster = _active_client() or "local"
        if isinstance(cluster, Engine):
            yield cluster
        elif isinstance(cluster, Client):
            yield DaskEngine(cluster, stream)
        elif cluster == "sync":
            yield SyncEngine(stream)
        elif cluster == "threads":
            cores = available_cores()
            yield PoolEngine(
                "threads", stack.enter_context(cf.ThreadPoolExecutor(cores)), cores, stream
            )
        elif cluster == "processes":
            cores = available_cores()
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                cf.ProcessPoolExecutor(cores, mp_context=context, initializer=_end_with_parent)
            )
            yield PoolEngine("processes", pool, cores, stream)
        elif cluster == "local":
            yield DaskEngine(_local_client(stack, stream), stream)
        elif isinstance(cluster, str) and cluster.startswith(("tcp://", "tls://", "ucx://")):
            yield DaskEngine(stack.enter_context(_connected(cluster)), stream)
        else:
            raise InvalidArgument(
                "cluster",
                repr(cluster),
                f"one of {', '.join(CLUSTERS)}, or a dask Client",
                "Leave it out to use the active dask client or this machine.",
            )
