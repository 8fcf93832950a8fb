"""The levels above a pyramid's last: P6 and P7 (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dyhead.layers.levels import check_integer


class P6P7(nn.Module):
    """Two coarser levels by 3x3 convolutions of stride 2, the second on the first.

    Args:
        in_channels: channels of the level that P6 is computed from.
        out_channels: channels C of the pyramid.
        in_feature: the name of that level, for who calls this module.
        relu: apply ReLU to P6 before P7 is computed from it.

    Raises:
        ValueError: a number of channels is no integer or below 1.

    Attributes:
        num_levels: 2.
    """

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "p5", *, relu: bool = True) -> None:
        super().__init__()
        in_channels, out_channels = (
            check_integer("in_channels", in_channels),
            check_integer("out_channels", out_channels),
        )
        self.in_feature = in_feature
        self.relu = relu
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, level: Tensor) -> list[Tensor]:
        """P6 and P7 (N, C, H/2, W/2) and (N, C, H/4, W/4), sizes rounded up, from a level (N, C_in, H, W)."""
        if torch.jit.is_scripting():
            p6 = self.p6(level)
            return [p6, self.p7(p6.relu() if self.relu else p6)]
        # Not in half precision: in bfloat16 on a CPU, PyTorch 2.15 leaves parts of the weights' gradient uninitialised
        # where the input of a strided convolution is one pixel wide, as these levels of small images are.
        device = level.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            p6 = self.p6(level.to(self.p6.weight.dtype))
            p7 = self.p7(p6.relu() if self.relu else p6)
        return [p6.to(level.dtype), p7.to(level.dtype)]
