"""ViTDet's simple pyramid on plain vision transformers, in both engines."""

from functools import partial

import pytest
import torch
from torch import nn

from dyhead.backbones import SimplePyramid, TimmOptions
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.layers import P6P7
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.config import check_values, ignore_not_honoured
from tests.backbones.exchange import assert_engines_agree
from tests.test_contract import CONFIGS, OPTIONS

SIMPLE = {
    "MODEL.BACKBONE.NAME": "build_timm_simple_pyramid_p6p7_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.TIMM.NAME": "vit_tiny_patch16_224",
    "MODEL.TIMM.OUT_INDICES": [-1],
    "MODEL.FPN.IN_FEATURES": ["res4"],
    "MODEL.FPN.NORM": "LN",
}
needs_timm = pytest.mark.usefixtures("_timm")


@pytest.fixture
def _timm():
    pytest.importorskip("timm", reason="timm is not installed")


def configured(options, name="atss", cfg=None):
    cfg = cfg or get_cfg()
    given = OPTIONS | SIMPLE | options
    load_config(cfg, CONFIGS / f"{name}_dyhead_R18_shapes.yaml", [str(word) for pair in given.items() for word in pair])
    return cfg


def test_a_level_is_the_map_at_another_size():
    pyramid = SimplePyramid(8, 4, top_block=P6P7(4, 4))
    levels = pyramid({"res4": torch.randn(2, 8, 6, 4)})
    assert pyramid.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    sizes = {"p2": (24, 16), "p3": (12, 8), "p4": (6, 4), "p5": (3, 2), "p6": (2, 1), "p7": (1, 1)}
    assert {name: tuple(x.shape) for name, x in levels.items()} == {name: (2, 4, *of) for name, of in sizes.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((6, 4), "in_channels: expected a multiple of 4, got 6"), ((8, 4, 5), "finest: expected 2, 3 or 4, got 5")],
)
def test_what_cannot_be_a_pyramid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimplePyramid(*arguments)


@pytest.mark.detectron2
@pytest.mark.parametrize("finest", [2, 3])
def test_it_is_detectron2s_with_the_same_weights(finest):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone, SimpleFeaturePyramid
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    class Given(Backbone):
        def forward(self, x):
            return {"res4": x}

        def output_shape(self):
            return {"res4": ShapeSpec(channels=16, stride=16)}

    top = LastLevelMaxPool() if finest == 2 else P6P7(8, 8)
    theirs = SimpleFeaturePyramid(Given(), "res4", 8, (4.0, 2.0, 1.0, 0.5)[finest - 2 :], top_block=top)
    ours = SimplePyramid(16, 8, finest, None if finest == 2 else P6P7(8, 8))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 16, 6, 10)
    expected, got = theirs(x), ours({"res4": x})
    assert list(got) == list(expected)
    for name, level in got.items():
        torch.testing.assert_close(level, expected[name])


@needs_timm
@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, tmp_path):
    builder = f"build_timm_simple_pyramid_{'p6p7_' if name == 'atss' else ''}backbone"
    options = SIMPLE | {"MODEL.BACKBONE.NAME": builder}
    file = CONFIGS / f"{name}_dyhead_R18_shapes.yaml"
    assert_engines_agree(file, options, tmp_path / "w.pth")


@needs_timm
def test_a_classifiers_weights_are_read(tmp_path):
    import timm

    torch.manual_seed(0)
    classifier = timm.create_model("vit_tiny_patch16_224")
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    model = build_model(configured({}))
    load_weights(model, str(tmp_path / "w.pth"), strict=False)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        (tokens,) = classifier.eval().forward_intermediates(x, indices=[11], norm=False, intermediates_only=True)
        torch.testing.assert_close(model.backbone.body.eval()(x)["res4"], tokens)


@needs_timm
@pytest.mark.detectron2
def test_timms_samvit_is_vitdets_network_with_windows():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling.backbone.vit import ViT

    theirs = ViT(
        img_size=1024, depth=12, embed_dim=768, num_heads=12, window_size=14, out_feature="last", use_rel_pos=True,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10], norm_layer=partial(nn.LayerNorm, eps=1e-6),
        pretrain_img_size=1024, pretrain_use_cls_token=False,
    ).eval()  # fmt: skip
    ours = TimmOptions("samvit_base_patch16", out_indices=(-1,)).build().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.02)
        theirs.pos_embed.copy_(torch.randn(768))  # the same everywhere: the two resize it otherwise
    state = {f"network.model.{key}": value for key, value in theirs.state_dict().items()}
    state["network.model.pos_embed"] = theirs.pos_embed.detach().view(1, 64, 64, 768)
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 256, 320)  # 16 x 20 cells, which windows of 14 do not divide
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["res4"], theirs(x)["last"], rtol=1e-4, atol=1e-4)


@needs_timm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL.TIMM.OUT_INDICES": [-2, -1]}, "MODEL.TIMM.OUT_INDICES: expected maps of .* got strides 16, 16"),
        (
            {"MODEL.FPN.IN_FEATURES": ["res4", "res5"]},
            r"IN_FEATURES: expected \['res4'\], the one map of stride 16",
        ),
        ({"MODEL.FPN.NORM": "GN"}, "MODEL.FPN.NORM: expected 'LN' with build_timm_simple_pyramid_p6p7_.*got 'GN'"),
        ({"MODEL.FPN.P6P7_IN_FEATURE": "res5"}, "MODEL.FPN.P6P7_IN_FEATURE: expected 'p5' with build_timm_simple"),
        ({"MODEL.TIMM.NAME": "test_resnet"}, r"FPN.IN_FEATURES: expected some of the maps of .*\['res5'\], got"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(configured(options))


@needs_timm
def test_supervision_of_lateral_convolutions_is_refused_for_want_of_them():
    builder = "build_timm_simple_pyramid_backbone"
    with pytest.raises(ConfigError, match="MODEL.DSFPN.MAPS"):
        build_model(configured({"MODEL.BACKBONE.NAME": builder, "MODEL.DSFPN.MAPS": "laterals"}, "dsfpn"))


@needs_timm
@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_how_levels_are_added_up_is_not_read(engine, caplog):
    if engine == "torchvision":
        cfg = configured({"MODEL.FPN.FUSE_TYPE": "avg"})
        check_values(cfg)
        ignore_not_honoured(cfg, {"MODEL.FPN.FUSE_TYPE"})
    else:
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
        from detectron2 import config as theirs

        from dyhead.detectron2 import config

        cfg = configured({"MODEL.FPN.FUSE_TYPE": "avg"}, cfg=add_dyhead_config(theirs.get_cfg()))
        config.check_values(cfg)
        config.ignore_not_honoured(cfg, {"MODEL.FPN.FUSE_TYPE"})
    assert "does not read: MODEL.FPN.FUSE_TYPE 'avg'" in caplog.text
