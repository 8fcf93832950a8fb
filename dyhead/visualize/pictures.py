"""The figures: maps, sampling places, weights of levels.

An image is what the detector saw: (h, w, 3) uint8, RGB, in its own pixels. Boxes are (D, 4) in these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dyhead.visualize.tracing import TAPS, BlockTrace, Trace, sampled

_LEVEL_COLOURS = ("#1b6ca8", "#2a9d4e", "#e0a100", "#d1495b", "#7b3fa0", "#5c5c5c")
_IMPORTANCE = "plasma"
_PLACES = 4000  # places that are drawn of an object, at most


def stride_of(level: str) -> int:
    """Of a level that is called by it, in pixels of the image: p3 is 8.

    Raises:
        ValueError: it is not.
    """
    if not (level[:1] == "p" and level[1:].isdecimal()):
        raise ValueError(f"expected levels that are called p2, p3, ..., got {level!r}")
    return 2 ** int(level[1:])


def draw_maps(image: np.ndarray, trace: Trace, number: int) -> Figure:
    """Maps of every level before and after each attention of a block.

    Args:
        image: what the detector saw.
        trace: of its head.
        number: of the block, from 0.
    """
    block, (height, width) = trace.blocks[number], image.shape[:2]
    names = list(block.maps)
    side = 2.2
    size = side * (len(names) + 1) * min(1.6, width / height), (side + 0.25) * len(trace.levels) + 0.5
    figure = _figure(size)
    grid = figure.subplots(len(trace.levels), len(names) + 1, squeeze=False)
    for i, (row, level) in enumerate(zip(grid, trace.levels, strict=True)):
        stride = stride_of(level)
        row[0].imshow(image, alpha=1.0 if i == 0 else 0.35)
        row[0].set_ylabel(f"{level}, stride {stride}", fontsize=10)
        if i == 0:
            row[0].set_title("image", fontsize=10)
        for axes, name in zip(row[1:], names, strict=True):
            energy = block.maps[name][i].float().square().mean(dim=0).sqrt().cpu().numpy()
            h, w = (math.ceil(side / stride) for side in (height, width))
            energy = energy[:h, :w]  # without padding
            axes.imshow(energy, cmap="viridis", extent=(0, energy.shape[1] * stride, energy.shape[0] * stride, 0))
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
            title = f"{name}\n" if i == 0 else ""
            weight = ""
            if name == "scale-aware" and block.weights is not None:
                weight = f", x {block.weights[i]:.2f}"
            axes.set_title(f"{title}{energy.min():.2g} to {energy.max():.2g}{weight}", fontsize=9)
    _without_ticks(grid.flat)
    return figure


def draw_sampling(
    image: np.ndarray, trace: Trace, level: str, pixel: tuple[int, int], box: Sequence[float] | None
) -> Figure:
    """Where a pixel of a level reads from in each block, and, in a second row, where all pixels in a box do.

    Args:
        image: what the detector saw.
        trace: of its head; blocks with offsets.
        level: the name of the level.
        pixel: x and y in pixels of the image.
        box: of an object; None leaves out the second row.
    """
    index, stride = trace.levels.index(level), stride_of(level)
    blocks = [block for block in trace.blocks if block.offsets is not None]
    h, w = blocks[0].offsets[index].shape[-2:]
    x, y = (min(int(p // stride), side - 1) for p, side in zip(pixel, (w, h), strict=True))
    rows = 1 if box is None else 2
    columns = len(blocks)
    figure = _figure((2.7 * columns + 1.0, 2.9 * rows + 0.3))
    grid = figure.subplots(rows, columns, squeeze=False)
    per_block = [sampled(block, index, stride, y, x) for block in blocks]
    window = _window([places for places, _ in per_block], box, image.shape[:2], stride)
    for number, (axes, (places, importances)) in enumerate(zip(grid[0], per_block, strict=True), 1):
        _show(axes, image, window)
        _draw_regular(axes, (x, y), stride, places)
        dots = _draw_places(axes, places, importances, size=70)
        axes.plot((x + 0.5) * stride, (y + 0.5) * stride, "+", color="white", markersize=13, markeredgewidth=2.2)
        axes.set_title(f"block {number}", fontsize=10)
    grid[0][0].set_ylabel(f"one pixel of {level}", fontsize=10)
    if box is not None:
        for axes, block in zip(grid[1], blocks, strict=True):
            places, importances = _of_box(block, index, stride, box)
            _show(axes, image, window)
            _draw_places(axes, places, importances, size=9)
            x0, y0, x1, y1 = box
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1.6))
        grid[1][0].set_ylabel(f"all pixels of {level} in the box", fontsize=10)
    figure.colorbar(dots, ax=list(grid.flat), label="importance", fraction=0.03, pad=0.01)
    return figure


def draw_weights(traces: Sequence[Trace], sizes: Sequence[float]) -> Figure:
    """The weights of levels against the size of the objects in the image.

    Args:
        traces: of each image; blocks with weights.
        sizes: for each image the median size of its objects, the root of the box's area, in pixels of the image.
    """
    levels, count = traces[0].levels, len(traces[0].blocks)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = _figure((3.4 * columns, 2.6 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    at = np.asarray(sizes)
    for number, axes in enumerate(grid.flat):
        if number >= count:
            axes.set_visible(False)
            continue
        weights = np.stack([trace.blocks[number].weights.float().cpu().numpy() for trace in traces])
        for i, level in enumerate(levels):
            colour = _LEVEL_COLOURS[i % len(_LEVEL_COLOURS)]
            axes.scatter(at, weights[:, i], s=14, color=colour, alpha=0.6, linewidths=0, label=level)
            if len(at) > 2 and np.ptp(at) > 0:
                ends = np.array([at.min(), at.max()])
                axes.plot(ends, np.polyval(np.polyfit(at, weights[:, i], 1), ends), color=colour, linewidth=1.5)
        axes.set_title(f"block {number + 1}", fontsize=10)
        axes.grid(alpha=0.25)
    figure.supxlabel("median size of the objects in the image, pixels", fontsize=10)
    figure.supylabel("weight of the level", fontsize=10)
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(levels), frameon=False
    )
    return figure


def level_for(levels: Sequence[str], box: Sequence[float]) -> str:
    """The level on which the root of a box's area is nearest to six pixels: few enough to tell their places apart."""
    size = math.sqrt(max((box[2] - box[0]) * (box[3] - box[1]), 1.0))
    return min(levels, key=lambda level: abs(math.log2(size / 6 / stride_of(level))))


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _without_ticks(axes: Sequence[Axes]) -> None:
    for each in axes:
        each.set(xticks=[], yticks=[])


