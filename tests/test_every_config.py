"""Every configuration file trains and evaluates, shrunk, on a few `shapes`, in each engine that has its detector."""

import argparse
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead.config import load_config
from dyhead.data import shapes
from dyhead.detection import DETECTORS
from dyhead.evaluation import results
from dyhead.torchvision import get_cfg
from dyhead.torchvision import main as torchvision_main

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {
    path.stem: path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not path.stem.startswith("base_") and path.stem != "dyhead_box_head"  # parts of others
}
GROUND = 100  # the category of what is behind the objects
PANOPTIC = {name for name in FILES if name.startswith("panoptic")}  # which Detectron2 alone has
TIMM = {name for name, path in FILES.items() if "base_atss_dyhead_timm.yaml" in path.read_text() or "_swin" in name}
NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
TRAIN, TEST = "every_config_train", "every_config_val"
# Sizes, and the backbone's norm, which needs wide layers where it is GN: which parts a detector has, how they learn and
# how it decides is the file's.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,  # fewer weights than an R-18 has
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.FPN.OUT_CHANNELS": 64,  # GroupNorm of 32 groups has no variance on one pixel of 32 channels
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.SEPC.NUM_BLOCKS": 1,
    "MODEL.HIT_DETECTOR_PYRAMID.OUT_CHANNELS": 32,
    "MODEL.HIT_DETECTOR_HEAD.FC_DIM": 16,
    **{f"{detector.node}.NUM_CLASSES": 3 for detector in DETECTORS.values()},
    **{f"{detector.node}.SCORE_THRESH_TEST": 0.0 for detector in DETECTORS.values()},  # so that something is found
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    **{f"MODEL.{node}.FC_DIM": 16 for node in ("DOUBLE_HEAD", "DOUBLE_HEAD_EXT", "DECOUPLED_BOX_HEAD", "PAIREDBOX")},
    "MODEL.PAIREDBOX.PROPOSALS": 20,
    "MODEL.PAIREDBOX.BATCH_SIZE_PER_IMAGE": 16,
    **{f"MODEL.{node}.CONV_DIM": 32 for node in ("DOUBLE_HEAD", "DOUBLE_HEAD_EXT")},
    "MODEL.DOUBLE_HEAD_EXT.NON_LOCAL_DIM": 16,
    **{f"MODEL.D2DET.{key}": 16 for key in ("FC_DIM", "OFFSET_DIM", "BOX_CONV_DIM")},
    "MODEL.D2DET.BOX_CONV_GROUPS": 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (16,),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
    "DATASETS.TRAIN": (TRAIN,),
    "DATASETS.TEST": (TEST,),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MIN_SIZE_TEST": 64,
    "SEED": 1,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.0001,  # random weights under a norm that does nothing diverge soon
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "TEST.BENCHMARK.NUM_IMAGES": 0,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.05] * 5,
}
# By the network in the name of a file with ATSS and DyHead.
SMALLEST_OF_KIND = {
    "X101_DCN": {"MODEL.RESNETS.NUM_GROUPS": 2},
    "SwinL": {"MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224", "MODEL.BACKBONE.SIZE_DIVISIBILITY": 64},
    "ConvNeXtT": {"MODEL.TIMM.NAME": "test_convnext"},
    "RegNetY032": {"MODEL.TIMM.NAME": "regnety_002"},
    "R50D": {"MODEL.TIMM.NAME": "resnet18d"},
    "EffB3": {"MODEL.TIMM.NAME": "efficientnet_b0"},
    "ps50": {"MODEL.PSCONV.WIDTH_PER_GROUP": 4},
    "psx101": {"MODEL.PSCONV.DEPTH": 50, "MODEL.PSCONV.NUM_GROUPS": 2},
    "spinenet49": {"MODEL.SPINENET.NAME": "spinenet49s"},
    "atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco": {
        "MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224",
        "MODEL.BACKBONE.SIZE_DIVISIBILITY": 64,
    },
    "ViTB": {"MODEL.TIMM.NAME": "vit_tiny_patch16_224"},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Entries of DATASETS.REGISTER: easy shapes, 4 images to train on and 2 to evaluate on."""
    root, entries = tmp_path_factory.mktemp("sets"), []
    with pytest.MonkeyPatch.context() as patch:
        for name, like, images in ((TRAIN, "shapes_easy_train", 4), (TEST, "shapes_easy_val", 2)):
            patch.setitem(shapes.SPECS, like, replace(shapes.SPECS[like], images=images, side=(96, 96)))
            entries.append([name, *shapes.prepare(like, root)])
    return entries


@pytest.fixture
def arguments(sets, tmp_path, monkeypatch):
    """A function from a file's name to the command line of its run into the folder "run"."""

    def build(name, **options):
        options = SMALL | {"DATASETS.REGISTER": sets, "OUTPUT_DIR": str(tmp_path / "run")} | options
        options |= SMALLEST_OF_KIND.get(name.removeprefix("atss_dyhead_"), {})
        return argparse.Namespace(
            config_file=str(FILES[name]),
            opts=[str(word) for pair in options.items() for word in pair],
            eval_only=False,
            resume=False,
            num_gpus=1,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
        )

    for drawing in ("draw_predictions", "plot_losses"):  # a second, whatever the file
        monkeypatch.setattr(results, drawing, lambda *_: None)
    torch.manual_seed(0)
    yield build
    shutil.rmtree(tmp_path)  # checkpoints are large, and pytest keeps the folders of its last runs


@pytest.fixture
def with_stuff(sets, tmp_path):
    """Overrides that choose the same sets in Detectron2's catalogs, with what is behind the objects."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dyhead.detectron2 import register_datasets

    def register(name):
        known, records, segmented = MetadataCatalog.get(name), DatasetCatalog.get(name), []
        thing_ids = known.thing_dataset_id_to_contiguous_id
        truth = tmp_path / f"{name}_panoptic"
        truth.mkdir()
        for record in records:
            segments = np.ones((record["height"], record["width"]), np.uint8)
            categories = {1: GROUND}
            for number, annotation in enumerate(record["annotations"], 2):
                x0, y0, x1, y1 = (int(v) for v in annotation["bbox"])
                segments[y0:y1, x0:x1] = number
                categories[number] = sorted(thing_ids, key=thing_ids.get)[annotation["category_id"]]
            record["sem_seg_file_name"] = str(tmp_path / f"{name}_{record['image_id']}.png")
            Image.fromarray((segments == 1).astype(np.uint8)).save(record["sem_seg_file_name"])
            file = Path(record["file_name"]).with_suffix(".png").name
            Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], axis=2)).save(truth / file)
            info = [
                {"id": i, "category_id": category, "iscrowd": 0, "area": int((segments == i).sum())}
                for i, category in categories.items()
                if (segments == i).any()
            ]
            segmented.append({"image_id": record["image_id"], "file_name": file, "segments_info": info})
        described = [{"id": i, "name": str(i), "isthing": 1} for i in thing_ids] + [{"id": GROUND, "isthing": 0}]
        images = [{"id": record["image_id"]} for record in records]
        text = json.dumps({"images": images, "annotations": segmented, "categories": described})
        (tmp_path / f"{name}_panoptic.json").write_text(text)
        DatasetCatalog.register(f"{name}_stuff", lambda: records)
        MetadataCatalog.get(f"{name}_stuff").set(
            **{key: getattr(known, key) for key in ("json_file", "image_root", "thing_classes")},
            thing_dataset_id_to_contiguous_id=thing_ids,
            stuff_dataset_id_to_contiguous_id={0: 0, GROUND: 1},
            panoptic_root=str(truth),
            panoptic_json=str(tmp_path / f"{name}_panoptic.json"),
            stuff_classes=["things", "ground"],
            ignore_label=255,
            evaluator_type="coco_panoptic_seg",
        )
        return (f"{name}_stuff",)

    register_datasets([TRAIN, TEST], sets)
    yield {"DATASETS.TRAIN": register(TRAIN), "DATASETS.TEST": register(TEST)}
    for name in (TRAIN, TEST):
        DatasetCatalog.remove(f"{name}_stuff")
        MetadataCatalog.remove(f"{name}_stuff")


@pytest.mark.parametrize("name", FILES)
def test_a_file_writes_where_its_name_says_and_has_the_necks_that_it_says(name):
    cfg = get_cfg()
    load_config(cfg, FILES[name])
    assert cfg.OUTPUT_DIR == f"output/{name}"
    words = {"fpt": "FPT", "dyhead": "DyHead", "sepc": "SEPC"}
    necks = [neck for word, neck in words.items() if word in name]
    if name in PANOPTIC:
        assert ("dyhead" in cfg.MODEL.BACKBONE.NAME) == bool(necks)
    else:
        assert cfg.MODEL.NECKS == necks


@pytest.mark.parametrize("name", sorted(set(FILES) - PANOPTIC - TIMM))  # timm's: tests/backbones/test_configs.py
def test_a_file_trains_and_evaluates_on_torchvision(name, arguments, tmp_path):
    torchvision_main(arguments(name))
    (reported,) = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    tasks = {"bbox": reported["metrics"], **reported.get("tasks", {})}
    assert_found(name, tmp_path / "run", TEST, tasks)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[NEEDS_TIMM] * (name in TIMM)) for name in sorted(set(FILES) - PANOPTIC)]
)
def test_a_file_trains_and_evaluates_on_detectron2(name, arguments, sets, tmp_path):
    from dyhead.detectron2 import register_datasets

    register_datasets([TRAIN, TEST], sets)
    assert_found(name, tmp_path / "run", TEST, run_detectron2(arguments(name)))


@pytest.mark.detectron2
@pytest.mark.parametrize("name", sorted(PANOPTIC))
def test_a_panoptic_file_trains_and_evaluates(name, arguments, with_stuff, tmp_path):
    tasks = run_detectron2(arguments(name, **with_stuff))
    assert 0 <= tasks.pop("sem_seg")["mIoU"] <= 100
    if importlib.util.find_spec("panopticapi"):  # on no package index
        assert 0 <= tasks.pop("panoptic_seg")["PQ"] <= 100
    assert_found(name, tmp_path / "run", f"{TEST}_stuff", tasks)


def run_detectron2(args):
    """A run but for its log, which each of them would leave to those that follow in this process, and its report."""
    from dyhead.detectron2 import Trainer, setup

    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=False)
    return trainer.train()


def assert_found(name, folder, dataset, tasks):
    """A run has trained two iterations, and what it has found is of the kinds that the file's name says."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    (losses,) = [line for line in lines if "total_loss" in line]
    assert losses["iteration"] == 1
    assert losses["total_loss"] > 0
    masks, keypoints = name.startswith(("mask", "panoptic")), name.startswith("keypoint")
    assert set(tasks) == {"bbox", *["segm"] * masks, *["keypoints"] * keypoints}
    assert all(0 <= metrics["AP"] <= 100 for metrics in tasks.values())
    found = json.loads((folder / "inference" / dataset / "coco_instances_results.json").read_text())
    assert found or name.startswith("borderdet")  # whose distances are not negative, and may all be 0 at the start
    for detection in found:
        assert detection["image_id"] in (1, 2)
        x, y, width, height = detection["bbox"]
        assert 0 <= x <= x + width <= 96.01
        assert 0 <= y <= y + height <= 96.01
        assert 0 < detection["score"] <= 1
        assert detection["category_id"] in (1, 2, 3)
        assert ("segmentation" in detection) == masks
        assert len(detection.get("keypoints", ())) == 15 * keypoints
