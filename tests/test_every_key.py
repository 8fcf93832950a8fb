"""Every key of Detectron2, in both engines: its value is checked, or the engine says that it does not read it."""

import importlib
import logging
import os
import re
import warnings
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

from dyhead.config import ConfigError, add_dyhead_config, get, load_config, option_nodes
from dyhead.data import DataError
from dyhead.options import leaves as options_of

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart"
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
# The folder, the weights and the device are tested in test_preflight.py, the results in tests/evaluation.
BEFORE_OR_AFTER_A_RUN = {"MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "TEST.EXPECTED_RESULTS"}
# Of which every value of their type is legal, and honoured.
HONOURED = {
    "DATALOADER.ASPECT_RATIO_GROUPING",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "MODEL.RESNETS.DEFORM_MODULATED",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "SOLVER.NESTEROV",
    "SOLVER.RESCALE_INTERVAL",
    "SOLVER.CLIP_GRADIENTS.ENABLED",
    "SOLVER.AMP.ENABLED",
    "TEST.AUG.ENABLED",
    "TEST.PRECISE_BN.ENABLED",
    "CUDNN_BENCHMARK",
    "SEED",
}
HONOURED_WITH = {
    "faster_rcnn": {
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        "MODEL.MASK_ON",
        "MODEL.KEYPOINT_ON",
    },
    "detectron2": {
        "INPUT.CROP.ENABLED",
        "DATALOADER.REPEAT_SQRT",
    },
    "detectron2 faster_rcnn": {
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES",
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    },
}


def keys(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def keys_of_detectron2():
    """But for those that are options, which test_config_checks.py tests."""
    file = resources.files("dyhead") / "torchvision" / "detectron2_defaults.yaml"
    options = {f"{node}.{leaf.key}" for node, options in option_nodes().items() for leaf in options_of(options)}
    return [key for key in keys(next(yaml.safe_load_all(file.read_text()))) if key not in options]


def defaults(engine):
    package = "detectron2.config" if engine == "detectron2" else "dyhead.torchvision"
    return add_dyhead_config(importlib.import_module(package).get_cfg())


@pytest.fixture
def outcome(caplog):
    """What an engine says of a quickstart with one value changed: the error, or the warnings, and the value then."""
    caplog.set_level(logging.WARNING)

    def outcome(engine, cfg, key, value):
        module = importlib.import_module(f"dyhead.{engine}.config")
        node, _, name = key.rpartition(".")
        node = get(cfg, node) if node else cfg
        before, node[name] = node[name], value
        caplog.clear()
        try:
            module.check_values(cfg)
            module.ignore_not_honoured(cfg, {key})
            return caplog.text, node[name]
        except ConfigError as error:
            return str(error), None
        finally:
            node[name] = before

    return outcome


def another(value):
    """A value of the same type that hardly means anything."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(-12345)
    if isinstance(value, (list, tuple)):
        return type(value)([[["no such value"]]])
    return "no such value"


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_value_without_sense_is_refused_or_named_as_ignored(engine, detector, outcome):
    cfg = defaults(engine)
    load_config(cfg, QUICKSTART / f"{detector}_dyhead_R18_shapes.yaml")
    silent = set()
    for key in keys_of_detectron2():
        told, _ = outcome(engine, cfg, key, another(get(cfg, key)))
        if not re.search(rf"(^|: |, ){re.escape(key)}(: | )", told):
            silent.add(key)
    honoured = HONOURED.union(*(HONOURED_WITH.get(of, ()) for of in (engine, detector, f"{engine} {detector}")))
    assert silent - BEFORE_OR_AFTER_A_RUN == honoured


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_key_that_has_its_default_is_not_named(engine, detector, outcome):
    cfg, default = defaults(engine), defaults(engine)
    load_config(cfg, QUICKSTART / f"{detector}_dyhead_R18_shapes.yaml")
    for key in keys(default):
        told, _ = outcome(engine, cfg, key, get(default, key))
        assert "cannot honour" not in told
        assert "does not read" not in told


@pytest.mark.parametrize("workers", [4, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_pytorch_warns_only_of_workers_that_were_asked_for(engine, workers, monkeypatch):
    module, cfg = importlib.import_module(f"dyhead.{engine}.config"), defaults(engine)
    load_config(cfg, QUICKSTART / "fcos_dyhead_R18_shapes.yaml")
    cfg.DATALOADER.NUM_WORKERS = workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.ignore_not_honoured(cfg, set())
        torch.utils.data.DataLoader([1], num_workers=workers)
    assert any("worker processes" in str(warning.message) for warning in caught) == (workers == 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_ignored_is_said_to_be_as_it_is_by_default(engine, outcome):
    cfg = defaults(engine)
    load_config(cfg, QUICKSTART / "fcos_dyhead_R18_shapes.yaml")
    told, value = outcome(engine, cfg, "MODEL.MASK_ON", True)
    assert re.search("The .* engine cannot honour, and ignores: MODEL.MASK_ON True", told)
    assert value is False
    told, value = outcome(engine, cfg, "MODEL.RETINANET.NUM_CLASSES", 7)
    assert "DyHeadFCOS does not read: MODEL.RETINANET.NUM_CLASSES 7" in told
    assert value == 7
    told, _ = outcome(engine, cfg, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]])
    assert "DyHeadFCOS does not read: MODEL.ANCHOR_GENERATOR.SIZES [[32]]" in told


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_of_another_box_head_are_named(engine, outcome):
    cfg = defaults(engine)
    load_config(cfg, QUICKSTART / "faster_rcnn_dyhead_R18_shapes.yaml")
    told, _ = outcome(engine, cfg, "MODEL.DYHEAD_BOX_HEAD.NUM_ATTENTIONS", 2)
    assert "DyHeadRCNN does not read: MODEL.DYHEAD_BOX_HEAD.NUM_ATTENTIONS 2" in told
    told, _ = outcome(engine, cfg, "MODEL.ROI_BOX_HEAD.NUM_FC", 3)
    assert "does not read" not in told
    cfg.MODEL.ROI_BOX_HEAD.NAME = "DyHeadBoxHead"
    told, _ = outcome(engine, cfg, "MODEL.DYHEAD_BOX_HEAD.NUM_ATTENTIONS", 2)
    assert "does not read" not in told
    for key, value in (("NUM_FC", 3), ("FC_DIM", 256), ("NUM_CONV", 1), ("CONV_DIM", 7), ("NORM", "GN")):
        told, _ = outcome(engine, cfg, f"MODEL.ROI_BOX_HEAD.{key}", value)
        assert f"DyHeadRCNN does not read: MODEL.ROI_BOX_HEAD.{key} {value!r}" in told
    told, _ = outcome(engine, cfg, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.0)
    assert "does not read" not in told
    cfg.MODEL.ROI_BOX_HEAD.NAME = "D2Det"
    told, _ = outcome(engine, cfg, "MODEL.D2DET.JITTER", 0.1)
    assert "does not read" not in told
    changes = {"BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0), "BBOX_REG_LOSS_TYPE": "giou", "BBOX_REG_LOSS_WEIGHT": 2.0}
    for key, value in (changes | {"SMOOTH_L1_BETA": 1.0, "CLS_AGNOSTIC_BBOX_REG": True}).items():
        told, _ = outcome(engine, cfg, f"MODEL.ROI_BOX_HEAD.{key}", value)
        assert f"DyHeadRCNN does not read: MODEL.ROI_BOX_HEAD.{key} {value!r}" in told
    told, value = outcome(engine, cfg, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2)
    assert "cannot honour, and ignores: MODEL.ROI_MASK_HEAD.NUM_CONV 2" in told
    assert value == 0


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"INPUT.CROP.SIZE": [300, 300]},
            r"INPUT.CROP.SIZE: expected parts of the image, at most 1, with INPUT.CROP.TYPE relative_range, got \[300",
        ),
        (
            {"INPUT.CROP.TYPE": "absolute"},
            r"INPUT.CROP.SIZE: expected pixels with INPUT.CROP.TYPE absolute, got \[0.9, 0.9\]",
        ),
        (
            {"SOLVER.REFERENCE_WORLD_SIZE": 3},
            "SOLVER.REFERENCE_WORLD_SIZE: expected a divisor of SOLVER.IMS_PER_BATCH, 4, got 3",
        ),
        (
            {"SOLVER.REFERENCE_WORLD_SIZE": 1, "SOLVER.CHECKPOINT_PERIOD": 1},
            "SOLVER.REFERENCE_WORLD_SIZE 1: the schedule cannot be scaled to 8 devices: "
            "SOLVER.CHECKPOINT_PERIOD: expected a whole number, at least 1, got 0",
        ),
        (
            {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"},
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: expected True with MODEL.ROI_HEADS.NAME CascadeROIHeads",
        ),
        (
            {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.6, 0.7)},
            r"MODEL.ROI_BOX_CASCADE_HEAD.IOUS: expected MODEL.ROI_HEADS.IOU_THRESHOLDS, 0.5, first, got \(0.6, 0.7\)",
        ),
        (
            {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.7)},
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS: expected 2 lists, as many as IOUS, got",
        ),
        (
            {"MODEL.FPN.IN_FEATURES": ["res1"]},
            r"MODEL.FPN.IN_FEATURES: expected some of MODEL.RESNETS.OUT_FEATURES, \['res2', .*\], got \['res1'\]",
        ),
        (
            {"MODEL.RESNETS.OUT_FEATURES": ["res6"]},
            "MODEL.RESNETS.OUT_FEATURES: expected .* each one of 'stem', 'res2', 'res3', 'res4', 'res5', got",
        ),
        (
            {"MODEL.MASK_ON": True},  # Detectron2's default leaves the mask head without its convolutions
            "MODEL.ROI_MASK_HEAD.NUM_CONV: expected .* at least 1, as on a pyramid, where Detectron2's .* 4, got 0",
        ),
        (
            {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": ()},
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS: exp",
        ),
        (
            {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3},
            r"TEST.KEYPOINT_OKS_SIGMAS: expected 3 numbers, as many as NUM_KEYPOINTS, got \[\]",
        ),
        (
            {"MODEL.KEYPOINT_ON": True, "TEST.KEYPOINT_OKS_SIGMAS": [0.1]},
            r"TEST.KEYPOINT_OKS_SIGMAS: expected 17 numbers, as many as NUM_KEYPOINTS, got \[0.1\]",
        ),
    ],
)
def test_values_that_detectron2_would_stumble_over_are_refused(settings, message):
    from dyhead.detectron2.config import check_values

    cfg = defaults("detectron2")
    load_config(cfg, QUICKSTART / "faster_rcnn_dyhead_R18_shapes.yaml", ["SOLVER.REFERENCE_WORLD_SIZE", "2"])
    check_values(cfg, processes=8)
    check_values(cfg, processes=0)  # which check_run refuses
    for key, value in settings.items():
        node, _, name = key.rpartition(".")
        get(cfg, node)[name] = value
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_values(cfg, processes=8)


@pytest.mark.detectron2
def test_masks_and_keypoints_need_annotations():
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dyhead.detectron2.config import check_annotations

    cfg = defaults("detectron2")
    runs = {"size": [4, 6], "counts": "0h0"}
    sets = {
        "polygons": [{"segmentation": [[0, 0, 4, 0, 4, 4]], "keypoints": [1, 1, 2]}],
        "no_masks": [{}],
        "runs": [{"segmentation": runs}],
        "runs_for_crowds": [{"segmentation": runs, "iscrowd": 1}],
        "runs_of_another_size": [{"segmentation": runs | {"size": [6, 4]}}],
    }
    for name, annotations in sets.items():
        record = {"file_name": f"{name}.png", "height": 4, "width": 6, "annotations": annotations}
        DatasetCatalog.register(name, lambda record=record: [record])
    try:
        check_annotations(cfg, sets)
        cfg.MODEL.MASK_ON = True
        check_annotations(cfg, ["polygons", "runs_for_crowds"], ["polygons", "runs"])
        for train, test in ((["no_masks"], []), (["polygons"], ["no_masks"])):
            with pytest.raises(
                ConfigError, match=r"^MODEL.MASK_ON: .*'no_masks' .*without a segmentation \(no_masks.p"
            ):
                check_annotations(cfg, train, test)
        with pytest.raises(ConfigError, match=r"INPUT.MASK_FORMAT: expected 'bitmask', since dataset 'runs' has masks"):
            check_annotations(cfg, ["polygons", "runs"])
        cfg.INPUT.MASK_FORMAT = "bitmask"
        check_annotations(cfg, ["polygons", "runs"])
        with pytest.raises(DataError, match=r"runs_of_another_size.png: expected masks .* of 4 x 6 .* got 6 x 4"):
            check_annotations(cfg, ["runs_of_another_size"])
        cfg.MODEL.KEYPOINT_ON = True
        with pytest.raises(
            ConfigError, match="^MODEL.KEYPOINT_ON: expected False, since dataset 'polygons' has no key"
        ):
            check_annotations(cfg, ["polygons"])
        MetadataCatalog.get("polygons").keypoint_names = ["a"]
        with pytest.raises(ConfigError, match=r"NUM_KEYPOINTS: expected 1, the number of keypoints of dataset 'polyg"):
            check_annotations(cfg, ["polygons"])
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 1
        check_annotations(cfg, ["polygons"])
    finally:
        for name in sets:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
