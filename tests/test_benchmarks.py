"""The benchmarks run, at their smallest, and measure what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from topo_dask import compare, generate_diffusion_flows, segment, track_flows
from topo_dask.grid import Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.parallel import starmap
from topo_dask.run.planning import JOBS
from topo_dask.storage import create_array, open_array
from topo_dask.testing import synthetic_tissue

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
VOLUME = synthetic_tissue((24, 32, 40), n_instances=25, seed=3)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "tissue.zarr"
    create_array(path, VOLUME.shape, (16, 16, 16), VOLUME.dtype)[...] = VOLUME
    return path


def run(script: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script", [p.stem for p in sorted(FOLDER.glob("*.py")) if "\ndef main(" in p.read_text()]
)
def test_every_script_says_what_it_does(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        module(script).main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--record" in shown
    assert f"benchmarks/{script}.py" in (FOLDER / "README.md").read_text()


def test_plans_are_measured_for_every_job(labels: Path, tmp_path: Path) -> None:
    plan = module("plan")
    few = ["--size", "24", "--shape", "16", "--only", "instances", "--only", "fuse_mosaic, turned"]
    text = run("plan.py", labels, *few, "--n-iter", 8, "--folder", tmp_path)
    assert text.count(" 16x16x16 ") == 2
    cases = [*plan.flow_cases(plan.arguments().parse_args([]), tmp_path, (16, 16, 16))]
    cases += [*plan.label_cases(tmp_path, (16, 16, 16)), *plan.tile_cases(tmp_path, (16, 16, 16))]
    assert {case.job for case in cases} == set(JOBS)


def test_rounds_are_timed_against_a_context(labels: Path, tmp_path: Path) -> None:
    few = ("--size", 24, "--slack", 1000, "--folder", tmp_path / "work")
    out = run("rounds.py", labels, *few, "--case", "heat:9:16", "--case", "coordinate:9:16")
    assert out.count(", n = 9, blocks of 16") == 2
    assert "| context of 9 " in out
    assert list((tmp_path / "work").iterdir()) == []


def test_tissue_runs_the_main_job_and_checks_blocks(labels: Path, tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    small = ("--n-iter", 20, "--cluster", "sync", "--check-shape", "10,32,20")
    small += ("--check-cluster", "threads")
    places = ("--folder", tmp_path / "work", "--record", "--results", results, "--date", "1 May")
    out = run("tissue.py", labels, "--check-blocks", *small, *places)
    assert out.count(" OK ") == 1
    assert "DIFFERENT" not in out
    assert all(f"| {name} " in out for name in ("flows", "segment", "compare", "whole job"))
    assert "Comparison of labels with the truth" in out
    text = results.read_text()
    assert "1 May." in text
    assert "tissue.py LABELS --n-iter 20 --cluster sync --check-blocks --check-shape" in text
    assert str(tmp_path) not in text
    assert list((tmp_path / "work").iterdir()) == []


def test_flows_run_and_fill_large_cubes_with_images(labels: Path) -> None:
    few = ["--size", 20, "--n-iter", 10, "--sizes", "16,40", "--repetitions", 1]
    out = run("flows.py", labels, *few)
    assert "| poisson, n = 10 " in out
    assert "| coordinate, n = 100 for all " in out
    assert "| Chebyshev, n = 100 " in out
    assert "| 40³ " in out
    assert all(out.count(f"| {name}") == 2 for name in ("most / least", "largest cube / smallest"))
    assert "| its updates a voxel in the time of poisson" in out
    assert "updates a voxel of the plain stencil in that time" in out
    large = module("flows").cube(labels, 40)
    assert large.shape == (40, 40, 40)
    inside = VOLUME > 0
    assert ((large > 0)[:24, :32] == inside).all()
    assert ((large > 0)[24:, :32] == inside[:7:-1]).all()
    assert not np.intersect1d(large[:24][large[:24] > 0], large[24:]).size


def test_speed_runs(labels: Path) -> None:
    out = run(
        "speed.py",
        labels,
        "--size",
        20,
        "--at",
        "0,9,99",
        "--baseline-size",
        16,
        "--repetitions",
        2,
    )
    assert "| flows " in out
    assert "| tracking " in out
    assert "identical bit for bit" in out
    assert out.count("| labelled ") >= 1


def test_gpu_checks_everything_on_the_host_and_says_that_it_timed_no_gpu(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which("g++") is None:
        pytest.skip("no g++ to build the CUDA sources for the CPU")
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
    small = ("--size", 20, "--tile", 8, "--n-iter", 10, "--repetitions", 1, "--cluster", "sync")
    out = run("gpu.py", labels, *small, "--folder", tmp_path / "work")
    assert out.count("Nothing here was timed on a GPU") == 2
    assert "DIFFERENT" not in out
    assert all(f"| {name}" in out for name in ("diffusion, coordinate", "tracking, linear"))
    assert out.count("identical") > 9
    assert "Labels of the same flows are identical" in out
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        subprocess.run(
            [sys.executable, str(FOLDER / "gpu.py"), str(labels), "--record"],
            check=True,
            capture_output=True,
        )


def test_gpu_says_what_bounds_a_kernel() -> None:
    gpu = module("gpu")
    limits = gpu.Limits(copy=100.0, up=1.0, down=1.0, float64=10.0, facts="")
    facts = {"name": "", "processor": None, "call": None, "items": 10.0, "item": ""}
    kernel = gpu.Kernel(**facts, moved=10.0, operations=1.0, really=20.0, else_bound="waiting")
    assert gpu.bound(kernel, 10.0, limits)[:2] == (0.1, 0.1)
    assert gpu.bound(kernel, 10.0, limits)[2] == "waiting"
    assert gpu.bound(kernel, 2.0, limits)[2].startswith("memory, 100% of a copy with the 20 bytes")
    kernel = gpu.Kernel(**facts, moved=1.0, operations=2.0)
    assert gpu.bound(kernel, 2.0, limits)[2] == "float64 arithmetic"


def test_gpu_says_when_an_answer_differs() -> None:
    difference = module("gpu").difference
    one = np.arange(3.0)
    assert difference((one, one), (one, one.copy())) == 0
    assert difference(one, np.nextafter(one, 9)) > 0
    assert difference(one, -0.0 * one + one) == 0
    assert difference(np.zeros(1), -np.zeros(1)) > 0
    assert difference(one, one.astype(np.float32)) == np.inf
    assert difference(one, np.array([0, 1, np.nan])) == np.inf


def test_overhead_runs(labels: Path, tmp_path: Path) -> None:
    words = ("--size", 24, "--blocks", 16, "--n-iter", 10, "--workers", 1, "--folder", tmp_path)
    out = run("overhead.py", labels, *words)
    assert "wall seconds on 1 workers" in out
    assert "| segment | labels" in out
    assert "both ways are identical" in out


def test_tracking_in_blocks_is_timed(labels: Path) -> None:
    small = ("--size", 24, "--blocks", 12, "--n-iter", 10, "--repetitions", 1)
    large = ("--large", 24, "--large-blocks", 16, "--workers", 1)
    out = run("track.py", labels, *small, *large)
    assert out.count("| kernel alone, in memory, threads: 1 |") == 2
    assert "stored uncompressed, on 1: rounds: " in out
    assert out.count("Labels are identical.") == 2


def test_clocks_see_the_kernels_wherever_they_are_looked_up() -> None:
    overhead = module("overhead")
    with overhead.parts() as spent:
        kernels_for("cpu").interleave(np.ones((3, 1, 1, 1), np.float32))
        first = spent["kernels"]
        cpu.interleave(np.ones((3, 1, 1, 1), np.float32))
        assert spent["kernels"] > first > 0
    kernels_for("cpu").interleave(np.ones((3, 1, 1, 1), np.float32))
    cpu.compact(np.ones((1, 1, 1), np.uint8))


def test_mirrored_flows_go_on_across_the_faces() -> None:
    workers = module("workers")
    labels = VOLUME[:16, :16, :16]
    flow = generate_diffusion_flows(labels, 20)
    whole = np.concatenate([labels, workers.mirrored(labels, (0, 1, 0))], axis=1)
    both = np.concatenate([flow, workers.mirrored(flow, (0, 1, 0))], axis=2)
    assert np.array_equal(whole, whole[:, ::-1])
    turned = both[:, :, ::-1] * np.array([1, -1, 1], np.float32).reshape(3, 1, 1, 1)
    assert np.array_equal(both, turned)
    assert np.array_equal(workers.mirrored(flow, (2, 0, 4)), flow)


@pytest.mark.slow
def test_workers_are_compared(labels: Path) -> None:
    small = ("--size", 40, "--crop", 24, "--blocks", 20, "--n-iter", 10)
    out = run("workers.py", labels, *small)
    assert "times as fast" in out
    assert "| number " in out
    assert "Labels are identical." in out


def test_labels_that_differ_are_told(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tissue, common = module("tissue"), module("common")
    (tmp_path / "labels.zarr").mkdir()
    labels.rename(tmp_path / "labels.zarr" / "s0")
    true = common.digest(tmp_path / "labels.zarr" / "s0")
    for found, verdict in ((true, "OK"), ("0" * 64, "DIFFERENT")):
        runs = [("8x8x8", "threads", true, 1.0), ("4x4x4", "threads", found, 1.0)]
        monkeypatch.setattr(tissue, "checks", lambda *_, runs=runs: iter(runs))
        text, same = tissue.check_blocks(SimpleNamespace(), tmp_path)
        assert same == (verdict == "OK")
        assert verdict in text


def test_baseline_does_the_same_work() -> None:
    baseline = module("baseline")
    flow = generate_diffusion_flows(VOLUME, 60)
    assert np.abs(baseline.generate_diffusion_flows(VOLUME, 60) - flow).max() < 1e-4
    voxels, ends = baseline.track_flows(VOLUME > 0, flow, 30)
    own_voxels, own_ends = track_flows(VOLUME > 0, flow, 30)
    assert np.array_equal(voxels, own_voxels)
    assert module("speed").same_bits(ends, own_ends)


def test_boxes_are_grown_and_stay_in_the_volume() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[0, 4, 7], labels[8, 8, 8] = 3, 5
    assert module("baseline").box_voxels(labels) == 3 * 5 * 4 + 3 * 3 * 3


def test_crops_lie_where_asked() -> None:
    common = module("common")
    assert str(common.cube((10, 20, 30), 6)) == "[2:8, 7:13, 12:18]"
    assert str(common.cube((10, 20, 30), 15, (1, 2, 99))) == "[0:10, 2:17, 15:30]"
    assert str(common.cube((10, 20, 30), None)) == "[0:10, 0:20, 0:30]"


def test_baseline_without_background() -> None:
    labels = np.array([[[7, 7, 7, 9, 9]]])
    flow = module("baseline").generate_diffusion_flows(labels, 5)
    assert np.array_equal(flow, generate_diffusion_flows(labels, 5))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("iterations", [1, 8, 19])
def test_both_stencils_give_the_same_bits(threads: int, iterations: int) -> None:
    stencil = module("stencil")
    start = np.zeros((42, 7, 9), np.float32)
    start[1:-1, 1:-1, 1:-1] = np.random.default_rng(0).random((40, 5, 7))
    expected = start.copy()
    for _ in range(iterations):
        old = expected.copy()
        expected[1:-1, 1:-1, 1:-1] = sum(
            np.roll(old, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)
        ) * np.float32(1 / 6)
    simple = stencil.simple([start.copy(), np.zeros_like(start)], iterations, threads)
    with starmap(threads) as engine:
        blocked = stencil.blocked([start.copy(), np.zeros_like(start)], iterations, threads, engine)
    assert np.array_equal(simple, blocked)
    assert np.allclose(simple, expected, rtol=1e-5)


GRANDCHILD = """
import subprocess, sys
hold = "import time; block = b'x' * 200_000_000; time.sleep(0.8)"
subprocess.run([sys.executable, "-c", hold], check=True)
print("done")
"""


def test_memory_of_grandchildren_counts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    took = module("watch").watched([sys.executable, "-c", GRANDCHILD], tmp_path)
    assert took.output == "done\n"
    assert 200e6 < took.rss < 300e6
    if sys.platform == "linux":
        assert 190e6 < took.pss <= took.rss
    assert took.processes == 2
    assert took.disk >= 100_000


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        module("watch").watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_only_its_own_section_is_replaced(tmp_path: Path) -> None:
    common, path = module("common"), tmp_path / "RESULTS.md"
    for title, text in (("A", "first"), ("B", "second"), ("A", "third\n\n### detail")):
        common.replace_section(path, title, text)
    written = path.read_text()
    assert written == f"{common.TITLE}\n## A\n\nthird\n\n### detail\n\n## B\n\nsecond\n"


def test_labels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = module("common")
    monkeypatch.delenv(common.VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        common.parse(common.parser("any.py", None), [])
    assert common.VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(common.VARIABLE, "somewhere")
    assert common.parse(common.parser("any.py", None), []).labels == "somewhere"


def test_tiles_runs(tmp_path: Path) -> None:
    small = ("--side", 1200, "--tile", 64, "--overlap", 16, "--cluster", "threads")
    out = run("tiles.py", *small, "--folder", tmp_path)
    assert "| 1,200² |" in out
    assert "planned in" in out
    assert "| 300²" in out


def test_the_volume_of_any_size_is_what_its_flows_make(tmp_path: Path) -> None:
    scale = module("scale")
    truth, flows = tmp_path / "truth.zarr", tmp_path / "flows.zarr"
    foreground, instances = scale.make(80, truth, flows)
    assert instances == 8
    assert 0.27 < foreground / 80**3 < 0.33
    options: dict[str, Any] = {"foreground": truth, "blocks": (80, 50, 33), "cluster": "sync"}
    made = segment(flows, tmp_path / "out.zarr", **options)
    found = compare(truth, made.array, ignore_background=False, cluster="sync")
    assert found.same_partition
    lattice = scale.Lattice(80)
    part, region = lattice.ellipsoids, Region((40, 7, 30), (80, 50, 64))
    labels, flow = lattice.block(region, part)
    whole, all_flows = lattice.block(Region((0, 0, 0), (80, 80, 80)), part)
    assert np.array_equal(labels, whole[region.slices])
    assert np.array_equal(flow, all_flows[(slice(None), *region.slices)])


def test_memory_that_grows_and_labels_that_are_wrong_are_told() -> None:
    scale, watch = module("scale"), module("watch")
    small = watch.Watched(seconds=1, processor_seconds=2, rss=2**30, pss=2**30)
    grown = watch.Watched(seconds=9, processor_seconds=18, rss=2**31, pss=2**30 + 2**28)
    first = scale.Outcome(10, 300, 8, small, 0, True)
    for outcome, words in (
        (scale.Outcome(20, 2400, 8, small, 0, True), []),
        (scale.Outcome(20, 2400, 8, small, 0, False), ["WRONG"]),
        (scale.Outcome(20, 2400, 8, grown, 0, True), ["TOO MUCH"]),
    ):
        text, good = scale.judged([first, outcome])
        assert good == (not words)
        assert [word for word in ("WRONG", "TOO MUCH") if word in text] == words


def test_components_are_those_of_scipy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    components = module("components")
    monkeypatch.setattr(components, "CHUNK", 24)
    components.make(60, tmp_path / "mask.zarr")
    mask = open_array(tmp_path / "mask.zarr", argument="mask", axes=(3,))[...]
    assert np.array_equal(mask, components.mask_of(Region((0, 0, 0), (60, 60, 60))))
    assert 0.2 < mask.mean() < 0.6
    components.label("topo_dask", tmp_path / "mask.zarr", tmp_path / "labels.zarr")
    assert float(capsys.readouterr().out) > 0
    labels = open_array(tmp_path / "labels.zarr", argument="labels", axes=(3,))[...]
    expected, count = ndimage.label(mask)
    assert count > 3
    assert np.array_equal(labels, expected)


def test_what_components_are_compared_with_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    components = module("components")
    monkeypatch.setattr(components, "NEEDED", {"dask-image": "no_such_module"})
    with pytest.raises(SystemExit):
        components.main([])
    assert "pip install dask-image" in capsys.readouterr().err


def test_union_runs_and_agrees_with_scipy(tmp_path: Path) -> None:
    out = run("union.py", "--edges", 4000, "--components", 20, "--folder", tmp_path)
    assert "100 owners" in out
    assert "as scipy finds them: yes" in out


def test_blocks_run_without_any_work(tmp_path: Path) -> None:
    blocks = module("blocks")
    rows, busy, resumed, memory = blocks.run(tmp_path, 5, "threads")
    tasks = {name: count for _, name, count, *_ in rows}
    assert tasks["track"] == tasks["track-2"] == tasks["edges"] == tasks["write"] == 125
    assert tasks["together"] == 2
    assert min(busy, resumed) > 0
    assert memory > 0


def test_instances_run(tmp_path: Path) -> None:
    out = run("instances.py", "--instances", 1000, "--tables", 4, "--folder", tmp_path)
    assert out.count("| 1e+03 ") == 2


def test_resume_runs(tmp_path: Path) -> None:
    out = run("resume.py", "--blocks", 8, "--cluster", "sync", "--folder", tmp_path)
    assert "2³ = 8 blocks" in out
    assert "| segment |" in out
