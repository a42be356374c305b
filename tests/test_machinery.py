"""What carries a stage: items made when wanted, tasks in bundles, results read line by line."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from topo_dask.errors import InvalidData, TaskFailed
from topo_dask.grid import BlockGrid, Region
from topo_dask.run.bundles import Bundle
from topo_dask.run.execute import open_engine
from topo_dask.run.items import Each
from topo_dask.run.ledger import Ledger

calls: list[int] = []


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        yield made


def double(number: int) -> int:
    calls.append(number)
    return 2 * number


def unlucky(number: int) -> int:
    if number == 13:
        raise InvalidData("flows", "NaN", "numbers", "Mend it.")
    return number


def once(number: int) -> int:
    calls.append(number)
    if number == 13 and calls.count(13) == 1:
        raise ConnectionResetError("gone for a moment")
    return number


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def broken(number: int) -> int:
    raise ValueError(lambda: number)


def test_short_tasks_go_in_bundles_and_each_is_run_once(client: Client, tmp_path: Path) -> None:
    calls.clear()
    bundles = []
    with open_engine(client) as engine:
        submit = client.submit
        client.submit = lambda *a, **k: bundles.append(len(pickle.loads(a[1]))) or submit(*a, **k)  # type: ignore
        found = Ledger(tmp_path).run(engine, "double", "m", double, Each(range(500), int))
        client.submit = submit  # type: ignore[method-assign]
    assert found == list(range(0, 1000, 2))
    assert sorted(calls) == list(range(500))
    assert sum(bundles) == 500
    assert bundles[0] == 1
    assert len(bundles) < 100


def test_long_tasks_do_not() -> None:
    outcomes, usage = Bundle("nap", nap, 0.1)([0.11] * 5)
    assert len(outcomes) == 1
    assert usage.seconds > 0.1


def test_an_error_in_a_bundle_is_that_of_its_item(client: Client, tmp_path: Path) -> None:
    with open_engine(client) as engine, pytest.raises(InvalidData, match="NaN"):
        Ledger(tmp_path).run(engine, "unlucky", "m", unlucky, range(40))
    lines = (tmp_path / "ledger" / "unlucky.jsonl").read_text().splitlines()
    done = [json.loads(line)[0] for line in lines[1:]]
    assert 13 not in done
    assert set(done) >= set(range(13))


def test_an_error_that_cannot_travel_is_told(client: Client, tmp_path: Path) -> None:
    with open_engine(client) as engine, pytest.raises(TaskFailed, match="ValueError"):
        Ledger(tmp_path).run(engine, "broken", "m", broken, [1])


def test_what_fails_once_is_tried_again(client: Client, tmp_path: Path) -> None:
    calls.clear()
    with open_engine(client) as engine:
        assert Ledger(tmp_path).run(engine, "once", "m", once, range(40)) == list(range(40))
    assert sorted(calls) == sorted([*range(40), 13])


@pytest.mark.parametrize(
    "damage", [b"[7, 1", b"[7, 14]", b"\0\0\0\0\n", b"7\n", b'["a"]\n[8, 3]\n']
)
def test_results_up_to_a_broken_line_stand(tmp_path: Path, damage: bytes) -> None:
    calls.clear()
    with open_engine("sync") as engine:
        ledger = Ledger(tmp_path)
        ledger.run(engine, "double", "m", double, range(7))
        path = tmp_path / "ledger" / "double.jsonl"
        path.write_bytes(path.read_bytes() + damage)
        assert ledger.run(engine, "double", "m", double, range(10)) == list(range(0, 20, 2))
        assert calls == list(range(10))
        assert ledger.run(engine, "double", "m", double, range(10)) == list(range(0, 20, 2))
        assert calls == list(range(10))
        assert ledger.run(engine, "double", "other", double, range(2)) == [0, 2]
    assert calls == [*range(10), 0, 1]


def test_a_grid_travels_without_what_it_remembers() -> None:
    grid = BlockGrid((1000, 1000, 1000), (10, (300, 700), 10))
    before = len(pickle.dumps(grid))
    assert len(grid.sizes) == len(grid) == 20_000
    assert len(pickle.dumps(grid)) == before < 200
    assert pickle.loads(pickle.dumps(grid)) == grid


def test_sizes_and_touching_are_those_of_the_regions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(rng.integers(1, 9, 3).tolist())
        cuts = [sorted({0, n, *rng.integers(0, n, 2).tolist()}) for n in shape]
        tuples = tuple(tuple(np.diff(c).tolist()) for c in cuts)
        grid = BlockGrid(shape, (tuples[0], int(rng.integers(1, 11)), tuples[2]))
        assert grid.sizes == [region.size for region in grid]
        low = [int(rng.integers(0, n)) for n in shape]
        high = [int(rng.integers(a, n)) + 1 for a, n in zip(low, shape, strict=True)]
        box = Region(tuple(low), tuple(high))
        wanted = [n for n, region in enumerate(grid) if region.intersect(box).size]
        assert grid.touching(box) == wanted
    with pytest.raises(IndexError, match="no block"):
        grid.region(len(grid))
