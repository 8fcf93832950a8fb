"""Deformable RoI pooling (Dai et al., ICCV 2017, arXiv 1703.06211): the means of regions' cells, each of which moves.

Shapes: N batch, C channels, (H, W) the map, Q regions, S cells per side of a region, T samples per side of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, library, scripting
from .checks import accumulation_dtype, as_count, as_flag, as_number, check_regions, expect_tensor
from .reference import widen


def deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    *,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign whose cells are moved by offsets.

        out(q, :, i, j) = mean_{r, s = 0..T-1}  x(n_q, :, y, x)
        y = y_q + h_q * ((i + (r + 1/2) / T) / S + gamma * offset(q, 1, i, j))
        x = x_q + w_q * ((j + (s + 1/2) / T) / S + gamma * offset(q, 0, i, j))

    (x_q, y_q) is the region's corner and (w_q, h_q) its size on the map. x(n, :, y, x) is bilinear.

    Args:
        x: (N, C, H, W); float64, float32, bfloat16 or float16.
        rois: (Q, 5), the number n of an image, and x1, y1, x2, y2 in units of 1 / `spatial_scale` pixels of the map. Of
            any floating type no wider than float32 (float64 with a float64 map), since half types have few pixels.
        offset: (Q, 2, S, S) of the same types, in units of `gamma` times the region's width and height; the first is to
            the right, the second down. None: no cell is moved.
        output_size: S, from 1 to 255.
        spatial_scale: pixels of the map for one of the image: 1/8 at stride 8.
        sampling_ratio: T, from 1 to 255.
        gamma: unit of the offsets.
        aligned: which convention.
            True: that of `torchvision.ops.roi_align` with its `aligned=True`, to which this is equal without offsets:
            the map's first pixel has its centre at 1/2; up to 1 pixel outside the map its edge is read, farther away 0.
            False: that of the original code of deformable convolutional networks and of D2Det, for its weights: corners
            are rounded to integers (1/2 away from 0), the second one is a pixel's far side (+ 1), sizes are at least
            0.1 pixels of the map, samples are at r / T of a cell instead of (r + 1/2) / T, and the mean is of those
            that are no more than 1/2 pixel outside the map, or 0.

    Returns:
        (Q, C, S, S) in the map's type, in channels_last if x is.

    Regions and offsets may have any value: what is no number or far away reads 0 and has no gradient, and so does a
    region of an image that is not there. Regions have no gradient and count as constants; x and offset have one.
    Positions and sums are float32 (float64 for float64), positions without an offset are computed in float64 and
    rounded once; half types round what is read and written. The result and the gradients do not depend on the number of
    threads; on a CUDA device the map's gradient is summed in an unspecified order, unless
    `torch.use_deterministic_algorithms` is set. Autocast leaves the types as they are. Derivatives of other kinds,
    `torch.func` and torch.jit.script are as for `dyhead.ops.pyramid_deform_conv2d`, but that vmap runs a loop;
    torch.onnx exports the definition.

    Raises:
        RuntimeError: a wrong type, shape, dtype or device; the message names the argument, what was expected and what
            came.
    """
    expect_tensor("x", x)
    expect_tensor("rois", rois)
    expect_tensor("offset", offset, optional=True)
    output_size, sampling_ratio = as_count("output_size", output_size), as_count("sampling_ratio", sampling_ratio)
    spatial_scale, gamma = as_number("spatial_scale", spatial_scale, above=0), as_number("gamma", gamma)
    wide = accumulation_dtype(x.dtype)
    rois, offset = widen("rois", rois, wide).detach(), widen("offset", offset, wide)
    aligned = as_flag("aligned", aligned)
    compiled = backends.selected() == "compiled" and library.runs_on(x.device)
    operator = torch.ops.dyhead.deform_roi_pool if compiled else define_deform_roi_pool
    return operator(x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned)


deform_roi_pool.__prepare_scriptable__ = scripting.in_place_of(scripting.deform_roi_pool)


