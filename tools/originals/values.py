"""The values that the tensors of a record have: they follow from the tensors' names."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensors(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a record, float32 (counters int64), by the names that the original has for them.

    Every name seeds a generator of its own (Philox, by the CRC-32 of "SEED:NAME"), whose numbers u are uniform in
    [-1, 1). By the kind of tensor its values are

    * 1 + u/2 for a running variance, u/10 for a running mean or a bias,
    * u times sqrt(3 / fan-in) for weights of two or more dimensions, of which the variance is then 1 / fan-in,
    * 1 + u/5 for other vectors and scalars,

    and then times a gain, plus a shift: those of the first of the record's rules whose pattern is found in the name.

    Args:
        record: with ``seed``; ``keys``, shapes by name; ``rules``, each a pattern, a gain and a shift.
    """
    values = {}
    for name, shape in record["keys"].items():
        if name.endswith("num_batches_tracked"):
            values[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        rule = (rule for rule in record["rules"] if re.search(rule[0], name))
        _, gain, shift = next(rule, ("", 1.0, 0.0))
        value = gain * _before_rules(name, shape, _uniform(record["seed"], name, shape)) + shift
        values[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return values


def _uniform(seed: int, name: str, shape: list[int]) -> np.ndarray:
    """In [-1, 1), from the upper 53 bits of the generator's words."""
    generator = np.random.Philox(key=zlib.crc32(f"{seed}:{name}".encode()))
    words = np.atleast_1d(generator.random_raw(max(math.prod(shape), 1)))[: math.prod(shape)]
    return 2.0 * ((words >> np.uint64(11)) * 2.0**-53).reshape(shape) - 1.0


def _before_rules(name: str, shape: list[int], uniform: np.ndarray) -> np.ndarray:
    if name.endswith("running_var"):
        return 1 + 0.5 * uniform
    if name.endswith(("running_mean", "bias")):
        return 0.1 * uniform
    if len(shape) >= 2:
        return uniform * math.sqrt(3 / math.prod(shape[1:]))
    return 1 + 0.2 * uniform
