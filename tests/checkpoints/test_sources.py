"""The tables of the projects without a published file at hand, pair by pair."""

import re

import pytest
import torch
import torchvision
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from dyhead.checkpoints import CheckpointError, canonical_names, convert
from dyhead.layers import DyHead

BOTTOM_UP = "backbone.backbone.bottom_up."

# The ResNet names of torchvision's block and ours.
BLOCK_OF_RESNET = {
    "conv1.weight": "conv1.weight",
    "bn1.bias": "conv1.norm.bias",
    "conv2.weight": "conv2.weight",
    "bn2.running_mean": "conv2.norm.running_mean",
    "downsample.0.weight": "shortcut.weight",
    "downsample.1.running_var": "shortcut.norm.running_var",
}


def prefixed(prefix, module):
    return {prefix + key: value for key, value in module.state_dict().items()}


def resnet_pairs():
    pairs = {"conv1.weight": "stem.conv1.weight", "bn1.running_var": "stem.conv1.norm.running_var"}
    for layer in (2, 3, 4):  # torchvision's first layer has no shortcut in a ResNet-18
        pairs |= {f"layer{layer}.0.{a}": f"res{layer + 1}.0.{b}" for a, b in BLOCK_OF_RESNET.items()}
    return pairs | {"layer1.1.conv2.weight": "res2.1.conv2.weight", "layer4.1.bn2.weight": "res5.1.conv2.norm.weight"}


def check_pairs(state, conversion, pairs):
    for theirs, ours in pairs.items():
        assert torch.equal(conversion.state[ours].flatten(), state[theirs].flatten()), (theirs, ours)


def test_a_resnet_of_torchvision(check_account):
    state = torchvision.models.resnet18().state_dict()
    conversion = convert(state)
    assert conversion.source == "a ResNet of torchvision"
    check_pairs(state, conversion, {theirs: BOTTOM_UP + ours for theirs, ours in resnet_pairs().items()})
    check_account(state, conversion)
    assert conversion.left_over == {"fc.weight": "ImageNet's classifier", "fc.bias": "ImageNet's classifier"}
    assert set(conversion.dropped) == {key for key in state if key.endswith("num_batches_tracked")}
    assert len(conversion.state) == 100


def test_the_necks_of_sepc(check_account):
    """The keys of its published checkpoints: the finer level's convolution comes last."""
    tensors = ("weight", "bias", "conv_offset.weight", "conv_offset.bias")
    convs = {"Pconvs.0.Pconv.0": "blocks.0.coarser", "Pconvs.3.Pconv.1": "blocks.3.same"}
    convs |= {"Pconvs.0.Pconv.2": "blocks.0.finer", "cconv": "class_conv", "lconv": "box_conv"}
    norms = {"Pconvs.3.bn": "blocks.3.norm", "cbn": "class_norm", "lbn": "box_norm"}
    pairs = {f"{a}.{key}": f"{b}.{key.removeprefix('conv_')}" for a, b in convs.items() for key in tensors}
    pairs |= {f"{a}.{key}": f"{b}.{key}" for a, b in norms.items() for key in ("weight", "running_var")}
    pairs = {f"neck.1.{theirs}": f"backbone.sepc.{ours}" for theirs, ours in pairs.items()}
    pairs |= {"neck.0.lateral_convs.0.conv.weight": "backbone.backbone.fpn_lateral5.weight"}
    pairs |= {"bbox_head.retina_cls.bias": "detector.head.logits.bias"}
    state = {key: torch.rand(9 * 4) for key in (*pairs, "bbox_head.retina_reg.bias", "neck.1.cbn.num_batches_tracked")}
    conversion = convert(state)
    assert conversion.source == "mmdetection"
    check_account(state, conversion)
    del pairs["bbox_head.retina_cls.bias"]  # anchors change their order
    check_pairs(state, conversion, pairs)
    assert "detector.head.logits.bias" in conversion.state
    assert not conversion.left_over


