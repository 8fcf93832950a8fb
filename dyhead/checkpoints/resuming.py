"""What both engines check of a checkpoint before a training goes on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import shown, some

_ENGINES = {"trainer": "detectron2", "dyhead": "torchvision"}  # by an entry of their files


def check_written_by(content: Mapping[str, Any], engine: str, path: str) -> None:
    """Raise :class:`CheckpointError` unless ``engine``, "detectron2" or "torchvision", can continue a training from it.

    Args:
        content: of the file.
        engine: the one that is to continue.
        path: the file, for the message.
    """
    way_out = f"start from its weights, with MODEL.WEIGHTS {path} and another OUTPUT_DIR"
    if "global_step" in content:
        raise CheckpointError(
            f"--resume: {path} was written by an earlier version of this project and cannot be continued; {way_out}"
        )
    by = next((name for entry, name in _ENGINES.items() if entry in content), None)
    if by not in (None, engine):
        raise CheckpointError(
            f"--resume: {path} was written by the {by} engine; continue it with --engine {by}, or {way_out}"
        )
    if by is None:
        raise CheckpointError(f"--resume: {path} is no checkpoint of a training on {engine}; {way_out}")


def entry(content: Any, keys: str, kind: type, path: str) -> Any:
    """What stands in nested dicts under ``keys``, such as "trainer.iteration".

    Raises:
        CheckpointError: it is not there, or is not of type ``kind``.
    """
    value = content
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"--resume: {path}: expected {kind.__name__} in {keys}, got {shown(repr(value))}")
    return value


def iteration(content: Mapping[str, Any], keys: str, max_iter: int, path: str) -> int:
    """The index of the last iteration that is done, which stands under ``keys``.

    Raises:
        CheckpointError: it is not there or below 0, or ``max_iter``, ``SOLVER.MAX_ITER``, is smaller than what is done.
    """
    done = entry(content, keys, int, path)
    if done < 0:
        raise CheckpointError(f"--resume: {path}: expected 0 or more in {keys}, got {shown(repr(done))}")
    if done >= max_iter:
        raise CheckpointError(
            f"SOLVER.MAX_ITER: expected at least the iterations that {path} has done, {shown(repr(done + 1))}, got "
            f"{max_iter}"
        )
    return done


def check_optimizer_state(state: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
    """Check that an optimizer can take a saved state: parameters and their shapes, and that numbers are finite.

    Args:
        state: what ``optimizer.state_dict()`` was.
        optimizer: the one to go on with.
        path: the file, for the message.

    Raises:
        CheckpointError: names what does not fit.
    """
    origin = f"--resume: {path}: the optimizer's state"
    saved = entry({"optimizer": state}, "optimizer.param_groups", list, path)
    values = entry({"optimizer": state}, "optimizer.state", dict, path)
    numbers = [group.get("params") if isinstance(group, Mapping) else None for group in saved]
    if not all(isinstance(of_group, list) for of_group in numbers):
        raise CheckpointError(f"{origin}: expected the parameters of each group, got {shown(repr(saved))}")
    own = [group["params"] for group in optimizer.param_groups]
    if list(map(len, numbers)) != list(map(len, own)):
        raise CheckpointError(
            f"{origin} is of {sum(map(len, numbers))} parameters in {len(numbers)} groups, expected "
            f"{sum(map(len, own))} in {len(own)}: the model, or what of it is trained (MODEL.BACKBONE.FREEZE_AT), was "
            "another"
        )
    for theirs, ours in zip(saved, optimizer.param_groups, strict=True):
        for key, value in ours.items():
            if type(value) in (int, float) and key in theirs and not _is_number(theirs[key]):
                raise CheckpointError(f"{origin}: expected a number as {key}, got {shown(repr(theirs[key]))}")
    try:
        parameters = dict(zip((n for group in numbers for n in group), (p for g in own for p in g), strict=True))
        unknown = values.keys() - parameters.keys()
    except TypeError as error:
        raise CheckpointError(f"{origin}: expected numbers of parameters ({error})") from error
    if unknown or len(parameters) != sum(map(len, own)):
        raise CheckpointError(f"{origin}: expected each parameter once, got others under {some(unknown)}")
    for number, of_parameter in values.items():
        if not isinstance(of_parameter, Mapping):
            raise CheckpointError(f"{origin}: expected a dict for parameter {shown(number)}")
        for key, value in of_parameter.items():
            _check_value(value, parameters[number], f"{origin}: {shown(key)} of parameter {shown(number)}")


def _check_value(value: Any, parameter: Tensor, origin: str) -> None:
    if value is None or _is_number(value):
        return
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(f"{origin}: expected a number or a dense tensor, got {type(value).__name__}")
    if value.ndim > 0 and value.shape != parameter.shape:
        raise CheckpointError(f"{origin}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
    if value.is_complex() or value.is_quantized or not value.isfinite().all():
        raise CheckpointError(f"{origin}: expected finite numbers, got NaN, infinity or another kind of number")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