def _show(axes: Axes, image: np.ndarray, window: Sequence[float]) -> None:
    """The image, paler than it is, so that dots stand out."""
    height, width = image.shape[:2]
    axes.imshow(image // 2 + 60, extent=(0, width, height, 0))
    axes.set_xlim(window[0], window[2])
    axes.set_ylim(window[3], window[1])
    axes.set_facecolor("lightgrey")
    axes.set(xticks=[], yticks=[])


def _draw_regular(axes: Axes, pixel: tuple[int, int], stride: int, places: Tensor) -> None:
    """Where a plain 3x3 convolution reads, and lines from there to the places."""
    x, y = pixel
    grid = [((x + dx + 0.5) * stride, (y + dy + 0.5) * stride) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for i, (u, v) in enumerate(places.tolist()):
        from_x, from_y = grid[i % TAPS]
        axes.plot([from_x, u], [from_y, v], color="white", linewidth=0.8, alpha=0.8)
    axes.plot(*zip(*grid, strict=True), "s", color="none", markeredgecolor="white", markersize=5, markeredgewidth=0.9)


def _draw_places(axes: Axes, places: Tensor, importances: Tensor, size: float):
    order = importances.argsort()  # the most important on top
    x, y = places[order].T.cpu().numpy()
    weight = importances[order].cpu().numpy()
    areas = size * (0.15 + 0.85 * weight)
    return axes.scatter(x, y, s=areas, c=weight, cmap=_IMPORTANCE, vmin=0, vmax=1, edgecolors="black", linewidths=0.3)


def _of_box(block: BlockTrace, level: int, stride: int, box: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Places and importances of the pixels whose centers lie in a box, or of the one nearest to its center."""
    h, w = block.offsets[level].shape[-2:]
    ranges = []
    for low, high, side in ((box[0], box[2], w), (box[1], box[3], h)):
        inside = [i for i in range(side) if low <= (i + 0.5) * stride <= high]
        ranges.append(inside or [min(int((low + high) / 2 // stride), side - 1)])
    found = [sampled(block, level, stride, y, x) for y in ranges[1] for x in ranges[0]]
    places, importances = (torch.cat(parts) for parts in zip(*found, strict=True))
    step = math.ceil(len(places) / _PLACES)
    return places[::step], importances[::step]


def _window(
    places: Sequence[Tensor], box: Sequence[float] | None, size: tuple[int, int], stride: int
) -> tuple[float, float, float, float]:
    """A square around what is drawn, in pixels: x0, y0, x1, y1."""
    points = torch.cat(list(places))
    height, width = size
    inside = points[
        (points >= -stride).all(dim=1) & (points[:, 0] <= width + stride) & (points[:, 1] <= height + stride)
    ]
    corners = [inside] if len(inside) else [points[:1]]
    if box is not None:
        corners.append(points.new_tensor(box).view(2, 2))
    corners = torch.cat(corners)
    low, high = corners.amin(dim=0), corners.amax(dim=0)
    center, half = ((low + high) / 2).tolist(), float((high - low).max()) / 2 + 1.5 * stride
    return center[0] - half, center[1] - half, center[0] + half, center[1] + half
