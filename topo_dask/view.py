"""Pictures and reports from plain data: slices of labels and flows, a page that shows them.

Arrays may be NumPy arrays or anything that has a shape and can be sliced (zarr arrays): only the
slices shown are read. Only `slices_png` needs matplotlib.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import BackendUnavailable, InvalidArgument

__all__ = [
    "Panel",
    "disagreement_colours",
    "flow_colours",
    "flow_wheel",
    "label_colours",
    "slice_panels",
    "slices_png",
    "write_report",
]

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

AXES = "zyx"
DISAGREEMENT = {
    "agree": (92, 96, 102),
    "another object": (231, 79, 170),
    "missed": (64, 156, 255),
    "invented": (255, 159, 28),
}
_MEANING = {
    "agree": "both agree",
    "another object": "cut or joined differently",
    "missed": "in the truth only",
    "invented": "in the labels only",
}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# ---------------------------------------------------------------- colours


def _oklch(lightness: Floats, chroma: Floats, hue: Floats) -> Image:
    """Bytes of sRGB for OKLCH colours (hue in turns): equal steps look equally large to the eye."""
    a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    cones = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    matrix = (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
    linear = np.stack([sum(m * c for m, c in zip(row, cones, strict=True)) for row in matrix], -1)
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * srgb), dtype=np.uint8)


def label_colours(labels: npt.NDArray[Any]) -> Image:
    """Colour of each label: fixed by the id, black for 0; consecutive ids get far-apart hues.

    Examples
    --------
    >>> colours = label_colours(np.array([[0, 1], [2, 1]]))
    >>> colours.shape, colours[0, 0].tolist(), bool((colours[0, 1] == colours[1, 1]).all())
    ((2, 2, 3), [0, 0, 0], True)
    """
    ids, inverse = np.unique(labels, return_inverse=True)
    with np.errstate(over="ignore"):
        turned = ids.astype(np.uint64) * _GOLDEN
        mixed = (turned ^ (turned >> np.uint64(29))) * _GOLDEN
    hue = (turned >> np.uint64(11)).astype(np.float64) * 2.0**-53
    tone = (mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24
    colours = _oklch(0.56 + 0.30 * tone, 0.10 + 0.07 * np.abs(2 * tone - 1), hue)
    colours[ids == 0] = 0
    return np.asarray(colours[inverse.reshape(labels.shape)], dtype=np.uint8)


def flow_colours(flow: npt.NDArray[Any], *, axis: int = 0) -> Image:
    """Colour of each flow vector as seen along an axis: hue is its direction in the picture.

    The paler, the more it points into or out of the picture; black where there is no flow.

    Parameters
    ----------
    flow
        Vectors ``(dz, dy, dx)`` along the first axis.
    axis
        The axis that one looks along: 0 for a slice in y and x.

    Examples
    --------
    >>> flow = np.zeros((3, 1, 2)); flow[2, 0, 1] = 1.0
    >>> flow_colours(flow).tolist()[0][0]
    [0, 0, 0]
    """
    across = [d for d in range(3) if d != axis]
    vectors = flow.astype(np.float64)
    down, right = vectors[across[0]], vectors[across[1]]
    length = np.sqrt((vectors * vectors).sum(axis=0))
    flat = np.hypot(down, right) / np.maximum(length, 1e-12)
    colours = _oklch(0.96 - 0.24 * flat, 0.145 * flat, np.arctan2(down, right) / (2 * np.pi))
    strength = np.clip(length, 0, 1)[..., None]
    return np.asarray(np.rint(colours * strength), dtype=np.uint8)


def flow_wheel(side: int = 128) -> Image:
    """The legend of `flow_colours`: a disc coloured by the direction from its middle.

    Examples
    --------
    >>> flow_wheel(64).shape
    (64, 64, 3)
    """
    steps = (np.arange(side) + 0.5) / side * 2 - 1
    down, right = np.meshgrid(steps, steps, indexing="ij")
    far = np.hypot(down, right)
    outwards = np.sqrt(np.clip(1 - far * far, 0, 1))
    wheel = flow_colours(np.stack([outwards, down, right]))
    wheel[far > 1] = 0
    return wheel


def disagreement_colours(
    truth: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    partners: Mapping[int, int] | None = None,
) -> Image:
    """Where labels and truth differ, whatever the ids: colours of `DISAGREEMENT`.

    Parameters
    ----------
    truth, labels
        Arrays of the same shape.
    partners
        The label id that stands for each truth id; None: those of `match`.

    Examples
    --------
    >>> picture = disagreement_colours(np.array([[1, 1, 0]]), np.array([[5, 0, 0]]))
    >>> [tuple(colour) for colour in picture[0].tolist()]
    [(92, 96, 102), (64, 156, 255), (0, 0, 0)]
    """
    pairs = match(truth, labels) if partners is None else partners
    ids, inverse = np.unique(truth, return_inverse=True)
    # Ids without a partner are compared with a label that is certainly not there.
    wanted = np.array([pairs.get(int(i), -1) for i in ids], dtype=object)
    found = np.unique(labels)
    place = {int(label): n for n, label in enumerate(found)}
    expected = np.array([place.get(int(w), -1) for w in wanted])[inverse].reshape(truth.shape)
    actual = np.searchsorted(found, labels)
    picture = np.zeros((*truth.shape, 3), dtype=np.uint8)
    both = (truth != 0) & (labels != 0)
    picture[both & (expected == actual)] = DISAGREEMENT["agree"]
    picture[both & (expected != actual)] = DISAGREEMENT["another object"]
    picture[(truth != 0) & (labels == 0)] = DISAGREEMENT["missed"]
    picture[(truth == 0) & (labels != 0)] = DISAGREEMENT["invented"]
    return picture


def match(truth: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[int, int]:
    """Pairs of truth and label ids, one to one, the largest common parts first.

    Examples
    --------
    >>> match(np.array([1, 1, 1, 2]), np.array([7, 7, 8, 8]))
    {1: 7, 2: 8}
    """
    both = (truth != 0) & (labels != 0)
    truth_ids, t = np.unique(truth[both], return_inverse=True)
    label_ids, p = np.unique(labels[both], return_inverse=True)
    pairs, counts = np.unique(t * max(len(label_ids), 1) + p, return_counts=True)
    partners: dict[int, int] = {}
    taken: set[int] = set()
    for pair in pairs[np.argsort(-counts, kind="stable")]:
        row, column = divmod(int(pair), len(label_ids))
        true, label = int(truth_ids[row]), int(label_ids[column])
        if true not in partners and label not in taken:
            partners[true] = label
            taken.add(label)
    return dict(sorted(partners.items()))


# ---------------------------------------------------------------- slices


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a report.

    Parameters
    ----------
    row
        Pictures of the same row stand side by side under this heading.
    title
        Heading of the picture.
    image
        ``uint8 [height, width, 3]``.
    alt
        What the picture shows, in words, for those who cannot see it.

    Examples
    --------
    >>> panel = Panel("z = 3", "labels", np.zeros((4, 4, 3), np.uint8), "nothing")
    >>> panel.title
    'labels'
    """

    row: str
    title: str
    image: Image
    alt: str


