"""Hit-Detector's backbone, neck and box head: the authors' numbers, both engines, the authors' names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dyhead.backbones import NETWORKS, HitDetectorOptions, HitDetectorPyramidOptions
from dyhead.backbones.hit_detector import HitDetectorNeck
from dyhead.checkpoints import convert
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.config import check_values
from tests.backbones.exchange import assert_engines_agree
from tests.test_contract import OPTIONS
from tools.originals import hit_detector as originals
from tools.originals.rows import table

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.HIT_DETECTOR_PYRAMID.OUT_CHANNELS": 16,
    "MODEL.HIT_DETECTOR_HEAD.FC_DIM": 16,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ATSS.NUM_CLASSES": 3,
}
NAMES = ["atss_dyhead_hit_detector", "faster_rcnn_dyhead_hit_detector"]


@pytest.mark.parametrize(
    ("name", "compare", "rows"),
    [("hit_detector", originals.compare, 32), ("hit_detector_ops", originals.compare_operations, 10)],
)
def test_computes_what_the_authors_code_does(name, compare, rows):
    file = Path(__file__).with_name(f"{name}.json")
    with np.load(file.with_suffix(".npz")) as arrays:
        found = list(compare(json.loads(file.read_text()), dict(arrays)))
    assert len(found) == rows
    assert all(row.passes for row in found), table(found)


@pytest.mark.parametrize("size", [(64, 96), (61, 93), (33, 35)])
def test_maps_and_levels_have_the_strides_and_channels_that_are_declared(size):
    for network in (HitDetectorOptions("BN").build(), HitDetectorPyramidOptions("BN", out_channels=8).build()):
        with torch.no_grad():
            maps = network.eval()(torch.randn(1, 3, *size))
        assert list(maps) == list(network.strides) == list(network.channels)
        for name, x in maps.items():
            assert network.strides[name] == 2 ** int(name[1:].removeprefix("es"))
            assert x.shape == (1, network.channels[name], *(-(-n // network.strides[name]) for n in size))


@torch.no_grad()
def test_the_neck_adds_to_finer_levels_and_then_to_coarser_ones():
    neck = HitDetectorNeck([2, 3, 4, 5], 4, "BN").eval()
    maps = {f"res{i}": torch.randn(1, i, n, 2 * n) for i, n in zip((2, 3, 4, 5), (8, 4, 2, 1), strict=True)}
    a, b, c, d = (cell(x) for cell, x in zip(neck.cells[:4], maps.values(), strict=True))

    def doubled(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def halved(x):
        return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))

    c = c + doubled(d)
    b = b + doubled(c)
    a, b, c, d = (cell(x) for cell, x in zip(neck.cells[4:], (a + doubled(b), b, c, d), strict=True))
    want = [a]
    for conv, x in zip(neck.bottom_up, (b, c, d), strict=True):
        want.append(conv(halved(want[-1]) + x))
    want.append(want[-1][:, :, ::2, ::2])
    got = neck(maps)
    assert list(got) == ["p2", "p3", "p4", "p5", "p6"]
    for x, y in zip(got.values(), want, strict=True):
        torch.testing.assert_close(x, y)


def test_layers_behind_the_last_map_are_left_out():
    network = HitDetectorOptions("BN").build(["res3", "res4"])
    assert list(network.channels) == ["res2", "res3", "res4"]
    network(torch.randn(2, 3, 32, 32))["res4"].sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []


def configured(name, cfg, **options):
    load_config(
        cfg, CONFIGS / f"{name}.yaml", [str(word) for pair in (OPTIONS | SMALL | options).items() for word in pair]
    )
    return cfg


@pytest.mark.detectron2
@pytest.mark.parametrize("name", NAMES)
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, tmp_path):
    file = CONFIGS / f"{name}.yaml"
    torch.manual_seed(0)
    assert_engines_agree(file, SMALL, tmp_path / "w.pth")


def published():
    """Weights of the backbone as the authors name them, and the same with our names."""
    ours = HitDetectorOptions("BN").build().state_dict()
    ours = {key: torch.rand_like(x) if x.is_floating_point() else x for key, x in ours.items()}
    return {
        "module." + originals._their_name(f"backbone.{key}").removeprefix("backbone."): x for key, x in ours.items()
    }, ours


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
@pytest.mark.parametrize("name", NAMES)
def test_the_authors_backbone_is_loaded_with_fpn_and_with_their_neck(engine, name, tmp_path):
    state, ours = published()
    assert "module.layers.1.conv1.bn.running_mean" in state
    state["module.fc.weight"] = torch.zeros(4, 4)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    if engine == "torchvision":
        model = build_model(configured(name, get_cfg()))
        load_weights(model, str(tmp_path / "w.pth"), strict=False)
    else:
        from detectron2 import config

        from dyhead.detectron2 import Checkpointer, Trainer

        model = Trainer.build_model(configured(name, add_dyhead_config(config.get_cfg())))
        Checkpointer(model).load(str(tmp_path / "w.pth"), checkpointables=[])
    loaded = model.state_dict()
    (prefix,) = {key.removesuffix("blocks.0.conv.weight") for key in loaded if key.endswith("blocks.0.conv.weight")}
    for key, x in ours.items():
        assert key.endswith("num_batches_tracked") or torch.equal(loaded[prefix + key], x), key


def test_every_name_of_the_authors_backbone_has_its_own():
    state, ours = published()
    for prefix in ("module.", "", "backbone.", "module.backbone."):
        conversion = convert({prefix + key.removeprefix("module."): x for key, x in state.items()})
        assert conversion.source == "Hit-Detector's backbone"
        assert not conversion.left_over
        assert {key.partition("hit_detector.")[2] for key in conversion.state} == {
            key for key in ours if not key.endswith("num_batches_tracked")
        }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAMES[0], {"MODEL.HIT_DETECTOR.NORM": "GN"}, "MODEL.HIT_DETECTOR.NORM: expected one of 'BN', .* got 'GN'"),
        (NAMES[0], {"MODEL.BACKBONE.FREEZE_AT": 2}, "MODEL.BACKBONE.FREEZE_AT: expected 0 with build_hit_detector_fpn"),
        (
            NAMES[0],
            {"MODEL.FPN.IN_FEATURES": ["res3", "res6"]},
            r"IN_FEATURES: expected some of the maps of MODEL.HIT_",
        ),
        (
            NAMES[1],
            {"MODEL.HIT_DETECTOR_PYRAMID.NECK_NORM": "FrozenBN"},
            "NECK_NORM: expected one of 'BN', 'SyncBN', got",
        ),
        (NAMES[1], {"MODEL.HIT_DETECTOR_PYRAMID.OUT_CHANNELS": 0}, "OUT_CHANNELS: expected at least 1, got 0"),
        (
            NAMES[1],
            {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 1},
            "HIT_DETECTOR_HEAD cannot be built .* side: expected at",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, message):
    cfg = configured(name, get_cfg(), **options)
    with pytest.raises(ConfigError, match=message):
        build_checked(cfg)


def build_checked(cfg):
    check_values(cfg)
    return build_model(cfg)


def test_the_builders_say_what_they_build():
    assert NETWORKS["hit_detector"].builders == (
        "build_hit_detector_fpn_backbone",
        "build_hit_detector_fpn_p6p7_backbone",
    )
    assert NETWORKS["hit_detector_pyramid"].builders == ("build_hit_detector_pyramid_backbone",)
