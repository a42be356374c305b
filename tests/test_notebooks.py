"""The notebooks: they run in a fresh kernel, give what is stored in them, and the right numbers."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("01_full_volume", "02_tiled_stitching")

# The kernel's own warnings are not ours.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel")
"""
PROBE = """
import json
print(json.dumps({name: globals()[name] for name in WANTED if name in globals()}))
"""


@functools.cache
def executed(name: str) -> tuple[Any, dict[str, Any]]:
    """The notebook after a run in which every warning is an error, and some of its variables."""
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    wanted = ["means", "context_error", "tissue_means", "n_found", "jumps"]
    probe = PROBE.replace("WANTED", repr(wanted))
    make = nbformat.v4.new_code_cell
    book.cells = [make(STRICT), *book.cells, make(probe)]
    client = NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    variables = json.loads(text_of(book.cells[-1]))
    book.cells = book.cells[1:-1]
    return book, variables


def text_of(cell: Any) -> str:
    """All that a cell printed, however it was flushed, and its result as text."""
    parts = [
        o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in cell.outputs
    ]
    return "".join(part for part in parts if not part.startswith("<"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_gives_what_is_stored(name: str) -> None:
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    book, _ = executed(name)
    for before, after in zip(stored.cells, book.cells, strict=True):
        if after.cell_type == "code":
            assert text_of(after) == text_of(before)
            kinds = [[o.output_type for o in cell.outputs] for cell in (before, after)]
            assert kinds[0].count("display_data") == kinds[1].count("display_data")
            assert "stderr" not in [o.get("name") for o in after.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_with_its_pictures(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 600_000
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in [output.output_type for output in outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert "/tmp" not in json.dumps(outputs)


def test_the_full_volume_finds_the_four_objects() -> None:
    book, variables = executed("01_full_volume")
    assert variables["n_found"] == 4
    printed = "\n".join(text_of(cell) for cell in book.cells if cell.cell_type == "code")
    assert "the two ways agree in every voxel: True" in printed
    assert "same up to ids" in printed


def test_tiles_are_off_by_the_angles_expected() -> None:
    _, variables = executed("02_tiled_stitching")
    means = variables["means"]
    assert means["tile-local"] == pytest.approx(17.1, abs=0.2)
    assert means["origin-aware"] == pytest.approx(1.11, abs=0.03)
    assert means["origin-aware, context 16"] < 1e-3
    tissue = variables["tissue_means"]
    assert tissue["tile-local"] > 10
    assert tissue["origin-aware, context 16"] < 0.05


def test_these_weights_leave_no_seam_where_naive_ones_do() -> None:
    _, variables = executed("02_tiled_stitching")
    assert variables["jumps"]["naive weights"] > 2
    assert variables["jumps"]["these weights"] == pytest.approx(1, abs=0.05)


def test_the_error_falls_with_the_context() -> None:
    _, variables = executed("02_tiled_stitching")
    errors = variables["context_error"]  # cores of 32 with a context of 0, 4, 8, 12, 16, 20
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[4] < 0.008
    assert errors[5] < 1e-4
