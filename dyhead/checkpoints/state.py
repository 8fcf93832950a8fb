"""The weights in the content of a checkpoint file, out of whatever their model was wrapped in."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import read_file, shown, some

_log = logging.getLogger(__name__)

# Under these keys projects store the weights, and under these prefixes wrappers of models have them. In the order in
# which they are looked for: a model before its moving average.
_MODEL = ("model", "state_dict", "model_state", "model_state_dict", "module", "net", "network", "online_model")
_AVERAGE = ("ema", "ema_state_dict", "ema_model", "model_ema", "ema_state", "state_dict_ema")
CONTAINERS = (*_MODEL, *_AVERAGE)

# Inserted where a module is wrapped, at any place of a key.
_INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Numbers that wrappers keep beside the weights.
_BOOKKEEPING = {"n_averaged", "num_updates", "decay", "initted", "step", "steps"}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_LARGEST_VIEW = 2**26  # elements of a weight that are not stored one by one
_LARGEST_ARRAY = 2**32  # bytes


def find_state(content: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """The weights in the content of a checkpoint file, by key.

    They are the content itself, or stand under one of :data:`CONTAINERS`, which may be nested; entries beside them are
    named in the log. Arrays become tensors. What wrappers add to every key is taken off: ``module.``, ``model.``,
    ``_orig_mod.``, ``ema_model.`` and so on, in any order. Of a model and its moving average the model is taken, and
    the log says so.

    Args:
        content: of :func:`read_file`.
        origin: what errors call the file.

    Raises:
        CheckpointError: there are no weights; two keys become the same; a key is no text; a weight is none that a model
            here can have (sparse, quantized, complex, ...), or is NaN or infinite (the first such key is named).
    """
    try:
        return _find_state(content, origin)
    except RecursionError as error:
        raise CheckpointError(f"{origin}: expected weights, got dicts or prefixes in each other without end") from error


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a checkpoint file: :func:`read_file` and :func:`find_state`, whose errors it has."""
    return find_state(read_file(path), f"checkpoint {os.fspath(path)}")


def _find_state(content: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    path, chosen = _choose(content, origin)
    for key in chosen:
        if not isinstance(key, str) or not key.isprintable():
            raise CheckpointError(f"{origin}: expected text as the key of a tensor, got {shown(key)}")
    state, prefixes, left_out = _unwrap(_without_inserted(chosen, origin))
    average = [name for name in (*path, *prefixes) if name in _AVERAGE]
    if left_out:
        _log.info("%s: took the weights of the model, not those of its moving average (%s)", origin, some(left_out))
    elif average:
        _log.info("%s: the weights are those of a moving average (%s)", origin, average[0])
    if not state:
        raise CheckpointError(f"{origin}: expected weights, got only {some(chosen)}")
    for key, value in state.items():
        _check_value(key, value, origin)
    return state


def _choose(content: Mapping[Any, Any], origin: str) -> tuple[tuple[str, ...], dict[Any, Tensor]]:
    """Where the file's first set of weights is, and its tensors."""
    found = list(_sets(content, (), set()))
    if not found:
        raise _no_weights(content, origin)
    found.sort(key=lambda one: any(name in _AVERAGE for name in one[0]))
    (path, holder, state), *others = found
    if others:
        names = ", ".join(".".join(other) for other, _, _ in others)
        _log.info("%s: took the weights under %s, not those under %s", origin, ".".join(path), names)
    beside = [key for key in holder if key not in state]
    if path:
        beside += [key for key, value in content.items() if isinstance(value, Tensor)]
    if beside:
        _log.info("%s: not weights: %s", origin, some(beside))
    return path, state


def _sets(content: Mapping, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple, dict, dict[Any, Tensor]]]:
    """Where there are weights in nested dicts, which may contain each other: path, content, tensors."""
    seen.add(id(content))
    inner = [(name, content[name]) for name in CONTAINERS if isinstance(content.get(name), Mapping)]
    found = False
    for name, value in inner:
        if id(value) not in seen:
            for one in _sets(value, (*path, name), seen):
                found = True
                yield one
    if not found:
        tensors = {key: x for key, value in content.items() if (x := _as_tensor(value)) is not None}
        if tensors:
            yield path, content, tensors


def _no_weights(content: Mapping, origin: str) -> CheckpointError:
    seen: set[int] = set()
    while id(content) not in seen:
        seen.add(id(content))
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), content)
    keys = list(content)
    return CheckpointError(
        f"{origin}: expected a dict of tensors, or one under {', '.join(CONTAINERS[:-1])} or {CONTAINERS[-1]}, got "
        + (f"no tensor under {some(keys)}" if keys else "an empty dict")
    )


def _without_inserted(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    out, first = {}, {}
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in _INSERTED)
        if name in out:
            raise CheckpointError(
                f"{origin}: expected one tensor for {shown(name)}, got {shown(first[name])} and {shown(key)}"
            )
        out[name], first[name] = value, key
    return out


def _unwrap(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights without the prefixes that all of them have, these prefixes, and moving averages that are left out."""
    prefixes: list[str] = []
    while True:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key not in _BOOKKEEPING or value.numel() != 1:
                head, _, tail = key.partition(".")
                wrapped = bool(tail) and head in CONTAINERS
                parts.setdefault(head if wrapped else "", {})[tail if wrapped else key] = value
        if len(parts) != 1 or "" in parts:
            break
        ((prefix, state),) = parts.items()
        prefixes.append(prefix)

    averages = {name: _unwrap(part)[0] for name, part in parts.items() if name in _AVERAGE}
    models = [name for name in parts if name not in averages]
    if len(models) == 1:
        (name,) = models
        model, inner, left_out = _unwrap(parts[name]) if name else _without_copies(parts[name])
        if all(average.keys() <= model.keys() for average in averages.values()):
            return model, [*prefixes, *([name] if name else []), *inner], [*left_out, *averages]
    return {f"{part}.{key}" if part else key: x for part, of in parts.items() for key, x in of.items()}, prefixes, []


def _without_copies(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Without the moving average that mmcv's hook keeps in buffers of the model, such as ema_backbone_conv1_weight."""
    copies = state.keys() & {f"ema_{key.replace('.', '_')}" for key in state}
    return {key: value for key, value in state.items() if key not in copies}, [], ["ema_*"] if copies else []


def _check_value(key: str, value: Tensor, origin: str) -> None:
    if value.layout != torch.strided:
        kind = "a sparse one"
    elif value.is_quantized:
        kind = "a quantized one"
    elif value.is_meta:
        kind = "one without data"
    elif value.dtype not in _FLOATS + _INTEGERS:
        kind = str(value.dtype)
    elif value.numel() > max(_LARGEST_VIEW, value.untyped_storage().nbytes() // value.element_size()):
        kind = f"one of shape {tuple(value.shape)}, more than the file holds"
    elif value.is_floating_point() and not value.isfinite().all():
        kind = "NaN" if value.isnan().any() else "infinity"
        raise CheckpointError(f"{origin}: expected finite weights, got {kind} in {shown(key)}")
    else:
        return
    raise CheckpointError(f"{origin}: expected a dense tensor of numbers, got {kind} in {shown(key)}")


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor, or an array of numbers as one; None for anything else. Files without arrays need no numpy."""
    if isinstance(value, Tensor):
        return value.detach()
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    if value.dtype.kind not in "biuf" or value.nbytes > _LARGEST_ARRAY:
        return None
    try:
        return torch.tensor(value.astype(value.dtype.newbyteorder("=")))
    except (TypeError, ValueError):  # numbers of a width that PyTorch does not have
        return None
