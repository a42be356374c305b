"""Runs block tasks on whatever is there, a bounded window at a time.

A stage is a module-level function and a list of small items. At most a few tasks per worker slot
are known to the scheduler at any moment, so that its memory does not grow with the volume; what a
task returns is small, the voxels stay on disk.
"""

from __future__ import annotations

import concurrent.futures as cf
import errno
import heapq
import itertools
import multiprocessing
import os
import pickle
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from distributed import Client, as_completed, get_client
from distributed.protocol.pickle import dumps, loads

from topo_dask.errors import InvalidArgument, TaskFailed, TopoError
from topo_dask.kernels.parallel import available_cores
from topo_dask.run.cluster import RunningCluster, start
from topo_dask.run.cluster_options import POOLS, ClusterOptions
from topo_dask.run.progress import Display, Measured, Progress

Cluster = Any
"""``None``, a name, a ``tcp://`` address, `ClusterOptions`, a dask ``Client``, a
`RunningCluster` or an open `Engine`."""

WINDOW = 3
"""Tasks in flight per slot: one that runs, one that waits, one on its way."""

TRIES = 3
"""How often a task is tried whose store fails: what the network breaks may work again."""

FOR_GOOD = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG, errno.ENAMETOOLONG),
)
"""Errors of a file system that a second try does not mend."""

