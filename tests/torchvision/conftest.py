"""A tiny data set of coloured rectangles, and tiny detectors to train on it."""

import argparse
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyhead.config import load_config
from dyhead.torchvision import get_cfg

_CONFIGS = Path(__file__).parents[2] / "configs"
COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


@pytest.fixture(autouse=True)
def _small_work_on_one_thread(one_thread):
    """Threads cost these tests more than they gain."""


def draw_rectangles(folder, pictures=10, seed=0, size=(64, 80)):
    """Pictures of one to three rectangles in a folder with their annotations; returns the annotation file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(1, pictures + 1):
        height, width = size if i % 2 else size[::-1]
        picture = np.full((height, width, 3), 128, dtype=np.uint8)
        for _ in range(rng.integers(1, 4)):
            w, h = rng.integers(14, 40, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            category = int(rng.integers(3))
            picture[y : y + h, x : x + w] = list(COLOURS.values())[category]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * (category + 1), "iscrowd": 0}
                | {"bbox": [int(v) for v in (x, y, w, h)], "area": int(w * h)}
            )
        Image.fromarray(picture).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(COLOURS)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory):
    """The annotation file of ten pictures."""
    return draw_rectangles(tmp_path_factory.mktemp("rectangles"))


@pytest.fixture
def tiny(rectangles, tmp_path):
    """Overrides that shrink a quickstart configuration to something a test can train, on the rectangles."""
    name = f"rectangles_{rectangles.parent.parent.name}_{rectangles.parent.name}"
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.DYHEAD.NUM_BLOCKS": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "DATASETS.REGISTER": [[name, str(rectangles), str(rectangles.parent)]],
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 2,
        "TEST.BENCHMARK.NUM_IMAGES": 2,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    yield options
    shutil.rmtree(tmp_path)  # checkpoints are large, and pytest keeps the folders of its last runs


@pytest.fixture
def with_parts(rectangles, tmp_path):
    """Overrides of keypoint_rcnn's: rectangles with masks as polygons, and with two keypoints, corner and middle."""
    content = json.loads(rectangles.read_text())
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        a["keypoints"] = [x, y, 2, x + w // 2, y + h // 2, 2]
    for category in content["categories"]:
        category["keypoints"] = ["corner", "middle"]
    path = tmp_path / "parts.json"
    path.write_text(json.dumps(content))
    name = f"parts_{tmp_path.parent.name}_{tmp_path.name}"
    return {
        "DATASETS.REGISTER": [[name, str(path), str(rectangles.parent)]],
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
        "INPUT.MASK_FORMAT": "bitmask",
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (16,),
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.01, 0.01],
    }


@pytest.fixture
def command():
    """A function from overrides to the command line of train_net.py with a quickstart configuration."""
    return _command


@pytest.fixture
def configured():
    """A function from overrides to the configuration of such a command line."""

    def configure(options, detector="fcos"):
        cfg, args = get_cfg(), _command(options, detector)
        load_config(cfg, args.config_file, args.opts)
        return cfg

    return configure


@pytest.fixture
def draw():
    """A function that draws another set of rectangles into a folder and returns its annotation file."""
    return draw_rectangles


def _command(options, detector="fcos", **flags):
    defaults = {"eval_only": False, "resume": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    return argparse.Namespace(
        config_file=str(_CONFIGS / "quickstart" / f"{detector}_dyhead_R18_shapes.yaml"),
        opts=[str(part) for pair in options.items() for part in pair],
        dist_url=f"tcp://127.0.0.1:{_free_port()}",
        **(defaults | flags),
    )


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
