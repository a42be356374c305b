"""The layout of the package: imports point one way, functions stay small.

Read off the syntax tree of every module, so imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "topo_dask"
ROOT = "(root)"  # topo_dask/__init__.py: the public names

# A room is a module or a package directly under topo_dask. Each may import the rooms named here.
BELOW_RUN = {"classes", "config", "errors", "graph", "grid", "kernels", "plan", "storage"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "grid": {"errors"},
    "kernels": {"errors", "kernels"},
    "graph": {"classes", "config", "errors", "graph", "grid", "kernels"},
    "codecs": set(),
    "storage": {"codecs", "errors", "grid", "storage"},
    "config": {"errors"},
    "classes": {"config", "errors"},
    "plan": {"classes", "config", "errors", "graph", "grid", "plan", "storage"},
    "run": BELOW_RUN | {"run"},
    "cluster": {"run"},
    "view": {"errors"},
    "testing": {"errors"},
    "demo": BELOW_RUN | {"run", "testing", "view"},
    "cli": BELOW_RUN | {"cli", "demo", "run", "testing", "view"},
    "__main__": {"cli"},
    ROOT: BELOW_RUN | {"cluster", "run", "testing", "view"},
}

# Libraries that only these places may import: optional ones, and ones that would make a layer
# do another layer's work.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "cupy": ("kernels/gpu/",),
    "cupyx": ("kernels/gpu/",),
    "dask_jobqueue": ("run/batch.py",),
    "click": ("cli/",),
    "distributed": ("run/",),
    "matplotlib": ("view.py",),
    "onnxruntime": ("run/models.py",),
    "tifffile": ("run/tile_table.py",),
    "torch": ("run/models.py",),
}
# kernels are pure functions on arrays; pictures and synthetic volumes are made from plain data.
NEVER_IN: dict[str, set[str]] = {
    "kernels": {"dask", "logging", "zarr"},
    "graph": {"zarr"},
    "grid": {"dask", "zarr"},
    "view": {"dask", "zarr"},
    "testing": {"dask", "zarr"},
}
# Nothing that comes out of a store or a ledger is unpickled.
MAY_UNPICKLE = {
    "run/bundles.py": "an error that was pickled in the line before",
    "run/map_tiles.py": "what the run itself wrote: its digest travels in the tasks",
}
# Only `run` computes.
LAZY_ROOMS = {"errors", "grid", "graph", "kernels", "classes", "config", "plan", "storage"}

MAX_LINES = 80
MAX_PARAMETERS = 8
# Public functions whose parameters are the user's settings by name; and why they may have more.
KEEPS_TOPO_NAMES = "its leading parameters are those of the topo package, the options are by name"
RUN_BY_NAME = "a run on disk takes every setting of its method by name"
MANY_PARAMETERS: dict[str, str] = {
    "graph/flows.py:generate_diffusion_flows": KEEPS_TOPO_NAMES,
    "graph/merge.py:postprocess_single": KEEPS_TOPO_NAMES,
    "graph/segmentation.py:run_instance_segmentation": KEEPS_TOPO_NAMES,
    "graph/targets.py:compute_flow_targets": KEEPS_TOPO_NAMES,
    "run/flows.py:flows": RUN_BY_NAME,
    "run/mosaic.py:fuse_mosaic": RUN_BY_NAME,
    "run/relabel.py:relabel": RUN_BY_NAME,
    "run/segment.py:segment": RUN_BY_NAME,
    "run/segment_classes.py:segment_classes": RUN_BY_NAME,
    "run/instances.py:instance_table": RUN_BY_NAME,
    "run/map_tiles.py:map_tiles": RUN_BY_NAME,
    "run/targets.py:flow_targets": RUN_BY_NAME,
    "kernels/gpu/split.py:diffusion_round": "the whole definition of the field of one block",
    "kernels/cpu/rounds.py:diffusion_round": "the whole definition of the field of one block",
    "kernels/cpu/diffusion.py:diffusion_flow": "the whole definition of the field of one block",
    "kernels/gpu/diffusion.py:diffusion_round": "the whole definition of the field of one block",
    "kernels/gpu/diffusion.py:diffusion_flow": "the whole definition of the field of one block",
    "kernels/cpu/rows.py:_recurrence_of.add": "compiled code takes its arrays one by one",
    "kernels/cpu/chebyshev.py:chebyshev_flow": "the whole definition of the field of one block",
    "kernels/reference.py:diffusion_flow": "the whole definition of the field of one block",
    "kernels/reference.py:chebyshev_flow": "the whole definition of the field of one block",
}


def room_of(path: str) -> str:
    """The room of a module: `kernels/cpu.py` is in `kernels`, `grid.py` is `grid`."""
    first = path.split("/")[0].removesuffix(".py")
    return ROOT if first == "__init__" else first


def own_room(module: str) -> str | None:
    """The room that an absolute module name of ours lies in; None for other packages."""
    names = module.split(".")
    if names[0] != "topo_dask":
        return None
    return names[1] if len(names) > 1 else ROOT


def imported_modules(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every absolute module name that a module imports, with its line."""
    package = ["topo_dask", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "topo_dask":  # from topo_dask import kernels
                for alias in node.names:
                    named = alias.name in MAY_IMPORT
                    yield node.lineno, f"topo_dask.{alias.name}" if named else "topo_dask"
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            argument = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def import_violations(path: str, tree: ast.AST) -> Iterator[str]:
    room = room_of(path)
    if room not in MAY_IMPORT:
        yield f"{path}: nobody placed '{room}' in the order of MAY_IMPORT"
        return
    for line, module in imported_modules(path, tree):
        target, library = own_room(module), module.split(".")[0]
        if target is not None and target not in MAY_IMPORT[room]:
            yield f"{path}:{line}: {room} imports {target} against the order"
        places = ONLY_IN.get(library)
        if places is not None and not any(
            path.startswith(place) if place.endswith("/") else path == place for place in places
        ):
            yield f"{path}:{line}: {library} is imported outside {', '.join(places)}"
        if library in NEVER_IN.get(room, ()):
            yield f"{path}:{line}: {room} imports {library}"


def compute_violations(path: str, tree: ast.AST) -> Iterator[str]:
    if room_of(path) not in LAZY_ROOMS:
        return
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"compute", "persist"}
        ):
            yield f"{path}:{node.lineno}: .{node.func.attr}() outside run"


