"""Storage: inputs are refused before work starts, outputs appear complete or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import topo_dask
from topo_dask.errors import (
    BackendUnavailable,
    InputIsGroup,
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    OutputExists,
    OutputNotWritable,
)
from topo_dask.storage import (
    Geometry,
    Output,
    create_array,
    load_table,
    local_path,
    open_array,
    output_chunks,
    save_table,
    voxel_geometry,
)

SHAPE = (6, 7, 8)
VALUES = np.arange(6 * 7 * 8, dtype=np.uint32).reshape(SHAPE)
GEOMETRY = Geometry((40.0, 32.0, 16.5), (400.0, -3.0, 0.25), "nanometer")


def store(path: Path, values: np.ndarray[Any, Any] = VALUES, **options: Any) -> Path:
    chunks = options.pop("chunks", tuple(max(1, n // 2) for n in values.shape))
    array = create_array(path, values.shape, chunks, values.dtype, **options)
    array[...] = values
    return path


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a directory: names, and what the files hold."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


# ------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2},
        {"zarr_format": 3},
        {"zarr_format": 3, "chunks": (2, 2, 2), "shards": (4, 4, 4)},
    ],
    ids=["v2", "v3", "sharded"],
)
@pytest.mark.parametrize("kind", ["path", "text", "file-url", "array", "store", "relative-array"])
def test_every_kind_of_input_opens(
    tmp_path: Path, options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path / "a b.zarr" / "labels" / "s0", **options)
    monkeypatch.chdir(tmp_path)
    source: Any = {
        "path": path,
        "text": str(path),
        "file-url": path.as_uri(),
        "array": zarr.open_array(str(path)),
        "store": zarr.storage.LocalStore(path),
        "relative-array": zarr.open_array("a b.zarr/labels/s0"),
    }[kind]
    array = open_array(source, argument="labels")
    np.testing.assert_array_equal(array[...], VALUES)
    assert array.shards == options.get("shards")
    # What travels to a worker does not depend on the directory it runs in.
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[...], VALUES)


def test_url_of_another_file_system_opens() -> None:
    url = "memory://test_storage/a.zarr/s0"
    zarr.create_array(url, shape=SHAPE, dtype="uint32")[...] = VALUES
    np.testing.assert_array_equal(open_array(url, argument="labels")[...], VALUES)
    zarr.create_group(
        "memory://test_storage/a.zarr", attributes=multiscales("0.5"), overwrite=False
    )
    assert voxel_geometry(open_array(url, argument="labels")) == GEOMETRY
    with pytest.raises(InputNotFound, match="no zarr array"):
        open_array("memory://test_storage/b.zarr", argument="labels")
    with pytest.raises(InputNotFound, match="nonesuch"):
        open_array("nonesuch://test_storage/b.zarr", argument="labels")


def test_missing_package_for_a_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BackendUnavailable, match=r"topo_dask\[cloud\]") as caught:
        open_array("s3://bucket/labels.zarr", argument="labels")
    assert "s3fs" in str(caught.value)


def test_missing_path_names_what_is_there(tmp_path: Path) -> None:
    store(tmp_path / "a.zarr" / "labels" / "s0")
    zarr.create_group(str(tmp_path / "a.zarr"))
    zarr.create_group(str(tmp_path / "a.zarr" / "labels"))
    with pytest.raises(InputNotFound, match="not there") as caught:
        open_array(tmp_path / "a.zarr" / "labels" / "s1", argument="labels")
    assert str(caught.value).startswith("labels: got ")
    assert "labels holds s0" in str(caught.value)
    with pytest.raises(InputNotFound, match=r"It holds a\.zarr"):
        open_array(tmp_path, argument="labels")
    with pytest.raises(InputNotFound, match="Check the path"):
        open_array("/no/such/place", argument="labels")


def broken(path: Path, how: str) -> None:
    if how == "file":
        path.write_bytes(b"II*\0")
        return
    path.mkdir()
    if how == "v3 text":
        (path / "zarr.json").write_text("{nope")
    elif how == "v2 text":
        (path / ".zarray").write_text("{nope")
    elif how == "keys":
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    elif how == "codec":
        shutil.rmtree(path)
        store(path, zarr_format=2)
        text = (path / ".zarray").read_text()
        (path / ".zarray").write_text(text.replace('"zstd"', '"nonesuch"'))
    elif how == "directory":
        (path / "zarr.json").mkdir()


@pytest.mark.parametrize(
    "how", ["file", "v3 text", "v2 text", "keys", "codec", "directory", "empty"]
)
def test_what_is_not_zarr_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.zarr"
    broken(path, how)
    with pytest.raises(InputNotFound, match=r"^labels: got .*; allowed: .*\. .+"):
        open_array(path, argument="labels")


UNREADABLE = """
import os, sys
from topo_dask.errors import InputNotFound
from topo_dask.storage import open_array

