"""Detectron2's deformable convolutions on this project's operator, which runs and learns on a CPU, too."""

from __future__ import annotations

from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor, nn

from dyhead.layers import DeformConv2d


class NormedDeformConv2d(DeformConv2d):
    """Called and saved as Detectron2's layers are: offsets and mask are given, norm and activation follow.

    Args:
        layer: of Detectron2, whose weight, norm and activation are taken over.
    """

    def __init__(self, layer: DeformConv | ModulatedDeformConv) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None,
        )  # fmt: skip
        self.weight, self.bias = layer.weight, layer.bias
        self.norm, self.activation = layer.norm, layer.activation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :class:`dyhead.layers.DeformConv2d`."""
        x = super().forward(x, offset, mask)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def use_own_deform_conv(module: nn.Module) -> nn.Module:
    """``module`` with each of Detectron2's deformable convolutions in it replaced; keys and values stay the same."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (DeformConv, ModulatedDeformConv)):
                setattr(parent, name, NormedDeformConv2d(child))
    return module
