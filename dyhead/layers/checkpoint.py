"""Checkpoints of other DyHead implementations, key by key."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

# Parameters of a block, theirs -> ours (ReleasedDyHeadBlock).
_RELEASED = {
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
_MMDETECTION = {
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
_CONVOLUTIONS = ("finer", "same", "coarser")

_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<tower>dyhead_tower|dyhead_blocks)\.(?P<index>\d+)\.(?P<name>.+)")


def convert_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the keys of another DyHead's state dict to those of :class:`DyHead` with ``block="released"`` or
    ``"mmdetection"``.

    ====================================  ===============================  ===================================
    from                                  to                               loads into
    ====================================  ===============================  ===================================
    microsoft/DynamicHead                 ``PREFIX.dyhead.blocks.I.NAME``  ``DyHead(C, block="released")``
    ``PREFIX.dyhead_tower.I.NAME``
    mmdetection                           ``PREFIX.blocks.I.NAME``         ``DyHead(C, block="mmdetection")``
    ``PREFIX.dyhead_blocks.I.NAME``
    ====================================  ===============================  ===================================

    PREFIX is the module that holds the blocks: in microsoft/DynamicHead a module that also holds the pyramid, in
    mmdetection the head itself. All other keys are kept. mmdetection's convolutions have no bias; they get a bias of
    zeros. Its 1x1 convolutions on pooled features become linear layers. The two forms differ in arithmetic, not in
    keys: see :class:`ReleasedDyHeadBlock`.

    Args:
        state_dict: tensors by key, such as ``torch.load(file)["model"]`` or ``["state_dict"]``.

    Returns:
        A new dict; ``state_dict`` is not changed.

    Raises:
        TypeError: not a dict of tensors (for example the whole checkpoint file).

    Warns:
        UserWarning: keys inside a ``dyhead_tower`` or ``dyhead_blocks`` that do not belong to a block. Names them; they
            are kept unchanged.

    Example:
        A released detector's head, as a separate module:

        >>> state = convert_checkpoint(checkpoint["model"])             # doctest: +SKIP
        >>> prefix = "backbone.dyhead."                                 # doctest: +SKIP
        >>> head = DyHead(256, block="released")                        # doctest: +SKIP
        >>> head.load_state_dict(                                       # doctest: +SKIP
        ...     {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        ... )
    """
    nested = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    if nested:
        raise TypeError(
            f"state_dict: expected tensors by key, got a dict under {', '.join(map(repr, nested))}; pass that dict"
        )

    converted: dict[str, Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        if match is None:
            converted[key] = value
            continue
        released = match["tower"] == "dyhead_tower"
        module, _, parameter = match["name"].rpartition(".")
        ours = (_RELEASED if released else _MMDETECTION).get(module)
        if ours is None or parameter not in ("weight", "bias"):
            unknown.append(key)
            converted[key] = value
            continue
        target = f"{match['prefix']}{'dyhead.' if released else ''}blocks.{match['index']}.{ours}"
        if parameter == "weight" and ours.startswith("theta"):
            value = value.flatten(1)
        converted[f"{target}.{parameter}"] = value
        if parameter == "weight" and ours in _CONVOLUTIONS and key.removesuffix("weight") + "bias" not in state_dict:
            converted[f"{target}.bias"] = torch.zeros(value.shape[0], dtype=value.dtype)
    if unknown:
        warnings.warn(
            f"{len(unknown)} unknown keys of a DyHead block were kept unchanged: {', '.join(unknown)}",
            stacklevel=2,
        )
    return converted
