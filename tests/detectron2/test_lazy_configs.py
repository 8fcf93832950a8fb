# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""configs/lazy: each is loaded, made small, and takes a step; DyHead in it changes what it computes."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage

from dyhead.layers import DyHead

CONFIGS = Path(__file__).parents[2] / "configs" / "lazy"
BOTTOM_UP = "model.backbone.backbone.bottom_up"
VIT = "model.backbone.backbone.net"
# Overrides that make a network small.
SMALL = {
    "atss_dyhead_R50": [f"{BOTTOM_UP}.stages.depth=18"],
    "atss_dyhead_RegNetY": [f"{BOTTOM_UP}.{key}" for key in ("depth=8", "w_a=16", "w_0=16", "group_width=8")],
    "atss_dyhead_SwinT": [f"{BOTTOM_UP}.{key}" for key in ("embed_dim=12", "depths=[1,1,1,1]", "num_heads=[1,2,2,2]")],
    "atss_dyhead_MViTv2T": [
        f"{BOTTOM_UP}.{key}" for key in ("embed_dim=16", "depth=4", "last_block_indexes=[0,1,2,3]", "img_size=64")
    ],
    "retinanet_dyhead_R50": [],
    "mask_rcnn_dyhead_ViTDet": [
        *(f"{VIT}.{key}" for key in ("embed_dim=32", "depth=2", "num_heads=2", "img_size=64")),
        f"{VIT}.window_block_indexes=[0]",
        "model.backbone.backbone.square_pad=64",
    ],
}


def test_every_file_of_a_model_is_tested():
    assert set(SMALL) == {path.stem for path in CONFIGS.glob("*_*.py")} - {"coco_1x"}


@pytest.mark.parametrize("name", SMALL)
def test_every_configuration_is_whole_and_takes_a_step(name, inputs, tmp_path):
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    for part in ("dataloader", "lr_multiplier", "optimizer", "train"):
        assert part in cfg
    assert cfg.train.init_checkpoint
    assert cfg.dataloader.train.mapper.image_format == cfg.model.input_format
    cfg = LazyConfig.apply_overrides(cfg, [*SMALL[name], "model.backbone.num_blocks=1"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))  # in which targets stand by name
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    assert isinstance(model.backbone.dyhead, DyHead)
    for x in inputs:
        x["image"] = x["image"][:, :64, :64]
        x["instances"] = x["instances"][:1]
        x["instances"]._image_size = (64, 64)
        x["instances"].gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    with EventStorage():
        losses = model.train()(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in model.backbone.dyhead.parameters())
