"""Zarr and OME-Zarr: open inputs, place outputs, publish them in one step. Never computes.

Inputs are zarr v2 or v3, chunked or sharded, at a path or URL. Outputs are written into a work
directory beside their final place and renamed when they are complete, so that a crash leaves what
was there before.
"""

from topo_dask.storage.arrays import (
    MAX_CHUNK,
    AnyArray,
    ZarrFormat,
    create_array,
    output_chunks,
)
from topo_dask.storage.inputs import Source, open_array
from topo_dask.storage.metadata import MARK, Geometry, voxel_geometry
from topo_dask.storage.output import RECORD, Output
from topo_dask.storage.paths import local_path
from topo_dask.storage.tables import load_table, save_table

__all__ = [
    "MARK",
    "MAX_CHUNK",
    "RECORD",
    "AnyArray",
    "Geometry",
    "Output",
    "Source",
    "ZarrFormat",
    "create_array",
    "load_table",
    "local_path",
    "open_array",
    "output_chunks",
    "save_table",
    "voxel_geometry",
]
