"""D2Det: slow loops, hand-computed cases, and what happens without regions."""

import math
import socket
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dyhead.config import ConfigError, add_dyhead_config, check_config, load_config
from dyhead.detection.roi import BOX_HEADS
from dyhead.detection.roi.d2det import (
    DenseLocalHead,
    DiscriminativePool,
    average_boxes,
    cell_boxes,
    cell_losses,
    cell_targets,
    jitter,
    published_iou_loss,
    soft_nms,
)
from dyhead.ops import deform_roi_pool
from dyhead.torchvision import get_cfg

CONFIGS = Path(__file__).parents[3] / "configs" / "quickstart"
STRIDES = {"p2": 4, "p3": 8}


def randomized(module, seed=0, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.double()


def levels(channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"p2": (16, 20), "p3": (8, 10)}
    return {
        name: torch.randn(2, channels, *size, dtype=torch.float64, generator=generator) for name, size in sizes.items()
    }


# The second belongs to p3, from 112 pixels on.
BOXES = [torch.tensor([[4.0, 6, 40, 50], [0, 0, 200, 100]]), torch.tensor([[10.0, 3, 70, 33]])]
BOXES = [each.double() for each in BOXES]


def weighted_mean(cells, weight, side):
    """Over the cells of each window that there are, one at a time."""
    out = torch.zeros(len(cells), side, side, dtype=torch.float64)
    for c, i, j in product(range(len(cells)), range(side), range(side)):
        total = norm = 0.0
        for y, x in product(range(2 * i - 1, 2 * i + 2), range(2 * j - 1, 2 * j + 2)):
            if 0 <= y < 2 * side and 0 <= x < 2 * side:
                total += (cells[c, y, x] * weight[c, y, x]).item()
                norm += weight[c, y, x].item()
        out[c, i, j] = total / norm
    return out


@torch.no_grad()
def test_pooling_is_what_slow_loops_compute_of_each_region():
    pool, features = randomized(DiscriminativePool(3, STRIDES, 4, 5)), levels()
    out = pool(features, BOXES)
    assert out.shape == (3, 3, 4, 4)
    for q, (image, name) in enumerate(((0, "p2"), (0, "p3"), (1, "p2"))):
        box = torch.cat(BOXES)[q : q + 1]
        region = torch.cat([torch.full((1, 1), image, dtype=torch.float64), box], 1)
        scale = 1 / STRIDES[name]
        x = deform_roi_pool(features[name], region, None, 2, scale).flatten()
        for i, layer in enumerate(pool.offset_layers):
            x = layer.weight @ x + layer.bias
            x = x if i == 2 else x.clamp(min=0)
        # Each of 4 x 4 parts has the offset of its 2 x 2 cells.
        offset = torch.stack([x.view(2, 4, 4)[:, i // 2, j // 2] for i, j in product(range(8), repeat=2)], 1)
        cells = deform_roi_pool(features[name], region, offset.view(1, 2, 8, 8), 8, scale)
        convolved = F.conv2d(cells, pool.weight_conv.weight, padding=1)[0]
        weight = torch.empty_like(convolved)
        for c, plane in enumerate(convolved):
            normal = (plane - plane.mean()) / math.sqrt(plane.var(correction=0) + 1e-5)
            z = normal * pool.weight_norm.weight[c] + pool.weight_norm.bias[c]
            weight[c] = torch.exp(12 / (1 + torch.exp(-z)))
        torch.testing.assert_close(out[q], weighted_mean(cells[0], weight, 4))


def test_pooling_starts_as_the_mean_of_cells_that_do_not_move():
    pool, features = DiscriminativePool(3, STRIDES, 4, 5).double(), levels()
    region = torch.cat([torch.ones(1, 1), BOXES[1]], 1).double()
    cells = deform_roi_pool(features["p2"], region, None, 8, 0.25)
    want = F.avg_pool2d(cells, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(pool(features, BOXES)[2:], want)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_of_pooling_are_those_of_finite_differences(aligned):
    pool = randomized(DiscriminativePool(2, {"p2": 4}, 2, 3, aligned), seed=3, scale=0.2)
    boxes = [torch.tensor([[1.3, 2.2, 17, 22.1]], dtype=torch.float64)]
    feature = torch.randn(1, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    weights = [pool.offset_layers[0].weight, pool.offset_layers[2].bias, pool.weight_conv.weight]

    def run(feature, *_):  # gradcheck moves the weights in place
        return pool({"p2": feature}, boxes)

    assert torch.autograd.gradcheck(run, (feature, *weights))


def test_boxes_start_with_the_size_of_their_region():
    torch.manual_seed(0)
    head, region = DenseLocalHead(3, 8, 2, 4), torch.tensor([[10.0, 20, 22, 26]])
    distances, inside = head(torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(average_boxes(region, distances, inside - 1), region, atol=0.2, rtol=0)
    loss, _ = cell_losses(region, region, distances, inside)
    loss.backward()
    assert head.sides.bias.grad.abs().min() > 0


def test_no_regions_give_nothing_and_gradients_of_zero():
    pool, head = DiscriminativePool(3, STRIDES, 4, 5).double(), DenseLocalHead(3, 8, 2, 4).double()
    none = [torch.zeros(0, 4, dtype=torch.float64)] * 2
    out = pool(levels(), none)
    distances, logits = head(torch.zeros(0, 3, 8, 8, dtype=torch.float64))
    assert (out.shape, distances.shape, logits.shape) == ((0, 3, 4, 4), (0, 4, 4, 4), (0, 4, 4))
    losses = cell_losses(none[0], none[0], distances, logits)
    assert [loss.item() for loss in losses] == [0, 0]
    assert [loss.item() for loss in cell_losses(none[0], none[0], distances, logits, as_published=True)] == [0, 0]
    (out.sum() + sum(losses)).backward()
    assert all(p.grad.abs().max() == 0 for module in (pool, head) for p in module.parameters())
    assert average_boxes(none[0], distances, logits).shape == (0, 4)
    assert [len(each) for each in soft_nms(none[0], out.new_zeros(0), torch.zeros(0).long(), 0.5, 0.001, 100)] == [0, 0]


def test_targets_and_boxes_by_hand():
    """A region of 12 x 6 pixels in 2 x 2 cells, and an object on its right."""
    region, box = torch.tensor([[10.0, 20, 22, 26]]), torch.tensor([[14.0, 19, 30, 26]])
    targets = cell_targets(region, box, 2)
    # Centers at x 13 and 19, y 21.5 and 24.5.
    assert targets.distances[0].tolist() == [
        [[-1, 5], [-1, 5]],
        [[17, 11], [17, 11]],
        [[2.5, 2.5], [5.5, 5.5]],
        [[4.5, 4.5], [1.5, 1.5]],
    ]
    assert targets.inside.tolist() == [[[False, True], [False, True]]]  # 2 and 1 pixels are a sixth
    for cut, inside in ((0.4, True), (0.6, False)):  # 1.1 and 0.9 pixels above the object's lower side
        nearer = box - torch.tensor([0, 0, 0, cut])
        assert cell_targets(region, nearer, 2).inside.tolist() == [[[False, True], [False, inside]]]
    scale = torch.tensor([12.0, 12, 6, 6]).view(4, 1, 1)
    boxes = cell_boxes(region, targets.distances / scale)
    torch.testing.assert_close(boxes, box.expand(1, 2, 2, 4))


def test_losses_by_hand():
    """Of the region above, whose two cells on the right predict a half and a quarter of the object."""
    region, box = torch.tensor([[10.0, 20, 22, 26]]), torch.tensor([[14.0, 19, 30, 26]])
    distances = (cell_targets(region, box, 2).distances / torch.tensor([12.0, 12, 6, 6]).view(4, 1, 1)).clamp(min=0)
    distances[0, 1, 0, 1] -= 8 / 12
    distances[0, 1, 1, 1] -= 12 / 12
    distances.requires_grad_()
    logits = torch.tensor([[[0, math.log(3)], [0, math.log(3)]]])
    of_boxes, of_inside = cell_losses(region, box, distances, logits)
    assert of_boxes.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert of_inside.item() == pytest.approx((2 * math.log(2) + 2 * math.log(4 / 3)) / 4)
    of_boxes.backward()
    assert (distances.grad[0, :, :, 0] == 0).all()  # cells outside the object learn no box
    far, there = torch.tensor([[50.0, 50, 60, 60]]), distances.detach().requires_grad_()
    of_boxes, _ = cell_losses(region, far, there, logits)
    of_boxes.backward()
    assert of_boxes.item() == 0
    assert not there.grad.any()


def test_the_published_loss_jumps_where_the_iou_passes_a_tenth():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9]])
    targets = torch.tensor([[0.0, 0, 9, 9], [50, 50, 59, 59], [0, 0, 9, 0.5]])
    expected = [0, -math.log(0.1 + 1e-6), -math.log(0.15)]
    assert published_iou_loss(boxes, targets).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_box_is_the_mean_of_those_of_the_cells_inside_or_of_all():
    region = torch.tensor([[0.0, 0, 8, 4]]).repeat(3, 1)
    distances = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[[1.0, -1], [2, -1]], [[-1, -1], [-1, -1]], [[-1, -1], [-1, 0.1]]])
    cells, found = cell_boxes(region, distances), average_boxes(region, distances, logits)
    torch.testing.assert_close(found[0], (cells[0, 0, 0] + cells[0, 1, 0]) / 2)
    torch.testing.assert_close(found[1], cells[1].mean((0, 1)))
    torch.testing.assert_close(found[2], cells[2, 1, 1])
    published = average_boxes(region, distances, logits, as_published=True)
    assert published[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(published[2], cells[2, 1, 1] / (1 + 1e-5))


def test_jitter_by_hand():
    boxes = torch.tensor([[10.0, 10, 30, 20], [0, 0, 40, 30]])
    offsets = torch.tensor([[0.1, -0.1, 0.5, -0.5], [0, 0, 0.1, 0.1]])
    assert jitter(boxes, offsets, (25, 41)).tolist() == [[7, 11.5, 37, 16.5], [0, 0, 40, 24]]


def soft_nms_slowly(boxes, scores, labels, threshold, least, most):
    """Class by class, a box at a time, as in the paper."""
    found = []
    for label in set(labels.tolist()):
        left = [(score, index) for index, score in enumerate(scores.tolist()) if labels[index] == label]
        while left:
            best = max(left)
            left.remove(best)
            found.append(best)
            decayed = []
            for score, index in left:
                low = torch.max(boxes[best[1], :2], boxes[index, :2])
                high = torch.min(boxes[best[1], 2:], boxes[index, 2:])
                overlap = (high - low).clamp(min=0).prod().item()
                areas = [(boxes[i, 2:] - boxes[i, :2]).prod().item() for i in (best[1], index)]
                iou = overlap / (sum(areas) - overlap)
                decayed.append((score * (1 - iou) if iou > threshold else score, index))
            left = decayed
    found = sorted((each for each in found if each[0] >= least), reverse=True)[:most]
    return [index for _, index in found], [score for score, _ in found]


@pytest.mark.parametrize(("least", "most"), [(0.001, 100), (0.3, 100), (0.001, 7)])
def test_soft_nms_is_that_of_a_slow_loop(least, most):
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 20
    boxes = torch.cat([low, low + 20 + 10 * torch.rand(40, 2, generator=generator, dtype=torch.float64)], 1)
    scores = torch.rand(40, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 3
    chosen, left = soft_nms(boxes, scores, labels, 0.5, least, most)
    expected, expected_scores = soft_nms_slowly(boxes, scores, labels, 0.5, least, most)
    assert chosen.tolist() == expected
    torch.testing.assert_close(left.tolist(), expected_scores)
    assert len(chosen) < 40 or least == 0.001


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiscriminativePool(4, STRIDES, 1), "side: expected at least 2 cells, got 1"),
        (lambda: DenseLocalHead(4, 10, 2, 4), "box_conv_groups: expected a divisor of the 10 channels, got 4"),
        (lambda: DenseLocalHead(4, 8, 0, 4), "num_conv: .* got 0"),
    ],
)
def test_names_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def built(**options):
    options = {"fc_dim": 6, "offset_dim": 5, "num_box_conv": 1, "box_conv_dim": 8, "box_conv_groups": 4} | options
    head = BOX_HEADS["D2Det"].options(**options).build(3, 2, STRIDES, 2, detections_per_image=3)
    return randomized(head)


# Of three regions of an image of 40 x 60 pixels, two have an object; with 2 x 2 cells.
REGIONS = torch.tensor([[0.0, 0, 12, 12], [24, 0, 36, 12], [0, 20, 20, 40]]).double()
OBJECTS = torch.tensor([[0.0, 0, 12, 12], [24, 0, 48, 12], [0, 0, 1, 1]]).double()
LABELS = torch.tensor([0, 1, 2])
LOGITS = torch.tensor([[math.log(2), 0, 0], [0, 0, 0], [0, math.log(3), math.log(6)]]).double()
# Each cell predicts its region, and that it is inside.
SIDES = torch.tensor(
    [[[0.25, 0.75]] * 2, [[0.75, 0.25]] * 2, [[0.25] * 2, [0.75] * 2], [[0.75] * 2, [0.25] * 2]]
).double()


def predicting(head, monkeypatch, sides=SIDES):
    """A head whose branches predict the above of however many regions."""
    monkeypatch.setattr(head, "class_logits", lambda *_: LOGITS)
    monkeypatch.setattr(head.local, "forward", lambda x: (sides.expand(len(x), 4, 2, 2), x.new_zeros(len(x), 2, 2) + 1))
    return head


def test_losses_of_a_hand_computed_step(monkeypatch):
    head = predicting(
        built(jitter=0.0, class_loss_weight=3.0, box_loss_weight=5.0, inside_loss_weight=7.0), monkeypatch
    )
    losses = head.losses(levels(), [REGIONS, REGIONS[:0]], [LABELS, LABELS[:0]], [OBJECTS, OBJECTS[:0]], [(40, 60)] * 2)
    assert losses["loss_cls"].item() == pytest.approx(3 * (math.log(2) + math.log(3) + math.log(10 / 6)) / 3)
    # All 4 + 4 cells are inside; the second object is twice as wide as its region.
    assert losses["loss_box_reg"].item() == pytest.approx(5 * math.log(2) / 2)
    assert losses["loss_box_inside"].item() == pytest.approx(7 * math.log(1 + math.exp(-1)))


def test_detections_of_a_hand_computed_step(monkeypatch):
    head = predicting(built(), monkeypatch)
    shifted = SIDES.clone()
    shifted[0] += 0.5  # to the left, by half a region
    head = predicting(head, monkeypatch, shifted)
    (found,) = head.detect(levels(), [REGIONS], [(40, 60)])
    # Probabilities of the classes are 1/2 and 1/4; 1/3 and 1/3; 0.1 and 0.3. The three best of six, cut to the image.
    torch.testing.assert_close(found.scores, torch.tensor([1 / 2, 1 / 3, 1 / 3]).double())
    assert found.labels.tolist() in ([0, 0, 1], [0, 1, 0])
    torch.testing.assert_close(found.boxes, torch.tensor([[0, 0, 12, 12], [18, 0, 36, 12], [18, 0, 36, 12]]).double())
    head.score_thresh = 0.4
    (found,) = head.detect(levels(), [REGIONS], [(40, 60)])
    assert found.scores.tolist() == pytest.approx([0.5])
    head.score_thresh = 0.6
    (found,) = head.detect(levels(), [REGIONS], [(40, 60)])
    assert [len(each) for each in (found.boxes, found.scores, found.labels)] == [0, 0, 0]


def test_boxes_are_predicted_of_the_best_regions_of_each_image(monkeypatch):
    head, seen = built(regions_test=2), []
    predicting(head, monkeypatch)
    pool = head.box_pool.forward
    monkeypatch.setattr(head.box_pool, "forward", lambda features, boxes: seen.append(boxes) or pool(features, boxes))
    head.detect(levels(), [REGIONS], [(40, 60)])
    assert [each.tolist() for each in seen[0]] == [[REGIONS[0].tolist(), REGIONS[1].tolist()]]


def test_boxes_are_learnt_from_some_regions_that_move(monkeypatch):
    torch.manual_seed(0)
    seen = []
    head = predicting(built(regions_train=1, jitter=0.2), monkeypatch)
    pool = head.box_pool.forward
    monkeypatch.setattr(head.box_pool, "forward", lambda features, boxes: seen.append(boxes) or pool(features, boxes))
    for _ in range(8):
        head.losses(levels(), [REGIONS[:1], REGIONS[1:]], [LABELS[:1], LABELS[1:]], [OBJECTS[:1], OBJECTS[1:]],
                    [(40, 60)] * 2)  # fmt: skip
    counts = [[len(own) for own in boxes] for boxes in seen]
    assert sorted({tuple(each) for each in counts}) == [(0, 1), (1, 0)]
    moved = torch.cat([boxes[1] for boxes in seen])
    off = (moved - REGIONS[1]).abs()
    assert (off > 0).any(1).all()
    assert off.max() <= 0.3 * 12  # 0.2 of the size, and half of as much


def test_as_published_reaches_all_parts(monkeypatch):
    head = built(as_published=True, jitter=0.0)
    assert not head.class_pool.aligned
    torch.manual_seed(1)
    inputs = levels(), [REGIONS], [LABELS], [OBJECTS], [(40, 60)]
    published = head.losses(*inputs)
    head.as_published = False
    other = head.losses(*inputs)
    assert published["loss_cls"] == other["loss_cls"]
    assert published["loss_box_reg"] != other["loss_box_reg"]
    distances, inside = head.local(head.box_pool(levels(), [REGIONS[:2]]))
    want, _ = cell_losses(REGIONS[:2], OBJECTS[:2], distances, inside, as_published=True)
    torch.testing.assert_close(published["loss_box_reg"], 2 * want)


def test_a_cascade_of_it_is_refused():
    cfg = get_cfg()
    words = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.DEVICE", "cpu"]
    load_config(cfg, CONFIGS / "d2det_R18_shapes.yaml", words)
    with pytest.raises(
        ConfigError, match=r"MODEL\.ROI_HEADS\.NAME: expected 'StandardROIHeads' with MODEL\.ROI_BOX_HEAD"
    ):
        check_config(cfg)


@pytest.mark.detectron2
def test_other_meta_architectures_take_it_with_its_roi_heads_or_refuse_it():
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model

    import dyhead.detectron2  # noqa: F401  registers the heads

    cfg = add_dyhead_config(detectron2_cfg())
    load_config(cfg, CONFIGS / "d2det_R18_shapes.yaml", ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ConfigError, match=r"^MODEL\.ROI_HEADS\.NAME: expected 'DetectingROIHeads' with .* D2Det"):
        build_model(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "DetectingROIHeads"
    model = build_model(cfg).eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}])
    assert set(found["instances"].get_fields()) == {"pred_boxes", "scores", "pred_classes"}