def define_deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool,
) -> Tensor:
    """The raw operator `dyhead::deform_roi_pool` in plain PyTorch."""
    check_regions(x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma)
    index, weight = _taps(x, rois.detach(), offset, output_size, spatial_scale, sampling_ratio, gamma, aligned)
    pixels = x.to(rois.dtype).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    pixels = torch.cat([pixels, pixels.new_zeros(1, x.shape[1])])  # what counts nothing reads the last one
    out = (pixels[index] * weight.unsqueeze(2)).sum(1)
    out = out.view(len(rois), output_size, output_size, x.shape[1]).permute(0, 3, 1, 2).to(x.dtype)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _taps(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    side: int,
    scale: float,
    samples: int,
    gamma: float,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Which pixels of all images (Q*S*S, 4*T*T) are added up for each cell, and what each weighs."""
    batch, _, height, width = x.shape
    image = rois[:, :1]
    there = (image >= 0) & (image < batch)  # (Q, 1); false for a NaN
    # In float64, and rounded once per position, so that one on the edge of the map is there on every device.
    first, second = rois[:, 1:].double().split(2, dim=1)
    if not aligned:
        first, second = _round(first), _round(second) + 1
    start, extent = first * scale - 0.5, (second - first) * scale
    there = there & (start.isfinite() & extent.isfinite()).all(1, keepdim=True)
    if not aligned:
        extent = extent.clamp(min=0.1)
    shift = (gamma * extent).to(rois.dtype)
    if offset is not None:
        there = there & shift.isfinite().all(1, keepdim=True)
    # Products with what is not finite would be no numbers, forward or backward.
    image = torch.where(there, image, 0).to(torch.int64)
    start, extent, shift = (torch.where(there, each, 0) for each in (start, extent, shift))
    step = extent / (side * samples)
    if aligned:
        start = start + step / 2
    number = torch.arange(side * samples, dtype=torch.float64, device=rois.device)
    positions = (start.unsqueeze(2) + number * step.unsqueeze(2)).to(rois.dtype)  # (Q, 2, S * T), x and y
    margin = 1.0 if aligned else 0.5

    def axis(which: int, size: int, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample along an axis, (Q, S, S, T): whether it counts, and its two pixels' numbers and weights."""
        position = positions[:, which].reshape(-1, *grid, samples)
        if offset is not None:
            position = position + (shift[:, which, None, None] * offset[:, which]).unsqueeze(3)
        counts = (position >= -margin) & (position <= size - 1 + margin)
        # Positions that do not count move to 0, so that no arithmetic ever sees them, forward or backward.
        position = torch.where(counts, position, 0)
        low = position.detach().floor()
        part = position - low
        # Beyond the edge of the map both are the edge.
        pixels = torch.stack([low, low + 1], -1).to(torch.int64).clamp(0, size - 1)
        return counts, pixels, torch.stack([1 - part, part], -1)

    counts_y, rows, weights_y = axis(1, height, (side, 1))
    counts_x, columns, weights_x = axis(0, width, (1, side))
    # Dimensions: Q, S, S, T and 2 rows, T and 2 columns.
    counts = counts_y[..., None, None, None] & counts_x[:, :, :, None, None, :, None] & there[(...,) + (None,) * 5]
    index = (image[(...,) + (None,) * 5] * height + rows[..., None, None]) * width + columns[:, :, :, None, None]
    index = torch.where(counts, index, batch * height * width)
    weight = weights_y[..., None, None] * weights_x[:, :, :, None, None]
    divisor = samples**2 if aligned else counts.sum((3, 4, 5, 6), keepdim=True).clamp(min=1)
    weight = torch.where(counts, weight, 0) / divisor
    taps = 4 * samples**2
    return index.reshape(-1, taps), weight.reshape(-1, taps)


def _round(x: Tensor) -> Tensor:
    """To the next integer, 1/2 away from 0, as in C; PyTorch's goes to the even one."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)
