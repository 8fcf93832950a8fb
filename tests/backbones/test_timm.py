"""Networks of timm under both engines. The package is optional."""

import json
from pathlib import Path

import pytest
import torch

from dyhead.backbones import TimmNetwork, TimmOptions
from dyhead.checkpoints import canonical_names, convert_for
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.backbone import build_pyramid
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.config import check_values, ignore_not_honoured
from tests.backbones.exchange import assert_engines_agree
from tests.test_contract import CONFIGS, OPTIONS
from tools.originals.values import tensors

timm = pytest.importorskip("timm", reason="timm is not installed")

RECORDS = json.loads(Path(__file__).with_name("originals.json").read_text())
FILE = CONFIGS / "atss_dyhead_R18_shapes.yaml"
NETWORK = {
    "MODEL.BACKBONE.NAME": "build_timm_fpn_p6p7_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.TIMM.NAME": "test_resnet",
}


def configured(options, file=FILE, cfg=None):
    cfg = cfg or get_cfg()
    load_config(cfg, file, [str(word) for pair in (OPTIONS | NETWORK | options).items() for word in pair])
    return cfg


def classifier(record, name):
    """The weights of a record and its images, the former with timm's names."""
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
    values = tensors(record | {"keys": record["keys"] | shapes})
    return values, [values.pop(image) for image in ("input", "odd")]


@pytest.mark.parametrize("name", RECORDS)
def test_cspnets_compute_from_a_file_of_weights_what_timms_classifiers_do(name, tmp_path):
    record = RECORDS[name]
    state, images = classifier(record, name)
    torch.save(state, tmp_path / "w.pth")
    model = build_model(configured({"MODEL.TIMM.NAME": name}))
    load_weights(model, str(tmp_path / "w.pth"), strict=False)
    body = model.backbone.body.eval().double()
    for prefix, image in zip(("", "odd."), images, strict=True):
        with torch.no_grad():
            maps = body(image.double())
        assert list(maps) == ["res2", "res3", "res4", "res5"]
        for stage, x in maps.items():
            expected = record["maps"][f"{prefix}C{stage[-1]}"]
            chosen = x[0, :: expected["every"]]
            for got, want in ((chosen.mean((1, 2)), "mean"), (chosen.square().mean((1, 2)).sqrt(), "rms")):
                want = torch.tensor(expected[want], dtype=torch.float64)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * expected["largest"])


@pytest.mark.detectron2
def test_swin_is_detectron2s_from_its_authors_names_where_windows_need_no_padding():
    from detectron2.modeling.backbone.swin import SwinTransformer

    torch.manual_seed(0)
    theirs = SwinTransformer().eval()
    ours = TimmOptions("swin_tiny_patch4_window7_224", out_norm="LN").build().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("relative_position_bias_table", "bias")):
                parameter.normal_(std=0.5)
    state = theirs.state_dict()
    conversion = convert_for(ours, state)
    values = {key.removeprefix("backbone.backbone.bottom_up.timm."): x for key, x in conversion.state.items()}
    values |= {f"norms.res{2 + i}.{key}": state[f"norm{i}.{key}"] for i in range(4) for key in ("weight", "bias")}
    ours.load_state_dict(values)
    x = torch.randn(1, 3, 224, 448)
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    for i in range(4):
        torch.testing.assert_close(got[f"res{2 + i}"], expected[f"p{i}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("convnext_atto", [40, 80, 160, 320]),
        ("efficientnet_lite0", [24, 40, 112, 320]),
        ("regnety_002", [24, 56, 152, 368]),
        ("resnet18d", [64, 128, 256, 512]),
        ("mvitv2_tiny", [96, 192, 384, 768]),
    ],
)
def test_maps_have_the_strides_and_widths_that_are_declared(name, widths):
    network = TimmOptions(name).build().eval()
    with torch.no_grad():
        maps = network(torch.randn(1, 3, 64, 96))
    assert list(network.strides.items()) == [(f"res{n}", 2**n) for n in (2, 3, 4, 5)]
    assert list(network.channels.values()) == widths
    for stage, x in maps.items():
        assert x.shape == (1, network.channels[stage], 64 // network.strides[stage], 96 // network.strides[stage])


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, tmp_path):
    builder = "build_timm_fpn_p6p7_backbone" if name == "atss" else "build_timm_fpn_backbone"
    options = NETWORK | {"MODEL.TIMM.OUT_NORM": "LN", "MODEL.BACKBONE.NAME": builder}
    file = CONFIGS / f"{name}_dyhead_R18_shapes.yaml"
    assert_engines_agree(file, options, tmp_path / "w.pth")


def test_stages_are_chosen_and_batch_norm_kept_as_configured():
    pyramid = build_pyramid(configured({"MODEL.FPN.IN_FEATURES": ["res4", "res5"], "MODEL.TIMM.OUT_INDICES": [-2, -1]}))
    assert list(pyramid.strides) == ["p4", "p5", "p6", "p7"]
    frozen, free = (TimmOptions("test_resnet", frozen_bn=on).build().train() for on in (True, False))
    x = torch.randn(2, 3, 64, 64)
    for network, changes in ((frozen, False), (free, True)):
        before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
        assert before
        network(x)
        assert all(not torch.equal(network.state_dict()[key], value) for key, value in before.items()) == changes