def unpickling(path: str, tree: ast.AST) -> Iterator[str]:
    """What would run code that a file holds."""
    if path in MAY_UNPICKLE:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if ast.unparse(node.value) != "False":
                yield f"{path}:{node.value.lineno}: allow_pickle"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            of_pickle = "pickle" in name and node.attr in {"loads", "load", "Unpickler"}
            if of_pickle or node.attr in {"unsafe_load", "full_load", "read_pickle"}:
                yield f"{path}:{node.lineno}: {name} runs code that a file holds"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, bool, ast.FunctionDef]]:
    """Every function with its qualified name, and whether it is a method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.ClassDef):
                yield prefix + node.name, isinstance(tree, ast.ClassDef), node  # type: ignore[misc]
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def code_lines(node: ast.FunctionDef) -> int:
    """Lines from `def` to the end; the docstring is for the reader and does not count."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        text = node.body[0]
        assert text.end_lineno is not None
        lines -= text.end_lineno - text.lineno + 1
    return lines


def parameter_count(node: ast.FunctionDef, *, method: bool) -> int:
    a = node.args
    names = [p.arg for p in (*a.posonlyargs, *a.args)]
    bound = method and names[:1] in (["self"], ["cls"])
    return len(names) - bound + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)


def size_violations(path: str, tree: ast.AST) -> Iterator[str]:
    for name, method, node in functions(tree):
        lines, count = code_lines(node), parameter_count(node, method=method)
        if lines > MAX_LINES:
            yield f"{path}:{node.lineno}: {name} has {lines} lines, allowed are {MAX_LINES}"
        if count > MAX_PARAMETERS and f"{path}:{name}" not in MANY_PARAMETERS:
            yield f"{path}:{node.lineno}: {name} has {count} parameters, allowed {MAX_PARAMETERS}"


