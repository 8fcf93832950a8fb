"""Double-Head and Double-Head-Ext: slow loops, hand-computed losses and scores, and what each branch sees."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detection.roi import BOX_HEADS, DoubleHead
from dyhead.detection.roi.double_head import GroupedNonLocal
from dyhead.detection.roi.prediction import either, weighed
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.rcnn.boxes import class_probabilities
from dyhead.torchvision.rcnn.regions import Sample

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart" / "doublehead_ext_R18_shapes.yaml"
EXT = {"non_local_dim": 6, "non_local_groups": 3, "loss_weights": ((1.4, 2.0), (0.5, 0.6))}


def randomized(module, seed=0):
    """With weights far from where training starts, statistics too, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator) + ("running_var" in key))
                if "running_var" in key:
                    tensor.abs_()
    return module.double()


def small(**options):
    return randomized(DoubleHead(4, 3, fc_dim=5, conv_dim=8, num_conv=2, **options))


def views(count, channels=4, seed=1):
    return torch.randn(count, 2 * channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normalized(x, norm):
    """Batch normalization with the stored statistics, a channel at a time; x is a list of channels."""
    return [
        (c - mean) / math.sqrt(var + norm.eps) * gain + shift
        for c, mean, var, gain, shift in zip(
            x,
            *(t.tolist() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
            strict=True,
        )
    ]


def convolved(x, conv):
    """A list of channels (S, S), padded with zeros, by loops over channels and taps."""
    side, pad = x[0].shape[0], conv.padding[0]
    padded = [F.pad(c, (pad,) * 4) for c in x]
    out = []
    for o in range(conv.out_channels):
        total = torch.zeros(side, side, dtype=torch.float64) + (0 if conv.bias is None else conv.bias[o])
        for i, (dy, dx) in product(range(conv.in_channels), product(range(2 * pad + 1), repeat=2)):
            total = total + conv.weight[o, i, dy, dx] * padded[i][dy : dy + side, dx : dx + side]
        out.append(total)
    return out


def both(x, layer):
    return normalized(convolved(x, layer.conv), layer.norm)


def relu_of_sum(*parts):
    return [sum(channels).clamp(min=0) for channels in zip(*parts, strict=True)]


def non_local(x, block):
    """What each cell sees at all cells, a group and a cell at a time."""
    maps = [convolved(x, conv) for conv in (block.query, block.key, block.value)]
    q, k, v = (torch.stack(each).flatten(1) for each in maps)
    inner, cells = q.shape
    seen = torch.zeros(inner, cells, dtype=torch.float64)
    per_group = inner // block.groups
    for group, i, j in product(range(block.groups), range(cells), range(cells)):
        own = slice(group * per_group, (group + 1) * per_group)
        seen[own, i] += sum(q[own, i] * k[own, j]) / cells * v[own, j]
    side = math.isqrt(cells)
    return relu_of_sum(normalized(convolved([c.view(side, side) for c in seen], block.out), block.norm), x)


def slowly(head, region):
    """The features of one region, (V * C, S, S)."""
    plain, enlarged = region.chunk(2)
    of_class = plain.flatten()
    for layer in head.fcs:
        of_class = (layer.weight @ of_class + layer.bias).clamp(min=0)
    x, entry = list(enlarged), head.entry
    x = relu_of_sum(both(relu_of_sum(both(x, entry.conv1)), entry.conv2), both(x, entry.shortcut))
    for block in head.blocks:
        if isinstance(block, GroupedNonLocal):
            x = non_local(x, block)
        else:
            inside = relu_of_sum(both(relu_of_sum(both(x, block.conv1)), block.conv2))
            x = relu_of_sum(both(inside, block.conv3), x)
    return torch.cat([of_class, torch.stack([channel.mean() for channel in x])])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, EXT], ids=["plain", "ext"])
def test_is_what_slow_loops_compute_of_each_region(options):
    head = small(**options).eval()
    assert [type(block).__name__ for block in head.blocks] == (
        ["GroupedNonLocal"] * bool(options) + ["_Bottleneck"]
    ) * 2
    regions = views(3)
    out = head(regions)
    assert out.shape == (3, sum(head.out_features))
    assert (out[:, 5:] > 0).any()
    for region, features in zip(regions, out, strict=True):
        torch.testing.assert_close(features, slowly(head, region))


def test_each_branch_sees_its_own_view():
    head = small().eval()
    assert (head.scales, head.out_features) == ((1.0, 1.3), (5, 8))
    regions = views(2)
    plain, enlarged = regions.clone(), regions.clone()
    plain[:, :4] += 1
    enlarged[:, 4:] += 1
    usual = head(regions)
    for changed, same, other in ((plain, slice(5, None), slice(5)), (enlarged, slice(5), slice(5, None))):
        out = head(changed)
        assert torch.equal(out[:, same], usual[:, same])
        assert not torch.allclose(out[:, other], usual[:, other])


