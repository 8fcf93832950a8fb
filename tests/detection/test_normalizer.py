import pytest
import torch
from torch import nn

from dyhead.detection.normalizer import KINDS, LossNormalizer

BATCHES = [[3, 0], [0, 0], [40, 2], [7, 7]]


@pytest.mark.parametrize(
    ("kind", "want"), [("positives", [3, 1, 42, 14]), ("positives_per_image", [3 + 1, 1 + 1, 42, 14])]
)
def test_counts_positives(kind, want):
    normalizer = LossNormalizer(kind)
    got = [normalizer(torch.tensor(batch)).item() for batch in BATCHES]
    assert got == want
    assert not normalizer.state_dict()


def test_a_moving_average_moves_over_several_steps():
    normalizer = LossNormalizer("moving_average", initial=50)
    average = 50.0
    for batch in BATCHES * 3:
        average = 0.9 * average + 0.1 * max(sum(batch), 1)
        got = normalizer(torch.tensor(batch))
        assert got.item() == pytest.approx(average, rel=1e-6)
    assert normalizer.state_dict()["average"].item() == pytest.approx(average, rel=1e-6)


def test_what_was_returned_does_not_move_on():
    normalizer = LossNormalizer("moving_average")
    first = normalizer(torch.tensor([10]))
    before = first.item()
    normalizer(torch.tensor([500]))
    assert first.item() == before


def test_the_average_goes_on_from_a_checkpoint():
    trained, resumed = (nn.Sequential(LossNormalizer("moving_average")) for _ in range(2))
    for batch in BATCHES:
        trained[0](torch.tensor(batch))
    resumed.load_state_dict(trained.state_dict())
    assert resumed[0](torch.tensor([9])) == trained[0](torch.tensor([9]))


def test_a_checkpoint_without_the_average_leaves_it_at_its_start():
    model, other = nn.Sequential(LossNormalizer("moving_average", 30)), nn.Sequential(LossNormalizer("positives"))
    checkpoint = other.state_dict()
    model.load_state_dict(checkpoint)
    assert model[0].average == 30
    assert not checkpoint


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"moving_average"}))
def test_a_checkpoint_with_an_average_fits_one_without(kind):
    model, other = nn.Sequential(LossNormalizer(kind)), nn.Sequential(LossNormalizer("moving_average"))
    checkpoint = other.state_dict()
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == ["0.average"]


def test_names_an_unknown_kind():
    with pytest.raises(
        ValueError, match="kind: expected one of moving_average, positives, positives_per_image, got 'mean'"
    ):
        LossNormalizer("mean")
