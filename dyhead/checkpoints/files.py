"""Reading checkpoint files without running anything that is in them."""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dyhead.checkpoints.errors import CheckpointError

_NAMED = 12  # so many keys are named in a message, the rest is counted
_LONGEST = 200  # characters of a key in a message


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
        raise CheckpointError(f"checkpoint {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    reader = {".pkl": _read_pickle, ".safetensors": _read_safetensors}.get(os.path.splitext(path)[1], _read_torch)
    content = reader(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path}: expected a dict of tensors, got {type(content).__name__}")
    _remove_attributes(content)
    return dict(content)


def some(names: Iterable[Any]) -> str:
    """``names`` for a message: the first few, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(shown, names[:_NAMED])) + more


def shown(key: Any) -> str:
    """A key for a message: on one line, not too long, with nothing that a terminal cannot show."""
    text = key if isinstance(key, str) and key.isprintable() else ascii(key)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _remove_attributes(content: Any) -> None:
    """Take off, in place, what files can set on dicts and tensors, where it could hide a method."""
    seen, left = set(), [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, OrderedDict | torch.Tensor):
            vars(value).clear()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def _read_torch(path: str) -> Any:
    try:
        with torch.serialization.safe_globals(_substitutes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a file is said in errors
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"checkpoint {path}: not a file of tensors that PyTorch reads safely: {_reason(error)}"
        ) from error


def _read_pickle(path: str) -> Any:
    from dyhead.checkpoints.arrays import Unpickler

    try:
        with open(path, "rb") as file:
            return Unpickler(file, encoding="latin1").load()
    except Exception as error:  # as above
        raise CheckpointError(f"checkpoint {path}: not a pickle of numpy arrays: {_reason(error)}") from error


def _substitutes() -> list:
    """What PyTorch is to make of numpy's arrays and scalars, such as a best AP beside the weights."""
    try:
        from dyhead.checkpoints.arrays import SUBSTITUTES, Array
    except ImportError:  # files without arrays need no numpy
        return []
    return [*((function, name) for name, function in SUBSTITUTES.items()), Array]


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"checkpoint {path}: needs the package safetensors (pip install safetensors)") from error
    try:
        return load_file(path)
    except Exception as error:  # as above
        raise CheckpointError(f"checkpoint {path}: not a safetensors file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError | LookupError | MemoryError | OverflowError):
        return f"it is damaged ({type(error).__name__})"
    text = str(error).strip()
    foreign = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    if foreign:
        return f"it holds an object of {shown(foreign[1])}; save the weights alone, those of model.state_dict()"
    if text.startswith("Weights only load failed") and error.__context__ is not None:
        text = str(error.__context__).strip()  # without PyTorch's advice to read it unsafely
    return shown(text.splitlines()[0].strip()) if text else type(error).__name__
