"""The configuration files of other networks than ResNet-50: each is built whole, without memory, and can learn."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dyhead.config import load_config
from dyhead.layers import DeformConv2dPack, DyHead
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.config import check_values, ignore_not_honoured

CONFIGS = Path(__file__).parents[2] / "configs"
OTHERS = [
    f"atss_dyhead_{name}" for name in ("R101", "X101_DCN", "hit_detector", "spinenet49", "pyconv50", "ps50", "psx101")
]
FILES = {path.stem: path.read_text() for path in CONFIGS.glob("atss_dyhead_*.yaml")}
TIMM = sorted(name for name, text in FILES.items() if "base_atss_dyhead_timm.yaml" in text)
NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.mark.parametrize("name", [*OTHERS, *(pytest.param(name, marks=NEEDS_TIMM) for name in TIMM)])
def test_every_network_is_built_and_every_weight_of_it_can_learn(name, caplog):
    cfg = get_cfg()
    given = load_config(cfg, CONFIGS / f"{name}.yaml")
    check_values(cfg)
    ignore_not_honoured(cfg, given)
    assert not caplog.text
    assert cfg.OUTPUT_DIR == f"output/{name}"
    with torch.device("meta"):
        backbone = build_model(cfg).backbone
        levels = backbone(torch.zeros(2, 3, 128, 128))
    assert isinstance(backbone.dyhead, DyHead)
    assert [tuple(x.shape) for x in levels.values()] == [(2, 256, size, size) for size in (16, 8, 4, 2, 1)]
    sum(x.sum() for x in levels.values()).backward()
    assert [key for key, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_networks_of_the_cspnet_paper_and_of_dyheads_are_there():
    assert {"CSPR50", "CSPX50", "CSPD53", "SwinT", "SwinL"} <= {name.removeprefix("atss_dyhead_") for name in TIMM}


def test_resnext_101_has_deformable_convolutions_in_three_stages():
    cfg = get_cfg()
    load_config(cfg, CONFIGS / "atss_dyhead_X101_DCN.yaml")
    with torch.device("meta"):
        body = build_model(cfg).backbone.body
    layers = [module for module in body.modules() if isinstance(module, DeformConv2dPack)]
    assert len(layers) == 4 + 23 + 3
    assert all(layer.groups == 64 and layer.modulated for layer in layers)
