"""The neck of jshilong/SEPC beside ours: the same weights and features, in float64.

A record ``sepc.json`` and ``sepc.npz`` holds for each case, a configuration in training or in evaluation mode, the
norms of all outputs, some outputs, the gradients' norms, and what the running statistics are after a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead.checkpoints import convert
from dyhead.layers import SEPC
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

_PREFIX = "backbone.sepc."
_NORMS = 1e-9
_OUTPUTS = 1e-6  # the record has them in float32


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of all cases of ``folder/oracles/seeds/sepc.json``, if it is there."""
    file = folder / "oracles" / "seeds" / "sepc.json"
    if file.exists():
        with np.load(file.with_suffix(".npz")) as arrays:
            yield from compare(json.loads(file.read_text()), dict(arrays))


def compare(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Outputs, gradients and running statistics of each case."""
    for case, expected in record["cases"].items():
        yield from _compare(case, record, expected, arrays)


def _compare(
    case: str, record: Mapping[str, Any], expected: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    neck, renamed, values = _neck(record, case)
    neck.train(case.endswith(".train"))
    features = [values[f"feature.{i}"].requires_grad_() for i in range(len(record["sizes"]))]
    out = neck(features)
    outputs = {"cls": [level.classes for level in out], "loc": [level.boxes for level in out]}
    name = f"sepc {case}"
    got = _vector([level.norm() for levels in outputs.values() for level in levels])
    want = _vector([norm for task in outputs for norm in expected["output_norms"][task]])
    yield Row(name, "norms of outputs", relative(got, want), _NORMS)
    differences = [
        _difference(level, arrays[f"{case}.{task}.{i}"])
        for task, levels in outputs.items()
        for i, level in enumerate(levels)
        if f"{case}.{task}.{i}" in arrays
    ]
    if differences:
        yield Row(name, "outputs", max(differences), _OUTPUTS)

    shapes = {f"upstream.{task}.{i}": list(x.shape) for task, levels in outputs.items() for i, x in enumerate(levels)}
    upstream = tensors({**record, "keys": shapes})
    flat = {f"upstream.{task}.{i}": x for task, levels in outputs.items() for i, x in enumerate(levels)}
    sum((x * upstream[key].double()).sum() for key, x in flat.items()).backward()
    parameters = dict(neck.named_parameters())
    of_weights = expected["gradient_norms"]
    of_weights = {} if isinstance(of_weights, str) else of_weights  # not kept
    got = _vector([parameters[renamed[key]].grad.norm() for key in of_weights] + [x.grad.norm() for x in features])
    want = _vector([*of_weights.values(), *expected["feature_gradient_norms"]])
    # A bias before batch normalization has no gradient but for rounding.
    yield Row(name, "norms of gradients", relative(got, want, floor=1e-3), _NORMS)
    if f"{case}.running_after" in arrays:
        norms = [*(block.norm for block in neck.blocks), neck.class_norm, neck.box_norm]
        statistics = torch.stack([torch.stack([norm.running_mean, norm.running_var]) for norm in norms])
        want = torch.from_numpy(arrays[f"{case}.running_after"])
        yield Row(name, "running statistics", largest(statistics, want), _NORMS)


def _neck(record: Mapping[str, Any], case: str) -> tuple[SEPC, dict[str, str], dict[str, Tensor]]:
    """The neck with its weights, our names of its parameters by theirs, and the features."""
    expected = record["cases"][case]
    sizes = {f"feature.{i}": [2, record["channels"], *size] for i, size in enumerate(record["sizes"])}
    weights = tensors({**record, "keys": _parameters(record, case)})
    neck = SEPC(
        record["channels"],
        conv="deformable" if expected["pconv_deform"] else "plain",
        task_convs="deformable" if expected["lcconv_deform"] else "plain",
        norm="BN" if expected["iBN"] else "",
        task_padding=expected["padding_of_cconv_lconv"],
    ).double()
    conversion = convert({f"neck.1.{key}": value.double() for key, value in weights.items()})
    if conversion.left_over:
        raise ValueError(f"{case}: expected keys that are converted, got {conversion.left_over}")
    state = {key.removeprefix(_PREFIX): value for key, value in conversion.state.items()}
    missing, unexpected = neck.load_state_dict(state, strict=False)
    if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"{case}: expected the neck's keys, got {unexpected} and not {missing}")
    renamed = {t.removeprefix("neck.1."): ours.removeprefix(_PREFIX) for t, ours in conversion.renamed.items()}
    features = tensors({**record, "keys": sizes})
    return neck, renamed, {key: value.double() for key, value in features.items()}


def _parameters(record: Mapping[str, Any], case: str) -> dict[str, list[int]]:
    """Names and shapes of a case's weights; it may say that they are those of another."""
    keys = record["cases"][case]["parameters"]
    if isinstance(keys, str):
        other = {"as in eval mode": case.replace(".train", ".eval"), "as sepc": "sepc.eval"}[keys]
        return _parameters(record, other)
    return keys


def _vector(values: list[Tensor | float]) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values])


def _difference(got: Tensor, want: np.ndarray) -> float:
    """In units of the largest value; the record has but one channel of some."""
    want = torch.from_numpy(want).double()
    if want.dim() == 3:
        got = got[:, 0]
    if len(want) < len(got):
        got = got[: len(want)]
    return largest(got.detach(), want) / want.abs().max().item()
