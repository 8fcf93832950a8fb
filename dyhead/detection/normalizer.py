"""What the losses of a dense detector are divided by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Ways to count: see :class:`LossNormalizer`.
KINDS = ("moving_average", "positives", "positives_per_image")
_MOMENTUM = 0.9


class LossNormalizer(nn.Module):
    """The number of positive places, averaged over devices, at least 1.

    With that average, the mean of several devices' losses is what one computes on all their images; for a moving
    average once its start is forgotten.

    Args:
        kind: "positives": of the batch. "positives_per_image": an image counts at least as one (mmdetection).
            "moving_average": the mean over iterations, of momentum 0.9 (Detectron2); it is part of the state, so that
            a resumed training goes on with it.
        initial: what the moving average starts at.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: str, initial: float = 100.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.register_buffer("average", torch.tensor(float(initial)) if kind == "moving_average" else None)

    def forward(self, positives: Tensor) -> Tensor:
        """A scalar from the number of positives of each image, (N,). A moving average moves on."""
        if self.kind == "positives_per_image":
            positives = positives.clamp(min=1)
        count = divisor_of(positives.sum().float(), 1)
        if self.kind != "moving_average":
            return count
        self.average.copy_(_MOMENTUM * self.average + (1 - _MOMENTUM) * count)
        return self.average.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # Detectors of other projects do not save it: training then starts from its initial value.
        if self.average is not None:
            state_dict.setdefault(f"{prefix}average", self.average.detach().clone())
        else:
            state_dict.pop(f"{prefix}average", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def divided(class_loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    """A classification loss of logits and targets, divided by ``divisor`` unless the loss is ``normalized`` already."""
    loss = class_loss(logits, targets)
    return loss if getattr(class_loss, "normalized", False) else loss / divisor


def divisor_of(total: Tensor, smallest: float) -> Tensor:
    """A sum over this process's images as what losses are divided by: its mean over devices, at least ``smallest``."""
    return mean_over_devices(total).clamp(min=smallest)


def mean_over_devices(value: Tensor) -> Tensor:
    """The mean of a number over all processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value
