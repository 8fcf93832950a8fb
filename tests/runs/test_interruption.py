"""Signals during a training: noted the first time, at once the second, and left to the main process by its children."""

import os
import pickle
import signal
import threading
import time

import pytest

from dyhead.runs.interruption import Interrupted, Interruption


def send(number, process=None):
    os.kill(process or os.getpid(), number)
    time.sleep(0.01)  # Python handles signals between its own instructions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(number, capfd):
    before = signal.getsignal(number)
    with Interruption(announce=True) as interruption:
        interruption.raise_if(False)
        assert interruption.requested is None
        send(number)
        assert interruption.requested == number
        with pytest.raises(Interrupted) as raised:
            interruption.raise_if(True)
        assert raised.value.number == number
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
