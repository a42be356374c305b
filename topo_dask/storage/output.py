"""Zarr and OME-Zarr: open inputs, place outputs, publish them in one step. Never computes.

Inputs are zarr v2 or v3, chunked or sharded, at a path or URL. Outputs are written into a work
directory beside their final place and renamed when they are complete, so that a crash leaves what
was there before.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from topo_dask.codecs import careful
from topo_dask.errors import (
    BackendUnavailable,
    InputIsGroup,
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    OutputExists,
    OutputNotWritable,
    RunInProgress,
    TopoError,
    may_pass,
)

AnyArray: TypeAlias = zarr.Array[Any]
Source: TypeAlias = "str | os.PathLike[str] | AnyArray | zarr.Group | Store"
ZarrFormat: TypeAlias = Literal[2, 3]

MAX_CHUNK = 64
GROUP_DEPTH = 3  # levels of groups that are searched for arrays, and of parents for metadata
MAX_LISTED = 12
MARK = "topo_dask"  # attribute of what we published, and marker file of our work directories
TABLE_MARK = "made_by_topo_dask"  # column of the tables that we published
LOCK = "lock.json"
RECORD = "run.json"

_AXES = {1: "x", 2: "y, x", 3: "z, y, x", 4: "channel, z, y, x", 5: "time, channel, z, y, x"}
_SOURCES = "a path, a URL, a zarr array or a zarr store"


# ------------------------------------------------------------------------------------- inputs


def local_path(location: str | os.PathLike[str]) -> Path | None:
    """The absolute path of a path or ``file://`` URL; None for any other URL.

    Examples
    --------
    >>> local_path("file:///data/a%20b.zarr").as_posix()
    '/data/a b.zarr'
    >>> local_path("s3://bucket/a.zarr") is None
    True
    """
    text = os.fspath(location)
    if "://" in text:
        url = urlsplit(text)
        if url.scheme != "file":
            return None
        text = unquote(url.path)
    # Not resolved: on clusters the resolved path may exist on this machine only.
    return Path(text).expanduser().absolute()


def open_array(source: Source, *, argument: str, axes: Sequence[int] = (3,)) -> AnyArray:
    """Open an input for reading and check that it can be used, before any work starts.

    Parameters
    ----------
    source
        Path or URL of a zarr array (inside groups too: ``store.zarr/labels/s0``), or an open
        zarr array or store.
    argument
        Name of the argument, for messages.
    axes
        Allowed numbers of axes.

    Raises
    ------
    InputNotFound
        Nothing there, not zarr, or unreadable.
    InputIsGroup
        A group; its arrays are listed.
    InvalidArgument
        Wrong number of axes, or an axis of length 0.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/labels.zarr"
    >>> _ = create_array(path, (4, 5, 6), (4, 5, 6), "uint32")
    >>> open_array(path, argument="labels").shape
    (4, 5, 6)
    """
    node = _open_node(source, argument)
    if isinstance(node, zarr.Group):
        raise _group_error(node, source, argument)
    if node.ndim not in axes:
        names = " or ".join(f"{n} axes ({_AXES.get(n, '...')})" for n in axes)
        raise InvalidArgument(
            argument,
            f"an array of {node.ndim} axes, shape {node.shape}, at {_name(source)}",
            names,
            "Pass an array with these axes: one channel and one time point of a larger one.",
        )
    if 0 in node.shape:
        raise InvalidArgument(
            argument,
            f"an array of shape {node.shape} at {_name(source)}",
            "axes of length 1 or more",
            "Check how this array was made: it holds no voxel.",
        )
    return careful(node)


def _open_node(source: Any, argument: str) -> AnyArray | zarr.Group:
    if isinstance(source, zarr.Group):
        return source
    if isinstance(source, zarr.Array):
        store = source.store
        if isinstance(store, LocalStore) and not store.root.is_absolute():
            # Workers may run in another directory than this process.
            source = store.root.absolute() / source.path
        else:
            return source
    if not isinstance(source, (str, os.PathLike, Store)):
        raise InvalidType(argument, type(source).__name__, _SOURCES, "Pass e.g. 'labels.zarr'.")
    location: Any = source
    if not isinstance(source, Store):
        path = local_path(source)
        if path is not None:
            _require_directory(path, source, argument)
            location = str(path)
    return _zarr_open(location, source, argument)


def _zarr_open(location: Any, source: Any, argument: str) -> AnyArray | zarr.Group:
    try:
        return zarr.open(store=location, mode="r")
    except FileNotFoundError as error:
        raise InputNotFound(
            argument,
            f"{_name(source)}, where there is no zarr array",
            "the location of a zarr array",
            _nearby(source) or "Check the path.",
        ) from error
    except ImportError as error:
        raise BackendUnavailable(
            argument,
            f"{_name(source)}, which needs a package that is not installed ({error})",
            "a location that the installed packages can read",
            'For object stores: pip install "topo_dask[cloud]".',
        ) from error
    except Exception as error:  # whatever a store or damaged metadata may raise
        raise InputNotFound(
            argument,
            f"{_name(source)}, which cannot be read as zarr ({type(error).__name__}: {error})",
            "the location of a readable zarr array",
            "Check its metadata and your permissions.",
        ) from error


def _require_directory(path: Path, source: Any, argument: str) -> None:
    try:
        is_directory = path.is_dir()
        exists = is_directory or path.exists()
    except (OSError, ValueError) as error:
        raise InputNotFound(
            argument,
            f"{_name(source)}, which cannot be read ({error})",
            "the location of a readable zarr array",
            "Check the path and your permissions.",
        ) from error
    if not is_directory:
        raise InputNotFound(
            argument,
            f"{_name(source)}, which is "
            + ("a file, not a zarr directory" if exists else "not there"),
            "the path of a zarr array",
            _nearby(source) or "Check the path.",
        )


def _group_error(group: zarr.Group, source: Any, argument: str) -> InputIsGroup:
    arrays = _list_arrays(group)
    base = _name(source).strip("'") if isinstance(source, (str, os.PathLike)) else ""
    listed = ", ".join(f"{path} {_describe(array)}" for path, array in arrays[:MAX_LISTED])
    more = f" and {len(arrays) - MAX_LISTED} more" if len(arrays) > MAX_LISTED else ""
    if arrays:
        first = arrays[0][0]
        example = f"{base.rstrip('/')}/{first}" if base else f"group[{first!r}]"
        do = f"It holds {listed}{more}. Pass one of them, e.g. {example}."
    else:
        do = f"No array was found in it within {GROUP_DEPTH + 1} levels."
    return InputIsGroup(argument, f"{_name(source)}, a zarr group", "a zarr array", do)


def _list_arrays(group: zarr.Group) -> list[tuple[str, AnyArray]]:
    with warnings.catch_warnings():
        # Files beside the arrays are nobody's mistake.
        warnings.simplefilter("ignore")
        try:
            # Consolidated metadata may be older than the arrays.
            fresh = zarr.open_group(
                store=group.store, path=group.path, mode="r", use_consolidated=False
            )
            members = fresh.members(max_depth=GROUP_DEPTH, use_consolidated_for_children=False)
        except Exception:  # a store that cannot list, or a damaged member
            members = group.members(max_depth=0) if group.metadata.consolidated_metadata else ()
    return sorted((path, node) for path, node in members if isinstance(node, zarr.Array))


def _nearby(source: Any) -> str:
    """What there is instead of a missing local path, as a sentence; empty where nothing is."""
    path = local_path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is None:
        return ""
    with suppress(Exception):
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix == ".zarr")[:MAX_LISTED]
            return f"It holds {', '.join(inside)}: pass one of them." if inside else ""
        parent = next(p for p in path.parents if p.is_dir())
        node = zarr.open(store=str(parent), mode="r")
        if isinstance(node, zarr.Group):
            names = [name for name, _ in _list_arrays(node)][:MAX_LISTED]
            return f"{parent} holds {', '.join(names)}." if names else ""
    return ""


def _describe(array: AnyArray) -> str:
    return f"({'x'.join(map(str, array.shape))} {array.dtype})"


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (zarr.Array, zarr.Group)):
        return str(source.store_path)
    return str(source)


# ----------------------------------------------------------------------------------- geometry


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


# -------------------------------------------------------------------------------- new arrays


def output_chunks(
    blocks: Sequence[int], shape: Sequence[int], *, longest: int = MAX_CHUNK
) -> tuple[int, ...]:
    """Chunk shape for an array written block by block: each chunk lies in one block.

    Along each axis the largest divisor of the block length up to ``longest``; the block itself
    where that would be below a quarter of it; anything where one block covers the axis. A block's
    halo decodes whole chunks of its neighbours: with chunks as large as blocks 27 times the block.

    Examples
    --------
    >>> output_chunks((256, 200, 131), (512, 512, 512))
    (64, 50, 131)
    >>> output_chunks((1000, 1000, 7), (300, 90, 70))
    (64, 64, 7)
    """
    return tuple(_chunk(int(b), int(n), longest) for b, n in zip(blocks, shape, strict=True))


def _chunk(block: int, length: int, longest: int) -> int:
    if block >= length:
        return min(length, longest)
    if block <= longest:
        return block
    divisor = next(d for d in range(longest, 0, -1) if block % d == 0)
    return divisor if 4 * divisor >= longest else block


def create_array(
    path: str | os.PathLike[str],
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: npt.DTypeLike,
    *,
    shards: Sequence[int] | None = None,
    zarr_format: ZarrFormat = 3,
) -> AnyArray:
    """Create a zarr array, filled with 0, with codecs that suit labels or flows.

    Labels (integers) get zstd 3: on real tissue half the size of shuffled blosc, in half the
    time. Flows (floats) get shuffled blosc zstd 1. Chunks of zeros are not written.

    Examples
    --------
    >>> import tempfile
    >>> array = create_array(tempfile.mkdtemp() + "/a.zarr", (8, 8, 8), (4, 4, 4), "uint16")
    >>> array.chunks, array[0, 0, :2]
    ((4, 4, 4), array([0, 0], dtype=uint16))
    """
    if zarr_format not in (2, 3):
        raise InvalidArgument("zarr_format", repr(zarr_format), "2 or 3")
    if shards is not None and zarr_format == 2:
        raise InvalidArgument(
            "shards", f"{tuple(shards)} with zarr_format=2", "zarr_format=3, or no shards"
        )
    floating = np.dtype(dtype).kind == "f"
    options: dict[str, Any]
    if zarr_format == 2:
        blosc = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1}
        options = {
            "compressors": blosc if floating else {"id": "zstd", "level": 3},
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
    else:
        options = {
            "compressors": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
            if floating
            else ZstdCodec(level=3),
            "dimension_names": tuple("tczyx"[-len(shape) :]) if len(shape) <= 5 else None,
        }
    return zarr.create_array(
        store=str(local_path(path) or path),
        shape=tuple(shape),
        chunks=tuple(chunks),
        shards=None if shards is None else tuple(shards),
        dtype=np.dtype(dtype),
        fill_value=0,
        zarr_format=zarr_format,
        config={"write_empty_chunks": False},
        **options,
    )


# ------------------------------------------------------------------------------------ outputs


class Output:
    """The place of a result, checked before work starts and filled in one step at the end.

    Parameters
    ----------
    path
        Where the result will be: a local path or ``file://`` URL. Missing parent directories
        are made.
    overwrite
        Replace what is there (a zarr array, or an image that topo_dask published) when the new
        result is complete; leftovers of an unfinished run are dropped.
    resume
        Keep the leftovers of an unfinished run and go on with them. An existing result is
        replaced when the new one is complete.
    inputs
        What is read; the output may not be one of them, inside or around one.
    work_dir
        Directory for intermediate files, ``<name>.work`` in it; beside the output by default.
    argument
        Name of the argument, for messages.

    Raises
    ------
    InvalidArgument
        Not a local path, or equal to, inside or around an input.
    OutputExists
        The output or an unfinished run of it is there, or is nothing that may be replaced.
    OutputNotWritable
        A directory that cannot be made or written.
    RunInProgress
        Another run works on it; its host and process id are named.

    Examples
    --------
    >>> import tempfile
    >>> output = Output(tempfile.mkdtemp() + "/labels.zarr")
    >>> array = output.create((4, 4, 4), (4, 4, 4), "uint32")
    >>> array[:] = 7
    >>> output.exists
    False
    >>> output.publish_labels().path, output.exists
    ('s0', True)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[Any] = (),
        work_dir: str | os.PathLike[str] | None = None,
        argument: str = "output",
    ) -> None:
        self.argument, self.overwrite, self.resume = argument, overwrite, resume
        sources = list(inputs)
        self.inputs = [_told(source) for source in sources]
        self.path = _output_path(path, argument)
        # Always beside the output, so that publishing is a rename on one file system.
        self._stage = self.path.with_name(f"{self.path.name}.work")
        base = self._stage.parent if work_dir is None else _output_path(work_dir, "work_dir")
        self._scratch = base / self._stage.name
        self._started = False
        for source in sources:
            self._refuse_overlap(source)
        for directory in self._directories:
            self._refuse_running(directory)
        self._recover()
        self._refuse_existing()
        self._refuse_leftovers()
        for directory in self._directories:
            _probe(directory, argument if directory == self._stage else "work_dir")

    @property
    def exists(self) -> bool:
        """Whether a result is at the output's path."""
        return os.path.lexists(self.path)

    @property
    def scratch(self) -> Path:
        """The work directory, made when first asked for."""
        self._start()
        return self._scratch

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs off the output; a lock whose process is gone is taken over.

        Raises
        ------
        RunInProgress
            Another run holds it; its host and process id are named.
        """
        with ExitStack() as stack:
            for directory in self._directories:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / MARK).touch()
                stack.enter_context(self._locked(directory))
            yield

    def create(
        self,
        shape: Sequence[int],
        chunks: Sequence[int],
        dtype: npt.DTypeLike,
        *,
        shards: Sequence[int] | None = None,
        zarr_format: ZarrFormat = 3,
        name: str = "s0",
    ) -> AnyArray:
        """Make the result's array in its unpublished place; see `create_array`.

        When resuming, the array of the unfinished run is opened if it is of the same layout.
        A result of several arrays (`publish_group`) needs a ``name`` for each.
        """
        self._start()
        path, identity = self._array_path.with_name(name), self._stage / f"identity-{name}"
        if path.exists():
            with suppress(Exception):
                array = zarr.open_array(store=str(path), mode="r+")
                wanted = (tuple(shape), tuple(chunks), np.dtype(dtype), zarr_format)
                found = (array.shape, array.chunks, array.dtype, array.metadata.zarr_format)
                same = array.shards == (None if shards is None else tuple(shards))
                if found == wanted and same and identity.exists():
                    return array
            shutil.rmtree(path)
            for metadata in ("zarr.json", ".zgroup", ".zattrs"):  # of a group of either format
                path.with_name(metadata).unlink(missing_ok=True)
        array = create_array(path, shape, chunks, dtype, shards=shards, zarr_format=zarr_format)
        identity.write_text(uuid.uuid4().hex)
        return array

    @property
    def record(self) -> Path:
        """Where a run may keep its record: it is published beside the chunks of the first array.

        There no reader of zarr takes it for a member of a group.
        """
        return self._stage / RECORD

    @property
    def identity(self) -> str:
        """A text that changes when `create` has made an array anew, empty as it then is."""
        return " ".join(path.read_text() for path in self._identities)

    def beside(self, name: str) -> Path:
        """A place in the result's group, for what is published together with its arrays."""
        self._start()
        return self._array_path.with_name(name)

    def publish(
        self, *, geometry: Geometry | None = None, attributes: Mapping[str, Any] | None = None
    ) -> AnyArray:
        """Put the array under the output's name, replacing what is there, and end the work.

        Parameters
        ----------
        geometry
            Kept in the array's attributes; `voxel_geometry` reads it.
        attributes
            How the result was made: anything JSON can hold, kept under ``topo_dask``.
        """
        array = zarr.open_array(store=str(self._array_path), mode="r+")
        array.update_attributes({MARK: _mark(geometry, attributes)})
        self._replace(self._array_path)
        return zarr.open_array(store=str(self.path), mode="r")

    def publish_labels(
        self, *, geometry: Geometry | None = None, attributes: Mapping[str, Any] | None = None
    ) -> AnyArray:
        """Publish the array as dataset ``s0`` of an OME-Zarr label image; see `publish`.

        OME-Zarr 0.4 for zarr v2, 0.5 for zarr v3. Returns the array at full resolution.
        """
        array = zarr.open_array(store=str(self._array_path), mode="r")
        zarr_format = array.metadata.zarr_format
        metadata = _label_metadata(self.path.stem, geometry or Geometry(), zarr_format)
        # An earlier run may have come as far as this: opened if there, made if not.
        group = zarr.open_group(
            store=str(self._array_path.parent), mode="a", zarr_format=zarr_format
        )
        group.update_attributes({**metadata, MARK: _mark(geometry, attributes)})
        self._replace(self._array_path.parent)
        return self.open()

    def publish_group(
        self, *, geometry: Geometry | None = None, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Publish the arrays that `create` made as a group of them, by name; see `publish`."""
        mark = _mark(geometry, attributes)
        zarr_format: ZarrFormat = 3
        for identity in self._identities:
            path = self._array_path.with_name(identity.name.removeprefix("identity-"))
            array = zarr.open_array(store=str(path), mode="r+")
            array.update_attributes({MARK: {"geometry": mark["geometry"]}})
            zarr_format = array.metadata.zarr_format
        group = zarr.open_group(
            store=str(self._array_path.parent), mode="a", zarr_format=zarr_format
        )
        group.update_attributes({MARK: mark})
        self._replace(self._array_path.parent)

    def publish_table(self, **arrays: npt.ArrayLike) -> None:
        """Write a table and put it under the output's name; see `save_table`, `publish`.

        Examples
        --------
        >>> import tempfile
        >>> output = Output(tempfile.mkdtemp() + "/instances.npz")
        >>> output.publish_table(ids=[3, 5])
        >>> load_table(output.path)["ids"]
        array([3, 5])
        """
        self._start()
        finished = self._stage / "result" / "table.npz"
        save_table(finished, **arrays, **{TABLE_MARK: True})
        self._replace(finished)

    def open(self, name: str = "s0") -> AnyArray:
        """The published array at full resolution, or that of a group by its name."""
        node = _open_node(self.path, self.argument)
        if isinstance(node, zarr.Group):
            array = node[name]
            assert isinstance(array, zarr.Array)
            return zarr.open_array(store=node.store, path=array.path, mode="r")
        return node

    @property
    def unfinished(self) -> bool:
        """Whether an unfinished run left work behind."""
        return any(
            directory.is_dir() and not _is_empty_directory(directory)
            for directory in self._directories
        )

    def made_by(self) -> dict[str, Any]:
        """What `publish` was told of how the published result was made; empty if not by us."""
        attributes = _open_node(self.path, self.argument).attrs.asdict().get(MARK, {})
        return dict(attributes) if isinstance(attributes, Mapping) else {}

    def discard(self) -> None:
        """Drop all unfinished work. What was published stays."""
        self._recover()
        for directory in self._directories:
            if directory.exists():
                shutil.rmtree(directory)
        self._started = False

    def __repr__(self) -> str:
        return f"Output({str(self.path)!r}, {'there' if self.exists else 'not there yet'})"

    @property
    def _array_path(self) -> Path:
        return self._stage / "result" / "s0"

    @property
    def _identities(self) -> list[Path]:
        return sorted(self._stage.glob("identity-*"))

    @property
    def _aside(self) -> Path:
        return self._stage / "replaced"

    @property
    def _directories(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self._stage, self._scratch)))

    def _refuse_overlap(self, source: Any) -> None:
        path = _path_of(source)
        if path is None:
            return
        for ours in (self.path, *self._directories):
            inside, around = _contains(path, ours), _contains(ours, path)
            if inside or around:
                relation = "equal to" if inside and around else "inside" if inside else "around"
                raise InvalidArgument(
                    self.argument,
                    f"{str(ours)!r}, which is {relation} the input {str(path)!r}",
                    "a place apart from every input",
                    "Choose another output.",
                )

    def _refuse_running(self, directory: Path) -> None:
        holder = _holder(directory / LOCK)
        if holder is not None:
            raise RunInProgress(
                self.argument,
                f"{str(self.path)!r}, on which process {holder.get('pid', '(unknown)')} on host "
                f"{holder.get('host', '(unknown)')} is working",
                "one run at a time on an output",
                f"Wait for it; if it is gone for certain, remove {directory / LOCK}.",
            )

    @contextmanager
    def _locked(self, directory: Path) -> Iterator[None]:
        path, me = directory / LOCK, _this_process()
        while True:
            try:
                with path.open("x") as file:
                    try:
                        json.dump(me, file)
                        file.flush()
                    except OSError:  # a full disk; nobody could tell whose lock it was
                        path.unlink()
                        raise
                break
            except FileExistsError:
                self._refuse_running(directory)
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            # After publication the directory is gone, and may be another run's already.
            if _read_json(path) == me:
                path.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if not self.exists:
            return
        if not (self.overwrite or self.resume):
            raise OutputExists(
                self.argument,
                f"{str(self.path)!r}, which is already there",
                "a path where nothing is",
                "Choose another output, or pass overwrite=True (--overwrite) to replace it or "
                "resume=True (--resume) to go on with it.",
            )
        if not _replaceable(self.path):
            raise OutputExists(
                self.argument,
                f"{str(self.path)!r}, which is neither a zarr array nor an image or a table "
                "that topo_dask wrote",
                "a path where nothing is, or such a result to replace",
                "Choose another output, or remove it yourself.",
            )
        if not os.access(self.path, os.W_OK | (os.X_OK if self.path.is_dir() else 0)):
            raise OutputNotWritable(
                self.argument,
                f"{str(self.path)!r}, which is read-only",
                "an existing output that may be replaced",
                "Choose another output, or change its permissions.",
            )

    def _refuse_leftovers(self) -> None:
        for directory in self._directories:
            if not os.path.lexists(directory) or _is_empty_directory(directory):
                continue
            if not os.path.isfile(directory / MARK):
                raise OutputExists(
                    self.argument,
                    f"{str(directory)!r}, which topo_dask needs for its work but did not make",
                    "a work directory that is not there yet",
                    "Choose another output or work_dir, or move it away.",
                )
            if not (self.overwrite or self.resume):
                raise OutputExists(
                    self.argument,
                    f"unfinished work of an earlier run in {str(directory)!r}",
                    "no leftovers",
                    "Pass resume=True (--resume) to go on with it, or overwrite=True "
                    "(--overwrite) to start again.",
                )

    def _recover(self) -> None:
        """Undo a publication that was cut between its two renames."""
        if not self.exists and os.path.isfile(self._stage / MARK) and os.path.exists(self._aside):
            self._aside.rename(self.path)

    def _start(self) -> None:
        if self._started:
            return
        for directory in self._directories:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / MARK).touch()
            for path in () if self.resume else directory.iterdir():
                if path.name in (LOCK, MARK):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        self._started = True

    def _replace(self, finished: Path) -> None:
        names = [path.name.removeprefix("identity-") for path in self._identities]
        arrays = [self._array_path, *(self._array_path.with_name(name) for name in names)]
        place = next((path for path in arrays if path.is_dir()), None)
        if place is not None and self.record.exists():  # a table has no place for it
            shutil.copyfile(self.record, place / RECORD)
        if self.exists:
            if not (self.overwrite or self.resume):
                raise OutputExists(
                    self.argument,
                    f"{str(self.path)!r}, which appeared during the run",
                    "a path where nothing is",
                    f"The finished result is at {str(finished)!r}: move it where you want it.",
                )
            if self._aside.is_dir():
                shutil.rmtree(self._aside)
            self.path.rename(self._aside)
        try:
            finished.rename(self.path)
        except OSError:
            self._recover()
            raise
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)
            if directory.exists():
                warnings.warn(
                    f"The result is published, but {directory} could not be removed.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self._started = False


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "since": _started(pid)}


def _started(pid: int) -> str | None:
    """When a process began, in ticks of the machine; None if it is gone or that cannot be read."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock; None if nobody does, or a process of this machine that is gone."""
    if not os.path.lexists(lock):
        return None
    holder, me = _read_json(lock), _this_process()
    if holder.get("host") != me["host"]:
        return holder  # who can tell?
    # Numbers of processes are given again, so the time counts where there is one.
    if me["since"] is not None:
        return holder if holder.get("since") == _started(int(holder["pid"])) else None
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return holder


def _read_json(path: Path) -> dict[str, Any]:
    """What is in a small file of ours; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _output_path(path: Any, argument: str) -> Path:
    allowed = "a path on a local or mounted file system"
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidType(argument, type(path).__name__, allowed, "Pass e.g. 'result.zarr'.")
    text = os.fspath(path)
    local = local_path(text) if text and "\0" not in text else None
    if local is None or not local.name:
        raise InvalidArgument(argument, repr(text), allowed, "Copy the result there afterwards.")
    # What is replaced is the target of a link, not the link.
    linked = os.path.islink(local) or ".." in local.parts
    return Path(os.path.realpath(local)) if linked else local


def _path_of(source: Any) -> Path | None:
    """Where an input lies on this machine's file systems; None if it does not."""
    if isinstance(source, (str, os.PathLike)):
        path = local_path(source)
    elif isinstance(source, (zarr.Array, zarr.Group)) and isinstance(source.store, LocalStore):
        path = source.store.root.absolute() / source.path
    elif isinstance(source, LocalStore):
        path = source.root.absolute()
    else:
        return None
    return path


def _told(source: Any) -> str:
    """What an input is, for people: where it lies, or the array in memory that it is."""
    path = _path_of(source)
    if path is not None:
        return str(path)
    if isinstance(source, (zarr.Array, zarr.Group)):
        return str(source.store_path)
    kind, dtype = type(source).__name__, getattr(source, "dtype", "")
    return f"{kind} {'x'.join(map(str, getattr(source, 'shape', ())))} {dtype}".strip()


def _contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies below it, whatever links and mounts lead to them."""
    resolved = Path(os.path.realpath(inner))
    if Path(os.path.realpath(outer)) in (resolved, *resolved.parents):
        return True
    for path in (resolved, *resolved.parents):
        with suppress(OSError):
            if os.path.samefile(path, outer):
                return True
    return False


def _replaceable(path: Path) -> bool:
    """Whether overwriting may remove it: ours, a zarr array, or empty; never a mere directory."""
    if _is_empty_directory(path):
        return True
    if path.is_file():
        with suppress(TopoError):
            return TABLE_MARK in load_table(path, (TABLE_MARK,))
        return False
    try:
        node = _open_node(path, "output")
    except TopoError:
        return False
    return isinstance(node, zarr.Array) or MARK in node.attrs


def _is_empty_directory(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def _probe(directory: Path, argument: str) -> None:
    """Write into a directory that may not exist yet; leave everything as it was."""
    missing = [p for p in (directory, *directory.parents) if not os.path.lexists(p)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        # Trying is the only test that is right for root, quotas and network file systems.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
    except OSError as error:
        raise OutputNotWritable(
            argument,
            f"{str(directory)!r}, which cannot be written ({error.strerror or error})",
            "a directory that can be made and written",
            "Choose another place, or change the permissions.",
        ) from error
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another run may have started in it
                path.rmdir()


def _mark(geometry: Geometry | None, attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    # Converted, so that a NumPy number among the settings does not fail a finished run.
    plain: dict[str, Any] = json.loads(json.dumps(attributes or {}, default=_plain))
    return {**plain, "geometry": asdict(geometry or Geometry())}


def _plain(value: Any) -> Any:
    """What JSON can hold in place of a value that it cannot."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def _label_metadata(name: str, geometry: Geometry, zarr_format: int) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------- small tables


def save_table(path: str | os.PathLike[str], /, **arrays: npt.ArrayLike) -> None:
    """Write named arrays to an ``.npz`` file; the file appears complete or not at all.

    Raises
    ------
    InvalidType
        An array of Python objects.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/sizes.npz"
    >>> save_table(path, ids=[1, 2], voxels=[10, 20])
    >>> load_table(path)["voxels"]
    array([10, 20])
    """
    target = Path(path)
    tables = {name: np.asarray(values) for name, values in arrays.items()}
    for name, values in tables.items():
        if values.dtype.hasobject:
            raise InvalidType(name, f"dtype {values.dtype}", "numbers, booleans or text")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as bundle:
            for name, values in tables.items():
                with bundle.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_table(
    path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays that `save_table` wrote, or those of them with some names.

    Raises
    ------
    InputNotFound
        No such file.
    InvalidData
        The file is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as bundle:
            return {name: bundle[name] for name in (bundle.files if names is None else names)}
    except FileNotFoundError as error:
        raise InputNotFound(
            "table", _name(path), "the path of a table", "Run the stage that makes it."
        ) from error
    except Exception as error:  # a damaged archive may raise anything
        if may_pass(error) and getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # of the disk, not of the file
        raise InvalidData(
            "table",
            f"{_name(path)}, which is damaged ({error})",
            "a table as save_table writes it",
            "If it is an intermediate file of a run, pass overwrite=True (--overwrite) to begin "
            "anew: nothing of yours is lost.",
        ) from error
