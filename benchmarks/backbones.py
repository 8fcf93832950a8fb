"""`python -m benchmarks.backbones`: writes the table of networks, and what they cost, into docs/backbones.md.

The networks are those of configs/atss_dyhead_*.yaml, built on the meta device, which computes nothing. Needs timm.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.document import rewrite
from benchmarks.heads import IMAGE
from benchmarks.program import markdown
from dyhead.config import load_config, network_of, options_of
from dyhead.evaluation import count_flops, count_parameters
from dyhead.torchvision import build_model, get_cfg

_ROOT = Path(__file__).parents[1]
DOCUMENT = _ROOT / "docs" / "backbones.md"

#: What others published of ATSS with DyHead on a network: AP on COCO, and where.
PUBLISHED = {
    "R50": "42.6 (paper, 1x)",
    "X101_DCN": "52.3 (paper, test-dev, 2x)",
    "SwinT": "49.8 (microsoft/DynamicHead, 2x)",
    "SwinL": "56.2 (mmdetection, 2x)",
}


def names() -> list[str]:
    """The networks, as the configurations' names say: those of ResNets first."""
    files = sorted(path.stem.removeprefix("atss_dyhead_") for path in (_ROOT / "configs").glob("atss_dyhead_*.yaml"))
    files = [name for name in files if _configured(name).MODEL.NECKS == ["DyHead"]]
    return sorted(files, key=lambda name: (_network_name(name), name))


def section(words: list[str]) -> str:
    """The table."""
    head = [
        "`configs/atss_dyhead_...`",
        "network",
        "needs",
        "network, G",
        "M",
        "whole detector, G",
        "M",
        "published AP",
    ]
    return markdown([head, *map(row, names())], left=3)


def row(name: str) -> list[str]:
    """A network's line: billions of multiply-adds of an image, millions of parameters."""
    cfg = _configured(name)
    with torch.device("meta"):
        model = build_model(cfg).eval()
    image = torch.empty(1, 3, *IMAGE, device="meta")
    whole = nn.Sequential(model.backbone, model.detector)
    cost = [f(x) for x in (model.backbone.body, whole) for f in (lambda x: f"{count_flops(x, image):.1f}", _millions)]
    needs = "timm" if _network_name(name) == "timm" else ""
    return [f"`{name}.yaml`", _network(name), needs, *cost, PUBLISHED.get(name, "")]


def _network(name: str) -> str:
    cfg = _configured(name)
    network = network_of(cfg)
    if network is not None:
        return options_of(cfg, network.node).title
    options = cfg.MODEL.RESNETS
    groups = f"ResNeXt-{options.DEPTH}-{options.NUM_GROUPS}x{options.WIDTH_PER_GROUP}d"
    stages = [f"res{i}" for i, deformable in enumerate(options.DEFORM_ON_PER_STAGE, 2) if deformable]
    kind = groups if options.NUM_GROUPS > 1 else f"ResNet-{options.DEPTH}"
    return f"{kind}, deformable in {', '.join(stages)}" if stages else kind


def _network_name(name: str) -> str:
    """Of a network that is registered; "" of a ResNet."""
    network = network_of(_configured(name))
    return "" if network is None else network.name


def _configured(name: str):
    cfg = get_cfg()
    load_config(cfg, _ROOT / "configs" / f"atss_dyhead_{name}.yaml")
    return cfg


def _millions(module: nn.Module) -> str:
    return f"{count_parameters(module) / 1e6:.1f}"


if __name__ == "__main__":
    rewrite(DOCUMENT, section)
