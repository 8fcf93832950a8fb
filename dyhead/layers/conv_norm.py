"""A convolution and its norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, distributed, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

#: The norms after convolutions, by name, as functions of the channels.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}


class ConvNorm(nn.Module):
    """A convolution that keeps height and width, or divides them by its stride and rounds up; then a norm.

    Args:
        inputs, outputs: channels.
        kernel_size: odd.
        norm: a name of :data:`NORMS`.
        stride, dilation, groups, bias: of the convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        norm: str,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = NORMS[norm](outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``inputs``, H, W) to (N, ``outputs``, H / stride, W / stride)."""
        conv, padding = self.conv, self.conv.padding
        if conv.stride[0] > 1:
            x, padding = padded_if_narrow(x, padding[0])
        x = functional.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
        return normalize(self.norm, x)


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``; in training, by the running statistics where a batch norm has one value of each channel.

    One value has no variance, and PyTorch refuses it: that of a level of one cell, or of a mean, of a single image.
    """
    batch_norm = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    if batch_norm and norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1 and not _is_shared(norm):
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def padded_if_narrow(x: Tensor, padding: int) -> tuple[Tensor, int]:
    """What a strided convolution takes, and its padding.

    In bfloat16 on a CPU, PyTorch 2.15 leaves parts of the weights' gradient uninitialised where the input of a strided
    convolution is one pixel wide. Padded before, it is wider.
    """
    return (functional.pad(x, [padding] * 4), 0) if x.shape[3] == 1 else (x, padding)


def _is_shared(norm: nn.Module) -> bool:
    """Whether other devices have values, too."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return isinstance(norm, nn.SyncBatchNorm) and several