@pytest.mark.filterwarnings("ignore")
def test_soft_nms_in_a_trace_takes_any_number_of_boxes():
    generator = torch.Generator().manual_seed(0)

    def some(count):
        corners = 60 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corners, corners + 10 + 30 * torch.rand(count, 2, generator=generator)], 1)
        return boxes, torch.rand(count, generator=generator), torch.arange(count) % 2

    traced = torch.jit.trace(lambda *found: soft_nms(*found, 0.3, 0.05, 8), some(5), check_trace=False)
    for count in (0, 1, 5, 20):
        found = some(count)
        for got, expected in zip(traced(*found), soft_nms(*found, 0.3, 0.05, 8), strict=True):
            torch.testing.assert_close(got, expected)


def head_and_losses():
    """A small head, and a function from a number of its regions that are objects' to their losses."""
    torch.manual_seed(0)
    small = {"fc_dim": 8, "offset_dim": 8, "num_box_conv": 1, "box_conv_dim": 8, "box_conv_groups": 2, "jitter": 0.0}
    options = BOX_HEADS["D2Det"].options(**small)
    head = randomized(options.build(3, 4, STRIDES, 2), scale=0.2)

    def losses(module, objects):
        labels = [torch.tensor([0, 1][:objects] + [2] * (2 - objects))]
        boxes = BOXES[:1]
        of_level = {name: level[:1] for name, level in levels().items()}
        return sum(module(of_level, boxes, labels, [boxes[0] + 2], [(64, 80)]).values())

    return head, losses


class _Losses(torch.nn.Module):
    """What a training calls."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *args):
        return self.head.losses(*args)


def _gradients_of_part(rank, port, parts, results):
    """One process of two: the gradients after its part, put together with the other's."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    head, losses = head_and_losses()
    shared = torch.nn.parallel.DistributedDataParallel(_Losses(head))
    losses(shared, parts[rank]).backward()
    results[rank] = {name: parameter.grad.tolist() for name, parameter in head.named_parameters()}
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_mean_of_what_each_would():
    parts = [2, 0]  # in one process nothing is an object's
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_gradients_of_part, (port, parts, results), nprocs=2)
        together = [results[rank] for rank in range(2)]
    alone = []
    for part in parts:
        head, losses = head_and_losses()
        losses(_Losses(head), part).backward()
        alone.append({name: parameter.grad for name, parameter in head.named_parameters()})
    for name in alone[0]:
        expected = (alone[0][name] + alone[1][name]) / 2
        assert expected.isfinite().all()
        for each in together:
            torch.testing.assert_close(torch.tensor(each[name], dtype=torch.float64), expected)
