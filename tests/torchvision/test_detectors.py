"""The detectors and their parts."""

import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from dyhead.detection import DETECTORS as REGISTERED
from dyhead.detection import Anchors
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.layers import DyHead, ReleasedDyHeadBlock
from dyhead.torchvision import build_model
from dyhead.torchvision.anchors import PyramidAnchors
from dyhead.torchvision.dense import DenseModel
from dyhead.torchvision.rcnn import FasterRCNN
from dyhead.torchvision.rcnn.boxes import BoxPredictor

DETECTORS = [*(detector.name.lower() for detector in REGISTERED.values()), "faster_rcnn"]
TWO_STAGE_LOSSES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch():
    """Two pictures of different sizes, the second without objects."""
    images = [
        torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8),
        torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8),
    ]
    for i, (x0, y0, x1, y1) in enumerate(((4, 8, 40, 30), (30, 20, 70, 60))):
        images[0][:, y0:y1, x0:x1] = torch.tensor([[220, 40, 40], [40, 40, 220]][i], dtype=torch.uint8)[:, None, None]
    full = {"boxes": torch.tensor([[4.0, 8, 40, 30], [30, 20, 70, 60]]), "labels": torch.tensor([0, 2])}
    return images, [full, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_are_finite_and_reach_every_parameter(tiny, configured, detector):
    model = build_model(configured(tiny, detector))
    assert isinstance(model, FasterRCNN if detector == "faster_rcnn" else DenseModel)
    losses = model(*batch())
    if detector == "faster_rcnn":
        assert set(losses) == TWO_STAGE_LOSSES
    else:
        assert set(losses) == set(model.detector.loss_names)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects_only_train_the_background(tiny, configured, detector):
    model = build_model(configured(tiny, detector))
    images, targets = batch()
    losses = model(images[1:], targets[1:])
    assert all(loss.isfinite() for loss in losses.values())
    assert sum(losses.values()) > 0
    boxes = [loss for name, loss in losses.items() if "box" in name or "loc" in name or "ctr" in name]
    assert all(loss == 0 for loss in boxes)
    sum(losses.values()).backward()


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_step_lowers_the_loss_of_its_batch(tiny, configured, detector):
    # A moving normalizer is another one for the second loss.
    fixed = {f"MODEL.{name}.LOSS_NORMALIZER": "positives" for name in ("FCOS", "NOISYANCHORS", "RETINANET")}
    # Where GFL's weights add up to less than 1, box losses grow with the classes' probabilities.
    fixed["MODEL.GFL.PRIOR_PROB"] = 0.5
    model = build_model(configured(tiny | fixed, detector))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss():
        torch.manual_seed(1)  # the samples of proposals
        return sum(model(*batch()).values())

    before = loss()
    before.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(("detector", "levels"), [("fcos", (3, 4, 5, 6, 7)), ("faster_rcnn", (2, 3, 4, 5, 6))])
@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_the_pyramid_has_the_strides_of_its_names(tiny, configured, detector, levels, size):
    pyramid = build_model(configured(tiny, detector)).backbone
    assert pyramid.strides == {f"p{n}": 2**n for n in levels}
    out = pyramid(torch.zeros(2, 3, *size))
    assert {name: tuple(level.shape) for name, level in out.items()} == {
        f"p{n}": (2, 32, *(math.ceil(side / 2**n) for side in size)) for n in levels
    }


@pytest.mark.parametrize(("source", "channels"), [("p5", 32), ("res5", 512)])
def test_the_top_levels_come_from_the_configured_level(tiny, configured, source, channels):
    pyramid = build_model(configured(tiny | {"MODEL.FPN.P6P7_IN_FEATURE": source})).backbone
    assert pyramid.fpn.extra_blocks.p6.in_channels == channels
    pyramid(torch.zeros(1, 3, 64, 64))


def test_dyhead_is_built_as_configured(tiny, configured):
    def head(**options):
        return build_model(configured(tiny | {f"MODEL.DYHEAD.{k}": v for k, v in options.items()})).backbone.dyhead

    assert len(head(NUM_BLOCKS=0).blocks) == 0
    assert len(head(NUM_BLOCKS=3).blocks) == 3
    assert isinstance(head(BLOCK="released").blocks[0], ReleasedDyHeadBlock)
    plain = head(SCALE_AWARE=False, TASK_AWARE=False, OFFSET_GROUPS=2, NORM_GROUPS=4, WINDOW=None)
    expected = DyHead(32, 1, scale_aware=False, task_aware=False, offset_groups=2, norm_groups=4, window=None)
    assert repr(plain) == repr(expected)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", "SyncBN"])
def test_stages_up_to_freeze_at_do_not_change(tiny, configured, norm):
    options = {"MODEL.RESNETS.NORM": norm, "MODEL.BACKBONE.FREEZE_AT": 2, "SOLVER.BASE_LR": 0.1}
    model = build_model(configured(tiny | options))
    body = model.backbone.body
    frozen = [body.conv1, body.bn1, body.layer1]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in (*frozen, body.layer2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(*batch()).values()).backward()
    optimizer.step()
    changed = [
        any(not torch.equal(v, part.state_dict()[k]) for k, v in state.items())
        for part, state in zip((*frozen, body.layer2), before, strict=True)
    ]
    assert changed == [False, False, False, True]
    if norm == "FrozenBN":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("in_1x1", [True, False])
def test_bottlenecks_stride_where_configured(tiny, configured, in_1x1):
    options = {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.STRIDE_IN_1X1": in_1x1,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    }
    pyramid = build_model(configured(tiny | options)).backbone
    block = pyramid.body.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if in_1x1 else ((1, 1), (2, 2)))
    assert block.conv2.groups == 32
    assert pyramid(torch.zeros(1, 3, 64, 64))["p3"].shape[-2:] == (8, 8)


def test_anchors_stand_at_the_strides_whatever_the_padding():
    """64 pixels and a level of stride 128: torchvision's generator would take a stride of 64."""
    anchors = PyramidAnchors(Anchors([[10.5], [40]], [[0.25, 1.0]], [32, 128], offset=0.5))
    picture = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    (found,) = anchors(picture, [torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 1)])
    centres = (found[:, :2] + found[:, 2:]) / 2
    assert centres.tolist() == [[x, y] for y in (16, 48) for x in (16, 48) for _ in range(2)] + [[64, 64]] * 2
    sides = found[:, 2:] - found[:, :2]
    assert sides.tolist() == [[21, 5.25], [10.5, 10.5]] * 4 + [[80, 20], [40, 40]]
    assert found.dtype == torch.float32


