"""Runs that are held in the middle of a stage, where something is broken: what tests share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import tree
from slurm import wait_until
from test_resume import call, expected, inputs  # noqa: F401
from zarr.storage import LocalStore, WrapperStore

from topo_dask.errors import TopoError
from topo_dask.run.execute import Engine

# The run, the stage in its ledger, and the options that the stage needs.
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "table": ("flows", "table", {}),
    "flows": ("flows", "flows", {}),
    "fuse": ("flows", "fuse", {"overlap": 4}),
    "track": ("segment", "track", {}),
    "merge": ("segment", "cells", {}),
    "relabel": ("segment", "labels", {}),
}
OOM = 400 * 2**20
"""Bytes of a worker's memory limit, where it is to run out of it."""


@dataclass(frozen=True)
class Held:
    """A block function that waits, once, in one of its calls; or runs out of memory there."""

    function: Callable[[Any], Any]
    folder: Path
    greedy: bool = False

    def __call__(self, item: Any) -> Any:
        if len(list(self.folder.glob("done-*"))) >= 3:
            with contextlib.suppress(FileExistsError), (self.folder / "held").open("x") as file:
                file.write(str(os.getpid()))
                file.flush()
                self._wait()
        result = self.function(item)
        (self.folder / f"done-{time.monotonic_ns()}-{os.getpid()}").touch()
        return result

    def _wait(self) -> None:
        taken = []
        until = time.monotonic() + 100
        while not (self.folder / "go").exists():
            if self.greedy:
                taken.append(np.ones(OOM // 20, np.uint8))
            assert time.monotonic() < until
            time.sleep(0.02)


@dataclass(frozen=True)
class Watched:
    """A block function; something is called when the operating system fails it."""

    function: Callable[[Any], Any]
    failed: Callable[[], None]

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except OSError:
            self.failed()
            raise


class Holding(Engine):
    """Another engine, which holds a stage."""

    def __init__(
        self,
        inner: Engine,
        stage: str,
        folder: Path,
        *,
        greedy: bool = False,
        failed: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(inner.name, inner.slots)
        self.inner, self.stage, self.folder = inner, stage, folder
        self.greedy, self.failed = greedy, failed

    def _completed(self, function: Any, items: Any) -> Iterator[Any]:
        return self.inner._completed(function, items)

    def run(self, stage: str, function: Any, items: Any, **options: Any) -> Iterator[Any]:
        held = Held(function, self.folder, self.greedy) if stage == self.stage else function
        if self.failed is not None:
            held = Watched(held, self.failed)
        return self.inner.run(stage, held, items, **options)


def chunks(files: dict[str, bytes]) -> dict[str, bytes]:
    """All bytes of an array; its metadata tell which input it is made of."""
    return {name: content for name, content in files.items() if name[-9:] != "zarr.json"}


class Cell:
    """A cell of the matrix: a run that is held in a stage."""

    def __init__(
        self, stage: str, sources: dict[str, Path], folder: Path, known: Any, **options: Any
    ) -> None:
        self.run, self.stage, more = STAGES[stage]
        # An input of its own, which may be broken.
        self.source = folder / "input.zarr"
        shutil.copytree(sources[self.run], self.source)
        self.inputs: dict[str, Any] = {self.run: self.source}
        self.out, self.folder = folder / "out" / "out.zarr", folder
        self.options = {**more, **options}
        self.expected = chunks(known(self.run, **more))
        self.error: BaseException | None = None

    def call(self, **options: Any) -> None:
        call(self.run, self.inputs, self.out, **{**self.options, **options})

    def held(self, engine: Engine, break_it: Callable[[int], None], **more: Any) -> Any:
        """Run until the stage is held in some process, break something, and let it go on."""

        def work() -> None:
            try:
                self.call(cluster=Holding(engine, self.stage, self.folder, **more))
            except BaseException as error:
                self.error = error

        thread = threading.Thread(target=work)
        thread.start()
        mark = self.folder / "held"
        try:
            wait_until(
                lambda: (mark.exists() and mark.read_text()) or not thread.is_alive(), 240, "held"
            )
            assert thread.is_alive(), self.error
            break_it(int(mark.read_text()))
        finally:
            (self.folder / "go").touch()
            thread.join()
        return self.error

    def check(self, **options: Any) -> None:
        """The result is there to the byte, at once or when the run goes on."""
        if self.error is not None:
            assert isinstance(self.error, TopoError), self.error
            assert not self.out.exists()
            self.call(resume=True, cluster="sync", **options)
        assert chunks(tree(self.out)) == self.expected
        assert list(self.out.parent.iterdir()) == [self.out]


@pytest.fixture(name="cell")
def cell_of_the_matrix(
    request: pytest.FixtureRequest,
    inputs: dict[str, Path],  # noqa: F811
    expected: Any,  # noqa: F811
    tmp_path: Path,
) -> Cell:
    return Cell(request.param, inputs, tmp_path, expected)


def everywhere(*quick: str) -> pytest.MarkDecorator:
    """All stages; those that are not named only in `make test-all`."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in STAGES}
    cells = [pytest.param(name, marks=marks[name], id=name) for name in STAGES]
    return pytest.mark.parametrize("cell", cells, indirect=True)


class Flaky(WrapperStore[LocalStore]):
    """A store that fails while a file says so: as often as that has lines."""

    def __init__(self, store: LocalStore, order: str) -> None:
        super().__init__(store)
        self.order = order

    def __reduce__(self) -> Any:
        return Flaky, (self._store, self.order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flaky) and self._store == other._store

    __hash__ = None  # type: ignore[assignment]

    def _with_store(self, store: LocalStore) -> Flaky:
        return Flaky(store, self.order)

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        path = Path(self.order)
        if path.exists() and not key.endswith((".json", ".zarray", ".zattrs")):
            often = path.read_text()
            if often != "for ever":
                path.unlink()
            raise ConnectionResetError(errno.ECONNRESET, "the store is not there")
        return await super().get(key, *arguments, **options)