def test_depths_are_dropped_in_training_where_asked_for():
    network = TimmOptions("convnext_atto", drop_path_rate=0.9).build()
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(1)
    with torch.no_grad():
        assert not torch.equal(network.train()(x)["res5"], network(x)["res5"])
        assert torch.equal(network.eval()(x)["res5"], network(x)["res5"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"MODEL.TIMM.NAME": "resnet_50"},
            r"MODEL.TIMM.NAME: expected a network of timm .*got 'resnet_50'; did you mean resnet50",
        ),
        ({"MODEL.TIMM.NAME": ""}, r"MODEL.TIMM.NAME: expected a network of timm .*got ''"),
        ({"MODEL.BACKBONE.FREEZE_AT": 2}, "BACKBONE.FREEZE_AT: expected 0 with build_timm_fpn_p6p7_backbone.*got 2"),
        ({"MODEL.TIMM.OUT_INDICES": [-1, -2]}, "MODEL.TIMM.OUT_INDICES: expected .*increasing, got"),
        ({"MODEL.TIMM.OUT_INDICES": [0, 1]}, "MODEL.TIMM.OUT_INDICES: expected .*below 0.*, got"),
        ({"MODEL.TIMM.OUT_INDICES": [-9, -1]}, "MODEL.TIMM.NAME test_resnet: timm cannot build its maps"),
        ({"MODEL.TIMM.OUT_INDICES": [-4, -1]}, "MODEL.TIMM.OUT_INDICES: expected maps of test_resnet whose strides"),
        ({"MODEL.TIMM.NAME": "vit_tiny_patch16_224"}, "powers of 2, each twice the one before, got strides 16"),
        (
            {"MODEL.FPN.IN_FEATURES": ["res3", "res6"]},
            r"MODEL.FPN.IN_FEATURES: expected some of the maps of MODEL.TIMM, \['res2'.*got",
        ),
        ({"MODEL.FPN.IN_FEATURES": ["res3", "res4"]}, "the torchvision engine expects the last of the maps"),
        ({"MODEL.TIMM.DROP_PATH_RATE": 1.0}, "DROP_PATH_RATE: expected at least 0, below 1, got 1.0"),
        (
            {"MODEL.TIMM.NAME": "cspresnet50", "MODEL.TIMM.DROP_PATH_RATE": "0.1", "MODEL.TIMM.OUT_NORM": "BN"},
            "MODEL.TIMM.OUT_NORM: expected one of '', 'LN', got 'BN'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configured(options))


@pytest.mark.detectron2
def test_detectron2_refuses_maps_that_are_not_there():
    from detectron2 import config

    from dyhead.detectron2 import Trainer

    cfg = configured({"MODEL.FPN.IN_FEATURES": ["res3", "res6"]}, cfg=add_dyhead_config(config.get_cfg()))
    with pytest.raises(ConfigError, match="IN_FEATURES: expected some of the maps of MODEL.TIMM"):
        Trainer.build_model(cfg)


def test_keys_of_the_other_network_are_named(caplog):
    cfg = configured({"MODEL.RESNETS.DEPTH": 34})
    ignore_not_honoured(cfg, {"MODEL.RESNETS.DEPTH", "MODEL.TIMM.NAME"})
    assert "does not read: MODEL.RESNETS.DEPTH 34" in caplog.text
    assert "TIMM" not in caplog.text
    cfg = configured({"MODEL.BACKBONE.NAME": "build_resnet_fpn_p6p7_backbone"})
    ignore_not_honoured(cfg, {"MODEL.TIMM.NAME"})
    check_values(cfg)
    assert "does not read: MODEL.TIMM.NAME 'test_resnet'" in caplog.text


def test_weights_come_from_timms_cache(monkeypatch, caplog):
    cached = timm.create_model("test_resnet")

    def create_model(name, pretrained=False, **arguments):
        assert pretrained
        return cached

    model = build_model(configured({}))
    monkeypatch.setattr(timm, "create_model", create_model)
    load_weights(model, "timm://test_resnet.r160_in1k", strict=False)
    loaded, names = model.state_dict(), canonical_names(model.state_dict())
    assert any(name.endswith("timm.network.conv1.0.weight") or "timm.network" in name for name in names.values())
    theirs = {key.replace(".", "_"): x for key, x in cached.state_dict().items()}
    network = model.backbone.body.timm.network.state_dict()
    assert network
    for key, x in network.items():
        assert torch.equal(loaded[f"backbone.body.timm.network.{key}"], x)
        assert torch.equal(x, theirs[key.replace(".", "_")])


@pytest.mark.detectron2
def test_both_engines_name_weights_that_cannot_be_had(monkeypatch):
    from detectron2 import config

    from dyhead.detectron2 import Checkpointer, Trainer

    def fail(name, pretrained=False, **arguments):
        raise OSError("no route")

    model, options = build_model(configured({})), configured({}, cfg=add_dyhead_config(config.get_cfg()))
    engines = (
        lambda weights: load_weights(model, weights, strict=False),
        Checkpointer(Trainer.build_model(options)).load,
    )
    monkeypatch.setattr(timm, "create_model", fail)
    for load in engines:
        with pytest.raises(ConfigError, match=r"timm://test_resnet.r160_in1k: .*could not be fetched \(no route\)"):
            load("timm://test_resnet.r160_in1k")
        with pytest.raises(ConfigError, match="timm://nope50: NAME: expected a network of timm"):
            load("timm://nope50")
        with pytest.raises(ConfigError, match="timm://resnet50.nope: timm .* has no weights of this name"):
            load("timm://resnet50.nope")


def test_weights_of_another_network_are_not_taken_for_its_own():
    network = TimmOptions("test_resnet").build()
    assert isinstance(network, TimmNetwork)
    assert network.own_weights(timm.create_model("convnext_atto").state_dict()) is None
