import os

import pytest
import torch
from torch import nn

from dyhead.evaluation import benchmark, count_flops, count_parameters, measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the model turns it."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    return now


def test_warm_up_calls_are_not_timed(clock):
    calls = []

    def model(batch):
        calls.append(batch)
        clock[0] += 100 if len(calls) <= 3 else batch[0]

    batches = [[0.010, None], [0.020, None], [0.030, None], [0.040, None], [0.200, None]]
    timing = measure(model, batches, warmup=3)
    assert calls == [*batches[:3], *batches]
    assert timing.latency_ms == pytest.approx(30)
    assert timing.latency_p95_ms == pytest.approx(168)  # 4/5 of the way from the fourth to the last of five
    assert timing.images_per_second == pytest.approx(10 / 0.3)
    assert (timing.batch_size, timing.calls) == (2, 5)


def test_one_batch_is_warmed_up_again_and_again(clock):
    calls = []

    def model(batch):
        calls.append(batch)
        clock[0] += 1

    assert measure(model, ["x"], warmup=4).calls == 1
    assert len(calls) == 5


def test_gradients_are_off():
    states = []
    measure(lambda batch: states.append(torch.is_grad_enabled()), [[0]])
    assert set(states) == {False}


@pytest.mark.parametrize(("batches", "warmup"), [([], 3), ([[0]], 0)])
def test_nothing_to_measure_is_an_error(batches, warmup):
    with pytest.raises(ValueError, match="at least one batch and one warm-up"):
        measure(len, batches, warmup=warmup)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_peak_memory_on_a_cpu_is_that_of_the_calls():
    def model(batch):
        block = torch.ones(batch[0], 2**20, dtype=torch.uint8)
        benchmark.time.sleep(0.05)
        return block[0, 0]

    small, large = (measure(model, [[mib]]) for mib in (1, 300))
    assert small.memory_mib < 100
    assert 295 < large.memory_mib < 400
    assert "resident" in large.memory_kind


@pytest.mark.cuda
def test_peak_memory_and_time_on_cuda():
    size = 4096
    weight = torch.randn(size, size, device="cuda")

    def model(batch):
        for _ in range(20):
            batch = batch @ weight
        return batch

    timing = measure(model, [torch.randn(size, size, device="cuda")] * 3, device="cuda")
    assert timing.memory_mib > 3 * size * size * 4 / 2**20
    assert "CUDA" in timing.memory_kind
    # 2.7e12 operations: less than 1 ms would be a launch, not the work.
    assert timing.latency_ms > 1


def test_multiply_adds_are_those_of_the_definition():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    expected = 3 * 9 * 8 * 16 * 16 + 8 * 16 * 16 * 10
    assert count_flops(net, torch.rand(1, 3, 32, 32)) == pytest.approx(expected / 1e9)


def test_shared_parameters_count_once_and_frozen_ones_too():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    second.weight = first.weight
    first.requires_grad_(False)
    assert count_parameters(nn.ModuleList([first, second])) == 12 + 3 + 3
