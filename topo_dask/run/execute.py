"""Runs block tasks on whatever is there, a bounded window at a time.

A stage is a module-level function and a list of small items. At most a few tasks per worker slot
are known to the scheduler at any moment, so that its memory does not grow with the volume; what a
task returns is small, the voxels stay on disk.
"""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import heapq
import itertools
import multiprocessing
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from distributed import Client, as_completed, get_client
from distributed.protocol.pickle import dumps

from topo_dask.errors import InvalidArgument, TaskFailed, TopoError, may_pass
from topo_dask.kernels.parallel import available_cores
from topo_dask.run.bundles import Bundle, Outcome, Packed, Sizes
from topo_dask.run.cluster import RunningCluster, start
from topo_dask.run.cluster_options import POOLS, ClusterOptions
from topo_dask.run.memory import keep_memory
from topo_dask.run.progress import Display, Progress, Usage

Cluster = Any
"""``None``, a name, a ``tcp://`` address, `ClusterOptions`, a dask ``Client``, a
`RunningCluster` or an open `Engine`."""

WINDOW = 3
"""Tasks in flight per slot: one that runs, one that waits, one on its way."""

TRIES = 3
"""How often a task is tried whose store fails: what the network breaks may work again."""


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


Sent = list[tuple[int, Any]]
"""Numbers and items of a bundle."""

