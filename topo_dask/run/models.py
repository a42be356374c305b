"""Models of any kind as functions of NumPy arrays, and what tells one from another."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.base import tokenize

from topo_dask.errors import BackendUnavailable, InputNotFound, InvalidArgument, InvalidType

ONNX_SUFFIX = ".onnx"
ALLOWED = (
    'a function from NumPy array to NumPy array, its name "module:function", a PyTorch module, '
    "or the path of an .onnx file"
)


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A PyTorch module as a function of NumPy arrays, computed where its weights are.

    Parameters
    ----------
    module
        In evaluation mode.
    """

    module: Any

    def __call__(self, part: npt.NDArray[Any], **options: Any) -> npt.NDArray[Any]:
        """Apply it; the array is given in the type of the weights."""
        import torch

        given = torch.from_numpy(np.ascontiguousarray(part))
        weights = next(iter(self.module.parameters()), None)
        if weights is not None:
            given = given.to(weights.device, weights.dtype)
        with torch.inference_mode():
            result = self.module(given, **options)
        result = result.float() if result.dtype == torch.bfloat16 else result
        values: npt.NDArray[Any] = result.cpu().numpy()
        return values

    @property
    def mark(self) -> str:
        """Its structure and weights."""
        found = hashlib.sha256(repr(self.module).encode())
        for name, values in sorted(self.module.state_dict().items()):
            found.update(name.encode())
            if hasattr(values, "cpu"):
                flat = values.detach().cpu().contiguous()
                found.update(f"{flat.dtype} {tuple(flat.shape)}".encode())
                found.update(flat.reshape(-1).view(_torch().uint8).numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class OnnxModel:
    """The first output of an ONNX model with one input; each process opens the file itself.

    Parameters
    ----------
    path
        Of the file.
    written
        When it was written, in ns.
    """

    path: str
    written: int

    def __call__(self, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Apply it; the array is given in the type of its input."""
        session = _session(self.path, self.written)
        given = session.get_inputs()[0]
        kind = given.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))
        values: npt.NDArray[Any] = session.run(None, {given.name: part.astype(dtype, copy=False)})[
            0
        ]
        return values

    @property
    def mark(self) -> str:
        """Of what is in the file."""
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()


def _torch() -> Any:
    return sys.modules["torch"]


@lru_cache(maxsize=4)
def _session(path: str, written: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            "model", "an .onnx file, without onnxruntime", ALLOWED, 'pip install "topo_dask[onnx]".'
        ) from error
    return onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())


def _onnx(path: Path) -> OnnxModel:
    if not path.is_file():
        came = f"{str(path)!r}, which is not there"
        raise InputNotFound("model", came, ALLOWED, "Check the path.")
    model = OnnxModel(str(path.absolute()), path.stat().st_mtime_ns)
    try:
        session = _session(model.path, model.written)
    except BackendUnavailable:
        raise
    except Exception as error:  # whatever a damaged file may raise
        came = f"{str(path)!r}, which cannot be read ({error})"
        raise InvalidArgument("model", came, ALLOWED, "Export it again.") from error
    if len(session.get_inputs()) != 1:
        came = f"{str(path)!r} with {len(session.get_inputs())} inputs"
        raise InvalidArgument(
            "model", came, "a model of one array", "Write a function that makes the others."
        )
    return model


def load_model(model: Any) -> Callable[..., Any]:
    """Any model as a function of NumPy arrays.

    Parameters
    ----------
    model
        A function, which is taken as it is; the name of one, "module:function"; a PyTorch module
        in evaluation mode; or the path of an .onnx file.

    Raises
    ------
    InvalidArgument
        No such module or function; a PyTorch module in training mode, whose results depend on
        what it saw before; a damaged .onnx file.
    InputNotFound
        No such .onnx file.
    InvalidType
        Anything else.

    Examples
    --------
    >>> load_model("numpy:negative")(3)
    np.int64(-3)
    """
    if isinstance(model, os.PathLike) or (
        isinstance(model, str) and model.lower().endswith(ONNX_SUFFIX)
    ):
        return _onnx(Path(os.fspath(model)))
    if isinstance(model, str):
        return load_model(_named(model))
    if "torch" in sys.modules and isinstance(model, _torch().nn.Module):
        if model.training:
            raise InvalidArgument(
                "model",
                "a PyTorch module in training mode",
                "one in evaluation mode, whose results do not depend on what it saw before",
                "Call model.eval() first.",
            )
        return TorchModel(model)
    if not callable(model):
        raise InvalidType("model", type(model).__name__, ALLOWED)
    result: Callable[..., Any] = model
    return result


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    if not module or not path:
        raise InvalidArgument("model", repr(name), ALLOWED, 'For example "my_models:denoise".')
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(
            "model",
            f"{name!r} ({error})",
            ALLOWED,
            f"Python looks for the module in: {os.pathsep.join(p or '.' for p in sys.path)}.",
        ) from error
    if isinstance(found, str) or not callable(found):
        raise InvalidType("model", f"{name!r}, which is a {type(found).__name__}", ALLOWED)
    return found


def model_mark(model: Callable[..., Any]) -> str:
    """A text that changes when a model does, as far as that can be told from outside."""
    if isinstance(model, (TorchModel, OnnxModel)):
        return model.mark
    try:
        return str(tokenize(model, ensure_deterministic=True))
    except Exception:  # whatever an object's own pickling may raise
        kind = model if hasattr(model, "__qualname__") else type(model)
        return f"{kind.__module__}.{kind.__qualname__}"


def model_name(model: Any) -> str:
    """What to call a model."""
    if isinstance(model, TorchModel):
        return type(model.module).__name__
    if isinstance(model, OnnxModel):
        return Path(model.path).name
    return str(getattr(model, "__name__", type(model).__name__))
