"""Bad input is refused before any work, in words that help, and nothing on disk is touched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import pytest
import zarr

import topo_dask
from topo_dask import errors
from topo_dask.errors import (
    BackendUnavailable,
    InputIsGroup,
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    OutputExists,
    OutputNotWritable,
    TopoError,
)
from topo_dask.storage import create_array

SHAPE = (4, 5, 6)
LABELS = np.zeros(SHAPE, dtype=np.uint16)
LABELS[1:3, 1:4, 1:5] = 300
NEGATIVE = LABELS.astype(np.int32)
NEGATIVE[3, 4, 5] = -7
FLOW = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
MASK = LABELS > 0

# Each of our exceptions is also the builtin that a caller would expect.
BUILTIN: dict[type[TopoError], type[Exception]] = {
    InvalidArgument: ValueError,
    InvalidType: TypeError,
    InvalidData: ValueError,
    InputNotFound: FileNotFoundError,
    InputIsGroup: ValueError,
    OutputExists: FileExistsError,
    OutputNotWritable: PermissionError,
    BackendUnavailable: RuntimeError,
}


def with_value(value: float, *, at: tuple[int, ...] = (1, 3, 4, 5)) -> np.ndarray:
    flow = FLOW.copy()
    flow[at] = value
    return flow


def store(path: Path, values: np.ndarray) -> Path:
    chunks = tuple(max(1, n // 2) for n in values.shape)
    array = zarr.create_array(str(path), shape=values.shape, chunks=chunks, dtype=values.dtype)
    if values.size:
        array[...] = values
    return path


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad stores, and `out.zarr`, a result of ours."""
    folder = tmp_path_factory.mktemp("disk")
    store(folder / "labels.zarr", LABELS)
    store(folder / "flow.zarr", FLOW)
    store(folder / "mask.zarr", MASK)
    store(folder / "plane.zarr", LABELS[0])
    store(folder / "channels.zarr", FLOW[:2])
    store(folder / "other shape.zarr", np.ones((4, 5, 7), np.uint8))
    store(folder / "float.zarr", LABELS.astype(np.float32))
    store(folder / "complex.zarr", LABELS.astype(np.complex64))
    store(folder / "complex flow.zarr", FLOW.astype(np.complex64))
    store(folder / "empty.zarr", np.zeros((0, 5, 6), np.uint8))
    group = zarr.create_group(str(folder / "group.zarr"))
    group.create_array("labels/s0", shape=(2, 2, 2), dtype="u1")
    group.create_array("raw", shape=(9, 8, 7), dtype="u2")
    (folder / "file.txt").write_text("x")
    (folder / "broken.zarr").mkdir()
    (folder / "broken.zarr" / "zarr.json").write_text("{")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("do not lose me")
    topo_dask.segment(FLOW, folder / "done.zarr", cluster="sync")
    return folder


def tree(path: Path) -> dict[str, Any]:
    """Every file below a directory, when it was written, and what is in it."""
    return {
        p.relative_to(path).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
        if p.is_file()
        else None
        for p in sorted(path.rglob("*"))
    }


@contextmanager
def refused(
    disk: Path, error: type[TopoError], argument: str, *words: str, untouched: bool = True
) -> Iterator[pytest.ExceptionInfo[TopoError]]:
    """The block raises this error, in words that help, and changes nothing on disk."""
    before = tree(disk)
    with pytest.raises(error) as caught:
        yield caught
    raised = caught.value
    assert type(raised) is error
    assert isinstance(raised, BUILTIN[error])
    assert raised.argument == argument
    text = str(raised)
    # The argument, what came, what is allowed, what to do.
    assert re.fullmatch(rf"{argument}: got (.|\n)+; allowed: (.|\n)+\. (.|\n)+\.?", text), text
    assert raised.do, text
    for word in words:
        assert word in text
    if untouched:
        assert tree(disk) == before


class Bad(NamedTuple):
    """Something that is no labels, no flow or no mask, and how that is said."""

    value: Any
    error: type[TopoError]
    words: tuple[str, ...] = ()


def given(bad: Bad, disk: Path) -> Any:
    return disk / bad.value if isinstance(bad.value, str) and "://" not in bad.value else bad.value


UNKNOWN = da.from_array(LABELS, chunks=2)[da.from_array(np.array([1, 0, 1, 1], bool), chunks=2)]

