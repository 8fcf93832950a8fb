"""DyHead in the towers of GLIP and its descendants (FIBER, DesCo), which pass levels and text features on as a dict."""

from __future__ import annotations

from torch import nn

from dyhead.layers.head import DyHead


class VisionLanguageDyHead(nn.Module):
    """A :class:`DyHead` on the levels of a dict that holds other things, too, such as GLIP's ``{"visual", "lang"}``.

    In GLIP's tower, it stands where a ``DyConv`` does, between fusion and language layers. ``DyHead``'s options are the
    switches of GLIP's configuration: ``task_aware`` its ``USE_DYRELU``, ``scale_aware`` its ``USE_DYFUSE``,
    ``use_checkpoint`` its ``USE_CHECKPOINT``; ``DyHead(256, 1, block="released")`` takes GLIP's weights, which
    :func:`dyhead.checkpoints.convert` renames.

    Args:
        head: what is applied to the levels.
        key: where they are in the dict.

    Example:
        >>> import torch
        >>> layer = VisionLanguageDyHead(DyHead(64, num_blocks=1, use_checkpoint=True))
        >>> levels = [torch.randn(1, 64, 16, 16), torch.randn(1, 64, 8, 8)]
        >>> out = layer({"visual": levels, "lang": {"hidden": torch.randn(1, 12, 768)}})
        >>> [tuple(level.shape) for level in out["visual"]], list(out["lang"])
        ([(1, 64, 16, 16), (1, 64, 8, 8)], ['hidden'])
    """

    def __init__(self, head: DyHead, key: str = "visual") -> None:
        super().__init__()
        self.head = head
        self.key = key

    def forward(self, inputs: dict) -> dict:
        """A dict of what ``inputs`` has, but with the levels mapped; ``inputs`` stays as it is.

        Raises:
            TypeError: no dict with the key of the levels.
            TypeError, ValueError: not a valid pyramid, see :meth:`DyHead.forward`.
        """
        if not isinstance(inputs, dict) or self.key not in inputs:
            got = list(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise TypeError(f"inputs: expected a dict with levels under {self.key!r}, got {got}")
        return {**inputs, self.key: self.head(inputs[self.key])}
