"""Files between stages: which stage wrote them, and what is done again where one is damaged.

Tasks note what they write, as kinds of files; the ledger keeps for each stage its kinds. A damaged
file is taken away, and what wrote it is struck off the ledger: the run that resumes does that
again, no more. What later stages made of the file stands: the same bytes come again.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.storage import LocalStore

from topo_dask.errors import DamagedFile
from topo_dask.storage import AnyArray

LEDGER, STAGES, STRUCK, INPUTS = "ledger", "stages.txt", "struck.json", "inputs"
BEGIN_ANEW = "pass overwrite=True (--overwrite) to begin anew"

_noted = threading.local()


# ------------------------------------------------------------------------------- what is written


def kind_of(path: Path) -> str:
    """What files of many blocks have in common.

    Examples
    --------
    >>> kind_of(Path("cells/17.npz")), kind_of(Path("after-3/2-0.npy")), kind_of(Path("4/5.npy"))
    ('cells/#.npz', 'after-3/#-#.npy', '#/#.npy')
    """
    *folders, name = path.parts
    folders = ["#" if folder.isdigit() else folder for folder in folders]
    return str(Path(*folders, re.sub(r"\d+", "#", name)))


def note(path: Path) -> None:
    """Note that a task writes a file."""
    kinds: set[str] | None = getattr(_noted, "kinds", None)
    if kinds is not None and path.is_relative_to(_noted.work):
        kinds.add(kind_of(path.relative_to(_noted.work)))


@dataclass(frozen=True)
class Noting:
    """A block function that also gives the kinds of files that it wrote in the work directory."""

    function: Callable[[Any], Any]
    work: Path

    def __call__(self, item: Any) -> tuple[Any, list[str]]:
        """Its result, and the kinds."""
        _noted.kinds, _noted.work = set(), self.work
        try:
            return self.function(item), sorted(_noted.kinds)
        finally:
            _noted.kinds = None


@dataclass(frozen=True, eq=False)
class ScratchArray:
    """A zarr array between stages, sliced like one: its writers are noted, its damage is told."""

    array: AnyArray

    @property
    def path(self) -> Path:
        """Where it is on the file system."""
        store = self.array.store
        assert isinstance(store, LocalStore)
        return store.root / self.array.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.array.shape)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.chunks

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array."""
        found: np.dtype[Any] = self.array.dtype
        return found

    def update_attributes(self, attributes: dict[str, Any]) -> None:
        """Add to what is said of the array."""
        self.array.update_attributes(attributes)

    def __setitem__(self, key: Any, values: npt.NDArray[Any]) -> None:
        note(self.path)
        self.array[key] = values

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        try:
            return np.asarray(self.array[key])
        except OSError:
            raise
        except Exception as error:  # a damaged chunk may raise anything
            for path, at in self._damaged(key):
                raise damaged(path, error, array=str(self.path), at=at) from error
            raise

    def _damaged(self, key: Any) -> Iterator[tuple[Path, tuple[int, ...]]]:
        """Chunks that cannot be read, and their first voxels."""
        parts = key if isinstance(key, tuple) else (key,)
        ranges = []
        for n, (size, chunk) in enumerate(zip(self.shape, self.chunks, strict=True)):
            part = parts[n] if n < len(parts) else slice(None)
            start, stop, _ = (part if isinstance(part, slice) else slice(part, part + 1)).indices(
                size
            )
            ranges.append(range(start // chunk, -(-stop // chunk)))
        for index in product(*ranges):
            at = tuple(i * c for i, c in zip(index, self.chunks, strict=True))
            try:
                self.array[tuple(slice(a, a + c) for a, c in zip(at, self.chunks, strict=True))]
            except Exception:
                yield self.path / self.array.metadata.encode_chunk_key(index), at


def damaged(
    path: Path, error: object, *, array: str = "", at: tuple[int, ...] | None = None
) -> DamagedFile:
    """The error that says so; `struck_off` completes it."""
    return DamagedFile(
        "work_dir",
        f"{str(path)!r}, which is damaged or gone ({error})",
        "intermediate files as the run left them",
        f"Nothing of yours is lost: {BEGIN_ANEW}.",
        path=str(path),
        array=array,
        at=at,
    )


# ------------------------------------------------------------------------- what is struck off


@dataclass(frozen=True)
class Stages:
    """The stages of a run so far, in their order, and the kinds of files that each wrote."""

    folder: Path
    names: tuple[str, ...]
    kinds: dict[str, set[str]]

    @classmethod
    def read(cls, folder: Path) -> Stages:
        """From the folder of a ledger."""
        names: list[str] = []
        with suppress(OSError):
            names = list(dict.fromkeys((folder / STAGES).read_text().split()))
        return cls(folder, tuple(names), {name: kinds_of(folder, name) for name in names})

    def writers(self, kind: str) -> list[int]:
        """Positions of the stages that wrote files of a kind."""
        return [n for n, name in enumerate(self.names) if kind in self.kinds[name]]

    def again(self, first: Iterable[int], *, whole: bool) -> dict[int, bool]:
        """What must be done again with some stages; for each whether all of it.

        A task that is done again writes all of its files. Where a later stage wrote one of them
        too, all stages from the first writer to the last must follow: what those between have read
        is there no more.
        """
        found = dict.fromkeys(first, whole)
        every = map(self.writers, set().union(*self.kinds.values()))
        several = [writers for writers in every if len(writers) > 1]
        before: dict[int, bool] = {}
        while before != found:
            before = dict(found)
            for writers in several:
                if any(writers[0] <= n <= writers[-1] for n in found):
                    found |= dict.fromkeys(range(writers[0], writers[-1] + 1), True)
        return found


@dataclass
class Struck:
    """What is struck off a ledger and not done again yet, kept beside it.

    Parameters
    ----------
    path
        The file.
    tasks
        For each stage the damage: numbers in the name of the file, first voxel of the chunk.
    seen
        How often files of a kind were found damaged.
    """

    path: Path
    tasks: dict[str, list[tuple[list[int], list[int] | None]]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Struck:
        """From the folder of a ledger."""
        path = folder / STRUCK
        with suppress(OSError, ValueError, KeyError):
            content = json.loads(path.read_text())
            return cls(path, content["tasks"], content["seen"])
        return cls(path)

    def write(self) -> None:
        """Into its file."""
        self.path.write_text(json.dumps({"tasks": self.tasks, "seen": self.seen}) + "\n")


def kinds_of(folder: Path, stage: str) -> set[str]:
    """Kinds of files that a stage wrote, as far as its ledger says."""
    with suppress(OSError, ValueError):
        return set(json.loads((folder / f"{stage}.kinds.json").read_text()))
    return set()


def keep_kinds(folder: Path, stage: str, kinds: set[str]) -> None:
    """Write down what kinds of files a stage writes."""
    (folder / f"{stage}.kinds.json").write_text(json.dumps(sorted(kinds)) + "\n")


def strike_lines(folder: Path, stage: str, items: Sequence[Any]) -> None:
    """Take the lines of those items out of a stage's file that are struck off."""
    struck, path = Struck.read(folder), folder / f"{stage}.jsonl"
    damages = struck.tasks.pop(stage, None)
    if damages is None:
        return
    again: set[int] = set()
    for numbers, at in damages:
        mine = {n for n, item in enumerate(items) if _wrote(item, n, set(numbers), at)}
        again |= mine or set(range(len(items)))
    with suppress(FileNotFoundError):
        first, *lines = path.read_bytes().splitlines(keepends=True)
        kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)[0] not in again]
        path.write_bytes(b"".join([first, *kept]))
    struck.write()


def _wrote(item: Any, position: int, numbers: set[int], at: Sequence[int] | None) -> bool:
    """Whether an item may have written a file with such numbers, or the chunk of a voxel."""
    if at is not None and hasattr(item, "core"):
        core = item.core
        inside = zip(core.start, at[-3:], core.stop, strict=True)
        return all(a <= n < b for a, n, b in inside)
    number = getattr(item, "block", getattr(item, "number", position))
    return at is None and number in numbers


def struck_off(error: DamagedFile) -> DamagedFile:
    """Take damaged files away and strike off what wrote them; the error that says what to do."""
    path = Path(error.path)
    folder = next((p / LEDGER for p in path.parents if (p / LEDGER).is_dir()), None)
    if folder is None:
        return error
    done = "made again"
    inside = path.relative_to(folder.parent).parts
    if inside[0] == INPUTS:  # copied anew by the run that resumes
        shutil.rmtree(folder.parent / INPUTS / inside[1], ignore_errors=True)
    else:
        names = _strike(folder, error)
        if not names:
            return error
        done = f"made again by {', '.join(names)}"
    return DamagedFile(
        error.argument,
        error.came,
        error.allowed,
        "Nothing of yours is lost: pass resume=True (--resume) to go on, and what is damaged is "
        f"{done}; or {BEGIN_ANEW}.",
        path=error.path,
        array=error.array,
        at=error.at,
    )


def _strike(folder: Path, error: DamagedFile) -> list[str]:
    """Strike off the writers of all files that are damaged; gives the stages."""
    stages, struck = Stages.read(folder), Struck.read(folder)
    path, work = Path(error.path), folder.parent
    gone = not path.exists()
    found: dict[int, bool] = {}
    bad = [(path, Path(error.array or path), error.at)]
    bad += [(other, other, None) for other in cut_files(work) if other != path]
    for number, (file, of, at) in enumerate(bad):
        kind = kind_of(of.relative_to(work))
        known = struck.seen.get(kind, 0)
        if number == 0:
            struck.seen[kind] = known + 1
            if known > 2:
                return []
        # Once more, or with all that went before it removed: the tasks of one block do not do.
        like = _family(kind) if gone and number == 0 else None
        writers = [n for n in range(len(stages.names)) if _is_writer(stages, n, kind, like)]
        again = stages.again(writers, whole=bool(like) or known > 0)
        for stage, whole in again.items():
            found[stage] = found.get(stage, False) or whole
            if not whole:
                first = None if at is None else list(at)
                entry = ([int(n) for n in re.findall(r"\d+", file.name)], first)
                struck.tasks.setdefault(stages.names[stage], []).append(entry)
    struck.tasks = {s: v for s, v in struck.tasks.items() if not found.get(_at(stages, s), False)}
    struck.write()
    for stage, whole in found.items():
        if whole:
            (folder / f"{stages.names[stage]}.jsonl").unlink(missing_ok=True)
    for file, _, _ in bad:
        file.unlink(missing_ok=True)
    return [stages.names[stage] for stage in sorted(found)]


def _at(stages: Stages, stage: str) -> int:
    return stages.names.index(stage) if stage in stages.names else -1


def _family(kind: str) -> str:
    return re.sub(r"\d+", "#", kind)


def _is_writer(stages: Stages, stage: int, kind: str, like: str | None) -> bool:
    kinds = stages.kinds[stages.names[stage]]
    return kind in kinds if like is None else any(_family(k) == like for k in kinds)


def cut_files(work: Path) -> Iterator[Path]:
    """Files between stages that are shorter than they say; a quick look, not at their content."""
    for path in work.rglob("*.np[yz]"):
        with suppress(FileNotFoundError):
            if not (_whole_array(path) if path.suffix == ".npy" else zipfile.is_zipfile(path)):
                yield path


def _whole_array(path: Path) -> bool:
    """Whether a .npy file has as many bytes as its header says."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # of arrays without any value too
        try:
            return bool(np.load(path, allow_pickle=False).size == 0)
        except (ValueError, EOFError):
            return False
    except EOFError:
        return False
    return True


@contextmanager
def damage_told() -> Iterator[None]:
    """Strike off the ledger what wrote a file that is found damaged, and say what to do."""
    try:
        yield
    except DamagedFile as error:
        raise struck_off(error) from error