def test_a_resnet_of_detectron2(check_account):
    state = {
        "stem.conv1.weight": torch.rand(2),
        "stem.conv1.norm.bias": torch.rand(2),
        "res2.0.conv1.weight": torch.rand(2),
        "res5.2.conv3.norm.running_mean": torch.rand(2),
        "stem.fc.weight": torch.rand(2),
    }
    conversion = convert(state)
    check_pairs(state, conversion, {key: BOTTOM_UP + key for key in list(state)[:4]})
    check_account(state, conversion)
    assert list(conversion.left_over) == ["stem.fc.weight"]


def test_a_resnet_of_caffe2(check_account):
    pairs = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res_conv1_bn_b": "stem.conv1.norm.bias",
        "res2_0_branch1_w": "res2.0.shortcut.weight",
        "res2_0_branch1_bn_b": "res2.0.shortcut.norm.bias",
        "res2_0_branch2a_w": "res2.0.conv1.weight",
        "res3_1_branch2b_bn_s": "res3.1.conv2.norm.weight",
        "res4_5_branch2c_bn_rm": "res4.5.conv3.norm.running_mean",
        "res5_2_branch2c_bn_riv": "res5.2.conv3.norm.running_var",
    }
    state = {key: torch.rand(2) for key in [*pairs, "conv1_b", "fc1000_w", "fc1000_b", "conv1_w_momentum"]}
    conversion = convert(state)
    check_pairs(state, conversion, {theirs: BOTTOM_UP + ours for theirs, ours in pairs.items()})
    check_account(state, conversion)
    assert sorted(conversion.left_over) == ["conv1_b", "fc1000_b", "fc1000_w"]


def tower(channels, count, norm):
    layers = []
    for _ in range(count):
        layers.append(torch.nn.Conv2d(channels, channels, 3))
        layers += [torch.nn.GroupNorm(2, channels)] if norm else []
        layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("norm", [False, True])
def test_a_dense_detector_of_detectron2(check_account, norm):
    step = 3 if norm else 2
    state = prefixed("head.cls_subnet.", tower(4, 3, norm)) | prefixed("head.bbox_subnet.", tower(4, 2, norm))
    for name in ("cls_score", "bbox_pred", "ctrness"):
        state |= prefixed(f"head.{name}.", torch.nn.Conv2d(4, 4, 3))
    plain = ("bottom_up.res2.0.conv1.weight", "fpn_lateral3.norm.weight", "fpn_output5.bias", "top_block.p6.weight")
    state |= {f"backbone.{key}": torch.rand(3) for key in plain}
    conversion = convert(state)
    assert conversion.source == "Detectron2"
    pairs = {f"backbone.{key}": f"backbone.backbone.{key}" for key in plain}
    pairs |= {f"head.cls_subnet.{step * i}.weight": f"detector.head.class_tower.{i}.conv.weight" for i in range(3)}
    pairs |= {f"head.bbox_subnet.{step * i}.bias": f"detector.head.box_tower.{i}.conv.bias" for i in range(2)}
    if norm:
        pairs |= {
            f"head.cls_subnet.{step * i + 1}.weight": f"detector.head.class_tower.{i}.norm.weight" for i in range(3)
        }
    pairs |= {
        "head.cls_score.weight": "detector.head.logits.weight",
        "head.bbox_pred.bias": "detector.head.deltas.bias",
    }
    pairs |= {"head.ctrness.weight": "detector.head.quality.weight"}
    check_pairs(state, conversion, pairs)
    check_account(state, conversion)
    assert not conversion.left_over


