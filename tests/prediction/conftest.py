"""Folders of runs that have not learned anything, and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead import load_detector
from dyhead.checkpoints import save_checkpoint
from dyhead.config import load_config
from dyhead.data import Classes
from dyhead.files import write_text
from dyhead.runs.record import Record, write_record
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import portable_state

_CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
_SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "INPUT.MIN_SIZE_TEST": 64,
    "TEST.DETECTIONS_PER_IMAGE": 7,
}


@pytest.fixture(autouse=True)
def _small_work_on_one_thread(one_thread):
    """Threads cost these tests more than they gain."""


_built = {}


def _weights(cfg):
    """Random ones, the same for the same configuration."""
    text = cfg.dump()
    if text not in _built:
        torch.manual_seed(0)
        _built[text] = portable_state(build_model(cfg))
    return _built[text]


def _run(folder, detector="fcos_dyhead", settings=(), engine="torchvision"):
    node = "ROI_HEADS" if "rcnn" in detector else "FCOS"
    settings = _SMALL | {f"MODEL.{node}.SCORE_THRESH_TEST": 0.0} | dict(settings)
    cfg = get_cfg()
    opts = [str(word) for pair in settings.items() for word in pair]
    load_config(cfg, _CONFIGS / f"{detector}_R18_shapes.yaml", opts)
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, "model_final.pth", {"model": _weights(cfg)})
    write_text(folder / "config.yaml", cfg.dump())
    write_record(folder, Record(engine, Classes(["ant", "bee", "cow"], [7, 8, 11], ["nose"])))
    return folder, cfg


@pytest.fixture
def make_run(tmp_path):
    """`make_run(detector, settings, engine)`: the OUTPUT_DIR of a run with random weights, and its configuration."""
    return lambda *args: _run(tmp_path / "run", *args)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """One that nobody changes."""
    return _run(tmp_path_factory.mktemp("runs") / "run")[0]


@pytest.fixture(scope="session")
def detector(run_folder):
    """Loaded from there."""
    return load_detector(run_folder)


@pytest.fixture
def pictures(tmp_path):
    """A folder with four pictures, of which one is broken, one lies in a folder below, and one stands on its side."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "below/a.png"]):
        pixels = rng.integers(0, 255, (48 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "b.jpg").read_bytes()[:100])
    (folder / "notes.txt").write_text("no picture")
    return folder
