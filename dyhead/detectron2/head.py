"""The predictors on the unified branch, in the form that Detectron2's dense detectors ask of a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyhead.layers import DensePredictor


class DenseHead(DensePredictor):
    """:class:`dyhead.layers.DensePredictor` as the ``head`` of Detectron2's RetinaNet or FCOS; the same arguments.

    The predictions leave it in float32 at least: decoding and losses are exact under autocast, where Detectron2's
    linear box transform does not take half precision.
    """

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Predictions of the levels (N, C, H, W).

        Returns:
            Class logits (N, A*K, H, W), box deltas (N, A*4, H, W) and, with ``quality``, quality logits (N, A, H, W),
            each a list over levels.
        """
        logits, deltas, quality = zip(*super().forward(levels), strict=True)
        outputs = (logits, deltas) if self.quality is None else (logits, deltas, quality)
        return tuple([_at_least_float32(level) for level in output] for output in outputs)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
