"""The command line: which engine runs, what it is given, and how it fails."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dyhead import cli
from dyhead.runs import command
from dyhead.runs.engines import choose_engine

ROOT = Path(__file__).parents[2]
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
QUICKSTART = str(ROOT / "configs/quickstart/fcos_dyhead_R18_shapes.yaml")


@pytest.fixture
def parsed():
    """What becomes of a command line."""

    def parse(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return parser.parse_args(words)

    return parse


@pytest.fixture
def installed(monkeypatch):
    """Sets whether Detectron2 seems to be installed."""

    def set_installed(value):
        found = importlib.util.find_spec

        def find_spec(name, *args):
            return (object() if value else None) if name == "detectron2" else found(name, *args)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return set_installed


@pytest.mark.parametrize(
    ("asked", "present", "engine"),
    [
        ("auto", True, "detectron2"),
        ("auto", False, "torchvision"),
        ("torchvision", True, "torchvision"),
        ("detectron2", False, "detectron2"),
    ],
)
def test_engine_is_the_one_asked_for_or_the_one_there(installed, asked, present, engine):
    installed(present)
    assert choose_engine(asked) == engine


def test_overrides_follow_the_flags(parsed):
    args = parsed("--config-file", "a.yaml", "--resume", "SOLVER.MAX_ITER", "1")
    assert (args.config_file, args.resume, args.opts) == ("a.yaml", True, ["SOLVER.MAX_ITER", "1"])
    assert (args.eval_only, args.num_gpus, args.num_machines, args.machine_rank) == (False, 1, 1, 0)
    assert args.dist_url.startswith("tcp://127.0.0.1:")


def test_onednn_keeps_the_kernels_of_many_sizes(monkeypatch):
    key = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(key, "7")
    assert command.main(["--config-file", "none.yaml"]) != 0
    assert os.environ[key] == "7"
    monkeypatch.delenv(key)
    command.main(["--config-file", "none.yaml"])
    assert int(os.environ[key]) > 1024


def test_what_a_user_did_wrong_is_told_without_a_traceback(capsys):
    assert command.main(["--engine", "torchvision", "--config-file", "none.yaml"]) == 1
    assert capsys.readouterr().err == "error: config file none.yaml: no such file\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["SOLVER.MAX_ITER", "1", "--resume"],
            "overrides: expected KEY VALUE pairs, got --resume; options stand before",
        ),
        (["SOLVER.MAX_ITER"], "overrides: expected KEY VALUE pairs, got 1 words: SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER=1"], "overrides: expected KEY VALUE pairs, got SOLVER.MAX_ITER=1; write SOLVER.MAX_ITER 1"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_words_that_are_no_overrides_are_told(capsys, engine, words, message):
    assert command.main(["--engine", engine, "--config-file", QUICKSTART, *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_is_a_file_is_told(capsys, engine, tmp_path):
    (tmp_path / "file").touch()
    words = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "file")]
    assert command.main(["--engine", engine, "--config-file", QUICKSTART, *words]) == 1
    assert "error: OUTPUT_DIR" in capsys.readouterr().err


def test_the_config_file_may_be_in_the_home_folder(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parsed("--config-file", "~/a.yaml")
    assert args.config_file == "/home/someone/a.yaml"


def test_absent_detectron2_is_told_with_the_way_to_install_it(installed, capsys):
    installed(False)
    assert command.main(["--engine", "detectron2", "--config-file", QUICKSTART]) == 1
    error = capsys.readouterr().err
    assert "Detectron2 is not installed" in error
    assert "git+https://github.com/facebookresearch/detectron2.git" in error


@pytest.mark.parametrize(
    "argv", [[], ["--config-file", "a.yaml", "--bogus"], ["--config-file", "a.yaml", "--engine", "x"]]
)
def test_unknown_arguments_are_refused(argv):
    with pytest.raises(SystemExit) as error:
        command.main(argv)
    assert error.value.code == 2


def test_a_config_file_behind_the_overrides_is_told(capsys):
    with pytest.raises(SystemExit):
        command.main(["SOLVER.MAX_ITER", "1", "--config-file", "a.yaml"])
    assert "--config-file is required, before the first KEY VALUE" in capsys.readouterr().err


def test_train_net_and_the_subcommand_are_one(capsys):
    words = ["--engine", "torchvision", "--config-file", "none.yaml"]
    assert cli.main(["train", *words]) == 1
    told = capsys.readouterr()
    assert told.err == "error: config file none.yaml: no such file\n"
    program = [sys.executable, str(ROOT / "train_net.py"), *words]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, told.out)
    assert run.stderr.endswith(told.err)  # after PyTorch's warnings, if any
    with pytest.raises(SystemExit) as refused:
        cli.main(["train", "SOLVER.MAX_ITER", "1"])
    assert refused.value.code == 2
    assert "--config-file is required, before the first KEY VALUE" in capsys.readouterr().err
