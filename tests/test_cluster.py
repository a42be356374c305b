"""Clusters: their options, the scripts of batch jobs, processes of this machine and of GPUs."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from topo_dask.cluster import ClusterOptions, job_script, read_options, start
from topo_dask.errors import BackendUnavailable, InputNotFound, InvalidArgument, InvalidType
from topo_dask.run.batch import ask, lifetime_before, log_of, walltime_seconds
from topo_dask.run.cluster import BEGIN_TRIES, kept_up, signals_as_exceptions
from topo_dask.run.execute import open_engine

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"system": "cloud"}, "cluster"),
        ({"system": "slurm", "jobs": 0}, "jobs"),
        ({"system": "slurm", "jobs": 1.5}, "jobs"),
        ({"system": "slurm", "jobs": 4, "max_jobs": 3}, "max_jobs"),
        ({"system": "slurm", "cores": 8, "processes": 3}, "processes"),
        ({"system": "slurm", "memory": "12 parsecs"}, "memory"),
        ({"system": "slurm", "memory": 64}, "memory"),
        ({"system": "slurm", "walltime": "2:00"}, "walltime"),
        ({"system": "slurm", "walltime": 0}, "walltime"),
        ({"system": "slurm", "lifetime": "soon"}, "lifetime"),
        ({"system": "slurm", "workers": 2}, "workers"),
        ({"system": "local", "queue": "short"}, "queue"),
        ({"system": "local", "jobs": 2}, "jobs"),
        ({"system": "local", "nodes": 2}, "cluster options"),
        ({"system": "threads", "memory": "1GB"}, "memory"),
        ({"system": "htcondor", "queue": "short"}, "queue"),
        ({"system": "slurm", "tls_cert": "a.pem"}, "tls"),
        (
            {"system": "threads", **dict.fromkeys(("tls_ca_file", "tls_cert", "tls_key"), "a")},
            "tls",
        ),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_options(**settings)
    assert caught.value.argument == argument


def test_a_system_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(InvalidType):
        ClusterOptions(3)  # type: ignore[arg-type]


def test_options_of_file_command_line_and_name(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "system: slurm\ncores: 4\nmemory: 8GB\nwalltime: 10:00:00\ndirectives: [--exclusive]\n"
        "job-name: mine\njob-cpu: 3\n"
    )
    found = read_options(None, file, ["cores=8", "directives=--nice=5", "queue=short"], jobs=3)
    assert found == ClusterOptions(
        "slurm",
        cores=8,
        memory="8GB",
        walltime="10:00:00",  # YAML made a number of it
        directives=("--exclusive", "--nice=5"),
        job_name="mine",
        queue="short",
        jobs=3,
        more=(("job_cpu", 3),),
    )
    assert read_options("pbs", file).system == "pbs"
    with pytest.raises(InputNotFound, match=r"nothing\.yaml"):
        read_options("slurm", tmp_path / "nothing.yaml")
    file.write_text("- a\n")
    with pytest.raises(InvalidArgument, match="list"):
        read_options("slurm", file)
    file.write_text("a: [")
    with pytest.raises(InvalidArgument, match="cluster file"):
        read_options("slurm", file)
    with pytest.raises(InvalidArgument, match="name=value"):
        read_options("slurm", pairs=["cores"])


@pytest.mark.parametrize(
    ("system", "text", "seconds"),
    [
        ("slurm", "90", 5400),
        ("slurm", "1:30", 90),
        ("slurm", "01:00:00", 3600),
        ("slurm", "1-2", 93600),
        ("slurm", "1-02:30", 95400),
        ("lsf", "1:30", 5400),
        ("pbs", "00:30:00", 1800),
        ("pbs", 600, 600),
        ("sge", "600", 600),
        ("slurm", "UNLIMITED", None),
        ("oar", None, None),
    ],
)
def test_walltimes_are_read_as_the_system_does(system: str, text: Any, seconds: Any) -> None:
    assert walltime_seconds(system, text) == seconds


@pytest.mark.parametrize("walltime", [3, 60, 100, 600, 3600, 86400, 10**6])
def test_workers_leave_before_the_walltime(walltime: int) -> None:
    lifetime, stagger = lifetime_before(walltime)
    assert lifetime - stagger > 0
    assert lifetime + stagger <= walltime - min(walltime // 10, 600)
    assert lifetime >= walltime / 3


# ---------------------------------------------------------------------------------- job scripts

JOB: dict[str, Any] = {
    "cores": 4,
    "memory": "8GB",
    "walltime": "1-02:00:00",
    "account": "lab",
    "job_name": "cells",
    "interface": "ib0",
}
EXPECTED: dict[str, list[str]] = {
    "slurm": [
        "#SBATCH -J cells",
        "#SBATCH -p long",
        "#SBATCH -A lab",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=8G",
        "#SBATCH -t 26:00:00",
        "#SBATCH --no-requeue",
        "#SBATCH -e LOGS/cells-%J.err",
        "#SBATCH -o LOGS/cells-%J.out",
        "#SBATCH --one=1",
    ],
    "pbs": [
        "#PBS -N cells",
        "#PBS -q long",
        "#PBS -A lab",
        "#PBS -l select=1:ncpus=4:mem=7630MB",
        "#PBS -l walltime=26:00:00",
        "#PBS -e LOGS/",
        "#PBS -o LOGS/",
        "#PBS --one=1",
    ],
    "lsf": [
        "#BSUB -J cells",
        "#BSUB -q long",
        '#BSUB -P "lab"',
        "#BSUB -n 4",
        '#BSUB -R "span[hosts=1]"',
        "#BSUB -M 8000000",
        "#BSUB -W 26:00",
        "#BSUB -e LOGS/WORKER-%J.err",
        "#BSUB -o LOGS/WORKER-%J.out",
        "#BSUB --one=1",
    ],
    "sge": [
        "#$ -N cells",
        "#$ -q long",
        "#$ -P lab",
        "#$ -l h_rt=26:00:00",
        "#$ -cwd",
        "#$ -e LOGS/",
        "#$ -o LOGS/",
        "#$ --one=1",
    ],
    "oar": [
        "#OAR -n cells",
        "#OAR -q long",
        "#OAR --project lab",
        "#OAR -l /nodes=1/core=4,walltime=26:00:00",
        "#OAR -O LOGS/%jobid%.out",
        "#OAR -E LOGS/%jobid%.err",
        "#OAR --one=1",
    ],
    "htcondor": [
        "RequestCpus = MY.DaskWorkerCores",
        "RequestMemory = floor(MY.DaskWorkerMemory / 1048576)",
        "RequestDisk = floor(MY.DaskWorkerDisk / 1024)",
        "LogDirectory = LOGS",
        "Error = $(LogDirectory)/worker-$F(MY.JobId).err",
        "MY.DaskWorkerCores = 4",
        "MY.DaskWorkerMemory = 8000000000",
        "MY.DaskWorkerDisk = 2000000000",
        "accounting_group = lab",
        "--one = 1",
        "Queue",
    ],
}


@pytest.mark.parametrize("system", EXPECTED)
def test_job_scripts_have_the_expected_directives(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"disk": "2GB"} if system == "htcondor" else {"queue": "long"}
    settings = {**JOB, **more, "directives": "--one=1", "prologue": ["module load python"]}
    text = job_script(system, **settings)
    lines = text.splitlines()
    assert lines[0].startswith("#!")
    for line in EXPECTED[system]:
        assert line.replace("LOGS", f"{tmp_path}/topo-dask-logs") in lines, text
    assert text.count("--interface ib0") == 1
    worker = next(line for line in lines if "dask_worker" in line)
    assert "--nthreads 1 " in worker
    assert "--nworkers 4 " in worker
    assert "--no-dashboard" in worker  # it would listen on every address
    assert "--lifetime 92400s --lifetime-stagger 600s" in worker
    assert f"{sys.executable} -m distributed.cli.dask_worker tcp://SCHEDULER:PORT" in worker
    keep = "export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647"
    if system == "htcondor":
        assert f"{keep}; module load python; " in worker
    else:
        assert lines.index(keep) < lines.index("module load python") < lines.index(worker)
    assert not any(tmp_path.iterdir())  # nothing is left, nothing was submitted


def test_what_else_dask_jobqueue_knows_may_be_said() -> None:
    text = job_script("sge", cores=1, memory="1GB", resource_spec="gpu=1")
    assert "#$ -l gpu=1" in text
    with pytest.raises(InvalidArgument, match=r"resource_spek.*resource_spec"):
        job_script("sge", cores=1, memory="1GB", resource_spek="gpu=1")
    with pytest.raises(InvalidArgument, match="cores, memory"):
        job_script("slurm")
    with pytest.raises(InvalidArgument, match="disk"):
        job_script("htcondor", cores=1, memory="1GB")
    with pytest.raises(InvalidArgument, match="Only they have jobs"):
        job_script("local")


def test_lifetimes_as_asked() -> None:
    job = {"cores": 1, "memory": "1GB", "walltime": "00:10:00"}
    assert "--lifetime 300s" in job_script("slurm", lifetime="5 min", **job)
    assert "--lifetime" not in job_script("slurm", lifetime="none", **job)
    with pytest.raises(InvalidArgument, match="less than the walltime"):
        job_script("slurm", lifetime="10 min", **job)


def test_a_site_section_lies_over_the_section_of_its_system() -> None:
    sections = {
        "jobqueue.slurm.account": "default-lab",
        "jobqueue.hilbert": {
            "cores": 48,
            "memory": "190GB",
            "queue": "cpu",
            "walltime": "02:00:00",
            "job-extra-directives": ["--exclusive"],
        },
    }
    with dask.config.set(sections):
        text = job_script("slurm", site="hilbert", memory="100GB")
        with pytest.raises(InvalidArgument, match="hilbert"):
            job_script("slurm", site="hilbrt")
    for line in ("-A default-lab", "-p cpu", "--cpus-per-task=48", "-t 02:00:00", "--exclusive"):
        assert f"#SBATCH {line}" in text
    assert "#SBATCH --mem=94G" in text
    assert "--nworkers 8 " in text
    assert "--nthreads 6 " in text
    assert "jobqueue.hilbert" not in text


def test_job_scripts_from_the_command_line_leave_nothing_in_the_users_folders(
    tmp_path: Path,
) -> None:
    """Importing dask_jobqueue by itself copies a template to the user's configuration."""
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    site = tmp_path / "site"
    site.mkdir()
    (site / "jobqueue.yaml").write_text("jobqueue:\n  here:\n    cores: 2\n    memory: 3GB\n")
    options = {"memory": "1GB", "cores": "1", "site": "here"}
    base = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    base["CUPY_CACHE_DIR"] = str(tmp_path / "cupy")  # dask imports CuPy where it is
    base.pop("DASK_CONFIG", None)

    def run(pairs: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        words = [word for pair in pairs for word in ("--cluster-option", f"{pair}={options[pair]}")]
        code = "import signal; before = signal.getsignal(signal.SIGINT); "
        code += "from topo_dask.cli import main; "
        code += f"main(['job-script', 'slurm', *{words}], standalone_mode=False); "
        code += "print(signal.getsignal(signal.SIGINT) is before)"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / "here",
            env={**base, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(["memory", "cores"])
    assert "#SBATCH --cpus-per-task=1" in done.stdout, done.stderr
    assert done.stdout.endswith("True\n")  # Ctrl-C is what it was
    assert list((tmp_path / "home").rglob("*")) == list((tmp_path / "here").rglob("*")) == []
    done = run(["site"], DASK_CONFIG=str(site))
    assert "#SBATCH --cpus-per-task=2" in done.stdout, done.stderr
    assert [p.name for p in site.iterdir()] == ["jobqueue.yaml"]


def test_a_missing_dask_jobqueue_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    path = dask.config.PATH
    with pytest.raises(BackendUnavailable, match=r'pip install "topo_dask\[hpc\]"'):
        job_script("slurm", cores=1, memory="1GB")
    assert path == dask.config.PATH


# ------------------------------------------------------------------------- asking batch systems

ANSWERS: list[tuple[str, str, int, str, bool | None]] = [
    ("pbs", "Job id  Name User Time S Queue\n7.head  x  me  0 Q batch", 0, "qstat", True),
    ("pbs", "Job id  Name User Time S Queue\n7.head  x  me  0 C batch", 0, "qstat", False),
    ("pbs", "qstat: Unknown Job Id 7.head", 153, "qstat", False),
    ("pbs", "qstat: cannot connect to server", 111, "qstat", None),
    ("lsf", "PEND", 0, "bjobs", True),
    ("lsf", "DONE", 0, "bjobs", False),
    ("lsf", "Job <7> is not found", 255, "bjobs", False),
    ("sge", "job_number: 7", 0, "qstat", True),
    ("sge", "Following jobs do not exist:\n7", 1, "qstat", False),
    ("htcondor", "2", 0, "condor_q", True),
    ("htcondor", "", 0, "condor_q", False),
    ("oar", "7: Running", 0, "oarstat", True),
    ("oar", "7: Terminated", 0, "oarstat", False),
]


@pytest.mark.parametrize(("system", "answer", "status", "program", "alive"), ANSWERS)
def test_what_batch_systems_say_of_a_job(
    system: str,
    answer: str,
    status: int,
    program: str,
    alive: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / program
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {status}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = ask(system, "7")
    assert (None if found is None else bool(found)) is alive


def test_a_batch_system_that_is_not_there_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert ask("oar", "7") is None


def test_the_log_of_a_job(tmp_path: Path) -> None:
    assert log_of(tmp_path / "nothing", "7") == ""
    (tmp_path / "x-17.err").write_text("another job")
    (tmp_path / "x-7.out").write_text("what it printed")
    assert log_of(tmp_path, "7") == "\nwhat it printed"
    (tmp_path / "x-7.err").write_text("\n".join(map(str, range(50))))
    assert log_of(tmp_path, "7.head") == "\n" + "\n".join(map(str, range(35, 50)))


def test_a_batch_system_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailable, match="oarsub"):
        start("oar", cores=1, memory="1GB", interface="lo")


# -------------------------------------------------------------------------------- this machine


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_local_workers_as_asked_on_loopback() -> None:
    with start("local", workers=1, cores=2, memory="500MB") as running:
        assert (running.workers, running.slots) == (1, 2)
        assert running.client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert running.dashboard_link.startswith("http://127.0.0.1:")
        (worker,) = running.client.scheduler_info()["workers"].values()
        assert worker["memory_limit"] == 500_000_000
        with open_engine(running) as engine:
            assert sorted(engine.run("abs", abs, [-2, 1])) == [(0, 2), (1, 1)]
    assert running.client.status == "closed"


def test_a_worker_that_dask_gives_up_comes_again() -> None:
    """As it does with one that is killed while it begins, again and again."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 ms"}),
        start("local", workers=1) as running,
        open_engine(running) as engine,
    ):
        (before,) = running.client.run(os.getpid).values()
        os.kill(before, signal.SIGKILL)
        assert sorted(engine.run("pid", pid_of, [0, 1])) != [(0, before), (1, before)]


def test_a_worker_that_failed_to_begin_comes_again() -> None:
    """Its nanny stays where the cluster has its workers."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 h"}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        kept_up(cluster),
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.sync(cluster.workers[0].close)
        assert client.submit(abs, -2).result(timeout=120) == 2


@contextmanager
def killed_while_they_begin(times: int) -> Iterator[list[int]]:
    """So many worker processes of this one are killed as soon as they are there."""
    over, killed = threading.Event(), list[int]()

    def kill() -> None:
        while len(killed) < times and not over.wait(0.01):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if any("spawn_main" in word for word in child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
                        break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("sockets_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_while_it_begins_is_no_end() -> None:
    with killed_while_they_begin(1) as killed, start("local", workers=2) as running:
        assert len(killed) == 1
        running.client.wait_for_workers(2, timeout=60)


@pytest.mark.usefixtures("sockets_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_never_begin_are_an_error() -> None:
    with (
        killed_while_they_begin(1000) as killed,
        pytest.raises(BackendUnavailable, match="'local', whose workers do not begin"),
    ):
        start("local", workers=1)
    assert len(killed) >= BEGIN_TRIES


def pid_of(_: int) -> int:
    return os.getpid()


def test_gpu_workers_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs but with the driver's program stands in for one that has two."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = r"^cluster: got 'gpu' on .*no CUDA GPU .no program nvidia-smi"
    with pytest.raises(BackendUnavailable, match=said):
        start("gpu")
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: a)'\necho 'GPU 1: Some GPU'\n")
    script.chmod(0o700)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BackendUnavailable, match="CUDA_VISIBLE_DEVICES"):
        start("gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InvalidArgument, match="device_memory"):
        start("gpu", device_memory="most of it")
    with start("gpu", device_memory="60%") as running:
        workers = running.client.scheduler_info()["workers"]
        assert len(workers) == 2
        for worker in workers.values():
            assert (worker["nthreads"], worker["resources"]) == (1, {"GPU": 1})
        seen = running.client.run(environment, "CUDA_VISIBLE_DEVICES")
        assert sorted(seen.values()) == ["0", "1"]
        assert set(running.client.run(environment, "CUPY_GPU_MEMORY_LIMIT").values()) == {"60%"}
        assert running.client.scheduler.address.startswith("tcp://127.0.0.1:")
        task = running.client.submit(environment, "CUDA_VISIBLE_DEVICES", resources={"GPU": 1})
        assert task.result() in ("0", "1")


def test_encrypted_connections(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=topo"),
            *("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl to make certificates with")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    files: dict[str, Any] = {"tls_ca_file": cert, "tls_cert": cert, "tls_key": key}
    text = job_script("slurm", cores=1, memory="1GB", **files)
    for option in (f"--tls-ca-file {cert}", f"--tls-cert {cert}", f"--tls-key {key}"):
        assert option in text
    with start("local", workers=1, **files) as running:
        address = running.client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert running.client.submit(abs, -1).result() == 1
        with start(address, **files) as again:
            assert again.workers == 1


def test_a_performance_report_is_written(tmp_path: Path) -> None:
    options = read_options("local", workers=1, performance_report=str(tmp_path / "report.html"))
    with open_engine(options) as engine:
        list(engine.run("magnitudes", abs, [-2, 1]))
    page = (tmp_path / "report.html").read_text()
    assert "<script src=" not in page  # it works without the web
    assert "magnitudes" in page
    threads = ClusterOptions("threads", performance_report="x.html")
    with pytest.raises(InvalidArgument, match="performance_report"), open_engine(threads):
        pass
    with pytest.raises(InvalidArgument, match="Make the folder first"):
        start("local", workers=1, performance_report=str(tmp_path / "no" / "x.html"))


def test_signals_end_with_exceptions_only_while_jobs_are_there() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with signals_as_exceptions():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(5)

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
