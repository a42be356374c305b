"""Tiles of a mosaic: opening them, and tables that say where they lie (CSV, JSON, OME-XML)."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr

from topo_dask.errors import (
    BackendUnavailable,
    InputNotFound,
    InvalidArgument,
    InvalidType,
    TopoError,
)
from topo_dask.storage import open_array

TIFF_SUFFIXES = (".tif", ".tiff", ".tf2", ".tf8", ".btf")
PATH_COLUMNS = ("path", "tile", "file", "filename")
MICROMETRES = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "μm": 1.0,  # the Greek letter; above is the micro sign
    "um": 1.0,
    "nm": 1e-3,
    "Å": 1e-4,
    "pm": 1e-6,
}
COPY_AGAIN = "Copy or write it again, or leave it out."
TABLES = "a .csv or .tsv, a .json, an OME-TIFF, or an OME-XML (.ome, .xml)"


# -------------------------------------------------------------------------------- one tile


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise BackendUnavailable(
            "tiles", "a TIFF, without tifffile", "zarr tiles", 'pip install "topo_dask[tiff]".'
        ) from error
    return tifffile


@dataclass(frozen=True)
class NpyTile:
    """A tile in a .npy file; slices are read when they are asked for."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: tuple[slice, ...]) -> npt.NDArray[Any]:
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return np.array(mapped[key])


@dataclass(frozen=True)
class TiffTile:
    """One series of a TIFF file, its channels first; slices are read when they are asked for.

    Parameters
    ----------
    path
        Of the file.
    series
        Which of its series (images).
    shape, dtype
        As it is indexed here.
    axes
        For each of these axes its number in the file.
    """

    path: str
    series: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: tuple[slice, ...]) -> npt.NDArray[Any]:
        there: list[Any] = [slice(None)] * len(self.axes)
        for axis, part in zip(self.axes, key, strict=True):
            there[axis] = part
        with _tifffile().TiffFile(self.path) as file:
            store = file.series[self.series].aszarr(level=0)
            array = zarr.open_array(store, mode="r")
            return np.asarray(array[tuple(there)]).transpose(self.axes)


def open_tiff(path: Any, series: int = 0) -> TiffTile:
    """Open one series of a TIFF and check that the file holds all of it; no voxel is read.

    Raises
    ------
    InputNotFound
        Missing, damaged or cut off.
    """
    allowed = "the path of a complete TIFF"
    if not Path(path).is_file():
        raise InputNotFound("tiles", f"{str(path)!r}, which is not there", allowed, "Check it.")
    try:
        with _tifffile().TiffFile(path) as file:
            if not 0 <= series < len(file.series):
                raise InputNotFound(
                    "tiles",
                    f"series {series} of {str(path)!r}",
                    f"one of its {len(file.series)} series, counted from 0",
                    "Choose another.",
                )
            found = file.series[series]
            _check_segments(found, str(path), allowed)
            names = str(found.axes)
            # Samples (colours) and channels come first, z, y and x last.
            order = sorted(range(len(names)), key=lambda a: ("SC".find(names[a]) < 0, a))
            shape = tuple(int(found.shape[a]) for a in order)
            return TiffTile(str(Path(path).absolute()), series, shape, found.dtype, tuple(order))
    except (InputNotFound, BackendUnavailable):
        raise
    except Exception as error:  # whatever a damaged file may raise
        came = f"{str(path)!r}, which cannot be read ({type(error).__name__}: {error})"
        raise InputNotFound("tiles", came, allowed, COPY_AGAIN) from error


def _check_segments(series: Any, path: str, allowed: str) -> None:
    sizes: dict[str, int] = {}
    for number, page in enumerate(series.pages):
        if page is None:
            came = f"{path!r}, which lacks plane {number}"
            raise InputNotFound("tiles", came, allowed, COPY_AGAIN)
        # A frame knows little: what it shares with the first page is there.
        name = str(Path(page.parent.filehandle.path))
        size = sizes.setdefault(name, os.path.getsize(name))
        ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends, default=0) > size:
            came = f"{path!r}, cut off in plane {number} ({name} has {size} bytes)"
            raise InputNotFound("tiles", came, allowed, COPY_AGAIN)


