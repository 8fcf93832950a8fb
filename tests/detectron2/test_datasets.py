# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""What Detectron2's loaders hand out: images as the other engine reads them, and errors that name them."""

import json
import logging
from itertools import islice

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import TrainerBase

from dyhead.config import add_dyhead_config
from dyhead.data import DataError, read_image
from dyhead.detectron2 import NamingMapper, Trainer, register_datasets
from dyhead.detectron2.datasets import check_trainable, evaluation_loader
from dyhead.detectron2.train_loader import TrainLoader

import torch  # isort: skip

POLYGON = [[10.0, 5.0, 30.0, 5.0, 30.0, 35.0, 10.0, 35.0]]


@pytest.fixture
def picture():
    """40 x 60 pixels of colour, smooth enough for JPEG."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((60, 40), Image.Resampling.BICUBIC))


@pytest.fixture
def config():
    """`config({key: value})`: Detectron2's defaults with images that keep their size."""

    def build(settings=None):
        cfg = add_dyhead_config(get_cfg())
        plain = {"INPUT.MIN_SIZE_TEST": 0, "INPUT.FORMAT": "RGB", "DATALOADER.NUM_WORKERS": 0}
        cfg.merge_from_list([part for pair in (plain | (settings or {})).items() for part in pair])
        return cfg

    return build


@pytest.fixture
def pictures(tmp_path):
    """`pictures(name, count, change)`: registers pictures of 60 x 40 with a box each; returns (record, ...)."""

    def build(name, count=2, change=lambda data: None, **options):
        data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
        for i in range(1, count + 1):
            Image.new("RGB", (60, 40), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
            data["images"].append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
            box = {"bbox": [10, 5, 20, 30], "segmentation": POLYGON}
            data["annotations"].append({"id": i, "image_id": i, "category_id": 1} | box)
        change(data)
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        register_datasets([name], [[name, str(tmp_path / f"{name}.json"), str(tmp_path)]], **options)
        return DatasetCatalog.get(name)

    return build


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_both_engines_read_the_same_pixels(tmp_path, picture, config, image_format):
    grey = picture[:, :, 0].astype(int)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "a.jpg")
    Image.fromarray(picture).rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "32.tif")
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "cmyk.tif")
    mapper = NamingMapper(config({"INPUT.FORMAT": image_format}), is_train=False)
    for name in ("a.jpg", "turned.jpg", "16.png", "32.tif", "cmyk.tif"):
        record = {"file_name": str(tmp_path / name), "height": 40, "width": 60, "image_id": 1}
        seen = mapper(record)["image"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(seen, read_image(tmp_path / name, image_format))
        assert np.abs(seen.mean() - picture.mean()) < 40  # neither black nor white
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: .*floating point"):
        mapper({"file_name": str(tmp_path / "float.tif"), "image_id": 1})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"INPUT.FORMAT": "L"},
        {"INPUT.FORMAT": "YUV-BT.601"},
        {"INPUT.CROP.ENABLED": True},
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [20, 30]},
        {"MODEL.MASK_ON": True},
        {"INPUT.MIN_SIZE_TRAIN": (30, 50), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.RANDOM_FLIP": "vertical"},
        {"MODEL.LOAD_PROPOSALS": True},
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_all_else_is_as_detectron2_does_it(tmp_path, picture, config, settings, is_train):
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture[:, :, 1]).save(tmp_path / "classes.png")
    record = {
        "file_name": str(tmp_path / "a.png"), "height": 40, "width": 60, "image_id": "x",
        "sem_seg_file_name": str(tmp_path / "classes.png"),
        "annotations": [
            {"bbox": [10, 5, 30, 35], "bbox_mode": 0, "category_id": 1, "iscrowd": 0, "segmentation": POLYGON},
            {"bbox": [0, 0, 60, 40], "bbox_mode": 0, "category_id": 0, "iscrowd": 1},
        ],
        "proposal_boxes": np.array([[1.0, 2, 30, 40], [5, 5, 50, 30]]), "proposal_bbox_mode": 0,
        "proposal_objectness_logits": np.array([0.5, 0.1]),
    }  # fmt: skip
    cfg = config({"INPUT.MIN_SIZE_TEST": 64, "INPUT.MIN_SIZE_TRAIN": (64,)} | settings)
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002 (Detectron2's)
        theirs = DatasetMapper(cfg, is_train)(record)
        np.random.seed(seed)  # noqa: NPY002
        ours = NamingMapper(cfg, is_train)(record)
        assert ours.keys() == theirs.keys()
        for key in ("image", "sem_seg"):
            assert torch.equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
        for key in ("instances", "proposals"):
            if key in theirs:
                assert ours[key].image_size == theirs[key].image_size
                for field, value in theirs[key].get_fields().items():
                    same = ours[key].get(field)
                    for a, b in ((getattr(v, "tensor", getattr(v, "polygons", v)) for v in (value, same)),):
                        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)
        assert (ours["height"], ours["width"], ours["image_id"]) == (40, 60, "x")
    assert len(record["annotations"]) == 2


