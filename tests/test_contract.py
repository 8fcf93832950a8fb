"""What every registered detector keeps to, under both engines.

The same YAML, weights and images give the same losses, gradients and boxes; a checkpoint of one engine loads in the
other. A new detector is tested here as soon as it is registered and has its quickstart configuration.
"""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dyhead.config import TWO_STAGE, load_config
from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import load_weights, portable_state
from tests.detection.objects import levels_of

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
DENSE = {detector.name.lower(): name for name, detector in DETECTORS.items()}
NAMES = [*DENSE, "faster_rcnn"]
# Quickstarts by detector and neck.
WITH_NECKS = [
    *((name, neck) for name in NAMES for neck in ("", "_dyhead")),
    ("atss", "_sepc"),
    ("faster_rcnn", "_dyhead_box_head"),
    ("cascade_rcnn", "_dyhead"),
    ("doublehead_ext", "_dyhead"),
    ("dsfpn", ""),
    ("d2det", "_dyhead"),
]
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
# Everything is sampled, so that nothing is left to chance; scores of an untrained detector are low.
OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 64,  # GroupNorm of 32 groups has no variance on one pixel of 32 channels
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.SEPC.NUM_BLOCKS": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    **{f"MODEL.{node}.FC_DIM": 32 for node in ("DOUBLE_HEAD", "DOUBLE_HEAD_EXT", "DECOUPLED_BOX_HEAD")},
    **{f"MODEL.{node}.CONV_DIM": 64 for node in ("DOUBLE_HEAD", "DOUBLE_HEAD_EXT")},
    "MODEL.DOUBLE_HEAD_EXT.NON_LOCAL_DIM": 32,
    "MODEL.PAIREDBOX.FC_DIM": 32,
    **{f"MODEL.{key}_PER_IMAGE": 100000 for key in ("PAIREDBOX.BATCH_SIZE", "PAIREDBOX.RPN_BATCH_SIZE")},
    **{f"MODEL.D2DET.{key}": 32 for key in ("FC_DIM", "OFFSET_DIM", "BOX_CONV_DIM")},
    "MODEL.D2DET.NUM_BOX_CONV": 2,
    "MODEL.D2DET.BOX_CONV_GROUPS": 4,
    "MODEL.D2DET.JITTER": 0.0,
    "MODEL.D2DET.REGIONS_TRAIN": 100000,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
    **{f"{detector.node}.SCORE_THRESH_TEST": 0.01 for detector in DETECTORS.values()},
}


def objects(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(len(boxes)) % 3


# Images as (height, width) and the objects in them.
CASES = {
    "objects": [
        ((96, 128), objects((5, 6, 70, 50), (30, 10, 120, 90), (60, 40, 90, 75))),
        ((80, 100), objects((10, 10, 90, 70))),
    ],
    "none in one image": [((96, 128), objects((5, 6, 70, 50))), ((80, 100), objects())],
    "none at all": [((80, 100), objects())],
    "smaller than a cell": [((96, 128), objects((50.2, 50.3, 53.1, 52.9), (20, 20, 80, 70)))],
    "at the border": [((96, 128), objects((0, 0, 128, 96), (100, 60, 128, 96), (0, 40, 9, 60)))],
    "levels of one pixel": [((32, 32), objects((3, 4, 30, 28)))],
    "crowded": [((96, 128), objects(*((4 * i, 3 * i, 40 + 4 * i, 30 + 3 * i) for i in range(12))))],
}  # fmt: skip


def inputs(case):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size, _ in CASES[case]]
    return images, [of for _, of in CASES[case]]


class Torchvision:
    """A detector of the torchvision engine."""

    def __init__(self, file, options):
        self.model = build_model(configured(get_cfg(), file, options))

    def losses(self, images, targets):
        return self.model.train()(images, [{"boxes": boxes, "labels": labels} for boxes, labels in targets])

    def detections(self, images):
        with torch.no_grad():
            return [(found["boxes"], found["scores"], found["labels"]) for found in self.model.eval()(images)]

    def save(self, path):
        torch.save({"model": portable_state(self.model)}, path)

    def load(self, path):
        load_weights(self.model, str(path), strict=True)


