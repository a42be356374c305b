"""Pictures and the report page."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from topo_dask import view
from topo_dask.errors import BackendUnavailable, InvalidArgument
from topo_dask.testing import ellipsoids, flow_fields, label_volumes

LABELS = ellipsoids()
FLOW = np.where(LABELS > 0, np.float32(0.6), np.float32(0)) * np.ones((3, 1, 1, 1), np.float32)


def decoded(png: bytes) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


class Page(HTMLParser):
    """Tags with their attributes, and whether all of them were closed."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---------------------------------------------------------------- colours


@given(label_volumes())
def test_label_colours_depend_on_the_id_alone(labels: npt.NDArray[Any]) -> None:
    colours = view.label_colours(labels)
    assert colours.shape == (*labels.shape, 3)
    assert colours.dtype == np.uint8
    assert not colours[labels == 0].any()
    assert (colours[labels != 0].max(axis=-1) > 80).all()
    flat = view.label_colours(labels.ravel().astype(np.uint64))
    assert np.array_equal(flat, colours.reshape(-1, 3))


def test_consecutive_ids_have_colours_far_apart() -> None:
    colours = view.label_colours(np.arange(1, 5001)).astype(float)
    assert np.linalg.norm(colours[1:] - colours[:-1], axis=1).min() > 40


def test_flow_colours_show_the_direction() -> None:
    flow = np.zeros((3, 1, 6))
    flow[2, 0, 1] = 1  # right
    flow[2, 0, 2] = -1  # left
    flow[0, 0, 3] = 1  # across the slice
    flow[2, 0, 4] = 0.5  # right, half as long
    flow[1, 0, 5] = 1  # down
    none, right, left, across, weak, down = view.flow_colours(flow)[0].astype(int)
    assert none.tolist() == [0, 0, 0]
    assert across.min() > 230
    assert np.abs(right - left).max() > 100
    assert np.abs(weak - right / 2).max() <= 1
    turned = np.moveaxis(flow, 0, 0)[[1, 0, 2]]  # the same vectors, seen along y
    assert np.array_equal(
        view.flow_colours(turned, axis=1)[0], [none, right, left, across, weak, down]
    )


def test_the_wheel_matches_the_colours() -> None:
    wheel = view.flow_wheel(101)
    assert not wheel[0, 0].any()
    right = view.flow_colours(np.array([0.0, 0.0, 1.0]).reshape(3, 1))[0]
    assert np.abs(wheel[50, 100].astype(int) - right).max() < 25


def test_matching_is_one_to_one_and_takes_the_largest_first() -> None:
    truth = np.array([1, 1, 1, 1, 2, 2, 2, 3, 0])
    labels = np.array([5, 5, 6, 6, 6, 6, 6, 5, 9])
    assert view.match(truth, labels) == {1: 5, 2: 6}
    assert view.match(np.zeros(3, int), np.ones(3, int)) == {}


@given(label_volumes(max_side=6))
def test_equal_partitions_agree_everywhere(labels: npt.NDArray[Any]) -> None:
    ids, dense = np.unique(labels, return_inverse=True)
    other = np.where(ids == 0, 0, 1 + np.arange(len(ids)))[dense].reshape(labels.shape)
    picture = view.disagreement_colours(labels, other)
    assert (picture[labels != 0] == view.DISAGREEMENT["agree"]).all()
    assert not picture[labels == 0].any()


def test_disagreement_has_a_colour_for_every_kind() -> None:
    truth = np.array([1, 1, 1, 2, 2, 0, 0, 3])
    labels = np.array([7, 7, 7, 7, 0, 8, 0, 9])
    names = {colour: name for name, colour in view.DISAGREEMENT.items()}
    kinds = [names.get(tuple(c)) for c in view.disagreement_colours(truth, labels).tolist()]
    agree, other = "agree", "another object"
    assert kinds == [agree, agree, agree, other, "missed", "invented", None, agree]


# ---------------------------------------------------------------- slices


