"""Names of d-li14/PSConv's PS-ResNet and PS-ResNeXt, which classify ImageNet or are in mmdetection's detectors.

They are torchvision's but for the 3x3 convolutions, as far as its code says: no file was at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.imagenet import CLASSIFIER
from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import COUNTERS, Row, Source
from dyhead.layers.psconv import gather

_NETWORK = BOTTOM_UP + "psconv."
_PARTS = 4
_NAMES = {"gwconv": "same", "gwconv_shift": "opposite", "conv": "rest"}


def network_rows(state: Mapping[str, Tensor], prefix: str = "") -> list[Row]:
    """The network's names under ``prefix``; none where the network is another one."""
    block = rf"{re.escape(prefix)}(layer[1-4]\.\d+\."
    if not any(re.match(block + r"conv2\.gwconv\.)", key) for key in state):
        return []
    whole = [key for key in state if re.fullmatch(block + r"conv2)\.conv\.weight", key)]
    return [
        *(Row(re.escape(key), _name(key.removeprefix(prefix)), partial(_rest, key)) for key in whole),
        Row(block + r"conv2\.(?:gwconv|gwconv_shift|rest)\.weight)", lambda m: _name(m[1])),
        Row(
            rf"{re.escape(prefix)}((?:conv1|bn1|layer[1-4]\.\d+\.(?:conv[13]|bn\d|downsample\.[01]))\.\w+)",
            _NETWORK + r"\1",
        ),
    ]


def _name(key: str) -> str:
    head, part, tail = key.rsplit(".", 2)
    return f"{_NETWORK}{head}.{_NAMES.get(part, part)}.{tail}"


def _rest(key: str, weight: Tensor) -> Tensor:
    """The undilated convolution's weights: of one group those that stand for something, of several all of them."""
    shape = tuple(weight.shape)
    if len(shape) != 4 or 0 in shape or shape[0] % shape[1] or shape[1] % _PARTS:
        raise CheckpointError(
            f"{key}: expected (C, C / groups, 3, 3), with {_PARTS} blocks of channels in a group, got {shape}"
        )
    return gathered(key, weight) if shape[0] == shape[1] else weight


def gathered(key: str, weight: Tensor, groups: int = 1) -> Tensor:
    """:func:`dyhead.layers.psconv.gather` of a checkpoint's tensor, with :class:`CheckpointError`."""
    try:
        return gather(weight, groups, _PARTS)
    except ValueError as error:
        raise CheckpointError(
            f"{key}: {error}. Only a network with MODEL.PSCONV.DENSE True computes what theirs does: it reads such a "
            "file as it is"
        ) from error


PSCONV = Source(
    "PSConv",
    r"^layer1\.0\.conv2\.gwconv\.weight$",
    network_rows,
    dropped=(COUNTERS,),
    left_over=((r"fc\.(weight|bias)", CLASSIFIER),),
)