def test_borderdet_of_cvpods(check_account):
    subnets = {"cls": "class_border", "bbox": "box_border"}
    modules = {"cur_point_conv": "point", "ltrb_conv": "sides", "border_conv": "out"}
    pairs = {
        f"head.border_{t}_subnet.{theirs}.0.{kind}": f"detector.head.{o}.{ours}.{kind}"
        for t, o in subnets.items()
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }
    pairs |= {
        "backbone.bottom_up.stem.conv1.weight": "backbone.backbone.bottom_up.stem.conv1.weight",
        "head.border_cls_score.weight": "detector.head.border_logits.weight",
        "head.border_bbox_pred.bias": "detector.head.border_deltas.bias",
        "head.cls_score.bias": "detector.head.logits.bias",
        "head.bbox_pred.weight": "detector.head.deltas.weight",
        "head.centerness.weight": "detector.head.quality.weight",
    }
    state = {key: torch.rand(2) for key in pairs} | {f"head.scales.{i}.scale": torch.rand(1) for i in range(5)}
    conversion = convert(state)
    check_pairs(state, conversion, pairs)
    check_account(state, conversion)
    assert not conversion.left_over
    scales = torch.cat([state[f"head.scales.{i}.scale"] for i in range(5)])
    assert torch.equal(conversion.state["detector.head.delta_scale"], scales)


def test_a_two_stage_detector_of_detectron2_keeps_the_names_behind_its_backbone(check_account):
    names = (
        "proposal_generator.rpn_head.conv.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.mask_head.x",
        "sem_seg_head.predictor.weight",
    )
    state = {key: torch.rand(3) for key in names}
    state |= {"backbone.bottom_up.stem.conv1.weight": torch.rand(1), "panoptic_head.weight": torch.rand(1)}
    state |= {"proposal_generator.anchor_generator.cell_anchors.0": torch.rand(3, 4)}
    conversion = convert(state)
    check_pairs(state, conversion, {key: key for key in names})
    check_account(state, conversion)
    assert list(conversion.left_over) == ["panoptic_head.weight"]
    assert list(conversion.dropped) == ["proposal_generator.anchor_generator.cell_anchors.0"]


def test_earlier_files_of_the_detectron2_engine(check_account):
    state = prefixed("backbone.dyhead.", DyHead(32, 1))
    state |= {"backbone.backbone.fpn_lateral3.weight": torch.rand(2)}
    state |= {f"head.{name}.bias": torch.rand(2) for name in ("logits", "deltas", "quality")}
    state |= {"head.delta_scale": torch.rand(5)}
    conversion = convert(state)
    pairs = {key: key for key in state if key.startswith("backbone.")}
    pairs |= {key: f"detector.{key}" for key in state if key.startswith("head.")}
    check_pairs(state, conversion, pairs)
    check_account(state, conversion)
    assert conversion.state.keys() == set(pairs.values())


def torchvision_engine(levels=3, with_norm=True):
    """The parts of the torchvision engine's models, with its names."""
    fpn = torchvision.ops.FeaturePyramidNetwork([8] * levels, 4, norm_layer=torch.nn.BatchNorm2d if with_norm else None)
    return (
        prefixed("backbone.body.", torchvision.models.resnet18())
        | prefixed("backbone.fpn.", fpn)
        | prefixed("backbone.dyhead.", DyHead(32, 1))
        | prefixed("backbone.fpn.extra_blocks.p6.", torch.nn.Conv2d(4, 4, 3))
    )


def test_earlier_files_of_the_torchvision_engine(check_account):
    state = torchvision_engine() | {
        f"head.predictor.{x}.weight": torch.rand(2) for x in ("logits", "deltas", "quality")
    }
    conversion = convert(state)
    pairs = {f"backbone.body.{theirs}": BOTTOM_UP + ours for theirs, ours in resnet_pairs().items()}
    pairs |= {f"head.predictor.{x}.weight": f"detector.head.{x}.weight" for x in ("logits", "deltas", "quality")}
    pairs |= {
        "backbone.fpn.inner_blocks.0.0.weight": "backbone.backbone.fpn_lateral3.weight",
        "backbone.fpn.inner_blocks.2.1.bias": "backbone.backbone.fpn_lateral5.norm.bias",
        "backbone.fpn.layer_blocks.1.0.weight": "backbone.backbone.fpn_output4.weight",
        "backbone.fpn.layer_blocks.1.1.running_var": "backbone.backbone.fpn_output4.norm.running_var",
        "backbone.fpn.extra_blocks.p6.bias": "backbone.backbone.top_block.p6.bias",
    }
    check_pairs(state, conversion, pairs)
    check_account(state, conversion)
    assert not conversion.left_over
    # A resumed training has its counters again.
    assert f"{BOTTOM_UP}stem.conv1.norm.num_batches_tracked" in conversion.state


