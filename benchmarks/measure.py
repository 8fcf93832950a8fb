"""How peers are compared: each case in its own process, peers in turn, medians and quartiles; memory separately."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from dyhead.evaluation.benchmark import resident_growth

#: Prepares one peer in one case: `build(case, peer, device)` creates the inputs and returns a function that computes
#: once. Results of the functions (tensors or arrays) are compared between peers, unless they are None.
Build = Callable[[Any, str, torch.device], Callable[[], Any]]

# Forked from a server that has imported PyTorch but not used it: a new process within a tenth of a second.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torchvision", "dyhead.evaluation", "dyhead.layers"])

# A sample takes at least this long; shorter calls are repeated and averaged.
_SAMPLE_SECONDS = 0.01
# Between peers: worker threads of the previous one (OpenMP, ONNX Runtime) spin for a while before they sleep.
_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 1.0
_LEAST_ROUNDS = 3


class Unavailable(Exception):
    """A peer that is not installed or does not support this case; the message says which."""


def in_fresh_process(function: Callable, *arguments: Any, **options: Any) -> Any:
    """Runs `function(*arguments, **options)` in a new process, which then ends."""
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        return pool.submit(function, *arguments, **options).result()


def sample_times(
    build: Build,
    case: Any,
    peers: list[str],
    *,
    device: str,
    threads: int,
    repeats: int,
    seconds: float,
    same: list[str],
    tolerance: float,
) -> tuple[dict[str, list[float]], dict[str, str], float | None]:
    """Times the peers of a case in turn, round after round, so that the machine's noise affects all of them alike.

    Args:
        build, case: see `Build`.
        peers: the peers.
        device: "cpu" or "cuda".
        threads: number of PyTorch's threads.
        repeats: number of rounds; every peer is timed once per round.
        seconds: no further round starts after this time (three always run).
        same: peers whose results must be equal before anything is timed.
        tolerance: largest difference between these results, relative to the largest value.

    Returns:
        For each peer the seconds per call in each round; for unavailable peers the reason; and the number of CPUs that
        other processes kept busy meanwhile, or None where the system does not report it.

    Raises:
        AssertionError: two of `same` have different results.
    """
    torch.set_num_threads(threads)
    place = torch.device(device)
    calls, reasons, results = {}, {}, {}
    for peer in peers:
        try:
            call = build(case, peer, place)
            if peer in same:
                results[peer] = _arrays(call())
            else:
                call()
        except Unavailable as reason:
            reasons[peer] = str(reason)
            continue
        calls[peer] = call
    _check_equal(results, tolerance)
    del results
    counts = {peer: max(1, math.ceil(_SAMPLE_SECONDS / _time(call, 1, place))) for peer, call in calls.items()}

    samples: dict[str, list[float]] = {peer: [] for peer in calls}
    busy = _busy_seconds()
    begin, own = time.perf_counter(), time.process_time()
    for done in range(repeats):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for peer, call in calls.items():
            _wait_for_threads()
            samples[peer].append(_time(call, counts[peer], place))
    others = None
    if busy is not None:
        others = (_busy_seconds() - busy - (time.process_time() - own)) / (time.perf_counter() - begin)
    return samples, reasons, others


def wait_for_rest(seconds: float) -> None:
    """Waits until all processes together use less than a tenth of a CPU, at most `seconds`."""
    end = time.perf_counter() + seconds
    while (busy := _busy_seconds()) is not None and (begin := time.perf_counter()) < end:
        time.sleep(2)
        if _busy_seconds() - busy < 0.1 * (time.perf_counter() - begin):
            return


def peak_memory(build: Build, case: Any, peer: str, warm: Any, *, device: str, threads: int) -> float | None:
    """Peak MiB of one call of a peer, above its inputs and weights.

    On a CPU it is the growth of resident memory of the process, which should be new; on CUDA that of PyTorch's
    allocator. One call of the case `warm` comes first, for what is loaded once.
    None where the system does not report memory or the peer is unavailable.
    """
    torch.set_num_threads(threads)
    place = torch.device(device)
    try:
        call = build(case, peer, place)
        if warm == case:
            call()
        else:
            build(warm, peer, place)()
    except Unavailable:
        return None
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        start = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        call()
        torch.cuda.synchronize(place)
        return (torch.cuda.max_memory_allocated(place) - start) / 2**20
    with resident_growth(interval=0.0005) as growth:
        kept = call()
    del kept
    return growth[0] / 2**20 if growth else None


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def _wait_for_threads() -> None:
    """Waits until no thread of this process is computing."""
    end = time.perf_counter() + _LONGEST_PAUSE_SECONDS
    while time.perf_counter() < end:
        begin = time.process_time()
        time.sleep(_PAUSE_SECONDS)
        if time.process_time() - begin < 0.1 * _PAUSE_SECONDS:
            return


def _time(call: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the system started, where Linux reports them."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupts, soft, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def _arrays(result: Any) -> list[np.ndarray]:
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [np.asarray(p.detach().float().cpu() if isinstance(p, torch.Tensor) else p) for p in parts]


def _check_equal(results: dict[str, list[np.ndarray]], tolerance: float) -> None:
    (first, truth), *others = results.items() or [("", [])]
    for peer, values in others:
        for i, (expected, value) in enumerate(zip(truth, values, strict=True)):
            error = np.abs(expected - value).max() / max(np.abs(expected).max(), 1e-30)
            if not error <= tolerance:
                raise AssertionError(f"{first} and {peer}: result {i} differs by {error:.1e}, expected {tolerance:.0e}")
