"""The graph in fixed shapes finds what the engines' detectors find."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError, load_config
from dyhead.detection import DETECTORS
from dyhead.export import OUTPUTS, DetectorGraph
from dyhead.export.graph import select_boxes
from dyhead.torchvision import build_model, get_cfg
from tests.export.comparison import assert_same_detections

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
SMALL = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.DYHEAD.NUM_BLOCKS", "1"]
NAMES = [detector.name.lower() for detector in DETECTORS.values() if detector.name != "PairedBox"]


def configured(name, *opts):
    cfg = get_cfg()
    load_config(cfg, CONFIGS / f"{name}_R18_shapes.yaml", [*SMALL, *opts])
    return cfg


def liven(model):
    """Random weights that detect something, most of it below other scores."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith(("head.logits", "border_logits", "head.heatmap")) and isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.constant_(module.bias, -3.0)
    return model.eval()


@pytest.fixture(scope="module")
def pictures():
    return 255 * torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_dense_detector_finds_the_same(name, pictures):
    torch.manual_seed(0)
    model = liven(build_model(configured(f"{name}_dyhead")))
    with torch.no_grad():
        expected = model(list(pictures))
        assert sum(len(each["boxes"]) for each in expected) > 10
        for onnx in (False, True):
            assert_same_detections(DetectorGraph(model, onnx=onnx)(pictures), expected)


def test_what_is_no_number_is_nothing(model, images):
    """Scores of one image are NaN, and so are boxes whose scores are not."""
    batch = images(2, 48, 64)
    batch[0, :, :20, :20] = torch.nan

    def spoil(module, inputs, numbers):
        numbers[:, 0, 0] = torch.nan
        return numbers

    model.detector.head.deltas.register_forward_hook(spoil)
    with torch.no_grad():
        expected = model(list(batch))
        assert 0 < len(expected[1]["boxes"])
        assert_same_detections(DetectorGraph(model)(batch), expected)


@pytest.mark.parametrize(
    "inference",
    [{"clip_before_nms": True}, {"nms_thresh": 1.0}, {"topk": 3}, {"limit": 2000}, {"score_thresh": 0.999}],
    ids=str,
)
def test_options_of_inference_count(inference, model, images):
    detector = model.detector
    detector.inference = type(detector.inference)(**{"limit": 20, **inference})
    batch = images(2, 48, 64)
    with torch.no_grad():
        expected = model(list(batch))
        for onnx in (False, True):
            assert_same_detections(DetectorGraph(model, onnx=onnx)(batch), expected)


def test_boxes_and_scores_of_all_places_hold_what_is_detected(model, images):
    batch = images(2, 48, 64)
    with torch.no_grad():
        expected = model(list(batch))
        boxes, scores = DetectorGraph(model, "boxes")(batch)
    assert boxes.shape == (2, 6 * 8 + 3 * 4, 4)
    assert scores.shape == (2, 6 * 8 + 3 * 4, 3)
    limits = torch.tensor([64.0, 48.0, 64.0, 48.0])
    for i, found in enumerate(expected):
        for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
            place = (scores[i, :, label] - score).abs().argmin()
            assert scores[i, place, label] == score
            assert torch.equal(boxes[i, place].clamp(min=0).minimum(limits), box)


def test_levels_are_those_of_the_pyramid(model, images):
    batch = images(1, 48, 64)
    graph = DetectorGraph(model, "levels")
    assert graph.names == ("p3", "p4")
    with torch.no_grad():
        pyramid = model.backbone(model.transform(list(batch))[0].tensors)
        for name, level in zip(graph.names, graph(batch), strict=True):
            torch.testing.assert_close(level, pyramid[name])


@pytest.mark.parametrize("name", ["faster_rcnn_dyhead", "pairedbox_dyhead"])
def test_of_two_stage_detectors_only_levels_are_exported(name, pictures):
    model = build_model(configured(name)).eval()
    for output in ("detections", "boxes"):
        with pytest.raises(ConfigError, match=f"only detectors of one stage have the output '{output}'"):
            DetectorGraph(model, output)
    graph = DetectorGraph(model, "levels")
    assert [level.shape[1] for level in graph(pictures)] == [32] * len(graph.names)


def test_another_output_is_refused(model):
    with pytest.raises(ConfigError, match=f"output: expected one of {', '.join(OUTPUTS)}, got 'masks'"):
        DetectorGraph(model, "masks")


def test_selected_boxes_are_those_of_onnx():
    """By hand: of class 0 the second box overlaps the first, the third scores 0; class 1 has its own order."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10]]])
    scores = torch.tensor([[[0.9, 0.8, 0.0], [0.1, 0.2, 0.3]]])
    assert select_boxes(boxes, scores, 5, 0.5).tolist() == [[0, 0, 0], [0, 1, 2], [0, 1, 1]]
    assert select_boxes(boxes, scores, 1, 0.5).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert select_boxes(boxes, -scores, 5, 0.5).shape == (0, 3)


@pytest.mark.detectron2
def test_detectron2s_detectors_find_the_same(pictures):
    pytest.importorskip("detectron2", reason="needs Detectron2")
    from detectron2.config import get_cfg as get_detectron2_cfg

    from dyhead.config import add_dyhead_config
    from dyhead.detectron2.trainer import Trainer

    cfg = add_dyhead_config(get_detectron2_cfg())
    load_config(cfg, CONFIGS / "atss_dyhead_R18_shapes.yaml", [*SMALL, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = liven(Trainer.build_model(cfg))
    with torch.no_grad():
        found = [each["instances"] for each in model([{"image": image} for image in pictures])]
        outputs = DetectorGraph(model)(pictures)
    expected = [{"boxes": x.pred_boxes.tensor, "scores": x.scores, "labels": x.pred_classes} for x in found]
    assert sum(map(len, found)) > 10
    assert_same_detections(outputs, expected)
    graph = DetectorGraph(model, "levels")
    assert graph.names == ("p3", "p4", "p5", "p6", "p7")
    assert graph.coarsest_stride == 128
