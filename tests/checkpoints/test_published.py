"""The published checkpoints, by name and shape, against the names that follow from the architecture."""

import pytest
import torch

from dyhead.checkpoints import convert

CHANNELS = 256


def conv(name, out, inputs, size, bias=True):
    return {f"{name}.weight": (out, inputs, size, size)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name, channels):
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias")}


def frozen(name, channels):
    return norm(name, channels) | {f"{name}.running_{part}": (channels,) for part in ("mean", "var")}


def resnet50():
    prefix = "backbone.backbone.bottom_up."
    keys = conv(f"{prefix}stem.conv1", 64, 3, 7, bias=False) | frozen(f"{prefix}stem.conv1.norm", 64)
    inputs = 64
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        middle = 64 * 2 ** (stage - 2)
        for i in range(blocks):
            name = f"{prefix}res{stage}.{i}"
            shapes = [("conv1", middle, inputs, 1), ("conv2", middle, middle, 3), ("conv3", 4 * middle, middle, 1)]
            if i == 0:
                shapes.append(("shortcut", 4 * middle, inputs, 1))
            for part, out, into, size in shapes:
                keys |= conv(f"{name}.{part}", out, into, size, bias=False) | frozen(f"{name}.{part}.norm", out)
            inputs = 4 * middle
    return keys


def pyramid(first, top):
    keys = {}
    for stage in range(first, 6):
        keys |= conv(f"backbone.backbone.fpn_lateral{stage}", CHANNELS, 256 * 2 ** (stage - 2), 1)
        keys |= conv(f"backbone.backbone.fpn_output{stage}", CHANNELS, CHANNELS, 3)
    for level in top:
        keys |= conv(f"backbone.backbone.top_block.{level}", CHANNELS, CHANNELS, 3)
    return keys


def dyhead():
    keys = {}
    for i in range(6):
        name = f"backbone.dyhead.blocks.{i}"
        keys |= conv(f"{name}.offset", 27, CHANNELS, 3) | conv(f"{name}.scale", 1, CHANNELS, 1)
        for branch in ("finer", "same", "coarser"):
            keys |= conv(f"{name}.{branch}", CHANNELS, CHANNELS, 3) | norm(f"{name}.{branch}.norm", CHANNELS)
        keys |= {f"{name}.theta.0.weight": (64, CHANNELS), f"{name}.theta.0.bias": (64,)}
        keys |= {f"{name}.theta.2.weight": (1024, 64), f"{name}.theta.2.bias": (1024,)}
    return keys


def atss(size):
    head = "detector.head."
    keys = conv(f"{head}logits", 80, CHANNELS, size) | conv(f"{head}deltas", 4, CHANNELS, size)
    return keys | conv(f"{head}quality", 1, CHANNELS, size) | {f"{head}delta_scale": (5,)}


def retinanet():
    head = "detector.head."
    keys = conv(f"{head}logits", 9 * 80, CHANNELS, 3) | conv(f"{head}deltas", 9 * 4, CHANNELS, 3)
    for i in range(4):
        for tower in ("class_tower", "box_tower"):
            keys |= conv(f"{head}{tower}.{i}.conv", CHANNELS, CHANNELS, 3)
    return keys


def faster_rcnn():
    rpn, roi = "proposal_generator.rpn_head.", "roi_heads."
    keys = conv(f"{rpn}conv", 256, 256, 3) | conv(f"{rpn}objectness_logits", 3, 256, 1)
    keys |= conv(f"{rpn}anchor_deltas", 12, 256, 1)
    for name, out, inputs in (
        ("box_head.fc1", 1024, 256 * 49),
        ("box_head.fc2", 1024, 1024),
        ("box_predictor.cls_score", 81, 1024),
        ("box_predictor.bbox_pred", 320, 1024),
    ):
        keys |= {f"{roi}{name}.weight": (out, inputs), f"{roi}{name}.bias": (out,)}
    return keys


