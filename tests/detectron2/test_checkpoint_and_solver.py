# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detectron2 import Checkpointer


@pytest.fixture
def saved(tiny_cfg, tmp_path):
    """A tiny FCOS and its checkpoint file."""
    model = build_model(tiny_cfg())
    Checkpointer(model, str(tmp_path)).save("tiny")
    return model, tmp_path / "tiny.pth"


def changed(file, change):
    """A copy of a checkpoint file after `change` has altered its weights."""
    state = torch.load(file)["model"]
    change(state)
    torch.save({"model": state}, file.with_stem("changed"))
    return str(file.with_stem("changed"))


def test_a_checkpoint_comes_back(saved, tiny_cfg):
    model, file = saved
    other = build_model(tiny_cfg())
    Checkpointer(other).load(str(file))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_an_error_naming_the_keys(saved):
    def change(state):
        del state["detector.head.deltas.bias"]
        state["detector.head.surplus"] = torch.zeros(1)
        state["detector.head.logits.weight"] = torch.zeros(5, 32, 3, 3)

    model, file = saved
    checkpointer = Checkpointer(model)
    with pytest.raises(ConfigError, match=r"changed\.pth .* does not fit the model") as error:
        checkpointer.load(changed(file, change))
    assert "missing in the file: detector.head.deltas.bias\n" in str(error.value)
    assert "not in the model: detector.head.surplus\n" in str(error.value)
    assert "head.logits.weight (5, 32, 3, 3) in the file, (2, 32, 3, 3) in the model" in str(error.value)
    checkpointer.load(str(file))  # the error leaves nothing behind


def test_for_training_what_fits_is_loaded(saved, tiny_cfg):
    model, file = saved
    other = build_model(tiny_cfg("fcos", {"MODEL.FCOS.NUM_CLASSES": 3}))
    Checkpointer(other).load(str(file), checkpointables=[])
    assert torch.equal(other.detector.head.deltas.weight, model.detector.head.deltas.weight)
    assert other.detector.head.logits.weight.shape[0] == 3


def test_a_file_that_is_no_checkpoint_is_named(saved, tmp_path):
    model, _ = saved
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.pth: not a file of tensors"):
        Checkpointer(model).load(str(tmp_path / "text.pth"))
    with pytest.raises(ConfigError, match=r"absent\.pth: cannot be loaded"):
        Checkpointer(model).load(str(tmp_path / "absent.pth"))


def test_weights_of_a_detector_without_the_head_go_into_the_wrapped_backbone(saved, tiny_cfg):
    def unwrap(state):
        for key in list(state):
            value = state.pop(key)
            if key.startswith("backbone.backbone."):
                state[key.removeprefix("backbone.")] = value

    model, file = saved
    other = build_model(tiny_cfg())
    Checkpointer(other).load(changed(file, unwrap), checkpointables=[])
    wrapped = model.backbone.backbone.state_dict()
    assert all(torch.equal(value, wrapped[key]) for key, value in other.backbone.backbone.state_dict().items())


def test_released_weights_of_the_head_fit(configs, tmp_path):
    cfg = add_dyhead_config(get_cfg())
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.DYHEAD.BLOCK", "released"]
    load_config(cfg, configs / "faster_rcnn_dyhead_R50.yaml", overrides)
    model = build_model(cfg)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.dyhead.")}
    tower = json.loads((Path(__file__).parents[1] / "layers" / "released" / "keys.json").read_text())
    state.update({key: torch.full((1,), 0.5).expand(shape) for key, shape in tower.items()})
    torch.save({"model": state}, tmp_path / "released.pth")
    Checkpointer(model).load(str(tmp_path / "released.pth"))
    assert all((parameter == 0.5).all() for parameter in model.backbone.dyhead.parameters())


CAFFE2 = {
    "conv1_w": "stem.conv1.weight",
    "res_conv1_bn_s": "stem.conv1.norm.weight",
    "res3_0_branch1_w": "res3.0.shortcut.weight",
    "res4_1_branch2b_bn_b": "res4.1.conv2.norm.bias",
}


def imagenet(model, names):
    """Weights for some of the network's parameters, under the names of another project."""
    own = model.backbone.backbone.bottom_up.state_dict()
    return {theirs: torch.rand(own[ours].shape) for theirs, ours in names.items()}


def assert_in_network(model, state, names):
    loaded = model.backbone.backbone.bottom_up.state_dict()
    assert all(torch.equal(loaded[ours], state[theirs]) for theirs, ours in names.items())


@pytest.mark.parametrize("blobs", [False, True])
def test_caffe2s_networks_are_matched_as_detectron2_does(tiny_cfg, tmp_path, blobs):
    model = build_model(tiny_cfg("fcos", {"MODEL.RESNETS.NORM": "FrozenBN"}))
    state = imagenet(model, CAFFE2)
    arrays = {key: value.numpy() for key, value in state.items()} | {"conv1_w_momentum": np.ones(1)}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({"blobs": arrays} if blobs else arrays))
    Checkpointer(model).load(str(tmp_path / "R-18.pkl"), checkpointables=[])
    assert_in_network(model, state, CAFFE2)


def test_detectron2s_networks_are_matched_as_detectron2_does(tiny_cfg, tmp_path):
    model = build_model(tiny_cfg("fcos", {"MODEL.RESNETS.NORM": "FrozenBN"}))
    names = {ours: ours for ours in CAFFE2.values()}
    state = imagenet(model, names)
    content = {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "somebody"}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content | {"matching_heuristics": True}))
    Checkpointer(model).load(str(tmp_path / "R-18.pkl"), checkpointables=[])
    assert_in_network(model, state, names)


@pytest.mark.parametrize("nested", [False, True])
def test_an_address_can_ask_for_matching(tiny_cfg, tmp_path, nested):
    model = build_model(tiny_cfg("fcos", {"MODEL.RESNETS.NORM": "FrozenBN"}))
    names = {f"net.{ours}": ours for ours in CAFFE2.values()}
    state = {key.removeprefix("net."): value for key, value in imagenet(model, names).items()}
    torch.save({"model": state} if nested else state, tmp_path / "w.pth")
    Checkpointer(model).load(f"{tmp_path / 'w.pth'}?matching_heuristics=True", checkpointables=[])
    assert_in_network(model, state, {ours: ours for ours in CAFFE2.values()})
    with pytest.raises(ConfigError, match=r"expected no query but matching_heuristics=True, got \{'match"):
        Checkpointer(model).load(f"{tmp_path / 'w.pth'}?match=1", checkpointables=[])


def test_nothing_in_a_pickle_runs(saved, tmp_path):
    model, _ = saved
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": print}))
    with pytest.raises(ConfigError, match=r"w\.pkl: not a pickle of numpy arrays: it asks for builtins\.print"):
        Checkpointer(model).load(str(tmp_path / "w.pkl"))