def torchvision_rcnn(convolutions=1):
    """Behind a pyramid from stage 2: two convolutions with norms and two linear layers in the box head, 3 classes."""
    head = FastRCNNConvFCHead((4, 7, 7), [4, 4], [5, 6], torch.nn.BatchNorm2d)
    return (
        torchvision_engine(levels=4)
        | prefixed("rpn.head.", RPNHead(4, 3, conv_depth=convolutions))
        | prefixed("roi_heads.box_head.", head)
        | prefixed("roi_heads.box_predictor.", FastRCNNPredictor(6, 4))
    )


def test_earlier_faster_rcnns_of_the_torchvision_engine_get_detectron2s_order(check_account):
    state = torchvision_rcnn()
    conversion = convert(state)
    check_account(state, conversion)
    check_pairs(
        state,
        conversion,
        {
            "backbone.fpn.inner_blocks.0.0.weight": "backbone.backbone.fpn_lateral2.weight",
            "rpn.head.conv.0.0.bias": "proposal_generator.rpn_head.conv.bias",
            "rpn.head.cls_logits.weight": "proposal_generator.rpn_head.objectness_logits.weight",
            "rpn.head.bbox_pred.bias": "proposal_generator.rpn_head.anchor_deltas.bias",
            "roi_heads.box_head.0.0.weight": "roi_heads.box_head.conv1.weight",
            "roi_heads.box_head.1.1.running_mean": "roi_heads.box_head.conv2.norm.running_mean",
            "roi_heads.box_head.3.weight": "roi_heads.box_head.fc1.weight",
            "roi_heads.box_head.5.bias": "roi_heads.box_head.fc2.bias",
        },
    )
    for kind in ("weight", "bias"):
        scores, boxes = (state[f"roi_heads.box_predictor.{name}.{kind}"] for name in ("cls_score", "bbox_pred"))
        found = conversion.state[f"roi_heads.box_predictor.cls_score.{kind}"]
        assert torch.equal(found[:3], scores[1:])  # classes
        assert torch.equal(found[3], scores[0])  # background
        assert torch.equal(conversion.state[f"roi_heads.box_predictor.bbox_pred.{kind}"], boxes[4:])


def test_a_predictor_in_detectron2s_order_stays_as_it_is():
    state = torchvision_rcnn()
    for kind in ("weight", "bias"):
        state[f"roi_heads.box_predictor.bbox_pred.{kind}"] = state[f"roi_heads.box_predictor.bbox_pred.{kind}"][4:]
    conversion = convert(state)
    for key in ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.bbox_pred.bias"):
        assert torch.equal(conversion.state[key], state[key])


def test_several_convolutions_of_a_proposal_network_are_numbered():
    names = canonical_names(torchvision_rcnn(convolutions=2))
    assert names["rpn.head.conv.0.0.weight"] == "proposal_generator.rpn_head.conv.conv0.weight"
    assert names["rpn.head.conv.1.0.bias"] == "proposal_generator.rpn_head.conv.conv1.bias"


@pytest.mark.parametrize("state", [torchvision_engine(), torchvision_engine(levels=4), torchvision_rcnn()])
def test_saving_and_loading_are_inverse(state):
    state |= {"detector.head.logits.weight": torch.rand(2), "detector.loss_normalizer.average": torch.rand(())}
    names = canonical_names(state)
    assert len(set(names.values())) == len(names) == len(state)
    assert set(convert({names[key]: value for key, value in state.items()}).state) == set(names.values())
    assert names["detector.loss_normalizer.average"] == "detector.loss_normalizer.average"


