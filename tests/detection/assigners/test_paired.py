"""Assignment by pairs of boxes, against loops over all of them, and chunks against no chunks."""

import pytest
import torch

from dyhead.detection.assigners import BACKGROUND, IGNORED, PairedAnchorAssigner, PairedRegionAssigner, paired
from tests.detection.objects import iou, make_boxes


def part_inside(box, anchor):
    width = min(box[2], anchor[2]) - max(box[0], anchor[0])
    height = min(box[3], anchor[3]) - max(box[1], anchor[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def objects(count, seed=1):
    """Whole boxes, and boxes of parts of them."""
    whole = make_boxes(count, 60, 80, seed=seed, smallest=12)
    shares = torch.rand(count, 2, 2, dtype=whole.dtype, generator=torch.Generator().manual_seed(seed))
    low, high = shares.amin(dim=1) * 0.4, 1 - shares.amin(dim=1) * 0.4
    size = whole[:, 2:] - whole[:, :2]
    return whole, torch.cat([whole[:, :2] + low * size, whole[:, :2] + high * size], dim=1)


def anchors_around(whole, count=40):
    """Boxes near the objects, and anywhere."""
    generator = torch.Generator().manual_seed(3)
    near = whole.repeat(count, 1)
    near = near + 5 * torch.randn(near.shape, generator=generator, dtype=near.dtype)
    boxes = torch.cat([near, make_boxes(100, 60, 80, seed=9, smallest=8)])
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]


def anchors_by_loops(options, anchors, whole, visible):
    anchors, whole, visible = anchors.tolist(), whole.tolist(), visible.tolist()
    found = []
    best_of = [max(iou(f, a) for a in anchors) for f in whole]
    for a in anchors:
        overlaps = [iou(f, a) for f in whole]
        fitting = [
            (o, -i)
            for i, (o, v) in enumerate(zip(overlaps, visible, strict=True))
            if o >= options.whole_iou and part_inside(v, a) >= options.visible_part
        ]
        wanting = [i for i, o in enumerate(overlaps) if o == best_of[i] > 0] if options.best_is_positive else []
        if fitting:
            found.append(-max(fitting)[1])
        elif wanting:
            found.append(wanting[0])
        else:
            found.append(BACKGROUND if max(overlaps) < options.background_iou else IGNORED)
    return found


@pytest.mark.parametrize(
    "options",
    [
        PairedAnchorAssigner(),
        PairedAnchorAssigner(best_is_positive=False),
        PairedAnchorAssigner(0.5, 0.9, 0.4),
        PairedAnchorAssigner(0.6, 0.0, 0.6, best_is_positive=False),
    ],
)
@pytest.mark.parametrize("chunk", [2**24, 1])
def test_anchors_are_assigned_as_by_loops(options, chunk, monkeypatch):
    monkeypatch.setattr(paired, "_CHUNK", chunk)  # 1: an object at a time
    whole, visible = objects(6)
    anchors = anchors_around(whole)
    got = options(anchors, whole, visible).tolist()
    assert got == anchors_by_loops(options, anchors, whole, visible)
    assert len(set(got)) >= 7  # of each object, and background


@pytest.mark.parametrize("chunk", [2**24, 1])
def test_pairs_are_assigned_as_by_loops(chunk, monkeypatch):
    monkeypatch.setattr(paired, "_CHUNK", chunk)
    whole, visible = objects(6)
    pairs = torch.cat([whole.repeat(30, 1), visible.repeat(30, 1)], dim=1)
    pairs = pairs + 4 * torch.randn(pairs.shape, generator=torch.Generator().manual_seed(5), dtype=pairs.dtype)
    want = []
    for pair in pairs.tolist():
        fitting = [
            (iou(f, pair[:4]), -i)
            for i, (f, v) in enumerate(zip(whole.tolist(), visible.tolist(), strict=True))
            if iou(f, pair[:4]) >= 0.5 and iou(v, pair[4:]) >= 0.5
        ]
        want.append(-max(fitting)[1] if fitting else BACKGROUND)
    got = PairedRegionAssigner()(pairs, whole, visible).tolist()
    assert got == want
    assert set(got) == {BACKGROUND, *range(6)}


def test_an_anchor_on_the_hidden_part_of_an_object_is_not_its():
    whole, visible = torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[0.0, 0, 10, 40]])
    anchors = torch.tensor([[0.0, 0, 36, 40], [6.0, 0, 40, 40], [60.0, 0, 70, 9]])  # IoU 0.9, 0.85, 0
    assert PairedAnchorAssigner(best_is_positive=False)(anchors, whole, visible).tolist() == [0, IGNORED, BACKGROUND]


def test_without_objects_all_is_background():
    nothing = torch.zeros(0, 4)
    anchors = make_boxes(5, 20, 20, dtype=torch.float32)
    assert PairedAnchorAssigner()(anchors, nothing, nothing).tolist() == [BACKGROUND] * 5
    assert PairedRegionAssigner()(anchors.repeat(1, 2), nothing, nothing).tolist() == [BACKGROUND] * 5
    assert PairedRegionAssigner()(torch.zeros(0, 8), anchors, anchors).shape == (0,)