# What is wrong with any array, whatever it stands for. Text is the name of a file on disk.
NO_ARRAY = {
    "nothing": Bad(None, InvalidType, ("NoneType",)),
    "number": Bad(3, InvalidType, ("int",)),
    "list": Bad(LABELS.tolist(), InvalidType, ("list", "numpy.asarray")),
}
NO_STORE = {
    "missing": Bad("nonesuch.zarr", InputNotFound, ("nonesuch.zarr", "not there")),
    "missing in a group": Bad("group.zarr/labels/s7", InputNotFound, ("labels/s7", "holds s0")),
    "file": Bad("file.txt", InputNotFound, ("a file, not a zarr directory",)),
    "broken": Bad("broken.zarr", InputNotFound, ("cannot be read as zarr",)),
    "unknown protocol": Bad("nonesuch://a/b.zarr", InputNotFound, ("nonesuch",)),
    "group": Bad("group.zarr", InputIsGroup, ("labels/s0 (2x2x2 uint8)", "raw (9x8x7 uint16)")),
}
NO_LABELS = {
    "2 axes": Bad(LABELS[0], InvalidArgument, ("(5, 6)", "3 axes", "z, y, x")),
    "4 axes": Bad(LABELS[None], InvalidArgument, ("(1, 4, 5, 6)", "3 axes", "z, y, x")),
    "float": Bad(LABELS.astype(np.float32), InvalidType, ("float32", "integer", "astype")),
    "complex": Bad(LABELS.astype(np.complex64), InvalidType, ("complex64", "integer")),
    "objects": Bad(LABELS.astype(object), InvalidType, ("object", "integer")),
    "text": Bad(LABELS.astype("U3"), InvalidType, ("<U3", "integer")),
    "times": Bad(LABELS.astype("M8[s]"), InvalidType, ("datetime64", "integer")),
    "no voxels": Bad(np.zeros((3, 0, 4), np.uint8), InvalidArgument, ("(3, 0, 4)",)),
    "masked": Bad(np.ma.masked_equal(LABELS, 300), InvalidType, ("MaskedArray", "filled")),
    "dask of 2 axes": Bad(da.from_array(LABELS[0]), InvalidArgument, ("(5, 6)", "3 axes")),
    "dask of floats": Bad(da.zeros(SHAPE), InvalidType, ("float64", "integer")),
    "dask of no voxels": Bad(da.zeros((0, 2, 2), dtype="u1"), InvalidArgument, ("(0, 2, 2)",)),
    "dask of unknown shape": Bad(UNKNOWN, InvalidArgument, ("compute_chunk_sizes()",)),
    "store of 2 axes": Bad("plane.zarr", InvalidArgument, ("(5, 6)", "plane.zarr", "3 axes")),
    "store of floats": Bad("float.zarr", InvalidType, ("float32", "integer")),
    "store of complex": Bad("complex.zarr", InvalidType, ("complex64", "integer")),
    "store of no voxels": Bad("empty.zarr", InvalidArgument, ("(0, 5, 6)", "empty.zarr")),
}
NO_FLOW = {
    "3 axes": Bad(FLOW[0], InvalidArgument, ("(4, 5, 6)", "4 axes", "3 components")),
    "5 axes": Bad(FLOW[None], InvalidArgument, ("(1, 3, 4, 5, 6)", "4 axes")),
    "2 components": Bad(FLOW[:2], InvalidArgument, ("(2, 4, 5, 6)", "3 components")),
    "components last": Bad(np.moveaxis(FLOW, 0, -1), InvalidArgument, ("moveaxis",)),
    "integers": Bad(FLOW.astype(np.int32), InvalidType, ("int32", "float32")),
    "complex": Bad(FLOW.astype(np.complex64), InvalidType, ("complex64", "float32")),
    "objects": Bad(FLOW.astype(object), InvalidType, ("object", "float32")),
    "long double": Bad(FLOW.astype(np.longdouble), InvalidType, ("float64", "astype")),
    "no voxels": Bad(np.zeros((3, 0, 2, 2), np.float32), InvalidArgument, ("(3, 0, 2, 2)",)),
    "dask of integers": Bad(da.zeros((3, *SHAPE), dtype="i4"), InvalidType, ("int32",)),
    "store of 2 components": Bad("channels.zarr", InvalidArgument, ("(2, 4, 5, 6)",)),
    "store of 3 axes": Bad("labels.zarr", InvalidArgument, ("(4, 5, 6)", "labels.zarr", "4 axes")),
    "store of complex": Bad("complex flow.zarr", InvalidType, ("complex64",)),
}
NO_MASK = {
    "2 axes": Bad(MASK[0], InvalidArgument, ("(5, 6)", "3 axes")),
    "complex": Bad(MASK.astype(np.complex64), InvalidType, ("complex64", "bool")),
    "objects": Bad(MASK.astype(object), InvalidType, ("object", "bool")),
    "text": Bad(MASK.astype("U1"), InvalidType, ("<U1", "bool")),
    "no voxels": Bad(np.zeros((4, 5, 0), bool), InvalidArgument, ("(4, 5, 0)",)),
    "another shape": Bad(np.ones((4, 5, 7), bool), InvalidArgument, ("(4, 5, 7)", "(4, 5, 6)")),
    "store of another shape": Bad("other shape.zarr", InvalidArgument, ("(4, 5, 7)",)),
    "store of complex": Bad("complex.zarr", InvalidType, ("complex64",)),
}


def cases(*tables: dict[str, Bad], stores: bool = True) -> Any:
    """All cases of some tables as parameters."""
    rows = [
        pytest.param(bad, id=name)
        for table in tables
        for name, bad in table.items()
        if stores or not isinstance(bad.value, str)
    ]
    return pytest.mark.parametrize("bad", rows)


# --------------------------------------------------------------------------------- the arrays