Finished = tuple[list[tuple[int, Any, BaseException | None]], Usage | None]
"""Number, result and error of some items, and what they used, where that is known."""


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

    enough_s = 0.0
    """Tasks that take less time together go as one."""

    def about(self) -> str:
        """What else there is to say while it works."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.slots} slots)"

    @abstractmethod
    def _completed(self, bundle: Bundle, items: _Ready) -> Iterator[Finished]:
        """Run the bundle's function for each item; give those that finish, as they do."""

    def run(
        self,
        stage: str,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        voxels: Sequence[int] | None = None,
        order: Order | None = None,
        settled: Callable[[], None] | None = None,
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
        settled
            Called when all results that are there have been given, before more are waited for.

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
        results = self._completed(Bundle(stage, function, self.enough_s), ready)
        failed: tuple[BaseException, int] | None = None
        tries: dict[int, int] = {}
        try:
            for outcomes, usage in results:
                done = [number for number, _, error in outcomes if error is None]
                size = 0 if voxels is None else sum(voxels[number] for number in done)
                if usage is not None:
                    bar.step(len(done), size, usage)
                for number, value, error in outcomes:
                    if error is None:
                        ready.finish(number)
                        yield number, value
                        continue
                    tries[number] = tries.get(number, 1) + 1
                    if failed is None and may_pass(error) and tries[number] <= TRIES:
                        bar.retries += 1
                        time.sleep(0.1 * 4 ** (tries[number] - 2))
                        ready.again(number)
                        continue
                    failed = failed or (error, number)
                    ready.stopped = True
                if settled is not None:
                    settled()
            if failed is not None:
                _raise(failed[0], stage, items[failed[1]])
        finally:
            results.close()  # type: ignore[attr-defined]
            bar.close()
            if self.recorder is not None:
                self.recorder(bar.record())


def _raise(error: BaseException, stage: str, item: Any) -> NoReturn:
    if isinstance(error, (TopoError, KeyboardInterrupt)):
        raise error  # with the cause that it has
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    raise TaskFailed(
        f"stage {stage}, {item}",
        f"{type(error).__name__}: {error}{notes}",
        "a task that ends",
        "Nothing was published. Finished blocks are kept: pass resume=True to go on from here.",
    ) from error


class SyncEngine(Engine):
    """Runs tasks one after the other in the calling thread: for debugging and tests."""

    def __init__(self, display: Display | None = None) -> None:
        super().__init__("sync", 1, display)

    def _completed(self, bundle: Bundle, items: _Ready) -> Iterator[Finished]:
        for number, item in items:
            ((result, error),), usage = bundle([item])
            yield [(number, result, error)], usage


class PoolEngine(Engine):
    """Runs tasks on threads or processes of this machine, without any server."""

    enough_s = 0.005

    def __init__(self, name: str, pool: cf.Executor, slots: int, display: Display | None) -> None:
        super().__init__(name, slots, display)
        self.pool = pool

    def _completed(self, bundle: Bundle, items: _Ready) -> Iterator[Finished]:
        running: dict[cf.Future[Any], Sent] = {}
        sizes = Sizes(self.enough_s)
        try:
            while True:
                while len(running) < WINDOW * self.slots:
                    sent = list(itertools.islice(items, sizes.now))
                    if not sent:
                        break
                    running[self._submit(bundle, sent)] = sent
                if not running:
                    return
                finished, _ = cf.wait(running, return_when=cf.FIRST_COMPLETED)
                for future in finished:
                    sent, error = running.pop(future), future.exception()
                    yield _finished(sent, sizes, items, error or future.result())
        finally:
            for future in running:
                future.cancel()
            cf.wait(running)

    def _submit(self, bundle: Bundle, sent: Sent) -> cf.Future[Any]:
        items = [item for _, item in sent]
        if isinstance(self.pool, cf.ProcessPoolExecutor):
            return self.pool.submit(Packed(bundle), dumps(items))
        return self.pool.submit(bundle, items)


def _finished(
    sent: Sent, sizes: Sizes, items: _Ready, came: tuple[list[Outcome], Usage] | BaseException
) -> Finished:
    """What became of the items of a bundle; those that were not begun come again."""
    if isinstance(came, BaseException):
        return [(number, None, came) for number, _ in sent], None
    outcomes, usage = came
    sizes.learn(len(sent), len(outcomes), usage.seconds)
    for number, _ in sent[len(outcomes) :]:
        items.again(number)
    pairs = zip(sent, outcomes, strict=False)
    return [(number, *outcome) for (number, _), outcome in pairs], usage


class DaskEngine(Engine):
    """Runs tasks on a dask cluster through its client."""

    enough_s = 0.1

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

    def _completed(self, bundle: Bundle, items: _Ready) -> Iterator[Finished]:
        flying: dict[Any, Sent] = {}
        self._futures, sizes = flying, Sizes(self.enough_s)
        running = as_completed(loop=self.client.loop, with_results=False, raise_errors=False)

        def fill_window() -> None:
            while len(flying) < WINDOW * self.slots and self._trouble is None:
                sent = list(itertools.islice(items, sizes.now))
                if not sent:
                    return
                key = f"{bundle.stage}-{uuid.uuid4().hex}"  # the dashboard shows it
                some = sizes.weigh(dumps([item for _, item in sent]), len(sent))
                future = self.client.submit(
                    Packed(bundle), some, pure=False, key=key, resources=self.resources
                )
                flying[future] = sent
                running.add(future)

        if self._trouble is not None:
            raise self._trouble
        fill_window()
        waiting: list[Any] = []
        try:
            for future in running:
                if future.status in ("pending", "lost"):
                    running.add(future)  # its worker is gone with the result: it is made again
                    continue
                waiting, sent = [future], flying[future]
                found = self._outcomes(future)
                del flying[future]
                yield _finished(sent, sizes, items, found)
                fill_window()
        finally:
            running.clear()
            if self.client.status == "running":
                self.client.cancel([*waiting, *flying])

    def _outcomes(self, future: Any) -> tuple[list[Outcome], Usage] | BaseException:
        """What a bundle gave, or why it gave nothing."""
        try:
            found: tuple[list[Outcome], Usage] = future.result()
            return found
        except (cf.CancelledError, asyncio.CancelledError):
            lost = RuntimeError("the task was cancelled, or its scheduler was lost")
            return self._trouble or lost
        except Exception as error:
            return error


def _begin_process() -> None:
    """Make a pool's process keep its memory, and end with the one that began it.

    Also if that was killed.
    """
    keep_memory()
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
        pool = cf.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process)
    return PoolEngine(options.system, stack.enter_context(pool), workers, display)
