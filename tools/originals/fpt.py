"""The modules of the Feature Pyramid Transformer's authors beside ours, in float64.

Their network as a whole does not run. A record ``fpt.json`` and ``fpt.npz`` holds for each case what a module
computes, every so many channels of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dyhead.layers.fpt import GroundingTransformer, RenderingTransformer, SelfTransformer
from tools.originals.rows import Row, largest
from tools.originals.values import tensors

_CHANNELS = 32
_TOLERANCE = 1e-6  # of the largest value; the record has float32

#: By case our module. The authors' other modes, and their transformer for segmentation, are not here.
CASES: dict[str, Callable[[], nn.Module]] = {
    "st1": lambda: SelfTransformer(_CHANNELS, parts=1),
    "st2": lambda: SelfTransformer(_CHANNELS),
    "st4": lambda: SelfTransformer(_CHANNELS, parts=4),
    "st2_heads2": lambda: SelfTransformer(_CHANNELS, heads=2),
    "gt_dot": lambda: GroundingTransformer(_CHANNELS),
    "gt_dot_two_octaves": lambda: GroundingTransformer(_CHANNELS),
    "gt_embedded": lambda: GroundingTransformer(_CHANNELS, similarity="softmax"),
    "rt": lambda: RenderingTransformer(_CHANNELS),
}

# Our names as theirs, by the module.
_NAMES: dict[type[nn.Module], dict[str, str]] = {
    SelfTransformer: {
        "query_key": "conv_qs",
        "value": "conv_vs",
        "mixture": "attention",
        "out.conv": "conv",
        "out.norm": "norm_layer",
    },
    GroundingTransformer: {"query": "theta", "key": "phi", "value": "g", "out.conv": "W_z.0", "out.norm": "W_z.1"},
    RenderingTransformer: {
        "down.conv": "str_conv3x3",
        "down.norm": "bn_reduction",
        "coarse.conv": "conv3x3",
        "coarse.norm": "bn_high",
        "gate.conv": "conv1x1",
        "gate.norm": "bn_low",
    },
}


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of ``folder/oracles/backbones/fpt.json``, if it is there."""
    file = folder / "oracles" / "backbones" / "fpt.json"
    if file.exists():
        with np.load(file.with_suffix(".npz")) as arrays:
            yield from compare(json.loads(file.read_text()), dict(arrays))


def compare(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """What each module computes."""
    for case, build in CASES.items():
        module = build().double().eval()
        theirs = {key: f"{case}.{_their_name(key, _NAMES[type(module)])}" for key in module.state_dict()}
        inputs = {key: shape for key, shape in record["keys"].items() if key.startswith(f"{case}.input.")}
        shapes = {theirs[key]: list(value.shape) for key, value in module.state_dict().items()}
        values = tensors({**record, "keys": shapes | inputs})
        module.load_state_dict({key: values[name] for key, name in theirs.items()})
        with torch.no_grad():
            got = module(*(values[key].double() for key in sorted(inputs)))
        got, want = got[:, :: record["arrays"][case]["every"]], torch.from_numpy(arrays[case])
        yield Row("fpt", case, largest(got, want) / want.abs().max().item(), _TOLERANCE)


def _their_name(key: str, names: Mapping[str, str]) -> str:
    layer, _, parameter = key.rpartition(".")
    return f"{names[layer]}.{parameter}"