@pytest.mark.detectron2
def test_anchors_are_those_of_detectron2():
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    sizes, ratios, strides = [[32, 40.32], [64, 80.63]], [[0.5, 1.0, 2.0]], [8, 16]
    levels = [torch.zeros(1, 1, 6, 9), torch.zeros(1, 1, 3, 5)]
    theirs = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=strides, offset=0.25)(levels)
    (ours,) = PyramidAnchors(Anchors(sizes, ratios, strides, 0.25))(ImageList(None, [(48, 72)]), levels)
    assert torch.allclose(ours, torch.cat([boxes.tensor for boxes in theirs]))


@pytest.mark.parametrize("aligned", [True, False])
def test_regions_are_pooled_from_the_level_of_their_size(aligned):
    strides = {"p2": 4, "p3": 8, "p4": 16}
    levels = {name: torch.randn(2, 5, 512 // s, 512 // s) for name, s in strides.items()}
    boxes = [
        torch.tensor([[8.0, 8, 100, 90], [0, 0, 300, 260]]),
        torch.tensor([[10.0, 20, 160, 180], [0, 0, 511, 511]]),
    ]
    pooled = PyramidPool(strides, 3, 2, aligned)(levels, boxes, [(512, 512)] * 2)
    # floor(4 + log2(sqrt(area) / 224)): 86.9 pixels -> 2, 279.3 -> 4, 154.9 -> 3, 511 -> 5, which is not there
    for i, (image, box, name) in enumerate(((0, 0, "p2"), (0, 1, "p4"), (1, 0, "p3"), (1, 1, "p4"))):
        region = [boxes[image][box : box + 1]]
        expected = roi_align(levels[name][image : image + 1], region, 3, 1 / strides[name], 2, aligned)
        assert torch.equal(pooled[i : i + 1], expected)
    assert PyramidPool(strides, 3, 0, aligned)(levels, [torch.zeros(0, 4)] * 2, []).shape == (0, 5, 3, 3)


def test_images_are_normalised_in_the_configured_units_and_padded(tiny, configured):
    options = {"MODEL.PIXEL_MEAN": [10.0, 20.0, 30.0], "MODEL.PIXEL_STD": [2.0, 4.0, 5.0]}
    transform = build_model(configured(tiny | options)).transform
    picture = torch.tensor([12, 28, 40], dtype=torch.uint8)[:, None, None].expand(3, 33, 20)
    images, _ = transform([picture, picture[:, :5, :5]])
    assert images.tensors.shape == (2, 3, 64, 32)
    assert images.image_sizes == [(33, 20), (5, 5)]
    assert images.tensors[0, :, 32, 19].tolist() == [1, 2, 2]
    assert images.tensors[1, :, 5:].abs().max() == 0


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_autocast_gives_losses_close_to_float32(tiny, configured, detector):
    fixed = {f"MODEL.{name}.LOSS_NORMALIZER": "positives" for name in ("FCOS", "NOISYANCHORS", "RETINANET")}
    model = build_model(configured(tiny | fixed, detector))
    with torch.no_grad():
        full = model(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*batch())
    assert all(loss.dtype == torch.float32 for loss in half.values())
    # The sum: the parts of few boxes vary more, and in R-CNN other proposals come through. So they do in PairedBox,
    # and RepPoints assigns places by the first boxes, of which some are then others.
    tolerance = 0.2 if detector in ("reppoints", "pairedbox") else 0.1
    assert sum(half.values()).item() == pytest.approx(sum(full.values()).item(), rel=tolerance)
    sum(half.values()).backward()


def test_small_images_give_sound_gradients_in_bfloat16(tiny, configured):
    """P6 of 64 pixels is one pixel; a strided convolution on it in bfloat16 has gradients of anything."""
    model = build_model(configured(tiny))
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)]
    targets = [{"boxes": torch.tensor([[4.0, 8, 40, 30]]), "labels": torch.tensor([1])}]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        garbage = [torch.full((32 * 32 * 9 + i,), torch.inf, dtype=dtype) for i in range(100)]
        model.zero_grad()
        del garbage  # where the next tensors are put
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            sum(model(images, targets).values()).backward()
        gradients.append(model.backbone.fpn.extra_blocks.p7.weight.grad.clone())
    full, half = gradients
    padding = (full == 0).all(dim=1).all(dim=0)  # the taps that see nothing else
    assert padding.sum() == 8
    assert (half[:, :, padding] == 0).all()
    assert half.isfinite().all()


