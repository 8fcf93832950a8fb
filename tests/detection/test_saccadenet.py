from pathlib import Path

import pytest
import torch

from dyhead.config import ConfigError, check_config, load_config
from dyhead.detection import Predictions
from dyhead.detection.saccadenet import SaccadeNetOptions
from dyhead.torchvision import build_model, get_cfg

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
SHAPE = (3, 5)


def build(**options):
    return SaccadeNetOptions(num_classes=2, head_channels=4, **options).build(4, [4], detections_per_image=4)


def predict(**cells):
    """Logits of -9 and boxes of 2 x 2 cells but for these cells: scores' logits, a label and the numbers."""
    logits = torch.full((1, *SHAPE, 2), -9.0, dtype=torch.float64)
    numbers = torch.tensor([0.5, 0.5, 9, 9, 2, 2, 0, 0, 0, 0], dtype=torch.float64).repeat(1, *SHAPE, 1)
    for (y, x), label, logit, *more in cells.values():
        logits[0, y, x, label] = logit
        if more:
            numbers[0, y, x, :6] = torch.tensor(more)
    return Predictions(logits.flatten(1, 2), numbers.flatten(1, 2), None, [SHAPE])


def test_detections_by_hand():
    detector = build(score_thresh_test=0.1)
    predictions = predict(
        a=((1, 2), 0, 3.0, 0.25, 0.5, 9, 9, 2, 1),  # at (9, 6) of 8 x 4
        beside=((1, 3), 0, 2.0),  # no peak, if of the same class
        other=((1, 1), 1, 1.0, 0.5, 0.5, 9, 9, 1, 1),  # at (6, 6) of 4 x 4
        border=((2, 4), 1, 4.0, 0.5, 0.5, 9, 9, 2, 2),  # at (18, 10) of 8 x 8, cut at 20 and 12
        turned=((0, 0), 0, 5.0, 0.5, 0.5, 9, 9, -1, 1),  # left is right of right
    )
    (found,) = detector.detections(predictions, [(12, 20)])
    assert found.boxes.tolist() == [[14, 6, 20, 12], [5, 4, 13, 8], [4, 4, 8, 8]]
    assert found.labels.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([4.0, 3, 1], dtype=torch.float64).sigmoid())


def test_the_best_of_all_classes_and_none_for_its_overlap():
    cells = {f"{label} {x}": ((1, x), label, 3.0 - x - label / 2) for label in (0, 1) for x in (0, 2, 4)}
    for peaks, want in ((3, [3, 2.5, 1, 0.5]), (1, [3, 2.5, 1, 0.5])):
        (found,) = build(peak_kernel=peaks).detections(predict(**cells), [(12, 20)])
        torch.testing.assert_close(found.scores, torch.tensor(want, dtype=torch.float64).sigmoid())
    same = {"a": ((1, 1), 0, 3.0, 1.5, 0.5, 9, 9, 2, 2), "b": ((1, 3), 0, 2.0, -0.5, 0.5, 9, 9, 2, 2)}
    for nms, count in ((1.0, 2), (0.9, 1)):
        (found,) = build(nms_thresh_test=nms, score_thresh_test=0.1).detections(predict(**same), [(12, 20)])
        assert found.boxes.tolist() == [[6, 2, 14, 10]] * count


@pytest.mark.parametrize("strides", [(), (4, 8)])
def test_it_has_one_level(strides):
    with pytest.raises(ValueError, match=f"IN_FEATURES: expected exactly one level, got {len(strides)}"):
        SaccadeNetOptions().build(4, strides)
    levels = [f"p{i + 2}" for i in range(len(strides))]
    cfg = get_cfg()
    load_config(cfg, CONFIGS / "saccadenet_R18_shapes.yaml", ["MODEL.SACCADENET.IN_FEATURES", str(levels)])
    with pytest.raises(ConfigError, match="MODEL.SACCADENET.IN_FEATURES: expected .*exactly one level, got"):
        check_config(cfg)


@pytest.mark.parametrize("level", ["p3", "p6"])
def test_any_level_of_the_pyramid_will_do(level):
    cfg = get_cfg()
    options = ["MODEL.DEVICE", "cpu", "MODEL.SACCADENET.IN_FEATURES", f"['{level}']", "MODEL.DYHEAD.NUM_BLOCKS", "1"]
    load_config(cfg, CONFIGS / "saccadenet_dyhead_R18_shapes.yaml", options)
    model = build_model(cfg)
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)]
    targets = [{"boxes": torch.tensor([[4.0, 8, 40, 60]]), "labels": torch.tensor([1])}]
    sum(model(images, targets).values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    stride = 2 ** int(level[1])
    assert model.detector.anchors.strides == (stride,)
    where = model.detector(model.backbone(model.transform(images)[0].tensors)).shapes
    assert where == [(-(-64 // stride), -(-96 // stride))]


def test_options_reach_the_head():
    head = build(aggregation="corners", size_gradient=0.5, refine_center=True, predictor_kernel=3, prior_prob=0.2).head
    assert head.aggregation.offset.weight.shape == (2 + 5, 4, 3, 3)
    assert head.aggregation.predictor.weight.shape == (4, 4, 1, 1)
    assert head.aggregation.size_gradient == 0.5
    assert {tuple(layer.weight.shape[1:]) for layer in (head.logits, head.deltas, head.centers)} == {(4, 3, 3)}
    torch.testing.assert_close(head.logits.bias.sigmoid(), torch.full((2,), 0.2))
    published = build(aggregation="corners_as_published").head.aggregation.positions
    assert published[8].flatten().tolist() == [0, 1]
