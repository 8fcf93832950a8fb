"""PyConvResNet and PS-ResNet: against their authors' code, and under both engines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from dyhead.backbones import PSConvOptions, PyConvOptions
from dyhead.config import ConfigError, load_config
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.config import check_values, ignore_not_honoured
from tests.backbones.exchange import assert_engines_agree
from tests.test_contract import CONFIGS, OPTIONS, Detectron2, Torchvision
from tools.originals import resnets
from tools.originals.rows import table
from tools.originals.values import tensors

RECORDS = json.loads(Path(__file__).with_name("resnets.json").read_text())
FILE = CONFIGS / "atss_dyhead_R18_shapes.yaml"
PYCONV = {"MODEL.BACKBONE.NAME": "build_pyconv_fpn_p6p7_backbone", "MODEL.BACKBONE.FREEZE_AT": 0}
PSCONV = {
    "MODEL.BACKBONE.NAME": "build_psconv_fpn_p6p7_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PSCONV.WIDTH_PER_GROUP": 4,
}

GROUPS = {"MODEL.PSCONV.NUM_GROUPS": 2}
RENAMED = {"gwconv": "same", "gwconv_shift": "opposite", "conv": "rest"}  # in the authors' code, and here


def configured(options, file=FILE):
    cfg = get_cfg()
    load_config(cfg, file, [str(word) for pair in (OPTIONS | options).items() for word in pair])
    return cfg


def shapes(name, width=None):
    """The keys of a classifier as its authors' code names them, out of torchvision's ResNets."""
    depth, groups, width = {"ps_resnext101_32x4d": (101, 32, 4), "pyconvhgresnet50": (50, 1, 128)}.get(
        name, (50, 1, width or 64)
    )
    with torch.device("meta"):
        model = getattr(torchvision.models, f"resnet{depth}")(groups=groups, width_per_group=width)
    out = {}
    for key, value in model.state_dict().items():
        shape = list(value.shape)
        stage = RECORDS[name].get("conv2_by_stage", {}).get(key.partition(".")[0], [])
        if name.startswith("ps_") and ".conv2." in key:
            part = [shape[0], shape[1] // 4, 3, 3]
            prefix = key.removesuffix("weight")
            out |= {f"{prefix}gwconv.weight": part, f"{prefix}gwconv_shift.weight": part, f"{prefix}conv.weight": shape}
        elif stage and ".conv2." in key:
            levels = [[x["out"], x["in"] // x["groups"], x["kernel"], x["kernel"]] for x in stage]
            if len(levels) == 1:
                out[key] = levels[0]
            else:
                prefix = key.removesuffix("weight")
                out |= {f"{prefix}conv2_{i}.weight": level for i, level in enumerate(levels, 1)}
        elif stage and ".downsample." in key:  # after the pooling
            out[key.replace("downsample.1", "downsample.2").replace("downsample.0", "downsample.1")] = shape
        else:
            out[key] = shape
    return out


def body(engine):
    """The network in a detector."""
    backbone = engine.model.backbone
    return backbone.body.psconv if isinstance(engine, Torchvision) else backbone.backbone.bottom_up.psconv


def load(engine, path):
    """As the beginning of a training does."""
    if isinstance(engine, Torchvision):
        load_weights(engine.model, str(path), strict=False)
    else:
        engine.checkpointer.load(str(path), [])


def authors_name(key):
    for theirs, ours in RENAMED.items():
        key = key.replace(f".conv2.{ours}.", f".conv2.{theirs}.")
    return key


def small_state():
    """The weights of a classifier with narrow PSConv layers, as their authors' code names them."""
    record = RECORDS["ps_resnet50"]
    return tensors(record | {"keys": shapes("ps_resnet50", width=4)})


