"""Plans: what a run would take, said before it begins, and refused where memory is too small."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from distributed import Client, LocalCluster

import topo_dask
from topo_dask.cli import main
from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument, MemoryTooSmall, OutputExists, TightMemory
from topo_dask.grid import BlockGrid
from topo_dask.plan.flow_field import SegmentWork
from topo_dask.plan.labels import FlowsWork
from topo_dask.plan.outline import Machine, Plan
from topo_dask.plan.work import Volume, all_read, fitting_blocks, largest_read
from topo_dask.run.cluster_options import ClusterOptions
from topo_dask.run.execute import SyncEngine
from topo_dask.run.machine import machine_of
from topo_dask.run.sampling import sampled_parts
from topo_dask.testing import synthetic_tissue

SHAPE = (24, 32, 40)
JOBS = (
    *("flows", "overlap", "rounds", "poisson", "targets", "segment", "group 2", "group 3"),
    *(
        "evidence",
        "check and holes",
        "classes",
        "relabel",
        "relabel with flows",
        "tiles",
        "probed tiles",
        "mosaic",
    ),
)


ROUNDS = ("track-", "round-", "schwarz-")


class Watching(SyncEngine):
    """Keeps the stages, their numbers of tasks, and what files they leave."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, int] = {}

    def run(self, stage: str, function: Any, items: Any, **options: Any) -> Iterator[Any]:
        self.stages[stage] = len(items)
        return super().run(stage, function, items, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    labels = synthetic_tissue(SHAPE, n_instances=8, seed=3)
    stored = zarr.create_array(
        store=str(folder / "labels.zarr"), shape=SHAPE, chunks=(16, 16, 16), dtype=labels.dtype
    )
    stored[...] = labels
    topo_dask.flows(folder / "labels.zarr", folder / "flows.zarr", blocks=16, cluster="sync")
    kept = {"blocks": 16, "keep_evidence": True}
    topo_dask.segment(folder / "flows.zarr", folder / "kept", cluster="sync", **kept)
    return folder


def job(name: str, folder: Path) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The function, its arguments and its options."""
    labels, flows = folder / "labels.zarr", folder / "flows.zarr"
    image = np.ones(SHAPE, np.float32)
    probable = np.asarray(zarr.open_array(str(labels))[...] > 0)[None].astype(np.float32)
    segment = {"foreground": labels, "blocks": 16, "min_size": 5, "halo": 4}
    return {
        "flows": ("flows", (labels,), {"blocks": 16}),
        "overlap": ("flows", (labels,), {"blocks": 16, "overlap": 6}),
        "rounds": ("flows", (labels,), {"blocks": 16, "rounds": 40, "n_iter": 80}),
        "poisson": ("flows", (labels,), {"blocks": 16, "potential": "poisson"}),
        "targets": (
            "flow_targets",
            (np.stack([np.asarray(zarr.open_array(str(labels)))] * 2),),
            {"class_names": ["nuc", "mito"], "resolution_nm": 8, "blocks": 16},
        ),
        "segment": ("segment", (flows,), segment),
        "group 2": ("segment", (flows,), {**segment, "group": 2}),
        "group 3": ("segment", (flows,), {**segment, "group": 3}),
        "check and holes": (
            "segment",
            (flows,),
            {**segment, "flow_error_threshold": 0.5, "fill_holes": True},
        ),
        "classes": (
            "segment_classes",
            (probable, np.asarray(zarr.open_array(str(flows)))),
            {"class_names": ["mito"], "resolution_nm": 8, "blocks": 16, "halo": 4},
        ),
        "relabel": ("relabel", (folder / "kept",), {"group": 2, "blocks": 16}),
        "relabel with flows": ("relabel", (folder / "kept",), {"flows": flows, "blocks": 16}),
        "tiles": ("map_tiles", (np.negative, image, (16, 16, 16), 4), {"dtype": "float32"}),
        "probed tiles": ("map_tiles", (np.negative, image, (16, 16, 16), 4), {"blocks": 16}),
        "mosaic": (
            "fuse_mosaic",
            ([image, image], [(0, 0, 0), (0, 0, 30)]),
            {"blocks": 16},
        ),
        "evidence": ("segment", (flows,), {**segment, "keep_evidence": True}),
    }[name]


def names(stage: str) -> str:
    """Rounds are one row of a plan."""
    return stage.split("-")[0] if stage.startswith(ROUNDS) else stage


@pytest.mark.parametrize("name", JOBS)
def test_plan_has_the_stages_that_the_run_has(name: str, inputs: Path, tmp_path: Path) -> None:
    function, arguments, options = job(name, inputs)
    found = topo_dask.plan(function, *arguments, cluster="sync", sample=0, **options)
    engine = Watching()
    getattr(topo_dask, function)(*arguments, output=tmp_path / "out", cluster=engine, **options)
    planned = {names(s.name): s.tasks for s in found.stages}
    ran = {stage.split("/")[-1]: tasks for stage, tasks in engine.stages.items()}  # CLASS/stage
    # What has nothing to do here is left out by the run.
    assert {names(stage) for stage in ran} <= set(planned)
    assert set(planned) - {names(stage) for stage in ran} <= {"absorb", "fill", "track"}
    for stage, tasks in ran.items():
        if names(stage) == stage:
            assert tasks <= planned[stage], stage


@pytest.mark.parametrize("name", JOBS)
def test_output_has_no_more_files_and_bytes_than_planned(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    function, arguments, options = job(name, inputs)
    found = topo_dask.plan(function, *arguments, cluster="sync", sample=0, **options)
    getattr(topo_dask, function)(*arguments, output=tmp_path / "out", cluster="sync", **options)
    files = [Path(f) / n for f, _, some in os.walk(tmp_path / "out") for n in some]
    assert found.output.files / 2 <= len(files) <= found.output.files + 1  # the run's record
    arrays = [f for f in files if f.name != "record.json"]
    assert sum(f.stat().st_size for f in arrays) <= found.output.size + 10_000 * len(files)


def test_scratch_of_rounds_is_what_is_there_at_once(tmp_path: Path) -> None:
    labels = synthetic_tissue((32, 32, 32), n_instances=6, seed=2)
    how: dict[str, Any] = {"rounds": 8, "n_iter": 80, "adaptive_iters": False, "blocks": 16}
    found = topo_dask.plan("flows", labels, cluster="sync", sample=0, **how)
    work, most = tmp_path / "out.zarr.work", [0, 0]

    class Weighing(SyncEngine):
        def run(self, stage: str, function: Any, items: Any, **options: Any) -> Iterator[Any]:
            for result in super().run(stage, function, items, **options):
                files = [path for path in work.rglob("*") if path.is_file()]
                sizes = sum(path.stat().st_size for path in files)
                most[:] = max(most[0], sizes), max(most[1], len(files))
                yield result

    topo_dask.flows(labels, tmp_path / "out.zarr", cluster=Weighing(), **how)
    assert most[0] <= found.scratch.size <= 3 * most[0]
    assert most[1] <= found.scratch.files


def test_planning_writes_nothing_and_checks_everything(inputs: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in inputs.iterdir())
    found = topo_dask.plan(
        "segment", inputs / "flows.zarr", tmp_path / "a.zarr", cluster="sync", blocks=16, sample=1
    )
    assert isinstance(found, Plan)
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in inputs.iterdir()) == before
    with pytest.raises(InvalidArgument, match="n_steps"):
        topo_dask.plan("segment", inputs / "flows.zarr", n_steps=-1, cluster="sync")
    with pytest.raises(InvalidArgument, match="job"):
        topo_dask.plan("fly", inputs / "flows.zarr")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(OutputExists):
        topo_dask.plan("flows", inputs / "labels.zarr", output=tmp_path / "there")


class Text(HTMLParser):
    """Collects what a page shows; fails on tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_plan_is_readable_as_text_html_and_json(inputs: Path) -> None:
    found = topo_dask.plan("flows", inputs / "labels.zarr", blocks=16, cluster="sync", sample=0)
    text = repr(found)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("table", "facts", "flows", "context", "at most", "12 blocks"):
        assert word in text
    page = Text()
    page.feed(found._repr_html_())
    assert page.open == []
    assert "core time" in page.text
    assert "facts" in page.text
    values = json.loads(found.to_json())
    assert values["worker_bytes"] == found.worker_bytes > values["task_bytes"]
    assert [s["name"] for s in values["stages"]] == ["table", "facts", "flows"]


def test_largest_and_all_reads_are_those_of_the_blocks() -> None:
    grid = BlockGrid((20, 9, 33), (8, 9, 16))
    sizes = [core.grow(5, within=grid.shape).size for core in grid]
    assert (largest_read(grid, 5), all_read(grid, 5)) == (max(sizes), sum(sizes))


def flows_work(blocks: int = 256, side: int = 1024) -> FlowsWork:
    shape, heat = (side,) * 3, (FlowSettings(potential="heat"),)
    grid = BlockGrid(shape, (blocks,) * 3)
    return FlowsWork("flows", grid, (Volume(shape, 8),), settings=heat)


def test_memory_grows_with_blocks_and_context_and_not_with_the_volume() -> None:
    machine = Machine("test", 4)
    small, large = (flows_work(n).plan(machine) for n in (128, 256))
    assert small.worker_bytes < large.worker_bytes
    wide = flows_work(128, side=4096).plan(machine)
    assert wide.stages[-1].task_bytes == small.stages[-1].task_bytes


def test_threads_of_a_worker_share_its_memory() -> None:
    alone = flows_work().plan(Machine("test", 8))
    shared = flows_work().plan(Machine("test", 2, 4))
    assert shared.worker_bytes - shared.machine.base == 4 * alone.largest.task_bytes


@pytest.mark.parametrize("limit", [2**29, 2**30, 2**31])
def test_blocks_that_are_said_to_fit_do(limit: int) -> None:
    shape = (2048,) * 3
    machine = Machine("test", 4, memory=limit)
    flow = Volume((3, *shape), 4)
    for work in (flows_work(512), SegmentWork("segment", BlockGrid(shape, (512,) * 3), (flow,))):
        found = work.plan(machine)
        assert not found.fits
        blocks = fitting_blocks(work, machine)
        if blocks is None:
            assert "No block shape fits" in found.problems[0]
            continue
        assert str(blocks) in found.problems[0]
        assert not work.reblocked(blocks).plan(machine).tight


def test_machine_is_what_an_engine_would_be() -> None:
    assert machine_of("sync").slots == 1
    assert machine_of("threads").workers == 1
    assert machine_of("processes").threads == 1
    options = ClusterOptions("local", workers=3, cores=2, memory="1GB")
    assert machine_of(options) == Machine("local", 3, 2, 10**9)


# Such a worker counts the memory of the tests' own process and would pause.
NEVER_PAUSED = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        dask.config.set(NEVER_PAUSED),
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            memory_limit="300MiB",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as found,
    ):
        yield found


