import importlib
import inspect
from pathlib import Path

import pytest
import torch

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.layers import SEPC
from dyhead.necks import NECKS, SEPCOptions
from dyhead.options import leaves

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


def test_defaults_are_the_modules():
    parameters = inspect.signature(SEPC).parameters
    assert {leaf.key.lower(): leaf.default for leaf in leaves(SEPCOptions)} == {
        name: parameter.default for name, parameter in parameters.items() if name != "channels"
    }


def test_is_registered():
    assert NECKS["SEPC"].node == "MODEL.SEPC"
    assert NECKS["SEPC"].options is SEPCOptions


def test_builds_what_the_options_say():
    torch.manual_seed(0)
    mine = SEPCOptions(num_blocks=2, conv="plain", task_convs="plain", norm="", task_padding=0).build(8)
    torch.manual_seed(0)
    same = SEPC(8, 2, conv="plain", task_convs="plain", norm="", task_padding=0)
    assert repr(mine) == repr(same)
    for (name, got), (other, want) in zip(mine.state_dict().items(), same.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(got, want)


def test_asks_nothing_of_the_images_size():
    assert SEPCOptions().size_divisibility((8, 16, 32)) == 1


@pytest.mark.parametrize(("task_convs", "pairs"), [("none", False), ("plain", True), ("deformable", True)])
def test_says_whether_levels_are_pairs(task_convs, pairs):
    options = SEPCOptions(num_blocks=1, task_convs=task_convs)
    assert options.task_levels == pairs
    assert isinstance(options.build(4)([torch.zeros(2, 4, 3, 3)])[0], tuple) == pairs


@pytest.mark.parametrize(
    ("key", "legal", "illegal"),
    [
        ("NUM_BLOCKS", [0, 4], [-1]),
        ("CONV", ["plain", "deformable", "sampled"], ["none", ""]),
        ("TASK_CONVS", ["none", "plain", "deformable"], ["sampled", ""]),
        ("NORM", ["", "BN", "SyncBN"], ["GN"]),
        ("TASK_PADDING", [0, 1], [2, -1, True]),
    ],
)
def test_legal_values(key, legal, illegal):
    (leaf,) = (leaf for leaf in leaves(SEPCOptions) if leaf.key == key)
    assert [value for value in (*legal, *illegal) if leaf.expected(value) is None] == legal


@pytest.fixture
def build():
    """A function of an engine, a quickstart and options, to the model."""

    def build(engine, name, options):
        if engine == "torchvision":
            engine = importlib.import_module("dyhead.torchvision")
            cfg, model_of = engine.get_cfg(), engine.build_model
        else:
            importlib.import_module("dyhead.detectron2")
            cfg = add_dyhead_config(importlib.import_module("detectron2.config").get_cfg())
            model_of = importlib.import_module("detectron2.modeling").build_model
        options = {"MODEL.DEVICE": "cpu", "MODEL.DYHEAD.NUM_BLOCKS": 1, "MODEL.SEPC.NUM_BLOCKS": 1} | options
        load_config(cfg, CONFIGS / f"{name}_R18_shapes.yaml", [str(word) for pair in options.items() for word in pair])
        torch.manual_seed(0)
        return model_of(cfg)

    return build


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("necks", [["SEPC"], ["DyHead", "SEPC"], ["SEPC", "DyHead"]])
@pytest.mark.parametrize("task_convs", ["none", "deformable"])
def test_follows_and_precedes_dyhead(build, engine, necks, task_convs):
    options = {"MODEL.NECKS": necks, "MODEL.SEPC.TASK_CONVS": task_convs}
    if necks[-1] == "DyHead" and task_convs != "none":
        message = "^MODEL.SEPC.TASK_CONVS: expected 'none' before DyHead, which reads one pyramid for .* 'deformable'$"
        with pytest.raises(ConfigError, match=message):
            build(engine, "atss_sepc", options)
        return
    model = build(engine, "atss_sepc", options)
    assert {key.split(".")[1] for key in model.state_dict() if key.split(".")[1] in ("sepc", "dyhead")} == {
        name.lower() for name in necks
    }
    pyramid = model.backbone(torch.zeros(1, 3, 64, 96))
    assert list(pyramid) == ["p3", "p4", "p5", "p6", "p7"]
    assert all(isinstance(level, tuple) == (task_convs != "none") for level in pyramid.values())
    assert model.detector(pyramid).shapes == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_stage_detectors_read_one_pyramid(build, engine):
    options = {"MODEL.NECKS": ["SEPC"], "MODEL.SEPC.TASK_CONVS": "none"}
    pyramid = build(engine, "faster_rcnn", options).backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in pyramid.values()][:2] == [(64, 16, 24), (64, 8, 12)]
    with pytest.raises(ConfigError, match="^MODEL.SEPC.TASK_CONVS: expected 'none' before DyHeadRCNN, .* 'plain'$"):
        build(engine, "faster_rcnn", options | {"MODEL.SEPC.TASK_CONVS": "plain"})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_that_does_not_take_pairs_is_named(build, engine, monkeypatch):
    monkeypatch.setattr("dyhead.detection.DenseHead.takes_task_levels", False)
    build(engine, "atss_sepc", {"MODEL.SEPC.TASK_CONVS": "none"})
    with pytest.raises(ConfigError, match="^MODEL.SEPC.TASK_CONVS: expected 'none' before DyHeadATSS, "):
        build(engine, "atss_sepc", {})


@pytest.mark.parametrize("engine", ENGINES)
def test_options_that_do_not_fit_each_other_are_refused(build, engine):
    options = {"MODEL.SEPC.TASK_CONVS": "none", "MODEL.SEPC.TASK_PADDING": 0}
    with pytest.raises(ConfigError, match=r"^MODEL.NECKS \['SEPC'\] cannot be built as configured: task_padding: "):
        build(engine, "atss_sepc", options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding", [0, 1])
def test_anchors_stand_on_the_levels_that_come_out(build, engine, padding):
    model = build(engine, "atss_sepc", {"MODEL.SEPC.TASK_PADDING": padding}).eval()
    predictions = model.detector(model.backbone(torch.zeros(1, 3, 128, 192)))
    shapes = {1: [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)], 0: [(14, 22), (6, 10), (2, 4), (1, 1), (1, 1)]}
    assert predictions.shapes == shapes[padding]
    assert len(model.detector.places(predictions).anchors) == predictions.logits.shape[1]
    assert len(model.detector.detections(predictions, [(128, 192)])) == 1
