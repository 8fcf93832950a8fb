"""SpineNet: the numbers of three other programs, what it costs, images of any size, and both engines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dyhead.backbones import SpineNetOptions
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.evaluation import count_flops, count_parameters
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.config import check_values, ignore_not_honoured
from tests.backbones.exchange import assert_engines_agree
from tests.test_contract import CONFIGS, OPTIONS
from tools.originals import spinenet as originals
from tools.originals.rows import table

RECORDS = json.loads(Path(__file__).with_name("spinenet.json").read_text())
FILE = CONFIGS / "atss_dyhead_R18_shapes.yaml"
NETWORK = {
    "MODEL.BACKBONE.NAME": "build_spinenet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.IN_FEATURES": [],
    "MODEL.SPINENET.NAME": "spinenet49s",
}
LEVELS = {level: ["p3", "p4", "p5", "p6", "p7"] for level in ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES")}


def configured(options, file=FILE, cfg=None):
    cfg = cfg or get_cfg()
    load_config(cfg, file, [str(word) for pair in (OPTIONS | NETWORK | options).items() for word in pair])
    return cfg


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("spinenet49", 3),
        ("spinenet49_tensorflow", 4),  # of two activations
        ("spinenet49_tensorflow_tpu", 4),
        ("spinenet49s", 3),
    ],
)
def test_computes_from_the_same_weights_what_the_original_programs_do(name, stages):
    record, weights = RECORDS[name], RECORDS[originals.NETWORKS[name][-1]]
    arrays = {key: np.array(value) for key, value in record["values"].items()}
    rows = list(originals.compare(name, record, arrays, weights))
    assert len(rows) == stages
    assert all(row.passes for row in rows), table(rows)


@pytest.mark.parametrize(
    ("size", "parameters", "side", "convs", "width", "billions"),
    [
        # Those of yan-roo/SpineNet-Pytorch: parameters of the network; and multiply-adds of its RetinaNet, of which the
        # head's are the products of two towers of so many convolutions, and of 9 anchors of 80 classes and 4 deltas.
        ("spinenet49s", 9089215, 640, 4, 128, 30.04),
        ("spinenet49", 21831488, 640, 4, 256, 83.7),
        ("spinenet49", 21831488, 896, 4, 256, 164.05),
        ("spinenet96", 36262976, 1024, 4, 256, 261.35),
        ("spinenet143", 60247616, 1280, 4, 256, 518.32),
        ("spinenet190", 126587664, 1280, 7, 512, 1870.89),
    ],
)
def test_every_size_has_the_published_cost(size, parameters, side, convs, width, billions):
    with torch.device("meta"):
        network = SpineNetOptions(size).build().eval()
    assert count_parameters(network) == parameters
    assert set(network.channels.values()) == {width}
    pixels = sum((side // 2**level) ** 2 for level in range(3, 8))
    head = pixels * 9 * width * (2 * convs * width + 9 * (80 + 4)) / 1e9
    counted = count_flops(network, torch.empty(1, 3, side, side, device="meta")) + head
    assert counted == pytest.approx(billions, rel=0.01)  # theirs counts normalization, too


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    network = SpineNetOptions("spinenet49s").build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


@pytest.mark.parametrize(("height", "width"), [(61, 93), (128, 129), (200, 128)])
def test_images_of_any_size_are_padded_to_multiples_of_128_with_zeros(small, height, width):
    images = torch.randn(2, 3, height, width)
    padded = functional.pad(images, (0, -width % 128, 0, -height % 128))
    with torch.no_grad():
        levels, expected = small.eval()(images), small(padded)
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"] == list(small.channels)
    for name, level in levels.items():
        stride = small.strides[name]
        assert level.shape == (2, small.channels[name], padded.shape[2] // stride, padded.shape[3] // stride)
        assert torch.equal(level, expected[name])


def test_normalization_learns_or_stays_as_configured(small):
    images = torch.randn(2, 3, 128, 128)
    kept = SpineNetOptions("spinenet49s", norm="FrozenBN").build().train()
    missing, _ = kept.load_state_dict(small.state_dict(), strict=False)
    assert missing == []
    with torch.no_grad():
        expected = {name: level.clone() for name, level in small.eval()(images).items()}
        for name, level in kept(images).items():
            torch.testing.assert_close(level, expected[name], rtol=0, atol=1e-3 * expected[name].abs().max().item())
    own = SpineNetOptions("spinenet49s").build().train()
    before = {key: value.clone() for key, value in own.state_dict().items() if "running" in key}
    own(images)
    assert before
    assert all(not torch.equal(own.state_dict()[key], value) for key, value in before.items())


def test_one_pixel_has_no_variance(small):
    with pytest.raises(ConfigError, match=r"MODEL.SPINENET.NORM: expected FrozenBN, .* 128 x 128 pixels, got BN"):
        small.train()(torch.zeros(1, 3, 100, 128))
    small.train()(torch.zeros(1, 3, 100, 129))


def test_blocks_are_skipped_in_training_alone_and_the_first_never():
    network = SpineNetOptions("spinenet49s", drop_path_rate=0.9).build()
    rates = [block[0].drop for block in network.blocks]
    assert rates[:2] == [0, 0]
    assert rates[2:] == pytest.approx([0.9 * i / 15 for i in range(1, 16)])
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert not torch.equal(network.train()(images)["p7"], network(images)["p7"])
        assert torch.equal(network.eval()(images)["p7"], network(images)["p7"])
    block = network.blocks[16][0].train()
    x = torch.rand(64, block.conv1.conv.in_channels, 1, 2)
    with torch.no_grad():
        out = block(x)
        residual = block.conv3(block.conv2(block.conv1(x)))
    dropped = [torch.equal(o, i) for o, i in zip(out, x, strict=True)]
    assert 0 < 64 - sum(dropped) < 32
    for i in (i for i in range(64) if not dropped[i]):
        # Statistics of batch normalization are those of all images, skipped or not.
        torch.testing.assert_close(out[i], functional.relu(x[i] + 10 * residual[i]), rtol=1e-4, atol=1e-4)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, tmp_path):
    options = NETWORK | LEVELS | {"MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]]}
    options |= {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 2}
    file = CONFIGS / f"{name}_dyhead_R18_shapes.yaml"
    assert_engines_agree(file, options, tmp_path / "w.pth", size=(100, 150))
    keys = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    assert "backbone.backbone.bottom_up.spinenet.blocks.16.0.conv3.norm.weight" in keys


@pytest.mark.detectron2
def test_both_engines_pad_images_to_multiples_of_128():
    from detectron2 import config

    from dyhead.detectron2 import Trainer

    ours = build_model(configured({}))
    theirs = Trainer.build_model(configured({}, cfg=add_dyhead_config(config.get_cfg())))
    assert ours.backbone.size_divisibility == theirs.backbone.size_divisibility == 128
    assert list(theirs.backbone.output_shape()) == list(ours.backbone.strides)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (
            "atss_dyhead",
            {"MODEL.SPINENET.NAME": "spinenet50"},
            "NAME: expected one of 'spinenet49s', .*'spinenet50'",
        ),
        ("atss_dyhead", {"MODEL.SPINENET.DIALECT": "tf"}, "SPINENET.DIALECT: expected one of 'port', 'tpu', 'garden'"),
        ("atss_dyhead", {"MODEL.BACKBONE.FREEZE_AT": 2}, "FREEZE_AT: expected 0 with build_spinenet_backbone.*got 2"),
        ("atss_dyhead", {"MODEL.ATSS.IN_FEATURES": ["p2", "p3"]}, "ATSS.IN_FEATURES: expected some of the levels p3"),
        ("faster_rcnn_dyhead", {"MODEL.DSFPN.MAPS": "laterals"} | LEVELS, "DSFPN.MAPS: .*of which there are none"),
    ],
)
def test_what_cannot_be_built_is_refused(file, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configured(options, CONFIGS / f"{file}_R18_shapes.yaml"))


def test_keys_of_other_networks_and_of_fpn_are_named(caplog):
    cfg = configured({"MODEL.RESNETS.DEPTH": 34, "MODEL.FPN.OUT_CHANNELS": 64})
    check_values(cfg)
    ignore_not_honoured(cfg, {"MODEL.RESNETS.DEPTH", "MODEL.FPN.OUT_CHANNELS", "MODEL.SPINENET.NAME"})
    assert "does not read: MODEL.FPN.OUT_CHANNELS 64, MODEL.RESNETS.DEPTH 34" in caplog.text
    assert "SPINENET" not in caplog.text