@cases(NO_ARRAY, NO_STORE, NO_LABELS)
def test_labels_that_are_none(disk: Path, bad: Bad) -> None:
    labels = given(bad, disk)
    with refused(disk, bad.error, "labels", *bad.words):
        topo_dask.flows(labels, disk / "out.zarr")
    with refused(disk, bad.error, "truth"):
        topo_dask.compare(labels, disk / "labels.zarr")
    with refused(disk, bad.error, "labels"):
        topo_dask.compare(disk / "labels.zarr", labels)


@cases(NO_ARRAY, NO_LABELS, stores=False)
def test_labels_in_memory_that_are_none(disk: Path, bad: Bad) -> None:
    with refused(disk, bad.error, "instance_mask", *bad.words):
        topo_dask.generate_diffusion_flows(bad.value)
    with refused(disk, bad.error, "instance_mask", *bad.words):
        topo_dask.generate_direct_flows(bad.value)
    with refused(disk, bad.error, "labels", *bad.words):
        topo_dask.instance_table(bad.value)


@cases(NO_ARRAY, NO_STORE, NO_FLOW)
def test_flows_that_are_none(disk: Path, bad: Bad) -> None:
    with refused(disk, bad.error, "flows", *bad.words):
        topo_dask.segment(given(bad, disk), disk / "out.zarr")


@cases(NO_ARRAY, NO_FLOW, stores=False)
def test_flows_in_memory_that_are_none(disk: Path, bad: Bad) -> None:
    with refused(disk, bad.error, "flow", *bad.words):
        topo_dask.track_flows(MASK, bad.value, 3)
    with refused(disk, bad.error, "flow", *bad.words):
        topo_dask.postprocess_single(MASK, bad.value)


@cases({k: v for k, v in NO_ARRAY.items() if k != "nothing"}, NO_STORE, NO_MASK)
def test_foregrounds_that_are_none(disk: Path, bad: Bad) -> None:
    with refused(disk, bad.error, "foreground", *bad.words):
        topo_dask.segment(
            disk / "flow.zarr", disk / "out.zarr", foreground=given(bad, disk), cluster="sync"
        )


@cases({k: v for k, v in NO_ARRAY.items() if k != "nothing"}, NO_MASK, stores=False)
def test_masks_in_memory_that_are_none(disk: Path, bad: Bad) -> None:
    # Where the two shapes differ, the flow is the one that is named.
    argument = "flow" if bad is NO_MASK["another shape"] else "sem_mask"
    with refused(disk, bad.error, argument, *bad.words):
        topo_dask.track_flows(bad.value, FLOW, 3)
    with refused(disk, bad.error, argument, *bad.words):
        topo_dask.postprocess_single(bad.value, FLOW)
    with refused(disk, bad.error, "spatial_mask", *bad.words):
        topo_dask.generate_diffusion_flows(LABELS, spatial_mask=bad.value)
    with refused(disk, bad.error, "spatial_mask", *bad.words):
        topo_dask.generate_direct_flows(LABELS, spatial_mask=bad.value)
    for stack in (LABELS[None], da.from_array(LABELS[None])):
        with refused(disk, bad.error, "spatial_mask", *bad.words):
            topo_dask.compute_flow_targets(stack, ["nuc"], None, 8, spatial_mask=bad.value)


@cases({k: v for k, v in NO_ARRAY.items() if k != "nothing"}, NO_STORE, NO_MASK)
def test_spatial_masks_that_are_none(disk: Path, bad: Bad) -> None:
    mask = given(bad, disk)
    how: dict[str, Any] = {"spatial_mask": mask, "cluster": "sync"}
    with refused(disk, bad.error, "spatial_mask", *bad.words):
        topo_dask.flows(disk / "labels.zarr", disk / "out.zarr", **how)
    with refused(disk, bad.error, "spatial_mask", *bad.words):
        stack = LABELS[None]
        topo_dask.flow_targets(
            stack, disk / "out.zarr", class_names=["nuc"], resolution_nm=8, **how
        )


def test_volumes_of_two_shapes_are_not_compared(disk: Path) -> None:
    with refused(disk, InvalidArgument, "labels", "(4, 5, 7)", "(4, 5, 6)"):
        topo_dask.compare(disk / "labels.zarr", disk / "other shape.zarr")


# ------------------------------------------------------------------- negative labels and NaN


def test_negative_labels_in_memory(disk: Path) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "labels": lambda: topo_dask.flows(NEGATIVE, disk / "out.zarr"),
        "instance_mask": lambda: topo_dask.generate_diffusion_flows(NEGATIVE),
        "instance_mask ": lambda: topo_dask.generate_direct_flows(NEGATIVE),
        "truth": lambda: topo_dask.compare(NEGATIVE, LABELS),
    }
    for argument, call in calls.items():
        with refused(disk, InvalidData, argument.strip(), "-7"):
            call()


