"""Batch normalization over the levels of a pyramid together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyhead.ops.checks import describe

#: The norms over all levels together, by name.
NORMS: dict[str, type[nn.Module] | None] = {"": None, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


def build_norm(name: str, channels: int) -> nn.Module | None:
    """The norm of :data:`NORMS` called ``name``, for :func:`normalize`.

    Raises:
        ValueError: another name.
    """
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {describe(name)}")
    kind = NORMS[name]
    return None if kind is None else kind(channels)


def normalize(norm: nn.Module | None, levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels (N, C, H_l, W_l) through one batch normalization, whose statistics are those of all their pixels.

    A level counts by its pixels. None is the identity.
    """
    if norm is None or not norm.training:  # stored statistics: each pixel for itself
        return [level if norm is None else norm(level) for level in levels]
    pixels = norm(torch.cat([level.flatten(2) for level in levels], dim=2)[:, :, None])[:, :, 0]
    counts = [level.shape[2] * level.shape[3] for level in levels]
    parts = pixels.split(counts, dim=2)
    return [part.unflatten(2, level.shape[2:]) for part, level in zip(parts, levels, strict=True)]
