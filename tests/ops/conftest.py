"""Random arguments of the raw operator."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Case:
    """Arguments of torch.ops.dyhead.pyramid_deform_conv2d, and a gradient for its result."""

    features: list[Tensor]
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    level_weight: Tensor | None
    geometry: tuple
    grad: Tensor

    def arguments(self) -> tuple:
        return self.features, self.offset, self.weight, self.bias, self.mask, self.level_weight, *self.geometry

    def tensors(self) -> list[Tensor]:
        """All that have a gradient."""
        every = [*self.features, self.offset, self.weight, self.bias, self.mask, self.level_weight]
        return [tensor for tensor in every if tensor is not None]

    def map(self, change) -> "Case":
        """A case of changed tensors, which require gradients."""

        def apply(tensor):
            return None if tensor is None else change(tensor.detach()).requires_grad_()

        rest = [apply(t) for t in (self.offset, self.weight, self.bias, self.mask, self.level_weight)]
        return Case([apply(f) for f in self.features], *rest, self.geometry, change(self.grad))

    def run(self, function) -> tuple[Tensor, list[Tensor]]:
        """The result of a function of the raw operator's arguments, and all gradients."""
        result = function(*self.arguments())
        return result, list(torch.autograd.grad(result, self.tensors(), self.grad))


def make_case(
    *,
    seed=0,
    dtype=torch.float64,
    batch=2,
    channels=6,
    out_channels=5,
    groups=1,
    offset_groups=1,
    kernel=(3, 3),
    size=(5, 7),
    levels=((10, 14), (5, 7), (3, 4)),
    mask=True,
    bias=True,
    level_weight=True,
    scales=None,
    dilation=(1, 1),
    spread=2.0,
    device="cpu",
) -> Case:
    """A case of the aligned geometry; `spread` is the standard deviation of the offsets, in pixels.

    It has the same numbers on every device.
    """
    torch.manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taps = kernel[0] * kernel[1]

    def leaf(tensor, to):
        return tensor.to(device, to).requires_grad_()

    return Case(
        features=[leaf(torch.randn(batch, channels, *level), dtype) for level in levels],
        offset=leaf(torch.randn(batch, 2 * offset_groups * taps, *size) * spread, wide),
        mask=leaf(torch.rand(batch, offset_groups * taps, *size), wide) if mask else None,
        weight=leaf(torch.randn(len(levels), out_channels, channels // groups, *kernel), dtype),
        bias=leaf(torch.randn(out_channels), dtype) if bias else None,
        level_weight=leaf(torch.rand(batch, len(levels)), wide) if level_weight else None,
        geometry=(True, scales, [1, 1], [0, 0], list(dilation)),
        grad=torch.randn(batch, out_channels, *size).to(device, dtype),
    )


@pytest.fixture(name="make_case")
def make_case_fixture():
    return make_case


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """For tests of what is the same on every device."""
    return request.param
