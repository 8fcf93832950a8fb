"""The configuration of the torchvision engine."""

import fnmatch
import logging
import re
from pathlib import Path

import pytest
import yaml

import dyhead.torchvision as package
from dyhead.config import ConfigError, add_dyhead_config, get, option_nodes
from dyhead.detection import DETECTORS
from dyhead.options import leaves as option_leaves
from dyhead.torchvision import build_model, get_cfg, setup
from dyhead.torchvision.config import check_values, not_honoured_keys


def leaves(cfg, prefix=""):
    for name, value in cfg.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.detectron2
def test_keys_and_defaults_are_those_of_detectron2():
    from detectron2.config import get_cfg as detectron2_cfg

    theirs, ours = dict(leaves(add_dyhead_config(detectron2_cfg()))), dict(leaves(get_cfg()))
    assert {key: (type(value), value) for key, value in ours.items()} == {
        key: (type(value), value) for key, value in theirs.items()
    }
    assert not_honoured_keys() < theirs.keys()


def test_every_pattern_of_keys_that_are_not_honoured_fits_a_key():
    path = Path(package.__file__).with_name("detectron2_defaults.yaml")
    defaults, patterns = yaml.safe_load_all(path.read_text())
    keys = [key for key, _ in leaves(defaults)]
    assert [pattern for pattern in patterns if not fnmatch.filter(keys, pattern)] == []


def test_a_written_configuration_reads_back_the_same(tiny, configured, command, tmp_path, caplog):
    cfg = configured(tiny, "retinanet")
    text = cfg.dump()
    assert "&id" not in text  # no YAML anchors, which people do not read
    (tmp_path / "config.yaml").write_text(text)
    args = command({})
    args.config_file = tmp_path / "config.yaml"
    assert setup(args).dump() == text
    assert "cannot honour" not in caplog.text


def test_keys_that_cannot_be_honoured_are_named_with_their_values_in_one_warning(tiny, command, caplog):
    caplog.set_level(logging.WARNING)
    options = tiny | {
        "MODEL.MASK_ON": True,
        "INPUT.CROP.ENABLED": True,
        "MODEL.KEYPOINT_ON": False,  # which is what happens
        "SOLVER.GAMMA": 0.2,  # honoured
    }
    setup(command(options))
    (message,) = [r.getMessage() for r in caplog.records if "cannot honour" in r.getMessage()]
    assert "MODEL.MASK_ON True" in message
    assert "INPUT.CROP.ENABLED True" in message
    assert "KEYPOINT_ON" not in message
    assert "GAMMA" not in message


def test_the_shipped_configurations_are_honoured_in_full(tiny, command, caplog):
    caplog.set_level(logging.WARNING)
    two_stage = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn")
    for detector in (*(registered.name.lower() for registered in DETECTORS.values()), *two_stage):
        args = command({key: tiny[key] for key in ("MODEL.DEVICE", "OUTPUT_DIR")}, detector)
        for config in (args.config_file, args.config_file.replace("quickstart/", "").replace("R18_shapes", "R50")):
            args.config_file = config
            setup(args)
    args.config_file = args.config_file.replace("_dyhead", "_dyhead_box_head")
    setup(args)
    assert not [r for r in caplog.records if re.search("cannot honour|does not read", r.getMessage())]


