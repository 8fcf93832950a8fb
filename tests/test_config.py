"""Config files: inheritance, overrides, and an error for everything that is not a known key of the right type."""

import importlib
import re

import pytest
from fvcore.common.config import CfgNode

from dyhead.config import (
    ConfigError,
    add_dyhead_config,
    check_num_classes,
    get,
    load_config,
    num_classes,
    option_nodes,
)
from dyhead.config_checks import CHECKS, FPN_CHECKS, RESNET_CHECKS, TWO_STAGE_CHECKS
from dyhead.detection import DETECTORS
from dyhead.necks import NECKS
from dyhead.options import leaves


@pytest.fixture
def cfg():
    tree = CfgNode(
        {
            "MODEL": {"META_ARCHITECTURE": "", "FPN": {}, "WEIGHTS": "", "ROI_HEADS": {"NUM_CLASSES": 80}},
            "DATASETS": {"TRAIN": ()},
            "SOLVER": {"BASE_LR": 0.02, "STEPS": (60000,)},
            "TEST": {},
        }
    )
    return add_dyhead_config(tree)


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_file_overrides_its_base_and_the_command_line_overrides_both(cfg, write):
    write("SOLVER: {BASE_LR: 0.5, STEPS: [1, 2]}\nMODEL: {WEIGHTS: base}", "base.yaml")
    file = write("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25}")
    keys = load_config(cfg, file, ["MODEL.DYHEAD.NUM_BLOCKS", "3"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.MODEL.WEIGHTS, cfg.MODEL.DYHEAD.NUM_BLOCKS) == (
        0.25,
        (1, 2),
        "base",
        3,
    )
    assert keys == {"SOLVER.BASE_LR", "SOLVER.STEPS", "MODEL.WEIGHTS", "MODEL.DYHEAD.NUM_BLOCKS"}


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("1e-4", 1e-4), ("2.5", 2.5)], ids=["integer", "exponent without a dot", "float"]
)
def test_numbers_in_every_notation_become_floats(cfg, write, text, value):
    load_config(cfg, write(f"SOLVER: {{BASE_LR: {text}}}"))
    assert cfg.SOLVER.BASE_LR == value
    assert isinstance(cfg.SOLVER.BASE_LR, float)


def test_datasets_to_register_can_be_given_on_the_command_line(cfg, write):
    load_config(
        cfg, write("{}"), ["DATASETS.REGISTER", "[['cells', 'cells.json', 'images']]", "DATASETS.TRAIN", "('cells',)"]
    )
    assert cfg.DATASETS.REGISTER == [["cells", "cells.json", "images"]]
    assert cfg.DATASETS.TRAIN == ("cells",)


def test_window_may_be_the_whole_pyramid(cfg, write):
    load_config(cfg, write("MODEL: {DYHEAD: {WINDOW: null}}"))
    assert cfg.MODEL.DYHEAD.WINDOW is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SOLVER: {BASE_LR: null}", "SOLVER.BASE_LR: expected float (its default is 0.02)"),
        ("MODEL: {WEIGHTS: null}", "MODEL.WEIGHTS: expected str (its default is '')"),
        ("MODEL: {DYHEAD: {BLOCK: null}}", "MODEL.DYHEAD.BLOCK: expected str (its default is 'paper')"),
    ],
)
def test_null_is_refused_where_it_means_nothing(cfg, write, text, expected):
    with pytest.raises(ConfigError, match=re.escape(f"{expected}, got null")):
        load_config(cfg, write(text))


