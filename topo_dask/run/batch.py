"""Workers as jobs of a batch system: dask-jobqueue submits, this looks after what becomes of it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import dask
from distributed import Security
from distributed.deploy.spec import ProcessInterface
from distributed.utils import get_ip

from topo_dask.errors import BackendUnavailable, InvalidArgument, TopoError
from topo_dask.run.cluster_options import BATCH, DEFAULTS, ClusterOptions, clock, seconds_of
from topo_dask.run.memory import KEEP_IN_SHELL

CLASSES = {
    "slurm": "SLURM",
    "pbs": "PBS",
    "lsf": "LSF",
    "sge": "SGE",
    "htcondor": "HTCondor",
    "oar": "OAR",
}
"""How dask-jobqueue calls them."""

ACCOUNT = {"slurm": "account", "pbs": "account", "lsf": "project", "sge": "project"} | {
    "oar": "project"
}

OLD_NAMES = {
    "extra": "worker_extra_args",
    "job_extra": "job_extra_directives",
    "env_extra": "job_script_prologue",
    "header_skip": "job_directives_skip",
}
"""Names of settings that dask-jobqueue has given up."""

PLACEHOLDER = "tcp://SCHEDULER:PORT"
"""The scheduler in a job script that is only shown."""

POLL_S = 2.0
"""Pause between two questions to the batch system."""

ASK_AT_ONCE = 8
"""Jobs without workers that one round of questions is about: batch systems want to be spared."""

STARTS = 3
"""Jobs in a row that may end before their workers came, where others came before."""

TAIL = 15
"""Lines of a job's log that an error shows."""


@dataclass(frozen=True)
class Ask:
    """How a batch system is asked for a job: a command, and what it says of one that lives."""

    command: str
    alive: str
    explain: str = ""


ASK = {
    "slurm": Ask(
        "squeue -h -j {id} -o '%T %r'",
        r"PENDING|CONFIGURING|RUNNING|SUSPENDED|REQUEUED|STOPPED|RESIZING",
        "scontrol -o show job {id}",
    ),
    "pbs": Ask("qstat {id}", r"^\d\S*\s.*\s[BHMQRSTUW]\s+\S+\s*$"),
    "lsf": Ask("bjobs -noheader -o stat {id}", r"PEND|PROV|PSUSP|RUN|SUSP|WAIT"),
    "sge": Ask("qstat -j {id}", r"job_number"),
    "htcondor": Ask("condor_q {id} -af JobStatus", r"^\s*[12567]\b"),
    "oar": Ask("oarstat -s -j {id}", r"Waiting|Hold|Launching|Running|Resuming|Suspended"),
}
NO_SUCH_JOB = r"(?i)invalid job|unknown job|has finished|not found|not exist|no such"


# ---------------------------------------------------------------------------------- settings


def load() -> Any:
    """The package dask_jobqueue, imported so that it writes nothing into the user's folder.

    Raises
    ------
    BackendUnavailable
        It is not installed.
    """
    # When imported it copies a template to dask.config.PATH (what stands in files there dask itself
    # has read by now), and takes Ctrl-C away from Python: it would end the process with status 0.
    there = dask.config.PATH
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with tempfile.TemporaryDirectory(prefix="topo-dask-") as elsewhere:
        dask.config.PATH = elsewhere
        try:
            import dask_jobqueue
        except ImportError as error:
            raise BackendUnavailable(
                "cluster",
                f"a batch system, but dask-jobqueue is not there ({error})",
                "it with dask-jobqueue >= 0.9",
                'Install it: pip install "topo_dask[hpc]".',
            ) from error
        except ValueError as error:  # only the main thread may mind signals
            raise BackendUnavailable(
                "cluster",
                f"a batch system, first asked for in a thread ({error})",
                "it from the main thread, the first time",
                "Call topo_dask.cluster.job_script there before.",
            ) from error
        finally:
            dask.config.PATH = there
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
    return dask_jobqueue


def section(system: str, site: str | None) -> dict[str, Any]:
    """The settings of a system in ``jobqueue.yaml``, under those of a site's section."""
    load()
    every = dask.config.get("jobqueue", {})
    named: dict[str, Any] = {}
    if site is not None:
        if site not in every:
            others = ", ".join(sorted(set(every) - set(BATCH) - {"local", "moab"}))
            raise InvalidArgument(
                "site",
                repr(site),
                f"a section of dask's jobqueue.yaml ({others or 'there is none of a site'})",
                f"Write one under 'jobqueue:' in {dask.config.PATH}/jobqueue.yaml.",
            )
        named = every[site]
    merged: dict[str, Any] = {}
    for part in (every[system], named):
        for key, value in part.items():
            name = str(key).replace("-", "_")
            if value is not None:
                merged[OLD_NAMES.get(name, name)] = value
    if "name" in merged:
        merged["job_name"] = merged.pop("name")
    return merged


