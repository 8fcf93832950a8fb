"""Speed, memory and size of a detector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Timing:
    """What `measure` found.

    Attributes:
        latency_ms: median time of a call, milliseconds.
        latency_p95_ms: 95th percentile.
        images_per_second: images of all timed calls by their time.
        batch_size: images in a call.
        calls: how many calls were timed.
        memory_mib: peak memory, MiB; None where it cannot be measured.
        memory_kind: what that is, in words.
    """

    latency_ms: float
    latency_p95_ms: float
    images_per_second: float
    batch_size: int
    calls: int
    memory_mib: float | None
    memory_kind: str


def measure(
    model_fn: Callable[[Any], Any], batches: Sequence[Any], *, device: torch.device | str = "cpu", warmup: int = 3
) -> Timing:
    """Times `model_fn(batch)` over batches, without gradients.

    Args:
        model_fn: takes one batch; for CUDA it may return before the work is done, `measure` waits for it.
        batches: what to call it with, each once; `len(batch)` is its number of images.
        device: where the model runs: decides what waiting and memory mean.
        warmup: so many calls, over the first batches, come before and are not timed.
    """
    raise NotImplementedError


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model_fn: Callable[..., Any], *inputs: Any) -> float:
    """Multiply-adds of one call `model_fn(*inputs)`, in billions: the "GFLOPs" of detection papers and of fvcore."""
    raise NotImplementedError
