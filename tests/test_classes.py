"""Classes: their defaults, and what users may and may not say about them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topo_dask
from topo_dask.classes import (
    ClassFlows,
    ClassInstances,
    classes_of,
    flow_config,
    names_of_classes,
    postprocess_config,
)
from topo_dask.config import FlowSettings
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType

SIZES = [8, 16, 32, 64]


# ── defaults ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES)
def test_every_class_has_defaults_that_pass_the_checks(size: int) -> None:
    names = topo_dask.EVALUATED_INSTANCE_CLASSES
    assert names == ["nuc", "ves", "endo", "lyso", "ld", "perox", "mito", "mt", "cell"]
    assert list(flow_config(resolution_nm=size)) == names
    assert list(postprocess_config(resolution_nm=size)) == names
    for name, how in topo_dask.get_instance_class_config(size).items():
        assert how["group"] == topo_dask.get_postprocess_config(size)[name]["group"]


def test_defaults_of_the_finest_size() -> None:
    flows = topo_dask.get_instance_class_config(8)
    assert flows["nuc"] == {"group": 1, "flow_type": "direct"}
    assert flows["cell"] == {
        "group": 2,
        "flow_type": "diffusion",
        "diffusion_iters": 400,
        "boundary_only": True,
        "boundary_width": 40,
    }
    assert topo_dask.get_postprocess_config(8)["nuc"] == {
        "group": 1,
        "n_steps": 943,
        "step_size": 1.0,
        "convergence_radius": 58.0,
        "min_size": 5331,
    }


@pytest.mark.parametrize(
    "get", [topo_dask.get_instance_class_config, topo_dask.get_postprocess_config]
)
@pytest.mark.parametrize(
    ("size", "nearest"), [(0.5, 8), (4, 8), (12, 8), (12.1, 16), (24, 16), (48, 32), (500, 64)]
)
def test_other_sizes_take_the_nearest(get: Any, size: float, nearest: int) -> None:
    assert get(size) == get(nearest)


def test_defaults_may_be_changed_by_who_got_them() -> None:
    mine = topo_dask.get_instance_class_config(8)
    mine["mito"]["diffusion_iters"] = 5
    del mine["nuc"]
    again = topo_dask.get_instance_class_config(8)
    assert again["mito"]["diffusion_iters"] == 2000
    assert "nuc" in again


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (None, InvalidArgument),
        (0, InvalidArgument),
        (-8, InvalidArgument),
        (float("nan"), InvalidArgument),
        ("8", InvalidType),
    ],
)
def test_a_size_that_is_none(size: Any, error: type[Exception]) -> None:
    for get in (
        topo_dask.get_instance_class_config,
        topo_dask.get_postprocess_config,
        lambda s: flow_config(None, s),
        lambda s: postprocess_config(None, s),
    ):
        with pytest.raises(error, match="resolution_nm"):
            get(size)


# ── configurations of users ──────────────────────────────────────────────────────────────────


def test_a_class_says_what_differs() -> None:
    config = flow_config({"glia": {"flow_type": "diffusion"}, "nuc": {}})
    assert config == {"glia": ClassFlows(flow_type="diffusion"), "nuc": ClassFlows()}
    others = FlowSettings(n_iter=70, adaptive_iters=False, adaptive_factor=3, tolerance=1e-3)
    assert config["glia"].settings(others) == others
    assert config["nuc"].settings(others).method == "direct"
    fixed = ClassFlows(flow_type="diffusion", diffusion_iters=9, potential="heat")
    assert fixed.settings(others).n_iter == 9
    assert fixed.settings(others).potential == "heat"


def test_near_background_only_where_asked() -> None:
    assert ClassFlows(boundary_width=7).reach is None
    assert ClassFlows(boundary_only=True, boundary_width=7).reach == 7


def test_with_a_size_the_others_keep_their_defaults() -> None:
    config = flow_config({"mito": {"flow_type": "direct"}}, 16)
    assert config["mito"] == ClassFlows(flow_type="direct")
    assert config["cell"].boundary_width == 20


def test_defaults_are_a_configuration() -> None:
    for size in SIZES:
        assert flow_config(topo_dask.get_instance_class_config(size)) == flow_config(None, size)
        assert postprocess_config(topo_dask.get_postprocess_config(size)) == postprocess_config(
            None, size
        )


YAML = """
flow_generation:
  8:
    glia: {flow_type: diffusion, diffusion_iters: 300}
  32:
    glia: {flow_type: diffusion, diffusion_iters: 75, boundary_only: true, boundary_width: 2.5}
postprocessing:
  glia: {group: 2, n_steps: 40}
