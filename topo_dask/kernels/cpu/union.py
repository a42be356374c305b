"""Union-find over rows: every row points at a smaller one of its component, or at itself."""

from __future__ import annotations

from typing import Any

from topo_dask.kernels.jit import compiled


@compiled
def join_rows(parent: Any, pairs: Any) -> None:
    """Unite the components of the two rows of each pair; the smaller root stays the root.

    ``parent`` begins as ``arange``. Both paths are followed at once, always from the row with the
    larger parent, which is then pointed at the smaller one; so no path is followed further than
    needed, and paths get shorter as they are (Rem's algorithm with splicing).

    Source: Patwary, Blair, Manne, "Experiments on union-find algorithms for the disjoint-set data
    structure", SEA 2010.
    """
    for n in range(pairs.shape[0]):
        a, b = pairs[n, 0], pairs[n, 1]
        while parent[a] != parent[b]:
            if parent[a] < parent[b]:
                a, b = b, a
            above = parent[a]
            parent[a] = parent[b]
            if above == a:
                break
            a = above


@compiled
def point_at_roots(parent: Any) -> None:
    """Point every row at its root, the smallest row of its component."""
    for i in range(parent.size):
        parent[i] = parent[parent[i]]  # that one is done: it is smaller, or this one


@compiled
def number_roots(parent: Any, total: Any, least: Any, labels: Any) -> Any:
    """Number the roots whose total is at least ``least``, from 1 on; give how many.

    Parameters
    ----------
    parent
        Root of each row.
    total
        Of each root; overwritten.
    least
        Roots below this get 0.
    labels
        Of each row: filled with the number of its root. May be ``total``.
    """
    count = 0
    for i in range(parent.size):
        if parent[i] == i:
            large = total[i] >= least
            count += large
            labels[i] = count if large else 0
        else:
            labels[i] = labels[parent[i]]
    return count


@compiled
def add_to_roots(parent: Any, values: Any, total: Any) -> None:
    """Add the value of each row to the total of its root."""
    for i in range(parent.size):
        total[parent[i]] += values[i]


@compiled
def least_at_roots(parent: Any, values: Any, least: Any) -> None:
    """Lower what there is of each root to the smallest value of its rows."""
    for i in range(parent.size):
        least[parent[i]] = min(least[parent[i]], values[i])


@compiled
def most_at_roots(parent: Any, values: Any, most: Any) -> None:
    """Raise what there is of each root to the largest value of its rows."""
    for i in range(parent.size):
        most[parent[i]] = max(most[parent[i]], values[i])


@compiled
def spread_from_roots(parent: Any, values: Any) -> None:
    """Give every row the value of its root, in place."""
    for i in range(parent.size):
        values[i] = values[parent[i]]
