"""How well labels agree with the truth: a table of common voxels per block, merged, then scored.

The scores come from the merged table alone, and all that is added up is whole numbers, so the
result does not depend on how the volume was cut, down to the last bit.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.kernels.contingency import contingency

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_FAN_IN = 8  # tables that one task of the reduction merges
_PENDING_ROWS = 1 << 20  # rows that wait at least before they are merged into the total
_PIECES = 5  # pieces listed of each split or merge
_SLIVER = 10  # an overlap below 1/10 of both instances is a sliver
_SHOWN, _SHOWN_PIECES = 5, 3  # splits and merges, and pieces of each, that are printed


@dataclass(frozen=True, eq=False)
class Contingency:
    """Common voxels of every pair of a truth id and a label id, 0 included.

    Parameters
    ----------
    truth_ids, label_ids
        ``uint64[P]``, the pairs that occur, sorted by truth id, then by label id.
    counts
        ``int64[P]``, voxels of each pair.

    Examples
    --------
    >>> table = block_contingency(np.array([[[0, 1, 1]]]), np.array([[[0, 0, 5]]]))
    >>> len(table), table.counts
    (3, array([1, 1, 1]))
    """

    truth_ids: UInt64
    label_ids: UInt64
    counts: Int64

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class Piece:
    """A part of an instance: the id that covers it in the other volume, and its voxels."""

    id: int
    voxels: int


@dataclass(frozen=True)
class Divided:
    """An instance that several instances of the other volume cover.

    Parameters
    ----------
    id
        The instance: a truth id in a split, a label id in a merge.
    voxels
        Its voxels that instances of the other volume cover.
    pieces
        How many instances cover it.
    displaced
        Voxels of its pieces but the largest, slivers left out first: overlaps below a tenth of
        both instances, as borders leave that were drawn a little differently.
    largest
        The largest pieces, largest first; the smaller id first among equals.
    """

    id: int
    voxels: int
    pieces: int
    displaced: int
    largest: tuple[Piece, ...]


@dataclass(frozen=True)
class Matching:
    """Instances found, where a pair counts as a match if its IoU is at least ``iou``.

    Parameters
    ----------
    iou
        The threshold.
    matched
        Pairs in the largest one-to-one matching.
    precision, recall, f1
        ``matched`` over the label instances, over the truth instances, and the harmonic mean.
        Where there is no instance to divide by: 1 if the other volume has none either, else 0.
    """

    iou: float
    matched: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """What ``compare`` found.

    Parameters
    ----------
    voxels
        Voxels of the volume.
    truth_foreground, label_foreground
        Voxels with an id > 0.
    truth_instances, label_instances
        Different ids > 0.
    same_partition
        Whether the two are equal up to the names of the ids, background to background.
    identical
        Whether the two are equal, ids included.
    ignore_background
        Whether voxels where the truth is 0 were left out of the next three groups of numbers.
    scored_voxels
        Voxels that count for the variation of information and the adapted Rand error: those where
        truth > 0, or all of them if background was not to be ignored. Label 0 counts as one more
        label there, so foreground that was missed costs what a merge costs.
    vi_split, vi_merge
        Variation of information [1]_ in bits: H(labels | truth), which grows with splits, and
        H(truth | labels), which grows with merges.
    adapted_rand_error, rand_precision, rand_recall
        1 minus the F-score [2]_ of the pairs of different voxels that share an id: of those
        together in the labels, the part together in the truth (precision: falls with merges); of
        those together in the truth, the part together in the labels (recall: falls with splits).
        1 where no pair is together.
    matching
        Precision, recall and F1 per IoU threshold, over the whole volume: a label's voxels in the
        truth's background count in its union whatever ``ignore_background`` says. A pair matches
        from IoU >= threshold on, as in StarDist [3]_ and Cellpose [4]_. Above 1/2 an instance has
        at most one such partner. At exactly 1/2 it can have two, each of them one half of it; the
        largest one-to-one matching counts one of the two. IoUs are compared as whole numbers, so
        there is no rounding at the threshold.
    splits, merges
        The truth instances that several labels cover and the labels that cover several truth
        instances: most displaced voxels first, then most voxels outside the largest piece, then by
        id. Background is no piece.

    References
    ----------
    .. [1] M. Meilă, Comparing clusterings: an information based distance, Journal of Multivariate
       Analysis 98, 2007.
    .. [2] I. Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms
       for connectomics, Frontiers in Neuroanatomy 9:142, 2015. Pairs are of two different voxels
       here, as in scikit-image.
    .. [3] U. Schmidt et al., Cell detection with star-convex polygons, MICCAI 2018.
    .. [4] C. Stringer et al., Cellpose: a generalist algorithm for cellular segmentation, Nature
       Methods 18, 2021.

    Examples
    --------
    >>> truth, labels = np.array([[[0, 1, 1, 1, 1]]]), np.array([[[0, 7, 7, 8, 8]]])
    >>> found = scores(block_contingency(truth, labels))
    >>> found.vi, found.vi_split, found.at(0.5).f1, found.at(0.75).f1
    (1.0, 1.0, 0.6666666666666666, 0.0)
    """

    voxels: int
    truth_foreground: int
    label_foreground: int
    truth_instances: int
    label_instances: int
    same_partition: bool
    identical: bool
    ignore_background: bool
    scored_voxels: int
    vi_split: float
    vi_merge: float
    adapted_rand_error: float
    rand_precision: float
    rand_recall: float
    matching: tuple[Matching, ...]
    splits: tuple[Divided, ...]
    merges: tuple[Divided, ...]

    @property
    def vi(self) -> float:
        """Variation of information in bits: split and merge together."""
        return self.vi_split + self.vi_merge

    def at(self, iou: float) -> Matching:
        """Precision, recall and F1 at one of the thresholds that were asked for."""
        for one in self.matching:
            if one.iou == iou:
                return one
        known = ", ".join(str(one.iou) for one in self.matching) or "none was asked for"
        do = f"Call compare(..., thresholds=({iou!r},))."
        raise InvalidArgument("iou", repr(iou), f"a threshold of this comparison ({known})", do)

    def to_dict(self) -> dict[str, Any]:
        """All numbers in plain Python types, with ``vi``."""
        return {**asdict(self), "vi": self.vi}

    def to_json(self) -> str:
        """All numbers as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _rows(self) -> list[tuple[str, str]]:
        which = "truth > 0" if self.ignore_background else "all"
        same = "identical" if self.identical else "same up to ids" if self.same_partition else "no"
        rows = [
            ("voxels", f"{self.voxels:,}"),
            ("foreground", f"truth {self.truth_foreground:,}, labels {self.label_foreground:,}"),
            ("instances", f"truth {self.truth_instances:,}, labels {self.label_instances:,}"),
            ("equal", same),
            ("scored voxels", f"{self.scored_voxels:,} ({which})"),
            (
                "variation of information",
                f"{self.vi:.4f} bits = split {self.vi_split:.4f} + merge {self.vi_merge:.4f}",
            ),
            (
                "adapted Rand error",
                f"{self.adapted_rand_error:.4f} "
                f"(precision {self.rand_precision:.4f}, recall {self.rand_recall:.4f})",
            ),
        ]
        rows += [
            (
                f"IoU >= {m.iou:g}",
                f"F1 {m.f1:.4f} (precision {m.precision:.4f}, recall {m.recall:.4f}, "
                f"{m.matched:,} matched)",
            )
            for m in self.matching
        ]
        splits, merges = self.splits[:_SHOWN], self.merges[:_SHOWN]
        rows += [("largest splits", _describe("truth", d, "labels")) for d in splits]
        rows += [("largest merges", _describe("label", d, "truth")) for d in merges]
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        lines, before = ["Comparison of labels with the truth"], ""
        for name, text in rows:
            lines.append(f"  {name if name != before else '':<{width}}  {text}")
            before = name
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells, before = [], ""
        for name, text in self._rows():
            head = html.escape(name) if name != before else ""
            cells.append(
                f'<tr><th style="text-align:left">{head}</th>'
                f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            )
            before = name
        caption = "<caption>Comparison of labels with the truth</caption>"
        return f"<table>{caption}{''.join(cells)}</table>"


