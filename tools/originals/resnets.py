"""PyConvResNet and PS-ResNet of their authors' code, and PSConv's layers, beside ours: the same weights and images.

A record of a network has ``arrays.NAME.largest`` of every map, and arrays ``NAME`` (1, C, H, W) with every so many
channels, ``NAME.mean`` and ``NAME.rms`` (1, C) over all pixels; those called ``odd.NAME`` are of the image ``odd``, and
those of PSConv called ``as_loaded.NAME`` of weights whose held entries are not set to 0. Thinned records have every
``statistics_every`` channels of the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyhead.backbones import PSConvOptions, PyConvOptions
from dyhead.checkpoints import convert_for
from dyhead.layers import PSConv2d
from dyhead.layers.psconv import gather
from tools.originals.heads import read
from tools.originals.rows import Row, largest
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_TOLERANCE = 1e-6  # of the largest value
_MAPS = {"C2": "layer1", "C3": "layer2", "C4": "layer3", "C5": "layer4", "stem": "maxpool"}

#: What each record of a network is of.
NETWORKS = {
    "pyconvresnet50": PyConvOptions(),
    "pyconvhgresnet50": PyConvOptions(high_groups=True),
    "ps_resnet50": PSConvOptions(),
    "ps_resnext101_32x4d": PSConvOptions(depth=101, num_groups=32, width_per_group=4, dense=True),
}
LAYERS = "psconv_layers"


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of the records in ``folder/oracles/backbones`` that are there."""
    for name in (*NETWORKS, LAYERS):
        file = folder / "oracles" / "backbones" / f"{name}.json"
        if file.is_file():
            yield from (compare_layers if name == LAYERS else compare_network)(*read(file))


def compare_network(record: Record, arrays: Arrays) -> Iterator[Row]:
    """The maps and some layers of a network, whose weights are converted from those of its authors."""
    options = NETWORKS[record["system"]]
    values = tensors(record)
    images = {prefix: values.pop(name) for prefix, name in (("", "input"), ("odd.", "odd")) if name in values}
    if isinstance(options, PSConvOptions):
        dense = PSConvOptions(options.depth, options.frozen_bn, options.num_groups, options.width_per_group, dense=True)
        network = loaded(dense.build(), values)
        if "as_loaded" in record:
            yield from _compare_maps(record, arrays, network, {"as_loaded.": images[""]})
        held_at_zero(network)
        if not options.dense:
            yield from _compare_maps(record, arrays, network, images, "dense, ")
            for key, weight in network.state_dict().items():
                if key.endswith("rest.weight"):
                    values[key.replace("rest", "conv")] = weight
            network = loaded(options.build(), values)
    else:
        network = loaded(options.build(), values)
    yield from _compare_maps(record, arrays, network, images)


