"""What is seen of a run: its progress wherever someone looks on, and its record afterwards."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr

import topo_dask
from topo_dask.errors import InvalidData, TaskFailed
from topo_dask.run import progress as module
from topo_dask.run.bundles import Bundle
from topo_dask.run.execute import open_engine
from topo_dask.run.progress import (
    Display,
    Log,
    Notebook,
    Progress,
    Terminal,
    Usage,
    peak_memory,
)
from topo_dask.storage import create_array


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    volume = np.zeros((8, 8, 8), np.uint8)
    volume[1:7, 2:6, 1:7] = 5
    create_array(tmp_path / "labels.zarr", volume.shape, (4, 4, 4), volume.dtype)[...] = volume
    return tmp_path / "labels.zarr"


class Lines(Display):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.left: list[str] = []

    def show(self, text: str) -> None:
        self.shown.append(text)

    def leave(self, text: str) -> None:
        self.left.append(text)

    def pause(self, spent: float) -> float:
        return 0.02


def test_a_stage_is_shown_also_while_no_task_ends() -> None:
    lines = Lines()
    with open_engine("threads", display=lines) as engine:
        results = engine.run("sleep", time.sleep, [0.2, 0.0], voxels=[500, 500])
        assert sorted(results) == [(0, None), (1, None)]
    assert len(lines.shown) >= 3
    assert any("sleep    1/2 blocks" in line and "left" in line for line in lines.shown)
    (last,) = lines.left
    assert last.startswith("sleep    2/2 blocks  ")
    assert "voxels/s" in last


def test_workers_are_counted() -> None:
    lines = Lines()
    options = topo_dask.cluster.read_options("local", workers=1)
    with open_engine(options, display=lines) as engine:
        list(engine.run("abs", abs, [-1]))
    assert lines.left[0].startswith("1 worker processes; dashboard: http://127.0.0.1:")
    assert lines.left[1].endswith("1 workers")


def test_bytes_of_a_process_count_once() -> None:
    """Tasks that overlap in one process see each other's bytes."""
    bar = Progress("x", 3, 0, None)
    bar.step(1, 0, Usage("a", 1.0, 100, 200, 7))
    bar.step(1, 0, Usage("a", 1.0, 150, 260, 9))  # began before the first ended
    bar.step(1, 0, Usage("b", 1.0, 0, 40, 8))
    assert (bar.bytes, bar.peak, bar.busy) == (200, 9, 3.0)
    assert "B/s" in bar.line()


def test_a_task_says_what_it_used(tmp_path: Path) -> None:
    def write(size: int) -> int:
        return (tmp_path / "x").write_bytes(bytes(size))

    outcomes, (process, seconds, before, after, peak, *_) = Bundle("s", write, 0.0)([10**6])
    assert outcomes == [(10**6, None)]
    assert process.rpartition(":")[2].isdigit()
    assert seconds > 0
    assert peak > 10**7
    if Path("/proc/self/io").exists():
        assert 10**6 <= after - before < 10**7


def test_terminals_renew_a_line_and_logs_get_few() -> None:
    stream = io.StringIO()
    shown = Terminal(stream)
    shown.show("a")
    shown.leave("b")
    assert stream.getvalue() == "\r\x1b[Ka\r\x1b[Kb\n"
    assert shown.pause(10**6) < 1
    stream = io.StringIO()
    log = Log(stream)
    log.show("a")
    log.leave("b")
    assert stream.getvalue() == "a\nb\n"
    assert [log.pause(spent) for spent in (0, 300, 10**6)] == [10, 30, 60]


def test_notebooks_get_a_text_that_renews_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython = pytest.importorskip("IPython")
    assert not module.in_notebook()

    class Kernel:
        kernel = None

    monkeypatch.setattr(ipython, "get_ipython", Kernel)
    pages: list[str] = []

    class Handle:
        def update(self, page: Any) -> None:
            pages.append(page.data)

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda page, display_id: Handle())
    shown = module.progress_display(None)
    assert isinstance(shown, Notebook)
    shown.leave("<first>")
    shown.show("second")
    assert pages[-1] == "<pre style='margin:0'>&lt;first&gt;\nsecond</pre>"
    assert module.progress_display(False) is None


# -------------------------------------------------------------------------------------- retries


