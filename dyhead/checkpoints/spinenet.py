"""Names of SpineNet in yan-roo/SpineNet-Pytorch, tensorflow/tpu and tensorflow/models.

TensorFlow's checkpoints are given as dicts of arrays by the names of their variables (docs/backbones.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from dyhead.backbones.spinenet import BLOCKS, OUTPUTS, SIZES
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import COUNTERS, Row, Source

_OURS = BOTTOM_UP + "spinenet."
_FIRST_SEARCHED = 2  # what the others count blocks from that are not the stem's
_KINDS = {"conv": "conv", "bn": "norm", "_conv": "conv", "_norm": "norm"}
_TENSORS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_TENSOR = rf"({'|'.join(_TENSORS)})"

_BACKBONE_ALONE = "of this project only the backbone is converted"


def port_rows(prefix: str = "") -> list[Row]:
    """The network of yan-roo/SpineNet-Pytorch under ``prefix``, a regular expression."""

    def block(match: re.Match) -> str:
        number = int(match["stem"]) - 1 if match["stem"] else int(match["searched"]) + _FIRST_SEARCHED
        return f"{_OURS}blocks.{number}.{match['repeat']}."

    def merge(match: re.Match) -> str:
        step = match["step"].removesuffix("sample")
        return (
            f"{_OURS}merges.{int(match['number']) + _FIRST_SEARCHED}.{match['input']}.{step}."
            f"{_KINDS[match['kind']]}.{match['tensor']}"
        )

    inside = rf"{prefix}(?:init_block(?P<stem>[12])|scale_permuted_blocks\.(?P<searched>\d+))\.(?P<repeat>\d+)\."
    layer = r"(?P<kind>conv|bn)\.(?P<tensor>.+)"
    return [
        Row(rf"{prefix}conv1\.{layer}", lambda m: f"{_OURS}stem.{_KINDS[m['kind']]}.{m['tensor']}"),
        Row(inside + r"(conv|bn)([123])\.(.+)", lambda m: f"{block(m)}conv{m[5]}.{_KINDS[m[4]]}.{m[6]}"),
        Row(inside + r"downsample\.0\.(.+)", lambda m: f"{block(m)}shortcut.conv.{m[4]}"),
        Row(inside + r"downsample\.1\.(.+)", lambda m: f"{block(m)}shortcut.norm.{m[4]}"),
        Row(
            rf"{prefix}merge_ops\.(?P<number>\d+)\.resample_ops\.(?P<input>[01])\."
            rf"(?P<step>squeeze|downsample|expand)_conv\.{layer}",
            merge,
        ),
        Row(
            rf"{prefix}endpoint_convs\.(?P<level>\d)\.{layer}",
            lambda m: f"{_OURS}outputs.p{m['level']}.{_KINDS[m['kind']]}.{m['tensor']}",
        ),
    ]


def _tpu_rows(state: Mapping[str, Tensor]) -> list[Row]:
    """Convolutions and normalizations are counted within each scope; the first has no number."""
    first = rf"sub_policy0/scale_permuted_block_{_FIRST_SEARCHED}/conv2d(?:_(\d+))?/kernel"
    found = [int(match[1] or 0) for key in state if (match := re.search(first, key))]
    repeats = (max(found, default=0) + 1) // 3
    layers: dict[tuple[str, int], str] = {}
    outside = ["stem", *_stem_layers(repeats), *(f"outputs.p{level}" for level in OUTPUTS)]
    layers |= {("", i): name for i, name in enumerate(outside)}
    for number, block in enumerate(BLOCKS):
        if not block.inputs:
            continue
        searched = number - _FIRST_SEARCHED
        for i, source in enumerate(block.inputs):
            scope = f"sub_policy{searched}/resample_with_alpha_resample_{searched}_{i}/"
            steps = ("squeeze", "down", "expand") if block.level > BLOCKS[source].level else ("squeeze", "expand")
            layers |= {(scope, place): f"merges.{number}.{i}.{step}" for place, step in enumerate(steps)}
        scope = f"sub_policy{searched}/scale_permuted_block_{number}/"
        layers |= {(scope, place): name for place, name in enumerate(_block_layers(number, repeats))}

    def ours(match: re.Match) -> str | None:
        name = layers.get((match[1] or "", int(match[3] or 0)))
        kind = "conv" if match[2] == "conv2d" else "norm"
        return name and f"{_OURS}{name}.{kind}.{_TENSORS[match[4]]}"

    prefix = r"(?:.+/)?spinenet/" if any("spinenet/" in key for key in state) else ""
    return _rows(rf"{prefix}(sub_policy\d+/\w+/)?(conv2d|batch_normalization)(?:_(\d+))?/{_TENSOR}", ours)


def _block_layers(number: int, repeats: int) -> Iterator[str]:
    for repeat in range(repeats):
        for place in range(3 if BLOCKS[number].bottleneck else 2):
            yield f"blocks.{number}.{repeat}.conv{place + 1}"


def _stem_layers(repeats: int) -> Iterator[str]:
    yield "blocks.0.0.shortcut"
    yield from _block_layers(0, repeats)
    yield from _block_layers(1, repeats)


def _garden_rows(state: Mapping[str, Tensor]) -> list[Row]:
    """Layers with weights are counted in the order that Keras gives them; a residual block is one."""
    prefix = r"(?:.+/)?backbone/" if any("backbone/" in key for key in state) else ""
    numbered = rf"{prefix}layer_with_weights-(\d+)/"
    count = 1 + max((int(match[1]) for key in state if (match := re.match(numbered, key))), default=-1)
    orders = {len(order): order for order in map(_keras_order, sorted({size.repeats for size in SIZES.values()}))}
    if count not in orders:
        raise CheckpointError(f"expected {', '.join(map(str, orders))} layers with weights in SpineNet, got {count}")
    order = orders[count]

    def ours(match: re.Match) -> str | None:
        number, part, tensor = int(match[1]), match[2], _TENSORS[match[3]]
        name = order[number]
        if part is None:
            return f"{_OURS}{name}.{tensor}"
        if part in ("_shortcut", "_norm0"):
            return f"{_OURS}{name}.shortcut.{'conv' if part == '_shortcut' else 'norm'}.{tensor}"
        return f"{_OURS}{name}.conv{part[-1]}.{_KINDS[part[:-1]]}.{tensor}"

    part = r"(?:(_shortcut|_norm0|_(?:conv|norm)[123])/)?"
    return _rows(rf"{numbered}{part}{_TENSOR}/\.ATTRIBUTES/VARIABLE_VALUE", ours)


def _rows(theirs: str, ours: Callable[[re.Match], str | None]) -> list[Row]:
    """Of all tensors, and first of kernels, which are height x width x inputs x outputs in TensorFlow."""
    kernel = theirs.replace(_TENSOR, "(kernel)")
    return [Row(kernel, ours, lambda x: x.permute(3, 2, 0, 1).contiguous()), Row(theirs, ours)]


def _keras_order(repeats: int) -> list[str]:
    """The layers with weights in the order of Keras' functional models.

    That is by the longest way from a layer to an output, the longest first; and among equals by a walk from the
    outputs back to the image, depth first. Layers without weights count on the way, too.
    """
    inputs: dict[str, tuple[str, ...]] = {"image": ()}
    weighted = set()

    def after(source: str, *names: str, weights: bool = True) -> str:
        for name in names:
            inputs[name], source = (source,), name
        weighted.update(names if weights else ())
        return source

    def row(source: str, kind: str, count: int) -> str:
        return after(source, *(f"{kind} {i} after {source}" for i in range(count)), weights=False)

    def layer(source: str, name: str, without_weights: int = 0) -> str:
        return row(after(source, f"{name}.conv", f"{name}.norm"), "operation", without_weights)

    x = layer("image", "stem", 2)  # activation, pooling
    outputs: list[str] = []
    for number, block in enumerate(BLOCKS):
        merged = []
        for i, source in enumerate(block.inputs):
            name, octaves = f"merges.{number}.{i}", block.level - BLOCKS[source].level
            x = layer(outputs[source], f"{name}.squeeze", 1)
            if octaves > 0:
                x = layer(x, f"{name}.down", octaves)  # activation, and a pooling for each further octave
            elif octaves < 0:
                x = row(x, "upsampling", 5)  # shape, its element, reshaping, product with ones, reshaping
            merged.append(layer(x, f"{name}.expand"))
        if merged:
            x = f"sum {number}"
            inputs[x] = (*merged, *(outputs[source] for source in block.added))
            x = row(x, "activation", 1)
        blocks = [f"blocks.{number}.{repeat}" for repeat in range(repeats)]
        x = row(after(x, *blocks), "identity", 1)
        outputs.append(x)
    ends = [layer(outputs[number], f"outputs.p{level}", 1) for level, number in OUTPUTS.items()]

    walk, finished = _walk(inputs, ends)
    ways = dict.fromkeys(inputs, 0)
    for name in reversed(finished):
        for source in inputs[name]:
            ways[source] = max(ways[source], ways[name] + 1)
    return sorted(weighted, key=lambda name: (-ways[name], walk[name]))


def _walk(inputs: Mapping[str, Iterable[str]], ends: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """When each layer is met, and the layers in an order in which inputs come before what reads them."""
    met: dict[str, int] = {}
    finished: list[str] = []
    left = [(name, False) for name in reversed(list(ends))]
    while left:
        name, done = left.pop()
        if done:
            finished.append(name)
        elif name not in met:
            met[name] = len(met)
            left.append((name, True))
            left += [(source, False) for source in reversed(list(inputs[name]))]
    return met, finished


_SLOTS = (
    r".+/(?:Momentum|ExponentialMovingAverage|\.OPTIMIZER_SLOT/.+)",
    "what an optimizer keeps of a weight beside it",
)

SPINENET_PORT = Source(
    "yan-roo/SpineNet-Pytorch",
    r"^(backbone\.)?merge_ops\.\d+\.resample_ops\.",
    lambda state: port_rows(r"(?:backbone\.)?"),
    unless=r"^(neck|bbox_head|roi_head)\.",
    dropped=(COUNTERS,),
    remainder=_BACKBONE_ALONE,
    note="these weights need MODEL.SPINENET.DIALECT port",
)
SPINENET_TPU = Source(
    "SpineNet of tensorflow/tpu",
    r"(^|/)sub_policy\d+/(resample_with_alpha|scale_permuted_block)_",
    _tpu_rows,
    dropped=(_SLOTS,),
    remainder=_BACKBONE_ALONE,
    note="these weights need MODEL.SPINENET.DIALECT tpu, and ACTIVATION swish where the checkpoint is called best",
)
SPINENET_GARDEN = Source(
    "SpineNet of tensorflow/models",
    r"(^|/)layer_with_weights-\d+/.*/\.ATTRIBUTES/VARIABLE_VALUE$",
    _garden_rows,
    dropped=(_SLOTS,),
    remainder=_BACKBONE_ALONE,
    note="these weights need MODEL.SPINENET.DIALECT garden, and the ACTIVATION of their training, swish if published",
)
