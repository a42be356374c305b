"""Models over tiles: each tile once, the same bytes on any engine, failures that lose nothing."""

from __future__ import annotations

import itertools
import pickle
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from distributed import Client, LocalCluster
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import topo_dask
from topo_dask.cli import main
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType, TaskFailed, TopoError
from topo_dask.graph.tiles import tile_grid
from topo_dask.run.execute import Engine, open_engine
from topo_dask.run.map_tiles import Shared
from topo_dask.storage import create_array

seeds = st.integers(0, 2**32 - 1)
ENGINES = ("sync", "threads", "processes", "dask")


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """One of each kind for all tests: starting processes takes seconds."""
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        yield {
            "dask": stack.enter_context(open_engine(client)),
            **{name: stack.enter_context(open_engine(name)) for name in ENGINES[:3]},
        }


def stored(path: Path, values: np.ndarray, chunks: Any) -> Path:
    chunks = np.broadcast_to(chunks, values.ndim).tolist()
    create_array(path, values.shape, chunks, values.dtype)[...] = values
    return path


class Counting:
    """A model that appends the place of every tile it sees to a file: threads, processes, all."""

    def __init__(self, log: Path, then: Callable[[Any], Any] = np.negative) -> None:
        self.log, self.then = log, then

    def __call__(self, part: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        with self.log.open("a") as file:
            file.write(",".join(map(str, origin)) + "\n")
        return self.then(part)

    def seen(self) -> Counter[tuple[int, ...]]:
        if not self.log.exists():
            return Counter()
        lines = self.log.read_text().splitlines()
        return Counter(tuple(int(n) for n in line.split(",")) for line in lines)


def starts(shape: tuple[int, ...], tile: Any, overlap: Any, last: str = "move") -> set[Any]:
    return set(
        itertools.product(
            *map(np.ndarray.tolist, tile_grid(shape, tile, overlap, last=last).starts)
        )
    )


# ------------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("declared", [True, False])
def test_each_tile_is_computed_once_and_bytes_are_the_same(
    engine: str, declared: bool, engines: dict[str, Engine], tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    image = rng.normal(size=(70, 90)).astype(np.float32)
    source = stored(tmp_path / "image.zarr", image, 32)
    noise = rng.normal(size=(16, 16)).astype(np.float32)  # tiles that do not agree
    expected = topo_dask.map_tiles(lambda a: a + noise, image, (16, 16), (5, 3))
    model = Counting(tmp_path / "log", lambda a: a + noise)
    options: dict[str, Any] = {"dtype": "float32"} if declared else {}
    result = topo_dask.map_tiles(
        model,
        source,
        (16, 16),
        (5, 3),
        tmp_path / "out.zarr",
        pass_origin=True,
        cluster=engines[engine],
        blocks=(24, 40),
        **options,
    )
    assert_array_equal(result.array[...], expected)
    assert model.seen() == Counter(dict.fromkeys(starts(image.shape, 16, (5, 3)), 1))
    details = result.details
    assert 0 < details["alive, measured"] <= details["alive, planned"] <= details["tiles"]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=2, max_size=3)))
    tile = tuple(draw(st.integers(2, 9)) for _ in shape)
    case = {
        "shape": shape,
        "tile": tile,
        "overlap": tuple(draw(st.integers(0, t - 1)) for t in tile),
        "last": draw(st.sampled_from(["move", "shrink"])),
        "context": tuple(draw(st.integers(0, 3)) for _ in shape),
        "beyond": draw(st.sampled_from(["reflect", "edge", "zero", "clip"])),
        "batch": draw(st.sampled_from([None, 1, 3])),
    }
    assume(len(tile_grid(shape, tile, case["overlap"])) <= 200)
    return case