class Detectron2:
    """The same detector of the Detectron2 engine."""

    def __init__(self, file, options):
        from detectron2 import config, modeling

        import dyhead.detectron2
        from dyhead.config import add_dyhead_config

        self.model = modeling.build_model(configured(add_dyhead_config(config.get_cfg()), file, options))
        self.checkpointer = dyhead.detectron2.Checkpointer(self.model)

    def losses(self, images, targets):
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        batch = []
        for image, (boxes, labels) in zip(images, targets, strict=True):
            instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(boxes), gt_classes=labels)
            batch.append({"image": image, "instances": instances})
        with EventStorage():
            return self.model.train()(batch)

    def detections(self, images):
        with torch.no_grad():
            found = [output["instances"] for output in self.model.eval()([{"image": image} for image in images])]
        return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]

    def save(self, path):
        torch.save({"model": self.model.state_dict()}, path)

    def load(self, path):
        self.checkpointer.load(str(path))


ADAPTERS = {"torchvision": Torchvision, "detectron2": Detectron2}


def configured(cfg, file, options):
    load_config(cfg, file, [str(word) for pair in {**OPTIONS, **options}.items() for word in pair])
    return cfg


def build(engine, name, neck="_dyhead", **options):
    """A detector whose numbers are far from where training starts, a neck's offsets among them."""
    torch.manual_seed(0)
    adapter = ADAPTERS[engine](CONFIGS / f"{name}{neck}_R18_shapes.yaml", options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapter.model.named_parameters():
            if "backbone" not in key or key.startswith("backbone.sepc."):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def assert_same_detections(name, found, expected):
    """Each detection of an image has its twin; neighbours may have scores as close as rounding, and change places.

    Two-stage detectors are each engine's own, in which NMS, twice, may see overlaps as close to its threshold as
    rounding: two of a hundred detections may differ for that.
    """
    borderline = 0 if name in DENSE else 2
    for (boxes, scores, labels), (their_boxes, their_scores, their_labels) in zip(found, expected, strict=True):
        assert len(boxes) > 0
        assert abs(len(boxes) - len(their_boxes)) <= borderline
        off = (boxes[:, None] - their_boxes).abs().amax(dim=2)
        twins = (off < 1e-3) & ((scores[:, None] - their_scores).abs() < 1e-5) & (labels[:, None] == their_labels)
        assert (~twins.any(dim=0)).sum() <= borderline
        assert (~twins.any(dim=1)).sum() <= borderline


def test_every_detector_has_its_files():
    for name in (*NAMES, "doublehead", "doublehead_ext", "dsfpn", "d2det"):
        for folder, size in ((CONFIGS, "R18_shapes"), (CONFIGS.parent, "R50")):
            for neck in ("", "_dyhead"):
                cfg = get_cfg()
                load_config(cfg, folder / f"{name}{neck}_{size}.yaml")
                assert cfg.MODEL.META_ARCHITECTURE == DENSE.get(name, TWO_STAGE)
                assert cfg.MODEL.NECKS == (["DyHead"] if neck else [])
    for file in (CONFIGS / "atss_sepc_R18_shapes.yaml", CONFIGS.parent / "atss_sepc_R50.yaml"):
        cfg = get_cfg()
        load_config(cfg, file)
        assert (cfg.MODEL.NECKS, cfg.MODEL.ATSS.NUM_CONVS) == (["SEPC"], 0)


@pytest.mark.detectron2
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_both_engines_give_the_same_losses_gradients_and_boxes(name, case, tmp_path):
    assert_engines_agree(name, "_dyhead", case, tmp_path)


@pytest.mark.detectron2
@pytest.mark.parametrize("case", ["objects", "none at all", "levels of one pixel"])
def test_both_engines_agree_behind_another_neck(case, tmp_path):
    assert_engines_agree("atss", "_sepc", case, tmp_path)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("name", "neck", "case"),
    [
        ("faster_rcnn", "_dyhead_box_head", "none in one image"),
        ("cascade_rcnn", "_dyhead", "objects"),
        ("cascade_rcnn", "_dyhead", "none at all"),
        ("doublehead", "_dyhead", "none in one image"),
        ("doublehead_ext", "_dyhead", "objects"),
        ("doublehead_ext", "_dyhead", "none at all"),
    ],
)
def test_both_engines_agree_on_other_two_stage_detectors(name, neck, case, tmp_path):
    assert_engines_agree(name, neck, case, tmp_path)


