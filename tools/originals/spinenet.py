"""SpineNet of yan-roo/SpineNet-Pytorch and of Google's two programs beside ours: the same weights, in float64.

A record has the stem's map, those of all blocks, some resampled ones and the levels P3 to P7: some channels of each,
and means over all pixels of some channels. Google's programs had the port's weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead.backbones import SpineNet, SpineNetOptions
from dyhead.checkpoints import convert
from tools.originals.heads import read
from tools.originals.rows import Row, largest
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

#: Records: which network and program, the activations that they have, and the record with the weights.
NETWORKS = {
    "spinenet49": ("spinenet49", "port", ("relu",), "spinenet49"),
    "spinenet49_tensorflow": ("spinenet49", "garden", ("relu", "swish"), "spinenet49"),
    "spinenet49_tensorflow_tpu": ("spinenet49", "tpu", ("relu", "swish"), "spinenet49"),
    "spinenet49s": ("spinenet49s", "port", ("relu",), "spinenet49s"),
    "spinenet96": ("spinenet96", "port", ("relu",), "spinenet96"),
}
_PREFIX = "backbone.backbone.bottom_up.spinenet."
_OFF = 1e-6  # of the largest value; records are in float32
# From our names to the port's.
_PORT = (
    (r"^stem\.", "conv1."),
    (r"^blocks\.([01])\.", lambda m: f"init_block{int(m[1]) + 1}."),
    (r"^blocks\.(\d+)\.", lambda m: f"scale_permuted_blocks.{int(m[1]) - 2}."),
    (r"^merges\.(\d+)\.(\d)\.", lambda m: f"merge_ops.{int(m[1]) - 2}.resample_ops.{m[2]}."),
    (r"\.down\.", ".downsample."),
    (r"\.(squeeze|downsample|expand)\.", r".\1_conv."),
    (r"^outputs\.p", "endpoint_convs."),
    (r"\.shortcut\.conv\.", ".downsample.0."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"(_block\w+\.(?:\d+\.)*)conv(\d)\.conv\.", r"\1conv\2."),
    (r"(_block\w+\.(?:\d+\.)*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"\.norm\.", ".bn."),
)


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of all records in ``folder/oracles/backbones``."""
    for name, (*_, weights) in NETWORKS.items():
        file = folder / "oracles" / "backbones" / f"{name}.json"
        if file.is_file():
            yield from compare(name, *read(file), read(file.with_stem(weights))[0])


def compare(name: str, record: Record, arrays: Arrays, weights: Record) -> Iterator[Row]:
    """The maps, for each activation.

    Args:
        name: in :data:`NETWORKS`.
        record: of the maps.
        arrays: of the maps: ``NAME``, some channels; ``NAME.mean``, over pixels.
        weights: the record with ``seed``, ``rules`` and the image among ``keys``.
    """
    size, dialect, activations, _ = NETWORKS[name]
    values = _values(size, json.dumps({key: weights[key] for key in ("seed", "rules", "keys")}))
    conversion = convert({key: value for key, value in values.items() if key != "input"})
    if conversion.left_over:
        raise ValueError(f"{name}: expected keys that are converted, got {conversion.left_over}")
    for activation in activations:
        network = SpineNetOptions(size, dialect=dialect, activation=activation).build().double().eval()
        state = {key.removeprefix(_PREFIX): value for key, value in conversion.state.items()}
        missing, unexpected = network.load_state_dict(state, strict=False)
        if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
            raise ValueError(f"{name}: expected the network's keys, got {unexpected} and not {missing}")
        maps = _maps(network, values["input"].double())
        prefix = f"{activation}." if len(activations) > 1 else ""
        recorded = {key.removeprefix(prefix): key for key in record["arrays"] if key.startswith(prefix)}
        for kind, pattern in (("blocks", r"stem|block\d+"), ("resampled", r"resample\..+"), ("levels", r"P\d")):
            found = {own: key for own, key in recorded.items() if re.fullmatch(pattern, own)}
            if found:
                off = [_off(maps[own], record["arrays"][key], key, arrays) for own, key in found.items()]
                yield Row(name, f"{activation}: {len(found)} {kind}", max(off), _OFF)


@lru_cache(maxsize=1)
def _values(size: str, record: str) -> dict[str, Tensor]:
    """The port's weights and the image; their names and shapes are those of our network, with the port's names."""
    weights = json.loads(record)
    with torch.device("meta"):
        own = SpineNetOptions(size).build().state_dict()
    keys = {_port_name(key): list(value.shape) for key, value in own.items()}
    image = {"input": weights["keys"].pop("input")}
    if weights["keys"] not in ({}, keys):  # a record may say what it had
        raise ValueError(f"SpineNet-{size}: expected the port's names and shapes, got others")
    return tensors(weights | {"keys": keys | image})


def _port_name(key: str) -> str:
    for pattern, theirs in _PORT:
        key = re.sub(pattern, theirs, key)
    return key


@torch.no_grad()
def _maps(network: SpineNet, image: Tensor) -> dict[str, Tensor]:
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, out: maps.__setitem__(name, out))

    network.blocks[0].register_forward_pre_hook(lambda _, inputs: maps.__setitem__("stem", inputs[0]))
    for i, block in enumerate(network.blocks):
        keep(f"block{i}", block)
    for number, merge in network.merges.items():
        for i, resample in enumerate(merge):
            keep(f"resample.block{number}.{i}", resample)
    return maps | {name.upper(): level for name, level in network(image).items()}


def _off(got: Tensor, entry: Mapping[str, Any], key: str, arrays: Arrays) -> float:
    """The largest difference, in units of the largest value."""
    off = [float("inf")] if list(got.shape) != entry["shape"] else []
    if key in arrays:
        want = torch.from_numpy(arrays[key]).double().flatten()
        off.append(largest(got[0, :: entry["every"]].flatten(), want))
    if f"{key}.mean" in arrays:
        mean = got[0, :: entry.get("mean_every", 1)].mean((1, 2))
        off.append(largest(mean, torch.from_numpy(arrays[f"{key}.mean"]).double().flatten()))
    return max(off) / entry["largest"]