def _known_names(system: str) -> set[str]:
    names = {str(key).replace("-", "_") for key in dask.config.get(f"jobqueue.{system}")}
    return names - set(OLD_NAMES) - {"name"}


def arguments(options: ClusterOptions, *, dashboard: str = "127.0.0.1:0") -> dict[str, Any]:
    """All that dask-jobqueue is to be told, by its names; nothing is left to its configuration.

    Raises
    ------
    InvalidArgument
        A setting that the system does not know, or lacks.
    BackendUnavailable
        dask-jobqueue is not there.
    """
    system, made = options.system, section(options.system, options.site)
    for name, value in options.more:
        if name not in _known_names(system):
            allowed = ", ".join(sorted((_known_names(system) | set(DEFAULTS)) - {"more"}))
            raise InvalidArgument("cluster option", repr(name), f"with {system}: {allowed}")
        made[name] = value
    for name in ("cores", "processes", "memory", "interface", "python", "job_name", "queue"):
        if getattr(options, name) is not None:
            made[name] = getattr(options, name)
    for name in ("local_directory", "death_timeout", "log_directory"):
        if getattr(options, name) is not None:
            made[name] = getattr(options, name)
    if made.get("job_name") == "dask-worker":
        made["job_name"] = "topo-dask"
    made["log_directory"] = os.path.abspath(made.get("log_directory") or "topo-dask-logs")
    _require(system, made)
    cores = made["cores"]
    # One process a core as on one machine; threads only where there are many cores.
    most = max(n for n in range(1, min(8, cores) + 1) if cores % n == 0)
    made.setdefault("processes", most)
    _own_words(options, made)
    _times(options, made)
    _addresses(options, made, dashboard)
    return made


def _require(system: str, made: dict[str, Any]) -> None:
    needed = ["cores", "memory", *(["disk"] if system == "htcondor" else [])]
    missing = [name for name in needed if made.get(name) is None]
    if missing:
        given = " ".join(f"--cluster-option {name}=..." for name in missing)
        raise InvalidArgument(
            ", ".join(missing),
            "nothing",
            f"what a job of {system} shall have",
            f"Pass {given}, or write it into dask's jobqueue.yaml.",
        )


def _own_words(options: ClusterOptions, made: dict[str, Any]) -> None:
    """Account, directives and prologue, in the system's own words."""
    directives: Any = made.get("job_extra_directives") or []
    if options.system == "htcondor":
        directives = dict(directives)
        for line in options.directives:
            key, mark, value = line.partition("=")
            if not mark:
                allowed = "key=value with htcondor"
                raise InvalidArgument("directives", repr(line), allowed)
            directives[key.strip()] = value.strip()
        if options.account is not None:
            directives["accounting_group"] = options.account
    else:
        directives = [*directives, *options.directives]
        if options.account is not None:
            made[ACCOUNT[options.system]] = options.account
    # This replaces lost jobs; the batch system must not as well.
    if options.system == "slurm" and not any("requeue" in line for line in directives):
        directives.append("--no-requeue")
    if options.system == "oar":
        made.setdefault("memory_per_core_property_name", "not_applicable")
        # dask-jobqueue leaves its logs in the working directory.
        for option, long, end in (("-O", "--stdout", "out"), ("-E", "--stderr", "err")):
            if not any(line.split("=")[0].split()[0] in (option, long) for line in directives):
                directives.append(f"{option} {made['log_directory']}/%jobid%.{end}")
    made["job_extra_directives"] = directives
    theirs = [*made.get("job_script_prologue", []), *options.prologue]
    made["job_script_prologue"] = [KEEP_IN_SHELL, *theirs]  # the user's may change it