def test_branches_may_see_the_same_view():
    head = small(fc_region_scale=1.2, conv_region_scale=1.2).eval()
    assert head.scales == (1.2,)
    one, two = views(2)[:, :4], small().eval()
    torch.testing.assert_close(head(one), two(torch.cat([one, one], dim=1)))


def test_batch_normalization_learns_from_the_regions_of_a_step_and_the_others_do_not():
    regions, more = views(3), views(5)
    for norm, alone in (("BN", False), ("GN", True)):
        head = randomized(DoubleHead(32, 3, fc_dim=5, conv_dim=128, num_conv=1, norm=norm))
        regions, more = views(3, 32), views(5, 32, seed=2)
        together = head(torch.cat([regions, more]))[:3]
        torch.testing.assert_close(head(regions)[:, :5], together[:, :5])
        assert torch.allclose(head(regions), together) == alone  # so two devices compute what one does
        head.eval()
        torch.testing.assert_close(head(regions), head(torch.cat([regions, more]))[:3])


def test_no_regions_give_no_features_gradients_of_zero_and_the_same_statistics():
    head = small(**EXT)
    before = {key: value.clone() for key, value in head.named_buffers() if "running" in key}
    features = head(views(0))
    assert features.shape == (0, 13)
    features.sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in head.parameters())
    assert all(torch.equal(head.get_buffer(key), value) for key, value in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(training):
    head = randomized(
        DoubleHead(2, 2, fc_dim=3, conv_dim=4, num_conv=1, non_local_dim=2, non_local_groups=2), seed=3
    ).train(training)
    weights = [head.fcs[0].weight, head.entry.conv1.conv.weight, head.entry.shortcut.norm.weight]
    weights += [head.blocks[0].query.weight, head.blocks[0].out.weight, head.blocks[1].conv3.conv.weight]
    regions = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def run(regions, *_):  # gradcheck moves the weights in place
        return head(regions)

    assert torch.autograd.gradcheck(run, (regions.requires_grad_(), *weights))


def test_starts_with_non_local_blocks_that_change_nothing():
    block = GroupedNonLocal(8, 4, 2, nn.BatchNorm2d)
    x = torch.rand(2, 8, 3, 3)
    torch.testing.assert_close(block(x), x)


def test_the_weights_of_the_losses_are_the_papers():
    """Each branch's weight, 2.0 and 2.5, is divided between its tasks: 0.7 and 0.3, and 0.2 and 0.8."""
    ((fc_class, conv_box), (conv_class, fc_box)) = BOX_HEADS["DoubleHeadExt"].options().build(8, 3).loss_weights
    assert [fc_class, fc_box] == pytest.approx([2.0 * 0.7, 2.0 * 0.3])
    assert [conv_class, conv_box] == pytest.approx([2.5 * 0.2, 2.5 * 0.8])
    assert BOX_HEADS["DoubleHead"].options().build(8, 3).loss_weights == ((2.0, 2.0),)


def test_scores_are_those_of_either_branch_and_may_add_up_to_more_than_one():
    fc = torch.tensor([[0.1, 0.6, 0.3]]).log()
    conv = torch.tensor([[0.2, 0.5, 0.3]]).log()
    deltas = torch.zeros(1, 12)
    torch.testing.assert_close(class_probabilities([(fc, deltas)]), torch.tensor([[0.1, 0.6, 0.3]]))
    found = class_probabilities([(fc, deltas), (conv, deltas)])
    torch.testing.assert_close(found, torch.tensor([[1 - 0.9 * 0.8, 1 - 0.4 * 0.5, 1 - 0.7 * 0.7]]))
    assert either([torch.tensor(0.5)] * 3) == 0.875


def test_weighs_losses_and_names_crossed_ones():
    losses = [{"loss_cls": torch.tensor(2.0), "loss_box_reg": torch.tensor(3.0)}] * 2
    assert weighed(losses[:1], ((2.0, 0.5),)) == {"loss_cls": 4.0, "loss_box_reg": 1.5}
    assert weighed(losses, ((1.4, 2.0), (0.5, 0.6))) == pytest.approx(
        {"loss_cls": 2.8, "loss_box_reg": 6.0, "loss_cls_crossed": 1.0, "loss_box_reg_crossed": 1.8}
    )


# Two regions of an image of 40 x 20 pixels, of which the first is 1 pixel beside an object. Logits of the one class and
# of the background, and deltas, of the fully connected branch and of the convolutional one.
REGIONS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
OBJECT = torch.tensor([[1.0, 0, 11, 10]])
LOGITS = {"fc": torch.tensor([[math.log(3), 0], [0, 0]]), "conv": torch.tensor([[0, 0], [0, math.log(3)]])}
DELTAS = {"fc": torch.tensor([[2.1, 0, 0, 0], [0, 0, 0, 0]]), "conv": torch.tensor([[0.6, 0, 0, 0], [0, 0, 0, 0]])}
LOSSES = {
    "loss_cls": 1.4 * (math.log(4 / 3) + math.log(2)) / 2,
    "loss_cls_crossed": 0.5 * (math.log(2) + math.log(4 / 3)) / 2,
    "loss_box_reg": 2.0 * (0.5**2 / 2) / 2,  # by smooth L1 of 0.6 - 0.1
    "loss_box_reg_crossed": 0.6 * (2.0 - 0.5) / 2,
}
SCORES = [1 - (1 - 0.75) * (1 - 0.5), 1 - (1 - 0.5) * (1 - 0.25)]
BOXES = [[6.0, 0, 16, 10], [20, 0, 30, 10]]


def configured(cfg, **options):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0)",
        "MODEL.DOUBLE_HEAD_EXT.FC_DIM": 4,
        "MODEL.DOUBLE_HEAD_EXT.CONV_DIM": 4,
    } | options
    load_config(cfg, CONFIG, [str(word) for pair in options.items() for word in pair])
    return cfg