@pytest.mark.parametrize("make", ["diffusion", "direct"])
def test_negative_labels_of_dask_arrays(disk: Path, make: str) -> None:
    lazy = getattr(topo_dask, f"generate_{make}_flows")(da.from_array(NEGATIVE, chunks=2))
    with refused(disk, InvalidData, "labels", "-7", "(2, 4, 4)"):
        lazy.compute(scheduler="sync")


@contextmanager
def unpublished(folder: Path, *words: str, error: Any = InvalidData) -> Iterator[None]:
    """A run fails while it runs: inputs and the earlier output stay, and nothing is published."""

    def results() -> dict[str, Any]:
        return {k: v for k, v in tree(folder).items() if not k.startswith("out.zarr.work")}

    before = results()
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert results() == before


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("cluster", ["sync", "threads"])
def test_negative_labels_on_disk_are_found_while_running(
    tmp_path: Path, cluster: str, there: bool
) -> None:
    labels = store(tmp_path / "labels.zarr", NEGATIVE)
    options: dict[str, Any] = {"blocks": (2, 5, 3), "cluster": cluster}
    if there:
        topo_dask.flows(LABELS, tmp_path / "out.zarr", **options)
        options["overwrite"] = True
    with unpublished(tmp_path, "labels: got the negative label -7", "(2, 0, 3)"):
        topo_dask.flows(labels, tmp_path / "out.zarr", **options)
    with unpublished(tmp_path, "labels: got the id -7", "[2:4, 0:5, 3:6]"):
        topo_dask.compare(LABELS, labels, blocks=(2, 5, 3), cluster=cluster)


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_flows_that_are_not_finite_are_found_while_running(
    tmp_path: Path, value: float, there: bool
) -> None:
    flow = with_value(value)
    flow[0, 3, 4, 5] = -value  # the two of them add up to NaN, which must not be all that is said
    source = store(tmp_path / "flow.zarr", flow)
    options: dict[str, Any] = {"blocks": (2, 5, 3), "halo": 0, "cluster": "threads"}
    if there:
        topo_dask.segment(FLOW, tmp_path / "out.zarr", min_size=1, **options)
        options["overwrite"] = True
    named = ("flows: got ", f"{-value} at voxel (3, 4, 5)", "block [2:4, 0:5, 3:6]", "finite")
    with unpublished(tmp_path, *named):
        topo_dask.segment(source, tmp_path / "out.zarr", **options)
    # Mended, the run goes on from what it had.
    zarr.open_array(str(source))[:, 3, 4, 5] = 0
    options.pop("overwrite", None)
    topo_dask.segment(source, tmp_path / "out.zarr", resume=True, **options)
    assert not (tmp_path / "out.zarr.work").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_flows_in_memory_that_are_not_finite(disk: Path, value: float) -> None:
    flow = with_value(value)
    with refused(disk, InvalidData, "flow", f"{value} at voxel (3, 4, 5), component y"):
        topo_dask.track_flows(MASK, flow, 3)
    with refused(disk, InvalidData, "flow", f"{value} at voxel (3, 4, 5), component y"):
        topo_dask.postprocess_single(MASK, flow)
    chunks = (3, 2, 5, 3)
    lazy = topo_dask.postprocess_single(
        da.from_array(MASK, chunks=chunks[1:]), da.from_array(flow, chunks=chunks), n_steps=0
    )
    with refused(disk, InvalidData, "flow", "voxel (3, 4, 5)", "block [2:4, 0:5, 3:6]"):
        lazy.compute(scheduler="sync")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_masks_may_be_of_any_real_numbers(dtype: Any) -> None:
    mask = MASK.astype(dtype)
    expected = topo_dask.postprocess_single(MASK, FLOW, min_size=1)
    for wrap in (np.asarray, da.from_array):
        found = topo_dask.postprocess_single(wrap(mask), wrap(FLOW), min_size=1)
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_foreground_that_is_no_number(tmp_path: Path) -> None:
    mask = MASK.astype(np.float16)
    mask[3, 4, 5] = np.nan
    with pytest.raises(InvalidData, match=r"sem_mask: got nan at voxel \(3, 4, 5\)"):
        topo_dask.track_flows(mask, FLOW, 3)
    with pytest.raises(InvalidData, match=r"sem_mask: got nan at voxel \(3, 4, 5\)"):
        topo_dask.postprocess_single(mask, FLOW)
    lazy = topo_dask.postprocess_single(da.from_array(mask, chunks=(2, 5, 3)), FLOW, n_steps=0)
    with pytest.raises(InvalidData, match=r"sem_mask: .*\(3, 4, 5\).* \[2:4, 0:5, 3:6\]"):
        lazy.compute(scheduler="sync")
    options: dict[str, Any] = {"foreground": mask, "blocks": (2, 5, 3), "cluster": "threads"}
    with unpublished(tmp_path, "foreground: got nan", "(3, 4, 5)", "[2:4, 0:5, 3:6]"):
        topo_dask.segment(FLOW, tmp_path / "out.zarr", **options)


# --------------------------------------------------------------------------------- the settings

