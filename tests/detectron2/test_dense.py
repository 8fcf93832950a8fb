# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import dataclasses
import pickle

import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.export import TracingAdapter
from detectron2.modeling import FPN, build_model
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import dyhead.detectron2
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detection import DETECTORS
from dyhead.detection.fcos import FCOSOptions
from dyhead.detectron2 import DyHeadBackbone, NeckBackbone, build_backbone

DETECTOR_NAMES = [*(registered.name.lower() for registered in DETECTORS.values()), "faster_rcnn"]


class HeadOf(torch.nn.Module):
    """Our head in the form that Detectron2's detectors ask for."""

    def __init__(self, head):
        super().__init__()
        self.head = [head]

    def forward(self, features):
        return tuple(output for output in self.head[0](features) if output is not None)


def batch(seed, dtype=torch.float32):
    """Two images of other sizes with up to seven objects each, as Detectron2's models take them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in ((128, 160), (97, 130)):
        count = int(torch.randint(0, 8, (1,), generator=generator))
        size = torch.tensor([width, height])
        low = 0.7 * torch.rand(count, 2, generator=generator) * size
        high = low + (0.02 + 0.28 * torch.rand(count, 2, generator=generator)) * size
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([low, high], dim=1)))
        instances.gt_classes = torch.randint(0, 2, (count,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": 2 * height, "width": 2 * width})
    return inputs


def losses_of(model, inputs):
    torch.manual_seed(0)  # Faster R-CNN samples its proposals
    with EventStorage():
        return model.train()(inputs)


def detections_of(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def randomize(head):
    """Far from the start, where the deltas are near 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def detectron2s(name, model, cfg):
    """Detectron2's own detector on the backbone and the head of ours."""
    if name == "fcos":
        return FCOS(
            backbone=model.backbone,
            head=HeadOf(model.detector.head),
            head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
            num_classes=2,
            test_score_thresh=cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CONVS = 1  # Detectron2's head, which is replaced, needs one
    plain = build_model(cfg)
    plain.backbone, plain.head = model.backbone, HeadOf(model.detector.head)
    return plain


@pytest.mark.parametrize("convs", [0, 2])
@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_losses_gradients_and_detections_are_those_of_detectron2(tiny_cfg, name, convs):
    node = f"MODEL.{name.upper()}"
    cfg = tiny_cfg(name, {f"{node}.SCORE_THRESH_TEST": 0.01, f"{node}.NUM_CONVS": convs, "MODEL.FPN.OUT_CHANNELS": 64})
    model = build_model(cfg)
    randomize(model.detector.head)
    plain = detectron2s(name, model, cfg)
    for seed in range(3):  # the normalizer moves on, in both
        inputs = batch(seed)
        gradients = []
        losses = []
        for each in (model, plain):
            losses.append(losses_of(each, inputs))
            model.zero_grad()
            sum(losses[-1].values()).backward()
            gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert set(losses[0]) == set(losses[1])
        for key, loss in losses[0].items():
            torch.testing.assert_close(loss, losses[1][key], rtol=1e-5, atol=1e-7)
        for key, gradient in gradients[0].items():
            if key in gradients[1]:
                scale = float(gradients[1][key].abs().max())
                torch.testing.assert_close(gradient, gradients[1][key], rtol=0, atol=1e-2 * scale + 1e-6)
        for got, want in zip(detections_of(model, inputs), detections_of(plain, inputs), strict=True):
            assert len(got) > 0
            torch.testing.assert_close(got.pred_boxes.tensor, want.pred_boxes.tensor)
            torch.testing.assert_close(got.scores, want.scores)
            assert torch.equal(got.pred_classes, want.pred_classes)


def test_each_registered_detector_is_a_class_of_its_own(tiny_cfg):
    for name, registered in DETECTORS.items():
        cls = getattr(dyhead.detectron2, name)
        assert cls.__name__ == name
        assert cls.registered is registered
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert type(build_model(tiny_cfg(registered.name.lower()))) is cls


def test_config_reaches_the_detector(tiny_cfg):
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
    detector = model.detector
    assert detector.in_features == ("p4", "p5")
    assert detector.assigner.center_sampling_radius == 2.5
    assert (detector.class_loss.alpha, detector.class_loss.gamma) == (0.5, 3.0)
    torch.testing.assert_close(detector.head.logits.bias.sigmoid(), torch.tensor([0.25, 0.25]))
    inference = detector.inference
    assert (inference.score_thresh, inference.topk, inference.nms_thresh, inference.limit) == (0.125, 77, 0.375, 33)
    torch.testing.assert_close(model.pixel_mean.flatten(), torch.tensor([123.675, 116.28, 103.53]))


def test_config_reaches_retinanets_head(tiny_cfg):
    settings = {"MODEL.RETINANET.PRIOR_PROB": 0.25, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0, 2.0]]}
    model = build_model(tiny_cfg("retinanet", settings))
    # 3 sizes by 2 ratios, 2 classes
    torch.testing.assert_close(model.detector.head.logits.bias.sigmoid(), torch.full((12,), 0.25))
    assert model.detector.head.deltas.out_channels == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL.FCOS.IN_FEATURES": ["p2"]}, r"MODEL.FCOS.IN_FEATURES: expected some of the levels p3, .* got p2"),
        ({"MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator"}, "ANCHOR_GENERATOR.NAME: expected"),
        ({"MODEL.FCOS.SCORE": "cube"}, "MODEL.FCOS.SCORE: expected one of"),
    ],
)
def test_what_cannot_be_built_names_its_key(tiny_cfg, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_cfg("fcos", settings))