"""


def test_a_file_holds_both_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(YAML)
    for given in (path, str(path)):
        assert flow_config(given, 10)["glia"].diffusion_iters == 300
        assert flow_config(given, 30)["glia"].boundary_width == 2.5
        assert postprocess_config(given)["glia"] == ClassInstances(group=2, n_steps=40)
    with pytest.raises(InvalidArgument, match="resolution_nm: got None"):
        flow_config(path)
    copied = Path(topo_dask.__file__).parent / "class_defaults.yaml"
    assert flow_config(copied, 64) == flow_config(None, 64)


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("glia: {flow_type: diffusion}\n")
    assert flow_config(path) == {"glia": ClassFlows(flow_type="diffusion")}


# ── bad input ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "error", "parts"),
    [
        (
            {"cell": {"boundry_width": 4}},
            InvalidArgument,
            ["'boundry_width'", "'cell'", "boundary_only", "Did you mean 'boundary_width'?"],
        ),
        ({"cell": {"n_steps": 4}}, InvalidArgument, ["'n_steps'", "'cell'", "flow_type"]),
        ({"cell": {1: 4}}, InvalidArgument, ["key 1", "'cell'"]),
        (
            {"cell": {"flow_type": "poison"}},
            InvalidArgument,
            ["flow_type of class 'cell'", "'poison'", "diffusion, direct"],
        ),
        ({"a": {"potential": "cold"}}, InvalidArgument, ["potential of class 'a'", "coordinate"]),
        ({"a": {"group": 4}}, InvalidArgument, ["group of class 'a'", "1, 2, 3"]),
        ({"a": {"diffusion_iters": -1}}, InvalidArgument, ["diffusion_iters of class 'a'", ">= 0"]),
        ({"a": {"diffusion_iters": 1.5}}, InvalidArgument, ["diffusion_iters of class 'a'"]),
        ({"a": {"boundary_width": -2}}, InvalidArgument, ["boundary_width of class 'a'"]),
        ({"a": {"boundary_width": float("inf")}}, InvalidArgument, ["boundary_width of class 'a'"]),
        ({"a": {"boundary_only": 1}}, InvalidType, ["boundary_only of class 'a'", "true or false"]),
        ({"a": "direct"}, InvalidType, ["'direct' for class 'a'", "flow_type"]),
        ({"a": None}, InvalidType, ["None for class 'a'"]),
        ({None: {}}, InvalidType, ["the class None"]),
        (["nuc"], InvalidType, ["class_config", "['nuc']"]),
        (3, InvalidType, ["class_config", "3"]),
        ({"flow_generation": 5}, InvalidType, ["class_config", "5"]),
    ],
)
def test_a_mistake_is_named(given: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        flow_config(given, None)
    for part in ["class_config", *parts]:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"n_steps": -1}, "n_steps"),
        ({"n_steps": 2**31}, "n_steps"),
        ({"step_size": 0}, "step_size"),
        ({"step_size": 1e39}, "step_size"),
        ({"convergence_radius": "4"}, "convergence_radius"),
        ({"min_size": 2.5}, "min_size"),
        ({"group": 0}, "group"),
        ({"flow_type": "direct"}, "flow_type"),
    ],
)
def test_a_mistake_in_postprocessing_is_named(values: dict[str, Any], key: str) -> None:
    with pytest.raises((InvalidArgument, InvalidType), match=rf"{key}.* of class 'a'"):
        postprocess_config({"a": values})


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        (b"nuc: {flow_type: direct", InvalidData, "not YAML"),
        (b"nuc: {}\nmito: {}\nnuc: {}\n", InvalidData, "'nuc' stands there twice"),
        (b"nuc: {group: 1, group: 2}\n", InvalidData, "'group' stands there twice"),
        (b"nuc: !!python/object/apply:os.getcwd []\n", InvalidData, "not YAML"),
        (b"\xff\xfe\xfa", InvalidData, "not YAML"),
        (b"", InvalidType, "None"),
        (b"just text", InvalidType, "just text"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: bytes, error: type[Exception], part: str) -> None:
    path = tmp_path / "classes.yaml"
    path.write_bytes(text)
    with pytest.raises(error, match=re.escape(part)):
        flow_config(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"class_config.*none\.yaml"):
        flow_config(tmp_path / "none.yaml")
    with pytest.raises(InputNotFound, match="class_config"):
        flow_config(tmp_path)


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_names() -> None:
    assert names_of_classes(None, 9) == topo_dask.EVALUATED_INSTANCE_CLASSES
    assert names_of_classes(np.array(["a", "b"]), 2) == ["a", "b"]
    assert names_of_classes(("a", "a"), 2) == ["a", "a"]


@pytest.mark.parametrize(
    ("names", "count", "error", "part"),
    [
        (["a"], 2, InvalidArgument, "1 names (a) for 2 classes"),
        (["a", "b"], 1, InvalidArgument, "2 names (a, b) for 1 classes"),
        (None, 3, InvalidArgument, "the default names"),
        ("nuc", 1, InvalidType, "'nuc'"),
        ([1], 1, InvalidType, "[1]"),
        (7, 1, InvalidType, "7"),
        ({"a"}, 1, InvalidType, "{'a'}"),  # in no order
    ],
)
def test_names_that_do_not_fit(names: Any, count: int, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=rf"class_names.*{re.escape(part)}"):
        names_of_classes(names, count)


def test_an_unknown_class_names_the_known() -> None:
    config = flow_config(resolution_nm=8)
    with pytest.raises(InvalidArgument, match=r"'mitto'.*nuc, ves, .* cell.*mean 'mito'"):
        classes_of(["nuc", "mitto"], config)
    with pytest.raises(InvalidArgument, match=r"'nuc'.*known classes: axon.*Add 'nuc'"):
        classes_of(["nuc"], flow_config({"axon": {}}))
    with pytest.raises(InvalidArgument, match="known classes: none"):
        classes_of(["nuc"], flow_config({}))
