"""Kill a run at random, again and again, and count the voxels that are wrong in the end: 0.

Labels to flows to labels on real tissue, from the command line with a local cluster. At random
moments, also while it begins, the driver or one of its workers gets SIGKILL; a killed driver is
followed by one that resumes. When both are done, flows and labels are compared with those of an
undisturbed run. A run without progress for too long is an error that shows where it stands.

    python benchmarks/kills.py LABELS --size 96 --kills 60
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common
import psutil

import topo_dask
from topo_dask.storage import create_array, open_array

TITLE = "Random kills"
COMMANDS = ("flows", "segment")

BEGINNING_S = 5.0
"""So long after its start a run may be killed that has done nothing yet."""


def arguments() -> argparse.ArgumentParser:
    made = common.parser(__file__, __doc__)
    made.add_argument("--size", type=int, default=96, help="edge of the cube, in voxels")
    made.add_argument("--blocks", type=int, default=24, help="edge of a block, in voxels")
    made.add_argument("--n-iter", type=int, default=60, help="iterations of the diffusion")
    made.add_argument("--kills", type=int, default=60, help="at least so many")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--patience", type=float, default=300, help="seconds without any progress")
    made.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    made.add_argument("--folder", type=Path, help="where files go for the time being")
    return made


@dataclass
class Chaos:
    """Runs the commands, and kills."""

    options: argparse.Namespace
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def command(self, folder: Path, name: str) -> list[str]:
        """The command line of a run that goes on with what is there."""
        labels, flows = folder.parent / "labels-in.zarr", folder / "flows.zarr"
        files = {
            "flows": [labels, flows],
            "segment": [flows, folder / "labels.zarr", "--foreground", labels],
        }
        more = {"flows": ["--n-iter", self.options.n_iter], "segment": []}
        words = [sys.executable, "-X", "faulthandler", "-m", "topo_dask", name, *files[name]]
        words += [*more[name], "--resume"]
        words += ["--blocks", self.options.blocks, "--no-progress", "--cluster", "local"]
        words += ["--cluster-option", f"workers={self.options.workers}"]
        return [str(word) for word in words]

    def finish(self, folder: Path, name: str, out: Path) -> None:
        """Start a run again and again until it is done."""
        said = folder.with_name("said.txt")
        for _ in range(1000):
            self.starts += 1
            with said.open("wb") as file:  # a pipe that nobody reads would hold it up when full
                driver = subprocess.Popen(
                    self.command(folder, name), stdout=subprocess.DEVNULL, stderr=file
                )
            self._torment(driver, out)
            text = said.read_text(errors="replace")
            if driver.returncode == 0 and out.exists():
                return
            if driver.returncode != -signal.SIGKILL and "resume=True" not in text:
                raise RuntimeError(text)
        raise RuntimeError(f"{name} was never done")

    def _torment(self, driver: subprocess.Popen[bytes], out: Path) -> None:
        """Kill its workers, or it, at random moments; it has ended afterwards."""
        while self.kills.total() < self.options.kills:
            blocks = self.chance.randint(0, 16)
            if not self._goes_on(driver, out, blocks):
                return
            time.sleep(self.chance.random() * (0.3 if blocks else BEGINNING_S))
            stage = _stage(out)
            if self.chance.random() < 0.5:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()
                    self._count("driver", stage)
                return
            workers = _workers(driver.pid)
            if workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.chance.choice(workers).kill()
                    self._count("worker", stage)
        self._goes_on(driver, out, sys.maxsize)

    def _goes_on(self, driver: subprocess.Popen[bytes], out: Path, blocks: int) -> bool:
        """Wait until some more blocks are done; whether the run has not ended by then."""
        seen = known = _lines(out)
        late = time.monotonic() + self.options.patience
        while driver.poll() is None and known < seen + blocks:
            time.sleep(0.01)
            now = _lines(out)
            if now != known:
                known, late = now, time.monotonic() + self.options.patience
            elif time.monotonic() > late:
                driver.send_signal(signal.SIGABRT)  # it shows where its threads are
                driver.wait()
                break
        return driver.poll() is None

    def _count(self, who: str, stage: str) -> None:
        self.kills[who] += 1
        self.stages[stage] += 1


def _workers(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid).children(recursive=True)
        return [p for p in found if any("spawn_main" in word for word in p.cmdline())]
    return []


def _ledger(out: Path) -> list[Path]:
    return list(out.with_name(f"{out.name}.work").glob("ledger/*.jsonl"))


def _lines(out: Path) -> int:
    total = 0
    for path in _ledger(out):
        with contextlib.suppress(OSError):
            total += path.read_bytes().count(b"\n")
    return total


def _stage(out: Path) -> str:
    """The stage that was written about last."""
    files = []
    for path in _ledger(out):
        with contextlib.suppress(OSError):
            files.append((path.stat().st_mtime_ns, path.stem))
    return max(files)[1].split("-")[0] if files else "(start)"


def wrong_voxels(first: Path, second: Path, axes: int) -> int:
    """Voxels in which two stored arrays differ, to the bit."""
    a, b = (open_array(path, argument="array", axes=(axes,))[...] for path in (first, second))
    return int((a.view("u1") != b.view("u1")).sum()) if a.shape == b.shape else a.size


def main(words: Sequence[str] | None = None) -> int:
    made = arguments()
    parsed = common.parse(made, words)
    with common.working_folder(parsed.folder) as folder:
        labels = common.crop(parsed.labels, parsed.size)
        stored, calm = folder / "labels-in.zarr", folder / "calm"
        chunks = (min(64, parsed.blocks),) * 3
        create_array(stored, labels.shape, chunks, labels.dtype)[...] = labels
        options = {"blocks": parsed.blocks, "cluster": "threads"}
        topo_dask.flows(stored, calm / "flows.zarr", n_iter=parsed.n_iter, **options)
        topo_dask.segment(calm / "flows.zarr", calm / "labels.zarr", foreground=stored, **options)
        chaos, wrong, rounds = Chaos(parsed, random.Random(parsed.seed)), 0, 0
        began = time.perf_counter()
        while chaos.kills.total() < parsed.kills:
            wild = folder / f"wild{rounds}"
            for name, out in zip(COMMANDS, ("flows.zarr", "labels.zarr"), strict=True):
                chaos.finish(wild, name, wild / out)
            wrong += wrong_voxels(calm / "flows.zarr", wild / "flows.zarr", 4)
            wrong += wrong_voxels(calm / "labels.zarr" / "s0", wild / "labels.zarr" / "s0", 3)
            rounds += 1
        seconds = time.perf_counter() - began
    rows = [
        ["kills of the driver", chaos.kills["driver"]],
        ["kills of a worker", chaos.kills["worker"]],
        ["drivers started", chaos.starts],
        ["runs from labels to labels", rounds],
        ["seconds", f"{seconds:.0f}"],
        ["bytes of flows and labels that differ from an undisturbed run", wrong],
    ]
    where = ", ".join(f"{stage} {count}" for stage, count in chaos.stages.most_common())
    body = [
        f"Labels: {common.described(labels)}, in blocks of {parsed.blocks}.",
        common.table(["", ""], rows),
        f"Kills by the stage that was under way: {where}.",
    ]
    common.report(made, parsed, TITLE, body)
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