def _describe(kind: str, divided: Divided, others: str) -> str:
    shown = divided.largest[:_SHOWN_PIECES]
    parts = ", ".join(f"{piece.id} ({piece.voxels:,})" for piece in shown)
    more = divided.pieces - len(shown)
    rest = f" and {more:,} more" if more else ""
    return f"{kind} {divided.id} ({divided.voxels:,} voxels) in {others} {parts}{rest}"


def block_contingency(truth: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Contingency:
    """Table of one block.

    Examples
    --------
    >>> block_contingency(np.array([[[3, 3]]]), np.array([[[1, 1]]])).counts
    array([2])
    """
    return Contingency(*contingency(truth, labels))


def merge_contingency(tables: Sequence[Contingency]) -> Contingency:
    """One table of several: the voxels of equal pairs added up.

    Examples
    --------
    >>> one = block_contingency(np.array([[[3, 3]]]), np.array([[[1, 1]]]))
    >>> merge_contingency([one, one]).counts
    array([4])
    """
    # The empty first part fixes the dtype where there is no table at all.
    truth = np.concatenate([np.empty(0, np.uint64), *(t.truth_ids for t in tables)])
    label = np.concatenate([np.empty(0, np.uint64), *(t.label_ids for t in tables)])
    counts = np.concatenate([np.empty(0, np.int64), *(t.counts for t in tables)])
    if len(counts) == 0:
        return Contingency(truth, label, counts)
    order = _order(truth, label)
    starts = _starts(truth[order], label[order])
    rows = order[starts]
    return Contingency(truth[rows], label[rows], np.add.reduceat(counts[order], starts))


def sum_contingency(tables: Iterable[Contingency]) -> Contingency:
    """One table of many that come one after the other.

    What waits is merged whenever it outgrows the total: each row takes part in few merges, and
    memory stays within a few times the final table.

    Examples
    --------
    >>> one = block_contingency(np.array([[[3, 3]]]), np.array([[[1, 1]]]))
    >>> sum_contingency(one for _ in range(10)).counts
    array([20])
    """
    total = merge_contingency([])
    pending: list[Contingency] = []
    waiting = 0
    for table in tables:
        pending.append(table)
        waiting += len(table)
        if waiting > max(_PENDING_ROWS, len(total)):
            total = merge_contingency([total, *pending])
            pending, waiting = [], 0
    return merge_contingency([total, *pending])


def lazy_contingency(truth: da.Array, labels: da.Array) -> Any:
    """Table of two dask arrays as a ``Delayed``: one task per block, then a tree of merges.

    Parameters
    ----------
    truth, labels
        Arrays of one shape; the labels are rechunked like the truth where they differ.

    Examples
    --------
    >>> volume = da.ones((4, 4, 4), chunks=2, dtype="uint8")
    >>> lazy_contingency(volume, volume).compute().counts
    array([64])
    """
    if labels.chunks != truth.chunks:
        labels = labels.rechunk(truth.chunks)
    sides = [side.to_delayed().ravel() for side in (truth, labels)]
    of_block = delayed(block_contingency, pure=True)
    merge = delayed(merge_contingency, pure=True)
    level = [of_block(*pair) for pair in zip(*sides, strict=True)]
    while len(level) > 1:
        level = [merge(level[i : i + _FAN_IN]) for i in range(0, len(level), _FAN_IN)]
    return level[0]


def scores(
    table: Contingency,
    *,
    ignore_background: bool = True,
    thresholds: Sequence[float] = (0.5, 0.75),
    largest: int = 10,
) -> Comparison:
    """Score a table; see `Comparison` for what each number says.

    Parameters
    ----------
    table
        The table of the whole volume.
    ignore_background
        Leave the voxels where the truth is 0 out of the variation of information and the adapted
        Rand error.
    thresholds
        IoU thresholds from 0.5 to 1, each read as the nearest fraction with a denominator up to
        1,000, so that 0.6 means 3/5.
    largest
        How many splits and merges to list.

    Raises
    ------
    InvalidArgument, InvalidType
        A threshold outside 0.5 to 1, or a negative ``largest``.

    Examples
    --------
    >>> table = block_contingency(np.array([[[1, 1, 2, 2]]]), np.array([[[9, 9, 9, 9]]]))
    >>> found = scores(table)
    >>> found.vi_split, found.vi_merge, found.merges[0].displaced
    (0.0, 1.0, 2)
    """
    fractions = _fractions(thresholds)
    _check_largest(largest)
    truth, label, counts = table.truth_ids, table.label_ids, table.counts
    by_label = _order(label, truth)
    objects = (truth > 0) & (label > 0)
    scored = truth > 0 if ignore_background else np.ones(len(table), dtype=bool)
    every_truth = truth[_starts(truth)]
    every_label = label[by_label][_starts(label[by_label])]
    one_to_one = len(table) == len(every_truth) == len(every_label)
    truth_instances = int(np.count_nonzero(every_truth))
    label_instances = int(np.count_nonzero(every_label))
    truth_sizes, label_sizes = _row_sizes(truth, counts), _row_sizes(label, counts, by_label)
    union = truth_sizes + label_sizes - counts
    smaller = np.minimum(truth_sizes, label_sizes)
    matched = _matched(truth[objects], label[objects], counts[objects], union[objects], fractions)
    return Comparison(
        voxels=int(counts.sum()),
        truth_foreground=int(counts[truth > 0].sum()),
        label_foreground=int(counts[label > 0].sum()),
        truth_instances=truth_instances,
        label_instances=label_instances,
        same_partition=one_to_one and bool(np.all((truth == 0) == (label == 0))),
        identical=bool(np.all(truth == label)),
        ignore_background=bool(ignore_background),
        **_partition_scores(truth, label, counts, scored, by_label),
        matching=tuple(
            _ratios(float(threshold), count, truth_instances, label_instances)
            for threshold, count in zip(thresholds, matched, strict=True)
        ),
        splits=_divided(truth, label, counts, smaller, np.flatnonzero(objects), largest),
        merges=_divided(label, truth, counts, smaller, by_label[objects[by_label]], largest),
    )


def _check_largest(largest: int) -> None:
    allowed, do = "a whole number >= 0", "Pass e.g. largest=10."
    if isinstance(largest, bool) or not isinstance(largest, (int, np.integer)):
        raise InvalidType("largest", repr(largest), allowed, do)
    if largest < 0:
        raise InvalidArgument("largest", largest, allowed, do)


def _fractions(thresholds: Sequence[float]) -> list[Fraction]:
    """The thresholds as short fractions, so that IoUs compare with them as whole numbers."""
    allowed, do = "numbers from 0.5 to 1", "Pass e.g. thresholds=(0.5, 0.75)."
    number = (int, float, np.integer, np.floating)
    if not isinstance(thresholds, (Sequence, np.ndarray)) or not all(
        isinstance(t, number) and not isinstance(t, bool) for t in thresholds
    ):
        raise InvalidType("thresholds", repr(thresholds), allowed, do)
    # Below 1/2 an instance may match many others; NaN fails the comparison too.
    if not all(0.5 <= t <= 1 for t in thresholds):
        raise InvalidArgument("thresholds", repr(thresholds), allowed, do)
    return [Fraction(float(t)).limit_denominator(1000) for t in thresholds]


def _order(first: UInt64, second: UInt64) -> Int64:
    """The order that sorts the pairs by ``first``, then by ``second``.

    One sort of both in one number; being stable, it finds the runs that are sorted already, and
    so merges tables rather than sorting them anew.
    """
    if len(first) == 0:
        return np.empty(0, np.int64)
    key = (_below_2_32(first) << np.uint64(32)) | _below_2_32(second)
    return np.argsort(key, kind="stable").astype(np.int64, copy=False)


def _below_2_32(ids: UInt64) -> UInt64:
    """Numbers below 2**32 in the order of the ids: the ids, or their ranks."""
    if int(ids.max()) < 1 << 32:
        return ids
    return np.unique(ids, return_inverse=True)[1].astype(np.uint64)


def _starts(*ordered: UInt64) -> Int64:
    """Where each run of equal rows starts."""
    first = np.ones(len(ordered[0]), dtype=bool)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in ordered])
    return np.flatnonzero(first).astype(np.int64, copy=False)


