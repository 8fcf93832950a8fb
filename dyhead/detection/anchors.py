"""Anchors: the boxes that dense predictions are relative to, at every cell of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dyhead.options import Check, between, option


class Places(NamedTuple):
    """Where a detector predicts: the anchors of all cells of all levels.

    Attributes:
        anchors: (R, 4).
        counts: places on every level, fine to coarse; their sum is R.
        strides: of every level, in pixels of the image.
        per_cell: anchors A of a cell, the same on all levels.
    """

    anchors: Tensor
    counts: list[int]
    strides: tuple[int, ...]
    per_cell: int = 1

    @property
    def centers(self) -> Tensor:
        """(R, 2) as x, y."""
        return (self.anchors[:, :2] + self.anchors[:, 2:]) / 2

    def by_level(self, values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """One number per level as one per place, (R,); X numbers likewise, (R, X)."""
        levels = zip(self.anchors.new_tensor(values), self.counts, strict=True)
        return torch.cat([value.expand(count, *value.shape) for value, count in levels])


def _positive(values: Sequence) -> bool:
    return len(values) > 0 and all(_positive(v) if isinstance(v, (list, tuple)) else v > 0 for v in values)


_POSITIVE = Check("numbers above 0, at least one in each list", _positive)


@dataclass(frozen=True)
class AnchorOptions:
    """The anchors at every cell of RetinaNet, ATSS, GFL and the two-stage detectors' proposals."""

    sizes: tuple[tuple[float, ...], ...] | tuple[float, ...] = option(
        ((32, 64, 128, 256, 512),),
        "for each level the square roots of the anchors' areas, in pixels; one list serves all levels",
        _POSITIVE,
    )
    aspect_ratios: tuple[tuple[float, ...], ...] | tuple[float, ...] = option(
        ((0.5, 1.0, 2.0),), "for each level the anchors' ratios of height to width, likewise", _POSITIVE
    )
    offset: float = option(0.0, "where the first anchor's center lies, in strides: 0 or 0.5", between(0, 1))


class Anchors:
    """Boxes of given areas and shapes around every cell.

    Args:
        sizes: for every level the square roots of the anchors' areas, in pixels; one entry, or a plain list of numbers,
            serves all levels.
        aspect_ratios: for every level the ratios of height to width, likewise.
        strides: of the levels, in pixels.
        offset: where the first cell's center lies, in strides: 0 is the corner of the image, 0.5 the center of the
            level's first pixel.

    Raises:
        ValueError: not 1 or L sizes or ratios, a size or ratio that is not positive, or levels with different numbers
            of anchors.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        levels = len(strides)
        sizes = _per_level("SIZES", sizes, levels)
        aspect_ratios = _per_level("ASPECT_RATIOS", aspect_ratios, levels)
        shapes = [
            [(size / ratio**0.5, size * ratio**0.5) for size in of_size for ratio in of_shape]
            for of_size, of_shape in zip(sizes, aspect_ratios, strict=True)
        ]
        counts = [len(level) for level in shapes]
        if len(set(counts)) != 1:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR: expected as many anchors on every level, got {counts}")
        self.per_cell = counts[0]
        self.cells = [[(-w / 2, -h / 2, w / 2, h / 2) for w, h in level] for level in shapes]
        self.strides = tuple(strides)
        self.offset = offset

    def __call__(self, shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: torch.device) -> Places:
        """The places of levels of these (height, width): ratio after ratio of size after size in a cell."""
        levels = []
        for (height, width), stride, cell in zip(shapes, self.strides, self.cells, strict=True):
            y, x = ((torch.arange(n, dtype=dtype, device=device) + self.offset) * stride for n in (height, width))
            y, x = torch.meshgrid(y, x, indexing="ij")
            centers = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((centers + torch.tensor(cell, dtype=dtype, device=device)).reshape(-1, 4))
        # Not their len(), which would be a constant of a traced detector.
        return Places(torch.cat(levels), [level.shape[0] for level in levels], self.strides, self.per_cell)


def _per_level(key: str, values: Sequence[Sequence[float]], levels: int) -> list[Sequence[float]]:
    if values and all(isinstance(value, (int, float)) for value in values):
        values = [values]
    listed = all(isinstance(value, (list, tuple)) and len(value) for value in values)
    if len(values) not in (1, levels) or not listed:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.{key}: expected a list of 1 or {levels} lists (the levels), got {values!r}"
        )
    if not all(number > 0 for value in values for number in value):
        raise ValueError(f"MODEL.ANCHOR_GENERATOR.{key}: expected numbers above 0, got {values!r}")
    return list(values) * (levels // len(values))
