"""Border alignment, the operator of BorderDet (Qiu et al., ECCV 2020, arXiv 2007.11056): maxima along boxes' borders.

Shapes: N batch, C channels of a border, P pool size, (H, W) the map, (Ho, Wo) the grid of boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, library, scripting
from .checks import accumulation_dtype, as_count, check_borders, expect_tensor
from .reference import sample_bilinear, widen


def border_align(x: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """The maximum of a map along every border of boxes.

        out(n, g*C + c, i, j) = max_{k=0..P}  x(n, g*C + c, y_g(k), x_g(k))

    The channels are four groups of C, one a border, and border g of the box (x1, y1, x2, y2) at (n, :, i, j) is sampled
    at P + 1 points, k/P of the way from a corner to the next one:

        g = 0, top:     (x1, y1) to the right       g = 2, bottom:  (x2, y2) to the left
        g = 1, left:    (x1, y1) down               g = 3, right:   (x2, y2) up

    x(y, x) is bilinear, and 0 outside the map, as in `dyhead.ops.deform_conv2d`.

    Args:
        x: (N, 4*C, H, W); float64, float32, bfloat16 or float16.
        boxes: (N, 4, Ho, Wo), x1, y1, x2, y2 in pixels of the map, whose centres are at integers: 0 and W - 1 are
            its first and last column. Of any floating type no wider than float32 (float64 with a float64 map). Boxes
            may have any value: NaN, infinite and far-away points read 0. The grid may be empty.
        pool_size: P, into how many parts a border is divided; from 1 to 255.

    Returns:
        (N, 4*C, Ho, Wo) in the map's type, in channels_last if x is.

    Where several points have the largest value, the first one counts, and NaN counts as the largest value, as in
    `torch.max`. The gradient of an output goes to the pixels around this point. Boxes have no gradient: like the
    original operator's, they only say where to read, and count as constants. Positions and sums are float32 (float64
    for float64); half types round what is read and written. The result and the gradient do not depend on the number of
    threads; on a CUDA device the gradient is summed in an unspecified order, unless
    `torch.use_deterministic_algorithms` is set. Autocast leaves the types as they are. Derivatives of other kinds,
    `torch.func`, torch.jit.script and torch.onnx are as for `dyhead.ops.pyramid_deform_conv2d`.

    Raises:
        RuntimeError: a wrong type, shape, dtype or device; the message names the argument, what was expected and what
            came.
    """
    expect_tensor("x", x)
    expect_tensor("boxes", boxes)
    boxes = widen("boxes", boxes, accumulation_dtype(x.dtype)).detach()
    return _run(x, boxes, as_count("pool_size", pool_size))


border_align.__prepare_scriptable__ = scripting.in_place_of(scripting.border_align)


def define_border_align(x: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """The raw operator `dyhead::border_align` in plain PyTorch: maxima, and which point has each, as uint8."""
    check_borders(x, boxes, pool_size)
    x1, y1, x2, y2 = boxes.detach().unsqueeze(2).unbind(1)  # (N, 1, Ho, Wo)
    along = torch.arange(pool_size + 1, dtype=boxes.dtype, device=boxes.device).view(1, -1, 1, 1)
    across, down = (x2 - x1) / pool_size * along, (y2 - y1) / pool_size * along  # (N, P + 1, Ho, Wo)
    columns = torch.stack([x1 + across, x1.expand_as(across), x2 - across, x2.expand_as(across)], 1)
    rows = torch.stack([y1.expand_as(down), y1 + down, y2.expand_as(down), y2 - down], 1)
    # The operator's sampling, with a group of channels for every border and its points for taps.
    samples = sample_bilinear(x.to(boxes.dtype), rows.unsqueeze(3), columns.unsqueeze(3))
    values, index = samples.squeeze(4).max(3)  # of (N, 4, C, P + 1, Ho, Wo)
    return values.flatten(1, 2).to(x.dtype), index.flatten(1, 2).to(torch.uint8)


def _run(x: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    compiled = backends.selected() == "compiled" and library.runs_on(x.device)
    operator = torch.ops.dyhead.border_align if compiled else define_border_align
    return operator(x, boxes, pool_size)[0]
