"""The coordinate potential of an instance that fills its volume: no wall, so a closed form.

There each coordinate diffuses along its own axis alone, between two faces without flux. What is
left of its slope after many iterations may be less than float32 holds beside the coordinates, and
what sweeps leave of it is noise that would be stretched to unit length; the closed form has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct

from topo_dask.kernels.cpu.diffusion import TINY, weights_of


def _slope(length: int, iterations: int, weight: float) -> npt.NDArray[np.float64]:
    """The slope of an axis's coordinate after some iterations, one-sided at the faces.

    Cosines of half a period, a whole one, ... each keep their form: an iteration multiplies that
    of k halves by 1 - 2w (1 - cos(pi k / N)).
    """
    if length == 1:
        return np.zeros(1)
    middle = np.arange(length) - (length - 1) / 2
    kept = 1 - 2 * weight * (1 - np.cos(np.pi * np.arange(length) / length))
    spread = idct(dct(middle, norm="ortho") * kept ** float(iterations), norm="ortho")
    return np.asarray(np.gradient(spread))


def filled_flow(
    shape: Sequence[int],
    iterations: int,
    *,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    core: tuple[slice, ...] | None = None,
) -> npt.NDArray[np.float32]:
    """Flow of the coordinate potential in an instance that fills a volume.

    Parameters
    ----------
    shape
        Of the volume, all of whose faces are without flux.
    iterations
        How often each value becomes the mean of its neighbours.
    spacing
        Distance of voxels along z, y, x.
    core
        Part of the volume that is returned; ``None`` means all of it.

    Returns
    -------
    float32 ``[3, *core shape]``: g/max(|g|, 1e-8), with g_d the slope of the coordinate along d.

    Examples
    --------
    >>> filled_flow((1, 1, 3), 5)[2, 0, 0]
    array([1., 1., 1.], dtype=float32)
    >>> bool(filled_flow((1, 1, 3), 500).max() < 1e-9)
    True
    """
    part = core or tuple(slice(0, n) for n in shape)
    slopes = [
        _slope(n, iterations, w)[along]
        for n, w, along in zip(shape, weights_of(spacing), part, strict=True)
    ]
    a, b, c = np.ix_(*slopes)
    scale = 1 / np.maximum(np.sqrt(a * a + b * b + c * c), TINY)
    flow = np.empty((3, *scale.shape), dtype=np.float32)
    flow[0], flow[1], flow[2] = a * scale, b * scale, c * scale
    return flow