def test_keyword_constructors_serve_lazy_configs(inputs):
    stages = LazyCall(ResNet.make_default_stages)(depth=18, norm="GN")
    resnet = LazyCall(ResNet)(stem=LazyCall(BasicStem)(norm="GN"), stages=stages, out_features=["res3", "res4", "res5"])
    fpn = LazyCall(FPN)(
        bottom_up=resnet,
        in_features=["res3", "res4", "res5"],
        out_channels=32,
        top_block=LazyCall(LastLevelP6P7)(in_channels=32, out_channels=32, in_feature="p5"),
    )
    lazy = LazyCall(dyhead.detectron2.DyHeadFCOS)(
        backbone=LazyCall(DyHeadBackbone)(backbone=fpn, num_blocks=1),
        detector=LazyCall(FCOSOptions(num_classes=2).build)(channels=32, strides=[8, 16, 32, 64, 128]),
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[255.0, 255.0, 255.0],
    )
    losses = losses_of(instantiate(lazy), inputs)
    assert torch.isfinite(sum(losses.values()))


@pytest.mark.parametrize(("detector", "shape"), [("fcos", (3, 128, 96)), ("faster_rcnn", (3, 64, 192))])
def test_training_images_are_drawn_into_the_event_storage(tiny_cfg, inputs, detector, shape):
    pytest.importorskip("cv2", reason="OpenCV, which Detectron2's visualizer needs, is not installed")
    model = build_model(tiny_cfg(detector, {"VIS_PERIOD": 1, "MODEL.FCOS.SCORE_THRESH_TEST": 0.001})).train()
    with EventStorage() as storage:
        model(inputs)
        ((name, image, _),) = storage._vis_data
    assert "bounding boxes" in name
    assert image.shape == shape  # two images, one above or beside the other


@pytest.mark.parametrize("detector", DETECTOR_NAMES)
def test_the_full_configs_build(configs, inputs, detector):
    for neck in ("_dyhead", ""):
        cfg = add_dyhead_config(get_cfg())
        load_config(cfg, configs / f"{detector}{neck}_R50.yaml", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
        backbone = build_backbone(cfg)
        assert isinstance(backbone, NeckBackbone)
        assert len(backbone.dyhead.blocks if neck else ()) == (6 if neck else 0)
        assert {shape.channels for shape in backbone.output_shape().values()} == {256}
    cfg.MODEL.NECKS, cfg.MODEL.DYHEAD.NUM_BLOCKS = ["DyHead"], 1
    assert len(detections_of(build_model(cfg), inputs)) == 2


def test_torchscript_says_what_takes_a_one_stage_detector(tiny_cfg):
    model = build_model(tiny_cfg("fcos")).eval()
    with pytest.raises(RuntimeError, match="got DyHeadFCOS, which detectron2.export.TracingAdapter .* take"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_detector_finds_more_and_fewer_objects_than_when_it_was_traced(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(
        tiny_cfg("fcos", {"MODEL.FCOS.SCORE_THRESH_TEST": 0.0, "TEST.DETECTIONS_PER_IMAGE": 10**6})
    ).eval()
    # Scores grow with the picture: a threshold in between leaves none of a dark one.
    pictures = [torch.full((3, 64, 96), value, dtype=torch.float32) for value in (0.0, 90.0, 255.0)]
    with torch.no_grad():
        scores = torch.cat([model([{"image": picture}])[0]["instances"].scores for picture in pictures])
    model.detector.inference = dataclasses.replace(model.detector.inference, score_thresh=scores.median().item())
    with torch.no_grad():
        expected = [model([{"image": picture}])[0]["instances"] for picture in pictures]
        assert len({len(found) for found in expected}) > 1
        for example in pictures:
            adapter = TracingAdapter(model, [{"image": example}])
            traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
            for picture, want in zip(pictures, expected, strict=True):
                found = adapter.outputs_schema(traced(picture))[0]["instances"]
                torch.testing.assert_close(found.scores, want.scores)
                torch.testing.assert_close(found.pred_boxes.tensor, want.pred_boxes.tensor)
