import gzip
import json
from pathlib import Path

import pytest
import torch

KEYS = Path(__file__).parent / "published_keys.json.gz"


@pytest.fixture(scope="session")
def published():
    """By published file: key -> shape."""
    with gzip.open(KEYS) as file:
        return json.load(file)


@pytest.fixture(scope="session")
def state_of():
    """`state_of({key: shape})`: a state dict in which every tensor is filled with the number of its key."""

    def build(shapes):
        return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(shapes.items())}

    return build


@pytest.fixture
def check_account():
    """`check_account(state, conversion)`: each key is renamed, dropped or left over, once, and each tensor arrived."""

    def check(state, conversion):
        accounts = (conversion.renamed, conversion.dropped, conversion.left_over)
        assert sorted(key for account in accounts for key in account) == sorted(state)
        arrived = {name.partition("[")[0] for name in conversion.renamed.values()} | set(conversion.added)
        assert arrived == set(conversion.state)
        assert all(conversion.dropped.values())
        assert all(conversion.left_over.values())

    return check
