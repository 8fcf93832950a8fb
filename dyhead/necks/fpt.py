"""The Feature Pyramid Transformer (Zhang et al., ECCV 2020) as a neck. Experimental."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dyhead.layers import FPT
from dyhead.layers.fpt import SIMILARITIES
from dyhead.necks.registry import register_neck
from dyhead.options import at_least, below, one_of, option


@register_neck("FPT")
@dataclass(frozen=True)
class FPTOptions:
    """The Feature Pyramid Transformer as a neck, where ``MODEL.NECKS`` lists it; see :class:`dyhead.layers.FPT`.

    It is experimental: nobody has published weights of it, and the authors' network does not run, only its modules do,
    which these equal. Its memory grows with the square of the image's area, unlike DyHead's.
    """

    parts: int = option(
        2,
        "a level sees itself in so many parts of the channels, each with a softmax of its own; a divisor",
        at_least(1),
    )
    similarity: str = option(
        "dot",
        "what a level sees coarser ones by: dot is the products alone, as in the authors' code; softmax their softmax; "
        "distance that of the negative squared distances, as in the paper",
        one_of(*SIMILARITIES),
    )
    dropout: float = option(0.1, "of what a level sees of itself, in training", at_least(0) & below(1))
    norm: str = option(
        "BN",
        "after all convolutions but the last; BN wants several images on a device, SyncBN has the statistics of all "
        "devices",
        one_of("BN", "SyncBN"),
    )

    def build(self, channels: int, num_levels: int) -> FPT:
        """The module for so many levels, with random weights.

        Raises:
            ValueError: options that do not fit the channels.
        """
        return FPT(channels, num_levels, **asdict(self))

    def size_divisibility(self, strides: Sequence[int]) -> int:
        """What it asks of the image's height and width, in pixels."""
        return 1