def _sums(ordered: UInt64, counts: Int64) -> Int64:
    """Voxels of each id."""
    if len(counts) == 0:
        return counts
    return np.asarray(np.add.reduceat(counts, _starts(ordered)), dtype=np.int64)


def _row_sizes(ids: UInt64, counts: Int64, order: Int64 | None = None) -> Int64:
    """For each row, all voxels of its id; ``order`` sorts the ids (None: they are sorted)."""
    order = np.arange(len(ids)) if order is None else order
    lengths = np.diff(_starts(ids[order]), append=len(ids))
    sizes = np.empty_like(counts)
    sizes[order] = np.repeat(_sums(ids[order], counts[order]), lengths)
    return sizes


def _partition_scores(
    truth: UInt64, label: UInt64, counts: Int64, scored: npt.NDArray[np.bool_], by_label: Int64
) -> dict[str, Any]:
    """Variation of information and adapted Rand error over the scored rows.

    All of them are sums over sizes of segments, in which equal sizes are counted first: there are
    few different ones, so whole numbers of any length and correctly rounded sums cost nothing, and
    names of ids cannot matter.
    """
    by_label = by_label[scored[by_label]]
    both = _histogram(counts[scored])
    truths = _histogram(_sums(truth[scored], counts[scored]))
    labels = _histogram(_sums(label[by_label], counts[by_label]))
    voxels = sum(size * times for size, times in both)
    in_both, in_truth, in_labels = (
        sum(times * size * (size - 1) for size, times in one) for one in (both, truths, labels)
    )
    bits_both, bits_truth, bits_labels = (
        math.fsum(times * size * math.log2(size) for size, times in one)
        for one in (both, truths, labels)
    )
    pairs = in_truth + in_labels
    return {
        "scored_voxels": voxels,
        "vi_split": max(0.0, bits_truth - bits_both) / max(voxels, 1),
        "vi_merge": max(0.0, bits_labels - bits_both) / max(voxels, 1),
        "adapted_rand_error": (pairs - 2 * in_both) / pairs if pairs else 0.0,
        "rand_precision": in_both / in_labels if in_labels else 1.0,
        "rand_recall": in_both / in_truth if in_truth else 1.0,
    }