def test_canonical_names_are_their_own():
    keys = [f"{BOTTOM_UP}res2.0.conv1.weight", "backbone.dyhead.blocks.0.offset.bias", "detector.head.logits.bias"]
    keys += [
        "roi_heads.box_head.fc1.weight",
        "proposal_generator.rpn_head.conv.bias",
        "roi_heads.box_head.conv1.norm.bias",
    ]
    assert canonical_names(keys) == {key: key for key in keys}
    assert convert({key: torch.rand(1) for key in keys}).renamed == {key: key for key in keys}


def test_a_dyhead_backbone_in_a_detector_of_somebody_elses_keeps_its_names():
    """Such as Detectron2's RetinaNet with its towers, and files of it."""
    keys = ["backbone.backbone.fpn_lateral3.weight", "backbone.dyhead.blocks.0.offset.bias", "head.cls_subnet.0.weight"]
    keys += ["mask_head.conv.bias"]
    assert convert({key: torch.rand(1) for key in keys}).renamed == {key: key for key in keys}
    assert canonical_names(keys) == {key: key for key in keys}


def test_the_first_stage_of_a_pyramid_can_be_given():
    key = "backbone.fpn.layer_blocks.1.0.weight"
    assert canonical_names([key], first=2)[key] == "backbone.backbone.fpn_output3.weight"
    assert canonical_names([key], first=3)[key] == "backbone.backbone.fpn_output4.weight"


def test_towers_of_mmdetection(check_account):
    state = {"neck.lateral_convs.3.conv.weight": torch.rand(2), "neck.lateral_convs.0.gn.weight": torch.rand(2)}
    state |= {"neck.fpn_convs.3.bn.bias": torch.rand(2), "neck.fpn_convs.4.bn.bias": torch.rand(2)}
    state |= {"neck.fpn_convs.4.conv.bias": torch.rand(2), "backbone.stem.embedding.weight": torch.rand(2)}
    for i in range(2):
        for kind in ("cls", "reg"):
            state[f"bbox_head.{kind}_convs.{i}.conv.weight"] = torch.rand(3, 3, 3, 3)
            state |= {f"bbox_head.{kind}_convs.{i}.gn.{part}": torch.rand(3) for part in ("weight", "bias")}
    state |= {f"bbox_head.conv_{name}.bias": torch.rand(2) for name in ("cls", "reg", "centerness")}
    conversion = convert(state)
    check_pairs(
        state,
        conversion,
        {
            "neck.lateral_convs.3.conv.weight": "backbone.backbone.fpn_lateral5.weight",
            "neck.lateral_convs.0.gn.weight": "backbone.backbone.fpn_lateral2.norm.weight",
            "neck.fpn_convs.3.bn.bias": "backbone.backbone.fpn_output5.norm.bias",
            "neck.fpn_convs.4.conv.bias": "backbone.backbone.top_block.p6.bias",
            "bbox_head.cls_convs.1.conv.weight": "detector.head.class_tower.1.conv.weight",
            "bbox_head.cls_convs.0.gn.bias": "detector.head.class_tower.0.norm.bias",
            "bbox_head.reg_convs.1.gn.weight": "detector.head.box_tower.1.norm.weight",
            "bbox_head.conv_cls.bias": "detector.head.logits.bias",
            "bbox_head.conv_reg.bias": "detector.head.deltas.bias",
            "bbox_head.conv_centerness.bias": "detector.head.quality.bias",
        },
    )
    check_account(state, conversion)
    assert list(conversion.left_over) == ["neck.fpn_convs.4.bn.bias", "backbone.stem.embedding.weight"]
    assert conversion.state["detector.head.box_tower.0.conv.bias"].tolist() == [0, 0, 0]