class Sometimes:
    """Fails so many times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.error = times, error

    def __call__(self, item: int) -> int:
        if item == 1 and self.left:
            self.left -= 1
            raise self.error
        return item * item


@pytest.mark.parametrize("cluster", ["sync", "threads"])
def test_what_the_network_breaks_is_tried_again(cluster: str) -> None:
    lines, records = Lines(), list[dict[str, Any]]()
    with open_engine(cluster, display=lines) as engine:
        engine.recorder = records.append
        task = Sometimes(2, TimeoutError("late"))
        assert sorted(engine.run("square", task, range(4))) == [(n, n * n) for n in range(4)]
    assert lines.left[0].endswith("2 tried again")
    assert records[0]["tried_again"] == 2


@pytest.mark.parametrize(
    ("times", "error", "kind"),
    [
        (3, TimeoutError("late"), TaskFailed),
        (1, OSError(errno.ENOSPC, "full"), TaskFailed),
        (1, FileNotFoundError("gone"), TaskFailed),
        (1, ValueError("wrong"), TaskFailed),
        (1, InvalidData("flows", "NaN", "numbers"), InvalidData),
    ],
    ids=str,
)
def test_what_stays_broken_ends_the_run(times: int, error: Exception, kind: Any) -> None:
    records = list[dict[str, Any]]()
    with open_engine("sync") as engine:
        engine.recorder = records.append
        with pytest.raises(kind) as caught:
            list(engine.run("square", Sometimes(times, error), range(4)))
    assert error in (caught.value, caught.value.__cause__)
    assert records[0]["done"] == 1


# --------------------------------------------------------------------------------------- record


def test_a_run_leaves_its_record_beside_the_chunks(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "flows.zarr"
    topo_dask.flows(labels, out, n_iter=7, blocks=4, cluster="threads")
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["n_iter"] == 7
    assert record["inputs"] == [str(labels)]
    (attempt,) = record["attempts"]
    assert attempt["versions"]["dask"]
    assert "threads" in attempt["cluster"]
    stages = {stage["stage"]: stage for stage in attempt["stages"]}
    assert stages["flows"]["blocks"] == stages["flows"]["done"] == 8
    assert stages["flows"]["voxels"] == 512
    assert stages["flows"]["peak_memory"] > 10**7
    topo_dask.segment(out, tmp_path / "labels-out.zarr", cluster="sync")
    assert (tmp_path / "labels-out.zarr" / "s0" / "run.json").is_file()
    # No reader takes it for a part of the image, or warns of it.
    assert list(zarr.open_group(tmp_path / "labels-out.zarr", mode="r").array_keys()) == ["s0"]


def test_records_tell_the_settings_of_tables_and_of_other_labels(
    labels: Path, tmp_path: Path
) -> None:
    below = da.from_array(np.zeros((8, 8, 8), np.int32) - 1, chunks=8)  # looked at in the run
    with pytest.raises(InvalidData):
        topo_dask.instance_table(below, tmp_path / "instances.npz", cluster="sync")
    record = json.loads((tmp_path / "instances.npz.work" / "run.json").read_text())
    assert record["settings"]["labels"] == "Array"
    made = tmp_path / "a.zarr"
    flow = topo_dask.generate_direct_flows(zarr.open_array(str(labels), mode="r")[...])
    topo_dask.segment(flow, made, keep_evidence=True, min_size=1, cluster="sync")
    topo_dask.relabel(made, tmp_path / "b.zarr", group=2, min_dot=0.25, cluster="sync")
    text = (tmp_path / "b.zarr" / "s0" / "run.json").read_text()
    chosen, made_as = json.loads(text)["settings"]
    assert chosen["rules"]["min_dot"] == 0.25
    assert made_as["group"] == 2


def test_a_record_tells_of_the_attempts_before(labels: Path, tmp_path: Path) -> None:
    volume = np.zeros((3, 8, 8, 8), np.float32)
    volume[0, 7, 7, 7] = np.nan
    out = tmp_path / "out.zarr"
    options: dict[str, Any] = {"blocks": 4, "cluster": "sync"}
    with pytest.raises(InvalidData):
        topo_dask.segment(volume, out, **options)
    record = json.loads((tmp_path / "out.zarr.work" / "run.json").read_text())
    assert record["attempts"][0]["ended"].startswith("InvalidData: ")
    volume[0, 7, 7, 7] = 0
    topo_dask.segment(volume, out, resume=True, **options)
    first, second = json.loads((out / "s0" / "run.json").read_text())["attempts"]
    assert first["ended"].startswith("InvalidData: ")
    assert second["ended"] is None
    assert {stage["stage"] for stage in second["stages"]} >= {"track", "labels"}


def test_a_batch_log_gets_plain_lines(labels: Path, tmp_path: Path) -> None:
    words = ["flows", labels, tmp_path / "out.zarr", "--blocks", "4", "--cluster", "sync"]
    done = subprocess.run(
        [sys.executable, "-m", "topo_dask", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()][-1] == "flows"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hand it down")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    held = np.ones(2**30, np.uint8)
    with open_engine("processes") as engine:
        ((_, peak),) = engine.run("peak", peak_of, [0])
    assert peak < held.nbytes < peak_memory()


def peak_of(_: int) -> int:
    return peak_memory()
