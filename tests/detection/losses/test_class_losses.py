"""What every classification loss keeps to, alone and in every dense detector."""

from pathlib import Path

import pytest
import torch

from dyhead.config import load_config
from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.losses import CLASS_LOSSES, APLoss, DRLoss
from dyhead.options import leaves
from dyhead.torchvision import get_cfg

CONFIGS = Path(__file__).parents[3] / "configs"
#: The detectors that take any of them.
TAKES_ANY = [name for name, entry in DETECTORS.items() if "CLASS_LOSS" in {leaf.key for leaf in leaves(entry.options)}]
STRIDES = {"p3": 8, "p4": 16}
LOSSES = pytest.mark.parametrize("loss", CLASS_LOSSES.values())


def scattered(share=0.2, spread=2.0, places=30, classes=3):
    torch.manual_seed(0)
    return spread * torch.randn(places, classes), (torch.rand(places, classes) < share).float()


@LOSSES
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e3, 1e30])
def test_losses_and_gradients_are_finite(loss, share, spread):
    logits, targets = scattered(share, spread)
    logits.requires_grad_()
    cost = loss()(logits, targets)
    cost.backward()
    assert cost.shape == ()
    assert cost.isfinite()
    assert logits.grad.isfinite().all()


@LOSSES
def test_no_places_have_a_loss_with_a_gradient(loss):
    logits = torch.zeros(0, 3, requires_grad=True)
    cost = loss()(logits, torch.zeros(0, 3))
    cost.backward()
    assert cost.isfinite()
    assert logits.grad.shape == (0, 3)


@LOSSES
def test_a_right_ranking_costs_less_than_a_wrong_one(loss):
    _, targets = scattered()
    right = loss()(8 * targets - 4, targets)
    assert 0 <= right < 0.1 * loss()(4 - 8 * targets, targets)


@LOSSES
def test_a_step_against_the_gradient_lowers_it(loss):
    logits, targets = scattered()
    logits.requires_grad_()
    before = loss()(logits, targets)
    before.backward()
    after = loss()(logits - 0.5 * logits.grad, targets)
    assert after < before


@LOSSES
def test_two_times_give_the_same_bits(loss):
    logits, targets = scattered(places=500)
    grads = []
    for _ in range(2):
        copy = logits.clone().requires_grad_()
        loss()(copy, targets).backward()
        grads.append(copy.grad)
    assert torch.equal(*grads)


# Focal loss is torchvision's, which computes in the precision of its logits; detectors give float32.
@pytest.mark.parametrize("name", sorted(set(CLASS_LOSSES) - {"focal"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    logits, targets = scattered(places=500)
    logits = logits.to(dtype)
    want, got = logits.float().requires_grad_(), logits.clone().requires_grad_()
    expected = CLASS_LOSSES[name]()(want, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cost = CLASS_LOSSES[name]()(got, targets)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, expected)
    cost.backward()
    expected.backward()
    assert torch.equal(got.grad, want.grad.to(dtype))


def detector_with(name, loss):
    torch.manual_seed(0)
    options = DETECTORS[name].options(num_classes=3, in_features=tuple(STRIDES), class_loss=loss)
    anchors = AnchorOptions(((32.0,), (64.0,)), ((1.0,),), 0.5)
    detector = options.build(8, list(STRIDES.values()), anchors=anchors)
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if name == "DyHeadBorderDet":  # first boxes that overlap objects enough to be refined
        torch.nn.init.ones_(detector.head.delta_scale)
        torch.nn.init.constant_(detector.head.deltas.bias, 2.7)
    return detector, detector({level: torch.randn(2, 8, 64 // s, 96 // s) for level, s in STRIDES.items()})


def objects(count):
    boxes = torch.tensor([[4.0, 6.0, 50.0, 44.0], [30.0, 10.0, 90.0, 60.0]])[:count]
    return Targets(boxes, torch.arange(count))


@LOSSES
@pytest.mark.parametrize("counts", [(2, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("name", TAKES_ANY)
def test_every_detector_trains_with_it(name, counts, loss):
    detector, predictions = detector_with(name, loss())
    losses = detector.losses(predictions, [objects(count) for count in counts])
    assert all(cost.isfinite() and cost.shape == () for cost in losses.values())
    sum(losses.values()).backward()
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # Neither AP-Loss without objects nor the factor of a level without one has a gradient, nor has a bias before a
        # norm.
        without = key == "head.delta_scale" or "border.point.bias" in key or "border.sides.bias" in key
        assert parameter.grad.any() or not sum(counts) or without, key


@LOSSES
def test_only_what_is_not_normalized_is_divided_by_the_normalizer(loss):
    detector, predictions = detector_with("DyHeadRetinaNet", loss())
    targets = [objects(2), objects(1)]
    assigned = detector.assign(detector.places(predictions), targets)
    truth = torch.zeros_like(predictions.logits)
    for image, target in enumerate(targets):
        for place, owner in enumerate(assigned[image].tolist()):
            if owner >= 0:
                truth[image, place, target.labels[owner]] = 1
    costs = assigned >= -1
    assert not costs.all()  # some are ignored
    want = loss()(predictions.logits[costs], truth[costs])
    if loss not in (APLoss, DRLoss):
        want = want / (0.9 * 100 + 0.1 * (assigned >= 0).sum())
    torch.testing.assert_close(detector.losses(predictions, targets)["loss_cls"], want)


@pytest.mark.parametrize("file", ["retinanet{}_R50", "quickstart/retinanet{}_R18_shapes"])
@pytest.mark.parametrize("neck", ["", "_dyhead"])
@pytest.mark.parametrize("name", sorted(set(CLASS_LOSSES) - {"focal"}))
def test_each_has_its_retinanet(name, neck, file):
    cfg = get_cfg()
    load_config(cfg, CONFIGS / f"{file.format(f'_{name}{neck}')}.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "DyHeadRetinaNet"
    assert cfg.MODEL.RETINANET.CLASS_LOSS == name
    assert cfg.MODEL.NECKS == (["DyHead"] if neck else [])
    assert f"_{name}{neck}_" in cfg.OUTPUT_DIR


def test_names():
    assert {"focal", "ap", "dr"} <= set(CLASS_LOSSES)
    assert {"DyHeadFCOS", "DyHeadRetinaNet", "DyHeadATSS"} <= set(TAKES_ANY)
