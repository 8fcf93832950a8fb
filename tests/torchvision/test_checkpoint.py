"""Weights and checkpoints: what loads, what is named, what is refused."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
import torchvision

from dyhead.config import ConfigError
from dyhead.torchvision import build_model
from dyhead.torchvision.checkpoint import (
    last_checkpoint,
    load_states,
    load_weights,
    portable_state,
    read_checkpoint,
    read_resumable,
    save_checkpoint,
)


@pytest.fixture
def model(tiny, configured):
    torch.manual_seed(0)
    return build_model(configured(tiny))


@pytest.fixture
def other(tiny, configured):
    """The same detector with other weights."""
    torch.manual_seed(1)
    return build_model(configured(tiny))


def equal(a, b, prefix=""):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.items() if key.startswith(prefix))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_the_detector_s_own_weights_load_from_any_usual_file(model, other, tmp_path, wrap):
    torch.save(wrap({f"module.{key}": value for key, value in other.state_dict().items()}), tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), strict=True)
    assert equal(model, other)


def test_a_torchvision_resnet_loads_into_the_backbone(tiny, configured, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    detector = build_model(configured(tiny | {"MODEL.RESNETS.NORM": "FrozenBN"}))
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    load_weights(detector, str(tmp_path / "resnet.pth"), strict=False)
    body = detector.backbone.body.state_dict()
    theirs = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}
    assert body.keys() == theirs.keys()
    assert all(torch.equal(body[key], value) for key, value in theirs.items())
    assert "Loaded 100 of" in caplog.text
    assert "missing in the file: backbone.dyhead" in caplog.text
    assert "not in the model" not in caplog.text


def test_imagenet_s_weights_are_torchvision_s(tiny, configured, monkeypatch):
    asked = []

    def fetched(self, **kwargs):
        asked.append(str(self))
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetched)
    detector = build_model(configured(tiny | {"MODEL.RESNETS.NORM": "FrozenBN"}))
    load_weights(detector, "detectron2://ImageNetPretrained/torchvision/R-18.pkl", strict=False)
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]


def test_weights_that_cannot_be_fetched_say_what_was_tried_and_the_ways_out(model, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", offline)
    with pytest.raises(ConfigError, match=r"ResNet50_Weights\.IMAGENET1K_V1.*no route to host.*MODEL\.WEIGHTS \"\""):
        load_weights(model, "detectron2://ImageNetPretrained/torchvision/R-50.pkl", strict=False)
    with pytest.raises(
        ConfigError, match=r"detectron2://ImageNetPretrained/MSRA/R-50\.pkl: the torchvision engine reads"
    ):
        load_weights(model, "detectron2://ImageNetPretrained/MSRA/R-50.pkl", strict=False)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Addresses that are fetched; their files hold what `fetched.files` says by address."""

    def fetch(address, path, **kwargs):
        addresses.append(address)
        if address not in files:
            raise ValueError("unknown url type")
        torch.save(files[address], path)

    addresses, files = [], {}
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return addresses, files


def test_files_of_one_name_from_two_addresses_stay_apart(model, other, fetched):
    addresses, files = fetched
    files |= {"https://a.org/w.pth": portable_state(model), "http://b.org/w.pth?x=1": portable_state(other)}
    for address, expected in [*zip(files, (model, other), strict=True)] * 2:
        loaded = copy.deepcopy(model)
        load_weights(loaded, address, strict=True)
        assert equal(loaded, expected)
    assert addresses == list(files)


@pytest.mark.parametrize("address", ["https://a.org/absent.pth", "http://[broken/w.pth", "https://"])
def test_addresses_that_cannot_be_fetched_are_named_with_the_ways_out(model, fetched, address, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_weights(model, address, strict=False)
    assert str(error.value).startswith(f"MODEL.WEIGHTS {address}: the file could not be fetched into {tmp_path}/hub")
    assert str(error.value).endswith('train from scratch with MODEL.WEIGHTS ""')


def test_a_page_in_place_of_a_file_is_named(model, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).write_text("<html>"))
    with pytest.raises(ConfigError, match=r"w\.pth: not a file of tensors"):
        load_weights(model, "https://a.org/w.pth", strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, strict):
    state = portable_state(model)
    state["detector.head.deltas.bias"] = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth: expected finite weights, got NaN in detector\.head\.deltas\.bias"):
        load_weights(model, str(tmp_path / "w.pth"), strict=strict)


