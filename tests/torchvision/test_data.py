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
from dyhead.runs.preflight import check_parts
from dyhead.torchvision.data import (
    Augmentation,
    Change,
    Parts,
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
        change = augmentation(40, 60, np.random.default_rng(i))
        out, boxes = change.image(image), change.boxes(torch.tensor([[6.0, 10, 30, 20]]))
        assert out.shape == (3, 80, 120)
        rows, columns = (torch.where((out[0] > 127).any(dim=d))[0] for d in (1, 0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert boxes[0].tolist() == pytest.approx([float(e) for e in edges], abs=1)
        found.add(tuple(boxes[0].tolist()))
    assert len(found) == (1 if flip == "none" else 2)


def test_sizes_are_chosen_or_drawn_from_a_range():
    def sides(sampling):
        augmentation = Augmentation((20, 30), sampling, 1000, "none")
        return {augmentation(50, 50, np.random.default_rng(i)).after[1] for i in range(200)}

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


def polygon_of(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
@pytest.mark.parametrize("form", ["polygons", "RLE", "uncompressed RLE"])
def test_masks_follow_the_picture(form, flip):
    from pycocotools import mask as coco_masks

    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:20, 6:30] = 1
    rle = coco_masks.encode(np.asfortranarray(pixels))
    runs = np.diff(np.flatnonzero(np.diff(pixels.flatten("F"), prepend=1 - pixels[0, 0], append=2)))
    segmentation = {
        "polygons": polygon_of(6, 10, 30, 20),
        "RLE": {"size": [40, 60], "counts": rle["counts"].decode()},
        "uncompressed RLE": {"size": [40, 60], "counts": runs.tolist()},
    }[form]
    mask = Change((40, 60), (80, 90), flip).mask(segmentation)
    want = torch.zeros(80, 90, dtype=torch.bool)
    want[20:40, 9:45] = True
    want = {"horizontal": want.flip(1), "vertical": want.flip(0), "none": want}[flip]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, want)


def test_keypoints_follow_the_picture_and_left_and_right_change_places_in_a_mirror():
    parts = Parts(keypoints=("nose", "left_eye", "right_eye"))
    objects = [{"keypoints": [10, 4, 2, 0, 0, 1, 59, 39, 2]}, {"keypoints": [3, 3, 0, 70, 5, 2, 1, 1, 1]}, {}]
    plain = parts.keypoints_of(objects, Change((40, 60), (80, 60), "none"))
    assert plain.tolist() == [
        [[10.5, 9, 2], [0.5, 1, 1], [59.5, 79, 2]],
        [[0, 0, 0], [0, 0, 0], [1.5, 3, 1]],  # not annotated; outside the image
        [[0, 0, 0]] * 3,
    ]
    mirrored = parts.keypoints_of(objects, Change((40, 60), (80, 60), "horizontal"))
    assert mirrored[0].tolist() == [[49.5, 9, 2], [0.5, 79, 2], [59.5, 1, 1]]
    upside_down = parts.keypoints_of(objects, Change((40, 60), (80, 60), "vertical"))
    assert upside_down[0].tolist() == [[10.5, 71, 2], [0.5, 79, 1], [59.5, 1, 2]]
    assert parts.keypoints_of([], Change((40, 60), (80, 60), "none")).shape == (0, 3, 3)


@pytest.mark.detectron2
@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_masks_and_keypoints_are_those_of_detectron2(flip):
    from detectron2.data import detection_utils
    from detectron2.data import transforms as T

    rng = np.random.default_rng(3)
    names = ("top", "left", "right")
    from pycocotools import mask as coco_masks

    pixels = (rng.random((45, 61)) > 0.5).astype(np.uint8)
    rle = coco_masks.encode(np.asfortranarray(pixels))
    segmentations = [polygon_of(5.3, 7.1, 41.2, 30.6), {"size": [45, 61], "counts": rle["counts"].decode()}]
    objects = [
        {"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": 0, "segmentation": segmentation}
        | {"keypoints": [*(int(v) for v in rng.integers(0, 44, 2)), 2, 60, 44, 1, 5, 6, 0]}
        for segmentation in segmentations
    ]
    change = Change((45, 61), (64, 87), flip)
    flips = {"horizontal": [T.HFlipTransform(87)], "vertical": [T.VFlipTransform(64)], "none": []}[flip]
    transforms = T.TransformList([T.ResizeTransform(45, 61, 64, 87), *flips])
    theirs = []
    for a in objects:
        shifted = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(a["keypoints"])]
        theirs.append(
            detection_utils.transform_instance_annotations(
                dict(a, keypoints=shifted), transforms, (64, 87), keypoint_hflip_indices=np.array([0, 2, 1])
            )
        )
    instances = detection_utils.annotations_to_instances(theirs, (64, 87), mask_format="bitmask")
    parts = Parts(True, names)
    assert torch.equal(parts.masks_of(objects, change), instances.gt_masks.tensor)
    torch.testing.assert_close(parts.keypoints_of(objects, change), instances.gt_keypoints.tensor)


def test_objects_whose_masks_vanish_are_left_out_with_all_that_is_theirs(split):
    record = dict(split.records[0])
    a = dict(record["annotations"][0], bbox=[0, 0, 30, 30], keypoints=[5, 6, 2])
    full, none = dict(a, segmentation=polygon_of(0, 0, 30, 30)), dict(a, segmentation=polygon_of(3, 3, 3, 3))
    record["annotations"] = [none, full, dict(none, iscrowd=1)]
    _, target = TrainStream([record], PLAIN, "RGB", 0, Parts(True, ("nose",)))[0]
    assert {key: len(value) for key, value in target.items()} == dict.fromkeys(
        ("boxes", "labels", "masks", "keypoints"), 1
    )


def test_a_segmentation_that_cannot_be_read_names_the_image(split):
    record = dict(split.records[0])
    size = [record["height"], record["width"]]
    record["annotations"] = [dict(record["annotations"][0], segmentation={"size": size, "counts": [-5, 105]})]
    with pytest.raises(DataError, match=r"1\.png: a segmentation cannot be read \("):
        TrainStream([record], PLAIN, "RGB", 0, Parts(masks=True))[0]


def test_masks_and_keypoints_that_are_to_be_learned_must_be_there(tiny, configured, split):
    with pytest.raises(ConfigError, match="^MODEL.MASK_ON: expected False, since dataset .* without a segmentation"):
        load_train(configured(tiny, "mask_rcnn"))
    with pytest.raises(ConfigError, match="^MODEL.KEYPOINT_ON: expected False, since dataset .* has no keypoints"):
        load_train(configured(tiny, "keypoint_rcnn"))
    cfg = configured(tiny, "keypoint_rcnn")
    with pytest.raises(ConfigError, match="NUM_KEYPOINTS: expected 2, .* dataset 'set', got 5"):
        check_parts(cfg, "set", [], ["a", "b"], trained=True)
    check_parts(cfg, "set", [], list("abcde"), trained=True)


def test_images_with_few_keypoints_are_left_out(split):
    records = [dict(record) for record in split.records[:3]]
    for record, shown in zip(records, ([2, 1, 0], [0, 0, 2], [0, 0, 0]), strict=True):
        a = record["annotations"][0]
        record["annotations"] = [a, dict(a, keypoints=[v for s in shown for v in (1, 1, s)])]
    mixed = data.CocoSplit(split.info, split.class_names, split.category_ids, records)
    for least, kept in ((0, 3), (1, 2), (2, 1)):
        assert len(data.train_records([mixed], filter_empty=True, min_keypoints=least)) == kept
    with pytest.raises(DataError, match="no image with 3 annotated keypoints"):
        data.train_records([mixed], filter_empty=True, min_keypoints=3)
