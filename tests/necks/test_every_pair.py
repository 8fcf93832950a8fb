"""Every neck before every dense detector, and necks before each other: a step in plain tensors."""

import pytest
import torch

from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.necks import NECKS, Stack
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
    "DyHead, SEPC": [("DyHead", {"num_blocks": 1}), ("SEPC", {"num_blocks": 1})],
    "SEPC, DyHead": [("SEPC", {"num_blocks": 1, "task_convs": "none"}), ("DyHead", {"num_blocks": 1})],
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", DETECTORS)
def test_a_step_reaches_every_parameter(name, stack):
    torch.manual_seed(0)
    options = {neck: NECKS[neck].options(**changed) for neck, changed in STACKS[stack]}
    necks = Stack({neck.lower(): option.build(CHANNELS) for neck, option in options.items()})
    levels = levels_of(name, STRIDES)
    detector = DETECTORS[name].options(num_classes=3, in_features=levels, score_thresh_test=0.0)
    detector = detector.build(
        CHANNELS, [STRIDES[level] for level in levels], anchors=AnchorOptions(((32.0,),), ((1.0,),), 0.5)
    )
    splits = any(getattr(option, "task_levels", False) for option in options.values())
    if splits and not getattr(detector.head, "takes_task_levels", False):
        pytest.skip("refused by dyhead.build")
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
