"""Networks that both engines build their pyramids on, beside each engine's own ResNet."""

from dyhead.backbones.simple_pyramid import SimplePyramid
from dyhead.backbones.timm import TimmNetwork, TimmOptions, pretrained_state

__all__ = ["SimplePyramid", "TimmNetwork", "TimmOptions", "pretrained_state"]
