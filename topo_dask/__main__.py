"""``python -m topo_dask``: the command line."""

from topo_dask.cli import main

main()