def test_a_running_scheduler_is_asked(client: Client) -> None:
    found = machine_of(client)
    assert (found.workers, found.threads, found.memory) == (1, 2, 300 * 2**20)


def test_run_refuses_memory_that_is_too_small(client: Client, inputs: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        return topo_dask.flows(
            inputs / "labels.zarr", tmp_path / "a.zarr", cluster=client, **options
        )

    with pytest.raises(MemoryTooSmall, match=r"limit is 300 MiB.*ignore_memory=True") as error:
        run(blocks=16)
    assert isinstance(error.value, MemoryError)
    assert list(tmp_path.iterdir()) == []
    made = run(blocks=16, ignore_memory=True)
    assert made.array.shape == (3, *SHAPE)


def test_run_warns_of_tight_memory(inputs: Path, tmp_path: Path) -> None:
    wanted = topo_dask.plan("flows", inputs / "labels.zarr", blocks=16, cluster="sync", sample=0)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False}
    limit = round(1.1 * wanted.worker_bytes)
    with (
        dask.config.set(NEVER_PAUSED),
        LocalCluster(memory_limit=limit, dashboard_address="127.0.0.1:0", **options) as cluster,
        Client(cluster, set_as_default=False) as found,
        pytest.warns(TightMemory, match="table|flows"),
    ):
        topo_dask.flows(inputs / "labels.zarr", tmp_path / "a.zarr", cluster=found, blocks=16)


