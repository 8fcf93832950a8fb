# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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


class Small(nn.Module):
    """Some weights of a detector."""

    def __init__(self):
        super().__init__()
        layers = {"logits": nn.Linear(2, 3), "deltas": nn.Linear(2, 4), "quality": nn.Linear(2, 1)}
        self.detector = nn.ModuleDict({"head": nn.ModuleDict(layers), "norm": nn.BatchNorm1d(3)})


@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "best": np.float64(0.5)}])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "ema_model.module.", "module.model._orig_mod."])
def test_weights_of_a_wrapped_model_load(tmp_path, prefix, beside):
    model, other = Small(), Small()
    torch.save({f"{prefix}{key}": x for key, x in model.state_dict().items()} | beside, tmp_path / "w.pth")
    Checkpointer(other).load(str(tmp_path / "w.pth"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("checkpointables", [None, []])
@pytest.mark.parametrize("suffix", ["pth", "pth?matching_heuristics=True", "pyth", "pkl"])
def test_weights_that_are_not_finite_are_refused_on_every_path(tmp_path, suffix, checkpointables):
    model = Small()
    state = model.state_dict()
    state["detector.head.deltas.bias"] = torch.tensor([1.0, 2.0, 3.0, float("inf")])
    file = tmp_path / f"bad.{suffix.partition('?')[0]}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps({key: value.numpy() for key, value in state.items()}))
    else:
        torch.save({"model_state": state}, file)
    with pytest.raises(
        ConfigError, match=r"bad\..*expected finite weights, got infinity in detector\.head\.deltas\.bias"
    ):
        Checkpointer(model).load(f"{tmp_path}/bad.{suffix}", checkpointables)


@pytest.mark.parametrize("heuristics", ["", "?matching_heuristics=True"])
@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.ones(1, 2), "bias": torch.ones(1)},  # as one of the model's alone has, and one by chance
        {"detector.head.quality.bias": torch.ones(1), "detector.head.logits.weight": torch.ones(1)},
        {"detector.norm.num_batches_tracked": torch.tensor(3)},
        {"quality.bias": torch.ones(1), **{f"encoder.{i}.weight": torch.ones(3) for i in range(9)}},
    ],
)
def test_weights_of_which_nothing_or_the_odd_tensor_fits_do_not_start_a_training(tmp_path, state, heuristics):
    model = Small()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth.*(does not fit the model|expected the keys of one project)"):
        Checkpointer(model).load(f"{tmp_path / 'w.pth'}{heuristics}", checkpointables=[])


def test_an_end_that_many_keys_have_is_named(tmp_path):
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"norm": nn.LayerNorm(3)}), "b": nn.ModuleDict({"norm": nn.LayerNorm(3)})}
    )
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth.*: its keys cannot be matched with the model by their ends"):
        Checkpointer(model).load(f"{tmp_path / 'w.pth'}?matching_heuristics=True", checkpointables=[])


@pytest.mark.parametrize("content", [{3: np.ones(1)}, {"blobs": 3}, {"blobs": {}}, {}, {"model": {"x": None}}, [1]])
def test_pickles_without_weights_are_named(tmp_path, content):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=r"w\.pkl: expected "):
        Checkpointer(Small()).load(str(tmp_path / "w.pkl"), checkpointables=[])


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/w.pth", "nowhere://w.pth", "detectron2://", "http://[w"])
def test_addresses_that_cannot_be_fetched_are_named_with_the_ways_out(monkeypatch, tmp_path, address):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        Checkpointer(Small()).load(address, checkpointables=[])
    assert str(error.value).startswith(f"MODEL.WEIGHTS {address}: the file could not be fetched (")
    assert str(error.value).endswith('train from scratch with MODEL.WEIGHTS ""')


class Resumed:
    """As much of Detectron2's trainer as its checkpointer sees."""

    max_iter = 4

    def __init__(self, model):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.iter = 3

    def state_dict(self):
        return {"iteration": self.iter, "_trainer": {"optimizer": self.optimizer.state_dict()}}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["_trainer"]["optimizer"])
        self.iter = state["iteration"]


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
    checkpointer, file = Checkpointer(Small(), str(tmp_path)), tmp_path / "tiny.pth"
    checkpointer.save("tiny")
    assert checkpointer.get_checkpoint_file() == str(file)
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for name in ("tiny", "next"):
            with pytest.raises(ConfigError, match=rf"{name}\.pth: cannot be written: File too large"):
                checkpointer.save(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpointer.get_checkpoint_file() == str(file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*") if path.is_file()) == ["last_checkpoint", "tiny.pth"]


def test_a_note_that_names_no_file_is_an_error_and_no_fresh_start(tmp_path):
    checkpointer = Checkpointer(Small(), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    checkpointer.save("w")
    assert checkpointer.has_checkpoint()
    checkpointer.tag_last_checkpoint("absent.pth")
    for ask in (checkpointer.has_checkpoint, checkpointer.get_checkpoint_file):
        with pytest.raises(ConfigError, match=r"last_checkpoint: expected the name .*absent\.pth does not exist"):
            ask()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: None, None),
        (lambda content: content.pop("trainer"), "is no checkpoint of a training on detectron2"),
        (lambda content: content.update(trainer=3), r"expected int in trainer\.iteration, got None"),
        (lambda content: content["trainer"].update(iteration=-2), r"0 or more in trainer\.iteration, got -2"),
        (lambda content: content["trainer"].update(iteration="2"), r"expected int in trainer\.iteration, got '2'"),
        (lambda content: content["trainer"].update(iteration=4), r"SOLVER\.MAX_ITER: .* has done, 5, got 4"),
        (lambda content: content["trainer"].pop("_trainer"), r"expected dict in trainer\._trainer\.optimizer"),
    ],
)
def test_a_training_goes_on_from_a_whole_state_only(tmp_path, change, message):
    model = Small()
    trainer = Resumed(model)
    Checkpointer(model, str(tmp_path), trainer=trainer).save("run")
    content = torch.load(tmp_path / "run.pth")
    change(content)
    torch.save(content, tmp_path / "run.pth")
    trainer.iter = 0
    if message is None:
        Checkpointer(model, str(tmp_path), trainer=trainer).load(str(tmp_path / "run.pth"))
        assert trainer.iter == 3
    else:
        with pytest.raises(ConfigError, match=message) as error:
            Checkpointer(model, str(tmp_path), trainer=trainer).load(str(tmp_path / "run.pth"))
        assert "run.pth" in str(error.value)
        assert trainer.iter == 0


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
