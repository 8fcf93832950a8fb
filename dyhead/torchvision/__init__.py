"""The Dynamic Head on torchvision: detectors, data and the trainer that run where Detectron2 is not installed.

In a program of one's own:

    from dyhead.config import load_config
    from dyhead.torchvision import build_model, get_cfg

    cfg = get_cfg()
    load_config(cfg, "configs/fcos_dyhead_R50.yaml")
    model = build_model(cfg)
"""

from dyhead.torchvision.config import get_cfg
from dyhead.torchvision.detectors import build_model
from dyhead.torchvision.engine import main, setup

__all__ = ["build_model", "get_cfg", "main", "setup"]
