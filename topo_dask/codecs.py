"""Chunks that were cut short are told, whatever they are compressed with.

Other codecs notice it. Blosc goes by the length that stands in a chunk's header and reads on behind
the end of the chunk, in whatever memory comes next: that may fail, or give other voxels.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec
from zarr.core.metadata import ArrayV2Metadata

HEADER = 16
"""Bytes of a chunk's header; the last four are the length of the chunk with it."""


class WholeBlosc(Blosc):  # type: ignore[misc]
    """Blosc that refuses chunks that are shorter than they say.

    Examples
    --------
    >>> codec = WholeBlosc()
    >>> chunk = codec.encode(b"abc" * 100)
    >>> bytes(codec.decode(chunk)) == b"abc" * 100
    True
    >>> codec.decode(chunk[:-1])
    Traceback (most recent call last):
    ...
    ValueError: a chunk of ... bytes, of ... that it should have: it was cut short
    """

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decompress a chunk."""
        content = memoryview(buf).cast("B")
        size = max(HEADER, int.from_bytes(content[12:HEADER], "little"))
        if content.nbytes < size:
            text = f"a chunk of {content.nbytes} bytes, of {size} that it should have"
            raise ValueError(f"{text}: it was cut short")
        return super().decode(buf, out)


class WholeBloscCodec(BloscCodec):
    """The same for zarr format 3."""

    @cached_property
    def _blosc_codec(self) -> WholeBlosc:
        return _whole(super()._blosc_codec)


def _whole(codec: Blosc) -> WholeBlosc:
    settings = {name: value for name, value in codec.get_config().items() if name != "id"}
    return WholeBlosc(**settings)


def careful(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The same array for reading, which refuses chunks that were cut short."""
    metadata: Any = array.metadata
    if isinstance(metadata, ArrayV2Metadata):
        if not isinstance(metadata.compressor, Blosc):
            return array
        metadata = replace(metadata, compressor=_whole(metadata.compressor))
    else:
        codecs = tuple(_careful_codec(codec) for codec in metadata.codecs)
        if codecs == metadata.codecs:
            return array
        metadata = replace(metadata, codecs=codecs)
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path))


def _careful_codec(codec: Any) -> Any:
    if not isinstance(codec, BloscCodec):
        return codec
    settings = {name: value for name, value in asdict(codec).items() if name[0] != "_"}
    return WholeBloscCodec(**settings)
