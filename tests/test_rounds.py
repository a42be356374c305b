"""Rounds of iterations: what is read, what is kept, and when they are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import topo_dask
from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.context_or_rounds import choose_context
from topo_dask.grid import BlockGrid
from topo_dask.kernels import cpu
from topo_dask.run import rounds as module
from topo_dask.testing import synthetic_tissue


def small_and_large() -> np.ndarray:
    """One long instance among short ones, which have fewer iterations."""
    labels = np.zeros((8, 8, 64), dtype=np.uint16)
    labels[4:, :, :] = 1
    for number in range(8):
        labels[:3, 1:4, 8 * number : 8 * number + 3] = number + 2
    return labels


def test_finished_blocks_are_read_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = small_and_large()
    whole = topo_dask.generate_diffusion_flows(labels, n_iter=200)
    rounds: dict[int, list[int]] = {}
    files: list[set[int]] = []
    advance = module.advance_block

    def watched(task: Any) -> Any:
        folder = task.job.rounds
        rounds.setdefault(task.span.first, []).append(task.number)
        files.append({int(path.name.split("-")[1]) for path in folder.glob("after-*")})
        return advance(task)

    monkeypatch.setattr(module, "advance_block", watched)
    made = topo_dask.flows(
        labels, tmp_path / "f.zarr", n_iter=200, rounds=30, blocks=(4, 8, 16), cluster="sync"
    )
    assert_array_equal(made.array[...], whole)
    assert made.details["context"] == (
        "rounds of 30 iterations, a context of 31 voxels each: as asked"
    )
    # The upper blocks hold only short instances, n = 6 * 7 = 42; the lower ones go on to 200.
    assert rounds[0] == rounds[30] == list(range(8))
    assert all(rounds[first] == [4, 5, 6, 7] for first in range(60, 200, 30))
    assert max(rounds) == 180
    # Never more than the generation that is read and the one that is written.
    assert max(map(len, files)) == 2


def test_a_dask_array_may_go_by_rounds_on_disk_in_place_of_a_lazy_context(tmp_path: Path) -> None:
    labels = small_and_large()
    whole = topo_dask.generate_diffusion_flows(labels, n_iter=200)
    lazy = da.from_array(labels, chunks=(4, 8, 16))
    made = topo_dask.flows(lazy, tmp_path / "f.zarr", rounds=50, blocks=16, cluster="sync")
    assert_array_equal(made.array[...], whole)
    # A context of all iterations is the lazy way to the same bits.
    assert_array_equal(topo_dask.generate_diffusion_flows(lazy, context=200).compute(), whole)


def test_a_round_takes_up_where_another_ended() -> None:
    labels = synthetic_tissue((20, 22, 24), n_instances=25, seed=2)
    table = topo_dask.instance_table(labels)
    facts: dict[str, Any] = {
        "ids": table.ids,
        "iterations": np.arange(len(table)) % 23,
        "anchors": (table.lo + table.hi) // 2,
        "origin": (100, 0, 7),
    }
    for potential in ("coordinate", "heat"):
        whole = cpu.diffusion_flow(labels, potential=potential, **facts)
        total = np.zeros_like(whole)
        fields = None
        for first in range(0, 25, 5):
            span = cpu.Span(first, first + 5)
            fields, flow = cpu.diffusion_round(
                labels, fields, span=span, potential=potential, threads=1 + first % 2, **facts
            )
            assert not (total.any(axis=0) & flow.any(axis=0)).any()
            total += flow
        assert_array_equal(total, whole)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rounds": 0}, InvalidArgument, "rounds: got 0"),
        ({"rounds": 2.5}, InvalidArgument, "rounds: got 2.5"),
        ({"rounds": "many"}, InvalidType, "rounds: got 'many'"),
        ({"rounds": 4, "context": 7}, InvalidArgument, "rounds: got 4 with context=7"),
        ({"rounds": 4, "overlap": 2}, InvalidArgument, "without overlap"),
        ({"rounds": 4, "potential": "heat", "n_iter": 2000}, InvalidArgument, "at most 781 iter"),
        ({"rounds": "auto", "method": "direct"}, InvalidArgument, "with method='diffusion'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    with pytest.raises(kind, match=message):
        topo_dask.flows(labels, tmp_path / "f.zarr", cluster="sync", blocks=2, **options)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- choice

GRID = BlockGrid((512, 512, 512), (128, 128, 128))


def test_many_iterations_are_made_in_rounds_and_few_in_a_context() -> None:
    few, many = (choose_context(FlowSettings(n_iter=n), GRID) for n in (10, 3000))
    assert (few.rounds, few.width) == (0, 10)
    assert many.rounds > 0
    assert many.width == many.rounds + 1
    assert "times as fast as a context of" in repr(many)
    assert "rounds of" in repr(few)
    assert "times as long" in repr(few)


def test_the_reason_says_what_each_would_take() -> None:
    few, many = (choose_context(FlowSettings(n_iter=n), GRID) for n in (10, 3000))
    for chosen in (few, many):
        assert chosen.cost in chosen.reason
        assert chosen.reason.count("core seconds") == chosen.reason.count("values updated") == 2
    # Only a context can be accelerated: that counts where it is asked for, and is said where not.
    asked = choose_context(FlowSettings(n_iter=3000, acceleration="auto"), GRID)
    assert asked.seconds <= many.seconds
    assert "acceleration" not in asked.reason + few.reason
    quick = FlowSettings(n_iter=3000, acceleration="chebyshev")
    assert choose_context(quick, GRID).sweeps > 0
    said = "acceleration='auto' would take" in many.reason
    assert said == (choose_context(quick, GRID).seconds < 0.8 * many.seconds)


def test_the_choice_is_the_cheapest() -> None:
    chosen = choose_context(FlowSettings(n_iter=1000), GRID)
    for rounds in (4, 16, 24, 48, 128, 999):
        other = choose_context(FlowSettings(n_iter=1000, rounds=rounds), GRID)
        assert other.rounds == rounds
        assert other.seconds >= chosen.seconds
    assert choose_context(FlowSettings(n_iter=1000, rounds="auto"), GRID).rounds == chosen.rounds


def test_what_is_asked_for_is_taken() -> None:
    chosen = choose_context(FlowSettings(n_iter=3000, context=5), GRID)
    assert (chosen.rounds, chosen.width, chosen.reason) == (0, 5, "as asked")
    blended = choose_context(FlowSettings(n_iter=3000), GRID, blended=True)
    assert blended.rounds == 0
    assert "blended" in blended.reason


def test_small_instances_need_no_rounds() -> None:
    """No block reads beyond the boxes of its instances, so a wide context costs nothing."""
    labels = np.zeros((128, 128, 128), dtype=np.uint16)
    for number, (z, y, x) in enumerate(np.ndindex(4, 4, 4)):
        labels[32 * z : 32 * z + 9, 32 * y : 32 * y + 9, 32 * x : 32 * x + 9] = number + 1
    table = topo_dask.instance_table(labels)
    grid = BlockGrid(labels.shape, (32, 32, 32))
    how = FlowSettings(n_iter=3000, adaptive_iters=False)
    chosen = choose_context(how, grid, table=table)
    assert chosen.rounds == 0
    # A block, and one voxel around it, is all that is read.
    assert chosen.updates < 5 * 3000 * 64 * 34**3
    assert choose_context(how, grid).updates > 3 * chosen.updates


def test_heat_that_leaves_float64_is_not_made_in_rounds() -> None:
    """Along an axis of long voxels a little heat goes, and less than nothing is not kept."""
    how = FlowSettings(potential="heat", n_iter=390, spacing=(1000, 1, 1))
    assert choose_context(how, GRID).rounds == 0
    assert "heat of 390 iterations needs one" in repr(choose_context(how, GRID))
    assert "needs one" not in repr(choose_context(replace(how, spacing=(1, 1, 1)), GRID))