BLOCKS = [
    ((4, 4), InvalidArgument),
    ((4, 4, 4, 4), InvalidArgument),
    ((), InvalidArgument),
    ((0, 4, 4), InvalidArgument),
    ((4, -1, 4), InvalidArgument),
    (0, InvalidArgument),
    (-3, InvalidArgument),
    ((2.5, 2, 2), InvalidType),
    (1.5, InvalidType),
    ("64", InvalidType),
    (True, InvalidType),
]


@pytest.mark.parametrize(("blocks", "error"), BLOCKS, ids=str)
def test_blocks(disk: Path, blocks: Any, error: type[TopoError]) -> None:
    words = (repr(blocks), "3 of them, in the order z, y, x")
    with refused(disk, error, "blocks", *words):
        topo_dask.flows(disk / "labels.zarr", disk / "out.zarr", blocks=blocks)
    with refused(disk, error, "blocks", *words):
        topo_dask.segment(disk / "flow.zarr", disk / "out.zarr", blocks=blocks)
    with refused(disk, error, "blocks", *words):
        topo_dask.compare(disk / "labels.zarr", disk / "labels.zarr", blocks=blocks)


NAN, INFINITY = float("nan"), float("inf")
SEGMENT_SETTINGS = [
    *[("n_steps", v, InvalidArgument) for v in (-1, 1.5, 2**31, 10**400, NAN, INFINITY)],
    *[("n_steps", v, InvalidType) for v in ("10", None, [], True)],
    *[("step_size", v, InvalidArgument) for v in (0, 0.0, -0.5, NAN, INFINITY, 1e39, 1e-50)],
    ("step_size", "1", InvalidType),
    *[("convergence_radius", v, InvalidArgument) for v in (0, -4.0, NAN, INFINITY, 1e300, 1e-300)],
    ("convergence_radius", None, InvalidType),
    *[("min_size", v, InvalidArgument) for v in (-1, 0.5, NAN, 2**63)],
    ("min_size", "50", InvalidType),
    *[("group", v, InvalidArgument) for v in (0, 4, -1, "1", None, 1.5)],
]
RUN_SETTINGS = [
    *[("cluster", v, InvalidArgument) for v in ("nonesuch", "")],
    ("cluster", 5, InvalidType),
    *[("zarr_format", v, InvalidArgument) for v in (1, 4, "3", None)],
    *[(name, "no", InvalidType) for name in ("resume", "overwrite", "ignore_memory")],
    ("work_dir", 5, InvalidType),
    ("work_dir", "s3://bucket/work", InvalidArgument),
    ("work_dir", "file.txt", OutputNotWritable),
]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *SEGMENT_SETTINGS,
        *RUN_SETTINGS,
        *[("halo", v, InvalidArgument) for v in (-1, 1.5, NAN)],
        ("halo", "16", InvalidType),
        *[(name, "no", InvalidType) for name in ("fill_holes", "keep_evidence")],
        *[("threshold", v, InvalidArgument) for v in (NAN, INFINITY)],
        ("threshold", "0.5", InvalidType),
    ],
)
def test_settings_of_segment(disk: Path, argument: str, value: Any, error: type[TopoError]) -> None:
    value = disk / value if value == "file.txt" else value
    with refused(disk, error, argument):
        topo_dask.segment(
            disk / "flow.zarr", disk / "out.zarr", **{"cluster": "sync", argument: value}
        )


@pytest.mark.parametrize(("argument", "value", "error"), SEGMENT_SETTINGS)
@pytest.mark.parametrize("wrap", [np.asarray, da.from_array], ids=["numpy", "dask"])
def test_settings_of_the_functions_on_arrays(
    disk: Path, wrap: Any, argument: str, value: Any, error: type[TopoError]
) -> None:
    with refused(disk, error, argument):
        topo_dask.postprocess_single(wrap(MASK), wrap(FLOW), **{argument: value})
    if argument in ("n_steps", "step_size"):
        with refused(disk, error, argument):
            topo_dask.track_flows(wrap(MASK), wrap(FLOW), **{"n_steps": 3, argument: value})
    if argument in ("convergence_radius", "min_size"):
        coords = wrap(np.argwhere(MASK))
        options = {"convergence_radius": 4.0, "min_size": 1, argument: value}
        with refused(disk, error, argument):
            topo_dask.cluster_convergence(coords, coords.astype(float), SHAPE, **options)


FLOW_SETTINGS = [
    *[("n_iter", v, InvalidArgument) for v in (-1, 1.5, NAN, 2**31, 10**20)],
    *[("n_iter", v, InvalidType) for v in ("200", None, True)],
    *[("adaptive_iters", v, InvalidType) for v in ("no", None, 1)],
    *[("adaptive_factor", v, InvalidArgument) for v in (0, -6, INFINITY)],
    *[("tolerance", v, InvalidArgument) for v in (0, 1, -1e-4, NAN)],
    *[("context", v, InvalidArgument) for v in (-1, 1.5)],
    *[("context", v, InvalidType) for v in ("all", None)],
    *[("potential", v, InvalidArgument) for v in ("nonesuch", None, ["heat"])],
    *[("origin", v, InvalidArgument) for v in ((-1, 0, 0), (1, 1), (), (0, 2**31, 0), 10**20)],
    *[("origin", v, InvalidType) for v in ("x", (0, 0, 0.5))],
]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *FLOW_SETTINGS,
        *RUN_SETTINGS,
        *[("method", v, InvalidArgument) for v in ("nonesuch", None)],
        *[("dtype", v, InvalidArgument) for v in ("float64", "int8", None)],
        *[("overlap", v, InvalidArgument) for v in (-1, (1, 1), 3)],
        *[("overlap", v, InvalidType) for v in ("x", 0.5)],
    ],
)
def test_settings_of_flows(disk: Path, argument: str, value: Any, error: type[TopoError]) -> None:
    value = disk / value if value == "file.txt" else value
    options = {"cluster": "sync", "blocks": 2, argument: value}
    with refused(disk, error, argument):
        topo_dask.flows(disk / "labels.zarr", disk / "out.zarr", **options)