@pytest.mark.detectron2
@pytest.mark.parametrize("case", ["objects", "none in one image", "none at all"])
def test_both_engines_agree_about_a_box_head_with_losses_of_its_own(case, tmp_path):
    assert_engines_agree("d2det", "_dyhead", case, tmp_path)


@pytest.mark.detectron2
def test_such_a_box_head_may_be_supervised_on_other_maps(tmp_path):
    options = {"MODEL.ROI_BOX_HEAD.NAME": "D2Det"}
    assert_engines_agree("dsfpn", "", "none in one image", tmp_path, **options)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["DyHeadBoxHead", "DoubleHeadExt"])
def test_both_engines_have_the_same_cascade_of_other_box_heads(name, tmp_path):
    options = {"MODEL.ROI_BOX_HEAD.NAME": name}
    assert_engines_agree("cascade_rcnn", "_dyhead", "none in one image", tmp_path, **options)


def assert_engines_agree(name, neck, case, tmp_path, **options):
    """The same losses, gradients and boxes, and statistics after a step."""
    ours, theirs = build("torchvision", name, neck, **options), build("detectron2", name, neck, **options)
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    images, targets = inputs(case)
    losses, expected = ours.losses(images, targets), theirs.losses(images, targets)
    assert set(losses) == set(expected)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=1e-7)
    norms = []
    for adapter, of in ((ours, losses), (theirs, expected)):
        sum(of.values()).backward()
        norms.append(sorted(float(p.grad.norm()) for p in adapter.model.parameters() if p.grad is not None))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-6)
    statistics = [
        sorted(float(b.norm()) for key, b in adapter.model.named_buffers() if "running" in key)
        for adapter in (ours, theirs)
    ]
    assert statistics[0] == pytest.approx(statistics[1], rel=1e-5)
    assert_same_detections(name, ours.detections(images), theirs.detections(images))


@pytest.mark.detectron2
@pytest.mark.parametrize(("name", "neck"), WITH_NECKS)
@pytest.mark.parametrize("writer", ADAPTERS)
def test_a_checkpoint_of_one_engine_gives_the_same_detections_in_the_other(writer, name, neck, tmp_path):
    reader = next(engine for engine in ADAPTERS if engine != writer)
    first, second = build(writer, name, neck), build(reader, name, neck)
    first.save(tmp_path / "w.pth")
    second.load(tmp_path / "w.pth")
    images, _ = inputs("objects")
    assert_same_detections(name, second.detections(images), first.detections(images))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["objects", "none at all"])
@pytest.mark.parametrize(("name", "neck"), WITH_NECKS)
def test_gradients_reach_every_parameter(engine, name, neck, case):
    adapter = build(engine, name, neck)
    losses = adapter.losses(*inputs(case))
    assert all(loss.isfinite() and loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in adapter.model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["cascade_rcnn", "doublehead_ext"])
