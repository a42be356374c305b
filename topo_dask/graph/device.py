"""What tasks take of a GPU's memory at most, all of their voxels being foreground."""

from __future__ import annotations

from topo_dask.config import FlowSettings

FIELDS = {"coordinate": 60, "heat": 40}
"""Bytes a voxel that diffuses: fields twice, labels, links, the flow."""

PARTICLE = 28
"""Bytes of a position and the steps that are left."""


def device_memory_of_flow(read: int, settings: FlowSettings) -> int:
    """Bytes of the flow of a block that reads so many voxels.

    Examples
    --------
    >>> device_memory_of_flow(10, FlowSettings(potential="heat"))
    400
    """
    if settings.method == "direct":
        return 24 * read  # labels, small numbers, the flow
    return FIELDS.get(settings.potential, 0) * read


def device_memory_of_tracking(core: int, read: int, itemsize: int) -> int:
    """Bytes of the flow that is read, first as stored, then interleaved; and of the particles."""
    stored = 3 * (itemsize + 4 * (itemsize != 4))
    return max((stored + 16) * read, 16 * read + (1 + 8 + PARTICLE) * core)


def device_memory_of_cells(core: int) -> int:
    """Bytes of the ends of a block's particles while they are sorted by cell."""
    return (24 + 8 * 6) * core


def device_memory_of_errors(core: int, itemsize: int) -> int:
    """Bytes of the flow of a block, as stored and interleaved, and of its labels."""
    stored = 3 * (itemsize + 4 * (itemsize != 4))
    return (max(stored, 12) + 16) * core