def slice_panels(
    labels: Any,
    *,
    truth: Any = None,
    flow: Any = None,
    at: Sequence[int] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    side: int = 512,
) -> list[Panel]:
    """Pictures of three slices: truth, flow, labels, and where labels and truth differ.

    Parameters
    ----------
    labels
        Labels ``[Z, Y, X]``.
    truth
        Labels to compare with, same shape.
    flow
        Flow ``[3, Z, Y, X]``.
    at
        Indices z, y, x of the slices; None: the middle.
    spacing
        Size of a voxel; slices are stretched accordingly.
    side
        About how many pixels the longer side of a picture gets.

    Examples
    --------
    >>> panels = slice_panels(np.ones((4, 5, 6), int), truth=np.ones((4, 5, 6), int))
    >>> [(panel.row, panel.title) for panel in panels[:3]]
    [('z = 2', 'truth'), ('z = 2', 'labels'), ('z = 2', 'differences')]
    """
    shape = _checked_shape(labels, truth, flow)
    indices = [n // 2 for n in shape] if at is None else [int(i) for i in at]
    if len(indices) != 3 or not all(0 <= i < n for i, n in zip(indices, shape, strict=True)):
        raise InvalidArgument("at", tuple(indices), f"an index z, y, x inside {shape}")
    if len(spacing) != 3 or min(spacing) <= 0:
        raise InvalidArgument("spacing", tuple(spacing), "three numbers z, y, x, each > 0")
    found = [_slice(labels, axis, i, side) for axis, i in enumerate(indices)]
    true = None
    if truth is not None:
        true = [_slice(truth, axis, i, side) for axis, i in enumerate(indices)]
    partners: dict[int, int] = {}
    if true is not None:  # one matching for all three slices
        partners = match(*(np.concatenate([s.ravel() for s in x]) for x in (true, found)))
    panels = []
    for axis, index in enumerate(indices):
        row = f"{AXES[axis]} = {index}"
        grow = _Enlarge(found[axis].shape, [spacing[d] for d in range(3) if d != axis], side)
        if true is not None:
            image = grow.outlined(label_colours(true[axis]), true[axis])
            panels.append(Panel(row, "truth", image, f"Truth, {row}: {_words(true[axis])}."))
        if flow is not None:
            image = grow(flow_colours(_slice(flow, axis, index, side), axis=axis))
            alt = f"Flow, {row}: the hue of each voxel is the direction of its vector."
            panels.append(Panel(row, "flow", image, alt))
        image = grow.outlined(label_colours(found[axis]), found[axis])
        panels.append(Panel(row, "labels", image, f"Labels, {row}: {_words(found[axis])}."))
        if true is not None:
            image = disagreement_colours(true[axis], found[axis], partners)
            alt = _difference_words(row, image)
            panels.append(Panel(row, "differences", grow.outlined(image, true[axis]), alt))
    return panels


def _checked_shape(labels: Any, truth: Any, flow: Any) -> tuple[int, ...]:
    shape = tuple(int(n) for n in labels.shape)
    if len(shape) != 3 or min(shape) < 1:
        raise InvalidArgument("labels", f"shape {shape}", "three axes z, y, x, none empty")
    if truth is not None and tuple(truth.shape) != shape:
        raise InvalidArgument("truth", f"shape {tuple(truth.shape)}", f"the labels' shape {shape}")
    if flow is not None and tuple(flow.shape) != (3, *shape):
        raise InvalidArgument("flow", f"shape {tuple(flow.shape)}", f"{(3, *shape)}")
    return shape


def _slice(array: Any, axis: int, index: int, side: int) -> npt.NDArray[Any]:
    """A slice of the last three axes, thinned to about ``side`` voxels before any colouring."""
    leading = len(array.shape) - 3
    where: list[Any] = [slice(None)] * len(array.shape)
    where[leading + axis] = slice(index, index + 1)
    piece = np.squeeze(np.asarray(array[tuple(where)]), axis=leading + axis)
    step = max(1, math.ceil(max(piece.shape[-2:]) / (1.5 * side)))
    return piece[..., ::step, ::step]


def _words(labels: npt.NDArray[Any]) -> str:
    ids = np.unique(labels)
    count = len(ids) - int((ids == 0).any())
    share = np.count_nonzero(labels) / labels.size
    return f"{count} object{'' if count == 1 else 's'} on {share:.0%} of the slice"


def _difference_words(row: str, image: Image) -> str:
    foreground = image.any(axis=-1).sum()
    if foreground == 0:
        return f"Differences, {row}: the slice is empty."
    shares = [
        f"{_MEANING[name]} {(image == colour).all(axis=-1).sum() / foreground:.1%}"
        for name, colour in DISAGREEMENT.items()
    ]
    return f"Differences, {row}, share of the foreground: {', '.join(shares)}."


class _Enlarge:
    """Nearest-voxel resampling of slices of one shape to a fit size for the screen."""

    def __init__(self, shape: tuple[int, ...], spacing: Sequence[float], side: int) -> None:
        lengths = [n * s / min(spacing) for n, s in zip(shape, spacing, strict=True)]
        scale = side / max(lengths)
        # Whole multiples keep voxels square.
        scale = max(1, round(scale)) if scale >= 1 else scale
        sides = [max(1, round(length * scale)) for length in lengths]
        self.rows, self.columns = (
            np.minimum((np.arange(m) + 0.5) * n / m, n - 1).astype(np.int64)
            for m, n in zip(sides, shape, strict=True)
        )

    def __call__(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return image[self.rows[:, None], self.columns]

    def outlined(self, image: Image, labels: npt.NDArray[Any]) -> Image:
        """Enlarged, with a thin dark line where two objects touch."""
        large, ids = self(image), self(labels)
        edge = np.zeros(ids.shape, dtype=bool)
        edge[1:] |= ids[1:] != ids[:-1]
        edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        if min(len(self.rows) / labels.shape[0], len(self.columns) / labels.shape[1]) >= 2:
            large[edge & (ids != 0)] //= 3
        return large


# ---------------------------------------------------------------- PNG


def _png(image: Image) -> bytes:
    """A PNG file of an RGB picture, without any library."""
    height, width = image.shape[:2]
    rows = np.ascontiguousarray(image[..., :3]).reshape(height, width * 3)
    lines = np.empty((height, 1 + width * 3), dtype=np.uint8)
    lines[:, 0] = 2  # filter "up": enlarged slices repeat their rows
    lines[0, 1:] = rows[0]
    lines[1:, 1:] = rows[1:] - rows[:-1]

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(lines.tobytes(), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def slices_png(
    path: str | Path,
    *,
    labels: Any,
    truth: Any = None,
    flow: Any = None,
    at: Sequence[int] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Path:
    """One picture file with slices in z, y and x: truth, flow, labels and their differences.

    Parameters
    ----------
    path
        The PNG file to write.
    labels, truth, flow, at, spacing
        As for `slice_panels`.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> slices_png(f"{folder}/slices.png", labels=np.ones((8, 8, 8), int)).name
    'slices.png'
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise BackendUnavailable(
            "matplotlib",
            "no package of that name",
            "matplotlib installed",
            "Install it with: pip install 'topo_dask[view]'.",
        ) from error
    panels = slice_panels(labels, truth=truth, flow=flow, at=at, spacing=spacing)
    rows = _by_row(panels)
    columns = len(rows[0][1])
    # Inches: columns of 3, margins for headings, a strip at the bottom for legends.
    heights = [3.0 * group[0].image.shape[0] / group[0].image.shape[1] for _, group in rows]
    strip = 0.9 if truth is not None or flow is not None else 0.1
    width = 3.1 * columns + 0.65
    height = sum(heights) + 0.35 * len(rows) + 0.35 + strip
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - 0.35
    for number, (row, group) in enumerate(rows):
        down, right = (name for name in AXES if name != row[0])
        top -= heights[number]
        for column, panel in enumerate(group):
            left = (0.55 + 3.1 * column) / width
            axis = figure.add_axes((left, top / height, 3 / width, heights[number] / height))
            axis.imshow(panel.image, interpolation="nearest", aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{right} →", fontsize=8, labelpad=2)
            if column == 0:
                axis.set_ylabel(f"{row}\n← {down}", fontsize=10)
            if number == 0:
                axis.set_title(panel.title, fontsize=12)
        top -= 0.35
    if flow is not None:
        wheel = figure.add_axes((0.55 / width, 0.1 / height, 0.65 / width, 0.65 / height))
        wheel.imshow(_on_white(flow_wheel(128)), aspect="auto")
        wheel.set_axis_off()
        words = "flow: hue = direction in the slice,\npale = across the slice"
        figure.text(1.3 / width, 0.42 / height, words, fontsize=8, va="center")
    if truth is not None:
        handles = [
            Patch(color=(red / 255, green / 255, blue / 255), label=_MEANING[name])
            for name, (red, green, blue) in DISAGREEMENT.items()
        ]
        at_right = (1 - 0.1 / width, 0.42 / height)
        figure.legend(
            handles=handles,
            loc="center right",
            bbox_to_anchor=at_right,
            ncols=2,
            fontsize=8,
            frameon=False,
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _on_white(wheel: Image) -> Image:
    """The disc with white instead of black around it."""
    picture = wheel.copy()
    picture[~wheel.any(axis=-1)] = 255
    return picture


def _by_row(panels: Iterable[Panel]) -> list[tuple[str, list[Panel]]]:
    rows: dict[str, list[Panel]] = {}
    for panel in panels:
        rows.setdefault(panel.row, []).append(panel)
    return list(rows.items())


# ---------------------------------------------------------------- the page


def write_report(
    folder: str | Path,
    *,
    title: str,
    panels: Iterable[Panel],
    facts: Mapping[str, object],
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """A page that stands alone: pictures, numbers, no scripts, nothing fetched from anywhere.

    Parameters
    ----------
    folder
        Where to write ``index.html``; made if it is not there.
    title
        Heading of the page.
    panels
        Pictures, e.g. those of `slice_panels`.
    facts
        What was done, name by name: shape, settings, times.
    comparison
        Numbers of a comparison with the truth by name, as ``compare(...).to_dict()`` gives them.

    Returns
    -------
    Path of the page.

    Examples
    --------
    >>> import tempfile
    >>> labels = np.ones((8, 8, 8), int)
    >>> page = write_report(
    ...     tempfile.mkdtemp(), title="A run", panels=slice_panels(labels), facts={"voxels": 512}
    ... )
    >>> page.name
    'index.html'
    """
    pictures = list(panels)
    body = [f"<header><h1>{html.escape(title)}</h1></header>"]
    if comparison is not None:
        body.append(_tiles(comparison))
    titles = {panel.title for panel in pictures}
    if pictures:
        legends = _legends(flow="flow" in titles, differences="differences" in titles)
        body.append(f"<section><h2>Slices</h2>{legends}{_figures(pictures)}</section>")
    if comparison is not None:
        body.append(_comparison_section(comparison))
    if facts:
        body.append(f"<section><h2>The run</h2>{_table(facts.items())}</section>")
    text = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))
    page = Path(folder) / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def _figures(panels: Iterable[Panel]) -> str:
    parts = []
    for row, group in _by_row(panels):
        figures = "".join(_figure(panel) for panel in group)
        axes = ""
        if row[:1] in AXES:
            down, right = (name for name in AXES if name != row[0])
            axes = f' <span class="quiet">{down} down, {right} to the right</span>'
        parts.append(f"<h3>{html.escape(row)}{axes}</h3><div class=grid>{figures}</div>")
    return "\n".join(parts)


def _figure(panel: Panel) -> str:
    height, width = panel.image.shape[:2]
    data = base64.b64encode(_png(panel.image)).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{html.escape(panel.alt, quote=True)}">'
        f"<figcaption>{html.escape(panel.title)}</figcaption></figure>"
    )


def _legends(*, flow: bool, differences: bool) -> str:
    parts = []
    if flow:
        data = base64.b64encode(_png(flow_wheel(96))).decode("ascii")
        parts.append(
            f'<span class="key"><img class="wheel" src="data:image/png;base64,{data}" width="44" '
            'height="44" alt="Colour wheel: right is pink, down is yellow, left is green, '
            'up is blue."> flow: the colour is the direction in the slice, '
            "pale is across the slice</span>"
        )
    if differences:
        swatches = "".join(
            f'<span class="key"><i style="background:rgb{colour}"></i>{_MEANING[name]}</span>'
            for name, colour in DISAGREEMENT.items()
        )
        parts.append(swatches)
    return "".join(f'<p class="legend">{part}</p>' for part in parts)


def _number(value: object) -> str:
    """A number as people read it; other things as text."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number) or number == 0 or 1e-4 <= abs(number) < 1e5:
            return f"{number:.4g}"
        return f"{number:,.0f}" if 1e5 <= abs(number) < 1e15 else f"{number:.3e}"
    if isinstance(value, tuple | list):
        return " × ".join(_number(v) for v in value)
    return str(value)


def _table(rows: Iterable[tuple[str, object]]) -> str:
    lines = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(_number(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table><tbody>{lines}</tbody></table>"


def _tiles(comparison: Mapping[str, Any]) -> str:
    """The few numbers that say how it went."""
    tiles: list[tuple[str, str, str]] = []
    if {"truth_instances", "label_instances"} <= comparison.keys():
        value = _number(comparison["label_instances"])
        tiles.append(("objects found", value, f"truth: {_number(comparison['truth_instances'])}"))
    tiles += [
        (f"F1 at IoU {_number(one['iou'])}", f"{one['f1']:.3f}", "1 is perfect")
        for one in comparison.get("matching", ())
    ]
    if "vi" in comparison:
        tiles.append(("variation of information", f"{comparison['vi']:.3f}", "bits, 0 is perfect"))
    if "adapted_rand_error" in comparison:
        value = f"{comparison['adapted_rand_error']:.3f}"
        tiles.append(("adapted Rand error", value, "0 is perfect"))
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f'<span class="quiet">{html.escape(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<section class="tiles" aria-label="Result in short">{cells}</section>' if cells else ""


_NAMES = {
    "voxels": "voxels",
    "truth_foreground": "foreground voxels, truth",
    "label_foreground": "foreground voxels, labels",
    "truth_instances": "objects, truth",
    "label_instances": "objects, labels",
    "same_partition": "same objects up to ids",
    "identical": "identical, ids included",
    "ignore_background": "scored only where the truth is foreground",
    "scored_voxels": "scored voxels",
    "vi": "variation of information (bits)",
    "vi_split": "of it, splits",
    "vi_merge": "of it, merges",
    "adapted_rand_error": "adapted Rand error",
    "rand_precision": "Rand precision",
    "rand_recall": "Rand recall",
}


def _comparison_section(comparison: Mapping[str, Any]) -> str:
    known = [(_NAMES[name], comparison[name]) for name in _NAMES if name in comparison]
    listed = {"matching", "splits", "merges"}
    others = [(n, v) for n, v in comparison.items() if n not in _NAMES and n not in listed]
    parts = [_table([*known, *others])]
    matching = comparison.get("matching", ())
    if matching:
        rows = [[m["iou"], m["f1"], m["precision"], m["recall"], m["matched"]] for m in matching]
        heads = ["IoU at least", "F1", "precision", "recall", "matched"]
        parts.append("<h3>Objects found</h3>" + _columns(heads, rows))
    for key, heading, whole, pieces in (
        ("splits", "Largest splits", "truth id", "labels that cover it (voxels)"),
        ("merges", "Largest merges", "label id", "truth objects it covers (voxels)"),
    ):
        rows = [[_plain(d["id"]), d["voxels"], _pieces(d)] for d in comparison.get(key, ())[:10]]
        if rows:
            parts.append(f"<h3>{heading}</h3>" + _columns([whole, "voxels", pieces], rows))
    return f"<section><h2>Against the truth</h2>{''.join(parts)}</section>"


def _plain(identifier: int) -> str:
    """An id: digits without separators, so that it can be searched for."""
    return str(int(identifier))


def _pieces(divided: Mapping[str, Any]) -> str:
    shown = divided["largest"][:4]
    text = ", ".join(f"{_plain(p['id'])} ({_number(p['voxels'])})" for p in shown)
    more = int(divided["pieces"]) - len(shown)
    return f"{text} and {more:,} more" if more > 0 else text


def _columns(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_number(v))}</td>" for v in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="columns"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --text: #1c1f23;
  --quiet: #656b73; --line: #e2e3e5; }
@media (prefers-color-scheme: dark) { :root { --back: #131517; --card: #1c1f22; --text: #e8e9ea;
  --quiet: #9aa1a9; --line: #30343a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .5rem; }
.quiet { color: var(--quiet); font-weight: 400; font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .7rem .9rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { font-size: .9rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center;
  font-size: .9rem; margin: .4rem 0 0; }
.key { display: inline-flex; align-items: center; gap: .5rem; }
.key i { width: .9rem; height: .9rem; border-radius: .2rem; flex: none; }
.wheel { border-radius: 50%; width: 44px; height: 44px; flex: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 45%), 1fr));
  gap: .8rem; }
figure { margin: 0; max-width: 36rem; }
figure img { display: block; width: 100%; height: auto; background: #000; border-radius: .4rem;
  image-rendering: pixelated; }
figcaption { font-size: .9rem; color: var(--quiet); margin-top: .25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; max-width: 46rem; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--quiet); }
th[scope=row] { width: 45%; }
td { overflow-wrap: anywhere; }
.columns td { overflow-wrap: normal; }
footer { margin-top: 3rem; font-size: .85rem; color: var(--quiet); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by topo_dask.</footer>
</main>
</body>
</html>
"""
