"""Random numbers that depend on where in a training they are drawn, so that a resumed run draws the same again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Random numbers of different use come from different streams.
_ORDER, _AUGMENTATION, _SAMPLING = range(3)


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """What shuffles the images of an epoch."""
    return np.random.default_rng([_ORDER, seed, epoch])


def augmentation_rng(seed: int, *position: int) -> np.random.Generator:
    """What augments the image at a position of the training's stream."""
    return np.random.default_rng([_AUGMENTATION, seed, *position])


def seed_sampling(seed: int, iteration: int, rank: int) -> None:
    """Seed what the model draws in an iteration on the device of a rank, in PyTorch."""
    state = np.random.SeedSequence([_SAMPLING, seed, iteration, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


@contextmanager
def global_augmentation_rng(seed: int, *position: int) -> Iterator[None]:
    """As :func:`augmentation_rng`, for code that draws from NumPy's and Python's global generators, as Detectron2 does.

    What else draws from them goes on as if nothing had been drawn.
    """
    ours, others = np.random.get_state(), random.getstate()  # noqa: NPY002
    drawn = np.random.SeedSequence([_AUGMENTATION, seed, *position]).generate_state(4)
    np.random.seed(drawn)  # noqa: NPY002
    random.seed(drawn.tobytes())
    try:
        yield
    finally:
        np.random.set_state(ours)  # noqa: NPY002
        random.setstate(others)