def test_gfl_of_mmdetection(check_account):
    state = {f"bbox_head.gfl_{name}.{part}": torch.rand(2) for name in ("cls", "reg") for part in ("weight", "bias")}
    state |= {"bbox_head.scales.1.scale": torch.tensor(1.5), "bbox_head.scales.0.scale": torch.tensor(0.5)}
    state["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
    conversion = convert(state)
    check_account(state, conversion)
    assert not conversion.left_over
    assert list(conversion.dropped) == ["bbox_head.integral.project"]
    assert conversion.state["detector.head.delta_scale"].tolist() == [0.5, 1.5]
    for theirs, ours in {"gfl_cls": "logits", "gfl_reg": "deltas"}.items():
        for part in ("weight", "bias"):
            assert torch.equal(conversion.state[f"detector.head.{ours}.{part}"], state[f"bbox_head.{theirs}.{part}"])


def test_mmdetections_two_stage_names(check_account):
    pairs = {
        "rpn_head.rpn_conv.weight": "proposal_generator.rpn_head.conv.weight",
        "rpn_head.rpn_cls.bias": "proposal_generator.rpn_head.objectness_logits.bias",
        "rpn_head.rpn_reg.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
        "roi_head.bbox_head.shared_fcs.0.weight": "roi_heads.box_head.fc1.weight",
        "roi_head.bbox_head.shared_fcs.1.bias": "roi_heads.box_head.fc2.bias",
        "roi_head.bbox_head.fc_branch.1.weight": "roi_heads.box_head.fcs.1.weight",
        "roi_head.bbox_head.res_block.conv1.conv.weight": "roi_heads.box_head.entry.conv1.conv.weight",
        "roi_head.bbox_head.res_block.conv2.bn.bias": "roi_heads.box_head.entry.conv2.norm.bias",
        "roi_head.bbox_head.res_block.conv_identity.conv.weight": "roi_heads.box_head.entry.shortcut.conv.weight",
        "roi_head.bbox_head.res_block.conv_identity.bn.bias": "roi_heads.box_head.entry.shortcut.norm.bias",
        "roi_head.bbox_head.conv_branch.3.conv2.weight": "roi_heads.box_head.blocks.3.conv2.conv.weight",
        "roi_head.bbox_head.conv_branch.0.bn3.running_mean": "roi_heads.box_head.blocks.0.conv3.norm.running_mean",
        "roi_head.bbox_head.fc_cls.weight": "roi_heads.box_predictor.cls_score.weight",
        "roi_head.bbox_head.fc_reg.bias": "roi_heads.box_predictor.bbox_pred.bias",
    }
    state = {key: torch.rand(2) for key in pairs}
    conversion = convert(state)
    check_pairs(state, conversion, pairs)
    check_account(state, conversion)


def test_mmdetections_retinanet_gets_detectron2s_order_of_anchors(check_account):
    """mmdetection: shape outer, size inner. Detectron2: size outer, shape inner."""
    logits = {(s, r, k): 100 * s + 10 * r + k for s in range(3) for r in range(3) for k in range(2)}
    theirs = [logits[s, r, k] for r in range(3) for s in range(3) for k in range(2)]
    ours = [logits[s, r, k] for s in range(3) for r in range(3) for k in range(2)]
    boxes = torch.arange(36.0)
    state = {
        "bbox_head.retina_cls.weight": torch.tensor(theirs, dtype=torch.float)[:, None, None, None],
        "bbox_head.retina_cls.bias": torch.tensor(theirs, dtype=torch.float),
        "bbox_head.retina_reg.weight": boxes[:, None, None, None],
        "bbox_head.retina_reg.bias": boxes,
    }
    conversion = convert(state)
    check_account(state, conversion)
    assert conversion.state["detector.head.logits.bias"].tolist() == ours
    assert conversion.state["detector.head.logits.weight"].shape == (18, 1, 1, 1)
    assert conversion.state["detector.head.logits.weight"].flatten().tolist() == ours
    # Their anchor 1 (first shape, second size) is our anchor 3.
    assert conversion.state["detector.head.deltas.bias"][12:16].tolist() == [4, 5, 6, 7]


def test_an_order_of_anchors_that_is_not_known_is_left_over():
    state = {f"bbox_head.retina_{name}.bias": torch.rand(rows) for name, rows in (("cls", 6), ("reg", 24))}
    conversion = convert(state)
    assert not conversion.state
    assert all("order" in reason for reason in conversion.left_over.values())


def released_block(names, prefix):
    """A state dict of ReleasedDyHeadBlock(16) with other names, and ours -> theirs."""
    own = DyHead(16, 1, block="released").blocks[0].state_dict()
    theirs = {ours: prefix + key for key, ours in names.items()}
    return {theirs[key]: torch.rand_like(value) for key, value in own.items()}, theirs


def parameters(modules):
    return {f"{a}.{part}": f"{b}.{part}" for a, b in modules.items() for part in ("weight", "bias")}


MICROSOFT = parameters(
    {
        "offset": "offset",
        "DyConv.0.conv": "coarser",
        "DyConv.0.bn": "coarser.norm",
        "DyConv.1.conv": "same",
        "DyConv.1.bn": "same.norm",
        "DyConv.2.conv": "finer",
        "DyConv.2.bn": "finer.norm",
        "AttnConv.1": "scale",
        "relu.fc.0": "theta.0",
        "relu.fc.2": "theta.2",
    }
)
MMDETECTION_GLIP = {
    theirs.replace("DyConv", "dyconvs").replace("AttnConv", "attnconv"): ours for theirs, ours in MICROSOFT.items()
}
FENECK = {
    theirs.replace("DyConv", "conv_list").replace(".bn", ".norm").replace("AttnConv", "attention_conv")
    .replace("relu.fc", "dyrelu.fc").replace("offset", "offset_conv"): ours
    for theirs, ours in MICROSOFT.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "names", "prefix", "places"),
    [
        ("microsoft/DynamicHead", MICROSOFT, "dyhead_tower.", [0, 1, 2]),
        ("GLIP", MICROSOFT, "rpn.head.dyhead_tower.", [0, 1]),
        ("GLIP", MICROSOFT, "rpn.head.dyhead_tower.", [2, 5, 8]),
        ("mmdetection's GLIP", MMDETECTION_GLIP, "bbox_head.head.dyhead_tower.", [0, 1]),
        ("mmdetection's GLIP", MMDETECTION_GLIP, "bbox_head.head.dyhead_tower.", [2, 5]),
        ("feneck", FENECK, "dyhead_tower.", [0, 1]),
        ("feneck", FENECK, "neck.head.dyhead_tower.", [0]),
    ],
)
def test_towers_of_other_projects_fill_a_released_head(check_account, source, names, prefix, places):
    state, expected = {}, {}
    for i, place in enumerate(places):
        block, theirs = released_block(names, f"{prefix}{place}.")
        state |= block
        expected |= {theirs[key]: f"backbone.dyhead.blocks.{i}.{key}" for key in theirs}
    if source.endswith("GLIP"):
        outside = prefix.removesuffix("dyhead_tower.")
        state |= {f"{outside}dyhead_tower.0.b_attn.x": torch.rand(1), f"{outside}log_scale": torch.rand(1)}
        state |= {"neck.lateral_convs.0.conv.weight": torch.rand(1), "backbone.norm.weight": torch.rand(1)}
        state |= {"language_backbone.body.x": torch.rand(1)}
    conversion = convert(state)
    assert conversion.source == source
    check_pairs(state, conversion, expected)
    check_account(state, conversion)
    assert conversion.left_over.keys() == state.keys() - expected.keys()
    DyHead(16, len(places), block="released").load_state_dict(
        {key.removeprefix("backbone.dyhead."): value for key, value in conversion.state.items()}
    )