def _histogram(sizes: Int64) -> list[tuple[int, int]]:
    """Each size that occurs and how many times."""
    values, times = np.unique(sizes, return_counts=True)
    return list(zip(values.tolist(), times.tolist(), strict=True))


def _matched(
    truth: UInt64, label: UInt64, common: Int64, union: Int64, thresholds: Sequence[Fraction]
) -> list[int]:
    """Size of the largest one-to-one matching at each threshold.

    Pairs with an IoU above 1/2 have no rival. An instance with two partners of IoU exactly 1/2
    consists of these two, which then have no other partner; so each surplus partner is one too
    many: pairs - (pairs - truths) - (pairs - labels).
    """
    matched = []
    for threshold in thresholds:
        enough = common * threshold.denominator >= union * threshold.numerator
        truths, labels = (len(np.unique(ids[enough])) for ids in (truth, label))
        matched.append(truths + labels - int(np.count_nonzero(enough)))
    return matched


def _ratios(iou: float, matched: int, truths: int, labels: int) -> Matching:
    nothing = 1.0 if truths == labels == 0 else 0.0
    return Matching(
        iou=iou,
        matched=matched,
        precision=matched / labels if labels else nothing,
        recall=matched / truths if truths else nothing,
        f1=2 * matched / (truths + labels) if truths + labels else nothing,
    )


