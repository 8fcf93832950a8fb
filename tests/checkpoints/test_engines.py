"""Both engines build the same model from a config; their names are translations of each other."""

# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model as build_detectron2

from dyhead.checkpoints import canonical_names, convert
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detection import DETECTORS as REGISTERED
from dyhead.detectron2 import Checkpointer
from dyhead.torchvision import build_model as build_torchvision
from dyhead.torchvision import get_cfg as get_torchvision_cfg
from dyhead.torchvision.checkpoint import load_weights, portable_state, read_resumable, save_checkpoint

DETECTORS = [*(registered.name.lower() for registered in REGISTERED.values()), "faster_rcnn"]
CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
COUNTER = "num_batches_tracked"


class Resumed:
    """As much of Detectron2's trainer as its checkpointer sees."""

    max_iter = 3

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return {"iteration": 1, "_trainer": {"iteration": 1, "optimizer": self.optimizer.state_dict()}}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["_trainer"]["optimizer"])
        self.iter = state["iteration"]


def models(detector, *options):
    file, options = CONFIGS / f"{detector}_dyhead_R18_shapes.yaml", ["MODEL.DEVICE", "cpu", *options]
    theirs, ours = add_dyhead_config(get_detectron2_cfg()), get_torchvision_cfg()
    load_config(theirs, file, options)
    load_config(ours, file, options)
    return build_detectron2(theirs), build_torchvision(ours)


@pytest.mark.parametrize("detector", [*DETECTORS, "mask_rcnn", "keypoint_rcnn", "cascade_rcnn"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        (
            *("MODEL.RPN.CONV_DIMS", "[-1, -1]", "MODEL.ROI_BOX_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.NORM", "GN"),
            *("MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
        ),
        ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "MODEL.FPN.NORM", "''"),
    ],
)
def test_both_engines_have_the_same_canonical_names_and_shapes(detector, options):
    theirs, ours = (model.state_dict() for model in models(detector, *options))
    names = canonical_names(theirs)
    expected = {names[key]: tuple(value.shape) for key, value in theirs.items() if COUNTER not in key}
    # What torchvision's own predictor has in another order, an earlier file's conversion brings into Detectron2's.
    state = convert(ours).state
    assert {key: tuple(value.shape) for key, value in state.items() if COUNTER not in key} == expected
    assert {name for name in canonical_names(ours).values() if COUNTER not in name} == expected.keys()


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectron2_loads_what_torchvision_trained(detector, tmp_path):
    theirs, ours = models(detector)
    torch.save({"state_dict": ours.state_dict(), "global_step": 3}, tmp_path / "w.pth")
    Checkpointer(theirs).load(str(tmp_path / "w.pth"))
    loaded, expected = theirs.state_dict(), convert(ours.state_dict()).state
    assert all(torch.equal(loaded[key], expected[name]) for key, name in canonical_names(loaded).items())


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
def test_detectron2s_own_checkpointer_reads_the_torchvision_engines_files(detector, tmp_path):
    theirs, ours = models(detector)
    state = {"seed": 1, "optimizer": "SGD", "max_iter": 3}
    content = {"model": portable_state(ours), "optimizer": {}, "grad_scaler": {}, "iteration": 2, "dyhead": state}
    save_checkpoint(str(tmp_path), "w.pth", content)
    rest = DetectionCheckpointer(theirs).load(str(tmp_path / "w.pth"))
    assert rest["iteration"] == 2
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in portable_state(ours).items())


def test_neither_engine_resumes_the_others_training(tmp_path):
    theirs, ours = models("fcos")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    torch.save({"model": portable_state(ours), "dyhead": {}, "optimizer": {}, "iteration": 1}, tmp_path / "w.pth")
    checkpointer = Checkpointer(theirs, str(tmp_path / "run"), trainer=Resumed(optimizer))
    with pytest.raises(ConfigError, match=r"w\.pth was written by the torchvision engine; continue it with --engine"):
        checkpointer.load(str(tmp_path / "w.pth"))
    (tmp_path / "run").mkdir()
    checkpointer.save("w", iteration=1)
    with pytest.raises(
        ConfigError, match=r"w\.pth was written by the detectron2 engine; continue it with --engine det"
    ):
        read_resumable(get_torchvision_cfg(), str(tmp_path / "run" / "w.pth"))


@pytest.mark.parametrize("detector", DETECTORS)
def test_torchvision_loads_what_detectron2_trained(detector, tmp_path):
    theirs, ours = models(detector)
    Checkpointer(theirs, str(tmp_path)).save("w")
    load_weights(ours, str(tmp_path / "w.pth"), strict=True)
    given, loaded = theirs.state_dict(), convert(ours.state_dict()).state
    assert all(torch.equal(given[key], loaded[name]) for key, name in canonical_names(given).items())