def violations(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    checks = (import_violations, compute_violations, unpickling, size_violations)
    return [line for check in checks for line in check(path, tree)]


MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_the_layout(path: str) -> None:
    found = violations(path, (PACKAGE / path).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_all_arrows_point_down() -> None:
    """The order itself has no cycle: some line-up of the rooms has every arrow backwards."""
    left = {room: below - {room} for room, below in MAY_IMPORT.items()}
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"cycle among {sorted(left)}"
        for room in free:
            del left[room]


LONG = "def f():\n" + "    x = 1\n" * 80
WIDE = "def f(a, b, c, d, e, f, g, h, i): ..."


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("kernels/cpu.py", "from topo_dask.graph import flows", "kernels imports graph"),
        ("kernels/cpu.py", "from topo_dask import graph", "kernels imports graph"),
        ("kernels/cpu.py", "from ..graph import flows", "kernels imports graph"),
        ("kernels/cpu.py", "from .. import graph", "kernels imports graph"),
        ("grid.py", "from .storage import Output", "grid imports storage"),
        ("grid.py", "import topo_dask.storage as s", "grid imports storage"),
        ("grid.py", "from topo_dask import segment", "grid imports (root)"),
        ("storage/output.py", "def f():\n    import topo_dask.run.execute", "storage imports run"),
        ("plan.py", "importlib.import_module('topo_dask.run')", "plan imports run"),
        ("view.py", "if TYPE_CHECKING:\n    from topo_dask.run import x", "view imports run"),
        ("errors.py", "from topo_dask import grid", "errors imports grid"),
        ("extra/thing.py", "", "nobody placed 'extra'"),
        ("extra.py", "", "nobody placed 'extra'"),
        ("graph/flows.py", "def f():\n    import cupy as cp", "cupy is imported outside"),
        ("kernels/cpu.py", "from cupyx.scipy import ndimage", "cupyx is imported outside"),
        ("run/execute.py", "from dask_jobqueue import SLURMCluster", "dask_jobqueue is imported"),
        ("kernels/cpu.py", "import logging", "kernels imports logging"),
        ("kernels/cpu.py", "import dask.array as da", "kernels imports dask"),
        ("graph/track.py", "def f(x):\n    return x.compute()", ".compute() outside run"),
        ("storage/tables.py", "import pickle\npickle.load(f)", "pickle.load runs code"),
        ("run/files.py", "np.load(p, allow_pickle=True)", "allow_pickle"),
        ("run/record.py", "yaml.unsafe_load(f)", "unsafe_load runs code"),
        ("grid.py", LONG, "f has 81 lines"),
        ("grid.py", f"class C:\n    {WIDE}", "C.f has 9 parameters"),
        ("grid.py", f"def outer():\n    {WIDE}", "outer.f has 9 parameters"),
        ("grid.py", "def f(a, b, c, d, /, e, f, *g, h, **i): ...", "f has 9 parameters"),
    ],
)
def test_planted_violation_is_caught(path: str, source: str, message: str) -> None:
    found = violations(path, source)
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("graph/flows.py", "from topo_dask.kernels import cpu\nfrom ..grid import Region"),
        ("run/batch.py", "def f():\n    import dask_jobqueue"),
        ("kernels/gpu/device.py", "def f():\n    import cupy"),
        ("kernels/cpu.py", "from . import tables"),
        ("grid.py", 'def f():\n    """' + "\n" * 90 + '"""\n    return 1'),
        ("grid.py", "class C:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
        ("run/flows.py", WIDE.replace("def f", "def flows")),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_longer_parameter_lists_are_still_needed() -> None:
    counts: dict[str, int] = {}
    for path in MODULES:
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for name, method, node in functions(tree):
            counts[f"{path}:{name}"] = parameter_count(node, method=method)
    idle = [key for key in MANY_PARAMETERS if counts.get(key, 99) <= MAX_PARAMETERS]
    assert not idle, f"these are within the limit, take them off the list: {idle}"


IMPORT = """
import copy, logging, os, signal, sys, threading, warnings
# What these do when they are imported is theirs (scipy adds warning filters).
import dask.array, distributed, numba, numpy, scipy.ndimage, scipy.sparse.csgraph, zarr

def state():
    return {
        "dask": copy.deepcopy(dask.config.config),
        "zarr": copy.deepcopy(zarr.config.config),
        "numba": numba.get_num_threads(),
        "numpy errors": numpy.geterr(),
        "numpy printing": numpy.get_printoptions(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": threading.active_count(),
    }

before, loaded = state(), set(sys.modules)  # dask imports cupy where it is installed
import topo_dask
after = state()
print([name for name in before if before[name] != after[name]])
print([name for name in ("bokeh", "cupy", "dask_jobqueue", "hypothesis", "matplotlib",
                         "onnxruntime", "s3fs", "tifffile", "torch")
       if name in set(sys.modules) - loaded])
"""


def test_import_changes_no_settings_and_loads_nothing_optional() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.splitlines() == ["[]", "[]"], done.stdout
