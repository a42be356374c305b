"""compare: the numbers, by hand and by brute force; the same ones however the volume is cut."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from topo_dask.errors import (
    InputIsGroup,
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    TopoError,
)
from topo_dask.graph.measure import (
    Divided,
    Matching,
    Piece,
    block_contingency,
    lazy_contingency,
    merge_contingency,
    scores,
    sum_contingency,
)
from topo_dask.kernels.contingency import contingency
from topo_dask.run.compare import compare

BIG = 2**40  # ids that neither 32 bits nor a packed pair of them can hold
DTYPES = ["i1", "u1", *(f"{order}{kind}{n}" for order in "<>" for kind in "iu" for n in (2, 4, 8))]


def brute_contingency(truth: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    pairs = np.stack([truth.ravel().astype("u8"), labels.ravel().astype("u8")], axis=1)
    ids, counts = np.unique(pairs, axis=0, return_counts=True)
    return ids[:, 0], ids[:, 1], counts


def brute_scores(truth: np.ndarray, labels: np.ndarray, ignore_background: bool) -> dict[str, Any]:
    """The textbook formulae, over probabilities and pairs of voxels, one instance at a time."""
    keep = truth > 0 if ignore_background else np.ones(truth.shape, bool)
    t, b = truth[keep], labels[keep]
    n = t.size

    def entropy_given(a: np.ndarray, given: np.ndarray) -> float:
        total = 0.0
        for g in np.unique(given):
            part = a[given == g]
            p = np.unique(part, return_counts=True)[1] / part.size
            total += part.size / n * -float(np.sum(p * np.log2(p)))
        return total

    same_truth = t[:, None] == t[None, :]
    same_label = b[:, None] == b[None, :]
    others = ~np.eye(n, dtype=bool)
    both = np.count_nonzero(same_truth & same_label & others)
    in_truth = np.count_nonzero(same_truth & others)
    in_labels = np.count_nonzero(same_label & others)
    precision = both / in_labels if in_labels else 1.0
    recall = both / in_truth if in_truth else 1.0
    error = 1 - 2 * both / (in_truth + in_labels) if in_truth + in_labels else 0.0
    return {
        "scored_voxels": n,
        "vi_split": entropy_given(b, t),
        "vi_merge": entropy_given(t, b),
        "adapted_rand_error": error,
        "rand_precision": precision,
        "rand_recall": recall,
    }


def brute_matched(truth: np.ndarray, labels: np.ndarray, iou: float) -> int:
    """The optimal assignment of all pairs whose IoU reaches the threshold."""
    truths, others = ([i for i in np.unique(a) if i > 0] for a in (truth, labels))
    good = np.zeros((len(truths), len(others)))
    for i, t in enumerate(truths):
        for j, b in enumerate(others):
            common = np.count_nonzero((truth == t) & (labels == b))
            union = np.count_nonzero((truth == t) | (labels == b))
            good[i, j] = common / union >= iou
    rows, columns = linear_sum_assignment(-good)
    return int(good[rows, columns].sum())


def random_pair(seed: int = 0, shape: tuple[int, ...] = (9, 10, 11)) -> tuple[np.ndarray, ...]:
    """Boxes of a few voxels with ids, and the same with some of them shifted, split or lost."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 6, [-(-n // 3) for n in shape])
    truth = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[tuple(map(slice, shape))]
    labels = np.roll(truth, 1, axis=int(rng.integers(3))) * 7
    labels[rng.random(shape) < 0.1] = 0
    labels[: shape[0] // 2] += 3
    return truth, labels


def volumes(values: st.SearchStrategy[int], sides: int = 4) -> st.SearchStrategy[Any]:
    shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=sides)
    return shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays("u8", shape, elements=values)] * 2))


few_ids = volumes(st.integers(0, 3))
any_ids = volumes(st.sampled_from([0, 1, 2, 2**32 - 1, 2**32, BIG, 2**63, 2**64 - 1]))


# The kernel


