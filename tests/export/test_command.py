"""``dyhead export``."""

from types import SimpleNamespace

import pytest
import torch

from dyhead import cli
from dyhead.config import ConfigError
from dyhead.export import command
from tests.export.comparison import assert_same_detections


@pytest.fixture
def loaded(model, monkeypatch):
    """What `load_detector` was called with; it returns the small detector."""
    calls = []
    inputs = SimpleNamespace(FORMAT="BGR", MIN_SIZE_TEST=64, MAX_SIZE_TEST=96)
    cfg = SimpleNamespace(INPUT=inputs, MODEL=SimpleNamespace(PIXEL_MEAN=[1.0, 2.0, 3.0]))
    detector = SimpleNamespace(model=model, cfg=cfg, classes=SimpleNamespace(names=["ant", "bee", "cow"]))

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return detector

    monkeypatch.setattr(command, "load_detector", load)
    return calls


def test_a_run_becomes_a_file(loaded, model, images, tmp_path, capsys):
    out = tmp_path / "folder/detector.pt2"
    assert cli.main(["export", "output/run", str(out), "--size", "48x64", "--opts", "MODEL.X", "1"]) == 0
    assert loaded == [(("output/run", None), {"opts": ["MODEL.X", "1"], "device": "cpu", "engine": "auto"})]
    printed = capsys.readouterr().out
    assert "images (N, 3, H, W), float32, 0 to 255, BGR" in printed
    assert "boxes, scores, labels" in printed
    assert str(out) in printed
    batch = images(1, 48, 64)
    with torch.no_grad():
        assert_same_detections(torch.export.load(out).module()(batch), model(list(batch)))


def test_a_file_that_is_there_is_told_before_anything_is_loaded(loaded, tmp_path, capsys):
    (tmp_path / "x.pt2").write_text("mine")
    assert cli.main(["export", "output/run", str(tmp_path / "x.pt2")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'x.pt2'}: exists and is not overwritten\n"
    assert not loaded


def test_what_cannot_be_loaded_is_told(monkeypatch, tmp_path, capsys):
    def load(*args, **kwargs):
        raise ConfigError("output/run: no")

    monkeypatch.setattr(command, "load_detector", load)
    assert cli.main(["export", "output/run", str(tmp_path / "x.pt2")]) == 1
    assert capsys.readouterr().err == "error: output/run: no\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "48", "expected HEIGHTxWIDTH such as 800x1344, or any, got '48'"),
        ("--size", "0x3", "expected HEIGHTxWIDTH such as 800x1344, or any, got '0x3'"),
        ("--batch", "-1", "expected a number of at least 1, or any, got '-1'"),
        ("--opset", "17", "invalid choice"),
        ("--output", "masks", "invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["export", "output/run", "x.onnx", f"{option}={value}"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
