"""Files of a small detector, run by what they are for, against PyTorch."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from dyhead.config import ConfigError
from dyhead.export import DetectorGraph, export, files
from dyhead.ops import library
from tests.export.comparison import assert_same_detections
from tests.export.runtimes import ONNXRUNTIME, OPENVINO, operators, runner

SIZE = 48, 64


@pytest.fixture
def detected(model, images):
    """Two batches and what is in them."""
    with torch.no_grad():
        cases = [(images(number, *SIZE), model(list(images(number, *SIZE)))) for number in (1, 3)]
    assert all(len(found["boxes"]) > 5 for _, of_batch in cases for found in of_batch)
    return cases


def test_onnx_takes_any_batch_and_finds_the_same(model, detected, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript (pip install 'dyhead[export]')")
    path = tmp_path / "detector.onnx"
    graph = export(model, path, batch=None, size=SIZE, opset=22, metadata={"classes": '["a", "b", "c"]'})
    assert graph.names == ("boxes", "scores", "labels")
    used = operators(path)
    assert used["DeformConv"] == 4  # two levels read two each
    assert used["NonMaxSuppression"] == 1
    for runtime in (ONNXRUNTIME, OPENVINO):
        if runtime.installed:
            run = runner(runtime, path)
            for batch, expected in detected:
                assert_same_detections(run([batch]), expected)
    import onnx

    content = onnx.load(path)
    assert {each.key: each.value for each in content.metadata_props}["classes"] == '["a", "b", "c"]'
    assert [each.name for each in (*content.graph.input, *content.graph.output)] == ["images", *graph.names]
    assert {each.domain for each in content.graph.node} == {""}
    # What TensorRT's parser asks of DeformConv.
    for node in content.graph.node:
        if node.op_type == "DeformConv":
            (pads,) = (each.ints for each in node.attribute if each.name == "pads")
            assert list(pads[:2]) == list(pads[2:])


def test_openvinos_own_files_need_nothing_else(model, detected, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript (pip install 'dyhead[export]')")
    pytest.importorskip("openvino", reason="needs openvino (pip install 'dyhead[export]')")
    path = tmp_path / "detector.xml"
    export(model, path, output="levels", size=SIZE)
    assert sorted(os.listdir(tmp_path)) == ["detector.bin", "detector.xml"]
    assert "DeformableConvolution" in path.read_text()
    batch, _ = detected[0]
    with torch.no_grad():
        for got, expected in zip(runner(OPENVINO, path)([batch]), DetectorGraph(model, "levels")(batch), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


LOADED = """
import sys, torch
library, path, images, out = sys.argv[1:]
if library:
    import torchvision
    torch.ops.load_library(library)
run = torch.export.load(path).module()
torch.save([run(x) for x in torch.load(images)], out)
assert not any(name.split(".")[0] == "dyhead" for name in sys.modules)
"""


@pytest.mark.parametrize("plain", [False, True])
def test_pytorchs_files_run_without_the_package(plain, model, detected, tmp_path):
    """With the compiled library, and torchvision for its NMS; plain ones without NMS by PyTorch alone."""
    if not plain and library.PROBLEM is not None:
        pytest.skip("needs the compiled operator")
    path, out = tmp_path / "detector.pt2", tmp_path / "out.pt"
    graph = export(model, path, output="levels" if plain else "detections", batch=None, size=SIZE, plain=plain)
    torch.save([batch for batch, _ in detected], tmp_path / "images.pt")
    built = "" if plain else importlib.import_module("dyhead._C").__file__
    command = [sys.executable, "-c", LOADED, built, path, tmp_path / "images.pt", out]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
    for outputs, (batch, expected) in zip(torch.load(out), detected, strict=True):
        if plain:
            with torch.no_grad():
                torch.testing.assert_close(outputs, graph(batch), rtol=1e-4, atol=1e-4)
        else:
            assert_same_detections(outputs, expected)


def test_any_size_is_any(model, images, tmp_path):
    export(model, tmp_path / "detector.pt2", size=None)
    run = torch.export.load(tmp_path / "detector.pt2").module()
    with torch.no_grad():
        for size in ((32, 96), (80, 48)):
            batch = images(1, *size)
            assert_same_detections(run(batch), model(list(batch)))


def test_a_size_that_tracing_takes_for_a_constant_is_told(model, tmp_path):
    places = model.detector.places
    model.detector.places = lambda predictions: (p := places(predictions))._replace(counts=[len(p.anchors) - 24, 24])
    with pytest.raises(ConfigError, match="while the detector was traced: .*; try a fixed size"):
        export(model, tmp_path / "detector.pt2", size=None)


class TestRefusals:
    def refuse(self, message, model, path, **options):
        with pytest.raises(ConfigError, match=message):
            export(model, path, **options)
        assert not [name for name in os.listdir(path.parent) if name not in ("there.pt2", "there.bin")]

    def test_files_that_are_there(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: True)
        for name, path in (("there.pt2", "there.pt2"), ("there.bin", "there.xml")):
            (tmp_path / name).write_text("mine")
            self.refuse(f"{name}: exists and is not overwritten", model, tmp_path / path)
            assert (tmp_path / name).read_text() == "mine"

    @pytest.mark.parametrize("name", ["detector", "detector.pth", "detector.ONNX", ".onnx"])
    def test_endings_that_say_no_format(self, name, model, tmp_path):
        self.refuse("expected a name that ends with one of .onnx, .xml, .pt2, .aoti.pt2", model, tmp_path / name)

    def test_packages_that_are_missing(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if "onnx" in name else True)
        message = r"x\.xml: needs onnx and onnxscript, not installed \(pip install 'dyhead\[export\]'\)"
        self.refuse(message, model, tmp_path / "x.xml")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch": 0}, "batch: expected an integer of at least 1, got 0"),
            ({"batch": 1.5}, "batch: expected an integer of at least 1, got 1.5"),
            ({"size": (48, -1)}, "width: expected an integer of at least 1, got -1"),
            ({"opset": 18}, "opset: expected 19 to 23, got 18"),
            ({"output": "mask"}, "output: expected one of"),
        ],
        ids=str,
    )
    def test_numbers_that_make_no_sense(self, options, message, model, tmp_path):
        self.refuse(message, model, tmp_path / "x.pt2", **options)

    def test_plain_operators_where_the_format_has_the_operator(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: True)
        self.refuse("plain is for PyTorch's own files", model, tmp_path / "x.onnx", plain=True)

    def test_a_model_in_training(self, model, tmp_path):
        self.refuse("expected one in evaluation mode", model.train(), tmp_path / "x.pt2")

    def test_what_cannot_be_traced_is_said_in_a_sentence(self, model, tmp_path):
        model.backbone.forward = lambda x: {"p3": x[:, :, : int(x.sum())], "p4": x}
        self.refuse("while the detector was traced: .*; try a fixed size", model, tmp_path / "x.pt2")