def loaded(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network with the weights of its authors' classifier; all of its own are loaded."""
    conversion = convert_for(network, state)
    named = {name.split(".", 4)[-1]: x for name, x in conversion.state.items()}
    network.load_state_dict({key: x for key, x in named.items() if not key.endswith("num_batches_tracked")})
    return network.double().eval()


def held_at_zero(network: nn.Module) -> None:
    """Set to 0 what dense layers hold there, as the authors' class does when it is built."""
    for layer in network.modules():
        if isinstance(layer, PSConv2d):
            layer.zero_held()


def compare_layers(record: Record, arrays: Arrays) -> Iterator[Row]:
    """Each layer, dense and, where that holds its weights, not: outputs, gradients, and which weights are held."""
    values = {name: x.double() for name, x in tensors(record).items()}
    for name, layer in record["layers"].items():
        weights = {key.removeprefix(f"{name}."): x for key, x in values.items() if key.startswith(f"{name}.")}
        mask = torch.from_numpy(arrays[f"{name}.mask"].astype(bool))[..., None, None]
        masked = weights | {"conv.weight": weights["conv.weight"].masked_fill(mask, 0)}
        forms = [("masked", masked, True), ("as_loaded", weights, True)]
        forms += [("masked", masked, False)] if layer["mask_equals_rule"] else []
        for case, state, dense in forms:
            built = _build_layer(layer, dense)
            _load_layer(built, state)
            yield from _compare_layer(name, case, layer, arrays, built, values)


def _build_layer(layer: Record, dense: bool) -> PSConv2d:
    return PSConv2d(
        layer["in_channels"],
        layer["out_channels"],
        stride=layer.get("stride", 1),
        dilation=layer["dilation"],
        groups=layer.get("groups", 1),
        parts=layer.get("parts", 4),
        bias=layer.get("bias", False),
        dense=dense,
    ).double()


def _load_layer(built: PSConv2d, weights: Mapping[str, Tensor]) -> None:
    state = {"same.weight": weights["gwconv.weight"], "opposite.weight": weights["gwconv_shift.weight"]}
    if built.rest is not None:
        whole = weights["conv.weight"]
        state["rest.weight"] = whole if built.dense else gather(whole, built.groups, built.parts)
    if built.same.bias is not None:  # one instead of three that are added
        state["same.bias"] = sum(x for key, x in weights.items() if key.endswith("bias"))
    built.load_state_dict(state)


def _compare_layer(
    name: str, case: str, layer: Record, arrays: Arrays, built: PSConv2d, values: Mapping[str, Tensor]
) -> Iterator[Row]:
    expected = layer[case]
    stage = f"{name} {case}{', dense' if built.dense else ''}"
    x = values[f"input.{name}"].clone().requires_grad_()
    out = built(x)
    (out * values[f"projection.{name}"]).sum().backward()
    got = {
        f"{name}.{case}.mean": out.mean(dim=(2, 3))[:, :: expected.get("mean_every", 1)],
        f"{name}.{case}": out[:, :: expected["every"]],
    }
    differences = [largest(x.detach(), torch.from_numpy(arrays[key])) for key, x in got.items() if key in arrays]
    yield Row(LAYERS, f"{stage}: output", max(differences) / expected["largest"], _TOLERANCE)
    want = torch.from_numpy(arrays[f"{name}.{case}.input_gradient"])
    step = expected.get("pixels_every", 1)
    gradient = x.grad[:, :: expected["input_gradient_every"], ::step, ::step]
    yield Row(LAYERS, f"{stage}: input's gradient", largest(gradient, want) / want.abs().max().item(), _TOLERANCE)
    norms = expected["gradient_norms"]
    pairs = [(built.same, norms["gwconv.weight"]), (built.opposite, norms["gwconv_shift.weight"])]
    pairs += [(built.rest, norms["conv.weight"])] if built.rest is not None else []
    off = max(abs(conv.weight.grad.norm().item() - want) for conv, want in pairs)
    yield Row(LAYERS, f"{stage}: weights' gradients", off / max(norms.values()), _TOLERANCE)
    if built.dense:
        held = built.held.flatten().tolist()
        wrong = sum(mine != bool(theirs) for mine, theirs in zip(held, arrays[f"{name}.mask"].flatten(), strict=True))
        yield Row(LAYERS, f"{stage}: held weights", wrong, 0)


def _compare_maps(
    record: Record, arrays: Arrays, network: nn.Module, images: Mapping[str, Tensor], kind: str = ""
) -> Iterator[Row]:
    """Maps and layers, in units of the largest value of each."""
    for prefix, image in images.items():
        facts = record["as_loaded"] if prefix == "as_loaded." else record["arrays"]
        odd = "odd." if prefix == "odd." else ""
        names = [name.removeprefix(odd) for name in facts if name.startswith("odd.") == bool(odd)]
        names = [name for name in names if f"{prefix}{name}.mean" in arrays]
        for name, x in _outputs(network, image, names).items():
            fact = facts[odd + name]
            every = fact.get("statistics_every", 1)
            got = {
                ".mean": x.mean(dim=(2, 3))[:, ::every],
                ".rms": x.square().mean(dim=(2, 3)).sqrt()[:, ::every],
                "": x[:, :: fact.get("every", 1)],
            }
            pairs = [(value, f"{prefix}{name}{end}") for end, value in got.items() if f"{prefix}{name}{end}" in arrays]
            off = max(largest(value, torch.from_numpy(arrays[key])) for value, key in pairs)
            yield Row(record["system"], f"{kind}{prefix}{name}", off / fact["largest"], _TOLERANCE)


def _outputs(network: nn.Module, image: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What modules put out, called as in a record."""
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(_MAPS.get(name, name)).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: output})
        )
        for name in names
    ]
    with torch.no_grad():
        network(image.double())
    for hook in hooks:
        hook.remove()
    return found