def test_without_proposals_nothing_is_lost_or_found_by_the_box_head(engine, name):
    adapter = build(engine, name, **{"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 5000})
    losses = adapter.losses(*inputs("none at all"))
    assert all(loss.item() == 0 for key, loss in losses.items() if not key.startswith("loss_rpn"))
    sum(losses.values()).backward()
    assert [key for key, p in adapter.model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(b.isfinite().all() for b in adapter.model.buffers())
    assert [len(boxes) for boxes, _, _ in adapter.detections(inputs("objects")[0])] == [0, 0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "neck"), [(name, neck) for name, neck in WITH_NECKS if neck])
def test_bfloat16_autocast_gives_nearly_the_same_losses(engine, name, neck):
    exact = build(engine, name, neck).losses(*inputs("objects"))  # a model of its own: a normalizer may remember
    adapter = build(engine, name, neck)
    with torch.autocast("cpu", torch.bfloat16):
        losses = adapter.losses(*inputs("objects"))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in adapter.model.parameters() if p.grad is not None)
    # The sum: the parts of few boxes vary more, and in R-CNN other proposals come through.
    assert sum(losses.values()).item() == pytest.approx(sum(exact.values()).item(), rel=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(boxes.isfinite().all() for boxes, _, _ in adapter.detections(inputs("objects")[0]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_boxes_lie_inside_the_image_and_are_not_empty(engine, name):
    images, _ = inputs("objects")
    for image, (boxes, scores, labels) in zip(images, build(engine, name).detections(images), strict=True):
        height, width = image.shape[1:]
        assert 0 < len(boxes) <= 100
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert set(labels.tolist()) <= {0, 1, 2}


def _losses_of_part(rank, port, parts, results):
    """One process of two: the losses of every dense detector on its part of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = {name: {k: v.item() for k, v in core_losses(name, [parts[rank]]).items()} for name in DENSE}
    torch.distributed.destroy_process_group()


def core_losses(name, images):
    """Losses of a detector on made-up levels, an image at a time: (seed, objects) each."""
    torch.manual_seed(0)
    in_features = levels_of(DENSE[name], ("p3", "p4"))
    options = DETECTORS[DENSE[name]].options(num_classes=3, in_features=in_features)
    detector = options.build(8, [8, 16][: len(in_features)], anchors=AnchorOptions(((32,), (64,)), ((1.0,),), 0.5))
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    levels = [torch.randn(1, 8, 12, 16, generator=torch.Generator().manual_seed(seed)) for seed, _ in images]
    fine = torch.cat(levels)
    predictions = detector({"p3": fine, "p4": F.avg_pool2d(fine, 2)})
    return detector.losses(predictions, [Targets(*of) for _, of in images])


def test_two_processes_have_the_losses_of_one():
    parts = [(0, objects((5, 6, 70, 50), (30, 10, 120, 90))), (1, objects())]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_losses_of_part, (port, parts, results), nprocs=2)
        halves = [results[rank] for rank in range(2)]
    for name in DENSE:
        # Each process divides by the mean number of positives, the one process by their sum; a moving average is one.
        whole = core_losses_with_mean(name, parts)
        means = {key: (halves[0][name][key] + halves[1][name][key]) / 2 for key in whole}
        assert means == pytest.approx(whole, rel=1e-5)


def core_losses_with_mean(name, parts):
    """What one process computes if it divides by the mean over images, as two processes with an image each do."""
    from dyhead.detection import normalizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalizer, "mean_over_devices", lambda value: value / 2)
        return {key: loss.item() / 2 for key, loss in core_losses(name, parts).items()}


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed")
@pytest.mark.detectron2
def test_crowd_regions_are_no_objects_in_either_engine(tmp_path):
    import json

    import numpy as np
    from PIL import Image

    from dyhead import data
    from dyhead.detectron2 import register_datasets
    from dyhead.detectron2.datasets import NamingMapper
    from dyhead.torchvision.data import Augmentation, TrainStream

    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "a.png")
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 40], "area": 2000, "iscrowd": 1},
    ]
    image = {"id": 1, "file_name": "a.png", "height": 64, "width": 80}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    entry = ["contract_crowd", str(tmp_path / "a.json"), str(tmp_path)]
    register_datasets(["contract_crowd"], [entry])
    records = data.load(data.get("contract_crowd")).records
    _, target = TrainStream(records, Augmentation((64,), "choice", 80, "none"), "RGB", 0)[0]

    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.data import DatasetCatalog

    cfg = detectron2_cfg()
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = "none", (64,), 80
    (record,) = DatasetCatalog.get("contract_crowd")
    instances = NamingMapper(cfg, is_train=True)(record)["instances"]
    assert target["boxes"].tolist() == instances.gt_boxes.tensor.tolist() == [[4, 4, 24, 34]]
