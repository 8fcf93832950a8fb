"""Deformable RoI pooling (Dai et al., ICCV 2017, arXiv 1703.06211): the means of regions' cells, each of which moves.

Shapes: N batch, C channels, (H, W) the map, Q regions, S cells per side of a region, T samples per side of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends
from .checks import accumulation_dtype, as_count, as_number, check_regions, expect_tensor
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

    Regions and offsets may have any value: what is no number or far away reads 0, and so does a region of an image that
    is not there. Regions have no gradient and count as constants; x and offset have one. Positions and sums are float32
    (float64 for float64); half types round what is read and written. Autocast leaves the types as they are. It is plain
    PyTorch on every device. Derivatives in forward mode, of derivatives, and `torch.func` need
    `dyhead.ops.backend("reference")`, which takes more memory.

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
    check_regions(x, rois, offset, output_size)
    index, weight = _taps(x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned)
    pixels = x.to(wide).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    if backends.selected() == "reference" or not len(index):
        out = (pixels[index] * weight.unsqueeze(2)).sum(1)
    else:  # the same in one pass, which never stores the samples
        out = F.embedding_bag(index, pixels, per_sample_weights=weight, mode="sum")
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
    image, first, second = rois.split((1, 2, 2), dim=1)
    there = (image >= 0) & (image < batch)  # (Q, 1); false for a NaN
    image = torch.where(there, image, 0).to(torch.int64)
    if aligned:
        start, extent = first * scale - 0.5, (second - first) * scale
    else:
        first, second = _round(first), _round(second) + 1
        start, extent = first * scale - 0.5, ((second - first) * scale).clamp(min=0.1)
    # Products with what is not finite would be no numbers, forward or backward.
    finite = (start.isfinite() & extent.isfinite()).all(1, keepdim=True)
    there, start, extent = there & finite, torch.where(finite, start, 0), torch.where(finite, extent, 0)
    part = (torch.arange(side * samples, dtype=rois.dtype, device=rois.device) + (0.5 if aligned else 0)) / samples
    part = (part / side).view(side, samples)
    margin = 1.0 if aligned else 0.5

    def axis(number: int, size: int, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each sample along an axis, (Q, S, S, T): whether it counts, and its two pixels' numbers and weights."""
        position = (start[:, number, None, None] + extent[:, number, None, None] * part).view(-1, *grid, samples)
        if offset is not None:
            position = position + (gamma * extent[:, number, None, None] * offset[:, number]).unsqueeze(3)
        counts = (position >= -margin) & (position <= size - 1 + margin)
        # Positions that do not count move to 0, so that no arithmetic ever sees them, forward or backward.
        position = torch.where(counts, position, 0).clamp(0, size - 1)
        low = position.detach().floor()
        high = (low + 1).clamp(max=size - 1)
        weights = torch.stack([1 - (position - low), position - low], -1)
        shape = (len(rois), side, side, samples)
        pixels = torch.stack([low, high], -1).to(torch.int64)
        return counts.expand(shape), pixels.expand(*shape, 2), weights.expand(*shape, 2)

    counts_y, rows, weights_y = axis(1, height, (side, 1))
    counts_x, columns, weights_x = axis(0, width, (1, side))
    counts = counts_y.unsqueeze(4) & counts_x.unsqueeze(3) & there.view(-1, 1, 1, 1, 1)  # (Q, S, S, T, T)
    number = counts.sum((3, 4), keepdim=True).clamp(min=1) if not aligned else samples**2
    index = (image.view(-1, 1, 1, 1) * height + rows.flatten(3)).unsqueeze(4) * width + columns.flatten(3).unsqueeze(3)
    weight = weights_y[:, :, :, :, None, :, None] * weights_x[:, :, :, None, :, None, :]  # (Q, S, S, T, T, 2, 2)
    weight = torch.where(counts[..., None, None], weight, 0) / (number if aligned else number[..., None, None])
    cells, taps = len(rois) * side * side, 4 * samples**2
    return index.reshape(cells, taps), weight.transpose(4, 5).reshape(cells, taps)


def _round(x: Tensor) -> Tensor:
    """To the next integer, 1/2 away from 0, as in C; PyTorch's goes to the even one."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)