@given(any_ids)
def test_contingency_matches_numpy(pair):
    for got, expected in zip(contingency(*pair), brute_contingency(*pair), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contingency_takes_every_integer_type(dtype):
    truth, labels = random_pair()
    found = contingency(truth.astype(dtype), labels.astype("u2"))
    swapped = contingency(labels.astype("u2"), truth.astype(dtype))
    for got, expected in zip(found, brute_contingency(truth, labels), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(swapped, brute_contingency(labels, truth), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [a.dtype for a in found] == ["u8", "u8", "i8"]


def test_contingency_takes_views_and_grows_its_table():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2**64, (20, 30, 40), dtype="u8")
    labels = rng.integers(0, 3, (40, 30, 20), dtype="u8").T
    pair = truth[::2, :, ::-1], labels[::2, :, ::-1]
    for got, expected in zip(contingency(*pair), brute_contingency(*pair), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_contingency_of_nothing():
    assert [len(a) for a in contingency(*np.zeros((2, 0, 3, 3), int))] == [0, 0, 0]


# Merging


@given(any_ids, st.data())
def test_merged_tables_are_the_table_of_the_whole(pair, data):
    cut = data.draw(st.integers(0, pair[0].shape[2]))
    parts = [
        block_contingency(*(a[..., part] for a in pair))
        for part in (slice(0, cut), slice(cut, None))
    ]
    whole = block_contingency(*pair)
    for merged in (merge_contingency(parts), merge_contingency(parts[::-1])):
        np.testing.assert_array_equal(merged.truth_ids, whole.truth_ids)
        np.testing.assert_array_equal(merged.label_ids, whole.label_ids)
        np.testing.assert_array_equal(merged.counts, whole.counts)


def test_running_sum_merges_along_the_way(monkeypatch):
    monkeypatch.setattr("topo_dask.graph.measure._PENDING_ROWS", 10)
    truth, labels = random_pair()
    total = sum_contingency(block_contingency(t, b) for t, b in zip(truth, labels, strict=True))
    np.testing.assert_array_equal(total.counts, block_contingency(truth, labels).counts)
    assert len(sum_contingency([])) == 0


# The numbers


def test_by_hand():
    # Truth 1 (4 voxels) is cut in halves 5 and 6; truth 2 and 3 (2 voxels each) are joined as 7.
    truth = np.array([[[0, 0, 1, 1, 1, 1, 2, 2, 3, 3]]])
    labels = np.array([[[0, 7, 5, 5, 6, 6, 7, 7, 7, 7]]])
    found = compare(truth, labels)
    assert (found.voxels, found.truth_foreground, found.label_foreground) == (10, 8, 9)
    assert (found.truth_instances, found.label_instances, found.scored_voxels) == (3, 3, 8)
    # Half of the scored voxels lie where one bit is needed, for the split and for the merge.
    assert (found.vi_split, found.vi_merge, found.vi) == (0.5, 0.5, 1.0)
    # Ordered pairs: 2 each in (1,5) (1,6) (2,7) (3,7); truth 12 + 2 + 2; labels 2 + 2 + 12.
    assert (found.rand_precision, found.rand_recall) == (0.5, 0.5)
    assert found.adapted_rand_error == 0.5
    # 5 and 6 both have IoU 1/2 with 1, only one of them counts; 7 has 2/5 with 2 and with 3.
    assert found.at(0.5) == Matching(0.5, 1, 1 / 3, 1 / 3, 1 / 3)
    assert found.at(0.75) == Matching(0.75, 0, 0.0, 0.0, 0.0)
    assert found.splits == (Divided(1, 4, 2, 2, (Piece(5, 2), Piece(6, 2))),)
    assert found.merges == (Divided(7, 4, 2, 2, (Piece(2, 2), Piece(3, 2))),)
    assert not found.same_partition


@given(few_ids, st.booleans())
def test_partition_scores_match_the_formulae(pair, ignore_background):
    found = compare(*pair, ignore_background=ignore_background)
    if found.scored_voxels:
        for name, expected in brute_scores(*pair, ignore_background).items():
            assert getattr(found, name) == pytest.approx(expected, abs=1e-12), name


def test_partition_scores_as_scikit_image_computes_them():
    truth, labels = random_pair(3)
    _, _, n_ij = brute_contingency(truth[truth > 0], labels[truth > 0])
    _, a = np.unique(truth[truth > 0], return_counts=True)
    _, b = np.unique(labels[truth > 0], return_counts=True)
    n = n_ij.sum()
    ids_t, ids_b, _ = brute_contingency(truth[truth > 0], labels[truth > 0])
    a_of = dict(zip(np.unique(ids_t), a, strict=True))
    b_of = dict(zip(np.unique(ids_b), b, strict=True))
    split = -sum(k / n * math.log2(k / a_of[t]) for k, t in zip(n_ij, ids_t, strict=True))
    merge = -sum(k / n * math.log2(k / b_of[j]) for k, j in zip(n_ij, ids_b, strict=True))
    both, in_truth, in_labels = (float(s @ s - s.sum()) for s in (n_ij, a, b))
    precision, recall = both / in_labels, both / in_truth
    found = compare(truth, labels)
    assert found.vi_split == pytest.approx(split, rel=1e-12)
    assert found.vi_merge == pytest.approx(merge, rel=1e-12)
    error = 1 - 2 * precision * recall / (precision + recall)
    assert found.adapted_rand_error == pytest.approx(error, rel=1e-12)


@given(few_ids, st.sampled_from([0.5, 0.6, 2 / 3, 0.75, 1.0]))
def test_matching_is_the_optimal_assignment(pair, iou):
    found = compare(*pair, thresholds=(iou,)).at(iou)
    # Brute force divides in floating point, so it needs room at the threshold.
    assert found.matched == brute_matched(*pair, iou - 1e-9)


def test_thresholds_are_met_exactly():
    truth = np.repeat([1, 2, 3], 10).reshape(1, 1, 30)
    labels = truth * (np.arange(30) % 10 < 6)
    found = compare(truth, labels, thresholds=(0.6, 0.601, np.float32(0.6), 1))
    assert [m.matched for m in found.matching] == [3, 0, 3, 0]


def test_sizes_of_huge_volumes_do_not_overflow():
    table = block_contingency(np.array([[[1, 1, 2]]]), np.array([[[1, 2, 2]]]))
    table = type(table)(table.truth_ids, table.label_ids, np.array([2**50, 2**50, 2**50]))
    found = scores(table)
    assert found.voxels == 3 * 2**50
    assert found.adapted_rand_error == pytest.approx(2 / 5)
    assert found.vi_split == pytest.approx(2 / 3)


def test_splits_and_merges_are_ranked_by_displaced_voxels():
    truth = np.array([1] * 10 + [2] * 10 + [3] * 10 + [4] * 10)
    labels = np.array([1] * 9 + [2] + [3] * 5 + [4] * 5 + [5] * 10 + [5] * 4 + [0] * 6)
    found = compare(truth.reshape(1, 4, 10), labels.reshape(1, 4, 10))
    assert [(d.id, d.voxels, d.pieces, d.displaced) for d in found.splits] == [
        (2, 10, 2, 5),
        (1, 10, 2, 1),
    ]
    assert found.merges == (Divided(5, 14, 2, 4, (Piece(3, 10), Piece(4, 4))),)
    assert compare(truth.reshape(1, 4, 10), labels.reshape(1, 4, 10), largest=1).splits == (
        found.splits[0],
    )
    slivers = compare(
        truth.repeat(100).reshape(40, 10, 10), np.roll(truth.repeat(100), 9).reshape(40, 10, 10)
    )
    assert [(d.id, d.pieces, d.displaced) for d in slivers.splits] == [
        (i, 2, 0) for i in (1, 2, 3, 4)
    ]
    many = compare(np.ones((1, 1, 9), int), np.arange(1, 10).reshape(1, 1, 9))
    assert many.splits[0].pieces == 9
    assert len(many.splits[0].largest) == 5
    assert "and 6 more" in repr(many)


# Invariance


def test_block_shapes_change_nothing():
    truth, labels = random_pair(5)
    labels = labels.astype("u8") + (labels > 0) * np.uint64(BIG)
    expected = compare(truth, labels)
    assert expected.vi_split > 0
    assert expected.splits
    for blocks in (1, (2, 3, 5), (9, 1, 4), (100, 100, 100), [9, 10, 11], np.array([4, 4, 4])):
        assert compare(truth, labels, blocks=blocks) == expected
    lazy = da.from_array(truth, chunks=(4, 5, 6)), da.from_array(labels, chunks=(3, 10, 2))
    assert compare(*lazy, cluster="sync") == expected
    assert compare(*lazy, cluster="threads", blocks=(5, 5, 5)) == expected
    assert compare(truth, lazy[1], cluster="sync") == expected
    assert scores(lazy_contingency(*lazy).compute(scheduler="sync")) == expected


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The pair of volumes as a chunked v2 array and a sharded v3 array, and what is to be found."""
    root = tmp_path_factory.mktemp("stores")
    truth, labels = random_pair(6, shape=(20, 24, 28))
    old = zarr.create_array(
        root / "old.zarr", shape=truth.shape, chunks=(7, 8, 9), dtype="i4", zarr_format=2
    )
    new = zarr.create_array(
        root / "new.zarr", shape=truth.shape, chunks=(4, 4, 4), shards=(8, 12, 8), dtype="u8"
    )
    old[...], new[...] = truth, labels
    return root / "old.zarr", root / "new.zarr", compare(truth, labels)


@pytest.mark.parametrize("cluster", ["sync", "threads"])
@pytest.mark.parametrize("blocks", [None, (5, 30, 11), 10])
def test_stores(stores, cluster, blocks):
    old, new, expected = stores
    assert compare(old, str(new), blocks=blocks, cluster=cluster) == expected


def test_stores_by_processes_and_by_dask(stores):
    old, new, expected = stores
    assert compare(old, new, blocks=12, cluster="processes") == expected
    lazy = da.from_zarr(old, chunks=(9, 9, 9))
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        assert compare(old, new, blocks=12) == expected
        assert compare(lazy, new) == expected
        assert compare(lazy, new, cluster=client) == expected


def test_sources_mix(stores):
    old, new, expected = stores
    labels = zarr.open_array(new, mode="r")
    assert compare(old, labels, cluster="sync") == expected
    assert compare(old, labels[...], cluster="sync", blocks=9) == expected
    assert compare(da.from_zarr(old), new, cluster="sync") == expected


@given(few_ids, st.permutations([BIG, 5, 2]), st.permutations([9, 2**64 - 1, 4]))
def test_names_of_ids_change_nothing(pair, truth_names, label_names):
    truth, labels = pair
    renamed = np.array([0, *truth_names], "u8")[truth], np.array([0, *label_names], "u8")[labels]
    before, after = vars(compare(truth, labels)), vars(compare(*renamed))
    for name in before.keys() - {"identical", "splits", "merges"}:
        assert before[name] == after[name], name
    for name in ("splits", "merges"):
        # Equally large ones are listed in the order of their ids.
        sizes = [
            sorted((d.voxels, d.pieces, d.displaced) for d in c[name]) for c in (before, after)
        ]
        assert sizes[0] == sizes[1]


# Volumes at the ends of the range


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5)])
def test_all_background(shape):
    found = compare(np.zeros(shape, "u1"), np.zeros(shape, "u8"))
    assert found.identical
    assert found.same_partition
    assert (found.vi, found.adapted_rand_error, found.scored_voxels) == (0, 0, 0)
    assert found.at(0.5) == Matching(0.5, 0, 1.0, 1.0, 1.0)
    assert (found.splits, found.merges) == ((), ())


def test_nothing_found_and_nothing_there():
    full, empty = np.ones((2, 2, 2), int), np.zeros((2, 2, 2), int)
    assert compare(full, empty).at(0.5) == Matching(0.5, 0, 0.0, 0.0, 0.0)
    assert compare(empty, full).at(0.5) == Matching(0.5, 0, 0.0, 0.0, 0.0)
    assert compare(empty, full).scored_voxels == 0
    assert not compare(empty, full).same_partition


def test_one_voxel():
    found = compare(np.full((1, 1, 1), 2**64 - 1, "u8"), np.full((1, 1, 1), 3, "i1"))
    assert found.same_partition
    assert not found.identical
    assert (found.vi, found.adapted_rand_error, found.at(0.75).f1) == (0, 0, 1)


@given(few_ids)
def test_equal_volumes_are_perfect(pair):
    found = compare(pair[0], pair[0] * BIG)
    assert found.same_partition
    assert found.identical == (not pair[0].any())
    assert (found.vi_split, found.vi_merge, found.adapted_rand_error) == (0, 0, 0)
    assert {m.f1 for m in found.matching} == {1.0}
    assert (found.splits, found.merges) == ((), ())


# What it looks like


def test_result_prints_and_travels():
    found = compare(*random_pair())
    text = repr(found)
    for part in ("voxels", "bits = split", "adapted Rand", "IoU >= 0.75", "largest splits"):
        assert part in text
    assert "<table>" in found._repr_html_()
    assert "IoU &gt;= 0.5" in found._repr_html_()
    data = json.loads(found.to_json())
    assert data["vi_split"] == found.vi_split
    assert data["matching"][0]["iou"] == 0.5
    assert data["splits"][0]["largest"][0]["voxels"] > 0
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(InvalidArgument, match=r"0\.9"):
        found.at(0.9)


# Bad input

GOOD = np.ones((2, 3, 4), "u4")


@pytest.mark.parametrize("swap", [False, True], ids=["truth", "labels"])
@pytest.mark.parametrize(
    ("bad", "error", "came"),
    [
        (GOOD.astype("f4"), InvalidType, "float32"),
        (GOOD.astype("c8"), InvalidType, "complex64"),
        (GOOD.astype(object), InvalidType, "object"),
        (GOOD.astype(bool), InvalidType, "bool"),
        (da.ones((2, 3, 4), dtype="f8"), InvalidType, "float64"),
        ([[[1]]], InvalidType, "list"),
        (None, InvalidType, "NoneType"),
        (GOOD[0], InvalidArgument, "shape (3, 4)"),
        (GOOD[None], InvalidArgument, "shape (1, 2, 3, 4)"),
        (np.ones((0, 3, 4), int), InvalidArgument, "shape (0, 3, 4)"),
        (-GOOD.astype("i2"), InvalidData, "id -1"),
        (da.from_array(-GOOD.astype("i8")), InvalidData, "id -1"),
    ],
    ids=[
        "float",
        "complex",
        "object",
        "bool",
        "lazy-float",
        "list",
        "none",
        "rank-2",
        "rank-4",
        "no-voxels",
        "negative",
        "lazy-negative",
    ],
)
def test_bad_volumes(bad, error, came, swap):
    argument = "labels" if swap else "truth"
    with pytest.raises(error) as caught:
        compare(*((GOOD, bad) if swap else (bad, GOOD)), cluster="sync")
    assert isinstance(caught.value, TopoError)
    assert caught.value.argument == argument
    assert came in str(caught.value)
    assert caught.value.allowed


def test_bad_stores(stores, tmp_path):
    old, _, _ = stores
    with pytest.raises(InputNotFound, match="labels"):
        compare(old, tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "group.zarr").create_array("s0", shape=(2, 3, 4), dtype="u1")
    with pytest.raises(InputIsGroup, match=r"truth.*s0"):
        compare(tmp_path / "group.zarr", old)
    negative = zarr.create_array(tmp_path / "negative.zarr", shape=(20, 24, 28), dtype="i2")
    negative[11, 12, 13] = -7
    with pytest.raises(InvalidData, match=r"labels: got the id -7 in the block \[8:12, 12:16, 12:"):
        compare(old, negative, cluster="sync", blocks=4)
    with pytest.raises(InvalidArgument, match="cluster"):
        compare(old, old, cluster="nowhere")


def test_dask_array_of_unknown_length():
    lazy = da.ones((4, 3, 4), chunks=2, dtype="u1")
    with pytest.raises(InvalidArgument, match="compute_chunk_sizes"):
        compare(lazy[lazy[:, 0, 0] > 0], GOOD)


def test_shapes_that_differ():
    with pytest.raises(InvalidArgument, match=r"labels: got shape \(2, 3, 3\).*\(2, 3, 4\)"):
        compare(GOOD, GOOD[..., :3])
    with pytest.raises(InvalidArgument, match="labels"):
        contingency(GOOD, GOOD[..., :3])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"blocks": 0}, InvalidArgument),
        ({"blocks": (4, 4)}, InvalidArgument),
        ({"blocks": (4, 4, -1)}, InvalidArgument),
        ({"blocks": 1.5}, InvalidType),
        ({"thresholds": (0.4,)}, InvalidArgument),
        ({"thresholds": (0.5, 1.1)}, InvalidArgument),
        ({"thresholds": (float("nan"),)}, InvalidArgument),
        ({"thresholds": 0.5}, InvalidType),
        ({"thresholds": "0.5"}, InvalidType),
        ({"largest": -1}, InvalidArgument),
        ({"largest": 1.0}, InvalidType),
    ],
    ids=str,
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        compare(GOOD, GOOD, **options)
