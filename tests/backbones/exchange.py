"""Both engines with one configuration: the same losses from the same weights, which each reads from the other."""

import torch
from torch.testing import assert_close

from tests.test_contract import Detectron2, Torchvision


def assert_engines_agree(file, options, path, *, size=(64, 96), noise=0.01, all_learn=True):
    """Losses of one image of this (height, width), with weights moved by noise, saved to the file by one engine each.

    With `all_learn` every parameter that is trained has a gradient.
    """
    ours, theirs = Torchvision(file, options), Detectron2(file, options)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    targets = [(torch.tensor([[5.0, 6, 60, 50]]), torch.tensor([1]))]
    for source, other in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        source.save(path)
        other.load(path)
        expected, got = source.losses([image], targets), other.losses([image], targets)
        assert set(got) == set(expected)
        for loss, value in expected.items():
            assert_close(got[loss], value, rtol=1e-4, atol=1e-5)
    if all_learn:
        sum(expected.values()).backward()
        assert [key for key, p in theirs.model.named_parameters() if p.requires_grad and p.grad is None] == []