STORES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "obstore", "requests", "s3fs")
"""Libraries whose errors are those of a store far away."""


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

    def again(self, number: int) -> None:
        """An item is to be tried once more."""
        heapq.heappush(self.ready, number)

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
    display
        Where progress is shown; ``None`` for nowhere.
    """

    def __init__(self, name: str, slots: int, display: Display | None = None) -> None:
        self.name = name
        self.slots = max(1, slots)
        self.display = display
        self.recorder: Callable[[dict[str, Any]], None] | None = None

    def about(self) -> str:
        """What else there is to say while it works."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.slots} slots)"

    @abstractmethod
    def _completed(
        self, function: Callable[[Any], Any], items: _Ready
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
        bar = Progress(stage, len(items), sum(voxels or ()), self.display, self.about)
        ready = _Ready(items, order)
        results = self._completed(Measured(stage, function), ready)
        failed: tuple[BaseException, int] | None = None
        tries: dict[int, int] = {}
        try:
            for number, result, error in results:
                if error is not None:
                    tries[number] = tries.get(number, 1) + 1
                    if failed is None and may_pass(error) and tries[number] <= TRIES:
                        bar.retries += 1
                        time.sleep(0.1 * 4 ** (tries[number] - 2))
                        ready.again(number)
                        continue
                    failed = failed or (error, number)
                    ready.stopped = True
                    continue
                ready.finish(number)
                value, usage = result
                bar.step(voxels[number] if voxels is not None else 0, usage)
                yield number, value
            if failed is not None:
                _raise(failed[0], stage, items[failed[1]])
        finally:
            results.close()  # type: ignore[attr-defined]
            bar.close()
            if self.recorder is not None:
                self.recorder(bar.record())


def may_pass(error: BaseException) -> bool:
    """Whether an error is one of a store that may be gone at a second try.

    Examples
    --------
    >>> may_pass(ConnectionResetError()), may_pass(FileNotFoundError(2, "gone"))
    (True, False)
    """
    if isinstance(error, TopoError):
        return False
    if isinstance(error, OSError):
        return error.errno not in FOR_GOOD and not isinstance(error, FileNotFoundError)
    return type(error).__module__.split(".")[0] in STORES


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

    def __init__(self, display: Display | None = None) -> None:
        super().__init__("sync", 1, display)

    def _completed(
        self, function: Callable[[Any], Any], items: _Ready
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        for number, item in items:
            try:
                result = function(item)
            except Exception as error:
                yield number, None, error
                continue
            yield number, result, None


class PoolEngine(Engine):
    """Runs tasks on threads or processes of this machine, without any server."""

    def __init__(self, name: str, pool: cf.Executor, slots: int, display: Display | None) -> None:
        super().__init__(name, slots, display)
        self.pool = pool

    def _completed(
        self, function: Callable[[Any], Any], items: _Ready
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


Outcome = tuple[Any, BaseException | None]
"""Result and error of an item."""

BUNDLE = 64
"""So many short tasks go to a dask worker together, at most."""

BUNDLE_S = 0.1
"""A worker that has worked so long on a bundle begins none of its other tasks."""


@dataclass(frozen=True)
class Bundle:
    """A function of one item, made one of several, for tasks that take less than to submit one."""

    function: Callable[[Any], Any]

    def __call__(self, items: bytes) -> tuple[list[Outcome], float]:
        """What becomes of the first items, as many as are begun in `BUNDLE_S`; seconds.

        They come as bytes: the scheduler keeps the last 1000 messages to each worker, and bytes
        take a tenth of the memory.
        """
        began = time.perf_counter()
        found: list[Outcome] = []
        for item in loads(items):
            if found and time.perf_counter() - began > BUNDLE_S:
                break
            try:
                found.append((self.function(item), None))
            except Exception as error:
                found.append((None, portable(error)))
        return found, time.perf_counter() - began


def portable(error: Exception) -> Exception:
    """An error as it can travel: itself, or one that says the same.

    Examples
    --------
    >>> portable(ValueError("3")), portable(ValueError(lambda: 3)).args[0][:10]
    (ValueError('3'), 'ValueError')
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what it holds may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class DaskEngine(Engine):
    """Runs tasks on a dask cluster through its client."""

    def __init__(
        self, client: Client, display: Display | None, cluster: RunningCluster | None = None
    ) -> None:
        slots = sum(client.nthreads().values()) if cluster is None else cluster.slots
        address = str(client.scheduler.address if client.scheduler else "dask")
        system = None if cluster is None else cluster.options.system
        named = address if system in (None, address) else f"{system} ({address})"
        super().__init__(named, slots, display)
        self.client, self.cluster = client, cluster
        self.resources = {"GPU": 1} if system == "gpu" else None
        self._futures: dict[Any, list[tuple[int, Any]]] = {}
        self._counted = (0.0, "")
        if cluster is not None and cluster.jobs is not None:
            cluster.jobs.on_trouble.append(self._stop)

    def _stop(self) -> None:
        """Nothing will come any more: what is waited for comes back as cancelled."""
        self.client.cancel(list(self._futures))

    def about(self) -> str:
        """Workers that are there, jobs that wait or were lost."""
        now = time.monotonic()
        if now - self._counted[0] > 2:  # asking the scheduler takes its time too
            parts = [f"{len(self.client.nthreads())} workers"]
            if self.cluster is not None and self.cluster.jobs is not None:
                jobs = self.cluster.jobs
                parts += [jobs.waiting(), f"{jobs.lost} jobs lost" if jobs.lost else ""]
            self._counted = now, "  ".join(filter(None, parts))
        return self._counted[1]

    @property
    def _trouble(self) -> TopoError | None:
        return None if self.cluster is None else self.cluster.trouble

    def _completed(
        self, function: Callable[[Any], Any], items: _Ready
    ) -> Iterator[tuple[int, Any, BaseException | None]]:
        flying: dict[Any, list[tuple[int, Any]]] = {}
        self._futures, size = flying, 1
        running = as_completed(loop=self.client.loop, with_results=False, raise_errors=False)
        stage = getattr(function, "stage", "task")  # the dashboard shows it

        def fill_window() -> None:
            while len(flying) < WINDOW * self.slots and self._trouble is None:
                bundle = list(itertools.islice(items, size))
                if not bundle:
                    return
                key = f"{stage}-{uuid.uuid4().hex}"
                some = dumps([item for _, item in bundle])
                future = self.client.submit(
                    Bundle(function), some, pure=False, key=key, resources=self.resources
                )
                flying[future] = bundle
                running.add(future)

        if self._trouble is not None:
            raise self._trouble
        fill_window()
        waiting: list[Any] = []
        try:
            for future in running:
                waiting = [future]
                bundle = flying.pop(future)
                outcomes, seconds = self._outcomes(future, len(bundle))
                for number, _ in bundle[len(outcomes) :]:
                    items.again(number)
                for (number, _), (result, error) in zip(bundle, outcomes, strict=False):
                    yield number, result, error
                fast = seconds < BUNDLE_S / 2 and len(outcomes) == len(bundle)
                size = min(BUNDLE, 2 * len(bundle)) if fast else len(outcomes)
                fill_window()
        finally:
            running.clear()
            if self.client.status == "running":
                self.client.cancel([*waiting, *flying])

    def _outcomes(self, future: Any, count: int) -> tuple[list[Outcome], float]:
        """What a bundle of so many items gave."""
        if future.status == "finished":
            found: tuple[list[Outcome], float] = future.result()
            return found
        lost = RuntimeError("the task was cancelled, or its scheduler was lost")
        error = future.exception() if future.status == "error" else self._trouble or lost
        return [(None, error)] * count, BUNDLE_S


def _end_with_parent() -> None:
    """Make a pool's process end when the one that began it is gone, also if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def active_client() -> Client | None:
    """Dask's active client, if there is one."""
    try:
        client: Client = get_client()
    except ValueError:
        return None
    return client


@contextmanager
def open_engine(cluster: Cluster = None, *, display: Display | None = None) -> Iterator[Engine]:
    """Get something to run tasks on, and close what was opened for it.

    Parameters
    ----------
    cluster
        ``None``: the active dask client if there is one, else ``"local"``. ``"local"``: a dask
        cluster of this machine's processes with its dashboard. ``"threads"`` or ``"processes"``:
        a pool without any server. ``"sync"``: the calling thread. ``"gpu"``, the name of a batch
        system, ``"tcp://..."`` or `ClusterOptions`: see there. A dask ``Client``, a
        `RunningCluster` or an open engine is used as it is and left open.
    display
        Where to show progress.

    Raises
    ------
    InvalidArgument
        Unknown name.
    BackendUnavailable
        No scheduler at the address, no GPU, a batch system that refuses.

    Examples
    --------
    >>> with open_engine("sync") as engine:
    ...     print(engine, sorted(engine.run("abs", abs, [-1, 2])))
    SyncEngine(sync, 1 slots) [(0, 1), (1, 2)]
    """
    with ExitStack() as stack:
        if cluster is None:
            cluster = active_client() or "local"
        if isinstance(cluster, Engine):
            yield cluster
        elif isinstance(cluster, Client):
            yield DaskEngine(cluster, display)
        elif isinstance(cluster, RunningCluster):
            yield DaskEngine(cluster.client, display, cluster)
        else:
            options = cluster if isinstance(cluster, ClusterOptions) else ClusterOptions(cluster)
            yield _opened(options, stack, display)


def _opened(options: ClusterOptions, stack: ExitStack, display: Display | None) -> Engine:
    if options.system not in POOLS:
        say = display.leave if display is not None else None
        running = start(options, **({} if say is None else {"say": say}))
        return DaskEngine(stack.enter_context(running).client, display, running)
    if options.performance_report is not None:
        raise InvalidArgument(
            "performance_report",
            f"{options.performance_report!r} with cluster {options.system!r}",
            "it where dask has a scheduler",
            "Use cluster local.",
        )
    if options.system == "sync":
        return SyncEngine(display)
    workers = options.workers or available_cores()
    pool: cf.Executor
    if options.system == "threads":
        pool = cf.ThreadPoolExecutor(workers)
    else:
        context = multiprocessing.get_context("spawn")
        pool = cf.ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    return PoolEngine(options.system, stack.enter_context(pool), workers, display)
