"""What is read from a checkpoint file, and what is refused."""

import io
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dyhead.checkpoints import CheckpointError, find_state, read_file, read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(4)}


def same(found, expected=STATE):
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {}}, "iteration": 3},
        lambda state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        lambda state: {"ema": {"module": state}, "updates": 7},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_weights_are_found_in_any_usual_file(tmp_path, suffix, wrap):
    torch.save(wrap(STATE), tmp_path / f"w.{suffix}")
    assert same(read_state(tmp_path / f"w.{suffix}"))


def test_the_model_is_preferred_to_its_moving_average():
    average = {key: value + 1 for key, value in STATE.items()}
    assert same(find_state({"ema": average, "state_dict": STATE}, "x"))
    assert same(find_state({"state_dict": average, "model": STATE}, "x"))


def test_module_is_taken_off_only_where_all_keys_have_it():
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert find_state(state, "x").keys() == state.keys()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_detectron2s_pickles_hold_arrays(tmp_path, protocol):
    content = {"model": {key: value.numpy() for key, value in STATE.items()}, "__author__": "me", "n": np.float64(2)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
    assert same(read_state(tmp_path / "w.pkl"))
    assert read_file(tmp_path / "w.pkl")["__author__"] == "me"


def test_pickles_of_numpy_1_are_read(tmp_path):
    data = pickle.dumps({"a": np.ones(3)}, 2)
    assert b"numpy._core" in data
    (tmp_path / "w.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert read_state(tmp_path / "w.pkl")["a"].tolist() == [1, 1, 1]


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(self.file),))


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_nothing_in_a_file_runs(tmp_path, suffix):
    trap = Trap()
    trap.file = str(tmp_path / "sprung")
    file = tmp_path / f"w.{suffix}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps({"model": trap}))
    else:
        torch.save({"model": trap}, file)
    with pytest.raises(CheckpointError, match=rf"w\.{suffix}: not a "):
        read_file(file)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_that_asks_for_more_than_arrays_names_it(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(CheckpointError, match=r"not a pickle of numpy arrays: it asks for builtins\.print"):
        read_file(tmp_path / "w.pkl")


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_files_that_are_none_are_named(tmp_path, suffix):
    with pytest.raises(CheckpointError, match=rf"absent\.{suffix}: no such file"):
        read_file(tmp_path / f"absent.{suffix}")
    content = {key: value.numpy() if suffix == "pkl" else value for key, value in STATE.items()}
    whole = io.BytesIO()
    torch.save(content, whole) if suffix == "pth" else pickle.dump(content, whole)
    damaged = [whole.getvalue()[:end] for end in range(0, len(whole.getvalue()), 40 if suffix == "pth" else 7)]
    for i, data in enumerate([b"hello", *damaged]):
        (tmp_path / f"{i}.{suffix}").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"/{i}\.{suffix}: not a (file of tensors|pickle of)"):
            read_file(tmp_path / f"{i}.{suffix}")


def test_content_that_holds_no_weights_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth: expected a dict of tensors, got list"):
        read_file(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="x: expected a dict of tensors, or one under model, .* under lr"):
        find_state({"model": {"lr": 0.1}}, "x")
    with pytest.raises(CheckpointError, match="x: expected a dict of tensors, .* got an empty dict"):
        find_state({"model": {}}, "x")
    with pytest.raises(CheckpointError, match="no tensor under a"):
        find_state({"a": np.array([None])}, "x")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_weights_that_are_not_finite_are_refused_naming_the_first(tmp_path, value, kind):
    bad = torch.ones(4)
    bad[2] = value
    state = {"good": torch.ones(1), "count": torch.tensor(3), "second": bad, "third": bad.clone()}
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w\.pth: expected finite weights, got {kind} in second"):
        read_state(tmp_path / "w.pth")


def test_safetensors_are_read_by_their_package(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"data")
    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    package.SafetensorError = type("SafetensorError", (Exception,), {})
    module.load_file = lambda path: dict(STATE) if path == str(file) else None
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    assert same(read_state(file))

    def broken(path):
        raise package.SafetensorError("header too large")

    module.load_file = broken
    with pytest.raises(CheckpointError, match=r"w\.safetensors: not a safetensors file: header too large"):
        read_file(file)


def test_without_the_package_safetensors_are_an_error_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"data")
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=re.escape("needs the package safetensors (pip install safetensors)")):
        read_file(tmp_path / "w.safetensors")
