# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.export import scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling import build_backbone as detectron2s_build_backbone
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.structures import Boxes
from detectron2.utils.testing import assert_instances_allclose, reload_script_model

from dyhead.config import ConfigError
from dyhead.detectron2 import DyHeadBackbone, NeckBackbone, Trainer, build_backbone
from dyhead.layers import DyHead


class Toy(Backbone):
    """A convolution per level; the levels, {name: (channels, stride)}, come out in the order given."""

    size_divisibility = 16
    padding_constraints = {"square_size": 64}  # noqa: RUF012

    def __init__(self, **levels):
        super().__init__()
        self._levels = levels
        self.convs = nn.ModuleDict({name: nn.Conv2d(3, c, s, s) for name, (c, s) in levels.items()})

    def forward(self, x):
        return {name: conv(x) for name, conv in self.convs.items()}

    def output_shape(self):
        return {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in self._levels.items()}


@pytest.mark.parametrize(
    ("detector", "strides"),
    [
        ("faster_rcnn", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("fcos", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
def test_builders_put_out_the_levels_they_declare(tiny_cfg, detector, strides):
    backbone = build_backbone(tiny_cfg(detector))
    assert isinstance(backbone, NeckBackbone)
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == strides
    levels = backbone(torch.randn(2, 3, 96, 160))
    assert list(levels) == list(strides)
    for name, stride in strides.items():
        assert levels[name].shape == (2, 32, -(-96 // stride), -(-160 // stride))


@pytest.mark.parametrize(("source", "channels"), [("p5", 32), ("res5", 512)])
def test_p6_is_computed_from_the_configured_level(tiny_cfg, source, channels):
    backbone = build_backbone(tiny_cfg("fcos", {"MODEL.FPN.P6P7_IN_FEATURE": source}))
    assert backbone.backbone.top_block.p6.in_channels == channels
    assert len(backbone(torch.randn(1, 3, 64, 64))) == 5


def test_an_unknown_source_of_p6_is_named(tiny_cfg):
    with pytest.raises(ConfigError, match="P6P7_IN_FEATURE: expected one of 'p5', 'res5', got 'p4'"):
        build_backbone(tiny_cfg("fcos", {"MODEL.FPN.P6P7_IN_FEATURE": "p4"}))


@pytest.mark.parametrize(
    ("detector", "name"),
    [
        ("faster_rcnn", "build_resnet_fpn_dyhead_backbone"),
        ("fcos", "build_retinanet_resnet_fpn_dyhead_backbone"),
    ],
)
@pytest.mark.parametrize("necks", [[], ["DyHead"]])
def test_builders_with_dyhead_in_their_name_serve_meta_architectures_that_know_no_necks(
    tiny_cfg, detector, name, necks
):
    cfg = tiny_cfg(detector, {"MODEL.BACKBONE.NAME": name, "MODEL.NECKS": necks})
    for backbone in (detectron2s_build_backbone(cfg), build_backbone(cfg)):
        assert len(backbone.dyhead.blocks) == 1
        assert list(backbone.state_dict()) == list(build_backbone(tiny_cfg(detector)).state_dict())


@pytest.mark.parametrize(
    ("settings", "divisor"),
    [
        ({}, 32),
        ({"MODEL.DYHEAD.BLOCK": "released"}, 128),
        ({"MODEL.DYHEAD.BLOCK": "released", "MODEL.BACKBONE.SIZE_DIVISIBILITY": 32}, 32),
        ({"MODEL.NECKS": []}, 32),
    ],
)
def test_images_are_padded_to_what_the_backbone_and_its_necks_ask_for(tiny_cfg, settings, divisor):
    assert build_backbone(tiny_cfg("fcos", settings)).size_divisibility == divisor


@pytest.mark.parametrize("relu", [True, False])
def test_p7_comes_from_p6_with_or_without_relu(tiny_cfg, relu):
    top = build_backbone(tiny_cfg("fcos", {"MODEL.FPN.P7_RELU": relu})).backbone.top_block
    x = torch.randn(1, 32, 9, 7)
    p6, p7 = top(x)
    torch.testing.assert_close(p6, functional.conv2d(x, top.p6.weight, top.p6.bias, stride=2, padding=1))
    source = p6.relu() if relu else p6
    torch.testing.assert_close(p7, functional.conv2d(source, top.p7.weight, top.p7.bias, stride=2, padding=1))


def test_config_reaches_the_head(tiny_cfg):
    settings = {"MODEL.DYHEAD.NUM_BLOCKS": 3, "MODEL.DYHEAD.TASK_AWARE": False, "MODEL.DYHEAD.NORM_GROUPS": 4}
    backbone = build_backbone(tiny_cfg("fcos", settings))
    assert len(backbone.dyhead.blocks) == 3
    assert all(block.task_attention is None for block in backbone.dyhead.blocks)
    groups = [module.num_groups for module in backbone.dyhead.modules() if isinstance(module, nn.GroupNorm)]
    assert set(groups) == {4}


def test_levels_are_sorted_by_stride_and_pass_through_the_head():
    toy = Toy(coarse=(32, 16), fine=(32, 4), middle=(32, 8))
    backbone = DyHeadBackbone(toy, num_blocks=2)
    head = DyHead(32, 2)
    head.load_state_dict(backbone.dyhead.state_dict())
    x = torch.randn(1, 3, 64, 64)
    raw, out = toy(x), backbone(x)
    assert list(out) == list(backbone.output_shape()) == ["fine", "middle", "coarse"]
    expected = head([raw["fine"], raw["middle"], raw["coarse"]])
    for got, want in zip(out.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not torch.equal(out["fine"], raw["fine"])


def test_no_blocks_leave_the_pyramid_as_it_is():
    toy = Toy(a=(32, 4), b=(32, 8))
    x = torch.randn(1, 3, 32, 32)
    raw = toy(x)
    assert all(torch.equal(level, raw[name]) for name, level in DyHeadBackbone(toy, num_blocks=0)(x).items())


def test_what_the_wrapped_backbone_asks_of_pictures_is_passed_on():
    backbone = DyHeadBackbone(Toy(a=(32, 4), b=(32, 8)), num_blocks=1)
    assert backbone.size_divisibility == 16
    assert backbone.padding_constraints == {"square_size": 64}


def test_regnet_fpn_can_be_wrapped():
    regnet = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=4,
        w_a=8.0,
        w_0=8,
        w_m=2.0,
        group_width=8,
        norm="BN",
        out_features=["s2", "s3"],
    )
    backbone = DyHeadBackbone(FPN(regnet, ["s2", "s3"], out_channels=32), num_blocks=1)
    assert {name: tuple(level.shape) for name, level in backbone(torch.randn(1, 3, 64, 64)).items()} == {
        "p3": (1, 32, 8, 8),
        "p4": (1, 32, 4, 4),
    }


def test_vitdets_pyramid_can_be_wrapped():
    pyramid = SimpleFeaturePyramid(Toy(last=(32, 16)), "last", 32, scale_factors=(4.0, 2.0, 1.0, 0.5), square_pad=64)
    backbone = DyHeadBackbone(pyramid, num_blocks=1)
    assert backbone.padding_constraints["square_size"] == 64
    assert [level.shape[-1] for level in backbone(torch.randn(1, 3, 64, 64)).values()] == [16, 8, 4, 2]


def test_lazy_configs_can_go_on_referring_to_the_backbones_channels():
    configs = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    model = LazyConfig.load(str(configs / "common" / "models" / "panoptic_fpn.py")).model
    model.backbone = LazyCall(DyHeadBackbone)(
        backbone=model.backbone, out_channels="${.backbone.out_channels}", num_blocks=1
    )
    model.backbone.backbone.out_channels = 32
    assert model.sem_seg_head.input_shape.p2.channels == 32
    model.roi_heads.box_head.fc_dims = [16]
    built = instantiate(model)
    assert isinstance(built.backbone, DyHeadBackbone)
    assert built.backbone.out_channels == 32
    assert built.sem_seg_head.p2[0].in_channels == 32
    with pytest.raises(ValueError, match="out_channels: expected 32, those of the backbone's levels, got 64"):
        DyHeadBackbone(Toy(a=(32, 4), b=(32, 8)), out_channels=64)


def test_a_box_head_with_several_views_of_a_region_says_which_architecture_has_them(tiny_cfg):
    settings = {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN", "MODEL.ROI_BOX_HEAD.NAME": "DoubleHead"}
    expected = r"^MODEL\.META_ARCHITECTURE: expected DyHeadRCNN with MODEL\.ROI_BOX_HEAD\.NAME DoubleHead, got 'Gen"
    with pytest.raises(ConfigError, match=expected):
        Trainer.build_model(tiny_cfg("faster_rcnn", settings | {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("block", "head"),
    [("paper", "FastRCNNConvFCHead"), ("released", "FastRCNNConvFCHead"), ("paper", "DyHeadBoxHead")],
)
def test_torchscript_takes_detectron2s_detectors_on_it(tiny_cfg, inputs, block, head):
    """As Detectron2's tests have it: a whole Mask R-CNN is scripted, saved, loaded and asked for the same objects."""
    settings = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_dyhead_backbone",
        "MODEL.DYHEAD.BLOCK": block,
        "MODEL.ROI_BOX_HEAD.NAME": head,
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    }
    torch.manual_seed(0)
    model = Trainer.build_model(tiny_cfg("faster_rcnn", settings)).eval()
    fields = {"proposal_boxes": Boxes, "pred_boxes": Boxes}
    fields |= dict.fromkeys(("objectness_logits", "scores", "pred_classes", "pred_masks"), torch.Tensor)
    images = [{"image": x["image"].float()} for x in inputs]
    with torch.no_grad():
        expected = model.inference(images, do_postprocess=False)
        scripted = reload_script_model(scripting_with_instances(model, fields))
        found = scripted.inference(images, do_postprocess=False)
    assert all(map(len, expected))
    for got, want in zip(found, expected, strict=True):
        assert_instances_allclose(want, got, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_takes_a_one_stage_backbone(tiny_cfg):
    backbone = build_backbone(tiny_cfg("fcos")).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = backbone(x), torch.jit.script(copy.deepcopy(backbone))(x)
    assert list(found) == list(expected)
    for name, level in expected.items():
        assert torch.equal(found[name], level)


def test_strides_that_do_not_double_are_named():
    with pytest.raises(ValueError, match="level c: expected stride 16, twice that of level b, got 32"):
        DyHeadBackbone(Toy(a=(32, 4), b=(32, 8), c=(32, 32)))


def test_levels_of_different_channels_are_named():
    with pytest.raises(ValueError, match="level b: expected 32 channels as in level a, got 16"):
        DyHeadBackbone(Toy(a=(32, 4), b=(16, 8)))


class Project(nn.Module):
    """A detector of somebody's own project on the Dynamic Head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(3, 3)


@pytest.fixture
def plain(tiny_cfg):
    """A detector and the checkpoint of one without a Dynamic Head: the keys of its ResNet-FPN with other values."""
    model = Project(build_backbone(tiny_cfg("fcos", {"MODEL.RESNETS.NORM": "FrozenBN"})))
    state = {f"backbone.{key}": torch.rand_like(value) for key, value in model.backbone.backbone.state_dict().items()}
    for name in ("bottom_up.stem.conv1.norm.running_var", "fpn_lateral3.weight", "top_block.p7.bias"):
        assert f"backbone.{name}" in state
    return model, state | {f"head.{key}": torch.rand_like(value) for key, value in model.head.state_dict().items()}


def assert_loaded(model, state):
    loaded = model.state_dict()
    for key, value in state.items():
        key = key.replace("backbone.", "backbone.backbone.", 1) if key.startswith("backbone.") else key
        assert torch.equal(loaded[key], value), key


def test_detectron2s_own_checkpointer_loads_a_plain_backbone_into_the_wrapped_one(plain, tmp_path):
    model, state = plain
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "plain.pth")
    before = {key: value.clone() for key, value in model.backbone.dyhead.state_dict().items()}
    DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
    assert_loaded(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.dyhead.state_dict().items())


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy])
def test_torch_loads_a_plain_backbone_into_the_wrapped_one(plain, again):
    model, state = plain
    model = again(model)
    given = dict(state)
    found = model.load_state_dict(state, strict=False)
    assert state.keys() == given.keys()
    assert_loaded(model, state)
    assert not found.unexpected_keys
    assert {key.removeprefix("backbone.").split(".")[0] for key in found.missing_keys} == {"dyhead"}
    alone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    found = model.backbone.load_state_dict(alone, strict=False)
    assert not found.unexpected_keys


def test_keys_that_are_no_plain_backbones_stay_as_they_are(plain):
    model, _ = plain
    state = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    surplus = {"backbone.bottom_up.stem.conv9.weight": torch.rand(1), "backbone.dyhead.surplus": torch.rand(1)}
    found = model.load_state_dict(surplus, strict=False)
    assert sorted(found.unexpected_keys) == sorted(surplus)
