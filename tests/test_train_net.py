"""The command line: which engine runs, what it is given, and how it fails."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
QUICKSTART = str(ROOT / "configs/quickstart/fcos_dyhead_R18_shapes.yaml")


@pytest.fixture
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_engine_is_the_one_asked_for_or_the_one_there(train_net, installed, asked, present, engine):
    installed(present)
    assert train_net.choose_engine(asked) == engine


def test_overrides_follow_the_flags(train_net):
    args = train_net.argument_parser().parse_args(["--config-file", "a.yaml", "--resume", "SOLVER.MAX_ITER", "1"])
    assert (args.config_file, args.resume, args.opts) == ("a.yaml", True, ["SOLVER.MAX_ITER", "1"])
    assert (args.eval_only, args.num_gpus, args.num_machines, args.machine_rank) == (False, 1, 1, 0)
    assert args.dist_url.startswith("tcp://127.0.0.1:")


def test_what_a_user_did_wrong_is_told_without_a_traceback(train_net, capsys):
    assert train_net.main(["--engine", "torchvision", "--config-file", "none.yaml"]) == 1
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
def test_words_that_are_no_overrides_are_told(train_net, capsys, engine, words, message):
    assert train_net.main(["--engine", engine, "--config-file", QUICKSTART, *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_is_a_file_is_told(train_net, capsys, engine, tmp_path):
    (tmp_path / "file").touch()
    words = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "file")]
    assert train_net.main(["--engine", engine, "--config-file", QUICKSTART, *words]) == 1
    assert "error: OUTPUT_DIR" in capsys.readouterr().err


def test_the_config_file_may_be_in_the_home_folder(train_net, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = train_net.argument_parser().parse_args(["--config-file", "~/a.yaml"])
    assert args.config_file == "/home/someone/a.yaml"


def test_absent_detectron2_is_told_with_the_way_to_install_it(train_net, installed, capsys):
    installed(False)
    assert train_net.main(["--engine", "detectron2", "--config-file", QUICKSTART]) == 1
    error = capsys.readouterr().err
    assert "Detectron2 is not installed" in error
    assert "git+https://github.com/facebookresearch/detectron2.git" in error


@pytest.mark.parametrize(
    "argv", [[], ["--config-file", "a.yaml", "--bogus"], ["--config-file", "a.yaml", "--engine", "x"]]
)
def test_unknown_arguments_are_refused(train_net, argv):
    with pytest.raises(SystemExit) as error:
        train_net.main(argv)
    assert error.value.code == 2


def test_a_config_file_behind_the_overrides_is_told(train_net, capsys):
    with pytest.raises(SystemExit):
        train_net.main(["SOLVER.MAX_ITER", "1", "--config-file", "a.yaml"])
    assert "--config-file is required, before the first KEY VALUE" in capsys.readouterr().err
