"""Diffusion flows on the device: `topo_dask.kernels.cpu.diffusion` and its rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.diffusion import TINY, undo, weights_of
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.cpu.rounds import Span, field_types
from topo_dask.kernels.gpu.arrays import fetched
from topo_dask.kernels.gpu.device import find_device
from topo_dask.kernels.gpu.fields import Fields, Start
from topo_dask.kernels.gpu.layout import Core, lay_out

__all__ = ["Span", "diffusion_flow", "diffusion_round", "field_types"]


def _by_number(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows of the table, after one of zeros for the background."""
    return np.concatenate((np.zeros((1, *values.shape[1:]), values.dtype), values))


@dataclass(frozen=True)
class _Question:
    """What is asked, but for the iterations."""

    labels: Integers
    ids: npt.NDArray[np.uint64]
    anchors: npt.NDArray[np.int64]
    origin: tuple[int, ...]
    core: tuple[slice, ...] | None
    spatial_mask: npt.NDArray[Any] | None
    potential: str
    spacing: tuple[float, ...]

    def factors(self, iterations: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What the fields' changes along each axis count, by number of instance."""
        if self.potential == "heat":
            scale = [min(self.spacing) / s for s in self.spacing]
            return np.tile(np.array(scale * 2), (len(self.ids) + 1, 1))
        again = undo(weights_of(self.spacing), _by_number(iterations))
        anchors = _by_number(np.asarray(self.anchors, dtype=np.float64))
        return np.hstack((anchors, np.tile(again[:, None], 3)))

    def answer(
        self,
        left: npt.NDArray[np.int64],
        factors: npt.NDArray[np.float64],
        begun: list[npt.NDArray[Any]] | None = None,
        *,
        keep: bool = False,
    ) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
        """Make the iterations that are left of each instance; give the fields to keep, and flow."""
        device = find_device()
        with device.working():
            core = Core.of(self.core, self.labels.shape)
            layout = lay_out(device, self.labels, self.ids, left, core, self.spatial_mask)
            relative = self.potential == "coordinate"
            shift = np.asarray(self.anchors, dtype=np.int64) - np.asarray(self.origin)
            fields = Fields.zero(layout, relative=relative)
            made = fields.advance(Start(_by_number(shift), begun), weights_of(self.spacing))
            flow = fields.flow(made, core, factors, TINY if relative else 0.0)
            flow = fetched(device, flow, like=self.labels)
            if not keep:
                return [], flow
            cores = [layout.core_of(field, core) for field in made]
            return [fetched(device, field, like=self.labels) for field in cores], flow


def diffusion_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    potential: str = "coordinate",
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Flow of every instance of an array by diffusion, all instances in the same launches.

    Parameters, answer and arithmetic are those of `topo_dask.kernels.cpu.diffusion_flow`;
    ``threads`` is ignored.

    Raises
    ------
    DeviceMemoryError
        The array does not fit: it takes about 60 bytes a voxel for the coordinate potential
        (two copies of 20 bytes of fields, labels, flow), 40 for heat.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> one = np.array([5], dtype=np.uint64), np.array([10]), np.array([[0, 0, 2]])
    >>> flow = diffusion_flow(
    ...     labels, ids=one[0], iterations=one[1], anchors=one[2], potential="heat"
    ... )
    >>> flow[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    question = _Question(labels, ids, anchors, origin, core, spatial_mask, potential, spacing)
    total = np.asarray(iterations, dtype=np.int64)
    return question.answer(total, question.factors(total))[1]


def diffusion_round(
    labels: Integers,
    fields: list[npt.NDArray[Any]] | None,
    *,
    span: Span,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    potential: str = "coordinate",
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
    """Some iterations of `diffusion_flow`, and the flow of the instances that end among them.

    Parameters and answer are those of `topo_dask.kernels.cpu.diffusion_round`; ``threads`` is
    ignored. Both answers equal those of the whole volume on the device to the bit.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> facts = dict(ids=np.array([5], np.uint64), iterations=np.array([10]))
    >>> facts |= dict(anchors=np.array([[0, 0, 2]]), potential="heat")
    >>> fields, flow = diffusion_round(labels, None, span=Span(0, 6), **facts)
    >>> flow.any()
    np.False_
    >>> diffusion_round(labels, fields, span=Span(6, 12), **facts)[1][2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    question = _Question(labels, ids, anchors, origin, core, spatial_mask, potential, spacing)
    total = np.asarray(iterations, dtype=np.int64)
    ends = (total > span.first) & (total <= span.end)
    if span.first == 0:
        ends |= total == 0
    left = np.where(ends, total, span.end) - span.first
    left = np.where(ends | (total > span.end), left, -1)
    factors = question.factors(total)
    factors[1:][~ends] = np.nan
    return question.answer(left, factors, fields, keep=True)
