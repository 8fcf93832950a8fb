"""Deformable convolutions (Dai et al., ICCV 2017; modulated: Zhu et al., CVPR 2019) as layers, on CPUs and GPUs."""

from __future__ import annotations

from torch import Tensor, nn

from dyhead.ops import deform_conv2d


class DeformConv2d(nn.Conv2d):
    """``torchvision.ops.DeformConv2d`` on this project's operator: a convolution that is told where to read.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of a convolution; the padding
            is in numbers.

    Raises:
        ValueError: ``padding`` is text, or ``groups`` does not divide the channels.

    Example:
        >>> import torch
        >>> layer = DeformConv2d(32, 64, 3, stride=2, padding=1, groups=4)
        >>> layer(torch.randn(1, 32, 8, 8), torch.zeros(1, 18, 4, 4), mask=torch.ones(1, 9, 4, 4)).shape
        torch.Size([1, 64, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(f"padding: expected an integer or two of them (vertical, horizontal), got {padding!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W), in the type of ``input``, but under autocast in its type.

        Args:
            input: the map.
            offset: (N, 2*G*K, H, W), in pixels of ``input``, for G groups of channels and K taps, dy and dx adjacent.
            mask: (N, G*K, H, W), the weight of every sample; by default 1.
        """
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class DeformConv2dPack(DeformConv2d):
    """A deformable convolution in place of a plain one, with a convolution of its own that predicts where it reads.

    Offsets start at 0. The importances, of a modulated one, are sigmoids and start at 1/2.

    Args:
        conv: the plain convolution, whose geometry, weight and bias are taken over.
        modulated: whether every sample has an importance.
        offset_groups: groups of channels with offsets of their own.

    Raises:
        ValueError: ``offset_groups`` does not divide the channels.
    """

    def __init__(self, conv: nn.Conv2d, *, modulated: bool = False, offset_groups: int = 1) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None,
        )  # fmt: skip
        if conv.in_channels % offset_groups:
            raise ValueError(f"offset_groups: expected a divisor of {conv.in_channels} channels, got {offset_groups}")
        self.weight, self.bias = conv.weight, conv.bias
        self.modulated = modulated
        per_tap = 3 if modulated else 2
        channels = per_tap * offset_groups * self.kernel_size[0] * self.kernel_size[1]
        self.offset = nn.Conv2d(conv.in_channels, channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W)."""
        offset, mask = self.offset(x), None
        if self.modulated:
            positions = 2 * offset.shape[1] // 3
            offset, mask = offset[:, :positions], offset[:, positions:].sigmoid()
        return super().forward(x, offset, mask)