def _open_npy(path: Path) -> NpyTile:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise InputNotFound(
            "tiles",
            f"{str(path)!r}, which cannot be read ({error})",
            "a complete .npy file",
            COPY_AGAIN,
        ) from error
    return NpyTile(str(path.absolute()), mapped.shape, mapped.dtype)


def open_tile(source: Any) -> Any:
    """Open one tile: something with shape, dtype and slices. No voxel is read.

    Parameters
    ----------
    source
        Path (zarr, TIFF, .npy), URL, zarr, dask or NumPy array, or what this gave before.

    Raises
    ------
    TopoError
        One of its kinds.

    Examples
    --------
    >>> open_tile(np.zeros((4, 5))).shape
    (4, 5)
    """
    if isinstance(source, (np.ndarray, da.Array, TiffTile, NpyTile)):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fspath(source))
        if path.suffix.lower() in TIFF_SUFFIXES:
            return open_tiff(path)
        if path.suffix.lower() == ".npy":
            return _open_npy(path)
    elif not isinstance(source, zarr.Array):
        raise InvalidType(
            "tiles",
            type(source).__name__,
            "a path, a URL, a zarr, dask or NumPy array",
            "Convert it, e.g. numpy.asarray(tile).",
        )
    return open_array(source, argument="tiles", axes=(2, 3, 4))


# -------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class TileTable:
    """Tiles and where they lie. Made by `read_tile_table`.

    Parameters
    ----------
    tiles
        As `fuse_mosaic` takes them.
    transforms
        One for each tile.
    tile_spacing
        Size of a voxel of each tile; ``None`` where the table does not say.
    options
        What else the table says: ``shape``, ``origin``, ``spacing`` of the output.
    """

    tiles: tuple[Any, ...]
    transforms: tuple[Any, ...]
    tile_spacing: tuple[Any, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tiles)


