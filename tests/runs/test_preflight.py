"""What is checked before a run: the folder that it writes to, the weights, the address, the seed."""

import argparse
import os
import re

import pytest

from dyhead.config import ConfigError, check_config, load_config
from dyhead.runs.preflight import check_run
from dyhead.torchvision import get_cfg


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`check({key: value}, flag=...)`: the checks of a run in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def check(settings, **flags):
        cfg = get_cfg()
        cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", "run"
        (tmp_path / "empty.yaml").write_text("{}")
        load_config(cfg, tmp_path / "empty.yaml", [str(word) for pair in settings.items() for word in pair])
        defaults = {"eval_only": False, "resume": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
        check_run(cfg, argparse.Namespace(**defaults | {"dist_url": "tcp://127.0.0.1:1"} | flags))
        return cfg

    return check


@pytest.mark.parametrize("folder", ["run", "a/b/c", "1e3", "./run/../x", "{tmp}/y", "file_not/there", "é\u3000b"])
def test_a_folder_that_can_be_made_is_taken_and_not_made(check, tmp_path, folder):
    before = sorted(os.listdir(tmp_path))
    check({"OUTPUT_DIR": folder.format(tmp=tmp_path)})
    assert sorted({*os.listdir(tmp_path)} - {"empty.yaml"}) == before


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"eval_only": True}])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file", "OUTPUT_DIR file: cannot be written to (TMP/file is not a folder)"),
        ("file/run", "OUTPUT_DIR file/run: cannot be written to (TMP/file is not a folder)"),
        ("file/a/../b", "OUTPUT_DIR file/a/../b: cannot be written to (TMP/file is not a folder)"),
        ("dangling", "OUTPUT_DIR dangling: cannot be written to (TMP/dangling is a link to what does not exist)"),
        (300 * "x", f"OUTPUT_DIR {300 * 'x'}: cannot be written to (File name too long)"),
        ("", "OUTPUT_DIR: expected the name of a folder, got ''"),
        ("a\0b", "OUTPUT_DIR: expected the name of a folder, got 'a\\x00b'"),
        ("a\ud800", "OUTPUT_DIR: expected the name of a folder, got 'a\\ud800'"),
        ("a\nb", "OUTPUT_DIR: expected the name of a folder, got 'a\\nb'"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(check, tmp_path, folder, reason, flags):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError) as error:
        check({"OUTPUT_DIR": folder}, **flags)
    assert str(error.value).replace(str(tmp_path), "TMP") == reason


def test_a_folder_without_permission_is_refused(check, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    # Nothing is forbidden to root, who may run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "theirs")
    with pytest.raises(
        ConfigError, match=r"OUTPUT_DIR theirs/run: cannot be written to \(no permission to write to .*"
    ):
        check({"OUTPUT_DIR": "theirs/run"})


@pytest.mark.parametrize("weights", ["none.pth", ".", "a\0b", "//[x", "a?matching_heuristics=True", "~no one/a.pth"])
def test_weights_that_are_no_file_are_refused(check, weights):
    with pytest.raises(ConfigError, match=rf"^MODEL\.WEIGHTS {re.escape(weights)}: no such file$"):
        check({"MODEL.WEIGHTS": weights})


def test_weights_may_ask_detectron2_to_match_their_names(check, tmp_path):
    (tmp_path / "a.pth").touch()
    assert check({"MODEL.WEIGHTS": "a.pth?matching_heuristics=True"}).MODEL.WEIGHTS.endswith("True")


@pytest.mark.parametrize(
    "url", ["here", "tcp://", "tcp://:80", "tcp://h", "tcp://h:99999", "tcp://h:x", "tcp://[h", ""]
)
def test_what_is_no_address_is_refused(check, url):
    with pytest.raises(ConfigError, match=rf"^--dist-url: expected tcp://HOST:PORT, got {re.escape(url)}$"):
        check({}, num_gpus=2, dist_url=url)


@pytest.mark.parametrize("device", ["", "tpu", "meta", "cuda:x", "cuda:-1", "cpu:", "cuda:99999999999999999999", "a\0"])
def test_what_is_no_device_is_refused(check, device):
    with pytest.raises(ConfigError, match=r"^MODEL\.DEVICE: expected cpu, cuda or cuda:NUMBER, got "):
        check({"MODEL.DEVICE": device})


@pytest.mark.parametrize("key", ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM"])
def test_several_cpus_share_no_statistics(check, key):
    check({key: "SyncBN"})
    check({key: "SyncBN", "MODEL.WEIGHTS": __file__}, num_gpus=2, eval_only=True)
    with pytest.raises(ConfigError, match=f"^{key}: expected one that several processes can share on a CPU"):
        check({key: "SyncBN"}, num_gpus=2)


def test_other_box_heads_share_no_statistics_either(check):
    options = {"MODEL.ROI_BOX_HEAD.NAME": "DoubleHead", "MODEL.DOUBLE_HEAD_EXT.NORM": "SyncBN"}
    two_stage = {"MODEL.META_ARCHITECTURE": "DyHeadRCNN"}
    check(two_stage | options, num_gpus=2)  # it is not there
    with pytest.raises(ConfigError, match=r"^MODEL\.DOUBLE_HEAD_EXT\.NORM: expected one that several processes can"):
        check(two_stage | options | {"MODEL.ROI_BOX_HEAD.NAME": "DoubleHeadExt"}, num_gpus=2)
    check(two_stage | {"MODEL.ROI_BOX_HEAD.NAME": "DyHeadBoxHead"}, num_gpus=2)  # it has no norm


def test_necks_share_no_statistics_either(check):
    check({"MODEL.SEPC.NORM": "SyncBN"}, num_gpus=2)  # it is not there
    options = {"MODEL.NECKS": ["DyHead", "SEPC"], "MODEL.SEPC.NORM": "SyncBN"}
    check(options)
    with pytest.raises(
        ConfigError, match=r"^MODEL\.SEPC\.NORM: expected one that several processes can share on a CPU"
    ):
        check(options, num_gpus=2)


@pytest.mark.parametrize("key", ["NORM", "NECK_NORM"])
def test_networks_share_no_statistics_either(check, key):
    options = {f"MODEL.HIT_DETECTOR_PYRAMID.{name}": "BN" for name in ("NORM", "NECK_NORM")}
    options |= {f"MODEL.HIT_DETECTOR_PYRAMID.{key}": "SyncBN", "MODEL.RESNETS.NORM": "SyncBN"}
    with pytest.raises(ConfigError, match=r"^MODEL\.RESNETS\.NORM: expected one that several processes"):
        check(options, num_gpus=2)
    options |= {"MODEL.BACKBONE.NAME": "build_hit_detector_pyramid_backbone", "MODEL.BACKBONE.FREEZE_AT": 0}
    check(options)
    with pytest.raises(ConfigError, match=rf"^MODEL\.HIT_DETECTOR_PYRAMID\.{key}: expected one that several processes"):
        check(options, num_gpus=2)


def test_each_process_has_a_seed_that_numpy_takes(check):
    check({"SEED": 2**32 - 1})
    check({"SEED": 2**32 - 2}, num_gpus=2)
    with pytest.raises(ConfigError, match="^SEED: expected at most 4294967294 with 2 processes.* got 4294967295$"):
        check({"SEED": 2**32 - 1}, num_gpus=2)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.SEED = "DyHeadFCOS", 2**32
    with pytest.raises(ConfigError, match="^SEED: expected a whole number, at most 4294967295, got 4294967296$"):
        check_config(cfg)
