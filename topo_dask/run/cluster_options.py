"""What a cluster is to be like: read from arguments, a YAML file, the command line; checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from dask.utils import parse_bytes, parse_timedelta

from topo_dask.config import number
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidType

HERE = ("sync", "threads", "processes", "local", "gpu")
"""Clusters of this machine."""

POOLS = ("sync", "threads", "processes")
"""Those of them without a server."""

BATCH = ("slurm", "pbs", "lsf", "sge", "htcondor", "oar")
"""Batch systems, of which jobs are asked."""

SCHEMES = ("tcp://", "tls://", "ucx://")
"""How the address of a running dask scheduler begins."""

KNOWN = f"one of {', '.join((*HERE, *BATCH))}, tcp://HOST:PORT, or a dask Client"


@dataclass(frozen=True)
class ClusterOptions:
    """What a cluster is to be like. What is left out is the system's or dask's own default.

    Parameters
    ----------
    system
        "local" (processes of this machine), "threads", "processes", "sync", "gpu" (a process a
        GPU); a batch system: "slurm", "pbs", "lsf", "sge", "htcondor", "oar"; or the ``tcp://``
        or ``tls://`` address of a dask scheduler.
    workers
        Worker processes of this machine; with "threads" its threads; with "gpu" the most GPUs.
    jobs, max_jobs
        Batch jobs to keep; with ``max_jobs`` as many between the two as there is work for.
    cores, processes, memory
        Of a job: cores, the processes that share them, memory in all ("32GB"). Of this machine:
        threads and memory of each process.
    device_memory
        With "gpu": what the memory pool of each worker may take of its card, as bytes or as a
        part; the default is "90%".
    walltime
        Of a job, as D-HH:MM:SS, HH:MM:SS, seconds, or "2 h". Workers leave it before its end.
    lifetime
        After how long workers leave their job and give back what they have not finished; "auto"
        is a little before the walltime, "none" never.
    queue, account
        Partition or queue, and account or project, as the batch system calls it.
    directives, prologue
        More lines for the job script's header (without "#SBATCH" and the like), and shell
        commands before the worker starts.
    site
        Name of a section of dask's ``jobqueue.yaml`` with this site's settings.
    interface
        Network interface that the scheduler and the workers listen on. For batch systems the
        default is this host's own address, for anything else loopback.
    dashboard
        Address of the dashboard; the default is loopback only.
    python, job_name, log_directory, local_directory
        Of the jobs: interpreter, name, where their logs go (the default is ``topo-dask-logs`` in
        the current folder), where workers may write for themselves.
    death_timeout
        Seconds after which a worker that finds no scheduler ends.
    tls_ca_file, tls_cert, tls_key
        PEM files, for encrypted connections with certificates on both sides.
    performance_report
        HTML file that dask writes about the run.
    more
        Anything else that dask-jobqueue knows of the system, by the names of ``jobqueue.yaml``.

    Examples
    --------
    >>> ClusterOptions("slurm", jobs=4, cores=8, memory="32GB", walltime="2 h").walltime
    '02:00:00'
    """

    system: str = "local"
    workers: int | None = None
    jobs: int | None = None
    max_jobs: int | None = None
    cores: int | None = None
    processes: int | None = None
    memory: str | None = None
    device_memory: str | None = None
    walltime: str | None = None
    lifetime: str = "auto"
    queue: str | None = None
    account: str | None = None
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    site: str | None = None
    interface: str | None = None
    dashboard: str | None = None
    python: str | None = None
    job_name: str | None = None
    log_directory: str | None = None
    local_directory: str | None = None
    death_timeout: int | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    performance_report: str | None = None
    more: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        do = "Leave it out to use the active dask client or this machine."
        if not isinstance(self.system, str):
            raise InvalidType("cluster", repr(self.system), KNOWN, do)
        if self.system not in (*HERE, *BATCH) and not self.is_address:
            raise InvalidArgument("cluster", repr(self.system), KNOWN, do)
        for name in ("workers", "jobs", "max_jobs", "cores", "processes", "death_timeout"):
            if getattr(self, name) is not None:
                whole = "a whole number >= 1"
                number(name, getattr(self, name), lambda v: v >= 1, whole, whole=True)
        for name in ("directives", "prologue"):
            value = getattr(self, name)
            lines = (value,) if isinstance(value, str) else tuple(map(str, value))
            object.__setattr__(self, name, lines)
        if isinstance(self.more, Mapping):
            object.__setattr__(self, "more", tuple(sorted(self.more.items())))
        if self.walltime is not None:
            object.__setattr__(self, "walltime", clock(seconds_of("walltime", self.walltime)))
        if self.lifetime not in ("auto", "none"):
            seconds_of("lifetime", self.lifetime)
        self._check_memory()
        self._check_fits()
        self._check_tls()

    @property
    def is_batch(self) -> bool:
        """Whether jobs are asked of a batch system."""
        return self.system in BATCH

    @property
    def is_address(self) -> bool:
        """Whether it names a scheduler that runs already."""
        return self.system.startswith(SCHEMES)

    def _check_memory(self) -> None:
        share = self.device_memory
        if share is not None and not re.fullmatch(r"\d+|(\d{1,2}(\.\d+)?|100)%", str(share)):
            allowed = "bytes as a whole number, or a part like 90%"
            raise InvalidArgument("device_memory", repr(share), allowed, "Leave it out for 90%.")
        if self.memory is None:
            return
        try:
            enough = parse_bytes(self.memory) >= 2**20
        except (ValueError, AttributeError, TypeError):
            enough = False
        if not enough:
            allowed = "an amount of memory with its unit, at least 1 MiB"
            raise InvalidArgument("memory", repr(self.memory), allowed, "For example 32GB.")

    def _check_fits(self) -> None:
        """Refuse options that the system has no use for."""
        for name, systems in ONLY_FOR.items():
            if getattr(self, name) != DEFAULTS[name] and self.system not in systems:
                useful = ", ".join(systems)
                raise InvalidArgument(
                    name,
                    f"{getattr(self, name)!r} with cluster {self.system!r}",
                    f"it only with: {useful}",
                    "Leave it out.",
                )
        if self.max_jobs is not None and self.max_jobs < (self.jobs or 1):
            least = f"at least jobs, {self.jobs or 1}"
            raise InvalidArgument("max_jobs", self.max_jobs, least, "Leave it out for fixed jobs.")
        if self.is_batch and self.cores and self.processes and self.cores % self.processes:
            allowed = f"a divisor of cores, {self.cores}"
            raise InvalidArgument("processes", self.processes, allowed, "Leave it out.")

    def _check_tls(self) -> None:
        given = [getattr(self, name) for name in TLS]
        if any(given) and not all(given):
            names = ", ".join(TLS)
            raise InvalidArgument("tls", "only some of its files", f"all of {names}", "Pass all.")
        if any(given) and self.system in POOLS:
            came = f"its files with cluster {self.system!r}, which connects nothing"
            raise InvalidArgument("tls", came, "it where dask has a scheduler", "Leave it out.")
        for name in TLS:
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                raise InputNotFound(name, repr(path), "a PEM file", "Check the path.")


TLS = ("tls_ca_file", "tls_cert", "tls_key")
DEFAULTS = {field.name: field.default for field in fields(ClusterOptions)}
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "workers": ("threads", "processes", "local", "gpu"),
    "memory": ("local", "gpu", *BATCH),
    "cores": ("local", *BATCH),
    "device_memory": ("gpu",),
    "dashboard": ("local", "gpu", *BATCH),
    "interface": ("local", "gpu", *BATCH),
    "local_directory": ("local", "gpu", *BATCH),
    "queue": tuple(name for name in BATCH if name != "htcondor"),
    **dict.fromkeys(
        ("jobs", "max_jobs", "processes", "walltime", "lifetime", "account", "directives"), BATCH
    ),
    **dict.fromkeys(("prologue", "site", "python", "job_name", "log_directory"), BATCH),
    **dict.fromkeys(("death_timeout", "more"), BATCH),
}


def seconds_of(argument: str, value: Any) -> int:
    """Seconds of a duration: a number, "2 h", HH:MM:SS or D-HH:MM:SS.

    YAML reads an unquoted 10:00:00 as the number 36000, which is the same.

    Examples
    --------
    >>> seconds_of("walltime", "1-02:00:00"), seconds_of("walltime", "90 min")
    (93600, 5400)
    """
    allowed = "a duration > 0: D-HH:MM:SS, HH:MM:SS, a number of seconds, or e.g. '2 h'"
    timed = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", str(value).strip())
    seconds = 0
    if timed:
        days, hours, minutes, rest = (int(part or 0) for part in timed.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    elif ":" not in str(value) and not isinstance(value, bool):
        try:
            text = re.sub(r"\bmin\b|(?<=\d)min\b", "m", str(value))
            seconds = round(parse_timedelta(text, default="seconds"))
        except (ValueError, TypeError, KeyError):
            seconds = 0
    if seconds <= 0:
        raise InvalidArgument(argument, repr(value), allowed, "For example 02:00:00.")
    return seconds


def clock(seconds: int) -> str:
    """A duration as HH:MM:SS, which every batch system but LSF reads.

    Examples
    --------
    >>> clock(93600)
    '26:00:00'
    """
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def options_from(settings: Mapping[str, Any]) -> ClusterOptions:
    """Options by their names; for a batch system anything else goes to dask-jobqueue.

    Raises
    ------
    InvalidArgument
        A name that means nothing for the system.
    """
    named = {str(key).replace("-", "_"): value for key, value in settings.items()}
    more = dict(named.pop("more", None) or {})
    known = {key: named.pop(key) for key in list(named) if key in DEFAULTS}
    if named and known.get("system") not in BATCH:
        raise InvalidArgument(
            "cluster options",
            ", ".join(map(repr, named)),
            f"{', '.join(name for name in DEFAULTS if name != 'more')}",
            "See topo_dask.cluster.ClusterOptions.",
        )
    if "memory" in known and known["memory"] is not None:
        known["memory"] = str(known["memory"])
    return ClusterOptions(**known, more=tuple(sorted({**more, **named}.items())))


def read_options(
    system: str | None = None,
    file: str | os.PathLike[str] | None = None,
    pairs: Sequence[str] = (),
    **settings: Any,
) -> ClusterOptions:
    """Options of a YAML file, of ``key=value`` texts, and by name: each wins over those before.

    Parameters
    ----------
    system
        Wins over the file's ``system``.
    file
        A YAML file with the names of `ClusterOptions`.
    pairs
        Such as ``"cores=8"``; values are read as YAML.
    settings
        By name.

    Raises
    ------
    InvalidArgument, InputNotFound
        An unknown name, a value that makes no sense, a file that is not there.

    Examples
    --------
    >>> read_options("local", pairs=["workers=3", "memory=2GB"]).workers
    3
    """
    found: dict[str, Any] = {} if file is None else _read_file(file)
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not mark or not name.strip():
            allowed = "a name and a value: name=value"
            raise InvalidArgument("cluster option", repr(pair), allowed, "For example cores=8.")
        key = name.strip().replace("-", "_")
        value = _value(key, text.strip())
        if key in ("directives", "prologue"):  # may be given several times
            value = [*found.get(key, []), *([value] if isinstance(value, str) else value)]
        found[key] = value
    found |= settings
    if system is not None:
        found["system"] = system
    return options_from(found)


def _value(key: str, text: str) -> Any:
    """A value of the command line, read as YAML where that may be more than a text."""
    if isinstance(DEFAULTS.get(key), str) or key in ("walltime", "memory", "device_memory"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(file).expanduser()
    allowed = "a YAML file of options by name"
    if not path.is_file():
        raise InputNotFound("cluster file", repr(str(file)), allowed, "Check the path.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument("cluster file", f"{file} ({error})", allowed, "Mend it.") from error
    if not isinstance(found, dict):
        raise InvalidArgument("cluster file", f"{file}: {type(found).__name__}", allowed)
    return {str(key).replace("-", "_"): value for key, value in found.items()}