def test_panels_show_truth_flow_labels_and_differences_along_each_axis() -> None:
    panels = view.slice_panels(LABELS, truth=LABELS, flow=FLOW, at=(20, 30, 40))
    titles = ["truth", "flow", "labels", "differences"]
    rows = ["z = 20", "y = 30", "x = 40"]
    assert [(p.row, p.title) for p in panels] == [(r, t) for r in rows for t in titles]
    assert all(p.alt and p.image.dtype == np.uint8 for p in panels)
    differences = panels[3]
    assert "both agree 100.0%" in differences.alt
    assert "1 object on 3% of the slice" in panels[0].alt


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((64, 32, 16), (1, 1, 1), [(512, 256), (512, 128), (512, 256)]),
        ((8, 64, 64), (4, 1, 1), [(512, 512), (256, 512), (256, 512)]),
        ((2, 3, 2000), (1, 1, 1), [(1, 512), (1, 512), (341, 512)]),
    ],
)
def test_pictures_have_a_fit_size_and_the_right_proportions(
    shape: tuple[int, ...], spacing: tuple[float, ...], expected: list[tuple[int, int]]
) -> None:
    panels = view.slice_panels(np.ones(shape, int), spacing=spacing)
    sizes = [p.image.shape[:2] for p in panels]
    for (height, width), (h, w) in zip(sizes, expected, strict=True):
        assert abs(height - h) <= 0.02 * h + 1
        assert abs(width - w) <= 0.02 * w + 1


def test_only_the_slices_shown_are_read() -> None:
    class Counting:
        shape = LABELS.shape
        read = 0

        def __getitem__(self, where: tuple[slice, ...]) -> npt.NDArray[Any]:
            piece = LABELS[where]
            self.read += piece.size
            return piece

    source = Counting()
    view.slice_panels(source)
    assert source.read == 3 * 64 * 64


def test_huge_ids_are_matched_exactly() -> None:
    truth = np.full((4, 4, 4), 2**63 + 1, np.uint64)
    truth[2:] = 2**63 + 2
    labels = np.where(truth == 2**63 + 1, np.uint64(2**64 - 1), np.uint64(2**64 - 2))
    differences = view.slice_panels(labels, truth=truth)[-1]
    assert "both agree 100.0%" in differences.alt


