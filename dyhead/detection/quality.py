"""How good a place is for its object: the target of the quality prediction."""

from __future__ import annotations

from torch import Tensor


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """1 in the middle of a box, 0 at its border: FCOS (Tian et al., ICCV 2019), Eq. 3.

    Args:
        points: (P, 2) as x, y, inside the boxes.
        boxes: (P, 4).

    Returns:
        (P,).
    """
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    ratios = before.minimum(after) / before.maximum(after)
    return ratios.prod(dim=1).sqrt()