path, locked = sys.argv[1:]
open_array(path, argument="labels")
os.chmod(locked, 0)
if os.geteuid() == 0:  # permissions do not hold for root: go on as nobody
    os.setegid(65534)
    os.seteuid(65534)
try:
    open_array(path, argument="labels")
except InputNotFound as error:
    print(error)
"""


@pytest.mark.parametrize("locked", ["", "zarr.json", ".."])
def test_unreadable_input_is_refused(locked: str) -> None:
    # Not below tmp_path, whose parents are closed to others anyway.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = store(Path(directory) / "dir" / "x.zarr")
        command = [sys.executable, "-c", UNREADABLE, str(path), str(path / locked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (path.parent).chmod(0o755)
        path.chmod(0o755)
    assert done.stdout.startswith("labels: got "), done.stderr
    assert "ermission denied" in done.stdout


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["path", "group", "file-url"])
def test_group_lists_its_arrays(tmp_path: Path, zarr_format: Any, kind: str) -> None:
    root = tmp_path / "a.zarr"
    group = zarr.create_group(str(root), zarr_format=zarr_format)
    labels = group.create_group("labels", attributes=multiscales("0.4"))
    labels.create_array("s0", shape=SHAPE, dtype="uint32")
    group.create_array("raw", shape=(3, *SHAPE), dtype="uint8")
    (root / "notes").mkdir()  # not ours to complain about
    (root / "notes" / "x.txt").write_text("x")
    source: Any = {"path": root, "group": group, "file-url": root.as_uri()}[kind]
    with pytest.raises(InputIsGroup) as caught:
        open_array(source, argument="labels")
    text = str(caught.value)
    assert "labels/s0 (6x7x8 uint32), raw (3x6x7x8 uint8)" in text
    assert ("group['labels/s0']" if kind == "group" else "a.zarr/labels/s0.") in text


def test_stale_consolidated_metadata_does_not_hide_arrays(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    group.create_array("old", shape=SHAPE, dtype="uint32")
    zarr.consolidate_metadata(str(tmp_path / "a.zarr"), zarr_format=2)
    store(tmp_path / "a.zarr" / "new", zarr_format=2)
    with pytest.raises(InputIsGroup, match=r"new \(.*, old \("):
        open_array(tmp_path / "a.zarr", argument="labels")


def test_large_and_empty_groups_have_short_messages(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"))
    with pytest.raises(InputIsGroup, match="No array was found"):
        open_array(group, argument="labels")
    for i in range(20):
        group.create_array(f"{i:02}", shape=(1,), dtype="uint8")
    with pytest.raises(InputIsGroup, match=r"11 \(1 uint8\) and 8 more"):
        open_array(group, argument="labels")


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 4), (3,), r"2 axes, shape \(4, 4\).*allowed: 3 axes \(z, y, x\)"),
        ((3, 4, 4, 4), (3,), "4 axes"),
        ((4, 4, 4), (4,), r"3 axes.*allowed: 4 axes \(channel, z, y, x\)"),
        ((4,), (3, 4), r"allowed: 3 axes \(z, y, x\) or 4 axes"),
        ((4, 0, 4), (3,), r"shape \(4, 0, 4\).*1 or more"),
    ],
)
def test_wrong_rank_and_empty_arrays_are_refused(
    tmp_path: Path, shape: tuple[int, ...], axes: tuple[int, ...], message: str
) -> None:
    path = tmp_path / "a.zarr"
    zarr.create_array(str(path), shape=shape, dtype="uint8", zarr_format=2)
    with pytest.raises(InvalidArgument, match=message):
        open_array(path, argument="labels", axes=axes)


@pytest.mark.parametrize("source", [None, 3, VALUES, [VALUES]])
def test_what_is_no_location_is_refused(source: Any) -> None:
    with pytest.raises(InvalidType, match=r"labels: got .*; allowed: a path, a URL"):
        open_array(source, argument="labels")


def test_odd_paths_are_refused_not_crashed() -> None:
    for source in ("a\0b", "x" * 5000, ""):
        with pytest.raises(InputNotFound):
            open_array(source, argument="labels")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "uint32"])
@pytest.mark.parametrize("left", [0, 12, 0.5, -1])
def test_a_chunk_that_was_cut_is_told(
    tmp_path: Path, zarr_format: Any, dtype: str, left: float
) -> None:
    """Blosc itself reads on behind its end; what is opened for reading goes to workers too."""
    values = np.random.default_rng(0).integers(0, 9, SHAPE).astype(dtype)
    path = store(tmp_path / "a.zarr", values, zarr_format=zarr_format)
    array = pickle.loads(pickle.dumps(open_array(path, argument="a")))
    assert (array[...] == values).all()
    assert array.metadata.to_dict() == zarr.open_array(str(path), mode="r").metadata.to_dict()
    chunk = next(p for p in sorted(path.rglob("*")) if p.name == "1" and p.is_file())
    size = chunk.stat().st_size
    os.truncate(chunk, int(left * size) if left == 0.5 else int(left) % size)
    with pytest.raises((ValueError, RuntimeError), match=r"cut short|decompression"):
        array[...]


def test_an_input_with_a_chunk_of_no_bytes_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", shards=SHAPE, chunks=(3, 7, 8))
    os.truncate(path / "c" / "0" / "0" / "0", 0)
    with pytest.raises(InvalidData, match=r"c/0/0/0'.*0 bytes.*cut off"):
        topo_dask.flows(path, tmp_path / "out.zarr", cluster="sync")


# ----------------------------------------------------------------------------------- geometry


def multiscales(version: str, path: str = "s0", channels: bool = False) -> dict[str, Any]:
    axes: list[dict[str, str]] = [
        {"name": a, "type": "space", "unit": "nanometer"} for a in ("z", "y", "x")
    ]
    first = [{"name": "c", "type": "channel"}] if channels else []
    one, none = [1.0] * channels, [0.0] * channels
    image = {
        "axes": first + axes,
        "datasets": [
            {
                "path": path,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*one, 20.0, 16.0, 8.25]},
                    {"type": "translation", "translation": [*none, 200.0, -1.5, 0.125]},
                ],
            }
        ],
        # Of the whole image, after those of the dataset.
        "coordinateTransformations": [{"type": "scale", "scale": [*one, 2.0, 2.0, 2.0]}],
    }
    if version == "0.4":
        return {"multiscales": [{"version": "0.4", **image}]}
    return {"ome": {"version": "0.5", "multiscales": [image]}}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("path", ["s0", "scales/0"])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("whole_path", [False, True])
def test_geometry_is_read_from_the_group_around(
    tmp_path: Path, version: str, path: str, channels: bool, whole_path: bool
) -> None:
    zarr_format: Any = 2 if version == "0.4" else 3
    group = zarr.create_group(
        str(tmp_path / "a.zarr"),
        zarr_format=zarr_format,
        attributes=multiscales(version, path, channels),
    )
    shape = (3, *SHAPE) if channels else SHAPE
    array: Any = group.create_array(path, shape=shape, dtype="uint32")
    group.create_array("other", shape=shape, dtype="uint32")
    if whole_path:
        array = open_array(tmp_path / "a.zarr" / path, argument="labels", axes=(3, 4))
    assert voxel_geometry(array) == GEOMETRY
    assert voxel_geometry(zarr.open_array(str(tmp_path / "a.zarr" / "other"))) == Geometry()


@pytest.mark.parametrize(
    "damage",
    [
        {"multiscales": 3},
        {"multiscales": []},
        {"multiscales": [{"datasets": [{"path": "s0"}], "axes": ["z", "y", "x"]}]},
        {
            "multiscales": [
                {
                    "axes": [{"name": a, "type": "space"} for a in "zyx"],
                    "datasets": [
                        {
                            "path": "s0",
                            "coordinateTransformations": [{"type": "scale", "scale": [1, "x", 0]}],
                        }
                    ],
                }
            ]
        },
        {"topo_dask": {"geometry": None}},
    ],
)
def test_damaged_metadata_means_no_geometry(tmp_path: Path, damage: dict[str, Any]) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"), attributes=damage)
    array = group.create_array("s0", shape=SHAPE, dtype="uint32", attributes=damage)
    assert voxel_geometry(array) == Geometry()


# -------------------------------------------------------------------------------- new arrays


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=4),
)
def test_no_chunk_lies_in_two_blocks(pairs: list[tuple[int, int]]) -> None:
    blocks, shape = zip(*pairs, strict=True)
    for chunk, block, length in zip(output_chunks(blocks, shape), blocks, shape, strict=True):
        assert 1 <= chunk <= length
        assert block >= length or block % chunk == 0
        assert chunk <= 64 or chunk == block
        assert chunk >= 16 or chunk in (block, length)


def test_chunks_as_documented() -> None:
    assert output_chunks((128, 256, 192), (512, 512, 512)) == (64, 64, 64)
    assert output_chunks((96, 200, 130), (512, 512, 512)) == (48, 50, 26)
    assert output_chunks((1, 257, 300), (512, 512, 512)) == (1, 257, 60)
    assert output_chunks((3, 64, 64, 64), (3, 100, 50, 500)) == (3, 64, 50, 64)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["uint64", "float32"])
def test_created_arrays(tmp_path: Path, zarr_format: Any, dtype: str) -> None:
    array = create_array(tmp_path / "a.zarr", SHAPE, (3, 4, 4), dtype, zarr_format=zarr_format)
    assert array.metadata.zarr_format == zarr_format
    assert array.fill_value == 0
    codec = str(array.compressors[0]).lower()
    assert "zstd" in codec
    assert ("blosc" in codec) == (dtype == "float32")
    array[...] = 0
    files = {p.name for p in (tmp_path / "a.zarr").rglob("*") if p.is_file()}
    assert files <= {"zarr.json", ".zarray", ".zattrs"}  # no chunk of zeros
    array[...] = 1
    chunk = "0/1/1" if zarr_format == 2 else "c/0/1/1"
    assert (tmp_path / "a.zarr" / chunk).is_file()
    if zarr_format == 3:
        assert array.metadata.dimension_names == ("z", "y", "x")


def test_impossible_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="zarr_format: got 4; allowed: 2 or 3"):
        create_array(tmp_path / "a.zarr", SHAPE, SHAPE, "uint8", zarr_format=4)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="shards"):
        create_array(tmp_path / "a.zarr", SHAPE, SHAPE, "uint8", shards=SHAPE, zarr_format=2)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ outputs


def fill(output: Output, values: np.ndarray[Any, Any] = VALUES, **options: Any) -> None:
    output.create(values.shape, (3, 4, 4), values.dtype, **options)[...] = values


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_result_appears_at_once_and_nothing_else_stays(tmp_path: Path, zarr_format: Any) -> None:
    path = tmp_path / "new" / "dir" / "out.zarr"
    output = Output(path)
    assert list(tmp_path.iterdir()) == []  # checking leaves no trace
    fill(output, zarr_format=zarr_format)
    (output.scratch / "endpoints.npz").write_bytes(b"x")
    assert not output.exists
    array = output.publish(geometry=GEOMETRY, attributes={"n_iter": np.int64(200), "at": path})
    assert [p.name for p in path.parent.iterdir()] == ["out.zarr"]
    assert output.exists
    np.testing.assert_array_equal(array[...], VALUES)
    np.testing.assert_array_equal(open_array(path, argument="labels")[...], VALUES)
    assert voxel_geometry(array) == GEOMETRY
    assert array.attrs["topo_dask"]["n_iter"] == 200  # type: ignore[index, call-overload]
    np.testing.assert_array_equal(output.open()[...], VALUES)


@pytest.mark.parametrize("geometry", [GEOMETRY, None])
@pytest.mark.parametrize(
    ("zarr_format", "shards"), [(2, None), (3, None), (3, (6, 8, 8))], ids=["0.4", "0.5", "sharded"]
)
def test_labels_are_valid_ome_zarr(
    tmp_path: Path, zarr_format: Any, shards: Any, geometry: Geometry | None
) -> None:
    from ome_zarr_models import v04, v05

    output = Output(tmp_path / "out.zarr")
    fill(output, zarr_format=zarr_format, shards=shards)
    array = output.publish_labels(geometry=geometry)
    np.testing.assert_array_equal(array[...], VALUES)
    assert voxel_geometry(array) == (geometry or Geometry())

    group = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
    model: Any = (v04 if zarr_format == 2 else v05).ImageLabel.from_zarr(group)
    metadata = model.attributes if zarr_format == 2 else model.ome_attributes
    image = metadata.multiscales[0]
    assert [axis.name for axis in image.axes] == ["z", "y", "x"]
    assert {axis.unit for axis in image.axes} == {geometry.unit if geometry else None}
    assert image.datasets[0].path == "s0"
    scale, translation = image.datasets[0].coordinateTransformations
    assert tuple(scale.scale) == (geometry or Geometry()).scale
    assert tuple(translation.translation) == (geometry or Geometry()).translation
    assert metadata.image_label is not None
    with pytest.raises(InputIsGroup, match=r"Pass one of them, e\.g\. .*out\.zarr/s0"):
        open_array(tmp_path / "out.zarr", argument="labels")
    np.testing.assert_array_equal(output.open()[...], VALUES)
    np.testing.assert_array_equal(Output(output.path, resume=True).open()[...], VALUES)


def test_labels_keep_the_geometry_of_their_flows(tmp_path: Path) -> None:
    flows = Output(tmp_path / "flows.zarr")
    flows.create((3, *SHAPE), (3, 4, 4, 4), "float32")
    published = flows.publish(geometry=GEOMETRY)
    labels = Output(tmp_path / "labels.zarr", inputs=[published])
    fill(labels)
    assert voxel_geometry(labels.publish_labels(geometry=voxel_geometry(published))) == GEOMETRY


def test_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    path = store(tmp_path / "out.zarr")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match=r"already there.*--overwrite.*--resume"):
        Output(path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["publish", "publish_labels"])
def test_overwriting_replaces_at_publication_only(tmp_path: Path, method: str) -> None:
    path = tmp_path / "out.zarr"
    first = Output(path)
    fill(first, VALUES + 1)
    getattr(first, method)()
    old = tree(path)
    output = Output(path, overwrite=True)
    fill(output)
    assert tree(path) == old
    array = getattr(output, method)()
    np.testing.assert_array_equal(array[...], VALUES)
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_overwriting_never_removes_what_is_no_result(tmp_path: Path) -> None:
    home, project = tmp_path / "home", tmp_path / "project.zarr"
    (home / "papers").mkdir(parents=True)
    zarr.create_group(str(project)).create_array("raw", shape=(2,), dtype="uint8")
    file = tmp_path / "file.zarr"
    file.write_text("x")
    before = tree(tmp_path)
    for path in (home, project, file, tmp_path):
        for flags in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputExists, match="neither a zarr array nor"):
                Output(path, **flags)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    output = Output(tmp_path / "empty", overwrite=True)
    fill(output)
    np.testing.assert_array_equal(output.publish()[...], VALUES)


def test_output_that_appears_during_the_run_is_kept(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.zarr")
    fill(output)
    store(tmp_path / "out.zarr", VALUES + 5)
    with pytest.raises(OutputExists, match="appeared during the run"):
        output.publish()
    np.testing.assert_array_equal(zarr.open_array(str(output.path))[...], VALUES + 5)
    assert (tmp_path / "out.zarr.work" / "result" / "s0").is_dir()  # nor is the work lost


@pytest.mark.parametrize("form", ["path", "url", "array", "group-member", "link", "dots"])
@pytest.mark.parametrize("relation", ["equal to", "inside", "around"])
def test_output_may_not_meet_an_input(tmp_path: Path, form: str, relation: str) -> None:
    data = tmp_path / "data"
    path = store(data / "in.zarr" / "s0")
    zarr.create_group(str(data / "in.zarr"))
    (tmp_path / "link").symlink_to(data)
    source: Any = {
        "path": path,
        "url": path.as_uri(),
        "array": zarr.open_array(str(path)),
        "group-member": zarr.open_group(str(data / "in.zarr"))["s0"],
        "link": tmp_path / "link" / "in.zarr" / "s0",
        "dots": data / "in.zarr" / ".." / "in.zarr" / "s0",
    }[form]
    target = {"equal to": path, "inside": path / "c" / "x", "around": path.parent}[relation]
    before = tree(data)
    for place in (target, tmp_path / "link" / target.relative_to(data)):
        with pytest.raises(InvalidArgument, match=f"output: got .*{relation} the input"):
            Output(place, inputs=[source], overwrite=True)
    assert tree(data) == before


def test_output_link_to_an_input_is_seen(tmp_path: Path) -> None:
    path = store(tmp_path / "in.zarr")
    (tmp_path / "out.zarr").symlink_to(path)
    with pytest.raises(InvalidArgument, match="equal to the input"):
        Output(tmp_path / "out.zarr", inputs=[path], overwrite=True)


def test_work_directory_may_not_meet_an_input(tmp_path: Path) -> None:
    path = store(tmp_path / "out.zarr.work" / "in.zarr")
    with pytest.raises(InvalidArgument, match="around the input"):
        Output(tmp_path / "out.zarr", inputs=[path])
    with pytest.raises(InvalidArgument, match="inside the input"):
        Output(tmp_path / "labels.zarr", inputs=[path], work_dir=path)


def test_neighbours_of_an_input_are_fine(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr" / "s0")
    output = Output(tmp_path / "a.zarr" / "s0_flows", inputs=[path, VALUES, "s3://bucket/x.zarr"])
    fill(output)
    output.publish()
    assert sorted(p.name for p in (tmp_path / "a.zarr").iterdir()) == ["s0", "s0_flows"]


def test_linked_output_is_replaced_behind_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    store(tmp_path / "disk" / "real.zarr", VALUES + 1)
    (tmp_path / "out.zarr").symlink_to(tmp_path / "disk" / "real.zarr")
    output = Output(tmp_path / "out.zarr", overwrite=True)
    fill(output)
    output.publish()
    assert (tmp_path / "out.zarr").is_symlink()
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "out.zarr"))[...], VALUES)
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real.zarr"]


def test_unwritable_places_are_refused_for_root_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", Path("/proc"), Path("/sys")):
        if place.exists():
            with pytest.raises(OutputNotWritable, match=r"output: got .* cannot be written \("):
                Output(place / "out.zarr")
    with pytest.raises(OutputNotWritable, match=r"work_dir: got .* cannot be written"):
        Output(tmp_path / "out.zarr", work_dir=tmp_path / "file" / "work")
    with pytest.raises(OutputNotWritable, match="too long"):
        Output(tmp_path / ("x" * 254))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def read_only(path: Path) -> None:
    """Make it read-only for us, root or not; skip the test where that cannot be done."""
    if os.geteuid() != 0:
        path.chmod(0o555)
    elif subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable flag")


def writable(path: Path) -> None:
    if os.geteuid() != 0:
        path.chmod(0o755)
    else:
        subprocess.run(["chattr", "-i", str(path)], capture_output=True, check=False)


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("chattr"), reason="root needs chattr for this"
)
def test_read_only_output_and_parent_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "dir" / "out.zarr")
    for locked, place in [(path, path), (path.parent, path), (path.parent, path.parent / "b.zarr")]:
        read_only(locked)
        try:
            with pytest.raises(OutputNotWritable, match="output: got "):
                Output(place, overwrite=True)
        finally:
            writable(locked)
    np.testing.assert_array_equal(zarr.open_array(str(path))[...], VALUES)
    assert [p.name for p in path.parent.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize("path", ["", "s3://bucket/out.zarr", "a\0b", "/"])
def test_impossible_places_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"output: got .*; allowed: a path on a local"):
        Output(path)


def test_output_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidType, match="output: got NoneType"):
        Output(None)  # type: ignore[arg-type]


def test_unfinished_work_is_kept_until_told(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    crashed = Output(path)
    fill(crashed)
    save_table(crashed.scratch / "table.npz", a=[1])
    with pytest.raises(OutputExists, match=r"unfinished work.*--resume.*--overwrite"):
        Output(path)

    resumed = Output(path, resume=True)
    np.testing.assert_array_equal(resumed.create(SHAPE, (3, 4, 4), "uint32")[...], VALUES)
    assert (resumed.scratch / "table.npz").exists()
    assert not resumed.create(SHAPE, (6, 4, 4), "uint32")[...].any()  # another layout: new

    anew = Output(path, overwrite=True)
    assert (tmp_path / "out.zarr.work" / "table.npz").exists()  # checking drops nothing
    assert not (anew.scratch / "table.npz").exists()
    anew.discard()
    assert list(tmp_path.iterdir()) == []
    fill(Output(path))


def test_work_directory_of_someone_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.zarr.work").mkdir()
    Output(tmp_path / "out.zarr")
    (tmp_path / "out.zarr.work" / "thesis.tex").write_text("x")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExists, match="did not make"):
            Output(tmp_path / "out.zarr", **flags)
    assert (tmp_path / "out.zarr.work" / "thesis.tex").exists()


def test_work_dir_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "other").write_text("x")
    output = Output(tmp_path / "slow" / "out.zarr", work_dir=tmp_path / "fast")
    assert output.scratch == tmp_path / "fast" / "out.zarr.work"
    fill(output)
    output.publish()
    assert [p.name for p in (tmp_path / "fast").iterdir()] == ["other"]
    assert [p.name for p in (tmp_path / "slow").iterdir()] == ["out.zarr"]


CRASH = """
import os, sys
from pathlib import Path
from topo_dask.storage import Output

