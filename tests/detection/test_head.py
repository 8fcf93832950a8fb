import pytest
import torch
from torch.nn import functional

from dyhead.detection import DenseHead


def pyramid(height, width, *, levels=3, channels=8):
    sizes = [(height, width)]
    while len(sizes) < levels:
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return [torch.randn(2, channels, *size) for size in sizes]


def test_predicts_on_every_level():
    levels = pyramid(9, 7)
    out = DenseHead(8, num_classes=5, num_anchors=3, num_levels=3, quality="box")(levels)
    for level, logits, deltas, quality in zip(levels, *out, strict=True):
        size = level.shape[2:]
        assert logits.shape == (2, 15, *size)
        assert deltas.shape == (2, 12, *size)
        assert quality.shape == (2, 3, *size)


def test_has_no_quality_and_no_towers_unless_asked():
    head = DenseHead(8, num_classes=5)
    assert head(pyramid(4, 4))[2] is None
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"logits", "deltas"}


def test_starts_at_the_prior():
    levels = pyramid(32, 32, levels=1, channels=64)
    (logits,), (deltas,), _ = DenseHead(64, num_classes=5, prior_prob=0.02)(levels)
    assert logits.sigmoid().median().item() == pytest.approx(0.02, rel=0.1)
    assert deltas.mean().item() == pytest.approx(0, abs=0.05)
    assert deltas.std().item() == pytest.approx(0.01 * (9 * 64) ** 0.5, rel=0.2)  # 9 * 64 terms of std 0.01


def test_the_kernel_size_is_that_of_the_convolutions():
    head = DenseHead(8, num_classes=2, kernel_size=1)
    (level,) = pyramid(5, 4, levels=1)
    (logits,), _, _ = head([level])
    torch.testing.assert_close(logits, functional.conv2d(level, head.logits.weight, head.logits.bias))


def test_scales_the_deltas_of_each_level():
    head = DenseHead(8, num_classes=2, num_levels=3, delta_scale=True)
    levels = pyramid(8, 8)
    before = head(levels)
    with torch.no_grad():
        head.delta_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    after = head(levels)
    for i in range(3):
        torch.testing.assert_close(after[1][i], (i + 1) * before[1][i])
        torch.testing.assert_close(after[0][i], before[0][i])
    with pytest.raises(ValueError, match="levels: expected 3, got 2"):
        head(levels[:2])


@pytest.mark.parametrize("quality", ["box", "class"])
@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_towers_stand_before_the_predictors_of_their_task(norm, quality):
    head = DenseHead(8, 2, num_levels=2, num_convs=2, norm=norm, norm_groups=4, quality=quality)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    levels = pyramid(6, 5, levels=2)

    def through(tower, x, i):
        for layer in tower:
            x = functional.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
            if norm == "GN":
                x = functional.group_norm(x, 4, layer.norm.weight, layer.norm.bias)
            elif norm == "BN":
                x = functional.batch_norm(x, None, None, layer.norm[i].weight, layer.norm[i].bias, training=True)
            x = x.relu()
        return x

    logits, deltas, qualities = head(levels)
    for i, level in enumerate(levels):
        of_class, of_box = through(head.class_tower, level, i), through(head.box_tower, level, i)
        of_quality = of_box if quality == "box" else of_class
        for got, x, conv in (
            (logits[i], of_class, head.logits),
            (deltas[i], of_box, head.deltas),
            (qualities[i], of_quality, head.quality),
        ):
            torch.testing.assert_close(got, functional.conv2d(x, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("quality", ["box", "class"])
def test_a_level_may_be_a_pair_for_classes_and_for_boxes(quality):
    head = DenseHead(8, 2, num_levels=2, num_convs=1, quality=quality)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    of_classes, of_boxes = pyramid(6, 5, levels=2), pyramid(6, 5, levels=2)
    logits, deltas, qualities = head(list(zip(of_classes, of_boxes, strict=True)))
    want_classes, want_boxes = head(of_classes), head(of_boxes)
    for i in range(2):
        assert torch.equal(logits[i], want_classes[0][i])
        assert torch.equal(deltas[i], want_boxes[1][i])
        assert torch.equal(qualities[i], (want_boxes if quality == "box" else want_classes)[2][i])
        assert not torch.equal(logits[i], want_boxes[0][i])


def test_predictions_are_float32_at_least():
    levels = pyramid(4, 4, levels=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = DenseHead(8, 2, quality="box")(levels)
    assert all(level.dtype == torch.float32 for kind in out for level in kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"num_anchors": 0}, "num_anchors: expected at least 1, got 0"),
        ({"num_levels": 0}, "num_levels: expected at least 1, got 0"),
        ({"num_convs": -1}, "num_convs: expected at least 0, got -1"),
        ({"prior_prob": 1.0}, "prior_prob: expected a probability between 0 and 1, got 1.0"),
        ({"kernel_size": 2}, "kernel_size: expected an odd number, got 2"),
        ({"norm": "LN"}, "norm: expected one of '', 'GN', 'BN', 'SyncBN', got 'LN'"),
        ({"norm": "GN", "num_convs": 1, "norm_groups": 3}, "norm_groups: expected a divisor of the 8 channels, got 3"),
        ({"quality": "both"}, "quality: expected 'box', 'class' or None, got 'both'"),
    ],
)
def test_names_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        DenseHead(8, **{"num_classes": 2, **options})
