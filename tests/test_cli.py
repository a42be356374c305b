"""The command line, as a person runs it: real processes, real files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import topo_dask
from topo_dask.cli import main
from topo_dask.storage import create_array
from topo_dask.testing import synthetic_tissue

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder and expect an exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "topo_dask", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tissue where the README has one."""
    place = tmp_path_factory.mktemp("cli")
    labels = synthetic_tissue((40, 44, 48), n_instances=30, seed=5)
    array = create_array(place / "tissue.zarr" / "labels" / "s0", labels.shape, (20,) * 3, "uint32")
    array[...] = labels
    return place


def fences(language: str) -> list[str]:
    """The code blocks of the README in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_commands_of_the_readme_run_and_agree_with_python(folder: Path) -> None:
    lines = [line for block in fences("sh") for line in block.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("topo-dask ")]
    assert [command[0] for command in commands] == ["flows", "segment", "compare"]
    for command in commands:
        done = run(*command, "--blocks", "24,30,48", "--cluster", "threads", cwd=folder)
    assert "variation of information" in done.stdout
    truth = zarr.open_array(folder / "tissue.zarr/labels/s0", mode="r")[...]
    whole = topo_dask.generate_diffusion_flows(truth)
    stored = zarr.open_array(folder / "flows.zarr", mode="r")[...]
    assert np.abs(whole - stored).max() <= 1e-4
    labels = zarr.open_array(folder / "labels.zarr/s0", mode="r")[...]
    np.testing.assert_array_equal(labels, topo_dask.postprocess_single(truth > 0, stored))


def test_the_cluster_lines_of_the_readme_are_understood(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is submitted, as there is nothing to submit with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.zarr").symlink_to(folder / "tissue.zarr/labels/s0")
    lines = [line.split()[1:] for block in fences("bash") for line in block.splitlines()]
    assert {words[0] for words in lines} == {"job-script", "flows"}
    for words in lines:
        planned = [] if words[0] == "job-script" else ["--dry-run"]
        done = CliRunner().invoke(main, [*words, *planned])
        assert done.exit_code == 0, done.output
        assert ("slurm: 160 processes" if planned else "#SBATCH") in done.output, done.output
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"topo-dask ([a-z][a-z-]+)", text))
    assert named - {"flows"}
    assert named <= set(main.commands)


def test_the_python_of_the_readme_runs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tissue.zarr").symlink_to(folder / "tissue.zarr")
    blocks = fences("python")
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        script = tmp_path / f"example{number}.py"
        script.write_text(block, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Comparison of labels with the truth" in done.stdout


def test_classes_and_their_tables(folder: Path) -> None:
    labels = zarr.open_array(folder / "tissue.zarr/labels/s0", mode="r")[...]
    flow = topo_dask.generate_direct_flows(labels)
    for name, values in (
        ("semantic", np.stack([labels > 0, labels > 9]).astype("f4")),
        ("stack", np.concatenate([flow, flow])),
    ):
        create_array(folder / name, values.shape, (1, 20, 20, 20), "f4")[...] = values
    options = ["--class-names", "nuc,ves", "--resolution-nm", "16", "--cluster", "threads"]
    more = ["--flow-error-threshold", "0.4", "--fill-holes", "--blocks", "24"]
    done = run("segment-classes", "semantic", "stack", "classes.zarr", *options, *more, cwd=folder)
    assert re.search(r"ves +\d+ instances, group 1", done.stdout)
    table = (folder / "classes.zarr/instances/ves.csv").read_text().splitlines()
    assert table[0].startswith("id,voxels,z_start,y_start")
    whole = topo_dask.run_instance_segmentation(
        np.stack([labels > 0, labels > 9]), np.concatenate([flow, flow]), ["nuc", "ves"],
        flow_error_threshold=0.4, resolution_nm=16,
    )  # fmt: skip
    made = zarr.open_array(folder / "classes.zarr/labels", mode="r")[...]
    for c, name in enumerate(("nuc", "ves")):
        np.testing.assert_array_equal(made[c], topo_dask.fill_holes(whole[name]))
    assert len(table) == whole["ves"].max() + 1


def test_a_table_of_instances_and_rounds(folder: Path) -> None:
    array = "tissue.zarr/labels/s0"
    how = ["--cluster", "sync", "--blocks", "24", "--no-progress"]
    done = run("instances", array, "instances.npz", *how, cwd=folder)
    table = topo_dask.read_instance_table(folder / "instances.npz")
    assert done.stdout.startswith(f"{len(table)} instances, ")
    more = ["--instances", "instances.npz", "--rounds", "8", "--n-iter", "20"]
    done = run("flows", array, "rounds.zarr", *more, *how, cwd=folder)
    assert "rounds of 8 iterations" in done.stdout
    truth = zarr.open_array(folder / array, mode="r")[...]
    made = zarr.open_array(folder / "rounds.zarr", mode="r")[...]
    np.testing.assert_array_equal(made, topo_dask.generate_diffusion_flows(truth, 20))
    refused = run("flows", array, "no.zarr", "--rounds", "some", *how, cwd=folder, code=2)
    assert "neither 'auto' nor a whole number" in refused.stderr


def test_compare_prints_json(folder: Path) -> None:
    array = "tissue.zarr/labels/s0"
    done = run("compare", array, array, "--json", "--cluster", "sync", "--no-progress", cwd=folder)
    found = json.loads(done.stdout)
    assert found["identical"] is True
    assert found["vi"] == 0


def test_the_default_cluster_prints_its_dashboard_and_progress(folder: Path) -> None:
    array = "tissue.zarr/labels/s0"
    done = run("flows", array, "local.zarr", "--blocks", "32", "--n-iter", "10", cwd=folder)
    assert re.search(r"dashboard: http://127\.0\.0\.1:\d+/status", done.stderr)
    assert re.search(r"flows +8/8 blocks +\S+ voxels/s", done.stderr)


def test_demo_leaves_labels_and_a_page(tmp_path: Path) -> None:
    demo = ["demo", "out", "--shape", "40,48,48", "--blocks", "24", "--cluster", "threads"]
    done = run(*demo, "--no-progress", cwd=tmp_path)
    assert str(tmp_path / "out" / "index.html") in done.stdout
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 13  # four pictures of three slices, and the legend
    labels = zarr.open_group(tmp_path / "out" / "labels.zarr", mode="r")
    scale = labels.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]
    assert scale == {"type": "scale", "scale": [16.0, 8.0, 8.0]}
    assert (tmp_path / "out" / "slices.png").read_bytes().startswith(b"\x89PNG")
    refused = run(*demo, cwd=tmp_path, code=1)
    assert "not empty" in refused.stderr
    for bad in (["--shape", "0,9,9"], ["--blocks", "0"], ["--cluster", "nonesuch"]):
        refused = run(*demo, *bad, "--overwrite", cwd=tmp_path, code=1)
        assert f"{bad[0][2:]}: got " in refused.stderr
        assert (tmp_path / "out" / "index.html").exists()
    run(*demo, "--overwrite", "--no-progress", cwd=tmp_path)


def test_a_page_of_slices(folder: Path, tmp_path: Path) -> None:
    array = str(folder / "tissue.zarr" / "labels" / "s0")
    view = ["view", array, "page", "--truth", array]
    done = run(*view, "--at", "3,9,40", cwd=tmp_path)
    page = tmp_path / "page" / "index.html"
    assert done.stdout.strip() == "page/index.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 9  # truth, labels and differences of three slices
    assert all(row in text for row in ("z = 3", "y = 9", "x = 40"))
    assert "already there" in run(*view, cwd=tmp_path, code=1).stderr
    assert page.read_text(encoding="utf-8") == text
    refused = run(*view, "--at", "3,9,48", "--overwrite", cwd=tmp_path, code=1)
    assert refused.stderr.startswith("Error: at: got (3, 9, 48)")
    assert page.read_text(encoding="utf-8") == text
    run(*view, "--overwrite", cwd=tmp_path)
    assert "z = 20" in page.read_text(encoding="utf-8")


def test_errors_are_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = run("flows", "missing.zarr", "out.zarr", cwd=tmp_path, code=1)
    assert done.stderr.startswith("Error: labels: got ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run("flows", "missing.zarr", "out.zarr", "--blocks", "a,b", cwd=tmp_path, code=2)
    assert "whole number" in done.stderr


def test_resume_does_not_replace_the_result_of_other_settings(folder: Path) -> None:
    array, common = "tissue.zarr/labels/s0", ["--blocks", "32", "--cluster", "sync"]
    run("flows", array, "kept.zarr", "--n-iter", "5", *common, cwd=folder)
    before = zarr.open_array(folder / "kept.zarr", mode="r")[...]
    refused = run(
        "flows", array, "kept.zarr", "--n-iter", "6", "--resume", *common, cwd=folder, code=1
    )
    assert "made of other inputs or with other settings" in refused.stderr
    np.testing.assert_array_equal(zarr.open_array(folder / "kept.zarr", mode="r")[...], before)
    again = run("flows", array, "kept.zarr", "--n-iter", "5", "--resume", *common, cwd=folder)
    assert "was there already" in again.stdout