@pytest.mark.parametrize(
    ("arrays", "argument"),
    [
        ({"labels": np.ones((4, 4), int)}, "labels"),
        ({"labels": np.ones((4, 0, 4), int)}, "labels"),
        ({"truth": np.ones((4, 4, 5), int)}, "truth"),
        ({"flow": np.ones((4, 4, 4))}, "flow"),
        ({"at": (4, 0, 0)}, "at"),
        ({"at": (0, 0)}, "at"),
        ({"spacing": (1, 0, 1)}, "spacing"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], argument: str) -> None:
    settings: dict[str, Any] = {"labels": np.ones((4, 4, 4), int), **arrays}
    with pytest.raises(InvalidArgument) as caught:
        view.slice_panels(settings.pop("labels"), **settings)
    assert caught.value.argument == argument


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_png_holds_the_pixels(plane: npt.NDArray[np.uint8]) -> None:
    image = np.stack([plane, plane[::-1], 255 - plane], axis=-1)
    assert np.array_equal(decoded(view._png(image)), image)


@given(flow_fields((2, 3, 4)), label_volumes(max_side=5))
def test_anything_can_be_shown(flow: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    view.slice_panels(np.ones((2, 3, 4), np.uint8), flow=flow, side=16)
    panels = view.slice_panels(labels, truth=labels[::-1], side=16)
    assert len(panels) == 9


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("with_truth", [False, True])
@pytest.mark.parametrize("with_flow", [False, True])
def test_slices_png_is_a_picture(tmp_path: Path, with_truth: bool, with_flow: bool) -> None:
    truth, flow = (LABELS if with_truth else None), (FLOW if with_flow else None)
    path = view.slices_png(tmp_path / "a" / "s.png", labels=LABELS, truth=truth, flow=flow)
    image = decoded(path.read_bytes())
    assert path == tmp_path / "a" / "s.png"
    assert image.shape[1] > 300 * (1 + with_flow + 2 * with_truth)
    assert len({tuple(colour) for colour in image[::9, ::9].reshape(-1, image.shape[2])}) > 10


def test_slices_png_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match=r"topo_dask\[view\]"):
        view.slices_png(tmp_path / "slices.png", labels=LABELS)
    assert not list(tmp_path.iterdir())
    # The page needs no matplotlib.
    view.write_report(tmp_path, title="t", panels=view.slice_panels(LABELS), facts={})


COMPARISON = {
    "voxels": 262_144,
    "truth_instances": 4,
    "label_instances": 5,
    "same_partition": False,
    "vi": 0.25,
    "vi_split": 0.2,
    "vi_merge": 0.05,
    "adapted_rand_error": 0.0467,
    "seconds": 1.5,
    "matching": [{"iou": 0.5, "matched": 4, "precision": 0.8, "recall": 1.0, "f1": 0.889}],
    "splits": [
        {
            "id": 2**63 + 11,
            "voxels": 30_000,
            "pieces": 6,
            "largest": [{"id": n, "voxels": 1000 * n} for n in range(1, 6)],
        }
    ],
    "merges": [],
}


def report(folder: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "title": "Run 7",
        "panels": view.slice_panels(LABELS, truth=LABELS, flow=FLOW),
        "facts": {"shape": (64, 64, 64), "steps per second": 123456.7, "resumed": False},
        "comparison": COMPARISON,
    }
    page = view.write_report(folder, **{**settings, **changes})
    assert page == folder / "index.html"
    return page.read_text(encoding="utf-8")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    text = report(tmp_path / "new" / "folder")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert "link" not in tags
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["index.html"]
    assert len(text) < 1_000_000


def test_every_picture_of_the_page_has_words_and_pixels(tmp_path: Path) -> None:
    images = [attrs for tag, attrs in Page(report(tmp_path)).tags if tag == "img"]
    assert len(images) == 12 + 1  # and the legend
    for attrs in images:
        assert len(attrs["alt"] or "") > 10
        kind, data = (attrs["src"] or "").split(",", 1)
        assert kind == "data:image/png;base64"
        assert decoded(base64.b64decode(data)).ndim == 3


def test_the_page_tells_the_numbers(tmp_path: Path) -> None:
    text = report(tmp_path)
    for words in (
        "64 × 64 × 64",
        "123,457",
        "262,144",
        "<b>5</b>",
        "truth: 4",
        "<b>0.889</b>",
        "variation of information",
        "adapted Rand error",
        str(2**63 + 11),
        "1 (1,000), 2 (2,000), 3 (3,000), 4 (4,000) and 2 more",
        "seconds",
    ):
        assert words in text
    assert "Largest merges" not in text
    assert "Against the truth" not in report(tmp_path, comparison=None)


def test_the_page_of_a_real_comparison(tmp_path: Path) -> None:
    from topo_dask.graph.measure import block_contingency, scores

    labels = np.where(np.indices(LABELS.shape)[0] < 20, LABELS, 9 * (LABELS > 0))
    found = scores(block_contingency(LABELS, labels))
    text = report(tmp_path, comparison=found.to_dict())
    for words in ("Largest splits", "Largest merges", "F1 at IoU 0.5", "Rand precision"):
        assert words in text


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">&'
    panel = view.Panel(evil, evil, np.zeros((2, 2, 3), np.uint8), evil)
    text = report(tmp_path, title=evil, facts={evil: evil}, panels=[panel], comparison={evil: evil})
    assert "<img src=x" not in text
    assert Page(text).tags.count(("img", {"src": "x", "onerror": "alert(1)"})) == 0


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    assert "<h1>nothing</h1>" in report(
        tmp_path, title="nothing", panels=[], facts={}, comparison={}
    )
