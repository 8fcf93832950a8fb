"""Which values are legal: every other one is an error that names the key, before anything runs."""

import argparse
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from dyhead.config import TWO_STAGE, ConfigError, check_config, get, load_config, meta_architectures, option_nodes
from dyhead.config_checks import (
    CASCADE_CHECKS,
    CHECKS,
    FPN_CHECKS,
    KEYPOINT_CHECKS,
    MASK_CHECKS,
    RESNET_CHECKS,
    TWO_STAGE_CHECKS,
)
from dyhead.detection import DETECTORS
from dyhead.options import leaves
from dyhead.torchvision import get_cfg

ROOT = Path(__file__).parent.parent
CONFIGS = {
    name: ROOT / f"configs/quickstart/{stem}_dyhead_R18_shapes.yaml"
    for name, stem in {
        "DyHeadATSS": "atss",
        "DyHeadAutoAssign": "autoassign",
        "DyHeadBorderDet": "borderdet",
        "DyHeadFCOS": "fcos",
        "DyHeadGFL": "gfl",
        "DyHeadNoisyAnchors": "noisyanchors",
        "DyHeadRepPoints": "reppoints",
        "DyHeadRetinaNet": "retinanet",
        "DyHeadPairedBox": "pairedbox",
        "DyHeadSaccadeNet": "saccadenet",
        "DyHeadRCNN": "faster_rcnn",
    }.items()
}
# Further two-stage detectors, and the keys that they alone read.
PARTS = {"mask_rcnn": MASK_CHECKS, "keypoint_rcnn": KEYPOINT_CHECKS, "cascade_rcnn": CASCADE_CHECKS}
INFINITY, NAN = float("inf"), float("nan")
# What is no value of any key; and the exceptions.
JUNK = (None, NAN, INFINITY, "no such value", -2, [[[]]])
LEGAL = [
    ("MODEL.DYHEAD.WINDOW", None),
    ("SOLVER.WEIGHT_DECAY_BIAS", None),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", INFINITY),
    ("SEED", -2),
    ("MODEL.TIMM.NAME", "no such value"),  # where the backbone is not one of timm
]


@cache
def config_of(name):
    cfg = get_cfg()
    load_config(cfg, CONFIGS.get(name, ROOT / f"configs/quickstart/{name}_dyhead_R18_shapes.yaml"))
    return cfg


def set_value(cfg, key, value):
    node, _, name = key.rpartition(".")
    (get(cfg, node) if node else cfg)[name] = value


def refusal(name, **values):
    """What ``check_config`` says of a shipped configuration with some values, None where it accepts it."""
    cfg = config_of(name).clone()
    for key, value in values.items():
        set_value(cfg, key, value)
    try:
        check_config(cfg)
    except ConfigError as error:
        return str(error)
    return None


def checked_keys():
    """Each checked key with a detector that reads it."""
    unlike = {detector.node: name for name, detector in DETECTORS.items()}
    for node, options in option_nodes().items():
        for leaf in leaves(options):
            yield f"{node}.{leaf.key}", unlike.get(node, "DyHeadRetinaNet")
    for key in CHECKS | RESNET_CHECKS | FPN_CHECKS:
        yield key, "DyHeadRetinaNet"
    for key in TWO_STAGE_CHECKS:
        yield key, "DyHeadRCNN"
    for name, checks in PARTS.items():
        for key in checks:
            yield key, name


@pytest.mark.parametrize(("key", "detector"), list(checked_keys()))
def test_what_is_no_value_at_all_is_refused_with_the_key(key, detector):
    for value in JUNK:
        if (key, value) in LEGAL:
            continue
        message = refusal(detector, **{key: value})
        assert message is not None, value
        assert re.match(rf"{re.escape(key)}: expected .+, got {re.escape(repr(value))}$", message), message


def test_every_detector_has_a_shipped_configuration_that_is_legal():
    assert set(CONFIGS) == set(meta_architectures())
    for name in CONFIGS:
        assert config_of(name).MODEL.META_ARCHITECTURE == name
        assert refusal(name) is None


