"""Dually Supervised FPN: what further RoI heads learn in training, in both engines, and that tests do without them."""

import copy
import logging

import pytest
import torch
from torch.nn import functional as F

from dyhead.config import ConfigError, load_config
from dyhead.torchvision import build_model, config, get_cfg
from dyhead.torchvision.checkpoint import load_weights
from tests.test_contract import CONFIGS, assert_engines_agree, build, configured, inputs
from tests.test_contract_regions import BOTH, losses_of_detectron2, losses_of_torchvision

MAPS = "MODEL.DSFPN.MAPS"
PLAIN = {MAPS: "none"}
BLOCKS = {MAPS: "dyhead_blocks", "MODEL.DYHEAD.NUM_BLOCKS": 3}


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("name", "neck", "case", "options"),
    [
        ("dsfpn", "", "objects", {}),
        ("dsfpn", "", "none at all", {}),
        ("dsfpn", "_dyhead", "none in one image", {"MODEL.DSFPN.LOSS_WEIGHT": 0.5}),
        ("faster_rcnn", "_dyhead", "objects", {MAPS: "laterals", "MODEL.FPN.NORM": "GN"}),
        ("cascade_rcnn", "_dyhead", "objects", BLOCKS),
        ("cascade_rcnn", "", "none in one image", {MAPS: "laterals"}),
        ("doublehead_ext", "_dyhead", "objects", {MAPS: "dyhead_input"}),
    ],
)
def test_both_engines_agree(name, neck, case, options, tmp_path):
    assert_engines_agree(name, neck, case, tmp_path, **options)


@pytest.mark.detectron2
@pytest.mark.parametrize("case", ["objects", "none at all"])
def test_both_engines_agree_about_masks_and_keypoints(case, tmp_path):
    options = {**BOTH, MAPS: "laterals"}
    ours, theirs = (build(engine, "keypoint_rcnn", **options) for engine in ("torchvision", "detectron2"))
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    losses = losses_of_torchvision(ours, *inputs(case))
    expected = losses_of_detectron2(theirs, *inputs(case))
    of_heads = ("loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint")
    names = {"loss_rpn_cls", "loss_rpn_loc", *of_heads, *(f"{key}_lateral" for key in of_heads)}
    assert set(losses) == set(expected) == names
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=1e-7)


def maps_by_hand(model, batch, kind):
    """What further heads read, computed from the parts of the backbone."""
    stages = list(model.backbone.body(batch).values())
    laterals = [layer(stage) for layer, stage in zip(model.backbone.fpn.inner_blocks, stages, strict=True)]
    if kind == "laterals":
        return [{f"p{i}": level for i, level in enumerate(laterals, 2)}]
    summed = [laterals[-1]]
    for lateral in laterals[-2::-1]:
        summed.insert(0, lateral + F.interpolate(summed[0], size=lateral.shape[-2:], mode="nearest"))
    levels = [layer(level) for layer, level in zip(model.backbone.fpn.layer_blocks, summed, strict=True)]
    levels.append(levels[-1][:, :, ::2, ::2])
    pyramid = {f"p{i}": level for i, level in enumerate(levels, 2)}
    if kind == "dyhead_input":
        return [pyramid]
    outputs = []
    for block in model.backbone.dyhead.blocks[:-1]:
        pyramid = block(pyramid)
        outputs.append(pyramid)
    return outputs


@pytest.mark.parametrize(
    ("kind", "name", "places"),
    [
        ("laterals", "faster_rcnn", ["lateral"]),
        ("dyhead_input", "faster_rcnn", ["input"]),
        ("dyhead_blocks", "faster_rcnn", ["block0", "block1"]),
    ],
)
def test_the_losses_are_those_of_a_detector_that_reads_the_other_maps(kind, name, places):
    options = {**BLOCKS, MAPS: kind}
    model = build("torchvision", name, **options).model
    other = build("torchvision", name, **{**options, **PLAIN}).model
    images, targets = inputs("objects")
    targets = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in targets]
    batch, targets = model.transform(images, targets)
    proposals = [torch.cat([t["boxes"] + shift for shift in (0, 3, -9)]) for t in targets]
    arguments = proposals, batch.image_sizes, targets
    _, losses = model.roi_heads(model.backbone(batch.tensors), *arguments)
    for place, maps in zip(places, maps_by_hand(model, batch.tensors, kind), strict=True):
        other.roi_heads.load_state_dict(model.roi_heads.auxiliary[place].state_dict())
        _, expected = other.roi_heads(maps, *arguments)
        assert set(expected) == {"loss_cls", "loss_box_reg"}
        for key, loss in expected.items():
            torch.testing.assert_close(losses[f"{key}_{place}"], loss)
    assert set(losses) == {f"{key}{suffix}" for key in expected for suffix in ("", *(f"_{place}" for place in places))}


