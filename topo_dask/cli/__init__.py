"""The command line: parses, calls, prints. Options have the names of the Python parameters."""

from topo_dask.cli.options import main

__all__ = ["main"]
