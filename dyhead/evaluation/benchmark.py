"""Speed, memory and size of a detector."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_MIB = 2**20
_CUDA_MEMORY = "peak of PyTorch's CUDA allocator, weights included"
_CPU_MEMORY = "peak resident memory above the start, weights not included"
_NO_MEMORY = "not measured: no /proc/self/statm on this system"


@dataclass(frozen=True)
class Timing:
    """What `measure` found.

    Attributes:
        latency_ms: median time of a call, milliseconds.
        latency_p95_ms: 95th percentile.
        images_per_second: images of all timed calls, divided by their time.
        batch_size: images per call (the largest, if batches differ).
        calls: number of timed calls.
        memory_mib: peak memory, MiB; None where it cannot be measured.
        memory_kind: description of what `memory_mib` measures.
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

    After the warm-up calls, which are not timed, each batch is timed once. Memory on CUDA is the allocator's peak over
    all calls, including weights and everything else it holds. On a CPU it is the growth of the process's resident
    memory during the warm-up calls, sampled every 2 ms. This is a lower bound, tight in a new process: shorter peaks
    are missed, and memory that the allocator kept from earlier work is not counted again.

    Args:
        model_fn: takes one batch; on CUDA it may return before the work is done, since `measure` synchronises.
        batches: its arguments; `len(batch)` is the number of images.
        device: where the model runs; determines synchronisation and what memory means.
        warmup: number of warm-up calls, at least 1, over the first batches (cyclically if there are fewer).

    Raises:
        ValueError: no batches, or no warm-up.
    """
    if not batches or warmup < 1:
        raise ValueError(f"measure: expected at least one batch and one warm-up, got {len(batches)} and {warmup}")
    device = torch.device(device)
    cuda = device.type == "cuda"

    def call(batch: Any) -> None:
        model_fn(batch)
        if cuda:
            torch.cuda.synchronize(device)

    seconds = []
    with torch.no_grad():
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with resident_growth() as growth:
            for i in range(warmup):
                call(batches[i % len(batches)])
        for batch in batches:
            start = time.perf_counter()
            call(batch)
            seconds.append(time.perf_counter() - start)
    if cuda:
        memory, kind = torch.cuda.max_memory_allocated(device) / _MIB, _CUDA_MEMORY
    else:
        memory, kind = (growth[0] / _MIB, _CPU_MEMORY) if growth else (None, _NO_MEMORY)
    return Timing(
        latency_ms=1e3 * float(np.median(seconds)),
        latency_p95_ms=1e3 * float(np.percentile(seconds, 95)),
        images_per_second=sum(map(len, batches)) / sum(seconds),
        batch_size=max(map(len, batches)),
        calls=len(seconds),
        memory_mib=memory,
        memory_kind=kind,
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, including frozen ones, counting shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model_fn: Callable[..., Any], *inputs: Any) -> float:
    """Multiply-adds of one call `model_fn(*inputs)`, in billions: the "GFLOPs" of detection papers and of fvcore.

    Convolutions, matrix products, attention and the operators of `dyhead.ops` are counted; elementwise operators and
    others that `torch.utils.flop_counter` has no formula for are not.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model_fn(*inputs)
    return counter.get_total_flops() / 2 / 1e9


@contextmanager
def resident_growth(interval: float = 0.002) -> Iterator[list[int]]:
    """Samples this process's resident memory; afterwards the list holds the peak growth in bytes, if known."""
    growth: list[int] = []
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns the memory that glibc keeps, so that the start is low
    if not os.path.exists("/proc/self/statm"):
        yield growth
        return
    start = peak = _resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(interval):
            peak = max(peak, _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield growth
    finally:
        stop.set()
        thread.join()
    growth.append(max(peak, _resident()) - start)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