def _times(options: ClusterOptions, made: dict[str, Any]) -> None:
    """Walltime in the system's form, and workers that leave before it."""
    if options.walltime is not None:
        made["walltime"] = options.walltime
        if options.system == "lsf":
            hours, minutes, seconds = map(int, options.walltime.split(":"))
            whole = hours * 60 + minutes + (seconds > 0)
            made["walltime"] = f"{whole // 60:02d}:{whole % 60:02d}"
    walltime = walltime_seconds(options.system, made.get("walltime"))
    if options.system == "htcondor":
        made.pop("walltime", None)  # it has none; the workers keep to it
    extra = list(made.get("worker_extra_args") or [])
    own = "--lifetime" in extra
    if options.lifetime == "auto" and not own:
        if walltime is not None:
            lifetime, stagger = lifetime_before(walltime)
            extra += ["--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"]
    elif options.lifetime not in ("auto", "none"):
        wanted = seconds_of("lifetime", options.lifetime)
        if walltime is not None and wanted >= walltime:
            allowed = f"less than the walltime, {clock(walltime)}"
            raise InvalidArgument("lifetime", repr(options.lifetime), allowed, "Leave it out.")
        extra += ["--lifetime", f"{wanted}s"]
    if not any("dashboard" in word for word in map(str, extra)):
        extra.append("--no-dashboard")  # it would listen on every address
    made["worker_extra_args"] = extra


