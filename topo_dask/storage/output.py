"""What is written: into a work directory, then put in its place in one step when it is complete.

The work directory is beside the final place, so that putting the result there is a rename: a crash
leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from topo_dask.errors import OutputExists
from topo_dask.storage.arrays import AnyArray, ZarrFormat, create_array
from topo_dask.storage.inputs import open_node
from topo_dask.storage.locks import LOCK, locked, refuse_running
from topo_dask.storage.metadata import (
    MARK,
    TABLE_MARK,
    Geometry,
    label_metadata,
    our_mark,
)
from topo_dask.storage.output_checks import (
    output_path,
    probe,
    refuse_existing,
    refuse_leftovers,
    refuse_overlap,
)
from topo_dask.storage.paths import description_of, is_empty_directory
from topo_dask.storage.tables import save_table

RECORD = "run.json"


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
        self.inputs = [description_of(source) for source in sources]
        self.path = output_path(path, argument)
        # Always beside the output, so that publishing is a rename on one file system.
        self._stage = self.path.with_name(f"{self.path.name}.work")
        base = self._stage.parent if work_dir is None else output_path(work_dir, "work_dir")
        self._scratch = base / self._stage.name
        self._started = False
        for source in sources:
            refuse_overlap((self.path, *self._directories), source, argument)
        for directory in self._directories:
            refuse_running(directory, self.path, argument)
        self._recover()
        refuse_existing(self.path, argument, may_replace=overwrite or resume)
        for directory in self._directories:
            refuse_leftovers(directory, argument, may_drop=overwrite or resume)
        for directory in self._directories:
            probe(directory, argument if directory == self._stage else "work_dir")

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
                stack.enter_context(locked(directory, self.path, self.argument))
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
        array.update_attributes({MARK: our_mark(geometry, attributes)})
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
        metadata = label_metadata(self.path.stem, geometry or Geometry(), zarr_format)
        # An earlier run may have come as far as this: opened if there, made if not.
        group = zarr.open_group(
            store=str(self._array_path.parent), mode="a", zarr_format=zarr_format
        )
        group.update_attributes({**metadata, MARK: our_mark(geometry, attributes)})
        self._replace(self._array_path.parent)
        return self.open()

    def publish_group(
        self, *, geometry: Geometry | None = None, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Publish the arrays that `create` made as a group of them, by name; see `publish`."""
        mark = our_mark(geometry, attributes)
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
        >>> from topo_dask.storage import load_table
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
        node = open_node(self.path, self.argument)
        if isinstance(node, zarr.Group):
            array = node[name]
            assert isinstance(array, zarr.Array)
            return zarr.open_array(store=node.store, path=array.path, mode="r")
        return node

    @property
    def unfinished(self) -> bool:
        """Whether an unfinished run left work behind."""
        return any(
            directory.is_dir() and not is_empty_directory(directory)
            for directory in self._directories
        )

    def made_by(self) -> dict[str, Any]:
        """What `publish` was told of how the published result was made; empty if not by us."""
        attributes = open_node(self.path, self.argument).attrs.asdict().get(MARK, {})
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
