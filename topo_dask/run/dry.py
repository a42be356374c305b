"""A run that ends where work would begin, with what it would have taken."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from topo_dask.errors import InvalidArgument
from topo_dask.plan.work import Work
from topo_dask.run.execute import Cluster, Engine


class Ended(Exception):
    """How a dry run comes back from inside the job, which has made all of its checks by then."""

    def __init__(self, work: Work) -> None:
        super().__init__(work.what)
        self.work = work


class DryRun(Engine):
    """Stands for the cluster of a job that is only to be planned.

    Parameters
    ----------
    cluster
        Where it would run.
    sample
        Parts to sample, for those who ask.
    """

    def __init__(self, cluster: Cluster = None, sample: int = 0) -> None:
        super().__init__("dry run", 1)
        self.cluster, self.sample = cluster, sample

    def end(self, work: Work | None) -> NoReturn:
        """Leave the job."""
        if work is None:
            raise InvalidArgument("job", "one without a plan", "flows, segment and the like")
        raise Ended(work)

    def _completed(self, function: Any, items: Any) -> Iterator[Any]:
        raise AssertionError("unreachable: a dry run has ended before any task")


def nowhere() -> Path:
    """A place for the output of a job that is only planned; nothing is ever written there."""
    return Path(tempfile.gettempdir()) / f"topo-dask-plan-{uuid.uuid4().hex}.zarr"
