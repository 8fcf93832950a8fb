import argparse
import json
import logging
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# A quickstart model small enough for a test, on the two classes of the `blocks` data sets.
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.FCOS.NUM_CLASSES": 2,
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "DATASETS.TRAIN": ("blocks_train",),
    "DATASETS.TEST": ("blocks_val",),
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (3,),
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.BENCHMARK.NUM_IMAGES": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _logging_of_its_own():
    """Detectron2 keeps the log to itself, on the standard output of the first test that asks for one."""
    yield
    for name in ("dyhead", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.propagate = True
        while logger.handlers:
            logger.removeHandler(logger.handlers[0])
    if "detectron2.utils.logger" in sys.modules:
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


@pytest.fixture(scope="session")
def configs():
    return Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def blocks(tmp_path_factory):
    """Entries of DATASETS.REGISTER for `blocks_train` (8 pictures) and `blocks_val` (4): light boxes of two colours."""
    root = tmp_path_factory.mktemp("blocks")
    return [list(write_blocks(root, f"blocks_{split}", count)) for split, count in (("train", 8), ("val", 4))]


def write_blocks(root, name, count, class_names=("red", "green")):
    """Write a data set into `root`; returns its entry of DATASETS.REGISTER. Category ids are 3, 5, ..."""
    random = np.random.default_rng(count)
    images, annotations = [], []
    for i in range(count):
        picture = random.integers(0, 60, (64, 96, 3), dtype=np.uint8)
        for _ in range(2):
            w, h = (int(v) for v in random.integers(12, 40, 2))
            x, y = int(random.integers(0, 96 - w)), int(random.integers(0, 64 - h))
            class_index = int(random.integers(2))
            picture[y : y + h, x : x + w, class_index] = 230
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": 3 + 2 * class_index,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(picture).save(root / f"{name}_{i}.png")
        images.append({"id": i + 1, "file_name": f"{name}_{i}.png", "height": 64, "width": 96})
    categories = [{"id": 3 + 2 * i, "name": class_name} for i, class_name in enumerate(class_names)]
    file = root / f"{name}.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return name, str(file), str(root)


@pytest.fixture(scope="session")
def arguments_in(configs, blocks):
    """`arguments_in(folder)({key: value}, detector="fcos", resume=...)`: the parsed command line of a tiny run."""

    def build_in(folder):
        def build(settings=None, detector="fcos", **flags):
            settings = {"OUTPUT_DIR": str(folder), "DATASETS.REGISTER": blocks, **TINY, **(settings or {})}
            given = {
                "config_file": str(configs / "quickstart" / f"{detector}_dyhead_R18_shapes.yaml"),
                "opts": [str(word) for pair in settings.items() for word in pair],
                "eval_only": False,
                "resume": False,
                "num_gpus": 1,
                "num_machines": 1,
                "machine_rank": 0,
                "dist_url": f"tcp://127.0.0.1:{free_port()}",
                **flags,
            }
            return argparse.Namespace(**given)

        return build

    return build_in


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def arguments(arguments_in, tmp_path):
    """`arguments_in` a folder of this test's own."""
    return arguments_in(tmp_path / "run")


@pytest.fixture
def tiny_cfg(arguments):
    """`tiny_cfg("fcos", {key: value}, resume=...)`: the frozen config of a tiny detector."""
    from dyhead.detectron2 import setup

    return lambda detector="fcos", settings=None, **flags: setup(arguments(settings, detector, **flags))


@pytest.fixture
def inputs():
    """Two pictures with two boxes each, as Detectron2's models take them."""
    import torch
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(2):
        instances = Instances((64, 96))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 6.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]]))
        instances.gt_classes = torch.tensor([0, 1])
        picture = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        batch.append({"image": picture, "instances": instances, "height": 64, "width": 96})
    return batch
