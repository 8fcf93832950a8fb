"""One run at a time in OUTPUT_DIR, and what changed since the last one."""

import argparse
import errno
import logging
import multiprocessing
import os
import platform

import pytest

from dyhead.config import ConfigError, load_config
from dyhead.runs.output_dir import claimed, write_config
from dyhead.torchvision import get_cfg


def arguments(**flags):
    return argparse.Namespace(**({"eval_only": False, "resume": False, "machine_rank": 0} | flags))


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "a" / "run")
    return cfg


def test_a_second_run_is_refused_while_the_first_lasts(cfg):
    for flags in ({}, {"resume": True}, {"eval_only": True}):
        with claimed(cfg, arguments()):
            found = multiprocessing.get_context("fork").Queue()
            process = multiprocessing.get_context("fork").Process(target=_claim, args=(cfg, arguments(**flags), found))
            process.start()
            message = found.get(timeout=20)
            process.join()
        assert message.startswith(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: a run is writing to it now")
        assert f"(process {os.getpid()} on {platform.node()})" in message
        assert os.listdir(cfg.OUTPUT_DIR) == []
    with claimed(cfg, arguments()):
        pass


def test_an_error_and_a_lock_left_behind_free_the_folder(cfg):
    with pytest.raises(ZeroDivisionError), claimed(cfg, arguments()):
        raise ZeroDivisionError
    with open(os.path.join(cfg.OUTPUT_DIR, ".lock"), "w") as file:  # of a process that was killed
        file.write("process 1 on elsewhere")
    with claimed(cfg, arguments()):
        pass


@pytest.mark.parametrize("name", ["last_checkpoint", "metrics.json", "model_final.pth", "model_0000019.pth"])
def test_a_run_is_not_overwritten(cfg, name):
    os.makedirs(cfg.OUTPUT_DIR)
    with open(os.path.join(cfg.OUTPUT_DIR, name), "w"):
        pass
    message = rf"holds a run already \({name}\).*--resume.*another OUTPUT_DIR"
    with pytest.raises(ConfigError, match=message), claimed(cfg, arguments()):
        pytest.fail("went on")
    with claimed(cfg, arguments(eval_only=True)):
        pass
    if name.startswith("model"):
        message = rf"--resume: .* holds checkpoints \({name}\), but no last_checkpoint"
        with pytest.raises(ConfigError, match=message), claimed(cfg, arguments(resume=True)):
            pytest.fail("went on")
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w"):
        pass
    with claimed(cfg, arguments(resume=True)):
        pass


def test_folders_that_cannot_be_written_to_are_named(cfg, tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*run: cannot be written to"), claimed(cfg, arguments()):
        pytest.fail("went on")
    with claimed(cfg, arguments(machine_rank=1)):  # writes nothing
        pass


def test_a_disk_that_fills_up_is_told_as_such(cfg):
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*run: .*No space left.*--resume"), claimed(cfg, arguments()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), claimed(cfg, arguments()):  # not the disk's fault
        os.stat("/nowhere/file")


@pytest.mark.parametrize("before", [None, "", "a text", "- 1", "a: b: c", "\0"])
def test_changed_keys_are_logged(cfg, caplog, before):
    caplog.set_level(logging.INFO)
    os.makedirs(cfg.OUTPUT_DIR)
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if before is not None:
        with open(path, "w") as file:
            file.write(before)
    write_config(cfg)
    write_config(cfg)
    assert not caplog.messages
    cfg.SOLVER.STEPS, cfg.SOLVER.WEIGHT_DECAY = (7, 8), 0.5
    write_config(cfg)
    assert caplog.messages == [
        "Changed since the run was last started: SOLVER.STEPS [30000] -> [7, 8], SOLVER.WEIGHT_DECAY 0.0001 -> 0.5"
    ]
    again = get_cfg()
    load_config(again, path)
    assert again.dump() == cfg.dump()


def _claim(cfg, args, found):
    try:
        with claimed(cfg, args):
            found.put("went on")
    except ConfigError as error:
        found.put(str(error))
