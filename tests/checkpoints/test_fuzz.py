"""Damaged and hostile files: whatever is in them, reading ends with weights or with an error that names the file."""

import io
import os
import pickle
import random
import sys
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from dyhead.checkpoints import CheckpointError, convert, read_state

STATE = {
    "backbone.body.conv1.weight": torch.rand(2, 3),
    "detector.head.logits.bias": torch.arange(4.0),
    "detector.head.quality.bias": torch.ones(1).expand(5),
    "detector.head.deltas.bias": torch.rand(4, 4)[:, 1:3],
}
CONTENT = {
    "model": OrderedDict(STATE),
    "optimizer": {"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "best": np.float64(3),
    "names": np.array(["a", "b"]),
}


def refusal(read):
    """What a CheckpointError says, "" if there is none; anything else is a failure."""
    try:
        read()
    except CheckpointError as error:
        return str(error)
    return ""


def changed(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[place : place + rng.randint(1, 9)]
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.randint(1, 5))
        else:
            data[place] = rng.randrange(256)
    return bytes(data)


def zipped(change, content=CONTENT):
    """A file of torch.save whose pickle is changed."""
    whole, out = io.BytesIO(), io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return out.getvalue()


def torch_saved(rng):
    if rng.random() < 0.7:
        return zipped(lambda data: changed(data, rng))
    whole = io.BytesIO()
    torch.save(CONTENT, whole, _use_new_zipfile_serialization=rng.random() < 0.5)
    return changed(whole.getvalue(), rng)


def pickled(rng):
    arrays = {"model": {key: value.numpy() for key, value in STATE.items()}, "n": np.float32(2), "__author__": "me"}
    return changed(pickle.dumps(arrays, rng.randrange(pickle.HIGHEST_PROTOCOL + 1)), rng)


@pytest.mark.parametrize(("suffix", "make"), [("pth", torch_saved), ("pkl", pickled)])
def test_damaged_files_are_read_or_named(tmp_path, suffix, make):
    rng, ends = random.Random(0), Counter()
    file = tmp_path / f"w.{suffix}"
    for _ in range(250):
        file.write_bytes(make(rng))
        said = refusal(lambda: convert(read_state(file), f"checkpoint {file}"))
        ends["named" if said else "read"] += 1
        assert said.startswith(f"checkpoint {file}: ") or not said
    assert min(ends["read"], ends["named"]) > 3, ends


class Made:
    """Is pickled as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def array(*state):
    """Is pickled as numpy's arrays are, which are made empty and then filled."""
    make, arguments, _ = np.array(1).__reduce__()
    return Made(make, arguments, (1, *state))


OBJECTS, FLOATS = np.dtype("O"), np.dtype("f4")


@pytest.mark.parametrize(
    "value",
    [
        np.array([None]),
        np.zeros(2, "i4,f4"),
        np.array(["2020-01-01"], "M8[D]"),
        # numpy itself ends the process on the next two.
        array((10**6,), OBJECTS, False, []),
        Made(np.ndarray, ((2,), OBJECTS, b"1234567812345678")),
        array((2,), FLOATS, False, b"1234"),
        array((-1,), FLOATS, False, b"1234"),
        array((10**30,), FLOATS, False, b"1234"),
        Made(bytes.fromhex, ("00",)),
    ],
)
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_arrays_that_numpy_should_not_make_are_refused(tmp_path, value, suffix):
    file = tmp_path / f"w.{suffix}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps({"model": {"a": value}, "b": np.ones(1)}))
    else:
        torch.save({"model": {"a": value}, "b": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=rf"w\.{suffix}: not a "):
        read_state(file)


def test_attributes_in_a_file_hide_no_method(tmp_path):
    names = ("items", "keys", "get", "values", "detach", "numel", "isfinite", "to")
    hiding = pickle.dumps(dict.fromkeys(names, 3), 2)[2:-1] + b"b."
    arrays = pickle.dumps(OrderedDict(a=np.ones(2)), 2)
    (tmp_path / "w.pkl").write_bytes(arrays[:-1] + hiding)
    assert read_state(tmp_path / "w.pkl").keys() == {"a"}
    (tmp_path / "w.pth").write_bytes(zipped(lambda data: data[:-1] + hiding, OrderedDict(STATE)))
    assert read_state(tmp_path / "w.pth").keys() == STATE.keys()
    tensor = torch.ones(2)
    tensor.__dict__.update(dict.fromkeys(names, 3))
    torch.save({"model": {"a": tensor}}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth")["a"].tolist() == [1, 1]


def test_a_file_changes_no_function(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02c_codecs\nencode\n" + pickle.dumps({"x": 1}, 2)[2:-1] + b"b.")
    with pytest.raises(CheckpointError, match="it fills an object of type function"):
        read_state(tmp_path / "w.pkl")


@pytest.mark.parametrize("numel", [b"K\x60", b"J\xff\xff\xff\xff", b"J\x00\xff\xff\x7f"])
def test_a_view_larger_than_its_storage_is_named(tmp_path, numel):
    (tmp_path / "w.pth").write_bytes(zipped(lambda data: data.replace(b"K\x04\x85", numel + b"\x85")))
    with pytest.raises(CheckpointError, match=r"w\.pth: not a file of tensors"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth", "safetensors"])
def test_what_is_no_file_is_named(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    path.mkdir()
    with pytest.raises(CheckpointError, match=rf"w\.{suffix}: not a file$"):
        read_state(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=rf"w\.{suffix}: not a file$"):
        read_state(path)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (lambda file: torch.save(torch.nn.Linear(1, 1), file), r"torch\.nn\.modules\.linear\.Linear"),
        (lambda file: torch.save({"ema": torch.nn.ReLU()}, file), r"torch\.nn\.modules\.activation\.ReLU"),
    ],
)
def test_a_pickled_module_is_refused_by_name(tmp_path, save, name):
    save(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w\.pth: .*an object of {name}; save the weights alone"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "state",
    [
        {"layer1.0.conv1.weight": torch.ones(1), f"layer{'9' * 5000}.0.conv1.weight": torch.ones(1)},
        {"backbone.fpn.inner_blocks." + "9" * 5000 + ".0.weight": torch.ones(1)},
        {"bbox_head.retina_reg.bias": torch.tensor(1.0)},
        {"bbox_head.retina_reg.bias": torch.ones(36), "bbox_head.retina_cls.bias": torch.ones(7)},
        {"neck.0.dyhead_blocks.0.spatial_conv_mid.conv.weight": torch.tensor(1.0)},
        {
            "backbone.body.conv1.weight": torch.ones(1),
            "roi_heads.box_predictor.cls_score.weight": torch.tensor(1.0),
            "roi_heads.box_predictor.bbox_pred.weight": torch.tensor(1.0),
        },
    ],
)
def test_keys_and_shapes_that_no_project_has_convert_or_are_named(state):
    if sys.version_info < (3, 11) and any(len(key) > 1000 for key in state):
        pytest.skip("this Python converts numbers of any length")
    said = refusal(lambda: convert(state, "checkpoint w.pth"))
    assert said.startswith("checkpoint w.pth: ") or not said
