"""A training that is killed, as by a machine that loses power, and goes on with --resume."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyhead.detection.detector import DenseDetector

ROOT = Path(__file__).parent.parent
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import train_net
from dyhead.detection.detector import DenseDetector

calls, losses = [], DenseDetector.losses

def killed(self, *args):
    calls.append(None)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(self, *args)

DenseDetector.losses = killed
torch.set_num_threads(1)  # as the trainings beside it: some processors sum in another order with two
sys.exit(train_net.main(sys.argv[3:]))
"""


@pytest.fixture
def losses(monkeypatch):
    """Every iteration's losses, in the order in which they are computed."""
    seen, original = [], DenseDetector.losses

    def recording(self, *args):
        found = original(self, *args)
        seen.append({name: value.item() for name, value in found.items()})
        return found

    monkeypatch.setattr(DenseDetector, "losses", recording)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_training_goes_on_with_the_losses_of_one_that_was_not(engine, tmp_path, five_pictures, losses):
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    train_net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.DYHEAD.NUM_BLOCKS": 1,
        "MODEL.FCOS.NUM_CLASSES": 2,
        "DATASETS.REGISTER": [five_pictures],
        "DATASETS.TRAIN": (five_pictures[0],),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (32, 48, 64),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 7,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.WARMUP_ITERS": 2,
    }

    def words(folder, *flags):
        file = ROOT / "configs/quickstart/fcos_dyhead_R18_shapes.yaml"
        opts = [str(word) for pair in (settings | {"OUTPUT_DIR": str(tmp_path / folder)}).items() for word in pair]
        return ["--engine", engine, *flags, "--config-file", str(file), *opts]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_net.main(words("whole")) == 0
        uninterrupted = list(losses)
        assert len(uninterrupted) == 7
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(ROOT), "6", *words("killed")], capture_output=True, timeout=120
        )
        assert killed.returncode == -9
        assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000003.pth"
        losses.clear()
        assert train_net.main(words("killed", "--resume")) == 0
    finally:
        torch.set_num_threads(before)
    assert losses == [pytest.approx(each, rel=1e-6) for each in uninterrupted[4:]]
