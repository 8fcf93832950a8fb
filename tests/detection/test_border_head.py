import math

import pytest
import torch
from torch import nn

from dyhead.detection.heads import BorderHead, DenseHead

CHANNELS, CLASSES = 4, 2


def make_head(**more):
    """With weights so large that coarse boxes span several cells and reach beyond the map."""
    torch.manual_seed(0)
    head = BorderHead(CHANNELS, CLASSES, **{"class_channels": 3, "box_channels": 2, "quality": "box", **more}).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def make_level(*size, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, CHANNELS, *size, generator=generator, dtype=torch.float64)


def read_at(x, y, values):
    """A map (H, W), as nested lists, between its pixels."""
    total = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            if weight > 0:
                total += weight * values[i][j]
    return total


def normalized_by_loops(maps, normalizes):
    """Maps (channels, H, W) as nested lists, each less its mean, over its deviation, and no less than 0."""
    out = []
    for values in maps:
        flat = [v for row in values for v in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat) + 1e-5)
        if not normalizes:
            mean, deviation = 0.0, 1.0
        out.append([[max((v - mean) / deviation, 0.0) for v in row] for row in values])
    return out


def border_by_loops(module, image, boxes, pool):
    """What a border module makes of an image (C, H, W), cell by cell, side by side and point by point."""
    point, sides = (
        normalized_by_loops(conv(image[None])[0].tolist(), module.norm == "IN") for conv in (module.point, module.sides)
    )
    width = len(point)
    out = torch.empty(module.out.out_channels, *image.shape[1:], dtype=image.dtype)
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            x0, y0, x1, y1 = boxes[i][j]
            features = []
            for side in range(4):  # top, left, bottom, right
                at = []
                for k in range(pool + 1):
                    t = k / pool
                    across, down = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
                    at.append([(across, y0), (x0, down), (across, y1), (x1, down)][side])
                for c in range(width):
                    features.append(max(read_at(x, y, sides[side * width + c]) for x, y in at))
            features += [point[c][i][j] for c in range(width)]
            weight = module.out.weight[:, :, 0, 0]
            out[:, i, j] = (weight @ torch.tensor(features, dtype=image.dtype) + module.out.bias).relu()
    return out


@pytest.mark.parametrize(
    ("size", "more"),
    [
        ((4, 5), {}),
        ((3, 4), {"pool_size": 1, "border_norm": ""}),
        ((1, 3), {"pool_size": 3}),
        ((1, 1), {}),
        ((1, 1), {"border_norm": ""}),
    ],
)
@torch.no_grad()
def test_by_loops(size, more):
    head, level = make_head(**more), (make_level(*size), make_level(*size, seed=1))
    (logits,), (boxes,), (quality,), (refined,) = head([level])
    plain = DenseHead.forward(head, [level])
    for got, (want,) in zip((logits, boxes[:, :4], quality), plain, strict=True):
        assert torch.equal(got, want)
    beyond = inside = 0
    for n, (of_class, of_box) in enumerate(zip(*level, strict=True)):
        coarse = []
        for i in range(size[0]):
            coarse.append([])
            for j in range(size[1]):
                left, top, right, bottom = (max(v, 0.0) for v in boxes[n, :4, i, j].tolist())
                box = [j - left, i - top, j + right, i + bottom]
                ends = [size[1] - 1, size[0] - 1] * 2
                coarse[-1].append([min(max(v, 0.0), end) for v, end in zip(box, ends, strict=True)])
                beyond += box != coarse[-1][-1]
                inside += coarse[-1][-1][:2] != coarse[-1][-1][2:]
        pool = more.get("pool_size", 10)
        class_features = border_by_loops(head.class_border, of_class, coarse, pool)
        box_features = border_by_loops(head.box_border, of_box, coarse, pool)
        torch.testing.assert_close(refined[n], head.border_logits(class_features[None])[0])
        torch.testing.assert_close(boxes[n, 4:], head.border_deltas(box_features[None])[0])
    assert beyond
    assert inside or size == (1, 1)


