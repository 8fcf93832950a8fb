"""Signals during a training: noted the first time, at once the second, and left to the main process by its children."""

import os
import pickle
import signal
import threading
import time

import pytest
from torch.utils.data import DataLoader, Dataset

import dyhead.runs.interruption as module
from dyhead.runs.interruption import Interrupted, Interruption, leave_to_main_process


def send(number, process=None):
    os.kill(process or os.getpid(), number)
    time.sleep(0.01)  # Python handles signals between its own instructions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(number, capfd, monkeypatch):
    before = signal.getsignal(number)
    with Interruption(announce=True) as interruption:
        interruption.raise_if(False)
        assert interruption.requested is None
        send(number)
        assert interruption.requested == number
        with pytest.raises(Interrupted) as raised:
            interruption.raise_if(True)
        assert raised.value.number == number
        send(number)  # at the same time: the same
        monkeypatch.setattr(module, "_AGAIN", 0)
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("finishing the iteration") == 1


def test_evaluations_end_at_once():
    with Interruption() as interruption:
        with pytest.raises(Interrupted), interruption.at_once():
            send(signal.SIGINT)
        with pytest.raises(Interrupted), interruption.at_once():  # the signal came before
            pytest.fail("went on")


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_forked_processes_leave_ctrl_c_to_this_one(number, ends):
    with Interruption() as interruption:
        child = os.fork()
        if child == 0:
            time.sleep(0.3)
            os._exit(7)
        time.sleep(0.05)
        send(number, child)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ends
        assert interruption.requested is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_that_load_data_serve_to_the_end(number, start):
    data = Numbers()
    loader = DataLoader(data, num_workers=1, worker_init_fn=leave_to_main_process, multiprocessing_context=start)
    found = []
    for worker, value in loader:
        if not found:
            send(number, int(worker))
        found.append(int(value))
    assert found == [0, 1, 4, 9, 16, 25]


class Numbers(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        time.sleep(0.05)
        return os.getpid(), i * i


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
            send(signal.SIGINT)
            assert interruption.requested is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_handle_no_signals():
    found = []

    def enter():
        with Interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None]


def test_an_interruption_travels_between_processes():
    sent = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM).after(9, "output/run")))
    assert sent.number == signal.SIGTERM
    assert "after iteration 9; OUTPUT_DIR output/run" in str(sent)
    assert "--resume" in str(sent)