def test_every_unknown_key_is_named_with_its_neighbour(cfg, write):
    with pytest.raises(ConfigError) as error:
        load_config(cfg, write("SOLVER: {BASE_RL: 1}\nMODEL: {DYHEAD: {NUM_BLOCK: 1}}"), ["MODEL.NOTHING.LIKE_IT", "1"])
    message = str(error.value)
    assert "unknown key SOLVER.BASE_RL; did you mean SOLVER.BASE_LR?" in message
    assert "unknown key MODEL.DYHEAD.NUM_BLOCK; did you mean MODEL.DYHEAD.NUM_BLOCKS?" in message
    assert "overrides: unknown key MODEL.NOTHING.LIKE_IT" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SOLVER: {BASE_LR: fast}", "SOLVER.BASE_LR: expected float"),
        ("SOLVER: {STEPS: 3}", "SOLVER.STEPS: expected tuple"),
        ("MODEL: {DYHEAD: {SCALE_AWARE: 1}}", "MODEL.DYHEAD.SCALE_AWARE: expected bool"),
        ("MODEL: 3", "MODEL: expected a section of keys"),
        ("- a\n- b", "expected a mapping"),
        ("just text", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1", "not YAML"),
        ("a: !!python/object/apply:eval ['1 + 1']", "not YAML that can be read safely"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_unusable_files_are_refused_with_the_reason(cfg, write, text, expected):
    with pytest.raises(ConfigError, match="config.yaml") as error:
        load_config(cfg, write(text))
    assert expected in str(error.value)


def test_missing_file_and_odd_overrides_are_refused(cfg, write, tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        load_config(cfg, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="KEY VALUE pairs, got 1 words"):
        load_config(cfg, write("{}"), ["SOLVER.BASE_LR"])


def test_number_of_classes_must_be_the_datasets(cfg):
    cfg.MODEL.META_ARCHITECTURE = "DyHeadRCNN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    assert num_classes(cfg) == 2
    check_num_classes(cfg, "pets", ["cat", "dog"])
    with pytest.raises(
        ConfigError, match=r"MODEL.ROI_HEADS.NUM_CLASSES: expected 3, .*'pets' \(cat, dog, emu\), got 2"
    ):
        check_num_classes(cfg, "pets", ["cat", "dog", "emu"])
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with pytest.raises(ConfigError, match=r"MODEL.ROI_HEADS.NUM_CLASSES: expected 3"):
        check_num_classes(cfg, "pets", ["cat", "dog", "emu"])
    cfg.MODEL.META_ARCHITECTURE = "YOLO"
    check_num_classes(cfg, "pets", ["cat", "dog", "emu"])  # whatever it reads
    with pytest.raises(ConfigError, match="META_ARCHITECTURE.*'YOLO'"):
        num_classes(cfg)


ENGINES = ["dyhead.torchvision", pytest.param("detectron2.config", marks=pytest.mark.detectron2)]


@pytest.mark.parametrize("package", ENGINES)
def test_each_engine_has_every_key_with_the_default_of_its_option(package):
    """Where Detectron2 has a key, what stands in the configuration is Detectron2's default: it must be the option's."""
    cfg = add_dyhead_config(importlib.import_module(package).get_cfg())
    for node, options in option_nodes().items():
        for leaf in leaves(options):
            value = get(cfg, f"{node}.{leaf.key}")
            default = leaf.default
            assert as_lists(value) == as_lists(default), f"{node}.{leaf.key}"
            assert type(value) is type(default) or isinstance(default, tuple), f"{node}.{leaf.key}"
            assert leaf.expected(value) is None, f"{node}.{leaf.key}"


@pytest.mark.parametrize("package", ENGINES)
def test_each_engine_has_every_key_that_is_checked_and_a_legal_default(package):
    cfg = importlib.import_module(package).get_cfg()
    for key, check in (CHECKS | RESNET_CHECKS | TWO_STAGE_CHECKS).items():
        assert check.fits(get(cfg, key)), key
    assert [key for key, check in FPN_CHECKS.items() if not check.fits(get(cfg, key))] == ["MODEL.FPN.IN_FEATURES"]


def test_every_detector_and_neck_has_a_node_and_no_key_is_checked_twice():
    assert {d.node for d in DETECTORS.values()} | {n.node for n in NECKS.values()} < set(option_nodes())
    options = [f"{node}.{leaf.key}" for node, options in option_nodes().items() for leaf in leaves(options)]
    keys = [*options, *CHECKS, *RESNET_CHECKS, *FPN_CHECKS, *TWO_STAGE_CHECKS]
    assert sorted(set(keys)) == sorted(keys)


def as_lists(value):
    return [as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def test_what_a_run_writes_down_is_read_by_anything_that_reads_yaml_into_such_a_tree():
    """CfgNode takes text that looks like a number for one: no default may be such text."""
    from dyhead.torchvision import get_cfg

    cfg = get_cfg()
    again = get_cfg()
    again.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    assert again.dump() == cfg.dump()