@pytest.mark.parametrize(
    ("key", "illegal", "legal"),
    [
        ("SOLVER.IMS_PER_BATCH", [0, -1, 1.5, True], [1]),
        ("SOLVER.MAX_ITER", [0, 0.5], [1]),
        ("SOLVER.CHECKPOINT_PERIOD", [0], [1]),
        ("SOLVER.BASE_LR", [0, -0.1, True], [1e-9, 1]),
        ("SOLVER.BASE_LR_END", [-1e-9], [0, 1e-9]),
        ("SOLVER.WARMUP_ITERS", [-1, 0.5], [0]),
        ("SOLVER.WARMUP_FACTOR", [-0.1], [0, 1.0]),
        ("SOLVER.MOMENTUM", [-0.1, 1, 2], [0, 0.99]),
        ("SOLVER.GAMMA", [0, 1.1], [0.01, 1]),
        ("SOLVER.WEIGHT_DECAY", [-1e-4], [0, 1]),
        ("SOLVER.WEIGHT_DECAY_BIAS", [-1e-4], [0, None]),
        ("SOLVER.STEPS", [(0, 5), (5, 5), (9, 5), (5, 6.5), (5, "9"), (5, None)], [(), (5,), (5, 9)]),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", [0], [0.1]),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", [0, -INFINITY], [1, INFINITY]),
        ("INPUT.MIN_SIZE_TRAIN", [(), (0,), (640, -1), (640, "800"), 640], [(1,), (640, 800)]),
        ("INPUT.MIN_SIZE_TEST", [-1], [0, 1]),  # 0: Detectron2 leaves images as they are
        ("INPUT.MAX_SIZE_TRAIN", [0], [1]),
        ("INPUT.MAX_SIZE_TEST", [0], [1]),
        ("TEST.DETECTIONS_PER_IMAGE", [0, -1], [1]),
        ("TEST.EVAL_PERIOD", [-1], [0]),
        ("TEST.BENCHMARK.BATCH_SIZE", [0], [1]),
        ("DATALOADER.NUM_WORKERS", [-1], [0]),
        ("DATASETS.REGISTER", [["a"], [["a", "b"]], [["a", "b", 3]]], [[], [["a", "b", "c"]]]),
        ("MODEL.PIXEL_MEAN", [[], [1, 2], [1, 2, NAN], [1, 2, "3"]], [[0, 0.5, -1]]),
        ("MODEL.PIXEL_STD", [[1, 1, 0], [1, 1, -1]], [[1, 0.5, 2]]),
        ("MODEL.BACKBONE.FREEZE_AT", [-1, 6], [0, 5]),
        ("MODEL.BACKBONE.SIZE_DIVISIBILITY", [-1], [0]),
        ("MODEL.FPN.OUT_CHANNELS", [0, -64], [1]),
        ("MODEL.FPN.IN_FEATURES", [[], [3]], [["res5"]]),
        ("MODEL.RESNETS.DEPTH", [20, "50"], [18, 152]),
        ("MODEL.NECKS", [["FPN"], ["DyHead", "DyHead"], "DyHead"], [[], ["DyHead"], ["DyHead", "SEPC"]]),
        ("MODEL.DYHEAD.NUM_BLOCKS", [-1, True], [0]),
        ("MODEL.DYHEAD.WINDOW", [0, 1.5], [1, None]),
        ("MODEL.DYHEAD.SCALE_AWARE", [0, "True"], [False]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[], [[]], [[32], []], [[32, -1]], [[0]], [["a"]]], [[[32]], [32, 64]]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[], [[0.5, 0]]], [[[0.5, 2]]]),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", [-0.1, 1.1], [0, 0.5]),
        ("MODEL.RETINANET.IN_FEATURES", [[], [3]], [["p3"]]),
        ("MODEL.RETINANET.NUM_CLASSES", [0], [1]),
        ("MODEL.RETINANET.IOU_THRESHOLDS", [[], [0, 0.5], [0.5, 0.4], [0.5, 0.5], [0.5, 1.1]], [[0.1, 1]]),
        ("MODEL.RETINANET.IOU_LABELS", [[0, 2, 1], [0, True, 1]], [[0, 0, 1]]),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", [[1, 1, 1], [1, 1, 1, 0]], [[1, 1, 2, 2]]),
        ("MODEL.RETINANET.PRIOR_PROB", [0, 1], [0.5]),
        ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", [-0.5, 1.1], [-1, 0, 1]),
        ("MODEL.RETINANET.PREDICTOR_KERNEL", [0, 2, -1], [1, 3]),
    ],
)
def test_ranges_end_where_they_are_said_to(key, illegal, legal):
    for value in illegal:
        message = refusal("DyHeadRetinaNet", **{key: value})
        assert message is not None, value
        assert message.startswith(f"{key}: expected "), message
        assert message.endswith(f", got {value!r}"), message
    for value in legal:
        assert refusal("DyHeadRetinaNet", **{key: value}) is None


@pytest.mark.parametrize(
    ("key", "illegal", "legal"),
    [
        ("MODEL.RPN.IN_FEATURES", [[]], [["p3"]]),
        ("MODEL.RPN.POSITIVE_FRACTION", [-0.1, 1.1], [0, 1]),
        ("MODEL.RPN.NMS_THRESH", [-0.1, 1.1], [0, 1]),
        ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", [0, -1], [1]),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", [0], [1]),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", [0], [1]),
        ("MODEL.RPN.CONV_DIMS", [[], [0], [-2]], [[-1], [-1, 64]]),
        ("MODEL.RPN.SMOOTH_L1_BETA", [-1], [0]),
        ("MODEL.ROI_HEADS.NUM_CLASSES", [0], [1]),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [[], [0], [1.5]], [[1]]),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", [2], [0.5]),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", [-1, 2], [0, 1]),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", [0], [1]),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", [-1, 0], [1]),
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", [-1], [0, 1]),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", [(1, 1, 1), (1, 1, 1, 0)], [(1, 1, 1, 1)]),
    ],
)
def test_ranges_of_two_stage_detectors_are_theirs_alone(key, illegal, legal):
    for value in illegal:
        message = refusal("DyHeadRCNN", **{key: value})
        assert message is not None, value
        assert message.startswith(f"{key}: expected "), message
        assert refusal("DyHeadFCOS", **{key: value}) is None
    for value in legal:
        assert refusal("DyHeadRCNN", **{key: value}) is None