def test_another_network_does_not_start_a_training(model, tmp_path):
    """Many of its vectors have the lengths of ours."""
    torch.save(torchvision.models.resnet101().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth \(a ResNet of torchvision\) does not fit the model"):
        load_weights(model, str(tmp_path / "w.pth"), strict=False)


class Precision:
    """Fabric's float16 precision, as far as it is asked here."""

    def load_state_dict(self, state):
        self.scale = state["scale"]


def resumable(**changes):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 3).parameters(), lr=0.1, momentum=0.9)
    content = {
        "model": {},
        "optimizer": optimizer.state_dict(),
        "grad_scaler": {},
        "iteration": 3,
        "dyhead": {"seed": 1},
    }
    return optimizer, content | changes


@pytest.fixture
def sgd(tiny, configured):
    return configured(tiny | {"SOLVER.OPTIMIZER": "SGD"})


def test_a_training_goes_on_from_its_checkpoint(sgd, tmp_path):
    optimizer, content = resumable(grad_scaler={"scale": 7})
    save_checkpoint(str(tmp_path), "w.pth", content)
    read = read_resumable(sgd, str(tmp_path / "w.pth"))
    precision = Precision()
    load_states(read, optimizer, precision)
    assert (read["iteration"], precision.scale) == (3, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": -1}, "expected 0 or more in iteration, got -1"),
        ({"iteration": True}, "expected int in iteration, got True"),
        ({"iteration": "3"}, "expected int in iteration, got '3'"),
        ({"iteration": 4}, r"SOLVER\.MAX_ITER: .* has done, 5, got 4"),
        ({"optimizer": None}, "expected dict in optimizer, got None"),
        ({"grad_scaler": 3}, "expected dict in grad_scaler, got 3"),
        ({"dyhead": 3}, r"expected int in dyhead\.seed, got None"),
        ({"dyhead": {"seed": "1"}}, r"expected int in dyhead\.seed, got '1'"),
        ({"trainer": {}}, "was written by the detectron2 engine; continue it with --engine detectron2"),
    ],
)
def test_a_training_does_not_go_on_from_a_damaged_state(sgd, tmp_path, change, message):
    torch.save(resumable(**change)[1], tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=message) as error:
        read_resumable(sgd, str(tmp_path / "w.pth"))
    assert "w.pth" in str(error.value)


def test_a_state_of_no_loss_scaling_is_named():
    optimizer, content = resumable(path="run/w.pth")
    with pytest.raises(ConfigError, match=r"run/w\.pth: grad_scaler is no state of float16's loss scaling"):
        load_states(content | {"grad_scaler": {"x": 3}}, optimizer, Precision())


def test_on_a_full_disk_a_training_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent/w\.pth: cannot be written: No such file or directory"):
        save_checkpoint(str(tmp_path / "absent"), "w.pth", {})