def _divided(
    ids: UInt64, others: UInt64, counts: Int64, smaller: Int64, rows: Int64, largest: int
) -> tuple[Divided, ...]:
    """The ids that several others cover, most displaced voxels first.

    ``rows`` are the pairs of instances in the order of the ids, ``smaller`` is the size of the
    smaller instance of each pair.
    """
    if len(rows) == 0:
        return ()
    ids, others, counts, smaller = ids[rows], others[rows], counts[rows], smaller[rows]
    starts = _starts(ids)
    pieces = np.diff(starts, append=len(ids))
    voxels = np.add.reduceat(counts, starts)
    outside = voxels - np.maximum.reduceat(counts, starts)
    solid = np.where(counts * _SLIVER >= smaller, counts, 0)
    displaced = np.add.reduceat(solid, starts) - np.maximum.reduceat(solid, starts)
    several = np.flatnonzero(pieces > 1)
    ranks = np.lexsort((-outside[several], -displaced[several]))
    several = several[ranks][:largest]
    found = []
    for i in several.tolist():
        its = slice(starts[i], starts[i] + pieces[i])
        first = np.lexsort((others[its], -counts[its]))[:_PIECES]
        listed = zip(others[its][first].tolist(), counts[its][first].tolist(), strict=True)
        found.append(
            Divided(
                id=int(ids[starts[i]]),
                voxels=int(voxels[i]),
                pieces=int(pieces[i]),
                displaced=int(displaced[i]),
                largest=tuple(Piece(*piece) for piece in listed),
            )
        )
    return tuple(found)
