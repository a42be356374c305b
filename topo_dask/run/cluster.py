"""Clusters: processes of this machine, one a GPU, jobs of a batch system, a running scheduler."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from distributed import Client, LocalCluster, Scheduler, SpecCluster, Status, performance_report

from topo_dask.errors import BackendUnavailable, InvalidArgument, TopoError
from topo_dask.kernels.gpu.device import SHARE
from topo_dask.kernels.parallel import available_cores
from topo_dask.run import batch
from topo_dask.run.cluster_options import ClusterOptions, options_from
from topo_dask.run.memory import KeepingNanny, environment_kept, watch_memory

Say = Callable[[str], None]

KEEP_EVERY_S = 2.0
"""So often is looked for workers of this machine that are lost."""

BEGIN_TRIES = 3
"""How often the workers of this machine are begun, where one is lost before all are there."""


def _quiet(line: str) -> None:
    """Show nothing."""


class RunningCluster:
    """A cluster that is open; made by `start`. Pass it as ``cluster=`` to any run.

    Parameters
    ----------
    options
        What it was made of.
    client
        To its scheduler.
    link
        Of its dashboard.
    jobs
        Those of a batch system.
    """

    def __init__(
        self,
        options: ClusterOptions,
        client: Client,
        link: str = "",
        jobs: batch.Jobs | None = None,
    ) -> None:
        self.options, self.client, self.jobs = options, client, jobs
        self.dashboard_link = link
        self._stack = ExitStack()

    @property
    def slots(self) -> int:
        """Tasks that it runs at once, when all its workers are there."""
        return self.jobs.slots if self.jobs is not None else sum(self.client.nthreads().values())

    @property
    def workers(self) -> int:
        """Worker processes that are there now."""
        return len(self.client.nthreads())

    @property
    def trouble(self) -> TopoError | None:
        """Why it cannot go on, if it cannot."""
        return None if self.jobs is None else self.jobs.trouble

    def close(self) -> None:
        """End its workers and jobs."""
        self._stack.close()

    def __enter__(self) -> RunningCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        link = f", dashboard {self.dashboard_link}" if self.dashboard_link else ""
        return f"RunningCluster({self.options.system}, {self.slots} slots{link})"


def start(
    cluster: str | ClusterOptions = "local", *, say: Say = _quiet, **settings: Any
) -> RunningCluster:
    """Open a cluster, for one run or for many.

    Parameters
    ----------
    cluster
        `ClusterOptions`, or the name of a system.
    say
        Called with lines for people: where the dashboard is, what becomes of jobs.
    settings
        Options by name, where ``cluster`` is a name.

    Returns
    -------
    RunningCluster
        A context manager: on any exit (also Ctrl-C and SIGTERM) its workers and jobs are ended.

    Raises
    ------
    InvalidArgument
        Options that make no sense.
    BackendUnavailable
        No scheduler at the address, no GPU, no dask-jobqueue, a batch system that refuses.

    Examples
    --------
    >>> with start("local", workers=1) as running:
    ...     running.client.submit(abs, -2).result()
    2
    """
    options = cluster if isinstance(cluster, ClusterOptions) else None
    if options is None:
        options = options_from({"system": cluster, **settings})
    elif settings:
        allowed = "options by name only where cluster is a name"
        raise InvalidArgument("cluster", repr(options), allowed, "Use dataclasses.replace.")
    with ExitStack() as stack:
        running = _opened(options, stack, say)
        running._stack = stack.pop_all()
    return running


def job_script(cluster: str | ClusterOptions, **settings: Any) -> str:
    """The script of a batch job, as it would be submitted; nothing is.

    Parameters
    ----------
    cluster, settings
        As for `start`.

    Raises
    ------
    InvalidArgument
        Not a batch system, or options that make no sense.
    BackendUnavailable
        dask-jobqueue is not there.
    """
    options = cluster if isinstance(cluster, ClusterOptions) else None
    if options is None:
        options = options_from({"system": cluster, **settings})
    if not options.is_batch:
        known = f"one of {', '.join(batch.CLASSES)}"
        raise InvalidArgument("cluster", repr(options.system), known, "Only they have jobs.")
    return batch.job_script(options)


def _opened(options: ClusterOptions, stack: ExitStack, say: Say) -> RunningCluster:
    if options.is_address:
        return _reported(stack, RunningCluster(options, stack.enter_context(connected(options))))
    if options.is_batch:
        return _reported(stack, _of_jobs(options, stack, say))
    if options.system in ("local", "gpu"):
        stack.enter_context(environment_kept())
        with batch.other_port():
            cluster = stack.enter_context(_begun(options))
        stack.enter_context(kept_up(cluster))
        client = stack.enter_context(Client(cluster, set_as_default=False))
        watch_memory(client)
        what = "worker processes" if options.system == "local" else "GPUs, a worker process each"
        say(f"{len(cluster.workers)} {what}; dashboard: {cluster.dashboard_link}")
        return _reported(stack, RunningCluster(options, client, cluster.dashboard_link))
    allowed = "one with a dask scheduler: local, gpu, a batch system, tcp://HOST:PORT"
    raise InvalidArgument("cluster", repr(options.system), allowed, "Threads need no start.")


def _reported(stack: ExitStack, running: RunningCluster) -> RunningCluster:
    """Have dask write its performance report, if wanted; one that works without the web."""
    path = running.options.performance_report
    if path is not None:
        _check_report(path)
        stack.enter_context(_report(running, os.path.abspath(path)))
    return running


@contextmanager
def _report(running: RunningCluster, path: str) -> Iterator[None]:
    with running.client.as_current():
        report = performance_report(path, mode="inline")
        report.__enter__()
    try:
        yield
    finally:
        # Not if the scheduler is lost: the error that says so is what matters then.
        if running.client.status == "running" and running.trouble is None:
            with running.client.as_current():
                report.__exit__(None, None, None)


def _check_report(path: str) -> None:
    try:
        import bokeh  # type: ignore[import-untyped,import-not-found,unused-ignore] # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "performance_report",
            f"{path!r}, but bokeh is not there",
            "it with bokeh",
            'Install it: pip install "topo_dask[view]".',
        ) from error
    if not Path(path).absolute().parent.is_dir():
        allowed = "a file in a folder that is there"
        raise InvalidArgument("performance_report", repr(path), allowed, "Make the folder first.")


# ------------------------------------------------------------------------------ this machine


def free_dashboard() -> str:
    """Port 8787 of loopback if it is free, else any: what is shown is for this machine's user."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8787))
        except OSError:
            return "127.0.0.1:0"
    return "127.0.0.1:8787"


