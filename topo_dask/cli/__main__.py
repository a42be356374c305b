"""``python -m topo_dask.cli``: the command line."""

import sys

from topo_dask.cli import main

sys.exit(main())