@pytest.mark.parametrize("places", [[1, 2], [0, 2, 5], [3, 6]])
def test_blocks_of_glip_at_other_places_are_an_error(places):
    state = {}
    for place in places:
        state |= released_block(MICROSOFT, f"rpn.head.dyhead_tower.{place}.")[0]
    with pytest.raises(CheckpointError, match=re.escape(f"2, 5, 8, ... of the tower, got {places}")):
        convert(state)


@pytest.mark.parametrize("prefix", ["model.22.dyhead.", "model.15.dyhead_blocks.", "model.model.22.neck.dyhead."])
def test_yolos_with_mmdetections_block(check_account, prefix):
    pairs = {
        "spatial_conv_high.conv.weight": "coarser.weight",
        "spatial_conv_mid.norm.bias": "same.norm.bias",
        "spatial_conv_low.conv.weight": "finer.weight",
        "spatial_conv_offset.bias": "offset.bias",
        "scale_attn_module.1.weight": "scale.weight",
        "task_attn_module.conv1.conv.weight": "theta.0.weight",
        "task_attn_module.conv2.conv.bias": "theta.2.bias",
    }
    shapes = {"weight": (4, 4, 1, 1), "bias": (4,)}
    state = {f"{prefix}{i}.{key}": torch.rand(shapes[key.rpartition(".")[2]]) for key in pairs for i in range(2)}
    state |= {"model.0.conv.weight": torch.rand(1), "model.22.cv2.0.0.conv.weight": torch.rand(1)}
    state |= {"model.0.bn.num_batches_tracked": torch.tensor(3)}
    conversion = convert(state)
    assert conversion.source == "a YOLO with mmdetection's block"
    for i in range(2):
        ours = {f"{prefix}{i}.{key}": f"backbone.dyhead.blocks.{i}.{name}" for key, name in pairs.items()}
        check_pairs(state, conversion, ours)
    check_account(state, conversion)
    assert sorted(conversion.left_over) == ["model.0.conv.weight", "model.22.cv2.0.0.conv.weight"]
    assert conversion.state["backbone.dyhead.blocks.1.theta.0.weight"].shape == (4, 4)
    assert conversion.added.keys() == {
        f"backbone.dyhead.blocks.{i}.{branch}.bias" for i in range(2) for branch in ("coarser", "finer")
    }


