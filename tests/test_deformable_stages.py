"""ResNets with deformable stages, in both engines, on a CPU."""

import pytest
import torch

from dyhead.checkpoints import canonical_names, convert
from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.config import check_values
from tests.test_contract import CONFIGS, OPTIONS, Detectron2, Torchvision

STAGES = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.NUM_GROUPS": 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, False, True],
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": 2,
}
FILE = CONFIGS / "atss_dyhead_R18_shapes.yaml"


def moved(adapter):
    """With offsets that are not 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapter.model.named_parameters():
            if "conv2_offset" in key or "conv2.offset" in key:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.detectron2
@pytest.mark.parametrize("modulated", [False, True])
def test_both_engines_compute_and_learn_the_same(modulated, tmp_path):
    options = STAGES | {"MODEL.RESNETS.DEFORM_MODULATED": modulated}
    torch.manual_seed(0)
    ours, theirs = moved(Torchvision(FILE, options)), Detectron2(FILE, options)
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    target = torch.tensor([[5.0, 6, 60, 50]]), torch.tensor([1])
    names, gradients = canonical_names(ours.model.state_dict()), []
    for adapter in (ours, theirs):
        losses = adapter.losses([image], [target])
        sum(losses.values()).backward()
        gradients.append({names.get(k, k): p.grad for k, p in adapter.model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    offsets = [key for key in gradients[0] if "conv2_offset" in key]
    assert len(offsets) == 2 * (4 + 3)  # weight and bias of the blocks of res3 and res5
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + 1e-7)
    assert all(gradients[0][key].abs().sum() > 0 for key in offsets)


@pytest.mark.detectron2
def test_detectron2s_own_builders_and_detectors_get_the_operator_and_keep_their_keys():
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.layers import DeformConv, ModulatedDeformConv
    from detectron2.modeling import build_backbone

    from dyhead.detectron2 import Trainer

    cfg = add_dyhead_config(detectron2_cfg())
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = True
    theirs = build_backbone(cfg)  # nothing of Detectron2 is changed for others
    assert sum(isinstance(module, ModulatedDeformConv) for module in theirs.modules()) == 3
    model = Trainer.build_model(cfg)
    assert not any(isinstance(module, (DeformConv, ModulatedDeformConv)) for module in model.modules())
    assert list(model.backbone.state_dict()) == list(theirs.state_dict())
    model.eval()([{"image": torch.zeros(3, 64, 64)}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64},
            "MODEL.RESNETS.DEPTH: expected 50, 101 or 152 with DEFORM_ON_PER_STAGE.*got 18",
        ),
        (
            {"MODEL.RESNETS.DEFORM_NUM_GROUPS": 3},
            "MODEL.RESNETS.DEFORM_NUM_GROUPS: expected a divisor of the 64 channels that are convolved, got 3",
        ),
        (
            {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [True]},
            "DEFORM_ON_PER_STAGE: expected a list of 4 True or False, got",
        ),
    ],
)
def test_stages_that_cannot_be_deformable_are_refused(settings, message):
    cfg = get_cfg()
    load_config(cfg, FILE, [str(word) for pair in (OPTIONS | STAGES | settings).items() for word in pair])
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)


def test_mmdetections_names_of_offsets_are_known():
    cfg = get_cfg()
    load_config(cfg, FILE, [str(word) for pair in (OPTIONS | STAGES).items() for word in pair])
    with torch.device("meta"):
        body = build_model(cfg).backbone.body
    state = {f"backbone.{k}".replace("conv2.offset", "conv2.conv_offset"): v for k, v in body.state_dict().items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    conversion = convert(state)
    renamed = {ours for theirs, ours in conversion.renamed.items() if "offset" in theirs}
    assert len(renamed) == 14
    assert "backbone.backbone.bottom_up.res5.2.conv2_offset.bias" in renamed
    assert not conversion.left_over
