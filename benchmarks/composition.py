"""The modules without this project's operator: on `torchvision.ops.deform_conv2d`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import Unavailable
from dyhead.layers import head, released, spatial_attention
from dyhead.ops import backend

try:
    from torchvision.ops import deform_conv2d
except ImportError:
    deform_conv2d = None


def pyramid_deform_conv2d(
    features: Sequence[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    level_weight: Tensor | None = None,
    *,
    scales: Sequence[float] | None = None,
    dilation: int = 1,
) -> Tensor:
    """Eq. 4 with torchvision: every level is resized to the output's grid, one call per level, results summed.

    The arguments are those of `dyhead.ops.pyramid_deform_conv2d`; the sizes imply `scales`. For a resized level the
    result differs from the operator's, which samples the level itself; for other levels it is the same.
    """
    size = offset.shape[2:]
    padding = tuple(dilation * (k - 1) // 2 for k in weight.shape[3:])
    out = None
    for level, feature in enumerate(features):
        if feature.shape[2:] != size:
            feature = functional.interpolate(feature, size, mode="bilinear", align_corners=False)
        term = convolve(feature, offset, weight[level], None, 1, padding, dilation, mask)
        if level_weight is not None:
            term = term * level_weight[:, level, None, None, None].to(term.dtype)
        out = term if out is None else out + term
    return out if bias is None else out + bias[:, None, None]


def convolve(input: Tensor, offset: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """`torchvision.ops.deform_conv2d`; in float32 for half types.

    Half types would round its positions, on a map 168 pixels wide to an eighth of a pixel (float16) or a whole pixel
    (bfloat16); autocast on a GPU uses float32 for the same reason, and on a CPU torchvision has no half types.
    """
    if deform_conv2d is None:
        raise Unavailable("torchvision is not installed")
    device, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    with torch.autocast(device, enabled=False):
        wide = [None if x is None else x.float() for x in (input, offset, weight, bias)]
        out = deform_conv2d(*wide, stride, padding, dilation, None if mask is None else mask.float())
    return out.to(dtype)


@contextmanager
def composition(enabled: bool = True) -> Iterator[None]:
    """A context in which `dyhead.layers` computes with torchvision and plain PyTorch, in NCHW, if `enabled`."""
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(patch.object(spatial_attention, "pyramid_deform_conv2d", pyramid_deform_conv2d))
            stack.enter_context(patch.object(released, "deform_conv2d", convolve))
            stack.enter_context(backend("reference"))  # for the channel-wise functions
            # torchvision's operator needs NCHW and would copy other layouts in every call.
            stack.enter_context(patch.object(head, "to_channels_last", lambda level: level))
        yield