@pytest.mark.parametrize("name", RECORDS)
def test_every_stage_is_what_the_authors_code_computes(name):
    record = RECORDS[name] | {"keys": RECORDS[name]["keys"] | shapes(name)}
    if name.startswith("ps_"):  # without the classifier
        record["keys"] = {key: shape for key, shape in record["keys"].items() if not key.startswith("fc.")}
    arrays = {key: np.asarray(values)[None] for key, values in record["values"].items()}
    rows = list(resnets.compare_network(record, arrays))
    assert {"C2", "C3", "C4", "C5"} <= {row.stage for row in rows}
    assert len(rows) == len(arrays) // 2 + (name == "ps_resnet50") * 10  # once dense, once not
    assert all(row.passes for row in rows), table(rows)


@pytest.mark.parametrize("name", RECORDS)
def test_it_has_as_many_weights_as_the_authors_network(name):
    options = resnets.NETWORKS[name]
    with torch.device("meta"):
        network = type(options)(**(vars(options) | {"frozen_bn": False} | ps_dense(name))).build()
    classifier = 0 if name.startswith("ps_") else 2048 * 1000 + 1000
    assert sum(p.numel() for p in network.parameters()) + classifier == RECORDS[name]["parameters"]


def ps_dense(name):
    return {"dense": True} if name.startswith("ps_") else {}


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("options", [PyConvOptions, PSConvOptions])
def test_depths_are_those_of_resnets_and_sizes_are_rounded_up(options, depth):
    with torch.device("meta"):
        network = options(depth=depth).build()
        maps = network(torch.zeros(1, 3, 61, 93))
        blocks = [len(getattr(network, f"layer{i}")) for i in range(1, 5)]
    assert blocks == {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[depth]
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "res2": (256, 16, 24), "res3": (512, 8, 12), "res4": (1024, 4, 6), "res5": (2048, 2, 3),
    }  # fmt: skip
    assert {name: x.shape[1] for name, x in maps.items()} == network.channels
    assert {name: -(-61 // stride) for name, stride in network.strides.items()} == {
        name: x.shape[2] for name, x in maps.items()
    }


@pytest.mark.parametrize("options", [PyConvOptions, PSConvOptions])
def test_batch_norm_is_kept_as_configured(options):
    for frozen in (True, False):
        network = options(frozen_bn=frozen).build().train()
        before = {key: x.clone() for key, x in network.state_dict().items() if "running" in key}
        network(torch.randn(2, 3, 64, 64))
        assert len(before) == 2 * 53
        assert all(torch.equal(network.state_dict()[key], x) == frozen for key, x in before.items())


def test_held_weights_start_at_0_in_a_dense_network():
    network = PSConvOptions(dense=True, width_per_group=4).build()
    held = [layer for layer in network.modules() if getattr(layer, "dense", False) and hasattr(layer, "held")]
    assert len(held) == 16
    for layer in held:
        assert torch.equal(layer.rest.weight == 0, layer.held.expand_as(layer.rest.weight))


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("atss", PYCONV),
        ("atss", PSCONV | {"MODEL.PSCONV.NUM_GROUPS": 2, "MODEL.PSCONV.DENSE": True}),
        ("faster_rcnn", PSCONV | {"MODEL.BACKBONE.NAME": "build_psconv_fpn_backbone"}),
    ],
)
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, options, tmp_path):
    file = CONFIGS / f"{name}_dyhead_R18_shapes.yaml"
    assert_engines_agree(file, options, tmp_path / "w.pth", noise=0.001, all_learn=False)


def test_weights_of_the_authors_are_loaded_by_a_detector(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "w.pth")
    model = build_model(configured(PSCONV | {"MODEL.PSCONV.DENSE": True}))
    load_weights(model, str(tmp_path / "w.pth"), strict=False)
    loaded = model.backbone.body.psconv.state_dict()
    assert loaded
    assert all(torch.equal(x, state[authors_name(key)]) for key, x in loaded.items())


