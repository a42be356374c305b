"""Tiles and mosaics whose run is killed: the same bytes, and only what was under way done again."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import killed_at, lines_of, stages_done, tree

import topo_dask
from topo_dask.graph.tiles import TilePlan, tile_grid
from topo_dask.grid import BlockGrid
from topo_dask.kernels.parallel import available_cores
from topo_dask.storage import create_array

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

SHAPE, TILE, OVERLAP, BLOCKS = (124, 124), (16, 16), 4, (40, 40)
PLAN = TilePlan(tile_grid(SHAPE, TILE, OVERLAP), BlockGrid(SHAPE, BLOCKS))
TILES = len(PLAN.tiles)


@dataclass(frozen=True)
class Model:
    """Takes its time, and writes down every tile it sees."""

    log: Path

    def __call__(self, part: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        with self.log.open("a") as file:
            file.write(f"{origin}\n")
        time.sleep(0.004)
        return part * 2 + 1

    def seen(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines())


def map_tiles(
    folder: Path, out: Path, cluster: str, keep_every: float | None = None, **options: Any
) -> Any:
    if keep_every is not None:
        importlib.import_module("topo_dask.run.map_tiles").KEEP_EVERY_S = keep_every
    return topo_dask.map_tiles(
        Model(folder / "log"),
        folder / "image.zarr",
        TILE,
        OVERLAP,
        out,
        dtype="float32",
        pass_origin=True,
        blocks=BLOCKS,
        cluster=cluster,
        **options,
    )


@pytest.mark.parametrize(
    ("cluster", "keep_every"),
    [("sync", None), ("threads", None), ("processes", None), ("sync", 0.0), ("threads", 0.0)],
)
def test_killed_tiles_go_on(cluster: str, keep_every: float | None, tmp_path: Path) -> None:
    """Tiles of finished blocks are kept; of others those kept so often, here after each."""
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    create_array(tmp_path / "image.zarr", SHAPE, (32, 32), "float32")[...] = image
    out, model = tmp_path / "out.zarr", Model(tmp_path / "log")
    done = killed_at("tiles", 3, out, map_tiles, tmp_path, out, cluster, keep_every)
    assert done < len(PLAN.blocks)
    result = map_tiles(tmp_path, out, "sync", resume=True)
    np.testing.assert_array_equal(result.array[...], image * 2 + 1)
    seen = model.seen()
    assert len(seen) == TILES
    at_once = 1 if cluster == "sync" else available_cores()
    in_a_block = max(len(PLAN.own(block)) for block in range(len(PLAN.blocks)))
    assert in_a_block >= 9
    in_flight = at_once * (in_a_block if keep_every is None else 1)
    assert sum(seen.values()) - TILES <= in_flight
    assert max(seen.values()) <= 2
    whole = tmp_path / "whole.zarr"
    map_tiles(tmp_path, whole, "sync")
    assert tree(out) == tree(whole)
    assert not list(tmp_path.glob("*.work"))


def fuse(folder: Path, cluster: str, out: Path, **options: Any) -> Any:
    places = json.loads((folder / "places.json").read_text())
    tiles = [folder / f"{number}.zarr" for number in range(len(places))]
    return topo_dask.fuse_mosaic(
        tiles, places, output=out, order=3, blocks=15, cluster=cluster, **options
    )


@pytest.mark.parametrize("cluster", ["sync", "threads", "processes"])
def test_killed_mosaics_go_on(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    places = []
    for number, at in enumerate(np.ndindex(5, 5)):
        tile = create_array(tmp_path / f"{number}.zarr", (40, 40), (40, 40), "float32")
        tile[...] = rng.random((40, 40), dtype=np.float32)
        c, s = np.cos(angle := rng.uniform(-0.1, 0.1)), np.sin(angle)
        shift = np.array(at) * 32 + rng.uniform(-2, 2, 2)
        places.append([[c, -s, shift[0]], [s, c, shift[1]]])
    (tmp_path / "places.json").write_text(json.dumps(places))
    out = tmp_path / "out.zarr"
    done = killed_at("fuse", 5, out, fuse, tmp_path, cluster, out)
    checked = lines_of(out, "check")
    result = fuse(tmp_path, "sync", out, resume=True, progress=True)
    again = stages_done(capsys.readouterr().err)
    assert checked == 2
    assert "check" not in again
    total = int(result.details["blocks"].split(", ")[1].split()[0])
    assert done + again.get("fuse", 0) == total
    whole = tmp_path / "whole.zarr"
    fuse(tmp_path, "sync", whole)
    assert tree(out) == tree(whole)