def _host(options: ClusterOptions) -> dict[str, Any]:
    """Where a cluster of this machine listens: on loopback, unless told otherwise."""
    if options.interface is not None:
        return {"interface": options.interface}
    return {"host": "127.0.0.1"}


def _begun(options: ClusterOptions) -> SpecCluster:
    """Workers of this machine; dask gives all of them up where one is killed while it begins."""
    make = local_workers if options.system == "local" else gpu_workers
    for left in reversed(range(BEGIN_TRIES)):
        try:
            return make(options)
        except TopoError:  # that there is no GPU, for one: it says so itself
            raise
        except RuntimeError as error:
            if left == 0:
                said = str(error.__cause__ or error)
                raise BackendUnavailable(
                    "cluster",
                    f"{options.system!r}, whose workers do not begin ({said})",
                    "worker processes that begin",
                    "What they said is above. Is there memory for them? Try fewer: workers=1.",
                ) from error
    raise AssertionError("unreachable: the last try raises")


def local_workers(options: ClusterOptions) -> LocalCluster:
    """A cluster of processes sized to the machine: one a core, threads only beyond 8 cores."""
    cores = available_cores()
    workers = options.workers or min(cores, 8)
    limit: dict[str, Any] = {} if options.memory is None else {"memory_limit": options.memory}
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=options.cores or max(1, -(-cores // workers)),
        dashboard_address=options.dashboard or free_dashboard(),
        local_directory=options.local_directory,
        security=batch.security_of(options),
        worker_class=KeepingNanny,
        **_host(options),
        **limit,
    )


@contextmanager
def kept_up(cluster: SpecCluster) -> Iterator[None]:
    """Bring back workers that dask has given up.

    It does so with one that was not there for `distributed.deploy.lost-worker-timeout`: one that
    died again while it began, or took long to begin, or slept with its machine; and it keeps one
    that failed to begin, as where the one in whose place it comes is not quite gone. Where all are
    given up, a run would wait for ever.
    """
    over = threading.Event()

    def keep() -> None:
        while not over.wait(KEEP_EVERY_S):
            for name, worker in list(cluster.workers.items()):
                if worker.status in (Status.closed, Status.failed):
                    cluster.workers.pop(name, None)
            if len(cluster.workers) < len(cluster.worker_spec):
                cluster.scale(len(cluster.worker_spec))

    thread = threading.Thread(target=keep, name="keep workers up", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show this process, as CUDA_VISIBLE_DEVICES names them.

    Raises
    ------
    BackendUnavailable
        There is none; why is said.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = ""
    found: list[str] = []
    program = shutil.which("nvidia-smi")
    if program is None:
        reason = "no program nvidia-smi"
    else:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
        found = re.findall(r"^GPU (\d+):", done.stdout, flags=re.MULTILINE)
        reason = (done.stderr or done.stdout).strip().split("\n")[0] or "nvidia-smi lists none"
    if found and wanted is not None:
        found = [name.strip() for name in wanted.split(",") if name.strip() not in ("", "-1")]
        reason = f"CUDA_VISIBLE_DEVICES={wanted!r}"
    if not found:
        raise BackendUnavailable(
            "cluster",
            f"'gpu' on {socket.gethostname()}, where there is no CUDA GPU ({reason})",
            "it on a machine with a GPU and its driver",
            "Leave it out to use the processor.",
        )
    return found


def gpu_workers(options: ClusterOptions) -> SpecCluster:
    """A worker process with one thread for each GPU, which sees no other; resource ``GPU``.

    Its pool of device memory keeps what it has got, up to the share that is its own.
    """
    gpus = visible_gpus()[: options.workers]
    share = options.device_memory or "90%"
    shared: dict[str, Any] = {"nthreads": 1, "resources": {"GPU": 1}, "dashboard": False}
    if options.memory is not None:
        shared["memory_limit"] = options.memory
    if options.local_directory is not None:
        shared["local_directory"] = options.local_directory
    security = batch.security_of(options)
    shared |= {"security": security, **_host(options)}
    workers = {
        f"gpu-{name}": {
            "cls": KeepingNanny,
            "options": {**shared, "env": {"CUDA_VISIBLE_DEVICES": name, SHARE: share}},
        }
        for name in gpus
    }
    listening = {"dashboard_address": options.dashboard or free_dashboard(), "security": security}
    if security is not None:
        listening["protocol"] = "tls://"
    return SpecCluster(
        workers=workers,
        scheduler={"cls": Scheduler, "options": {"port": 0, **listening, **_host(options)}},
        security=security,
        silence_logs="warning",
    )


# --------------------------------------------------------------------------------- elsewhere


def connected(options: ClusterOptions) -> Client:
    """A client of a running scheduler.

    Raises
    ------
    BackendUnavailable
        None answers.
    """
    security = batch.security_of(options)
    more: dict[str, Any] = {} if security is None else {"security": security}
    try:
        return Client(options.system, set_as_default=False, timeout="30s", **more)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise BackendUnavailable(
            "cluster",
            f"{options.system!r}, where no dask scheduler answers ({error})",
            "the address of a running dask scheduler",
            "Start one with `dask scheduler`, or leave cluster out to use this machine.",
        ) from error


def _of_jobs(options: ClusterOptions, stack: ExitStack, say: Say) -> RunningCluster:
    stack.enter_context(signals_as_exceptions())
    jobs = batch.open_jobs(options, free_dashboard(), say)
    stack.callback(jobs.close)
    client = stack.enter_context(Client(jobs.cluster, set_as_default=False))
    watch_memory(client)
    link = jobs.cluster.dashboard_link
    say(f"{options.jobs or 1} {options.system} jobs; dashboard: {link}; logs: {jobs.logs}")
    return RunningCluster(options, client, link, jobs)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, so that its jobs are cancelled.

    Only where nobody else minds these signals; as it was, afterwards.
    """

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    names = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n is not None]
    before = {n: signal.getsignal(n) for n in names}
    ours = threading.current_thread() is threading.main_thread()
    mine = [n for n in names if ours and before[n] is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])
