"""A loaded detector finds what the evaluation of the same weights finds, whichever engine runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image

from dyhead import data, load_detector
from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.torchvision import build_model
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.data import load_splits
from dyhead.torchvision.evaluation import evaluate

ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.fixture
def three_classes(five_pictures):
    """The entry of DATASETS.REGISTER of five pictures whose file knows the classes of the runs."""
    path = Path(five_pictures[1])
    content = json.loads(path.read_text())
    content["categories"] = [{"id": i, "name": name} for i, name in ((1, "ant"), (2, "bee"), (11, "cow"))]
    path.write_text(json.dumps(content))
    return five_pictures


@pytest.mark.parametrize("engine", ENGINES)
def test_it_finds_what_an_evaluation_finds(make_run, three_classes, engine):
    folder, cfg = make_run()
    cfg.DATASETS.REGISTER, cfg.DATASETS.TEST = [three_classes], (three_classes[0],)
    cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0, str(folder)
    data.register_from_config([three_classes])
    model, fabric = build_model(cfg), Fabric(accelerator="cpu", devices=1)
    load_weights(model, str(folder / "model_final.pth"), strict=True)
    (result,) = evaluate(fabric, cfg, model, load_splits(cfg, cfg.DATASETS.TEST))

    detector = load_detector(folder, engine=engine)
    assert detector.engine == engine
    records = result.split.records
    found = detector([record["file_name"] for record in records])
    ours = [d for each, record in zip(found, records, strict=True) for d in each.coco(record["image_id"])]
    assert len(ours) == len(result.detections) > 20
    for one, other in zip(ours, result.detections, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


@pytest.mark.detectron2
def test_masks_and_keypoints_are_the_same_in_both_engines(make_run, pictures):
    # The engines' ways of resizing differ in the last bit, so that the picture stays as it is.
    masks = {
        "INPUT.MIN_SIZE_TEST": 56,
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "INPUT.MASK_FORMAT": "bitmask",
    }
    folder, _ = make_run("keypoint_rcnn_dyhead", masks)
    one, other = (load_detector(folder, engine=engine)(pictures / "b.jpg") for engine in ("torchvision", "detectron2"))
    assert len(one) == len(other) == 7
    assert one.masks.shape == other.masks.shape == (7, 56, 64)
    assert one.masks.any()
    assert (one.masks != other.masks).float().mean() < 0.01
    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(one.keypoints, other.keypoints, atol=1e-3, rtol=0)


def test_files_pixels_and_images_of_pillow_give_the_same(detector, pictures):
    file = pictures / "a.png"
    image = Image.open(file)
    whole, *others = detector([str(file), file, image, np.asarray(image)])
    assert whole.image.shape == (48, 64, 3)
    for other in others:
        assert torch.equal(whole.boxes, other.boxes)
    assert torch.equal(whole.boxes, detector(file).boxes)


def test_scores_and_names_are_those_of_the_run(detector, pictures):
    whole = detector(pictures / "a.png")
    assert whole.names == [["ant", "bee", "cow"][k] for k in whole.labels]
    assert [d["category_id"] for d in whole.coco(1)] == [[7, 8, 11][k] for k in whole.labels]
    least = float(whole.scores[2])
    some = detector(pictures / "a.png", score_threshold=least)
    assert torch.equal(some.boxes, whole.boxes[whole.scores >= least])
    assert 0 < len(some) < len(whole)


def test_a_batch_is_cut_into_parts(detector, pictures):
    seen = []
    hook = detector.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert len(detector([pictures / "a.png"] * 5, batch_size=2)) == 5
    hook.remove()
    assert seen == [2, 2, 1]
    assert detector([]) == []


def test_a_config_file_and_weights_are_a_detector_too(detector, make_run, pictures, tmp_path):
    folder, _ = make_run()
    whole = detector(pictures / "a.png")
    apart = tmp_path / "apart"
    apart.mkdir()
    (folder / "config.yaml").rename(apart / "mine.yaml")
    found = load_detector(apart / "mine.yaml", folder / "model_final.pth")(pictures / "a.png")
    assert torch.equal(found.boxes, whole.boxes)
    assert found.names == whole.names  # run.json lies beside the weights
    (folder / "run.json").unlink()
    found = load_detector(apart / "mine.yaml", folder / "model_final.pth")(pictures / "a.png")
    assert set(found.names) <= {"circle", "triangle", "square"}  # of the sets that the file names


def test_a_checkpoint_of_a_run_is_a_detector_too(detector, run_folder, pictures):
    found = load_detector(run_folder / "model_final.pth")(pictures / "a.png")
    assert torch.equal(found.boxes, detector(pictures / "a.png").boxes)
    with pytest.raises(ConfigError, match="without other weights"):
        load_detector(run_folder / "model_final.pth", run_folder / "model_final.pth")


def test_an_unknown_engine_is_told(run_folder):
    with pytest.raises(ConfigError, match="expected one of auto, detectron2, torchvision, got 'tensorflow'"):
        load_detector(run_folder, engine="tensorflow")


def test_classes_without_names_are_numbered(make_run, pictures, caplog):
    folder, _ = make_run()
    (folder / "run.json").unlink()
    opts = ["DATASETS.TRAIN", "('gone',)", "DATASETS.TEST", "()"]
    detector = load_detector(folder, opts=opts)
    assert "names of the 3 classes are not known" in caplog.text
    found = detector(pictures / "a.png")
    assert found.names == [str(k) for k in found.labels.tolist()]
    assert [d["category_id"] for d in found.coco(1)] == [k + 1 for k in found.labels.tolist()]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "without config.yaml"),
        (lambda folder: (folder / "last_checkpoint").unlink(), "without a checkpoint"),
        (lambda folder: (folder / "run.json").write_text("{}"), "run.json: expected"),
        (lambda folder: (folder / "model_final.pth").write_bytes(b"no"), "model_final.pth"),
    ],
)
def test_what_is_no_run_is_told(make_run, spoil, message):
    folder, _ = make_run()
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        load_detector(folder)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("none.jpg", DataError, "none.jpg"),
        (np.zeros((4, 4), np.uint8), TypeError, "expected a file"),
        (np.zeros((4, 4, 3)), TypeError, "float64"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "expected pixels"),
        (Image.new("I;16", (4, 4)), TypeError, "8-bit"),
        (3, TypeError, "expected a file"),
    ],
)
def test_what_is_no_image_is_told(detector, image, error, message):
    with pytest.raises(error, match=message):
        detector(image)


def test_the_picture_has_the_size_of_the_image_and_boxes_on_it(detector, pictures):
    found = detector(pictures / "a.png")
    picture = np.asarray(found.draw())
    assert picture.shape == found.image.shape
    x0, y0, x1, y1 = found.boxes[0].round().int().tolist()
    changed = (picture != found.image).any(axis=2)
    assert changed[max(y0, 0) : y1, max(x0, 0) : x1].any()
    nothing = detector(pictures / "a.png", score_threshold=1.0)
    assert len(nothing) == 0
    assert nothing.draw().tobytes() == found.image.tobytes()


def test_importing_the_package_loads_no_torch():
    program = "import sys, dyhead; assert dyhead.__all__ == ['load_detector']; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
