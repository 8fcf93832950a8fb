"""Networks that both engines build their pyramids on, beside each engine's own ResNet."""

from dyhead.backbones.timm import TimmNetwork, TimmOptions, pretrained_state

__all__ = ["TimmNetwork", "TimmOptions", "pretrained_state"]
