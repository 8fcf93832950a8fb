"""The training stream, the augmentation and the pass over a test set."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead import data
from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.torchvision.data import (
    Augmentation,
    TrainBatches,
    TrainStream,
    evaluation_loader,
    load_splits,
    load_train,
    resized,
    train_loader,
)

PLAIN = Augmentation((64,), "choice", 1000, "none")


@pytest.fixture
def split(tiny):
    data.register_from_config(tiny["DATASETS.REGISTER"])
    return data.load(data.get(tiny["DATASETS.TRAIN"][0]))


def first_batches(loader, n):
    return list(islice(loader, n))


def same(a, b):
    return all(
        torch.equal(x, y) and torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])
        for (xs, ss), (ys, ts) in zip(a, b, strict=True)
        for x, y, s, t in zip(xs, ys, ss, ts, strict=True)
    )


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 1200), 800, 1333, (333, 1333)),  # 1333 / 4 = 333.25
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((480, 640), 0, 10, (480, 640)),
        ((2772, 2880), 2000, 1000, (962, 1000)),  # 962.5, less a rounding error in Detectron2's order of operations
        ((231, 704), 480, 96, (32, 96)),  # 31.5, and a rounding error more
        ((3, 2000), 192, 256, (1, 256)),
        ((5000, 1), 800, 1333, (1333, 1)),
    ],
)
def test_sizes_after_resizing_the_shortest_edge(size, shortest, longest, expected):
    assert resized(*size, shortest, longest) == expected


def test_every_epoch_shows_every_picture_once_in_another_order(split):
    stream = TrainStream(split.records, PLAIN, "RGB", seed=3)
    n = len(split.records)
    epochs = [[stream.record(e * n + i)["image_id"] for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == sorted(r["image_id"] for r in split.records) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = TrainStream(split.records, PLAIN, "RGB", seed=4)
    assert [other.record(i)["image_id"] for i in range(n)] != epochs[0]


@pytest.mark.parametrize("group", [False, True])
def test_batches_from_the_middle_and_of_several_devices_are_those_of_the_whole(split, group):
    stream = TrainStream(split.records, PLAIN, "RGB", seed=1)
    whole = list(islice(TrainBatches(stream, 2, group=group), 12))
    assert list(islice(TrainBatches(stream, 2, start=5, group=group), 7)) == whole[5:]
    devices = [list(islice(TrainBatches(stream, 2, rank=r, world_size=2, group=group), 6)) for r in (0, 1)]
    assert [batch for pair in zip(*devices, strict=True) for batch in pair] == whole
    resumed = [list(islice(TrainBatches(stream, 2, 4, rank=r, world_size=2, group=group), 2)) for r in (0, 1)]
    assert [batch for pair in zip(*resumed, strict=True) for batch in pair] == whole[8:]


def test_grouping_keeps_wide_and_high_pictures_apart_and_drops_none(split):
    stream = TrainStream(split.records, PLAIN, "RGB", seed=1)
    batches = list(islice(TrainBatches(stream, 2, group=True), 20))
    wide = [[stream.record(p)["width"] > stream.record(p)["height"] for p in batch] for batch in batches]
    assert all(len(set(shapes)) == 1 for shapes in wide)
    assert {True, False} == {shapes[0] for shapes in wide}
    seen = sorted(p for batch in batches for p in batch)
    assert len(set(range(40)) - set(seen)) <= 2  # at most one waits for its fellow in either group


def test_pictures_depend_on_seed_and_position_only(tiny, configured, split):
    cfg = configured(tiny)
    plain = first_batches(train_loader(cfg, split.records, seed=1), 6)
    assert {min(image.shape[-2:]) for images, _ in plain for image in images} == {48, 64}  # each position for itself
    assert same(first_batches(train_loader(cfg, split.records, seed=1, start=2), 4), plain[2:])
    with_workers = configured(tiny | {"DATALOADER.NUM_WORKERS": 2})
    assert same(first_batches(train_loader(with_workers, split.records, seed=1), 6), plain)
    assert not same(first_batches(train_loader(cfg, split.records, seed=2), 6), plain)


def test_the_format_orders_the_channels(tiny, configured, split):
    (rgb, _), (bgr, _) = (
        next(iter(train_loader(configured(tiny | {"INPUT.FORMAT": f}), split.records, seed=1))) for f in ("RGB", "BGR")
    )
    assert rgb[0].dtype == torch.uint8
    assert torch.equal(rgb[0], bgr[0].flip(0))


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_boxes_follow_the_picture(flip):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 6:30] = 255
    augmentation = Augmentation((80,), "choice", 1000, flip)
    found = set()
    for i in range(12):
        out, boxes = augmentation(image, torch.tensor([[6.0, 10, 30, 20]]), np.random.default_rng(i))
        assert out.shape == (3, 80, 120)
        rows, columns = (torch.where((out[0] > 127).any(dim=d))[0] for d in (1, 0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert boxes[0].tolist() == pytest.approx([float(e) for e in edges], abs=1)
        found.add(tuple(boxes[0].tolist()))
    assert len(found) == (1 if flip == "none" else 2)


def test_sizes_are_chosen_or_drawn_from_a_range():
    image, boxes = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.zeros(0, 4)

    def sides(sampling):
        augmentation = Augmentation((20, 30), sampling, 1000, "none")
        return {augmentation(image, boxes, np.random.default_rng(i))[0].shape[-1] for i in range(200)}

    assert sides("choice") == {20, 30}
    assert sides("range") == set(range(20, 31))


def test_crowds_are_left_out_and_pictures_with_nothing_else_filtered(split):
    records = [dict(record) for record in split.records[:3]]
    crowd = dict(records[0]["annotations"][0], iscrowd=1)
    records[0]["annotations"] = [crowd]
    records[1]["annotations"] = [*records[1]["annotations"], crowd]
    records[2]["annotations"] = []
    mixed = data.CocoSplit(split.info, split.class_names, split.category_ids, records)
    assert data.train_records([mixed], filter_empty=True) == [records[1]]
    assert data.train_records([mixed], filter_empty=False) == records
    _, target = TrainStream(records[1:2], PLAIN, "RGB", seed=0)[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(records[1]["annotations"]) - 1
    empty = TrainStream(records[2:], PLAIN, "RGB", seed=0)[0][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)
    with pytest.raises(DataError, match=f"{split.info.name}.*nothing to train on"):
        data.train_records([data.CocoSplit(split.info, [], [], records[2:])], filter_empty=True)


def test_every_test_picture_comes_once_whatever_the_number_of_devices(tiny, configured, split):
    cfg = configured(tiny | {"INPUT.MIN_SIZE_TEST": 32})
    for world_size in (1, 3, 20):
        loaders = [evaluation_loader(cfg, split, rank=r, world_size=world_size) for r in range(world_size)]
        indices = [index for loader in loaders for _, batch in loader for index in batch]
        assert sorted(indices) == list(range(len(split.records)))
    images, indices = next(iter(evaluation_loader(cfg, split)))
    assert min(images[0].shape[-2:]) == 32


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named_also_by_a_worker_process(tiny, configured, draw, tmp_path, workers):
    path = draw(tmp_path / "broken", 4)
    good = (path.parent / "3.png").read_bytes()
    (path.parent / "3.png").write_bytes(good[: len(good) // 2])
    data.register_coco_json(f"broken_{path}", path, path.parent)
    split = data.load(data.get(f"broken_{path}"))
    cfg = configured(tiny | {"DATALOADER.NUM_WORKERS": workers})
    for loader in (train_loader(cfg, split.records, seed=0), evaluation_loader(cfg, split)):
        with pytest.raises(DataError, match=r"^\S*3\.png: ") as error:
            first_batches(loader, 10)
        assert "Traceback" not in str(error.value)


def test_a_picture_of_another_size_than_annotated_is_named(tiny, configured, draw, tmp_path):
    path = draw(tmp_path / "resized", 2)
    Image.new("RGB", (7, 7)).save(path.parent / "1.png")
    data.register_coco_json(f"resized_{path}", path, path.parent)
    split = data.load(data.get(f"resized_{path}"))
    with pytest.raises(DataError, match=r"1\.png.*7 x 7"):
        first_batches(evaluation_loader(configured(tiny), split), 2)


def test_a_very_long_picture_keeps_a_pixel_and_its_boxes(tiny, configured, draw, tmp_path):
    path = draw(tmp_path / "long", 1)
    content = json.loads(path.read_text())
    content["images"][0].update(width=2000, height=3)
    category = content["categories"][0]["id"]
    content["annotations"] = [
        {"id": 1, "image_id": content["images"][0]["id"], "category_id": category, "bbox": [100, 0, 500, 3]}
    ]
    path.write_text(json.dumps(content))
    Image.new("RGB", (2000, 3), "white").save(path.parent / content["images"][0]["file_name"])
    data.register_coco_json(f"long_{path}", path, path.parent)
    cfg = configured(tiny | {"INPUT.MAX_SIZE_TRAIN": 256, "INPUT.MAX_SIZE_TEST": 256})
    (split,) = load_splits(cfg, [f"long_{path}"])
    (images, _), (shown, targets) = (
        first_batches(loader, 1)[0]
        for loader in (evaluation_loader(cfg, split), train_loader(cfg, split.records, seed=0))
    )
    assert images[0].shape == shown[0].shape == (3, 1, 256)
    assert images[0].float().mean() > 250
    x0, y0, x1, y1 = targets[0]["boxes"][0].tolist()
    assert (y0, y1) == (0, 1)
    assert x1 - x0 == pytest.approx(500 * 256 / 2000)


def test_boxes_beyond_the_picture_are_clipped_where_the_configuration_says_so(tiny, configured, draw, tmp_path):
    path = draw(tmp_path / "beyond", 1)
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2:] = [1000, 1000]
    path.write_text(json.dumps(content))
    data.register_coco_json(f"beyond_{path}", path, path.parent)
    with pytest.raises(DataError, match=r"lies outside the image \(bbox; DATASETS\.CLIP_BOXES True"):
        load_splits(configured(tiny), [f"beyond_{path}"])
    (split,) = load_splits(configured(tiny | {"DATASETS.CLIP_BOXES": True}), [f"beyond_{path}"])
    (record,) = split.records
    assert record["annotations"][0]["bbox"][2:] == [record["width"], record["height"]]


def test_names_that_share_a_file_are_sets_of_their_own(tiny, configured, draw, tmp_path):
    path = draw(tmp_path / "shared", 2)
    names = [f"shared_{kind}_{path}" for kind in ("train", "test")]
    cfg = configured(tiny)
    data.register_from_config([[name, str(path), str(path.parent)] for name in names])
    first, second = load_splits(cfg, names)
    assert [first.info.name, second.info.name] == names
    assert first.records == second.records
    assert len(data.train_records([first, second], filter_empty=True)) == 4


def test_training_sets_must_agree_in_their_classes(tiny, configured, draw, tmp_path):
    path = draw(tmp_path / "other", 2)
    path.write_text(path.read_text().replace('"red"', '"crimson"'))
    cfg = configured(tiny)
    cfg.DATASETS.TRAIN = (*tiny["DATASETS.TRAIN"], f"other_{path}")
    data.register_from_config([*tiny["DATASETS.REGISTER"], [f"other_{path}", str(path), str(path.parent)]])
    with pytest.raises(ConfigError, match=r"same classes.*red.*crimson"):
        load_train(cfg)


def test_a_batch_that_cannot_be_divided_is_refused(tiny, configured, split):
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH.*multiple of the 3 devices, got 2"):
        train_loader(configured(tiny), split.records, seed=0, world_size=3)