@pytest.mark.parametrize("detector", CONFIGS)
def test_options_of_other_detectors_are_not_checked(detector):
    for name, other in DETECTORS.items():
        message = refusal(detector, **{f"{other.node}.NUM_CLASSES": 0})
        assert (message is None) == (name != detector)


@pytest.mark.parametrize(
    ("detector", "values", "message"),
    [
        (
            "DyHeadRetinaNet",
            {"MODEL.RETINANET.IOU_LABELS": [0, 1]},
            r"MODEL.RETINANET: IOU_LABELS: expected 3 labels with IOU_THRESHOLDS \[0.4, 0.5\], got \[0, 1\]",
        ),
        (
            "DyHeadRCNN",
            {"MODEL.RPN.IOU_THRESHOLDS": [0.5]},
            r"MODEL.RPN: IOU_LABELS: expected 2 labels with IOU_THRESHOLDS \[0.5\], got \[0, -1, 1\]",
        ),
        (
            "DyHeadRCNN",
            {"MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1]},
            r"MODEL.ROI_HEADS: IOU_LABELS: expected 2 labels with IOU_THRESHOLDS \[0.5\], got \[0, -1, 1\]",
        ),
        (
            "DyHeadFCOS",
            {"SOLVER.BASE_LR": 0.5, "SOLVER.BASE_LR_END": 0.75},
            "SOLVER.BASE_LR_END: expected at most SOLVER.BASE_LR, 0.5, got 0.75",
        ),
        (
            "DyHeadFCOS",
            {"SOLVER.OPTIMIZER": "SGD", "SOLVER.NESTEROV": True, "SOLVER.MOMENTUM": 0.0},
            "SOLVER.MOMENTUM: expected above 0 with SOLVER.NESTEROV True, got 0.0",
        ),
        (
            "DyHeadFCOS",
            {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "SOLVER.MAX_ITER": 2},
            "SOLVER.NUM_DECAYS: expected at most SOLVER.MAX_ITER, 2, got 3",
        ),
        (
            "DyHeadFCOS",
            {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": (640, 800, 900)},
            r"INPUT.MIN_SIZE_TRAIN: expected the lowest and the highest size, got \(640, 800, 900\)",
        ),
        (
            "DyHeadFCOS",
            {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": (800, 640)},
            "INPUT.MIN_SIZE_TRAIN: expected the lowest and the highest size",
        ),
        (
            "DyHeadFCOS",
            {"INPUT.FORMAT": "L"},
            "MODEL.PIXEL_MEAN: expected 1 value, one for each channel of INPUT.FORMAT L, got",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(detector, values, message):
    assert re.match(message, refusal(detector, **values) or "accepted")


def test_values_that_nothing_reads_need_not_fit():
    assert refusal("DyHeadFCOS", **{"SOLVER.OPTIMIZER": "ADAMW", "SOLVER.NESTEROV": True, "SOLVER.MOMENTUM": 0}) is None
    assert refusal("DyHeadFCOS", **{"MODEL.RPN.IOU_LABELS": [0]}) is None
    assert refusal("DyHeadRCNN", **{"MODEL.ROI_BOX_HEAD.NUM_FC": 0, "MODEL.ROI_BOX_HEAD.NUM_CONV": 1}) is None


@pytest.mark.parametrize(
    "engine", ["dyhead.torchvision", pytest.param("dyhead.detectron2", marks=pytest.mark.detectron2)]
)
@pytest.mark.parametrize(
    ("detector", "key", "value"),
    [
        ("DyHeadFCOS", "SOLVER.IMS_PER_BATCH", "0"),
        ("DyHeadFCOS", "MODEL.FCOS.NMS_THRESH_TEST", "1.5"),
        (TWO_STAGE, "MODEL.RPN.NMS_THRESH", "1.5"),
    ],
)
def test_both_engines_refuse_before_they_start(engine, detector, key, value, tmp_path):
    args = argparse.Namespace(
        config_file=str(CONFIGS[detector]),
        opts=["OUTPUT_DIR", str(tmp_path / "run"), key, value],
        eval_only=False,
        resume=False,
        num_gpus=1,
        num_machines=1,
        machine_rank=0,
        dist_url="tcp://127.0.0.1:1",
    )
    with pytest.raises(ConfigError, match=f"^{key}: expected .*, got {value}$"):
        importlib.import_module(engine).setup(args)
    assert not (tmp_path / "run").exists()