renames = int(sys.argv[2])
rename = Path.rename
def dies(self, target):
    global renames
    if renames == 0:
        os._exit(9)
    renames -= 1
    return rename(self, target)
Path.rename = dies
output = Output(sys.argv[1], overwrite=True)
output.create((6, 7, 8), (3, 4, 4), "uint32")[...] = 9
output.publish_labels()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_crash_while_publishing_leaves_the_old_output(tmp_path: Path, renames: int) -> None:
    path = tmp_path / "out.zarr"
    first = Output(path)
    fill(first)
    first.publish()
    done = subprocess.run([sys.executable, "-c", CRASH, str(path), str(renames)], check=False)
    assert done.returncode == 9
    # Between the two renames the old one is aside; whatever comes next puts it back.
    with pytest.raises(OutputExists):
        Output(path)
    np.testing.assert_array_equal(zarr.open_array(str(path))[...], VALUES)

    resumed = Output(path, resume=True)
    assert (resumed.create(SHAPE, (3, 4, 4), "uint32")[...] == 9).all()
    assert (resumed.publish_labels()[...] == 9).all()
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_failing_rename_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path / "out.zarr", VALUES + 1)
    output = Output(path, overwrite=True)
    fill(output)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "s0":
            raise OSError(5, "disk trouble")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk trouble"):
        output.publish()
    np.testing.assert_array_equal(zarr.open_array(str(path))[...], VALUES + 1)