def test_keys_of_no_project_name_all_that_were_tried():
    with pytest.raises(CheckpointError, match="got encoder.weight, which are those of none of") as error:
        convert({"encoder.weight": torch.rand(1)})
    for name in ("microsoft/DynamicHead", "mmdetection", "Detectron2", "GLIP", "a ResNet of torchvision", "feneck"):
        assert f"\n  {name}: a key like " in str(error.value)
    with pytest.raises(CheckpointError, match="got no key"):
        convert({})


def test_keys_of_two_projects_are_an_error_that_names_both():
    state = {"backbone.bottom_up.stem.conv1.weight": torch.rand(1), "layer1.0.conv1.weight": torch.rand(1)}
    with pytest.raises(CheckpointError, match="those of several of") as error:
        convert(state)
    named = re.findall(r"\n  (.+): a key like", str(error.value))
    assert named == ["Detectron2", "a ResNet of torchvision"]


def test_two_keys_for_one_place_are_an_error():
    state = {f"neck.{i}.dyhead_blocks.0.spatial_conv_offset.bias": torch.rand(27) for i in (1, 2)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.offset\.bias, got neck\.1\..* and neck\.2\."):
        convert(state)


def test_levels_factors_must_be_complete_numbers():
    state = {f"bbox_head.scales.{i}.scale": torch.ones(1) for i in (0, 2)}
    with pytest.raises(CheckpointError, match=r"delta_scale: expected the elements 0, 1, \.\.\., got \[0, 2\]"):
        convert(state)
    with pytest.raises(CheckpointError, match=r"expected one number, got a tensor of shape \(2,\)"):
        convert({"bbox_head.scales.0.scale": torch.ones(2)})


def test_wants_the_state_dict_and_leaves_it_as_it_is():
    with pytest.raises(TypeError, match="expected tensors by key, got dict under model"):
        convert({"model": {"a": torch.ones(1)}})
    state = torchvision.models.resnet18().state_dict()
    before = dict(state)
    convert(state)
    assert state.keys() == before.keys()
    assert all(state[key] is before[key] for key in before)
