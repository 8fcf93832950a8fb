"""Names of the parameters of a DyHead block in different projects, beside those of ``ReleasedDyHeadBlock``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from dyhead.checkpoints.source import Row

#: Theirs -> ours. The three convolutions: coarser, same, finer level.
DYNAMIC_HEAD = {
    "offset": "offset",
    "DyConv.0.conv": "coarser",
    "DyConv.0.bn": "coarser.norm",
    "DyConv.1.conv": "same",
    "DyConv.1.bn": "same.norm",
    "DyConv.2.conv": "finer",
    "DyConv.2.bn": "finer.norm",
    "AttnConv.1": "scale",
    "relu.fc.0": "theta.0",
    "relu.fc.2": "theta.2",
}
MMDETECTION = {
    "spatial_conv_offset": "offset",
    "spatial_conv_high.conv": "coarser",
    "spatial_conv_high.norm": "coarser.norm",
    "spatial_conv_mid.conv": "same",
    "spatial_conv_mid.norm": "same.norm",
    "spatial_conv_low.conv": "finer",
    "spatial_conv_low.norm": "finer.norm",
    "scale_attn_module.1": "scale",
    "task_attn_module.conv1.conv": "theta.0",
    "task_attn_module.conv2.conv": "theta.2",
}
MMDETECTION_GLIP = {
    "offset": "offset",
    "dyconvs.0.conv": "coarser",
    "dyconvs.0.bn": "coarser.norm",
    "dyconvs.1.conv": "same",
    "dyconvs.1.bn": "same.norm",
    "dyconvs.2.conv": "finer",
    "dyconvs.2.bn": "finer.norm",
    "attnconv.1": "scale",
    "relu.fc.0": "theta.0",
    "relu.fc.2": "theta.2",
}
FENECK = {
    "offset_conv": "offset",
    "conv_list.0.conv": "coarser",
    "conv_list.0.norm": "coarser.norm",
    "conv_list.1.conv": "same",
    "conv_list.1.norm": "same.norm",
    "conv_list.2.conv": "finer",
    "conv_list.2.norm": "finer.norm",
    "attention_conv.1": "scale",
    "dyrelu.fc.0": "theta.0",
    "dyrelu.fc.2": "theta.2",
}


def block_rows(prefix: str, names: Mapping[str, str], index: Callable[[int], int] = int) -> list[Row]:
    """The blocks under ``PREFIX.I.``.

    Args:
        prefix: a regular expression without groups.
        names: one of the tables above.
        index: our number of a block from theirs.
    """

    def ours(name: str) -> Callable[[re.Match], str]:
        return lambda match: f"backbone.dyhead.blocks.{index(int(match[1]))}.{name}.{match[2]}"

    return [
        # 1x1 convolutions on pooled features, in some projects, are our linear layers.
        Row(
            rf"{prefix}(\d+)\.{re.escape(theirs)}\.(weight|bias)",
            ours(name),
            (lambda x: x.flatten(1) if x.ndim > 1 else x) if name.startswith("theta") else None,
        )
        for theirs, name in names.items()
    ]