def test_a_stage_of_the_other_heads_learns_from_the_boxes_of_the_detectors_own_stages():
    model = build("torchvision", "cascade_rcnn", **BLOCKS).model
    seen = {"own": [], "other": []}
    for key, heads in (("own", model.roi_heads), ("other", model.roi_heads.auxiliary["block0"])):
        pool = lambda module, args, key=key: seen[key].append(torch.cat(args[1]))  # noqa: E731
        heads.box_roi_pool.register_forward_pre_hook(pool)
    images, targets = inputs("objects")
    model.train()(images, [{"boxes": boxes, "labels": labels} for boxes, labels in targets])
    assert len(seen["own"]) == len(seen["other"]) == 3
    assert all(torch.equal(own, other) for own, other in zip(seen["own"], seen["other"], strict=True))
    assert not torch.equal(seen["own"][0][:3], seen["own"][1][:3])


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
@pytest.mark.parametrize("name", ["dsfpn", "cascade_rcnn"])
def test_at_test_time_the_detector_is_that_without_them(engine, name, tmp_path):
    trained = build(engine, name, "_dyhead", **BLOCKS)
    plain = build(engine, name, "_dyhead", **{**BLOCKS, **PLAIN})
    trained.save(tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth")["model"]
    further = [key for key in state if key.startswith("roi_heads.auxiliary.")]
    assert {key.split(".")[2] for key in further} == {"block0", "block1"}
    own = [key for key in state if key.startswith("roi_heads.") and key not in further]
    assert sorted(further) == sorted(
        key.replace("roi_heads.", f"roi_heads.auxiliary.{place}.", 1) for key in own for place in ("block0", "block1")
    )
    torch.save({"model": {key: state[key] for key in state if key not in further}}, tmp_path / "w.pth")
    plain.load(tmp_path / "w.pth")
    for heads in trained.model.roi_heads.auxiliary.values():
        heads.forward = None  # nothing may call it
    images, _ = inputs("objects")
    for found, expected in zip(trained.detections(images), plain.detections(images), strict=True):
        assert len(found[0]) > 10
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(tap.levels for tap in trained.model.roi_heads.taps.values())


def test_a_checkpoint_with_them_loads_into_a_detector_without(tmp_path):
    trained, plain = build("torchvision", "dsfpn", "_dyhead"), build("torchvision", "dsfpn", "_dyhead", **PLAIN)
    with torch.no_grad():
        trained.model.roi_heads.box_predictor.cls_score.bias.fill_(7)
    trained.save(tmp_path / "w.pth")
    load_weights(plain.model, str(tmp_path / "w.pth"), strict=False)
    assert (plain.model.roi_heads.box_predictor.cls_score.bias == 7).all()


def test_maps_are_let_go_of_and_a_copy_of_the_model_has_its_own():
    adapter = build("torchvision", "dsfpn", "_dyhead", **BLOCKS)
    adapter.losses(*inputs("objects"))
    assert not any(tap.levels for tap in adapter.model.roi_heads.taps.values())
    twin = copy.deepcopy(adapter.model).train()
    twin.backbone(torch.zeros(1, 3, 64, 64))
    assert all(len(tap.levels) == 5 for tap in twin.roi_heads.taps.values())
    assert not any(tap.levels for tap in adapter.model.roi_heads.taps.values())


@pytest.mark.detectron2
def test_laterals_are_those_of_any_pyramid_of_detectron2():
    from detectron2.modeling import FPN
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    from dyhead.detectron2 import DyHeadBackbone
    from dyhead.detectron2.rcnn import _laterals

    regnet = RegNet(
        stem_class=SimpleStem, stem_width=32, block_class=ResBottleneckBlock, depth=23, w_a=38.65, w_0=96, w_m=2.43,
        group_width=40, norm="BN", out_features=["s2", "s3", "s4"],
    )  # fmt: skip
    pyramid = FPN(regnet, ["s2", "s3", "s4"], out_channels=64)
    found = _laterals(DyHeadBackbone(pyramid, num_blocks=1))
    assert found == _laterals(pyramid)
    assert list(found) == list(pyramid.output_shape()) == ["p3", "p4", "p5"]
    assert list(found.values()) == pyramid.lateral_convs[::-1]
    assert _laterals(regnet) == {}


def test_every_second_block_has_heads_but_for_the_last():
    model = build("torchvision", "faster_rcnn", **BLOCKS | {"MODEL.DYHEAD.NUM_BLOCKS": 6, "MODEL.DSFPN.EVERY": 2}).model
    assert list(model.roi_heads.taps) == list(model.roi_heads.auxiliary) == ["block1", "block3"]


def test_the_losses_are_multiplied_by_the_weight():
    (once, half) = (
        build("torchvision", "dsfpn", **{"MODEL.DSFPN.LOSS_WEIGHT": weight}).losses(*inputs("objects"))
        for weight in (1.0, 0.5)
    )
    for key in once:
        factor = 0.5 if key.endswith("_input") else 1
        torch.testing.assert_close(half[key], factor * once[key])


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("faster_rcnn", {MAPS: "dyhead_input"}, r"MODEL.DSFPN.MAPS: expected DyHead among MODEL.NECKS"),
        ("faster_rcnn", {MAPS: "above"}, r"MODEL.DSFPN.MAPS: expected one of 'none', 'laterals', .* got 'above'"),
        (
            "faster_rcnn",
            {MAPS: "laterals", "MODEL.ROI_HEADS.IN_FEATURES": "['p2','p3','p4','p5','p6']"},
            r"MODEL.DSFPN.MAPS: expected laterals only for .* p2, p3, p4, p5, but RoI heads read p6",
        ),
        (
            "faster_rcnn_dyhead",
            {MAPS: "dyhead_blocks", "MODEL.DYHEAD.NUM_BLOCKS": 2, "MODEL.DSFPN.EVERY": 2},
            r"MODEL.DSFPN.EVERY: expected fewer than the 2 blocks of DyHead.* got 2",
        ),
    ],
)
def test_names_what_does_not_fit(engine, name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(engine, CONFIGS / f"{name}_R18_shapes.yaml", options)


def build_checked(engine, file, options):
    if engine == "torchvision":
        return build_model(configured(get_cfg(), file, options))
    from detectron2 import modeling
    from detectron2.config import get_cfg as detectron2_cfg

    from dyhead.config import add_dyhead_config, check_config

    cfg = configured(add_dyhead_config(detectron2_cfg()), file, options)
    check_config(cfg)
    return modeling.build_model(cfg)


@pytest.mark.parametrize(
    ("name", "options", "unread"),
    [
        ("dsfpn", {"MODEL.DSFPN.EVERY": 2}, ["EVERY"]),
        ("faster_rcnn", {"MODEL.DSFPN.EVERY": 2, "MODEL.DSFPN.LOSS_WEIGHT": 2.0}, ["EVERY", "LOSS_WEIGHT"]),
        ("fcos", {MAPS: "laterals"}, ["MAPS"]),
        ("faster_rcnn_dyhead", {**BLOCKS, "MODEL.DSFPN.EVERY": 2, "MODEL.DSFPN.LOSS_WEIGHT": 2.0}, []),
    ],
)
def test_keys_that_change_nothing_are_named(name, options, unread, caplog):
    cfg = get_cfg()
    words = [str(word) for pair in options.items() for word in pair]
    given = load_config(cfg, CONFIGS / f"{name}_R18_shapes.yaml", words)
    with caplog.at_level(logging.WARNING):
        config.ignore_not_honoured(cfg, given)
    told = [word for word in caplog.text.replace(",", " ").split() if word.startswith("MODEL.DSFPN.")]
    assert told == [f"MODEL.DSFPN.{key}" for key in unread]
