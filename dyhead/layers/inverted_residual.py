"""Inverted residual blocks: depthwise convolutions between 1x1 convolutions that widen and narrow."""

from __future__ import annotations

from torch import Tensor, nn

from dyhead.layers.conv_norm import ConvNorm


class InvertedResidual(nn.Module):
    """1x1 to more channels, a depthwise convolution, 1x1 to ``outputs``; what comes in is added where shapes agree.

    Each convolution has a norm, and the first two a ReLU behind it.

    Args:
        inputs, outputs: channels.
        kernel_size, dilation, stride: of the depthwise convolution.
        expansion: how many times ``inputs`` are its channels.
        norm: a name of :data:`dyhead.layers.conv_norm.NORMS`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        expansion: int,
        norm: str,
        *,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = ConvNorm(inputs, inner, 1, norm)
        self.depthwise = ConvNorm(inner, inner, kernel_size, norm, stride=stride, dilation=dilation, groups=inner)
        self.project = ConvNorm(inner, outputs, 1, norm)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``inputs``, H, W) to (N, ``outputs``, H / stride, W / stride), sizes rounded up."""
        out = self.project(self.depthwise(self.expand(x).relu()).relu())
        return x + out if self.residual else out


class SeparableConv(nn.Module):
    """A depthwise convolution, norm and ReLU, then 1x1 and norm; what comes in is added where channels agree.

    Args:
        inputs, outputs: channels.
        kernel_size, dilation: of the depthwise convolution.
        norm: a name of :data:`dyhead.layers.conv_norm.NORMS`.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, norm: str, *, dilation: int = 1) -> None:
        super().__init__()
        self.spatial = ConvNorm(inputs, inputs, kernel_size, norm, dilation=dilation, groups=inputs)
        self.project = ConvNorm(inputs, outputs, 1, norm)
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``inputs``, H, W) to (N, ``outputs``, H, W)."""
        out = self.project(self.spatial(x).relu())
        return x + out if self.residual else out