SAMPLED = ("flows", "targets", "segment", "group 2", "classes")


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_tell_times_and_sizes(name: str, inputs: Path, tmp_path: Path) -> None:
    function, arguments, options = job(name, inputs)
    found = topo_dask.plan(function, *arguments, cluster="sync", sample=2, **options)
    assert found.problems == ()
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in found.stages)
    assert found.seconds is not None
    assert found.seconds <= sum(stage.seconds or 0 for stage in found.stages)
    assert found.output.stored is not None
    assert "about" in repr(found)
    getattr(topo_dask, function)(*arguments, output=tmp_path / "out", cluster="sync", **options)
    files = [Path(f) / n for f, _, some in os.walk(tmp_path / "out") for n in some]
    size = sum(f.stat().st_size for f in files)
    assert size / 10 < found.output.stored < 10 * size  # tiny volumes: mostly metadata


def test_sampled_parts_are_the_same_for_the_same_grid_and_lie_in_it() -> None:
    grid = BlockGrid((300, 70, 500), (128, 70, 256))
    parts = sampled_parts(grid, 3)
    assert parts == sampled_parts(grid, 3)
    assert len(set(parts)) == 3
    for part in parts:
        assert max(part.shape) <= 128
        (number,) = grid.touching(part)
        assert grid.region(number).intersect(part) == part
    assert len(sampled_parts(grid, 1000)) == len(grid)