@pytest.mark.nightly
@given(cases(), seeds, st.data())
def test_a_constant_comes_back_constant(case: dict[str, Any], seed: int, data: Any) -> None:
    shape = case.pop("shape")
    value = np.random.default_rng(seed).normal(size=3).astype(np.float32) * 100
    axes = len(shape)

    def model(part: np.ndarray) -> np.ndarray:
        spatial = part.shape[part.ndim - axes :]
        if case["batch"] is None:
            return np.broadcast_to(value.reshape(3, *[1] * axes), (3, *spatial))
        return np.broadcast_to(value.reshape(1, 3, *[1] * axes), (len(part), 3, *spatial))

    blend = data.draw(st.sampled_from(["cosine", "linear", "mean", "max", "nearest"]))
    got = topo_dask.map_tiles(model, np.zeros(shape), blend=blend, **case)
    assert_allclose(got, np.broadcast_to(value.reshape(3, *[1] * axes), got.shape), rtol=1e-6)


@pytest.mark.nightly
@given(cases(), seeds, st.data())
def test_numpy_dask_and_blocks_give_the_same_bytes(
    case: dict[str, Any], seed: int, data: Any
) -> None:
    """Tiles that differ: the value depends on where the voxel lies in its tile."""
    shape = case.pop("shape")
    image = np.random.default_rng(seed).normal(size=shape)
    blend = data.draw(st.sampled_from(["cosine", "linear", "mean", "max", "nearest"]))
    calls = []

    def model(part: np.ndarray) -> np.ndarray:
        calls.append(part.shape)
        spatial = part.shape[part.ndim - len(shape) :]
        return (part + np.arange(np.prod(spatial)).reshape(spatial)).astype(np.float64)

    blocks = tuple(data.draw(st.integers(1, n)) for n in shape)
    assume(np.prod(-(-np.array(shape) // blocks)) <= 12)
    whole = topo_dask.map_tiles(model, image, blend=blend, blocks=shape, **case)
    once = len(calls)
    assert_array_equal(topo_dask.map_tiles(model, image, blend=blend, blocks=blocks, **case), whole)
    if case["batch"] is None:
        assert once == len(tile_grid(shape, case["tile"], case["overlap"], last=case["last"]))
        assert len(calls) == 2 * once
    calls.clear()
    chunks = data.draw(st.integers(1, 9))
    lazy = topo_dask.map_tiles(
        model, da.from_array(image, chunks=chunks), blend=blend, blocks=blocks, **case
    )
    assert len(calls) == 1  # the probe, whose result is used
    assert_array_equal(lazy.compute(scheduler="sync"), whole)
    if case["batch"] is None:
        assert len(calls) == once


@pytest.mark.parametrize("axes", [2, 3])
def test_models_see_their_context_and_channels(axes: int) -> None:
    """A box filter with context is that of the whole image; tiles know where they are."""
    from scipy import ndimage

    rng = np.random.default_rng(1)
    shape = (33, 41, 29)[:axes]
    image = rng.normal(size=(2, *shape))
    size = (1, *[5] * axes)
    expected = ndimage.uniform_filter(image, size, mode="mirror")

    def model(part: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(part, size, mode="mirror")

    def shrinking(part: np.ndarray) -> np.ndarray:
        return model(part)[(slice(None), *[slice(2, -2)] * axes)]

    for one in (model, shrinking):
        got = topo_dask.map_tiles(one, image, (12,) * axes, 4, context=2)
        assert_allclose(got, expected, atol=1e-12)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)

    def where(part: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        spatial = part.shape[1:]
        local = np.meshgrid(*map(np.arange, spatial), indexing="ij")
        return np.stack([a + float(o) for a, o in zip(local, origin, strict=True)])

    for beyond in ("reflect", "clip"):
        got = topo_dask.map_tiles(
            where, image, (12,) * axes, 4, context=3, pass_origin=True, beyond=beyond
        )
        assert_array_equal(got, place)


def test_vectors_are_scaled_to_length_1_and_labels_keep_the_nearest(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(3, 40, 40)).astype(np.float32)
    got = topo_dask.map_tiles(lambda a: a + rng.normal(), image, (16, 16), 6, normalise=True)
    assert_allclose(np.sqrt((got**2).sum(axis=0)), 1, rtol=1e-6)
    calls = itertools.count(1)
    labels = topo_dask.map_tiles(
        lambda a: np.full(a.shape[1:], next(calls), np.uint16),
        image,
        (16, 16),
        4,
        blend="nearest",
        dtype="uint16",
    )
    rows = labels[:, 0].tolist()
    assert rows == [1] * 14 + [rows[14]] * 12 + [rows[26]] * 14


def test_a_dask_image_becomes_a_zarr_array(tmp_path: Path) -> None:
    image = np.random.default_rng(5).normal(size=(2, 40, 50)).astype(np.float32)
    lazy = da.from_array(image, chunks=(1, 17, 23))
    result = topo_dask.map_tiles(
        np.negative, lazy, (16, 16), 4, tmp_path / "o.zarr", cluster="threads"
    )
    assert_array_equal(result.array[...], -image)


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    def peak(side: int) -> int:
        image = create_array(tmp_path / f"{side}.zarr", (side, side), (256, 256), "u1")
        image[...] = 1
        tracemalloc.start()
        topo_dask.map_tiles(
            np.positive, image, (64, 64), 16, tmp_path / f"{side} out.zarr",
            dtype="u1", blocks=192, cluster="sync",
        )  # fmt: skip
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(300)
    small, large = peak(400), peak(1200)
    assert large < 1.5 * small + 2**19, (small, large)


def test_models_may_work_in_place_and_reuse_their_result() -> None:
    image = np.arange(600.0).reshape(20, 30)
    buffer = np.zeros((8, 8))

    def model(part: np.ndarray) -> np.ndarray:
        part *= -1
        buffer[...] = part
        return buffer

    assert_array_equal(topo_dask.map_tiles(model, image, (8, 8), 3), -image)
    assert image[0, 1] == 1


# ------------------------------------------------------------------------------ area of interest


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_only_tiles_of_interest_are_computed(
    engine: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    image = np.ones((96, 96), dtype=np.float32)
    source = stored(tmp_path / "image.zarr", image, 16)
    mask = np.zeros((12, 12), dtype=bool)
    mask[2, 3] = True  # voxels 16:24, 24:32
    cases: list[tuple[str, Any]] = [
        ("mask", mask),
        ("boxes", [((16, 24), (24, 32))]),
        ("polygon", [(16, 24), (16, 32), (24, 32), (24, 24)]),
        ("skip", lambda a, b: ((a >= (24, 32)) | (b <= (16, 24))).any(axis=1)),
    ]
    results = []
    for name, area in cases:
        model = Counting(tmp_path / f"{name}.log")
        result = topo_dask.map_tiles(
            model,
            source,
            (16, 16),
            4,
            tmp_path / f"{name}.zarr",
            pass_origin=True,
            cluster=engines[engine],
            **{name: area},
        )
        assert set(model.seen()) == {(12, 12), (12, 24)}, name
        assert set(model.seen().values()) == {1}
        results.append(result.array[...])
    for got in results:
        assert got.min() == -1
        assert (got < 0).sum() == 16 * 28
        assert (got[12:28, 12:40] == -1).all()


def test_tiles_without_a_chunk_on_disk_are_left_out(tmp_path: Path) -> None:
    for version in (2, 3):
        array = create_array(
            tmp_path / f"image{version}.zarr", (96, 96), (16, 16), "f4", zarr_format=version
        )
        array[32:48, 32:48] = 1
        model = Counting(tmp_path / f"log{version}")
        topo_dask.map_tiles(
            model,
            array,
            (16, 16),
            4,
            tmp_path / f"out{version}.zarr",
            skip="empty",
            pass_origin=True,
            cluster="sync",
        )
        assert set(model.seen()) == set(itertools.product((24, 36), (24, 36)))


def test_what_is_left_out_is_never_read(tmp_path: Path) -> None:
    """Chunks that no tile of interest needs may even be damaged."""
    array = create_array(tmp_path / "image.zarr", (96, 96), (16, 16), "f4")
    array[...] = 1
    for chunk in (tmp_path / "image.zarr" / "c").glob("*/*"):
        if not {chunk.parent.name, chunk.name} <= {"1", "2"}:
            chunk.write_bytes(b"damaged")
    box, options = [((16, 16), (48, 48))], {"dtype": "f4", "cluster": "sync"}
    out = tmp_path / "out.zarr"
    result = topo_dask.map_tiles(np.negative, array, (16, 16), 0, out, boxes=box, **options)
    assert result.array[...].sum() == -32 * 32
    with pytest.raises(TaskFailed):
        topo_dask.map_tiles(np.negative, array, (16, 16), 0, tmp_path / "all.zarr", **options)


# ------------------------------------------------------------------------------ labels of tiles


def local_labels(part: np.ndarray) -> np.ndarray:
    """What a model finds in a tile: ids that mean nothing in another."""
    from scipy import ndimage

    return np.asarray(ndimage.label(part > 0)[0] * 3).astype(np.int16)


@given(cases(), seeds, st.data())
@settings(max_examples=60)
def test_ids_of_tiles_are_kept_apart(case: dict[str, Any], seed: int, data: Any) -> None:
    shape, batch = case.pop("shape"), case["batch"]
    image = np.random.default_rng(seed).normal(size=shape)
    blocks = tuple(data.draw(st.integers(1, n)) for n in shape)
    assume(np.prod(-(-np.array(shape) // blocks)) <= 12)

    def model(part: np.ndarray) -> np.ndarray:
        if batch is not None:
            return np.stack([local_labels(one) for one in part])
        return local_labels(part)

    options = {**case, "blend": "nearest"}
    whole = topo_dask.map_tiles(model, image, ids="apart", blocks=shape, **options)
    again = topo_dask.map_tiles(model, image, ids="apart", blocks=blocks, **options)
    assert whole.dtype == np.uint32
    assert_array_equal(again, whole)
    lazy = topo_dask.map_tiles(
        model, da.from_array(image, chunks=7), ids="apart", blocks=blocks, **options
    )
    assert_array_equal(lazy.compute(scheduler="sync"), whole)
    # As with ids that the tiles share, but for the tile from which each voxel comes.
    kept = topo_dask.map_tiles(model, image, ids="keep", **options)
    assert_array_equal(whole > 0, kept > 0)
    tiles = tile_grid(shape, case["tile"], case["overlap"], last=case["last"])
    most = int(np.prod(tiles.largest))
    for number in np.unique((whole[whole > 0].astype(int) - 1) // most).tolist():
        mine = (whole > number * most) & (whole <= (number + 1) * most)
        inside = np.zeros(shape, dtype=bool)
        inside[tiles.region(number).slices] = True
        assert not (mine & ~inside).any()
        # One id of the model for one of the result, in the same order.
        pairs = np.unique(np.stack([whole[mine].astype(int), kept[mine].astype(int)]), axis=1)
        assert (np.diff(pairs) > 0).all()


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_labels_of_tiles_are_the_same_on_any_engine(
    engine: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    image = np.random.default_rng(2).normal(size=(2, 50, 60)).astype(np.float32)

    options: dict[str, Any] = {"blend": "nearest", "ids": "apart", "channels": 2}
    expected = topo_dask.map_tiles(local_labels_of_channels, image, (16, 16), 4, **options)
    for tile in (expected[:, :12, :12], expected[:, 14:24, 14:24]):
        assert len(np.unique(tile)) > 5
    source = stored(tmp_path / "image.zarr", image, 32)
    result = topo_dask.map_tiles(
        local_labels_of_channels, source, (16, 16), 4, tmp_path / "o.zarr",
        cluster=engines[engine], blocks=(24, 40), dtype="uint64", **options,
    )  # fmt: skip
    assert result.array.dtype == np.uint64
    assert_array_equal(result.array[...], expected)


def local_labels_of_channels(part: np.ndarray) -> np.ndarray:
    return np.stack([local_labels(one) for one in part])


# -------------------------------------------------------------------------------------- failures


class Unlucky(Counting):
    """Raises at one tile until a file is there."""

    def __call__(self, part: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        if origin == (36, 24) and not self.log.with_name("mended").exists():
            return self.give_up(part)
        return super().__call__(part, origin)

    def give_up(self, part: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("in the model")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_other_tiles_gave_is_kept(
    engine: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    image = np.random.default_rng(0).normal(size=(80, 80)).astype(np.float32)
    source = stored(tmp_path / "image.zarr", image, 32)
    model = Unlucky(tmp_path / "log")
    out = tmp_path / "out.zarr"
    options = {"pass_origin": True, "cluster": engines[engine], "blocks": (48, 40)}
    with pytest.raises(TaskFailed, match=r"tile \[36:52, 24:40\]") as caught:
        topo_dask.map_tiles(model, source, (16, 16), 4, out, **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert "give_up" in shown
    assert "ZeroDivisionError: in the model" in shown
    assert not out.exists()
    before = model.seen()
    assert len(before) > 5
    (tmp_path / "mended").touch()
    result = topo_dask.map_tiles(model, source, (16, 16), 4, out, resume=True, **options)
    assert_array_equal(result.array[...], -image)
    assert model.seen() == Counter(dict.fromkeys(starts(image.shape, 16, 4), 1))
    again = topo_dask.map_tiles(model, source, (16, 16), 4, out, resume=True, **options)
    assert again.seconds == 0


def test_results_of_another_model_are_not_reused(tmp_path: Path) -> None:
    image = np.ones((40, 40), dtype=np.float32)

    def broken(part: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        if origin == (24, 24):
            raise ValueError
        return part * 5

    out = tmp_path / "out.zarr"
    with pytest.raises(TaskFailed):
        topo_dask.map_tiles(broken, image, (16, 16), 4, out, pass_origin=True, cluster="sync")
    result = topo_dask.map_tiles(np.negative, image, (16, 16), 4, out, resume=True, cluster="sync")
    assert (result.array[...] == -1).all()


@pytest.mark.parametrize(
    ("error", "argument", "words", "options"),
    [
        (InvalidArgument, "model", "tile [12:28, 0:16]", {"model": "shape"}),
        (InvalidType, "model", "tile [12:28, 0:16]", {"model": "dtype"}),
        (InvalidArgument, "model", "module:function", {"model": "nothing"}),
        (InvalidArgument, "model", "no_such_module", {"model": "no_such_module:f"}),
        (InvalidType, "model", "int", {"model": 3}),
        (InvalidArgument, "model", "batch of 2", {"model": "first", "batch": 3}),
        (InvalidArgument, "model", "2 channels", {"dtype": "float32", "channels": 2}),
        (InvalidType, "model", "float64", {"dtype": "float64"}),
        (InvalidArgument, "overlap", "16", {"overlap": 16}),
        (InvalidArgument, "tile", "2 of them", {"tile": 0}),
        (InvalidArgument, "image", "(40, 40)", {"tile": (8, 8, 8)}),
        (InvalidArgument, "blend", "cosine", {"blend": "sum"}),
        (InvalidArgument, "beyond", "reflect", {"beyond": "wrap"}),
        (InvalidArgument, "dtype", "both", {"channels": 2}),
        (InvalidType, "dtype", "complex64", {"dtype": "complex64"}),
        (InvalidArgument, "batch", "0", {"batch": 0}),
        (InvalidArgument, "blocks", "(8, 8, 8)", {"blocks": (8, 8, 8)}),
        (InvalidArgument, "mask", "no tile", {"mask": np.zeros((4, 4))}),
        (InvalidArgument, "mask", "2 axes", {"mask": np.ones((4, 4, 4))}),
        (InvalidArgument, "boxes", "no tile", {"boxes": [((90, 90), (99, 99))]}),
        (InvalidArgument, "boxes", "box 0", {"boxes": [((9, 9), (9, 9))]}),
        (InvalidArgument, "polygon", "3 corners", {"polygon": [(1, 1), (2, 2)]}),
        (InvalidArgument, "boxes", "one area", {"mask": np.ones((4, 4)), "boxes": []}),
        (InvalidType, "skip", "booleans", {"skip": 3}),
        (InvalidArgument, "skip", "zarr arrays", {"skip": "empty"}),
        (InvalidArgument, "skip", "every tile", {"skip": lambda a, b: a[:, 0] >= 0}),
        (InvalidArgument, "ids", "nearest", {"ids": "apart"}),
        (InvalidArgument, "ids", "keep", {"ids": "mine"}),
        (InvalidType, "model", "float32", {"ids": "apart", "blend": "nearest"}),
        (InvalidArgument, "dtype", "2304", {"ids": "apart", "blend": "nearest", "dtype": "u1"}),
        (InvalidData, "model", "negative", {"model": "minus", "ids": "apart", "blend": "nearest"}),
        (InvalidType, "normalise", "floats", {"normalise": True, "dtype": "u1", "channels": 3}),
    ],
    ids=itertools.count(),
)
@pytest.mark.parametrize("to", ["array", "disk"])
def test_bad_input(
    error: type[TopoError],
    argument: str,
    words: str,
    options: dict[str, Any],
    to: str,
    tmp_path: Path,
) -> None:
    image = np.zeros((40, 40), dtype=np.float32)
    models = {
        "shape": lambda part, origin: part[: 16 - (origin == (12, 0))],
        "dtype": lambda part, origin: part.astype("f8" if origin == (12, 0) else "f4"),
        "first": lambda part, origin: part[:1],
        "minus": lambda part, origin: np.full(part.shape, -1),
    }
    given_model = options.get("model", lambda part, origin: part)
    call = {
        "model": models.get(given_model, given_model)
        if isinstance(given_model, str)
        else given_model,
        "tile": (16, 16),
        "overlap": 4,
        "pass_origin": True,
        **{name: value for name, value in options.items() if name != "model"},
    }
    if to == "disk":
        call |= {"output": tmp_path / "out.zarr", "cluster": "sync"}
    with pytest.raises(error) as caught:
        topo_dask.map_tiles(image=image, **call)
    assert caught.value.argument == argument
    assert words in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


def test_a_model_that_cannot_travel_says_so(tmp_path: Path, engines: dict[str, Engine]) -> None:
    import threading

    lock = threading.Lock()

    def model(part: np.ndarray) -> np.ndarray:
        with lock:
            return part

    image = np.ones((20, 20), dtype=np.float32)
    with pytest.raises(InvalidArgument, match="cluster='threads'"):
        topo_dask.map_tiles(
            model, image, (8, 8), 2, tmp_path / "a.zarr", cluster=engines["processes"]
        )
    topo_dask.map_tiles(model, image, (8, 8), 2, tmp_path / "b.zarr", cluster="threads")


# ---------------------------------------------------------------------------------- command line


def test_only_what_the_run_itself_wrote_is_unpickled(tmp_path: Path) -> None:
    shared = Shared(None, tmp_path / "job.pickle")  # type: ignore[arg-type]
    sent = pickle.dumps(shared)
    (tmp_path / "job.pickle").write_bytes(b"cos\nsystem\n(S'touch harm'\ntR.")
    with pytest.raises(InvalidData, match="not what the run wrote"):
        pickle.loads(sent)
    assert not Path("harm").exists()


def test_the_command_line_finds_functions_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "models_of_this_test.py").write_text(
        "def twice(part):\n    return part * 2\n\n"
        "def never(part):\n    raise ValueError('not today')\n"
    )
    image = np.arange(1600, dtype=np.float32).reshape(40, 40)
    stored(tmp_path / "image.zarr", image, 16)
    arguments = ["image.zarr", "out.zarr", "--tile", "16,16", "--overlap", "4", "--cluster", "sync"]
    done = CliRunner().invoke(main, ["map-tiles", "models_of_this_test:twice", *arguments])
    assert done.exit_code == 0, done.output
    assert_array_equal(zarr.open_array(tmp_path / "out.zarr", mode="r")[...], image * 2)
    arguments[1] = "box.zarr"
    boxed = [*arguments, "--box", "0,0;10,10", "--no-progress"]
    done = CliRunner().invoke(main, ["map-tiles", "models_of_this_test:twice", *boxed])
    assert (zarr.open_array(tmp_path / "box.zarr", mode="r")[16:] == 0).all()
    arguments[1] = "never.zarr"
    done = CliRunner().invoke(main, ["map-tiles", "models_of_this_test:never", *arguments])
    assert done.exit_code == 1
    assert "the tile [0:16, 0:16]" in done.output
    assert "in never" in done.output