def test_by_hand():
    """A row of three cells, one channel of 0, 1, 3 in the class border, read as it is, with no norm.

    The box of the cell in the middle goes 0.5 strides to the left, 1 to the right, and nowhere up and down: from 0.5 to
    2. The upper and lower side's largest value is that at 2, 3; the left side reads (0 + 1) / 2, the right one 3; the
    point 1. Weights 1, 10, 100, 1000 of the sides and 10,000 of the point: 3 + 5 + 300 + 3000 + 10,000.
    """
    head = BorderHead(1, 1, class_channels=1, box_channels=1, border_norm="", quality="box")
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        head.deltas.bias[:] = torch.tensor([0.5, -1.0, 1.0, 0.0])
        for layer in (head.class_border.point, head.class_border.sides, head.border_logits):
            layer.weight.fill_(1.0)
        head.class_border.out.weight[0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
        (refined,) = head([torch.tensor([[[[0.0, 1.0, 3.0]]]])])[3]
    assert refined[0, 0, 0, 1].item() == pytest.approx(13308)


def test_a_factor_for_each_level():
    head = make_head(num_levels=2, delta_scale=True)
    levels = [make_level(4, 5), make_level(2, 3)]
    for level, factor, boxes in zip(levels, head.delta_scale.tolist(), head(levels)[1], strict=True):
        torch.testing.assert_close(boxes[:, :4], factor * head.deltas(level))
    with pytest.raises(ValueError, match="levels: expected 2, got 1"):
        head(levels[:1])


def test_the_border_sends_no_gradient_to_the_coarse_boxes():
    head = make_head(delta_scale=True)
    _, (boxes,), _, (refined,) = head([make_level(4, 5)])
    (boxes[:, 4:].square().sum() + refined.square().sum()).backward()
    assert not head.deltas.weight.grad.any()
    assert not head.delta_scale.grad.any()
    assert head.box_border.sides.weight.grad.any()
    assert head.class_border.sides.weight.grad.any()


@pytest.mark.parametrize("border_norm", ["IN", ""])
def test_gradients_are_those_of_finite_differences(border_norm):
    """Of what does not move the coarse boxes: the level that classes are read from, and the border modules' weights."""
    head = make_head(border_norm=border_norm)
    of_class, of_box = make_level(3, 4), make_level(3, 4, seed=1)

    def total():
        _, (boxes,), _, (refined,) = head([(of_class, of_box)])
        return boxes[:, 4:].square().sum() + refined.square().sum()

    of_class.requires_grad_()
    total().backward()
    modules = (head.class_border, head.box_border, head.border_logits, head.border_deltas)
    values = [of_class, *(p for module in modules for p in module.parameters())]
    generator = torch.Generator().manual_seed(3)
    for value in values:
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                value += step * direction
                ends.append(total())
            value += 1e-6 * direction
        torch.testing.assert_close((value.grad * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_a_level_of_one_pixel_says_the_same_of_every_image_and_keeps_its_parameters():
    head = make_head()
    (logits,), (boxes,), _, (refined,) = head([make_level(1, 1)])
    assert torch.equal(refined[0], refined[1])
    assert torch.equal(boxes[0, 4:], boxes[1, 4:])
    assert not torch.equal(logits[0], logits[1])
    (refined.sum() + boxes[:, 4:].sum()).backward()
    for module in (head.class_border, head.box_border):
        assert not module.sides.weight.grad.any()
        assert not module.point.weight.grad.any()
        assert module.out.bias.grad.any()


def test_a_map_of_equal_pixels_is_read_as_one_pixel_is():
    head = make_head()
    one = make_level(1, 1)
    (alone,), (many,) = head([one])[3], head([one.expand(-1, -1, 3, 3).contiguous()])[3]
    # In the middle: a predictor of 3 x 3 pixels sees the edge elsewhere, which moves boxes, not what they read.
    torch.testing.assert_close(many, alone.expand_as(many), atol=1e-9, rtol=0)


def test_coarse_boxes_that_are_infinite_or_nan_spoil_no_other_cell():
    head, level = make_head(), make_level(3, 4)
    clean = head([level])
    numbers = clean[1][0][:, :4].clone()
    numbers[0, 2, 1, 1], numbers[0, 3, 2, 3] = math.inf, math.nan
    head.predict = lambda *_: (clean[0][0], numbers, clean[2][0])
    (boxes,), (refined,) = head([level])[1], head([level])[3]
    other = torch.ones(2, 3, 4, dtype=torch.bool)
    other[0, 1, 1] = other[0, 2, 3] = False
    for got, want in ((refined, clean[3][0]), (boxes[:, 4:], clean[1][0][:, 4:])):
        assert torch.equal(got.permute(0, 2, 3, 1)[other], want.permute(0, 2, 3, 1)[other])
    assert refined.isfinite().all()


def test_starts_at_the_prior():
    torch.manual_seed(0)
    head = BorderHead(16, 5, prior_prob=0.02, quality="box")
    _, (boxes,), _, (refined,) = head([torch.randn(2, 16, 8, 8)])
    torch.testing.assert_close(refined.sigmoid(), torch.full((2, 5, 8, 8), 0.02), rtol=0.05, atol=0)
    assert boxes[:, 4:].abs().max() < 0.05


def test_predictions_are_float32_at_least():
    head = BorderHead(8, 2, class_channels=4, box_channels=4, quality="box")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head([torch.randn(1, 8, 4, 4)])
    assert {level.dtype for levels in outputs for level in levels} == {torch.float32}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"border_norm": "BN"}, "border_norm: expected one of 'IN', '', got 'BN'"),
        ({"pool_size": 0}, "pool_size: expected 1 to 255, got 0"),
        ({"pool_size": 256}, "pool_size: expected 1 to 255, got 256"),
        ({"class_channels": 0}, "class_channels: expected at least 1, got 0"),
        ({"box_channels": 0}, "box_channels: expected at least 1, got 0"),
    ],
)
def test_arguments_outside_their_range(argument, message):
    with pytest.raises(ValueError, match=message):
        make_head(**argument)