def read_tile_table(path: Any) -> TileTable:
    r"""Read which tiles a mosaic has and where they lie.

    Parameters
    ----------
    path
        One of:

        - CSV or TSV with a header: ``path`` (relative to the table), then either a position,
          ``z, y, x`` (images: ``y, x``), or a matrix, ``m00, m01, ...`` row by row, of n or
          n + 1 rows; optionally the size of the tile's voxels, ``spacing_z, spacing_y,
          spacing_x``, and ``series``, for TIFF. A TIFF without a position has that of its
          OME-XML.
        - JSON: ``{"tiles": [{"path": ..., "translation": [...]}, ...]}``, with ``matrix`` in
          place of ``translation``, ``spacing`` and ``series`` as above; beside ``tiles``
          optionally ``shape``, ``origin`` and ``spacing`` of the output.
        - OME-TIFF, or a file of OME-XML beside its TIFFs: every image is a tile, at its stage
          position and with its pixel size, in micrometres.

        A stage position is taken as that of a tile's first voxel, with axes that point as those
        of the image do.

    Returns
    -------
    TileTable

    Raises
    ------
    InputNotFound
        No such table.
    InvalidArgument
        Its rows at fault are named, all of them.

    Examples
    --------
    >>> import tempfile
    >>> table = Path(tempfile.mkdtemp()) / "tiles.csv"
    >>> _ = table.write_text("path,y,x\na.zarr,0,0\nb.zarr,0,90.5\n")
    >>> read_tile_table(table).transforms
    ((0.0, 0.0), (0.0, 90.5))
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidType("table", type(path).__name__, f"the path of {TABLES}", "Pass its path.")
    place = Path(path)
    readers: dict[str, Callable[[Path], TileTable]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".ome": _read_ome,
        ".xml": _read_ome,
        **dict.fromkeys(TIFF_SUFFIXES, _read_ome),
    }
    reader = readers.get(place.suffix.lower())
    if reader is None:
        raise InvalidArgument("table", repr(str(place)), TABLES, "Give it one of these endings.")
    if not place.is_file():
        raise InputNotFound("table", f"{str(place)!r}, which is not there", TABLES, "Check it.")
    try:
        return reader(place)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, ElementTree.ParseError) as error:
        came = f"{str(place)!r}, which cannot be read ({type(error).__name__}: {error})"
        raise InvalidArgument("table", came, TABLES, "See read_tile_table.") from error


def _table(path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], **options: Any) -> TileTable:
    """A table from rows with ``path``, ``transform``, ``spacing``, ``series``; faults together."""
    tiles, transforms, sizes, wrong = [], [], [], []
    for name, row in rows:
        try:
            tile, transform, size = _row(path.parent, row)
        except (TopoError, TypeError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        tiles.append(tile)
        transforms.append(transform)
        sizes.append(size)
    if any(s is None for s in sizes) and any(s is not None for s in sizes):
        wrong.append("some rows with a voxel size, some without")
    if wrong or not tiles:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise InvalidArgument(
            "table",
            f"{str(path)!r}: {'; '.join(wrong[:20]) or 'no tile at all'}{more}",
            "rows with the path of a tile and its position or matrix",
            "See read_tile_table.",
        )
    given = None if sizes[0] is None else tuple(sizes)
    return TileTable(tuple(tiles), tuple(transforms), given, options)


def _row(folder: Path, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    name = row.get("path")
    if not isinstance(name, str) or not name:
        raise ValueError("no path")
    tile: Any = name if "://" in name else str(folder / name)
    series = row.get("series")
    tiff = Path(name).suffix.lower() in TIFF_SUFFIXES
    transform, size = row.get("transform"), row.get("spacing")
    if transform is None and tiff:
        images = _ome_images(_ome_text(Path(tile)))
        found = images[int(series or 0)] if int(series or 0) < len(images) else {}
        transform, size = found.get("transform"), size or found.get("spacing")
    if transform is None:
        raise ValueError("neither a position nor a matrix")
    if not np.isfinite(np.asarray(transform, dtype=np.float64)).all():
        raise ValueError("a position that is not finite")
    if series is not None and tiff:
        tile = open_tiff(tile, int(series))
    return tile, transform, size


def _read_csv(path: Path) -> TileTable:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        names = [str(n).strip().lower() for n in table.fieldnames or ()]
        known = next((c for c in PATH_COLUMNS if c in names), None)
        if known is None:
            raise InvalidArgument(
                "table",
                f"{str(path)!r} with the columns {', '.join(names) or '(none)'}",
                "a column 'path'",
                "See read_tile_table.",
            )
        rows = []
        for line in table:
            values = zip(names, line.values(), strict=False)
            cells = {n: v.strip() for n, v in values if isinstance(v, str) and v.strip()}
            if cells:
                rows.append((f"line {table.line_num}", _cells(cells, known)))
    return _table(path, [(name, row) for name, row in rows])


def _cells(cells: Mapping[str, str], known: str) -> dict[str, Any]:
    """One row of a CSV as a row of `_table`; numbers stay text where they are none."""

    def numbers(names: Sequence[str]) -> tuple[Any, ...]:
        return tuple(_number(cells[n]) for n in names)

    row: dict[str, Any] = {"path": cells.get(known), "series": cells.get("series")}
    entries = [n for n in cells if re.fullmatch(r"m\d\d", n)]
    if entries:
        row["transform"] = _matrix({(int(n[1]), int(n[2])): _number(cells[n]) for n in entries})
    elif "y" in cells and "x" in cells:
        row["transform"] = numbers([n for n in ("z", "y", "x") if n in cells])
    sizes = [n for n in ("spacing_z", "spacing_y", "spacing_x") if n in cells]
    row["spacing"] = numbers(sizes) if sizes else None
    return row


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _matrix(entries: Mapping[tuple[int, int], Any]) -> Any:
    rows, columns = (max(k[axis] for k in entries) + 1 for axis in (0, 1))
    return tuple(tuple(entries.get((i, j), "missing") for j in range(columns)) for i in range(rows))


def _read_json(path: Path) -> TileTable:
    content = json.loads(path.read_text(encoding="utf-8"))
    whole: dict[str, Any] = content if isinstance(content, dict) else {"tiles": content}
    tiles = whole.get("tiles")
    if not isinstance(tiles, list) or not all(isinstance(t, dict) for t in tiles):
        raise InvalidArgument(
            "table",
            f"{str(path)!r}",
            'a list of tiles, or {"tiles": [...]}',
            "See read_tile_table.",
        )
    rows = []
    for number, tile in enumerate(tiles):
        transform = tile.get("matrix", tile.get("translation"))
        known = next((tile[c] for c in PATH_COLUMNS if c in tile), None)
        rows.append((f"tile {number}", {**tile, "path": known, "transform": transform}))
    options = {k: whole[k] for k in ("shape", "origin", "spacing") if whole.get(k) is not None}
    return _table(path, rows, **options)


# ------------------------------------------------------------------------------- OME-XML


def _ome_text(path: Path) -> str:
    if path.suffix.lower() not in TIFF_SUFFIXES:
        return path.read_text(encoding="utf-8")
    open_tiff(path)  # for its messages
    with _tifffile().TiffFile(path) as file:
        text = file.ome_metadata
    if not text:
        raise InvalidArgument(
            "table", f"{str(path)!r}, without OME-XML", "an OME-TIFF", "Use a CSV for its position."
        )
    return str(text)


def _ome_images(text: str) -> list[dict[str, Any]]:
    """Of each image in OME-XML: its size, its stage position and pixel size in µm, its files."""
    images = []
    for image in ElementTree.fromstring(text).iterfind("{*}Image"):
        pixels = image.find("{*}Pixels")
        if pixels is None:
            continue
        depth = int(pixels.get("SizeZ", "1"))
        planes = pixels.findall("{*}Plane")
        names = "XYZ"[: 3 if depth > 1 else 2][::-1]
        sizes = tuple(
            float(pixels.get(f"PhysicalSize{n}", "1")) * _factor(pixels, f"PhysicalSize{n}Unit")
            for n in names
        )
        at = [[_position(plane, n) for n in names] for plane in planes]
        placed = [row for row in at if not any(map(math.isnan, row[-2:]))]
        # The planes of one stack: its lowest position.
        transform = tuple(np.nan_to_num(np.nanmin(placed, axis=0)).tolist()) if placed else None
        files = {u.get("FileName") for u in pixels.iterfind("{*}TiffData/{*}UUID")} - {None}
        images.append(
            {"name": image.get("Name"), "transform": transform, "spacing": sizes, "files": files}
        )
    return images


def _factor(element: ElementTree.Element, attribute: str) -> float:
    """Micrometres of a unit; 1 for "reference frame" and "pixel", which have none."""
    return MICROMETRES.get(element.get(attribute, "µm"), 1.0)


def _position(plane: ElementTree.Element, axis: str) -> float:
    value = plane.get(f"Position{axis}")
    if value is None:
        return 0.0 if axis == "Z" else math.nan
    return float(value) * _factor(plane, f"Position{axis}Unit")


def _read_ome(path: Path) -> TileTable:
    images = _ome_images(_ome_text(path))
    tiff = path.suffix.lower() in TIFF_SUFFIXES
    rows: list[tuple[str, Mapping[str, Any]]] = []
    seen: dict[str, int] = {}
    for number, image in enumerate(images):
        files = sorted(image["files"])
        # A TIFF that holds the XML leads to all its images, whatever files they are in.
        file = path.name if tiff or len(files) != 1 else files[0]
        series = number if tiff else seen.get(file, 0)
        seen[file] = series + 1
        rows.append(
            (f"image {number} ({image['name']})", {"path": file, "series": series, **image})
        )
    wrong = [name for name, row in rows if row["transform"] is None]
    if wrong:
        raise InvalidArgument(
            "table",
            f"{str(path)!r}: no stage position in {', '.join(wrong[:20])}",
            "OME-XML with PositionX and PositionY in its planes",
            "Write the positions into a CSV, see read_tile_table.",
        )
    return _table(path, rows)
