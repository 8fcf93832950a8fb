"""What two-stage detectors keep to beside boxes, under both engines: masks and keypoints; see test_contract.py."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dyhead.detection.roi import BOX_HEADS, Registered
from dyhead.detection.roi.masks import paste_masks
from dyhead.options import option
from dyhead.torchvision import config
from tests.test_contract import Detectron2, Torchvision, assert_engines_agree, build, inputs

BOTH = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32, 32),
    "INPUT.MASK_FORMAT": "bitmask",
    "MODEL.DYHEAD.NUM_BLOCKS": 0,
}
# Where keypoints are in their box, and their visibility: also on its border, outside it, and not annotated.
POINTS = torch.tensor([[0.5, 0.5, 2], [0.1, 0.2, 1], [1.0, 0.5, 2], [0.3, 1.2, 2], [0.2, 0.8, 0]])


def parts(image, boxes):
    """Masks, a corner cut off each box, and keypoints of objects."""
    height, width = image.shape[1:]
    low, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    pixels = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=2) + 0.5
    within = (pixels.view(1, -1, 2) - low) / size
    masks = ((within >= 0) & (within <= 1)).all(dim=2) & (within.sum(dim=2) < 1.3)
    keypoints = torch.cat([low + POINTS[:, :2] * size, POINTS[:, 2:].expand(len(boxes), -1, 1)], dim=2)
    return masks.view(-1, height, width), keypoints


def losses_of_torchvision(adapter, images, targets):
    batch = []
    for image, (boxes, labels) in zip(images, targets, strict=True):
        masks, keypoints = parts(image, boxes)
        batch.append({"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints})
    return adapter.model.train()(images, batch)


def losses_of_detectron2(adapter, images, targets):
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
    from detectron2.utils.events import EventStorage

    batch = []
    for image, (boxes, labels) in zip(images, targets, strict=True):
        masks, keypoints = parts(image, boxes)
        instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(boxes), gt_classes=labels)
        if len(boxes):
            instances.gt_masks, instances.gt_keypoints = BitMasks(masks), Keypoints(keypoints)
        batch.append({"image": image, "instances": instances})
    with EventStorage():
        return adapter.model.train()(batch)


def pair(tmp_path, **options):
    ours, theirs = (build(engine, "keypoint_rcnn", **BOTH, **options) for engine in ("torchvision", "detectron2"))
    assert isinstance(ours, Torchvision)
    assert isinstance(theirs, Detectron2)
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    return ours, theirs


D2DET = {"MODEL.ROI_BOX_HEAD.NAME": "D2Det"}
OTHERWISE = {
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": False,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": 0.5,
}


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("options", "case"),
    [({}, "objects"), ({}, "none at all"), (OTHERWISE, "none in one image"), (D2DET, "none in one image")],
    ids=["objects", "none at all", "otherwise configured", "with a box head of its own losses"],
)
def test_both_engines_give_the_same_losses_and_gradients(options, case, tmp_path):
    ours, theirs = pair(tmp_path, **options)
    losses = losses_of_torchvision(ours, *inputs(case))
    expected = losses_of_detectron2(theirs, *inputs(case))
    assert set(losses) == set(expected) == {*losses, "loss_mask", "loss_keypoint"}
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=1e-7)
    norms = []
    for adapter, of in ((ours, losses), (theirs, expected)):
        sum(of.values()).backward()
        assert all(p.grad is not None for p in adapter.model.parameters() if p.requires_grad)
        norms.append(sorted(float(p.grad.norm()) for p in adapter.model.parameters() if p.grad is not None))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-6)


@pytest.mark.detectron2
def test_both_engines_find_the_same_masks_and_keypoints(tmp_path):
    ours, theirs = pair(tmp_path)
    images, _ = inputs("objects")
    height, width = 150, 211  # of the files, say
    with torch.no_grad():
        found = ours.model.eval()(images)
        batch = [{"image": image, "height": height, "width": width} for image in images]
        expected = [output["instances"] for output in theirs.model.eval()(batch)]
    for image, each, other in zip(images, found, expected, strict=True):
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
        boxes, keypoints = each["boxes"] * scale.repeat(2), each["keypoints"] * torch.tensor([*scale, 1])
        masks = paste_masks(each["masks"], boxes, height, width)
        off = (boxes[:, None] - other.pred_boxes.tensor).abs().amax(dim=2)
        twins = (off < 1e-2) & (each["labels"][:, None] == other.pred_classes)
        places = torch.where(twins.any(dim=1))[0]
        assert len(places) > 10
        assert len(boxes) - len(places) <= 2  # see test_contract.py
        for i in places.tolist():
            j = int(twins[i].int().argmax())
            assert (masks[i] != other.pred_masks[j]).sum() <= 2
            torch.testing.assert_close(keypoints[i], other.pred_keypoints[j], rtol=1e-4, atol=1e-2)


@pytest.mark.detectron2
def test_weights_of_masks_and_keypoints_go_from_detectron2_to_torchvision(tmp_path):
    ours, theirs = (build(engine, "keypoint_rcnn", **BOTH) for engine in ("torchvision", "detectron2"))
    with torch.no_grad():
        for parameter in theirs.model.roi_heads.parameters():
            parameter.normal_()
    theirs.save(tmp_path / "w.pth")
    ours.load(tmp_path / "w.pth")
    (tmp_path / "w.pth").unlink()
    ours.save(tmp_path / "w.pth")
    state, given = torch.load(tmp_path / "w.pth")["model"], theirs.model.state_dict()
    assert all(torch.equal(state[key], given[key]) for key in given if key.startswith("roi_heads."))


def test_bfloat16_autocast_gives_nearly_the_same_losses_of_masks_and_keypoints():
    adapter = build("torchvision", "keypoint_rcnn", **BOTH)
    exact = losses_of_torchvision(adapter, *inputs("objects"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of_torchvision(adapter, *inputs("objects"))
        (found, *_) = adapter.model.eval()(inputs("objects")[0])
    for key in ("loss_mask", "loss_keypoint"):
        assert losses[key].dtype == torch.float32
        assert losses[key].item() == pytest.approx(exact[key].item(), rel=0.1)
    assert found["masks"].isfinite().all()
    assert found["keypoints"].isfinite().all()


def test_an_image_without_detections_has_no_masks_and_no_keypoints():
    adapter = build("torchvision", "keypoint_rcnn", **BOTH, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0})
    with torch.no_grad():
        (found,) = adapter.model.eval()([torch.zeros(3, 64, 80, dtype=torch.uint8)])
    assert found["masks"].shape[0] == found["keypoints"].shape[0] == len(found["boxes"]) == 0
    assert found["keypoints"].shape[1:] == (5, 3)


class TwoViews(nn.Module):
    """A box head that sees a region as it is for its class, and more of it for its box."""

    scales = (1.0, 1.3)

    def __init__(self, channels, side, width):
        super().__init__()
        self.of_class = nn.Linear(channels, width)
        self.of_box = nn.Linear(channels * side**2, 2 * width)
        self.out_features = (width, 2 * width)

    def forward(self, regions):
        plain, enlarged = regions.chunk(2, dim=1)
        features = self.of_class(plain.mean(dim=(2, 3))), self.of_box(enlarged.flatten(1))
        return torch.cat(features, dim=1).relu()


@dataclass(frozen=True)
class TwoViewsOptions:
    width: int = option(12, "features for classes")

    def build(self, channels, side):
        return TwoViews(channels, side, self.width)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_rcnn"])
def test_a_box_head_may_see_several_views_and_predict_boxes_from_features_of_their_own(name, tmp_path, monkeypatch):
    from detectron2.modeling import ROI_BOX_HEAD_REGISTRY

    from dyhead.detectron2 import rcnn

    monkeypatch.setitem(BOX_HEADS, "TwoViews", Registered("TwoViews", "MODEL.TWO_VIEWS", TwoViewsOptions))
    monkeypatch.setitem(config._TWO_STAGE_CHOICES, "MODEL.ROI_BOX_HEAD.NAME", ("TwoViews",))
    monkeypatch.setattr(ROI_BOX_HEAD_REGISTRY, "_obj_map", dict(ROI_BOX_HEAD_REGISTRY._obj_map))
    rcnn._register_box_head("TwoViews")
    options = {"MODEL.ROI_BOX_HEAD.NAME": "TwoViews", "MODEL.TWO_VIEWS.WIDTH": 8}
    assert_engines_agree(name, "_dyhead", "objects", tmp_path, **options)
    heads = build("torchvision", name, **options).model.roi_heads
    predictor = heads.stages[1].predictor if name == "cascade_rcnn" else heads.box_predictor
    assert (predictor.cls_score.in_features, predictor.bbox_pred.in_features) == (8, 16)