@pytest.mark.parametrize(("argument", "value", "error"), FLOW_SETTINGS)
@pytest.mark.parametrize("wrap", [np.asarray, da.from_array], ids=["numpy", "dask"])
def test_settings_of_diffusion_flows(
    disk: Path, wrap: Any, argument: str, value: Any, error: type[TopoError]
) -> None:
    with refused(disk, error, argument):
        topo_dask.generate_diffusion_flows(wrap(LABELS), **{argument: value})


def test_what_is_no_table_of_instances(disk: Path) -> None:
    for wrap in (np.asarray, da.from_array):
        with refused(disk, InvalidType, "instances", "str", "read_instance_table"):
            topo_dask.generate_diffusion_flows(wrap(LABELS), instances="table.npz")  # type: ignore[arg-type]
    filled = topo_dask.instance_table(np.ones(SHAPE, np.uint8))
    with refused(disk, InvalidArgument, "instances", "[300]"):
        topo_dask.generate_diffusion_flows(LABELS, instances=filled)
    with refused(disk, InvalidArgument, "potential", "coordinate, heat, poisson"):
        topo_dask.generate_diffusion_flows(LABELS, potential=np.array(["heat", "heat"]))  # type: ignore[arg-type]


def test_heat_of_many_iterations_is_not_made_in_rounds(disk: Path) -> None:
    how = {"potential": "heat", "n_iter": 2000, "adaptive_iters": False, "cluster": "sync"}
    with refused(disk, InvalidArgument, "rounds", "781", "heat"):
        topo_dask.flows(LABELS, disk / "out.zarr", rounds=50, **how)


def test_resume_and_overwrite_exclude_each_other(disk: Path) -> None:
    for run, source in ((topo_dask.flows, "labels.zarr"), (topo_dask.segment, "flow.zarr")):
        with refused(disk, InvalidArgument, "overwrite", "resume"):
            run(disk / source, disk / "out.zarr", resume=True, overwrite=True)


def test_tables_of_positions(disk: Path) -> None:
    coords = np.argwhere(MASK)
    ends = coords.astype(float)

    def cluster(coords: Any = coords, ends: Any = ends, shape: Any = SHAPE) -> Any:
        return topo_dask.cluster_convergence(coords, ends, shape, 4.0, 1)

    assert cluster().max() == 1
    lengths = f"({len(coords)}, 3)"
    with refused(disk, InvalidArgument, "final_positions", "(3, 3)", lengths):
        cluster(ends=ends[:3])
    with refused(disk, InvalidArgument, "fg_coords", f"({len(coords)}, 2)", "[N, 3]"):
        cluster(coords=coords[:, :2])
    with refused(disk, InvalidType, "fg_coords", "float64"):
        cluster(coords=ends)
    with refused(disk, InvalidType, "final_positions", "complex128"):
        cluster(ends=ends.astype(complex))
    with refused(disk, InvalidType, "fg_coords", "list"):
        cluster(coords=coords.tolist())
    for moved in (coords + 4, coords - 2):
        with refused(disk, InvalidData, "fg_coords", "(4, 5, 6)"):
            cluster(coords=moved)
    for value in (np.nan, np.inf):
        with refused(disk, InvalidData, "final_positions", "NaN or infinite"):
            cluster(ends=np.where(ends == ends[0], value, ends))
    with refused(disk, InvalidArgument, "volume_shape"):
        cluster(shape=(4, 5))