def test_very_long_pictures_keep_a_pixel(tmp_path, config):
    Image.new("RGB", (2000, 3), "white").save(tmp_path / "long.png")
    box = {"bbox": [100.0, 0.0, 600.0, 3.0], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "long.png"), "height": 3, "width": 2000, "annotations": [box]}
    sizes = {"INPUT.MIN_SIZE_TRAIN": (192,), "INPUT.MAX_SIZE_TRAIN": 256, "INPUT.RANDOM_FLIP": "none"}
    cfg = config(sizes | {"INPUT.MIN_SIZE_TEST": 192, "INPUT.MAX_SIZE_TEST": 256})
    for is_train in (True, False):
        assert NamingMapper(cfg, is_train)(record)["image"].shape == (3, 1, 256)
    instances = NamingMapper(cfg, True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[pytest.approx(12.8), 0, pytest.approx(76.8), 1]]
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "relative", [0.1, 0.1]
    assert NamingMapper(cfg, True)(record)["image"].shape == (3, 1, 256)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("grouping", [True, False])
def test_a_broken_picture_is_named_also_by_a_worker_process(tmp_path, config, pictures, workers, grouping):
    name = f"cut_{workers}_{grouping}"
    pictures(name)
    cut(tmp_path / "2.png")
    cfg = config(
        {"DATASETS.TRAIN": (name,), "SOLVER.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": workers}
        | {"DATALOADER.ASPECT_RATIO_GROUPING": grouping}
    )
    loaders = TrainLoader(cfg), Trainer.build_test_loader(cfg, name)
    assert len(loaders[1]) == 2
    for loader in loaders:
        with pytest.raises(DataError, match=r"^\S*2\.png: the image cannot be read") as error:
            list(islice(loader, 5))
        assert "Traceback" not in str(error.value)


def test_a_broken_picture_ends_a_training_without_a_traceback(tmp_path, config, pictures, caplog, monkeypatch):
    class Trained(TrainerBase):
        def run_step(self):
            next(self.batches)

    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)  # what runs before may have set otherwise
    pictures("trained")
    cut(tmp_path / "1.png")
    trainer = Trained()
    trainer.batches = iter(TrainLoader(config({"DATASETS.TRAIN": ("trained",), "SOLVER.IMS_PER_BATCH": 2})))
    with pytest.raises(DataError, match=r"1\.png: the image cannot be read"):
        trainer.train(0, 3)
    assert not any(record.exc_info for record in caplog.records)
    trainer.batches = iter([])
    with pytest.raises(StopIteration):
        trainer.train(0, 3)
    assert any(record.exc_info for record in caplog.records)  # what nobody expected is told in full


def test_whole_pictures_come_as_detectron2_gives_them(config, pictures):
    pictures("whole", 3)
    cfg = config({"DATASETS.TRAIN": ("whole",), "SOLVER.IMS_PER_BATCH": 2})
    assert [len(batch) for batch in islice(Trainer.build_train_loader(cfg), 3)] == [2, 2, 2]
    (one,), *_ = evaluation_loader(cfg, "whole")
    assert one["image"].shape == (3, 40, 60)
    assert one["image"][0].unique().tolist() == [10]


def test_there_must_be_something_to_train_on(config, pictures):
    pictures("crowds", change=lambda data: [a.update(iscrowd=1) for a in data["annotations"]])
    pictures("unannotated", change=lambda data: data.pop("annotations"))
    pictures("objects")
    for check in (check_trainable, TrainLoader):
        with pytest.raises(DataError, match="crowds: no image with an annotation that is not a crowd"):
            check(config({"DATASETS.TRAIN": ("crowds",)}))
        with pytest.raises(DataError, match=r"unannotated\.json .*it has no annotations.*not trained on"):
            check(config({"DATASETS.TRAIN": ("objects", "unannotated")}))
    check_trainable(config({"DATASETS.TRAIN": ("objects", "crowds")}))
    check_trainable(config({"DATASETS.TRAIN": ("crowds",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}))
    assert len(list(evaluation_loader(config(), "unannotated"))) == 2


def test_what_detectron2_says_of_sets_of_its_own_is_no_traceback(config, pictures):
    records = pictures("theirs_source")
    for record in records:
        record["annotations"] = []
    DatasetCatalog.register("theirs_empty", lambda: records)
    with pytest.raises(DataError, match="DATASETS.TRAIN theirs_empty: No valid data found"):
        TrainLoader(config({"DATASETS.TRAIN": ("theirs_empty",)}))


def test_boxes_beyond_the_picture_are_clipped_where_asked(pictures):
    def beyond(data):
        data["annotations"][0]["bbox"] = [30, 5, 300, 20]

    with pytest.raises(DataError, match=r"lies outside the image \(bbox; DATASETS\.CLIP_BOXES True"):
        pictures("beyond", 1, beyond)
    (record,) = pictures("beyond", 1, beyond, clip_boxes=True)
    assert record["annotations"][0]["bbox"] == [30, 5, 60, 25]
    with pytest.raises(DataError, match=r"lies outside the image"):  # another setting, another set
        pictures("beyond", 1, beyond)


def test_names_that_share_a_file_are_sets_of_their_own(tmp_path, pictures):
    pictures("shared_train")
    file, root = str(tmp_path / "shared_train.json"), str(tmp_path)
    register_datasets(["shared_train", "shared_test"], [[n, file, root] for n in ("shared_train", "shared_test")])
    assert DatasetCatalog.get("shared_train") == DatasetCatalog.get("shared_test")
    assert MetadataCatalog.get("shared_train").json_file == MetadataCatalog.get("shared_test").json_file == file
    assert MetadataCatalog.get("shared_test").thing_classes == ["cat", "dog"]
