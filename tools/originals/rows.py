"""One comparison with an original: a row of the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """How far something that was computed here is from the original.

    Attributes:
        name: of the recipe or head.
        stage: what was compared.
        difference: the largest; None: not compared.
        tolerance: what it may be at most, in the same unit.
        remark: why it was not compared.
    """

    name: str
    stage: str = ""
    difference: float | None = None
    tolerance: float | None = None
    remark: str = ""

    @property
    def passes(self) -> bool:
        """Whether nothing is wrong; NaN is."""
        return self.difference is None or self.difference <= self.tolerance

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return self.remark if self.difference is None else "ok" if self.passes else "OVER"


def largest(got: Tensor, want: Tensor) -> float:
    """The largest difference of two tensors; infinite where they differ in shape."""
    if got.shape != want.shape:
        return float("inf")
    return (got.double() - want.double()).abs().max().item() if got.numel() else 0.0


def relative(got: Tensor, want: Tensor, floor: float = 1e-6) -> float:
    """The largest of the differences, each divided by the number wanted, or by ``floor`` where that is smaller."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    return ((got - want).abs() / want.abs().clamp(min=floor)).max().item() if got.numel() else 0.0


def of_detections(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """How far the farthest detection is from its partner of the same class, in pixels and in score.

    Args:
        found, expected: boxes (D, 4), scores and labels (D,) of an image; infinite where there are not as many.
    """
    boxes, scores, labels = found[:3]
    if len(boxes) != len(expected[0]):
        return float("inf"), float("inf")
    pixels = scores_off = 0.0
    for box, score, label in zip(*expected, strict=True):
        # Neighbouring scores may lie as close as rounding: a partner is near in both.
        off = (boxes - box).abs().amax(dim=1) + 1e6 * (labels != label) + 1e6 * ((scores - score).abs() > 0.01)
        pixels = max(pixels, off.min().item())
        scores_off = max(scores_off, (scores[off.argmin()] - score).abs().item())
    return pixels, scores_off


def table(rows: Iterable[Row]) -> str:
    """The rows as text, in columns."""
    cells = [("name", "stage", "difference", "tolerance", "")]
    for row in rows:
        numbers = ("", "") if row.difference is None else (f"{row.difference:.1e}", f"{row.tolerance:.0e}")
        cells.append((row.name, row.stage, *numbers, row.verdict))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    lines = [
        f"{name:{widths[0]}}  {stage:{widths[1]}}  {difference:>{widths[2]}}  {tolerance:>{widths[3]}}  {verdict}"
        for name, stage, difference, tolerance, verdict in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