def test_tiles(disk: Path) -> None:
    tiles = topo_dask.compute_subcrop_slices((6, 5), (4, 4), (2, 2))
    arrays = [np.ones((3, 4, 4), np.float32)] * len(tiles)

    def stitch(tiles: Any = tiles, arrays: Any = arrays, shape: Any = (6, 5)) -> Any:
        return topo_dask.stitch_flows(shape, tiles, arrays)

    assert stitch().shape == (3, 6, 5)
    for bad in ([], arrays[1:]):
        with refused(disk, InvalidArgument, "arrays", f"{len(bad)} arrays"):
            stitch(arrays=bad)
    with refused(disk, InvalidArgument, "arrays", "(3, 4, 3)", "tile 0"):
        stitch(arrays=[a[:, :, 1:] for a in arrays])
    with refused(disk, InvalidArgument, "arrays", "(2, 4, 4)", "(3, 4, 4)"):
        stitch(arrays=[a[:2] for a in arrays])
    with refused(disk, InvalidType, "arrays", "complex64"):
        stitch(arrays=[a.astype(np.complex64) for a in arrays])
    with refused(disk, InvalidType, "arrays", "list"):
        stitch(arrays=[a.tolist() for a in arrays])
    with refused(disk, InvalidArgument, "subcrop_slices"):
        stitch(shape=(6, 4))
    with refused(disk, InvalidType, "subcrop_slices"):
        stitch(tiles=[(slice(None), slice(None))] * len(tiles))
    with refused(disk, InvalidArgument, "slices"):
        topo_dask.boundary_flags((slice(0, 4),), (6, 5))
    with refused(disk, InvalidArgument, "at_volume_boundary", "4 flags"):
        topo_dask.cosine_blend_weight((4, 4), [True])
    for crop, overlap, argument in (
        ((4,), 2, "crop_size"),
        ((4, 0), 2, "crop_size"),
        (4, 4, "overlap"),
    ):
        with refused(disk, InvalidArgument, argument):
            topo_dask.compute_subcrop_slices((6, 5), crop, overlap)
    for call in (topo_dask.build_spatial_mask, topo_dask.cosine_blend_weight):
        with refused(disk, InvalidType, "shape", "7"):
            call(7)
        with refused(disk, InvalidArgument, "shape", "(3, 0)"):
            call((3, 0))


# ---------------------------------------------------------------------------------- the output

RUNS = pytest.mark.parametrize(
    ("run", "source", "argument"),
    [(topo_dask.flows, "labels.zarr", "labels"), (topo_dask.segment, "flow.zarr", "flows")],
    ids=["flows", "segment"],
)


@RUNS
def test_an_output_that_exists(disk: Path, run: Any, source: str, argument: str) -> None:
    for name in ("done.zarr", "mask.zarr", "mine", "file.txt", "group.zarr"):
        with refused(disk, OutputExists, "output", name, "--overwrite", "--resume"):
            run(disk / source, disk / name)
    # What is not a result may not even be replaced.
    for options in ({"overwrite": True}, {"resume": True}):
        for name in ("mine", "file.txt", "group.zarr", "broken.zarr"):
            with refused(disk, OutputExists, "output", name, "remove it yourself"):
                run(disk / source, disk / name, **options)


@RUNS
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_an_output_that_is_an_input(
    disk: Path, run: Any, source: str, argument: str, options: dict[str, Any]
) -> None:
    for kind in (disk / source, str(disk / source), zarr.open_array(str(disk / source), mode="r")):
        with refused(disk, InvalidArgument, "output", "equal to the input", source):
            run(kind, disk / source, **options)
    with refused(disk, InvalidArgument, "output", "inside the input"):
        run(disk / source, disk / source / "result", **options)
    with refused(disk, InvalidArgument, "output", "around the input"):
        run(disk / source, disk, **options)
    with refused(disk, InvalidArgument, "output", "equal to the input"):
        run(disk / source, disk / "mine" / ".." / source, **options)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_an_output_that_is_the_foreground(disk: Path, options: dict[str, Any]) -> None:
    with refused(disk, InvalidArgument, "output", "equal to the input", "mask.zarr"):
        topo_dask.segment(
            disk / "flow.zarr", disk / "mask.zarr", foreground=disk / "mask.zarr", **options
        )


@RUNS
def test_an_output_that_is_no_place(disk: Path, run: Any, source: str, argument: str) -> None:
    for place in ("", "s3://bucket/out.zarr", "a\0b", "/"):
        with refused(disk, InvalidArgument, "output", "a path on a local"):
            run(disk / source, place)
    for place in (None, 5):
        with refused(disk, InvalidType, "output", type(place).__name__):
            run(disk / source, place)
    for place in (disk / "file.txt" / "out.zarr", Path("/proc/out.zarr")):
        with refused(disk, OutputNotWritable, "output", "cannot be written"):
            run(disk / source, place)