def test_stale_leftovers_that_cannot_be_removed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path / "out.zarr")
    fill(output)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.warns(RuntimeWarning, match="could not be removed"):
        output.publish()


# ------------------------------------------------------------------------------- small tables


def test_tables_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays: dict[str, Any] = {
        "ids": np.array([1, 2**63 + 5], dtype=np.uint64),
        "empty": np.zeros((0, 3)),
        "file": np.array(["names", "of np.savez"]),
        "scalar": np.float32(1.5),
        "fortran": np.asfortranarray(VALUES),
    }
    save_table(path, **arrays)
    save_table(path, **arrays)  # replaces
    back = load_table(path)
    assert back.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(back[name], values)
        assert back[name].dtype == np.asarray(values).dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_failed_table_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    save_table(path, a=[1])
    with pytest.raises(InvalidType, match="b: got dtype object"):
        save_table(path, b=[None])

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(np.lib.format, "write_array", fails)
    with pytest.raises(OSError, match="no space"):
        save_table(path, a=[2])
    assert load_table(path)["a"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(InputNotFound, match="table: got"):
        load_table(path)
    save_table(path, a=np.arange(1000))
    whole = path.read_bytes()
    for damaged in (b"", b"no", whole[:500], whole[: len(whole) // 2] + b"\xff" * 9 + whole[-500:]):
        path.write_bytes(damaged)
        with pytest.raises(InvalidData, match="damaged"):
            load_table(path)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(InvalidData, match="damaged"):
        load_table(path)


# ------------------------------------------------------------------------------------- others


def test_local_paths() -> None:
    assert local_path("~/x") == Path.home() / "x"
    assert local_path("x") == Path.cwd() / "x"
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("gs://bucket/x") is None


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.zarr")
    fill(output)
    output.publish(attributes={"blocks": np.array([1, 2]), "dtype": np.dtype("uint8")})
    text = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())
    ours = text["attributes"]["topo_dask"]
    assert ours["blocks"] == [1, 2]
    assert ours["dtype"] == "uint8"
