"""Zarr and OME-Zarr: open inputs, place outputs, publish them in one step. Never computes.

Inputs are zarr v2 or v3, chunked or sharded, at a path or URL. Outputs are written into a work
directory beside their final place and renamed when they are complete, so that a crash leaves what
was there before.
"""

from topo_dask.storage.output import (
    MARK,
    MAX_CHUNK,
    RECORD,
    AnyArray,
    Geometry,
    Output,
    Source,
    ZarrFormat,
    create_array,
    load_table,
    local_path,
    open_array,
    output_chunks,
    save_table,
    voxel_geometry,
)

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