def read_only(path: Path, yes: bool) -> bool:
    """Make it read-only or writable, for root too; whether that could be done."""
    if os.geteuid() != 0:
        path.chmod(0o555 if yes else 0o755)
        return True
    if shutil.which("chattr") is None:
        return False
    command = ["chattr", "+i" if yes else "-i", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@RUNS
def test_an_output_that_is_read_only(
    disk: Path, run: Any, source: str, argument: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(disk / "done.zarr", folder / "done.zarr")
    for locked, place, options in (
        (folder, folder / "out.zarr", {}),
        (folder / "done.zarr", folder / "done.zarr", {"overwrite": True}),
    ):
        if not read_only(locked, True):
            pytest.skip("this file system knows nothing read-only for root")
        try:
            with refused(tmp_path, OutputNotWritable, "output", place.name):
                run(disk / source, place, **options)
        finally:
            read_only(locked, False)


# ------------------------------------------------------------------------ small, but not bad


@pytest.mark.parametrize("cluster", ["sync", "threads"])
@pytest.mark.parametrize("labelled", [0, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 5, 6), (1, 1, 9)])
def test_nothing_and_one_voxel_are_volumes(
    tmp_path: Path, shape: tuple[int, ...], labelled: int, cluster: str
) -> None:
    """All background, all one object, a single voxel."""
    labels = np.full(shape, labelled, dtype=np.uint8)
    source = store(tmp_path / "labels.zarr", labels)
    options: dict[str, Any] = {"cluster": cluster, "blocks": (2, 2, 4)}
    for method in ("diffusion", "direct"):
        made = topo_dask.flows(source, tmp_path / f"{method}.zarr", method=method, **options)
        flow = made.array[...]
        assert flow.shape == (3, *shape)
        assert np.isfinite(flow).all()
        assert labelled or not flow.any()
        assert made.details["instances"] == (labelled > 0)
    result = topo_dask.segment(
        tmp_path / "diffusion.zarr",
        tmp_path / "out.zarr",
        foreground=source,
        min_size=1,
        convergence_radius=20,
        **options,
    )
    np.testing.assert_array_equal(result.array[...], (labels > 0).astype(np.uint32))
    assert result.details["instances"] == (labelled > 0)
    assert f"{'x'.join(map(str, shape))} voxels" in repr(result)
    scores = topo_dask.compare(source, result.array, cluster="sync")
    assert scores.same_partition


@pytest.mark.parametrize("wrap", [np.asarray, da.from_array], ids=["numpy", "dask"])
def test_nothing_and_one_voxel_in_memory(wrap: Any) -> None:
    for shape in ((1, 1, 1), (3, 4, 5)):
        labels = np.zeros(shape, dtype=np.int64)
        for flow in (
            topo_dask.generate_diffusion_flows(wrap(labels)),
            topo_dask.generate_direct_flows(wrap(labels)),
        ):
            assert not np.asarray(flow).any()
            assert flow.shape == (3, *shape)
        coords, ends = topo_dask.track_flows(wrap(labels), flow, 5)
        assert np.asarray(coords).shape == np.asarray(ends).shape == (0, 3)
        clusters = topo_dask.cluster_convergence(coords, ends, shape, 4.0, 1)
        assert not np.asarray(clusters).any()
        assert not np.asarray(topo_dask.postprocess_single(wrap(labels), flow)).any()
    one = np.full((1, 1, 1), 2**40)
    assert not np.asarray(topo_dask.generate_direct_flows(wrap(one))).any()
    flow = topo_dask.generate_diffusion_flows(wrap(one))
    assert np.isfinite(np.asarray(flow)).all()
    np.testing.assert_array_equal(
        topo_dask.postprocess_single(wrap(one), flow, min_size=1), [[[1]]]
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_numbers_stored_the_other_way_round_are_numbers(tmp_path: Path, zarr_format: Any) -> None:
    """Big-endian stores, as Java writes them."""
    labels, flow = tmp_path / "labels.zarr", tmp_path / "flow.zarr"
    for path, values in ((labels, LABELS.astype(">u2")), (flow, FLOW.astype(">f4"))):
        array = zarr.create_array(
            str(path), shape=values.shape, dtype=values.dtype, zarr_format=zarr_format
        )
        array[...] = values
    made = topo_dask.flows(labels, tmp_path / "made.zarr", cluster="sync")
    np.testing.assert_array_equal(made.array[...], topo_dask.generate_diffusion_flows(LABELS))
    out = topo_dask.segment(
        flow, tmp_path / "out.zarr", foreground=labels, min_size=1, cluster="sync"
    )
    expected = topo_dask.postprocess_single(LABELS, FLOW, min_size=1)
    np.testing.assert_array_equal(out.array[...], expected)
    for kind in (">u2", ">i8", "<u4"):
        np.testing.assert_array_equal(
            topo_dask.generate_direct_flows(LABELS.astype(kind)),
            topo_dask.generate_direct_flows(LABELS),
        )


def test_every_error_is_a_builtin_too_and_travels() -> None:
    import pickle

    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, TopoError) and error is not TopoError:
            made = error("blocks", "0", "numbers >= 1", "Pass e.g. 64.")
            builtin = (ValueError, TypeError, OSError, RuntimeError, MemoryError)
            assert isinstance(made, builtin)
            again = pickle.loads(pickle.dumps(made))
            assert (type(again), str(again), again.argument) == (type(made), str(made), "blocks")


def test_a_store_of_another_library_is_left_alone(tmp_path: Path) -> None:
    """A zarr array may be replaced when told to; the one next to it is not touched."""
    create_array(tmp_path / "next.zarr", (2, 2, 2), (1, 1, 1), "u1")[...] = 3
    before = tree(tmp_path / "next.zarr")
    create_array(tmp_path / "out.zarr", (2, 2, 2), (1, 1, 1), "u1")[...] = 4
    topo_dask.flows(LABELS, tmp_path / "out.zarr", overwrite=True, cluster="sync")
    assert tree(tmp_path / "next.zarr") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["next.zarr", "out.zarr"]
