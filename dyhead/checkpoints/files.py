"""Reading checkpoint files without running anything that is in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead.checkpoints.errors import CheckpointError

#: The keys under which projects store the weights, in the order in which they are looked for.
CONTAINERS = ("model", "state_dict", "model_state", "module", "ema", "ema_state_dict")

_NAMED = 12  # so many keys are named in a message, the rest is counted

# What arrays in a pickle are made of, under the names of numpy 1 and 2.
_HARMLESS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def read_file(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint file, tensors on the CPU.

    Args:
        path: a ``.safetensors`` file; a ``.pkl`` file of Detectron2 (numpy arrays); or, under any other name, a file
            that ``torch.load`` reads.

    Raises:
        CheckpointError: the file is missing; it holds anything but tensors, arrays and plain Python values; it is no
            dict; the package ``safetensors`` is needed and not installed.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {path}: no such file")
    reader = {".pkl": _read_pickle, ".safetensors": _read_safetensors}.get(os.path.splitext(path)[1], _read_torch)
    content = reader(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path}: expected a dict of tensors, got {type(content).__name__}")
    return dict(content)


def find_state(content: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """The weights in the content of a checkpoint file, by key.

    They are the content itself, or stand under one of :data:`CONTAINERS`, which may be nested. Arrays become tensors,
    and the prefix ``module.`` of a model that was trained on several devices is taken off.

    Args:
        content: of :func:`read_file`.
        origin: what errors call the file.

    Raises:
        CheckpointError: there are no weights, or a weight is NaN or infinite (the first such key is named).
    """
    state = content
    while (inner := next((state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)), None)) is not None:
        state = inner
    state = {key: value if isinstance(value, Tensor) else _as_tensor(value) for key, value in state.items()}
    others = [str(key) for key, value in state.items() if value is None]
    if others or not state:
        raise CheckpointError(
            f"{origin}: expected a dict of tensors, or one under {', '.join(CONTAINERS[:-1])} or {CONTAINERS[-1]}, got "
            + (f"no tensor under {some(others)}" if others else "an empty dict")
        )
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            kind = "NaN" if value.isnan().any() else "infinity"
            raise CheckpointError(f"{origin}: expected finite weights, got {kind} in {key}")
    return state


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a checkpoint file: :func:`read_file` and :func:`find_state`, whose errors it has."""
    return find_state(read_file(path), f"checkpoint {os.fspath(path)}")


def some(names: list[str]) -> str:
    """``names`` for a message: the first few, and how many more there are."""
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _as_tensor(value: Any) -> Tensor | None:
    """A numpy array as a tensor, None for anything else. Files without arrays need no numpy."""
    if type(value).__module__ != "numpy":
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError):  # an array of objects
        return None


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"checkpoint {path}: not a file of tensors that PyTorch reads safely: {_reason(error)}"
        ) from error


def _read_pickle(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # as above
        raise CheckpointError(f"checkpoint {path}: not a pickle of numpy arrays: {_reason(error)}") from error


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain values; everything else is an error, so that nothing in the file is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"checkpoint {path}: needs the package safetensors (pip install safetensors)") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: not a safetensors file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
