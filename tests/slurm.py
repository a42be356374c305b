"""A real Slurm on one machine, for the tests: two nodes, loopback only, all in one folder.

Needs Debian's packages ``slurm-wlm`` and ``munge``; their services, users and files are not used.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SBIN = "/usr/sbin:/usr/local/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
NODES, CPUS, MEMORY_MIB = 2, 6, 6144  # whatever this machine has

# Processes are found through /proc, so that no cgroups are needed; a job's memory is looked at
# every second. Processors and memory are what jobs share, so several fit on a node.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=3
{nodes}
PartitionName=short Nodes=ALL Default=YES MaxTime=00:30:00 LLN=YES DefMemPerCPU=200
"""


def program(name: str) -> str | None:
    """Where a program is, also one for administrators."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if program(name) is None]
    return f"Slurm is not installed here (no {', '.join(missing)})" if missing else ""


def wait_until(reached: Callable[[], object], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Slurm:
    """Started by `start`, ended by `stop`; commands find it through SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        ports = _free_ports(NODES + 1)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB}"
            for n in range(1, NODES + 1)
        )
        user = getpass.getuser()
        text = CONFIGURATION.format(
            host=host, ports=ports, user=user, folder=self.folder, nodes=nodes
        )
        self.configuration.write_text(text)
        for name in ("state", *(f"spool-n{n}" for n in range(1, NODES + 1))):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        files |= {f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("pid", "seed", "log")}
        # --force: the folder may be below one that others cannot enter.
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        wait_until((self.folder / "munge.socket").exists, 60, "munge")
        self._daemon("slurmctld", "-D", "-f", str(self.configuration))
        for n in range(1, NODES + 1):
            self._daemon("slurmd", "-D", "-N", f"n{n}", "-f", str(self.configuration))
        wait_until(self._ready, 90, f"Slurm's nodes; see {self.folder}")

    def _daemon(self, name: str, *arguments: str) -> None:
        path = program(name)
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that use it."""
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=30
        )
        return done.stdout.strip()

    def _ready(self) -> bool:
        states = self.call("sinfo", "-h", "-N", "-o", "%t").split()
        return len(states) == NODES and set(states) <= {"idle", "mix", "alloc"}

    def jobs(self, states: str = "PD,CF,R") -> dict[str, str]:
        """State of each job that waits or runs."""
        lines = self.call("squeue", "-h", "-t", states, "-o", "%A %t").splitlines()
        return dict(line.split() for line in lines)

    def cancel(self, job: str) -> None:
        self.call("scancel", job)

    def stop(self) -> None:
        if self._daemons:
            for job in self.jobs():
                self.cancel(job)
            wait_until(lambda: not self.jobs("PD,CF,R,CG"), 60, "jobs that were cancelled")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