def test_labels_of_faster_rcnn_start_at_0_outside_and_at_1_behind_its_background_class(tiny, configured, monkeypatch):
    model = build_model(configured(tiny, "faster_rcnn"))
    heads, seen = model.roi_heads.forward, []

    def spy(features, proposals, image_shapes, targets=None):
        seen.append(targets)
        losses_or_none = heads(features, proposals, image_shapes, targets)
        found = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.ones(1), "labels": torch.tensor([3])}
        return losses_or_none if model.training else ([found], {})

    monkeypatch.setattr(model.roi_heads, "forward", spy)
    images, targets = batch()
    model(images, targets)
    assert [t["labels"].tolist() for t in seen[0]] == [[1, 3], []]
    assert targets[0]["labels"].tolist() == [0, 2]  # the caller's stay
    assert model.eval()(images[:1])[0]["labels"].tolist() == [2]


def test_the_box_predictor_puts_the_background_first():
    predictor = BoxPredictor(5, num_classes=3)
    x = torch.randn(2, 5)
    ((logits, deltas),) = predictor(x)
    assert torch.equal(logits[:, 1:], predictor.cls_score(x)[:, :3])
    assert torch.equal(logits[:, 0], predictor.cls_score(x)[:, 3])
    assert torch.equal(deltas[:, 4:], predictor.bbox_pred(x))
    assert (deltas[:, :4] == 0).all()
