"""What detectors of two boxes of an object keep to under both engines; see test_contract.py."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dyhead import data
from dyhead.config import ConfigError, load_config
from dyhead.data import shapes
from dyhead.torchvision import get_cfg
from dyhead.torchvision.data import load_train, train_loader
from tests.test_contract import CONFIGS, build, inputs


def visible(boxes):
    """The left third of each object."""
    return torch.cat([boxes[:, :2], boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) / 3, boxes[:, 3:]], dim=1)


@pytest.mark.detectron2
def test_both_engines_learn_visible_boxes_and_put_them_out(tmp_path):
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    ours, theirs = build("torchvision", "pairedbox", ""), build("detectron2", "pairedbox", "")
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    images, targets = inputs("objects")
    found = [{"boxes": b, "labels": k, "visible_boxes": visible(b)} for b, k in targets]
    losses, batch = ours.model.train()(images, found), []
    for image, (boxes, labels) in zip(images, targets, strict=True):
        instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(boxes), gt_classes=labels)
        instances.gt_visible_boxes = Boxes(visible(boxes))
        batch.append({"image": image, "instances": instances})
    with EventStorage():
        expected = theirs.model.train()(batch)
    assert set(losses) == set(expected)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=1e-7)
    assert losses["loss_visible"] != ours.losses(images, targets)["loss_visible"]

    with torch.no_grad():
        found = ours.model.eval()(images)
        batch = [{"image": image, "height": 2 * image.shape[1], "width": 3 * image.shape[2]} for image in images]
        other = [output["instances"] for output in theirs.model.eval()(batch)]
    for own, their in zip(found, other, strict=True):
        assert len(own["boxes"]) == len(their) > 10
        scale = torch.tensor([3.0, 2, 3, 2])
        torch.testing.assert_close(their.pred_boxes.tensor, scale * own["boxes"], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(their.pred_visible_boxes.tensor, scale * own["visible_boxes"], rtol=1e-4, atol=1e-2)
        assert not torch.allclose(own["boxes"], own["visible_boxes"], atol=0.1)


def configured(file, *words, cfg=None):
    cfg = get_cfg() if cfg is None else cfg
    load_config(cfg, CONFIGS / f"{file}_R18_shapes.yaml", [*words, "SOLVER.IMS_PER_BATCH", "2"])
    return cfg


@pytest.fixture
def crowd(tmp_path, monkeypatch):
    """Two drawn images with visible boxes, under the crowd's name."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in ("shapes_crowd_train", "shapes_crowd_val"):
        monkeypatch.setitem(shapes.SPECS, name, replace(shapes.SPECS[name], images=2))


@pytest.mark.parametrize("file", ["pairedbox", "fcos"])
def test_torchvisions_loader_gives_visible_boxes_to_those_who_read_them(file, crowd, caplog):
    cfg = configured(file, "DATASETS.TRAIN", "('shapes_crowd_train',)")
    with caplog.at_level(logging.WARNING):
        (split,) = load_train(cfg)
    (_, targets) = next(iter(train_loader(cfg, split.records, 0)))
    assert all(("visible_boxes" in t) == (file == "pairedbox") for t in targets)
    assert caplog.text == ""
    if file == "pairedbox":
        assert any((t["visible_boxes"] != t["boxes"]).any() for t in targets)
        for t in targets:  # a part of the whole
            assert (t["visible_boxes"][:, :2] >= t["boxes"][:, :2]).all()
            assert (t["visible_boxes"][:, 2:] <= t["boxes"][:, 2:]).all()


@pytest.mark.detectron2
@pytest.mark.parametrize("file", ["pairedbox", "fcos"])
def test_detectron2s_loader_does_the_same(file, crowd):
    from detectron2.config import get_cfg as detectron2_cfg

    from dyhead.config import add_dyhead_config
    from dyhead.detectron2 import register_datasets
    from dyhead.detectron2.train_loader import TrainLoader

    cfg = configured(file, "DATASETS.TRAIN", "('shapes_crowd_train',)", cfg=add_dyhead_config(detectron2_cfg()))
    register_datasets(["shapes_crowd_train"])
    instances = [sample["instances"] for sample in next(iter(TrainLoader(cfg)))]
    assert all(own.has("gt_visible_boxes") == (file == "pairedbox") for own in instances)
    if file == "pairedbox":
        assert any((own.gt_visible_boxes.tensor != own.gt_boxes.tensor).any() for own in instances)


@pytest.mark.detectron2
def test_test_time_augmentation_is_refused():
    from detectron2.config import get_cfg as detectron2_cfg

    from dyhead.config import add_dyhead_config
    from dyhead.detectron2.config import check_values

    cfg = configured("pairedbox", "TEST.AUG.ENABLED", "True", cfg=add_dyhead_config(detectron2_cfg()))
    with pytest.raises(ConfigError, match=r"TEST.AUG.ENABLED: expected False with .*DyHeadPairedBox, got True"):
        check_values(cfg)


def test_a_set_without_visible_boxes_is_named(tmp_path, caplog):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 30]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    data.register_coco_json("contract_without_visible", tmp_path / "a.json", tmp_path)
    cfg = configured("pairedbox", "DATASETS.TRAIN", "('contract_without_visible',)")
    with caplog.at_level(logging.WARNING):
        load_train(cfg)
    assert "'contract_without_visible' has no boxes of the visible parts of objects (visible_bbox)" in caplog.text
