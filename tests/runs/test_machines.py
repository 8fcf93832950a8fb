"""Machines that watch each other, as objects in one process: signs of life, silence, and errors."""

import argparse
import os
import platform
import socket
import time

import pytest

from dyhead.config import ConfigError
from dyhead.runs import machines
from dyhead.runs.machines import MachineLostError, Watch


@pytest.fixture(autouse=True)
def _same_environment_afterwards():
    """Machines in one process do not leave in the order that restores it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machines, "_BEAT", 0.05)
    monkeypatch.setattr(machines, "_SILENCE", 2.0)
    monkeypatch.setattr(machines, "_SILENCE_AFTER_ERROR", 1.0)


@pytest.fixture
def watch():
    """`watch(rank)`: that machine's of three."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        url = f"tcp://127.0.0.2:{probe.getsockname()[1]}"
    return lambda rank, count=3: Watch(
        argparse.Namespace(num_machines=count, machine_rank=rank, dist_url=url), f"output_{rank}"
    )


def until_seen(one, *ranks):
    while not set(ranks) <= set(one._last):
        time.sleep(0.01)


def silent(one):
    """The same as a machine that has no power: it says nothing more, and not that it ends."""
    one._ended.set()
    one._status = b"still alive, by the last sign"


def test_machines_that_are_done_miss_nobody(watch):
    before = dict(os.environ)
    with watch(0) as first:
        with watch(1) as second:
            assert os.environ["MASTER_PORT"] == str(first._port)  # where PyTorch's processes meet
            until_seen(first, 1)
            until_seen(second, 0)
        with watch(2):  # begins when another has ended
            until_seen(first, 2)
        first.raise_if_lost()
    assert first._lost is second._lost is None
    assert dict(os.environ) == before


@pytest.mark.parametrize("lost", [0, 1])
def test_silence_is_told_to_all_with_the_name_of_the_machine(watch, lost):
    all_three = [watch(rank) for rank in range(3)]
    for one in all_three:
        one.__enter__()
    for one in all_three:
        until_seen(one, *({0, 1, 2} - {one._rank}))
    silent(all_three[lost])
    for one in all_three:
        if one._rank != lost:
            with pytest.raises(MachineLostError) as raised:
                one.raise_if_lost()
            assert str(raised.value).startswith(f"the machine of rank {lost} ({platform.node()}) has ended or does not")
            assert f"--resume go on from the last checkpoint in OUTPUT_DIR output_{one._rank}" in str(raised.value)
            one.__exit__(MachineLostError)
    all_three[lost].__exit__(None)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_machine_that_ends_with_an_error_is_lost_at_once(watch, failing, monkeypatch):
    monkeypatch.setattr(machines, "_SILENCE_AFTER_ERROR", 60)
    other = watch(1 - failing, 2)
    for one in sorted((other, watch(failing, 2)), key=lambda one: one._rank):
        one.__enter__()
        if one is not other:
            ends = one
    until_seen(other, failing)
    until_seen(ends, 1 - failing)
    ends.__exit__(ValueError)
    with pytest.raises(MachineLostError, match=f"of rank {failing} "):
        other.raise_if_lost()
    other.__exit__(MachineLostError)


def test_the_store_that_does_not_answer_is_its_machine_lost(watch):
    with watch(0) as first, watch(1) as second:
        until_seen(second, 0)
        second._look = lambda store: time.sleep(9)  # as a connection without an answer
        with pytest.raises(MachineLostError, match="of rank 0 "):
            second.raise_if_lost()
        silent(first)


def test_a_machine_that_was_itself_suspended_misses_nobody(watch, monkeypatch):
    with watch(0, 2) as first, watch(1, 2) as second:
        until_seen(first, 1)
        until_seen(second, 0)
        clock, jump = time.monotonic, 1000
        monkeypatch.setattr(machines.time, "monotonic", lambda: clock() + jump)
        time.sleep(0.3)
        assert first._lost is second._lost is None


def test_an_address_that_is_in_use_is_told(watch):
    one = watch(0)
    with socket.socket() as other:
        other.bind(("0.0.0.0", one._port))
        other.listen()
        with pytest.raises(ConfigError, match=rf"--dist-url 127\.0\.0\.2:{one._port}: expected a free port"):
            one.__enter__()


def test_one_machine_watches_nothing(watch):
    with watch(0, 1) as alone:
        alone.raise_if_lost()
