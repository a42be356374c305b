"""Where joining the blocks' own labels along faces goes wrong, and this package does not.

The usual way to label a volume in blocks is to segment every block by itself and to join labels
of two blocks that meet at their face: wherever they touch, or where they share most of the face.
Each test shows a volume that this gets wrong and that comes out right here.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import label

import topo_dask
from topo_dask.graph.contacts import JoinRules, contact_region, contacts_of_block, joined
from topo_dask.graph.union import unite
from topo_dask.grid import BlockGrid
from topo_dask.kernels import reference
from topo_dask.testing import same_partition

HOW: dict[str, Any] = {
    "n_steps": 60,
    "step_size": 1.0,
    "convergence_radius": 3.0,
    "min_size": 1,
}


def by_faces(
    mask: np.ndarray, flow: np.ndarray, blocks: tuple[int, ...], rule: str, **how: Any
) -> np.ndarray:
    """Every block by itself, joined along faces: ``"touch"``, or ``"overlap"`` of half a face."""
    labels = np.zeros(mask.shape, dtype=np.int64)
    grid = BlockGrid(mask.shape, blocks)
    for core in grid:
        own = reference.segment_group1(
            mask[core.slices], flow[(slice(None), *core.slices)], **{**HOW, **how}
        )
        labels[core.slices] = np.where(own > 0, own + labels.max(), 0)
    pairs: list[tuple[int, int]] = []
    for axis, edges in enumerate(grid.edges):
        for at in edges[1:-1].tolist():
            a, b = (np.take(labels, i, axis=axis).ravel() for i in (at - 1, at))
            for one, two in itertools.product(np.unique(a[a > 0]), np.unique(b[b > 0])):
                shared = np.count_nonzero((a == one) & (b == two))
                least = min(np.count_nonzero(a == one), np.count_nonzero(b == two)) / 2
                if shared >= (1 if rule == "touch" else least) and shared:
                    pairs.append((one - 1, two - 1))
    count = int(labels.max())
    numbers, _ = unite(np.ones(count, np.int64), [np.array(pairs, np.int64).reshape(-1, 2)])
    return np.append(0, numbers.astype(np.int64))[labels]


def ours(
    mask: np.ndarray, flow: np.ndarray, blocks: tuple[int, ...], path: Path, **how: Any
) -> np.ndarray:
    made = topo_dask.segment(
        flow,
        path / "labels.zarr",
        foreground=mask,
        blocks=blocks,
        cluster="sync",
        **{**HOW, **how},
    )
    labels: np.ndarray = made.array[...]
    return labels


def assert_right_here_and_wrong_by_faces(
    truth: np.ndarray, blocks: tuple[int, ...], path: Path, rules: tuple[str, ...], **how: Any
) -> None:
    flow = topo_dask.generate_direct_flows(truth)
    assert same_partition(ours(truth > 0, flow, blocks, path, **how), truth)
    for rule in rules:
        assert not same_partition(by_faces(truth > 0, flow, blocks, rule, **how), truth), rule


def test_two_cells_that_touch_along_a_block_face(tmp_path: Path) -> None:
    """The wall between two cells lies in a face of the blocks: each block sees one cell that
    fills its side of the face, and matching at faces makes one of the two."""
    truth = np.zeros((8, 12, 24), dtype=np.int32)
    truth[1:7, 2:10, 4:12], truth[1:7, 2:10, 12:20] = 1, 2
    assert_right_here_and_wrong_by_faces(truth, (8, 12, 12), tmp_path, ("touch", "overlap"))


def test_two_cells_whose_slanted_wall_crosses_a_block_face(tmp_path: Path) -> None:
    """A wall that crosses a face at a slant puts a voxel of one cell beside one of the other."""
    _, y, x = np.indices((6, 20, 20))
    truth = np.where(y < x, 1, 2).astype(np.int32)
    assert_right_here_and_wrong_by_faces(truth, (6, 10, 10), tmp_path, ("touch",))


def test_a_thin_bridge_of_two_cells_that_meet_on_a_block_face(tmp_path: Path) -> None:
    """Two cells reach for each other with a process of one voxel and meet on the face: all of
    either's share of the face is the other's, however small it is."""
    truth = np.zeros((9, 13, 24), dtype=np.int32)
    truth[1:8, 2:11, 2:10], truth[1:8, 2:11, 14:22] = 1, 2
    truth[4, 6, 10:12], truth[4, 6, 12:14] = 1, 2
    assert_right_here_and_wrong_by_faces(truth, (9, 13, 12), tmp_path, ("touch", "overlap"))


def test_a_slanted_process_whose_shares_of_a_block_face_hardly_overlap(tmp_path: Path) -> None:
    """A process that moves three of its five voxels sideways with every step: of its share of one
    side of the face two voxels in five are its share of the other, and overlap splits it."""
    _, y, x = np.indices((3, 50, 16))
    truth = ((y >= 3 * x) & (y < 3 * x + 5)).astype(np.int32)
    along = np.sign(8 - x)
    flow = np.stack([0 * x, np.where(x == 8, np.sign(26 - y), 3 * along), along]) * truth
    blocks = (3, 50, 8)
    assert same_partition(ours(truth > 0, flow.astype(np.float32), blocks, tmp_path), truth)
    assert not same_partition(by_faces(truth > 0, flow, blocks, "overlap"), truth)


def test_a_sliver_beyond_a_block_face(tmp_path: Path) -> None:
    """A cell reaches one voxel into the next block: there it is smaller than the least size."""
    truth = np.zeros((8, 12, 24), dtype=np.int32)
    truth[2:6, 3:9, 5:12], truth[3:5, 5:7, 12] = 1, 1
    assert_right_here_and_wrong_by_faces(
        truth, (8, 12, 12), tmp_path, ("touch", "overlap"), min_size=20
    )


def test_arms_that_flow_out_of_their_block(tmp_path: Path) -> None:
    """Two arms of a cell lie in a block that its body is not in, on either side of another cell:
    the block alone sees particles pile up at its end, and counts there are what it matches."""
    truth = np.zeros((5, 30, 20), dtype=np.int32)
    truth[2:4, 2:28, 10:14] = 1
    truth[2:4, 2:6, 2:10], truth[2:4, 24:28, 2:10] = 1, 1
    truth[2:4, 12:18, 4:10] = 2
    flow = topo_dask.generate_diffusion_flows(truth, n_iter=300, potential="heat")
    blocks = (5, 30, 10)
    assert same_partition(ours(truth > 0, flow, blocks, tmp_path, group=2), truth)
    assert not same_partition(by_faces(truth > 0, flow, blocks, "touch"), truth)


def two_streams() -> tuple[np.ndarray, np.ndarray]:
    """Two bars side by side, one flowing to the left end, one to the right."""
    flow = np.zeros((3, 2, 8, 20), dtype=np.float32)
    flow[2, :, :4, 2:], flow[2, :, :4, 1] = -1, 0
    flow[2, :, 4:, :18], flow[2, :, 4:, 18] = 1, 0
    flow[2, :, :4, 0], flow[2, :, 4:, 19] = 1, -1
    flow[1, :, :2], flow[1, :, 2:4], flow[1, :, 4:6], flow[1, :, 6:] = 0.1, -0.1, 0.1, -0.1
    return np.ones(flow.shape[1:], dtype=bool), flow


def test_flows_that_agree_in_one_block_and_not_on_the_whole(tmp_path: Path) -> None:
    """Two bars that flow past each other agree at either end: a block there would join them."""
    mask, flow = two_streams()
    blocks = (2, 8, 2)
    how: dict[str, Any] = {**HOW, "convergence_radius": 4.0}
    clusters = ours(mask, flow, blocks, tmp_path, **how)
    assert clusters.max() == 2
    shape = mask.shape
    by_block = [
        joined(contacts_of_block(clusters[at], flow[(slice(None), *at)], core, 1.0), JoinRules())
        for core in BlockGrid(shape, blocks)
        for at in [contact_region(core, shape).slices]
    ]
    assert any(decision.any() for decision in by_block)
    found = ours(mask, flow, blocks, tmp_path / "2", group=2, **how)
    assert same_partition(found, clusters)


@pytest.mark.parametrize("blocks", [(1, 3, 7), (1, 7, 2), (1, 6, 3)])
def test_legs_that_are_one_piece_only_elsewhere(blocks: tuple[int, ...], tmp_path: Path) -> None:
    """A U is two pieces in every block but the one with its bend, which is a single row."""
    truth = np.zeros((1, 7, 7), dtype=np.int32)
    truth[0, :, [0, 6]], truth[0, 6, :] = 3, 3
    truth[0, 0:3, 3] = 3
    expected = np.where(truth > 0, 1, 0)
    expected[0, 0:3, 3] = 2
    _, whole = label(truth)
    in_blocks = [label(truth[core.slices])[1] for core in BlockGrid(truth.shape, blocks)]
    assert sum(in_blocks) > whole == 2
    assert np.array_equal(split_on_disk(truth, blocks, tmp_path), expected)


def split_on_disk(truth: np.ndarray, blocks: tuple[int, ...], path: Path) -> np.ndarray:
    """Labels whose particles all end in one place each, then split: group 2 without contacts."""
    flow = np.zeros((3, *truth.shape), dtype=np.float32)
    for number in np.unique(truth[truth > 0]):
        voxels = np.argwhere(truth == number)
        flow[(slice(None), *voxels.T)] = (voxels[0] - voxels).T
    made = topo_dask.segment(
        flow,
        path / "split.zarr",
        foreground=truth,
        n_steps=1,
        convergence_radius=1.0,
        min_size=1,
        group=2,
        blocks=blocks,
        cluster="sync",
    )
    labels: np.ndarray = made.array[...]
    return labels


def test_a_fragment_whose_nearest_piece_is_blocks_away(tmp_path: Path) -> None:
    """A lone voxel joins the nearest large piece of its own instance, several blocks away,
    past pieces of others; and not the piece in the next block of a shorter way round."""
    truth = np.zeros((1, 12, 60), dtype=np.int32)
    truth[0, 0, 0:20], truth[0, 11, 40:60] = 1, 1
    truth[0, 3:9, 22:38] = 2
    truth[0, 6, 59], truth[0, 1, 36] = 1, 1
    expected = truth.copy()
    expected[0, 11, 40:60], expected[0, 6, 59] = 2, 2
    expected[0, 1, 36] = 2  # 10 down and 4 on, against 1 up and 17 back
    expected[0, 3:9, 22:38] = 3
    for number, blocks in enumerate([(1, 12, 60), (1, 6, 9), (1, 12, 7)]):
        found = split_on_disk(truth, blocks, tmp_path / str(number))
        assert np.array_equal(found, expected), blocks
