"""A process of several that train together; started anew, it imports this module."""

import torch
from torch import distributed, nn

from dyhead.detection import Targets
from dyhead.detection.assigners import CenterAssigner, OverlapAssigner
from dyhead.detection.autoassign import AutoAssignOptions
from dyhead.detection.borderdet import BorderDetOptions
from dyhead.detection.detector import BoxLoss
from dyhead.detection.fcos import FCOSOptions
from dyhead.detection.gfl import GFLOptions
from dyhead.detection.normalizer import LossNormalizer
from tests.detection.objects import make_boxes

KINDS = ("positives", "positives_per_image")
COUNTS = (5, 0, 2)  # objects of the images


def losses_of(kind, by_centerness, images):
    """Of FCOS, with these of the images."""
    options = FCOSOptions(
        num_classes=3,
        in_features=("p3",),
        loss_normalizer=kind,
        box_loss=BoxLoss(by_centerness=by_centerness),
        assigner=CenterAssigner(0.0),
    )
    return _losses(options, images)


def losses_of_autoassign(images):
    """Likewise of AutoAssign."""
    return _losses(AutoAssignOptions(num_classes=3, in_features=("p3",)), images)


def losses_of_borderdet(images):
    """Likewise of BorderDet, whose boxes are large enough to be refined."""
    options = BorderDetOptions(num_classes=3, in_features=("p3",), border_assigner=OverlapAssigner(0.1))
    return _losses(options, images, lambda detector: nn.init.constant_(detector.head.deltas.bias, 1.5))


def losses_of_gfl(images):
    """Likewise of GFL, whose box losses are divided by the sum of their weights."""
    return _losses(GFLOptions(num_classes=3, in_features=("p3",), prior_prob=0.5), images)


def _losses(options, images, change=lambda detector: None):
    torch.manual_seed(0)
    detector = options.build(4, (8,)).double()
    change(detector)
    features = torch.randn(len(COUNTS), 4, 6, 8, dtype=torch.float64)
    return detector.losses(detector({"p3": features[images]}), objects_of(images))


def objects_of(images):
    """The objects of these of the images."""
    boxes = [make_boxes(COUNTS[i], 48, 64, seed=i, smallest=12) for i in images]
    return [Targets(box, torch.arange(len(box)) % 3) for box in boxes]


def train(rank, processes, folder, shares):
    """What this process computes with its share of the images, into ``folder``."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    losses = {(kind, weighed): losses_of(kind, weighed, shares[rank]) for kind in KINDS for weighed in (False, True)}
    losses["GFL"] = losses_of_gfl(shares[rank])
    losses["BorderDet"] = losses_of_borderdet(shares[rank])
    losses["AutoAssign"] = losses_of_autoassign(shares[rank])
    average = LossNormalizer("moving_average", initial=10.0)
    moved = [average(torch.tensor([3 + rank, 2 * rank])) for _ in range(2)]
    found = {key: {name: loss.detach() for name, loss in each.items()} for key, each in losses.items()}
    torch.save({"losses": found, "moved": moved}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
