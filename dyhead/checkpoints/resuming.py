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
    if by is None:
        raise CheckpointError(f"--resume: {path} is no checkpoint of a training on {engine}; {way_out}")
    if by != engine:
        raise CheckpointError(
            f"--resume: {path} was written by the {by} engine; continue it with --engine {by}, or {way_out}"
        )


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


def check_optimizer_state(state: Any, path: str) -> None:
    """Check that a saved state is one of an optimizer: what stands for which parameter, in finite numbers.

    Args:
        state: what ``optimizer.state_dict()`` was.
        path: the file, for the message.

    Raises:
        CheckpointError: names what is not right.
    """
    origin = f"--resume: {path}: the optimizer's state"
    groups = entry({"optimizer": state}, "optimizer.param_groups", list, path)
    values = entry({"optimizer": state}, "optimizer.state", dict, path)
    numbers = []
    for group in groups:
        of_group = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(of_group, list) or not all(type(number) is int for number in of_group):
            raise CheckpointError(
                f"{origin}: expected the numbers of each group's parameters, got {shown(repr(group))}"
            )
        names = group.get("param_names", [""] * len(of_group))
        if (
            not isinstance(names, list)
            or len(names) != len(of_group)
            or not all(isinstance(name, str) for name in names)
        ):
            raise CheckpointError(f"{origin}: expected a name for each parameter, got {shown(repr(names))}")
        numbers += of_group
    unknown = [number for number in values if number not in set(numbers)]
    if not groups or unknown or len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{origin}: expected each parameter once, got others under {some(unknown)}")
    for number, of_parameter in values.items():
        if not isinstance(of_parameter, Mapping):
            raise CheckpointError(f"{origin}: expected a dict for parameter {shown(number)}")
        for key, value in of_parameter.items():
            _check_value(value, f"{origin}: {shown(key)} of parameter {shown(number)}")


def _check_value(value: Any, origin: str) -> None:
    if value is None or _is_number(value):
        return
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(f"{origin}: expected a number or a dense tensor, got {type(value).__name__}")
    if value.is_complex() or value.is_quantized or not value.isfinite().all():
        raise CheckpointError(f"{origin}: expected finite numbers, got NaN, infinity or another kind of number")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
