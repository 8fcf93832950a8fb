"""Networks that both engines build their pyramids on, beside each engine's own ResNet."""

from dyhead.backbones.hit_detector import (
    HitDetectorNetwork,
    HitDetectorOptions,
    HitDetectorPyramid,
    HitDetectorPyramidOptions,
)
from dyhead.backbones.psconv import PSConvOptions, PSResNet
from dyhead.backbones.pyconv import PyConvOptions
from dyhead.backbones.registry import NETWORKS, Registered, register_network
from dyhead.backbones.resnet import ResNetStages
from dyhead.backbones.simple_pyramid import SimplePyramid
from dyhead.backbones.spinenet import SpineNet, SpineNetOptions
from dyhead.backbones.timm import TimmNetwork, TimmOptions, pretrained_state

__all__ = [
    "NETWORKS",
    "HitDetectorNetwork",
    "HitDetectorOptions",
    "HitDetectorPyramid",
    "HitDetectorPyramidOptions",
    "PSConvOptions",
    "PSResNet",
    "PyConvOptions",
    "Registered",
    "ResNetStages",
    "SimplePyramid",
    "SpineNet",
    "SpineNetOptions",
    "TimmNetwork",
    "TimmOptions",
    "pretrained_state",
    "register_network",
]