def test_sample_that_fails_leaves_a_plan_that_says_so(tmp_path: Path) -> None:
    flow = np.full((3, 8, 8, 8), np.nan, np.float32)
    found = topo_dask.plan("segment", flow, blocks=4, cluster="sync", sample=1)
    assert "InvalidData" in found.problems[0]
    assert found.seconds is None


@pytest.mark.parametrize("words", [["plan", "segment"], ["segment", "--dry-run"]])
def test_command_line_plans(words: list[str], inputs: Path, tmp_path: Path) -> None:
    flows, labels = str(inputs / "flows.zarr"), str(inputs / "labels.zarr")
    out = [] if words[0] == "plan" else [str(tmp_path / "out.zarr")]
    options = ["--foreground", labels, "--blocks", "16", "--cluster", "sync"]
    done = CliRunner().invoke(main, [words[0], *words[1:], flows, *out, *options])
    assert done.exit_code == 0, done.output
    assert "Plan: Instances of 24x32x40 voxels" in done.output
    assert list(tmp_path.iterdir()) == []


def test_command_line_plans_as_json(inputs: Path) -> None:
    words = ["plan", "flows", str(inputs / "labels.zarr"), "--cluster", "sync", "--sample", "0"]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["shape"] == list(SHAPE)


def test_comparison_can_be_planned_and_sampled(inputs: Path) -> None:
    labels = str(inputs / "labels.zarr")
    found = topo_dask.plan("compare", labels, labels, blocks=16, cluster="sync", sample=1)
    assert [(stage.name, stage.tasks) for stage in found.stages] == [("compare", 12)]
    assert found.read_bytes == 2 * zarr.open_array(labels).nbytes
    assert found.seconds is not None
    assert found.output.size == found.scratch.files == 0
    words = ["compare", labels, labels, "--cluster", "sync", "--blocks", "16"]
    shown = CliRunner().invoke(main, [*words, "--dry-run", "--json"])
    assert json.loads(shown.output)["tasks"] == 12
    done = CliRunner().invoke(main, [*words, "--json"])
    assert json.loads(done.stdout)["identical"] is True


def test_every_job_of_the_command_line_can_be_planned() -> None:
    from topo_dask.cli import main as commands

    for name in (
        "flows",
        "segment",
        "segment-classes",
        "targets",
        "map-tiles",
        "fuse",
        "relabel",
        "instances",
        "compare",
    ):
        for words in (["plan", name, "--help"], [name, "--help"]):
            done = CliRunner().invoke(commands, words)
            assert done.exit_code == 0
        assert "--dry-run" in done.output