def test_losses_and_detections_of_a_hand_computed_step_on_torchvision(monkeypatch):
    heads = build_model(configured(get_cfg())).roi_heads
    predictions = [
        (LOGITS[classes].flip(1), F.pad(DELTAS[boxes], (4, 0))) for classes, boxes in (("fc", "conv"), ("conv", "fc"))
    ]
    monkeypatch.setattr(heads, "_predict", lambda *_: predictions)
    matched, labels = torch.tensor([0, 0]), torch.tensor([1, 0])
    losses = heads.box_losses({}, Sample([REGIONS], [(20, 40)], [matched], [labels], [{"boxes": OBJECT}]))
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(LOSSES)
    (found,) = heads.detect_boxes({}, [REGIONS], [(20, 40)])
    torch.testing.assert_close(found["scores"], torch.tensor(SCORES))
    torch.testing.assert_close(found["boxes"], torch.tensor(BOXES))
    assert found["labels"].tolist() == [1, 1]


@pytest.mark.detectron2
def test_losses_and_detections_of_a_hand_computed_step_on_detectron2():
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as build_detectron2_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    import dyhead.detectron2  # noqa: F401  registers the detector

    predictor = build_detectron2_model(configured(add_dyhead_config(detectron2_cfg()))).roi_heads.box_predictor
    predictions = [(LOGITS[classes], DELTAS[boxes]) for classes, boxes in (("fc", "conv"), ("conv", "fc"))]
    regions = Instances((20, 40), proposal_boxes=Boxes(REGIONS), gt_classes=torch.tensor([0, 1]))
    regions.gt_boxes = Boxes(OBJECT.expand(2, 4))
    with EventStorage() as storage:
        losses = predictor.losses(predictions, [regions])
        accuracy = storage.latest()["fast_rcnn/cls_accuracy"][0]
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(LOSSES)
    assert accuracy == 0.5  # of the fully connected branch, whose second region is undecided, and so an object
    (found,), _ = predictor.inference(predictions, [regions])
    torch.testing.assert_close(found.scores, torch.tensor(SCORES))
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(BOXES))
    (own,) = predictor.predict_boxes_for_gt_classes(predictions, [regions])
    torch.testing.assert_close(own, torch.tensor(BOXES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "LN"}, "norm: expected one of 'BN', 'SyncBN', 'GN', got 'LN'"),
        ({"norm": "GN"}, "norm: expected one for 4 channels, which GN's 32 groups do not divide"),
        ({"conv_dim": 6}, "conv_dim: expected a multiple of 4, got 6"),
        ({"side": 1}, "side: expected at least 2 cells, got 1"),
        ({"num_fc": 0}, "num_fc: .* got 0"),
        ({"non_local_groups": 3, "non_local_dim": 8}, "non_local_groups: expected a divisor of the 8 channels, got 3"),
    ],
)
def test_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        DoubleHead(**{"channels": 4, "side": 3, "fc_dim": 5, "conv_dim": 8, "num_conv": 1} | options)


def test_what_does_not_fit_in_a_configuration_is_named_with_its_node():
    with pytest.raises(ConfigError, match=r"^MODEL\.DOUBLE_HEAD_EXT cannot be built as configured: non_local_groups: "):
        build_model(configured(get_cfg(), **{"MODEL.DOUBLE_HEAD_EXT.NON_LOCAL_GROUPS": 3}))