def walltime_seconds(system: str, text: Any) -> int | None:
    """Seconds of a walltime as the batch system reads it; ``None`` if it says nothing.

    Examples
    --------
    >>> walltime_seconds("slurm", "30"), walltime_seconds("lsf", "1:30")
    (1800, 5400)
    """
    if text is None:
        return None
    days, _, rest = str(text).rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if days else [])]):
        return None
    numbers = [int(part) for part in parts]
    if days:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    elif len(numbers) == 2:
        first_is_hours = system == "lsf"
        hours, minutes, seconds = (*numbers, 0) if first_is_hours else (0, *numbers)
    else:
        in_minutes = system in ("slurm", "lsf") and isinstance(text, str)
        hours, minutes, seconds = (0, numbers[0], 0) if in_minutes else (0, 0, numbers[0])
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def lifetime_before(walltime: int) -> tuple[int, int]:
    """Lifetime and stagger of workers, in seconds, so that all leave before the walltime.

    A tenth of it, between half a minute and ten minutes (but never more than a third), is kept
    free; workers leave within as long before that, not all at once.

    Examples
    --------
    >>> lifetime_before(3600), lifetime_before(60)
    ((2880, 360), (30, 10))
    """
    free = min(max(walltime // 10, 30), 600, walltime // 3)
    stagger = min(free, walltime // 6)
    return walltime - free - stagger, stagger


def _addresses(options: ClusterOptions, made: dict[str, Any], dashboard: str) -> None:
    """Where the scheduler listens: on one address, the dashboard on loopback, unless told."""
    given = dict(made.get("scheduler_options") or {})
    given.setdefault("dashboard_address", dashboard)
    if options.dashboard is not None:
        given["dashboard_address"] = options.dashboard
    if made.get("interface") is None and not {"host", "interface"} & set(given):
        given["host"] = get_ip()
    made["scheduler_options"] = given
    made["security"] = security_of(options)


def security_of(options: ClusterOptions) -> Security | None:
    """Encryption with certificates on both sides, if its files are given."""
    if options.tls_ca_file is None:
        return None
    pair = {
        f"tls_{role}_{kind}": path
        for role in ("scheduler", "worker", "client")
        for kind, path in (("cert", options.tls_cert), ("key", options.tls_key))
    }
    return Security(tls_ca_file=options.tls_ca_file, require_encryption=True, **pair)


@contextlib.contextmanager
def other_port() -> Iterator[None]:
    """Let a dashboard whose port was taken a moment ago have another, in silence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)\s*Port \d+ is already in use")
        yield


def job_class(system: str) -> Any:
    """dask-jobqueue's class of a job, which tells when it is closed and why it was refused."""
    jobs = load()
    base = getattr(jobs, f"{CLASSES[system]}Cluster").job_cls

    class Job(base):  # type: ignore[misc, valid-type]
        refused: str | None = None
        submitted: ClassVar[list[str]] = []  # of this cluster: each has a class of its own

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                self.refused = _message(error)
                raise
            self.submitted.append(str(self.job_id))

        async def close(self) -> None:
            await super().close()
            # The base class never says so; the cluster would wait for ever, or fail.
            await ProcessInterface.close(self)

        async def _submit_job(self, script_filename: str) -> Any:
            if system == "lsf" and self.use_stdin:  # the base class drops what it says
                command = f"{self.submit_command} < {shlex.quote(script_filename)}"
                return await self._call([command], shell=True)
            return await super()._submit_job(script_filename)

    return Job


def _message(error: BaseException) -> str:
    """What the batch system said, out of dask-jobqueue's text around it."""
    parts = re.split(r"\n(?:stdout|stderr):\n", str(error))
    said = " ".join(part.strip() for part in parts[1:] if part.strip())
    return said or f"{type(error).__name__}: {error}"


def job_script(options: ClusterOptions) -> str:
    """The script that would be submitted for a job; nothing is submitted or left on disk."""
    made = arguments(options)
    for name in ("scheduler_options", "shared_temp_directory"):
        made.pop(name, None)
    folder = Path(made["log_directory"])
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    # Only a job's worker name is not known yet.
    text = str(job_class(options.system)(PLACEHOLDER, name="WORKER", **made).job_script())
    for path in new:
        path.rmdir()
    return text


# ------------------------------------------------------------------------------------- jobs


def open_jobs(options: ClusterOptions, dashboard: str, say: Callable[[str], None]) -> Jobs:
    """Submit the first jobs.

    Raises
    ------
    BackendUnavailable
        The batch system refuses them, with its message.
    """
    made = arguments(options, dashboard=dashboard)
    kind = getattr(load(), f"{CLASSES[options.system]}Cluster")
    with other_port():
        try:
            cluster = kind(job_cls=job_class(options.system), **made)
        except (RuntimeError, OSError, ValueError) as error:
            raise BackendUnavailable(
                "cluster",
                f"{options.system}, where the scheduler does not start ({error})",
                "options with which it does",
                "Check interface and dashboard.",
            ) from error
    jobs = Jobs(cluster, options, made["cores"], made["log_directory"], say)
    try:
        jobs.begin()
    except BaseException:
        jobs.close()
        raise
    return jobs


@dataclass
class Known:
    """What is known of a job."""

    id: str
    came: bool = False
    missing: int = 0
    asked: float = 0.0
    says: str = ""


@dataclass(eq=False)
class Jobs:
    """The jobs of a cluster: lost ones are replaced, hopeless ones become an error.

    Parameters
    ----------
    cluster
        Of dask-jobqueue.
    options
        What was asked for.
    cores
        Of each job.
    logs
        Where the jobs' logs are.
    say
        Called with a line for people.
    """

    cluster: Any
    options: ClusterOptions
    cores: int
    logs: str
    say: Callable[[str], None]
    trouble: TopoError | None = None
    lost: int = 0
    on_trouble: list[Callable[[], None]] = field(default_factory=list)
    _known: dict[str, Known] = field(default_factory=dict)
    _failed_starts: int = 0
    _ever_came: bool = False
    _told: set[tuple[str, str]] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def system(self) -> str:
        """Name of the batch system."""
        return self.options.system

    @property
    def slots(self) -> int:
        """Tasks that all jobs together run at once."""
        most = self.options.max_jobs or self.options.jobs or 1
        return most * self.cores

    def begin(self) -> None:
        """Submit the first jobs, and look after them from now on."""
        least = self.options.jobs or 1
        for _ in range(least):
            self.cluster.worker_spec.update(self.cluster.new_worker_spec())
        self._submit()
        if self.trouble is not None:
            raise self.trouble
        if self.options.max_jobs is not None and self.options.max_jobs > least:
            # Few tasks are in flight at a time, so little work at hand means much to come.
            most = self.options.max_jobs
            self.cluster.adapt(minimum_jobs=least, maximum_jobs=most, target_duration="1s")
        self._thread = threading.Thread(target=self._watch, name="batch jobs", daemon=True)
        self._thread.start()

    def _submit(self) -> None:
        """Have the cluster submit what it lacks."""

        async def submit() -> None:
            # What was refused is told by the job itself, see below.
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                await self.cluster

        self.cluster.sync(submit)
        self._look_at_submissions()

    def _look_at_submissions(self) -> None:
        for name, job in list(self.cluster.workers.items()):
            if job.refused is not None:
                self._fail(
                    f"{self.system}, which refused a job: {job.refused}",
                    "Mend the options; `topo-dask job-script` shows what is submitted.",
                )
                return
            before = self._known.get(name)
            if job.job_id is not None and (before is None or before.id != str(job.job_id)):
                self._known[name] = Known(str(job.job_id))
                self.lost += before is not None and before.came

    def _fail(self, came: str, do: str) -> None:
        if self.trouble is None:
            allowed = "jobs that the batch system accepts and that start"
            self.trouble = BackendUnavailable("cluster", came, allowed, do)

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            if self.trouble is not None:  # also for those who came after it
                for call in self.on_trouble:
                    call()
                continue
            try:
                self._look()
            except Exception as error:  # it must not end in silence
                if not self._stop.is_set():
                    self._fail(f"{type(error).__name__}: {error}", "Please report this.")

    def _look(self) -> None:
        """One round: who is here, who is gone, who is to come again."""
        self._look_at_submissions()
        names = {str(w["name"]) for w in list(self.cluster.scheduler_info["workers"].values())}
        silent = []
        for name, known in self._known.items():
            if name in names or any(other.startswith(f"{name}-") for other in names):
                known.came, known.missing, known.says = True, 0, ""
                self._failed_starts, self._ever_came = 0, True
            elif name in self.cluster.worker_spec:
                silent.append((known.asked, name))
        now = time.monotonic()
        for asked, name in sorted(silent)[:ASK_AT_ONCE]:
            if now - asked >= POLL_S and self.trouble is None:
                self._ask(name)
        if set(self.cluster.worker_spec) - set(self.cluster.workers) and self.trouble is None:
            self._submit()

    def _ask(self, name: str) -> None:
        """Ask the batch system for a job without workers; twice gone is gone."""
        known = self._known[name]
        known.asked = time.monotonic()
        says = ask(self.system, known.id)
        if says is None:
            return
        known.says, known.missing = says, 0 if says else known.missing + 1
        if says and not known.came and (known.id, says) not in self._told:
            self._told.add((known.id, says))
            if "RUNNING" not in says:
                self.say(f"{self.system} job {known.id} waits: {says}")
        if known.missing >= 2:
            self._gone(name, known)

    def _gone(self, name: str, known: Known) -> None:
        job = self.cluster.workers.pop(name, None)
        del self._known[name]
        if job is not None:
            self.cluster.sync(job.close)
        if known.came:
            self.lost += 1
            self.say(f"{self.system} job {known.id} is gone; another takes its place")
            return
        self._failed_starts += 1
        log = log_of(self.logs, known.id)
        text = f"{self.system} job {known.id} ended before its workers came{self._why(known.id)}"
        if not self._ever_came or self._failed_starts >= STARTS:
            do = f"Its log, in {self.logs}: {log or '(nothing)'}"
            self._fail(f"{self.system}, where {text.removeprefix(f'{self.system} ')}", do)
        else:
            self.say(f"{text}; another takes its place. Its log: {log or '(nothing)'}")

    def _why(self, job_id: str) -> str:
        if not ASK[self.system].explain:
            return ""
        out = _call(ASK[self.system].explain.format(id=shlex.quote(job_id)))
        found = re.findall(r"\b(?:JobState|Reason|ExitCode|NodeList)=\S+", out[1] if out else "")
        return f" ({', '.join(found)})" if found else ""

    def waiting(self) -> str:
        """What the jobs without workers do, for the progress display."""
        states = [known.says for known in list(self._known.values()) if known.says]
        return f"{len(states)} jobs wait: {states[0]}" if states else ""

    def close(self) -> None:
        """End everything; no job is left, whatever else fails."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.cluster.close(timeout=30)
        finally:
            kind = self.cluster.job_cls
            for job_id in [n for n in kind.submitted if ask(self.system, n) != ""]:
                _call(f"{kind.cancel_command} {shlex.quote(job_id)}")


def _call(command: str) -> tuple[int, str, str] | None:
    """Run a command of the batch system: exit status, stdout, stderr; ``None`` if it cannot."""
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout, done.stderr


def ask(system: str, job_id: str) -> str | None:
    """What a batch system says of a job: "" if it is gone, ``None`` if it cannot be told."""
    how = ASK[system]
    out = _call(how.command.format(id=shlex.quote(job_id)))
    if out is None:
        return None
    status, said, complained = out
    if re.search(how.alive, said, flags=re.MULTILINE):
        return " ".join(said.split())[:60] if system == "slurm" else "in the queue or running"
    if status == 0 or re.search(NO_SUCH_JOB, said + complained):
        return ""
    return None


def log_of(folder: str | Path, job_id: str) -> str:
    """The last lines of the log of a job: of its errors, where they are apart."""
    number = re.escape(re.split(r"\D", job_id.strip())[0])
    found = [
        path
        for path in Path(folder).glob("*")
        if path.is_file() and re.search(rf"(?<!\d){number}(?!\d)", path.name)
    ]
    for path in sorted(found, key=lambda p: (not re.search(r"(?i)err?$", p.suffix), p.name)):
        text = path.read_text(errors="replace").strip()
        if text:
            return "\n".join(["", *text.split("\n")[-TAIL:]])
    return ""
