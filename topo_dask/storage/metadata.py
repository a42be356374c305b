"""Metadata of arrays and images: where voxels are, how results were made; OME-Zarr's and ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zarr
from zarr.storage import FsspecStore, LocalStore

from topo_dask.storage.arrays import AnyArray
from topo_dask.storage.paths import GROUP_DEPTH

MARK = "topo_dask"  # attribute of what we published, and marker file of our work directories
TABLE_MARK = "made_by_topo_dask"  # column of the tables that we published


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a volume are: size of a voxel, position of the first, their unit.

    Examples
    --------
    >>> Geometry(scale=(40.0, 32.0, 32.0), unit="nanometer").translation
    (0.0, 0.0, 0.0)
    """

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    unit: str | None = None


def voxel_geometry(array: AnyArray) -> Geometry:
    """Scale, translation and unit of an array's spatial axes.

    Read from what `Output` wrote beside the array, else from OME-Zarr metadata (0.4 or 0.5) of
    a group around it; scale 1 and translation 0 where there is neither.

    Examples
    --------
    >>> voxel_geometry(zarr.create_array({}, shape=(2, 2, 2), dtype="uint8"))
    Geometry(scale=(1.0, 1.0, 1.0), translation=(0.0, 0.0, 0.0), unit=None)
    """
    with suppress(Exception):  # metadata of others may hold anything
        ours: Any = array.attrs[MARK]
        own = ours["geometry"]
        return _geometry(own["scale"], own["translation"], own["unit"])
    for attributes, path in _metadata_around(array):
        with suppress(Exception):
            return _ome_geometry(attributes, path, array.ndim)
    return Geometry()


def _metadata_around(array: AnyArray) -> Iterator[tuple[dict[str, Any], str]]:
    """Attributes of the groups around an array, nearest first, with the array's path in them."""
    store, inner, below = array.store, array.path, ""
    for _ in range(GROUP_DEPTH):
        if inner:
            inner, _, name = inner.rpartition("/")
        elif isinstance(store, LocalStore):
            root = store.root.absolute()
            store, name = LocalStore(root.parent, read_only=True), root.name
        elif isinstance(store, FsspecStore):
            head, _, name = store.path.rstrip("/").rpartition("/")
            if not head or not name:
                return
            store = FsspecStore(store.fs, read_only=True, path=head)
        else:
            return
        below = f"{name}/{below}" if below else name
        with suppress(Exception):
            group = zarr.open_group(store=store, path=inner, mode="r", use_consolidated=False)
            yield dict(group.attrs), below


def _ome_geometry(attributes: Mapping[str, Any], path: str, ndim: int) -> Geometry:
    """The geometry that a group's metadata gives to its array `path`; KeyError if none."""
    images = attributes.get("ome", attributes)["multiscales"]
    image, dataset = next(
        (image, dataset)
        for image in images
        for dataset in image["datasets"]
        if dataset["path"].strip("/") == path
    )
    scale, translation = np.ones(ndim), np.zeros(ndim)
    # Those of the dataset come first, then those of the whole image.
    for step in (
        *dataset.get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ):
        if step["type"] == "scale":
            factor = np.asarray(step["scale"], dtype=float)
            scale, translation = scale * factor, translation * factor
        elif step["type"] == "translation":
            translation = translation + np.asarray(step["translation"], dtype=float)
    axes = image["axes"]
    spatial = [
        i
        for i, axis in enumerate(axes)
        if axis.get("type", "space" if axis["name"] in {"z", "y", "x"} else "") == "space"
    ]
    units = {axes[i].get("unit") for i in spatial}
    unit = units.pop() if len(units) == 1 else None
    return _geometry(scale[spatial], translation[spatial], unit)


def _geometry(scale: Iterable[Any], translation: Iterable[Any], unit: Any) -> Geometry:
    s, t = (tuple(float(v) for v in values) for values in (scale, translation))
    if len(s) != 3 or len(t) != 3 or not all(map(math.isfinite, s + t)) or 0.0 in s:
        raise ValueError(f"not the geometry of a volume: {s}, {t}")
    return Geometry((s[0], s[1], s[2]), (t[0], t[1], t[2]), unit if unit is None else str(unit))


def label_metadata(name: str, geometry: Geometry, zarr_format: int) -> dict[str, Any]:
    """The attributes that make a group with an array ``s0`` an OME-Zarr label image."""
    unit = {} if geometry.unit is None else {"unit": geometry.unit}
    version = "0.4" if zarr_format == 2 else "0.5"
    image = {
        "name": name,
        "axes": [{"name": axis, "type": "space", **unit} for axis in "zyx"],
        "datasets": [
            {
                "path": "s0",
                "coordinateTransformations": [
                    {"type": "scale", "scale": list(geometry.scale)},
                    {"type": "translation", "translation": list(geometry.translation)},
                ],
            }
        ],
    }
    label = {"version": version}
    if zarr_format == 2:
        return {"multiscales": [{"version": version, **image}], "image-label": label}
    return {"ome": {"version": version, "multiscales": [image], "image-label": label}}


def our_mark(geometry: Geometry | None, attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """What we keep in the attribute `MARK`: how the result was made, and where its voxels are."""
    # Converted, so that a NumPy number among the settings does not fail a finished run.
    plain: dict[str, Any] = json.loads(json.dumps(attributes or {}, default=_plain))
    return {**plain, "geometry": asdict(geometry or Geometry())}


def _plain(value: Any) -> Any:
    """What JSON can hold in place of a value that it cannot."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)