def test_for_training_what_fits_is_loaded_and_the_rest_named(model, other, tiny, configured, tmp_path, caplog):
    """Fine-tuning on another number of classes."""
    caplog.set_level(logging.INFO)
    torch.save({"model": other.state_dict() | {"extra.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    detector = build_model(configured(tiny | {"MODEL.FCOS.NUM_CLASSES": 5}))
    load_weights(detector, str(tmp_path / "w.pth"), strict=False)
    assert equal(detector, other, "backbone.")
    assert re.search(r"detector\.head\.logits\.weight \(3, 32, 3, 3\) in the file, \(5, 32, 3, 3\)", caplog.text)
    assert "not in the model: extra.weight" in caplog.text


def test_for_evaluation_everything_must_fit(model, tmp_path):
    state = model.state_dict()
    del state["backbone.body.conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["detector.head.deltas.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError) as error:
        load_weights(model, str(tmp_path / "w.pth"), strict=True)
    assert "missing in the file: backbone.body.conv1.weight" in str(error.value)
    assert "not in the model: extra.weight" in str(error.value)
    assert "detector.head.deltas.bias (7,) in the file, (4,) in the model" in str(error.value)


def test_a_file_of_which_nothing_fits_is_refused(model, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth: expected the keys of one project, got a, .* none of"):
        load_weights(model, str(tmp_path / "w.pth"), strict=False)
    torch.save({"detector.head.surplus.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights(model, str(tmp_path / "w.pth"), strict=False)


def test_files_that_are_no_checkpoints_are_named(model, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"lr": 0.1}}, tmp_path / "numbers.pth")
    torch.save({"model": Path("x")}, tmp_path / "unsafe.pth")
    for name, message in (
        ("missing.pth", "no such file"),
        ("list.pth?matching_heuristics=True", "no such file; what follows a"),
        ("text.pth", "not a file of tensors"),
        ("list.pth", "expected a dict of tensors, got list"),
        ("numbers.pth", "expected a dict of tensors"),
        ("unsafe.pth", "not a file of tensors that PyTorch reads safely"),
    ):
        with pytest.raises(ConfigError, match=rf"{re.escape(name)}.*{message}"):
            load_weights(model, str(tmp_path / name), strict=False)


def test_the_last_checkpoint_is_the_one_that_is_noted(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(ConfigError, match=r"model_0000009\.pth does not exist"):
        last_checkpoint(tmp_path)
    torch.save({}, tmp_path / "model_0000009.pth")
    assert last_checkpoint(tmp_path) == str(tmp_path / "model_0000009.pth")
    assert read_checkpoint(tmp_path / "model_0000009.pth") == {}


# One name of each kind in a released checkpoint of microsoft/DynamicHead, and ours.
RELEASED = {
    "backbone.backbone.bottom_up.stem.conv1.weight": "backbone.body.conv1.weight",
    "backbone.backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
    "backbone.backbone.bottom_up.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.weight",
    "backbone.backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.body.layer1.0.downsample.1.bias",
    "backbone.backbone.bottom_up.res5.2.conv3.norm.running_mean": "backbone.body.layer4.2.bn3.running_mean",
    "backbone.backbone.bottom_up.res4.1.conv2.weight": "backbone.body.layer3.1.conv2.weight",
    "backbone.backbone.fpn_lateral3.weight": "backbone.fpn.inner_blocks.0.0.weight",
    "backbone.backbone.fpn_output5.bias": "backbone.fpn.layer_blocks.2.0.bias",
    "backbone.backbone.top_block.p7.weight": "backbone.fpn.extra_blocks.p7.weight",
    "backbone.dyhead_tower.0.DyConv.1.conv.weight": "backbone.dyhead.blocks.0.same.weight",
    "backbone.dyhead_tower.1.offset.bias": "backbone.dyhead.blocks.1.offset.bias",
}
# And of mmdetection, whose ResNet is torchvision's.
MMDETECTION = {
    "backbone.layer1.0.downsample.0.weight": "backbone.body.layer1.0.downsample.0.weight",
    "backbone.bn1.running_mean": "backbone.body.bn1.running_mean",
    "neck.0.lateral_convs.0.conv.weight": "backbone.fpn.inner_blocks.0.0.weight",
    "neck.0.lateral_convs.2.conv.weight": "backbone.fpn.inner_blocks.2.0.weight",
    "neck.0.fpn_convs.2.conv.bias": "backbone.fpn.layer_blocks.2.0.bias",
    "neck.0.fpn_convs.4.conv.weight": "backbone.fpn.extra_blocks.p7.weight",
    "neck.1.dyhead_blocks.1.spatial_conv_high.norm.weight": "backbone.dyhead.blocks.1.coarser.norm.weight",
}


@pytest.mark.parametrize(("names", "block"), [(RELEASED, "released"), (MMDETECTION, "mmdetection")])
def test_checkpoints_of_other_dynamic_heads_load_name_by_name(tiny, configured, tmp_path, names, block, caplog):
    caplog.set_level(logging.INFO)
    options = {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.FPN.NORM": "",
        "MODEL.DYHEAD.BLOCK": block,
        "MODEL.DYHEAD.NUM_BLOCKS": 2,
    }
    detector = build_model(configured(tiny | options))
    own = detector.state_dict()
    theirs = {key: torch.rand(own[ours].shape) for key, ours in names.items()}
    torch.save({"model" if block == "released" else "state_dict": theirs}, tmp_path / "w.pth")
    load_weights(detector, str(tmp_path / "w.pth"), strict=False)
    loaded = detector.state_dict()
    wrong = [ours for key, ours in names.items() if not torch.equal(loaded[ours], theirs[key])]
    assert not wrong
    assert "not in the model" not in caplog.text
