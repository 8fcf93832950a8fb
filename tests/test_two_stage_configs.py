"""The configurations of two-stage detectors: each says what its name says, and takes a step, shrunk."""

from pathlib import Path

import pytest
import torch

from dyhead.config import TWO_STAGE, add_dyhead_config, load_config
from dyhead.detection.roi import DyHeadBoxHead
from dyhead.layers import DyHeadBlock
from dyhead.torchvision import build_model, get_cfg

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = [f"{kind}_rcnn{form}" for kind in ("faster", "mask", "keypoint", "cascade") for form in (
    "", "_dyhead", "_dyhead_box_head"
)]  # fmt: skip
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (16,),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}
IMAGE = torch.arange(3 * 64 * 96, dtype=torch.float32).remainder(251).view(3, 64, 96).to(torch.uint8)
BOXES = torch.tensor([[5.0, 6, 60, 50], [30, 10, 90, 60]])


def configured(cfg, name):
    load_config(cfg, CONFIGS / f"{name}_R50.yaml", [str(word) for pair in SMALL.items() for word in pair])
    return cfg


def assert_learns(model, losses, expected):
    assert set(losses) == expected
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_takes_a_step(name):
    cfg = configured(get_cfg(), name)
    assert cfg.MODEL.META_ARCHITECTURE == TWO_STAGE
    model = build_model(cfg)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[:, 10:40, 35:55] = True
    keypoints = torch.tensor([40.0, 20, 2]).expand(2, 17, 3)
    losses = model([IMAGE], [{"boxes": BOXES, "labels": torch.zeros(2).long(), "masks": masks, "keypoints": keypoints}])
    of_boxes = ["loss_cls", "loss_box_reg"]
    if name.startswith("cascade"):
        of_boxes = [f"{loss}_stage{i}" for loss in of_boxes for i in range(3)]
    parts = {"mask": ["loss_mask"], "keypoint": ["loss_keypoint"]}.get(name.split("_")[0], [])
    assert_learns(model, losses, {"loss_rpn_cls", "loss_rpn_loc", *of_boxes, *parts})
    blocks = [module for module in model.modules() if isinstance(module, DyHeadBlock)]
    heads = [module for module in model.modules() if isinstance(module, DyHeadBoxHead)]
    assert len(blocks) == ("dyhead" in name)
    assert len(heads) == (name.endswith("box_head") * (3 if name.startswith("cascade") else 1))
    assert all((block.task_attention is None) == bool(heads) for block in blocks)  # it is in one of the two


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["panoptic_fpn", "panoptic_fpn_dyhead"])
def test_panoptic_fpn_takes_a_step(name):
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as build_detectron2_model
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    import dyhead.detectron2
    from dyhead.detectron2.config import check_values

    cfg = configured(add_dyhead_config(detectron2_cfg()), name)
    check_values(cfg)
    model = build_detectron2_model(cfg)
    assert isinstance(model.backbone, dyhead.detectron2.NeckBackbone) == name.endswith("dyhead")
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[:, 10:40, 35:55] = True
    instances = Instances((64, 96), gt_boxes=Boxes(BOXES), gt_classes=torch.tensor([3, 0]), gt_masks=BitMasks(masks))
    batch = [{"image": IMAGE, "instances": instances, "sem_seg": torch.full((64, 96), 5)}]
    with EventStorage():
        losses = model(batch)
    expected = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_sem_seg"}
    assert_learns(model, losses, expected)
    with torch.no_grad():
        (found,) = model.eval()([{"image": IMAGE, "height": 64, "width": 96}])
    assert set(found) == {"sem_seg", "instances", "panoptic_seg"}


@pytest.mark.detectron2
def test_panoptic_fpn_loads_its_checkpoints_and_starts_with_weights_of_the_baseline(tmp_path):
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as build_detectron2_model

    from dyhead.detectron2 import Checkpointer

    def build(name):
        return build_detectron2_model(configured(add_dyhead_config(detectron2_cfg()), name))

    plain, same, other = build("panoptic_fpn"), build("panoptic_fpn"), build("panoptic_fpn_dyhead")
    Checkpointer(plain, str(tmp_path)).save("w")
    Checkpointer(same).load(str(tmp_path / "w.pth"))
    Checkpointer(other).load(str(tmp_path / "w.pth"), checkpointables=[])
    state, loaded = same.state_dict(), other.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value)
        assert torch.equal(loaded[f"backbone.{key}" if key.startswith("backbone.") else key], value)