@pytest.mark.parametrize("engine", [Torchvision, pytest.param(Detectron2, marks=pytest.mark.detectron2)])
@pytest.mark.parametrize("converted", [False, True])
def test_weights_that_only_a_dense_network_holds_are_refused_by_another(engine, converted, tmp_path):
    dense = engine(FILE, PSCONV | GROUPS | {"MODEL.PSCONV.DENSE": True})
    with torch.no_grad():
        body(dense).layer1[0].conv2.rest.weight[3, 1] = 0.125  # of the last block, which reads the second one's channel
    state = dict(body(dense).state_dict())
    if converted:
        dense.save(tmp_path / "w.pth")
    else:
        torch.save({authors_name(key): x for key, x in state.items()}, tmp_path / "w.pth")
    key = ("backbone.backbone.bottom_up.psconv." if converted else "") + "layer1.0.conv2."
    message = rf"w.pth: {key}{'rest' if converted else 'conv'}.weight: expected 0 where .*PSCONV.DENSE True"
    sparse = engine(FILE, PSCONV | GROUPS)
    with pytest.raises(ConfigError, match=message):
        load(sparse, tmp_path / "w.pth")
    dense = engine(FILE, PSCONV | GROUPS | {"MODEL.PSCONV.DENSE": True})
    load(dense, tmp_path / "w.pth")
    assert all(torch.equal(body(dense).state_dict()[key], x) for key, x in state.items())


@pytest.mark.parametrize("groups", [1, 2])
def test_dense_networks_and_others_take_each_others_weights_where_these_are_the_same(groups, tmp_path):
    options = PSCONV | {"MODEL.PSCONV.NUM_GROUPS": groups}
    sparse = Torchvision(FILE, options)
    sparse.save(tmp_path / "sparse.pth")
    dense = Torchvision(FILE, options | {"MODEL.PSCONV.DENSE": True})
    dense.load(tmp_path / "sparse.pth")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for level, x in body(sparse).eval()(image).items():
            torch.testing.assert_close(body(dense).eval()(image)[level], x, rtol=1e-4, atol=1e-4)
    dense.save(tmp_path / "dense.pth")
    again = Torchvision(FILE, options)
    again.load(tmp_path / "dense.pth")
    assert all(torch.equal(again.model.state_dict()[key], x) for key, x in sparse.model.state_dict().items())


@pytest.mark.parametrize("options", [PYCONV, PSCONV])
def test_weights_of_another_network_are_refused(options, tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w.pth \(a ResNet of torchvision\) does not fit the model"):
        load_weights(build_model(configured(options)), str(tmp_path / "w.pth"), strict=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PYCONV | {"MODEL.PYCONV.DEPTH": 34}, "MODEL.PYCONV.DEPTH: expected one of 50, 101, 152, got 34"),
        (PYCONV | {"MODEL.BACKBONE.FREEZE_AT": 2}, "FREEZE_AT: expected 0 with build_pyconv_fpn_p6p7_backbone.*got 2"),
        (PYCONV | {"MODEL.FPN.IN_FEATURES": ["res3", "res6"]}, "expected some of the maps of MODEL.PYCONV"),
        (PSCONV | {"MODEL.PSCONV.WIDTH_PER_GROUP": 6}, "WIDTH_PER_GROUP: expected .*a multiple of 4, got 6"),
        (PSCONV | {"MODEL.PSCONV.WIDTH_PER_GROUP": 0}, "WIDTH_PER_GROUP: expected .*at least 4, .*got 0"),
        (PSCONV | {"MODEL.PSCONV.NUM_GROUPS": 0}, "NUM_GROUPS: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configured(options))


def test_keys_of_other_networks_are_named(caplog):
    cfg = configured(PSCONV | {"MODEL.PYCONV.DEPTH": 101, "MODEL.RESNETS.DEPTH": 34})
    check_values(cfg)
    ignore_not_honoured(cfg, {"MODEL.PYCONV.DEPTH", "MODEL.RESNETS.DEPTH", "MODEL.PSCONV.WIDTH_PER_GROUP"})
    assert "does not read: MODEL.PYCONV.DEPTH 101, MODEL.RESNETS.DEPTH 34" in caplog.text
    assert "PSCONV" not in caplog.text