TOP = ("p6", "p7")
ARCHITECTURES = {
    "dyhead_r50_atss_fpn_1x": ("microsoft/DynamicHead", pyramid(3, TOP) | atss(1)),
    "dyhead_r50_retina_fpn_1x": ("microsoft/DynamicHead", pyramid(3, TOP) | retinanet()),
    "dyhead_r50_rcnn_fpn_1x": ("microsoft/DynamicHead", pyramid(2, ()) | faster_rcnn()),
    "atss_r50_fpn_dyhead_1x_coco": ("mmdetection", pyramid(3, TOP) | atss(3)),
    "atss_r50-caffe_fpn_dyhead_1x_coco": ("mmdetection", pyramid(3, TOP) | atss(1)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_files_have_all_that_the_architecture_needs(published, state_of, check_account, name):
    state = state_of(published[name])
    conversion = convert(state)
    source, expected = ARCHITECTURES[name]
    assert conversion.source == source
    assert {key: tuple(value.shape) for key, value in conversion.state.items()} == resnet50() | dyhead() | expected
    check_account(state, conversion)
    assert not conversion.left_over
    assert all(key.endswith("num_batches_tracked") for key in conversion.dropped)


BACKBONE = "backbone.backbone."
BLOCK = "backbone.dyhead.blocks."
MICROSOFT = {
    "backbone.backbone.bottom_up.res4.5.conv2.norm.running_var": f"{BACKBONE}bottom_up.res4.5.conv2.norm.running_var",
    "backbone.backbone.top_block.p7.bias": f"{BACKBONE}top_block.p7.bias",
    "backbone.dyhead_tower.0.DyConv.0.conv.weight": f"{BLOCK}0.coarser.weight",
    "backbone.dyhead_tower.1.DyConv.1.conv.bias": f"{BLOCK}1.same.bias",
    "backbone.dyhead_tower.2.DyConv.2.bn.weight": f"{BLOCK}2.finer.norm.weight",
    "backbone.dyhead_tower.3.AttnConv.1.bias": f"{BLOCK}3.scale.bias",
    "backbone.dyhead_tower.4.relu.fc.0.weight": f"{BLOCK}4.theta.0.weight",
    "backbone.dyhead_tower.5.relu.fc.2.bias": f"{BLOCK}5.theta.2.bias",
    "backbone.dyhead_tower.5.offset.bias": f"{BLOCK}5.offset.bias",
}
PAIRS = {
    "dyhead_r50_atss_fpn_1x": MICROSOFT
    | {
        "head.cls_logits.weight": "detector.head.logits.weight",
        "head.bbox_pred.bias": "detector.head.deltas.bias",
        "head.centerness.weight": "detector.head.quality.weight",
    },
    "dyhead_r50_retina_fpn_1x": MICROSOFT
    | {
        "head.cls_subnet.0.weight": "detector.head.class_tower.0.conv.weight",
        "head.cls_subnet.6.bias": "detector.head.class_tower.3.conv.bias",
        "head.bbox_subnet.4.weight": "detector.head.box_tower.2.conv.weight",
        "head.cls_score.bias": "detector.head.logits.bias",
    },
    "dyhead_r50_rcnn_fpn_1x": {
        "backbone.backbone.fpn_lateral2.weight": f"{BACKBONE}fpn_lateral2.weight",
        "proposal_generator.rpn_head.anchor_deltas.bias": "proposal_generator.rpn_head.anchor_deltas.bias",
        "roi_heads.box_predictor.cls_score.weight": "roi_heads.box_predictor.cls_score.weight",
    },
    "atss_r50_fpn_dyhead_1x_coco": {
        "backbone.conv1.weight": f"{BACKBONE}bottom_up.stem.conv1.weight",
        "backbone.bn1.running_mean": f"{BACKBONE}bottom_up.stem.conv1.norm.running_mean",
        "backbone.layer1.0.downsample.0.weight": f"{BACKBONE}bottom_up.res2.0.shortcut.weight",
        "backbone.layer4.0.downsample.1.bias": f"{BACKBONE}bottom_up.res5.0.shortcut.norm.bias",
        "backbone.layer3.5.bn2.running_var": f"{BACKBONE}bottom_up.res4.5.conv2.norm.running_var",
        "backbone.layer2.1.conv3.weight": f"{BACKBONE}bottom_up.res3.1.conv3.weight",
        "neck.0.lateral_convs.0.conv.weight": f"{BACKBONE}fpn_lateral3.weight",
        "neck.0.fpn_convs.2.conv.bias": f"{BACKBONE}fpn_output5.bias",
        "neck.0.fpn_convs.3.conv.weight": f"{BACKBONE}top_block.p6.weight",
        "neck.0.fpn_convs.4.conv.bias": f"{BACKBONE}top_block.p7.bias",
        "neck.1.dyhead_blocks.0.spatial_conv_high.conv.weight": f"{BLOCK}0.coarser.weight",
        "neck.1.dyhead_blocks.1.spatial_conv_mid.norm.bias": f"{BLOCK}1.same.norm.bias",
        "neck.1.dyhead_blocks.2.spatial_conv_low.conv.weight": f"{BLOCK}2.finer.weight",
        "neck.1.dyhead_blocks.3.spatial_conv_offset.weight": f"{BLOCK}3.offset.weight",
        "neck.1.dyhead_blocks.4.scale_attn_module.1.weight": f"{BLOCK}4.scale.weight",
        "neck.1.dyhead_blocks.5.task_attn_module.conv1.conv.weight": f"{BLOCK}5.theta.0.weight",
        "neck.1.dyhead_blocks.5.task_attn_module.conv2.conv.bias": f"{BLOCK}5.theta.2.bias",
        "bbox_head.atss_cls.bias": "detector.head.logits.bias",
        "bbox_head.atss_reg.weight": "detector.head.deltas.weight",
        "bbox_head.atss_centerness.bias": "detector.head.quality.bias",
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_tensor_finds_its_place(published, state_of, name):
    state = state_of(published[name])
    conversion = convert(state)
    for theirs, ours in PAIRS[name].items():
        value = conversion.state[ours]
        assert torch.equal(value.flatten(), state[theirs].flatten()), ours


@pytest.mark.parametrize("name", ["dyhead_r50_atss_fpn_1x", "atss_r50_fpn_dyhead_1x_coco"])
def test_the_levels_factors_become_one_vector(published, state_of, name):
    state = state_of(published[name])
    prefix = "head" if name.startswith("dyhead") else "bbox_head"
    factors = [state[f"{prefix}.scales.{i}.scale"].item() for i in range(5)]
    assert convert(state).state["detector.head.delta_scale"].tolist() == factors


def test_mmdetections_convolutions_get_biases_of_zero(published, state_of):
    conversion = convert(state_of(published["atss_r50_fpn_dyhead_1x_coco"]))
    branches = [f"{BLOCK}{i}.{branch}.bias" for i in range(6) for branch in ("coarser", "same", "finer")]
    assert sorted(conversion.added) == sorted(branches)
    assert not any(conversion.state[key].any() for key in branches)


def test_old_files_of_microsoft_lose_anchors_and_pixel_statistics(published, state_of, check_account):
    surplus = {
        "anchor_generator.cell_anchors.0": (1, 4),
        "proposal_generator.anchor_generator.cell_anchors.2": (3, 4),
        "pixel_mean": (3, 1, 1),
        "pixel_std": (3, 1, 1),
    }
    state = state_of(published["dyhead_r50_atss_fpn_1x"] | surplus)
    conversion = convert(state)
    assert conversion.dropped.keys() == surplus.keys()
    assert conversion.state.keys() == convert(state_of(published["dyhead_r50_atss_fpn_1x"])).state.keys()
    check_account(state, conversion)


def test_glip_a_gives_its_tower_alone(published, state_of, check_account):
    shapes = {key.removeprefix("module."): shape for key, shape in published["glip_a_tiny_o365"].items()}
    state = state_of(shapes)
    conversion = convert(state)
    assert conversion.source == "GLIP"
    assert {key: tuple(value.shape) for key, value in conversion.state.items()} == dyhead()
    theirs = state["rpn.head.dyhead_tower.4.DyConv.2.conv.bias"]
    assert torch.equal(conversion.state[f"{BLOCK}4.finer.bias"], theirs)
    check_account(state, conversion)
    assert "rpn.head.dot_product_projection_text.weight" in conversion.left_over
    assert sorted(conversion.dropped) == [f"rpn.anchor_generator.cell_anchors.{i}" for i in range(5)]
