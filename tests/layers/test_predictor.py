import pytest
import torch
from torch.nn import functional

from dyhead.layers import DensePredictor


def test_predicts_on_every_level(make_pyramid):
    levels = make_pyramid(9, 7, dtype=torch.float32)
    out = DensePredictor(8, num_classes=5, num_anchors=3, quality=True)(levels)
    for level, (logits, deltas, quality) in zip(levels, out, strict=True):
        size = level.shape[2:]
        assert logits.shape == (2, 15, *size)
        assert deltas.shape == (2, 12, *size)
        assert quality.shape == (2, 3, *size)


def test_has_no_quality_unless_asked(make_pyramid):
    predictor = DensePredictor(8, num_classes=5)
    assert all(quality is None for _, _, quality in predictor(make_pyramid(4, 4, dtype=torch.float32)))
    assert {name.split(".")[0] for name, _ in predictor.named_parameters()} == {"logits", "deltas"}


def test_starts_at_the_prior(make_pyramid):
    levels = make_pyramid(32, 32, levels=1, channels=64, dtype=torch.float32)
    ((logits, deltas, _),) = DensePredictor(64, num_classes=5, prior_prob=0.02)(levels)
    assert logits.sigmoid().median().item() == pytest.approx(0.02, rel=0.1)
    assert deltas.mean().item() == pytest.approx(0, abs=0.05)
    assert deltas.std().item() == pytest.approx(0.01 * (9 * 64) ** 0.5, rel=0.2)  # 9 * 64 terms of std 0.01


def test_the_kernel_size_is_that_of_the_convolutions(make_pyramid):
    predictor = DensePredictor(8, num_classes=2, kernel_size=1)
    (level,) = make_pyramid(5, 4, levels=1, dtype=torch.float32)
    ((logits, _, _),) = predictor([level])
    torch.testing.assert_close(logits, functional.conv2d(level, predictor.logits.weight, predictor.logits.bias))


def test_scales_the_deltas_of_each_level(make_pyramid):
    predictor = DensePredictor(8, num_classes=2, num_levels=3)
    levels = make_pyramid(8, 8, dtype=torch.float32)
    before = predictor(levels)
    with torch.no_grad():
        predictor.delta_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for i, (old, new) in enumerate(zip(before, predictor(levels), strict=True)):
        torch.testing.assert_close(new[1], (i + 1) * old[1])
        torch.testing.assert_close(new[0], old[0])
    with pytest.raises(ValueError, match="levels: expected 3, got 2"):
        predictor(levels[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"num_anchors": 0}, "num_anchors: expected at least 1, got 0"),
        ({"num_levels": 0}, "num_levels: expected at least 1, or None, got 0"),
        ({"prior_prob": 1.0}, "prior_prob: expected a probability between 0 and 1, got 1.0"),
        ({"kernel_size": 2}, "kernel_size: expected an odd number, got 2"),
    ],
)
def test_names_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        DensePredictor(8, **{"num_classes": 2, **options})
