# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import FPN, build_backbone, build_model
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.events import EventStorage

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detectron2 import DenseHead, DyHeadBackbone, DyHeadFCOS

DETECTORS = ["fcos", "retinanet", "faster_rcnn"]


class PlainHead(torch.nn.Module):
    """Predictions of every level by the convolutions (weight, bias) that it is given."""

    def __init__(self, *convolutions):
        super().__init__()
        self.convolutions = convolutions

    def forward(self, features):
        return tuple([F.conv2d(x, weight, bias, padding=1) for x in features] for weight, bias in self.convolutions)


def losses_of(model, inputs):
    torch.manual_seed(0)  # Faster R-CNN samples its proposals
    with EventStorage():
        return model.train()(inputs)


def detections_of(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def assert_same_detections(model, other, inputs):
    for got, want in zip(detections_of(model, inputs), detections_of(other, inputs), strict=True):
        assert len(got) > 0
        torch.testing.assert_close(got.pred_boxes.tensor, want.pred_boxes.tensor)
        torch.testing.assert_close(got.scores, want.scores)
        assert torch.equal(got.pred_classes, want.pred_classes)


@pytest.mark.parametrize(
    ("detector", "names"),
    [
        ("fcos", {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}),
        ("retinanet", {"loss_cls", "loss_box_reg"}),
        ("faster_rcnn", {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}),
    ],
)
def test_a_detector_trains_and_infers(tiny_cfg, inputs, detector, names):
    thresholds = ("FCOS", "RETINANET", "ROI_HEADS")
    model = build_model(tiny_cfg(detector, {f"MODEL.{name}.SCORE_THRESH_TEST": 0.001 for name in thresholds}))
    losses = losses_of(model, inputs)
    assert set(losses) == names
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for detections in detections_of(model, inputs):
        assert 0 < len(detections) <= 100
        assert detections.pred_classes.max() < 2
        assert torch.isfinite(detections.pred_boxes.tensor).all()


def test_fcos_equals_detectron2s_with_the_same_weights(tiny_cfg, inputs):
    cfg = tiny_cfg("fcos", {"MODEL.FCOS.SCORE_THRESH_TEST": 0.05})
    model = build_model(cfg)
    with torch.no_grad():  # far from the start, where the box deltas are near 0
        for convolution in (model.head.logits, model.head.deltas, model.head.quality):
            convolution.weight.normal_(std=0.1)
    plain = FCOS(
        backbone=model.backbone,
        head=PlainHead(*((c.weight, c.bias) for c in (model.head.logits, model.head.deltas, model.head.quality))),
        num_classes=2,
        test_score_thresh=0.05,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    expected = losses_of(plain, inputs)
    for name, loss in losses_of(model, inputs).items():
        torch.testing.assert_close(loss, expected[name])
    assert_same_detections(model, plain, inputs)


def test_config_reaches_fcos(tiny_cfg):
    settings = {
        "IN_FEATURES": ["p4", "p5"],
        "CENTER_SAMPLING_RADIUS": 2.5,
        "FOCAL_LOSS_ALPHA": 0.5,
        "FOCAL_LOSS_GAMMA": 3.0,
        "PRIOR_PROB": 0.25,
        "SCORE_THRESH_TEST": 0.125,
        "TOPK_CANDIDATES_TEST": 77,
        "NMS_THRESH_TEST": 0.375,
    }
    settings = {f"MODEL.FCOS.{key}": value for key, value in settings.items()}
    model = build_model(tiny_cfg("fcos", {**settings, "TEST.DETECTIONS_PER_IMAGE": 33}))
    assert model.head_in_features == ["p4", "p5"]
    assert model.center_sampling_radius == 2.5
    assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.5, 3.0)
    torch.testing.assert_close(model.head.logits.bias.sigmoid(), torch.tensor([0.25, 0.25]))
    assert (model.test_score_thresh, model.test_topk_candidates, model.test_nms_thresh) == (0.125, 77, 0.375)
    assert model.max_detections_per_image == 33
    torch.testing.assert_close(model.pixel_mean.flatten(), torch.tensor([123.675, 116.28, 103.53]))


def test_config_reaches_retinanets_head(tiny_cfg):
    settings = {"MODEL.RETINANET.PRIOR_PROB": 0.25, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0, 2.0]]}
    model = build_model(tiny_cfg("retinanet", settings))
    # 3 sizes by 2 ratios, 2 classes
    torch.testing.assert_close(model.head.logits.bias.sigmoid(), torch.full((12,), 0.25))
    assert model.head.deltas.out_channels == 24


def test_retinanet_equals_detectron2s_with_the_same_weights(tiny_cfg, inputs):
    model = build_model(tiny_cfg("retinanet", {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.005}))
    cfg = tiny_cfg("retinanet", {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.005}).clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    plain = build_model(cfg)
    plain.backbone = model.backbone
    plain.head = PlainHead(*((c.weight, c.bias) for c in (model.head.logits, model.head.deltas)))
    expected = losses_of(plain, inputs)
    for name, loss in losses_of(model, inputs).items():
        torch.testing.assert_close(loss, expected[name])
    assert_same_detections(model, plain, inputs)


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_autocast_gives_nearly_the_same_losses(tiny_cfg, inputs, detector):
    model = build_model(tiny_cfg(detector))
    again = build_model(tiny_cfg(detector))  # the losses' normaliser remembers earlier calls
    again.load_state_dict(model.state_dict())
    exact = losses_of(again, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, inputs)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), exact[name], rtol=0.05, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16):
        detections_of(model, inputs)


@pytest.mark.parametrize(
    ("detector", "plain"),
    [
        ("fcos", "build_retinanet_resnet_fpn_backbone"),
        ("retinanet", "build_retinanet_resnet_fpn_backbone"),
        ("faster_rcnn", "build_resnet_fpn_backbone"),
    ],
)
def test_a_backbone_without_the_head_is_refused(tiny_cfg, detector, plain):
    cfg = tiny_cfg(detector, {"MODEL.BACKBONE.NAME": plain})
    with pytest.raises(ConfigError, match=r"expected a backbone with a Dynamic Head .*dyhead_backbone.*got FPN"):
        build_model(cfg)


def test_keyword_constructors_serve_lazy_configs(inputs):
    stages = LazyCall(ResNet.make_default_stages)(depth=18, norm="GN")
    resnet = LazyCall(ResNet)(stem=LazyCall(BasicStem)(norm="GN"), stages=stages, out_features=["res3", "res4", "res5"])
    fpn = LazyCall(FPN)(
        bottom_up=resnet,
        in_features=["res3", "res4", "res5"],
        out_channels=32,
        top_block=LazyCall(LastLevelP6P7)(in_channels=32, out_channels=32, in_feature="p5"),
    )
    lazy = LazyCall(DyHeadFCOS)(
        backbone=LazyCall(DyHeadBackbone)(backbone=fpn, num_blocks=1),
        head=LazyCall(DenseHead)(channels=32, num_classes=2, quality=True),
        num_classes=2,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[255.0, 255.0, 255.0],
    )
    losses = losses_of(instantiate(lazy), inputs)
    assert torch.isfinite(sum(losses.values()))


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_full_configs_build(configs, inputs, detector):
    cfg = add_dyhead_config(get_cfg())
    load_config(cfg, configs / f"{detector}_dyhead_R50.yaml", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    backbone = build_backbone(cfg)
    assert len(backbone.dyhead.blocks) == 6
    assert {shape.channels for shape in backbone.output_shape().values()} == {256}
    cfg.MODEL.DYHEAD.NUM_BLOCKS = 1
    assert len(detections_of(build_model(cfg), inputs)) == 2
