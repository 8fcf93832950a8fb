"""Every dense detector with every neck, with necks in a row, and with every loss: a step in plain tensors."""

import pytest
import torch

from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.detection.losses import CLASS_LOSSES
from dyhead.necks import NECKS, Stack
from dyhead.options import leaves, read
from tests.detection.objects import levels_of

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
CHANNELS = 32
# By name what a stack of necks is made of.
STACKS = {
    "none": [],
    "DyHead": [("DyHead", {"num_blocks": 1})],
    "released DyHead": [("DyHead", {"num_blocks": 1, "block": "released"})],
    **{
        f"SEPC {conv} {task_convs}": [("SEPC", {"num_blocks": 1, "conv": conv, "task_convs": task_convs})]
        for conv in ("plain", "deformable", "sampled")
        for task_convs in ("none", "plain", "deformable")
    },
    "PConv": [("SEPC", {"num_blocks": 1, "conv": "plain", "task_convs": "plain", "norm": ""})],
    "SEPC as published": [("SEPC", {"num_blocks": 1, "task_padding": 0})],
    "FPT": [("FPT", {})],
    "FPT softmax, DyHead": [("FPT", {"similarity": "softmax"}), ("DyHead", {"num_blocks": 1})],
    "FPT distance": [("FPT", {"similarity": "distance", "parts": 1})],
    "DyHead, SEPC": [("DyHead", {"num_blocks": 1}), ("SEPC", {"num_blocks": 1})],
    "SEPC, DyHead": [("SEPC", {"num_blocks": 1, "task_convs": "none"}), ("DyHead", {"num_blocks": 1})],
}


BOX_LOSSES = ("smooth_l1", *OVERLAP_LOSSES)


def legal(name, key, values):
    """Those of the values that the detector's key takes; none where it has no such key."""
    found = [leaf for leaf in leaves(DETECTORS[name].options) if leaf.key == key]
    return [value for leaf in found for value in values if leaf.expected(value) is None]


# By detector, one of its class losses or one of its box losses, for those whose parts are its own choice.
LOSSES = [
    (name, key, value)
    for name in DETECTORS
    for key, values in (("CLASS_LOSS", CLASS_LOSSES), ("BBOX_REG_LOSS_TYPE", BOX_LOSSES))
    for value in legal(name, key, values)
]


def build(name, **changed):
    """A tiny detector with some keys of its node changed."""
    options = DETECTORS[name].options
    levels = levels_of(name, STRIDES)
    values = {leaf.key: leaf.default for leaf in leaves(options)}
    values |= {"NUM_CLASSES": 3, "IN_FEATURES": levels, "SCORE_THRESH_TEST": 0.0, **changed}
    anchors = AnchorOptions(((32.0,),), ((1.0,),), 0.5)
    return read(options, values.__getitem__).build(CHANNELS, [STRIDES[level] for level in levels], anchors=anchors)


def assert_a_step_reaches_every_parameter(necks, detector):
    for parameter in (*necks.parameters(), *detector.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)  # offsets start at 0
    pyramid = {level: torch.randn(2, CHANNELS, 96 // s, 160 // s, requires_grad=True) for level, s in STRIDES.items()}
    predictions = detector(necks(pyramid))
    targets = [
        Targets(torch.tensor([[4.0, 4, 40, 44], [60, 10, 150, 90]]), torch.tensor([2, 0])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    losses = detector.losses(predictions, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    named = {**dict(necks.named_parameters()), **dict(detector.named_parameters()), **pyramid}
    assert [key for key, x in named.items() if x.grad is None or not x.grad.isfinite().all()] == []
    found = detector.detections(predictions, [(96, 160), (96, 160)])
    assert len(found) == 2
    assert all(each.boxes.isfinite().all() for each in found)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", DETECTORS)
def test_necks(name, stack):
    torch.manual_seed(0)
    options = {neck: NECKS[neck].options(**changed) for neck, changed in STACKS[stack]}
    necks = Stack({neck.lower(): option.build(CHANNELS, len(STRIDES)) for neck, option in options.items()})
    detector = build(name)
    splits = any(getattr(option, "task_levels", False) for option in options.values())
    if splits and not getattr(detector.head, "takes_task_levels", False):
        pytest.skip("refused by dyhead.build")
    assert_a_step_reaches_every_parameter(necks, detector)


@pytest.mark.parametrize(("name", "key", "value"), LOSSES)
def test_losses(name, key, value):
    torch.manual_seed(0)
    detector = build(name, **{key: value})
    if key == "CLASS_LOSS":
        assert type(detector.class_loss) is CLASS_LOSSES[value]
    assert_a_step_reaches_every_parameter(Stack({}), detector)


def test_the_pairs_are_those_of_the_documents():
    names = [(DETECTORS[name].name, value) for name, _, value in LOSSES]
    assert {("FCOS", "ap"), ("RepPoints", "dr"), ("ATSS", "smooth_l1"), ("GFL", "ciou")} <= set(names)
    assert not {("GFL", "ap"), ("AutoAssign", "focal"), ("FCOS", "smooth_l1"), ("RepPoints", "giou")} & set(names)
