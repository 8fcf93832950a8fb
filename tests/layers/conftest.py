import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_pyramid():
    """levels(height, width): a list of random levels, each the one before halved with rounding up."""

    def make(height, width, *, levels=3, channels=8, batch=2, dtype=torch.float64):
        sizes = [(height, width)]
        while len(sizes) < levels:
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        return [torch.randn(batch, channels, *size, dtype=dtype) for size in sizes]

    return make


@pytest.fixture
def randomize():
    """Gives every parameter of a module a random value, so that nothing hides behind a zero."""

    def apply(module, std=0.3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(std * torch.randn_like(parameter))
        return module

    return apply