def test_a_misspelt_key_is_an_error_that_suggests_the_right_one(tiny, command):
    with pytest.raises(ConfigError, match=r"unknown key SOLVER\.BASE_LT; did you mean SOLVER\.BASE_LR"):
        setup(command(tiny | {"SOLVER.BASE_LT": 0.1}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "MaskRCNN", ", ".join([*DETECTORS, "DyHeadRCNN"])),
        ("MODEL.BACKBONE.NAME", "build_swin", "'build_resnet_fpn_backbone', 'build_resnet_fpn_p6p7_backbone'"),
        ("MODEL.RESNETS.NORM", "naiveSyncBN", "'BN', 'SyncBN', 'FrozenBN', 'GN'"),
        ("MODEL.RESNETS.DEPTH", 20, "18, 34, 50, 101, 152"),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "64 with DEPTH 18"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res5"], r"all of MODEL.FPN.IN_FEATURES, \['res3', 'res4', 'res5'\]"),
        ("MODEL.FPN.IN_FEATURES", ["res2", "res4"], "the last of"),
        ("MODEL.FPN.FUSE_TYPE", "avg", "'sum'"),
        ("MODEL.PIXEL_MEAN", [0.0], "3 values"),
        ("MODEL.DYHEAD.BLOCK", "v2", "'paper', 'released'"),
        ("MODEL.DYHEAD.NORM_GROUPS", 7, "norm_groups"),
        ("MODEL.FCOS.IN_FEATURES", ["p2", "p3"], "some of the levels p3, p4, p5, p6, p7, got p2"),
        ("INPUT.RANDOM_FLIP", "both", "'horizontal', 'vertical', 'none'"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "any", "'choice', 'range'"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all", "'value', 'norm', 'full_model'"),
        ("SOLVER.OPTIMIZER", "LION", "'SGD', 'ADAMW'"),
        ("SOLVER.LR_SCHEDULER_NAME", "Step", "'WarmupMultiStepLR', 'WarmupCosineLR'"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "'TrainingSampler'"),
        ("SOLVER.MAX_ITER", 0, "at least 1"),
    ],
)
def test_a_value_that_cannot_be_honoured_names_the_key_and_what_is_supported(tiny, configured, key, value, message):
    cfg = configured(tiny | {key: value})
    with pytest.raises(ConfigError, match=message) as error:
        build_model(cfg)
    if not key.startswith(("MODEL.DYHEAD", "MODEL.FCOS")):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("detector", "key", "value", "message"),
    [
        ("retinanet", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "l3", "'smooth_l1', 'iou', 'giou', 'diou', 'ciou'"),
        ("retinanet", "MODEL.RETINANET.IOU_LABELS", [0, 1], r"expected 3 labels with IOU_THRESHOLDS \[0.4, 0.5\]"),
        ("retinanet", "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]], "1 or 5 lists"),
        ("retinanet", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [2.0]], "1 or 5 lists"),
        ("faster_rcnn", "MODEL.ANCHOR_GENERATOR.SIZES", [[1], [2], [3], [4], [5, 6]], "as many anchors on every level"),
        ("faster_rcnn", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "'StandardROIHeads', 'CascadeROIHeads'"),
        ("faster_rcnn", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "some of the levels p2, p3, p4, p5, p6"),
        ("faster_rcnn", "MODEL.ROI_BOX_HEAD.NUM_FC", 0, "NUM_FC: expected at least 1 with NUM_CONV 0, got 0"),
        ("faster_rcnn", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "'ROIAlignV2', 'ROIAlign'"),
    ],
)
def test_values_are_checked_where_the_detector_uses_them(tiny, configured, detector, key, value, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configured(tiny | {key: value}, detector))
    check_values(configured(tiny | {key: value}))  # FCOS does not use it


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ({"num_gpus": 0}, {}, "--num-gpus: expected at least 1, got 0"),
        ({"num_gpus": 3}, {}, "IMS_PER_BATCH: expected a multiple of the 3 devices, got 2"),
        ({"num_machines": 2, "machine_rank": 2}, {}, "--machine-rank: expected 0 to 1, got 2"),
        ({"num_gpus": 2, "dist_url": "here"}, {}, "--dist-url: expected tcp://HOST:PORT, got here"),
        ({}, {"MODEL.DEVICE": "tpu"}, "MODEL.DEVICE: expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
    ],
)
def test_devices_that_are_not_there_are_refused(tiny, command, flags, options, message):
    args = command(tiny | options)
    vars(args).update(flags)
    with pytest.raises(ConfigError, match=message):
        setup(args)


def test_every_key_that_is_said_to_be_honoured_is_read_somewhere(configured, tiny):
    """A key that is said to be honoured and that nothing reads would be ignored in silence."""
    engine = Path(package.__file__).parent
    parts = (engine, engine.parent / "runs", engine.parent / "evaluation")  # the last two are of both engines
    source = "\n".join(path.read_text() for part in parts for path in part.rglob("*.py"))
    cfg = get_cfg()
    # Options are read as a whole, by the dataclasses that declare them.
    options = {f"{node}.{leaf.key}" for node, options in option_nodes().items() for leaf in option_leaves(options)}
    names = {key for key, _ in leaves(cfg)} - not_honoured_keys() - options - {"VERSION"}
    unread = [key for key in sorted(names) if key.rsplit(".", 1)[-1] not in source]
    assert not unread
    assert get(cfg, "VERSION") == 2
