"""Swin in checkpoints of its authors' detectors and of mmdetection, for timm's network."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyhead.backbones import TimmNetwork, TimmOptions
from dyhead.checkpoints import convert
from dyhead.config import load_config
from dyhead.torchvision import build_model, get_cfg
from tests.test_contract import CONFIGS

timm = pytest.importorskip("timm", reason="timm is not installed")

RELEASED = CONFIGS.parent / "released"
OURS = "backbone.backbone.bottom_up.timm."
STAGES = ["res3", "res4", "res5"]
# What says whose a checkpoint is.
MARKS = {
    "microsoft/DynamicHead": "backbone.dyhead_tower.0.DyConv.0.bn.bias",
    "mmdetection": "neck.0.fpn_convs.0.conv.bias",
}


def authors_names(network):
    """A network's state with the names of Swin's authors."""
    state = {}
    for key, value in network.state_dict().items():
        key = re.sub(r"^norms\.res(\d)\.", lambda m: f"norm{int(m[1]) - 2}.", key.removeprefix("network."))
        key = re.sub(r"^layers_(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        state[key.replace("layers_", "layers.")] = value
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return state


def mmdetections_names(network):
    """A network's state with the names of mmdetection, and four pixels' channels in its order."""
    state = {}
    for key, value in authors_names(network).items():
        key = key.replace("patch_embed.proj", "patch_embed.projection").replace(".attn.", ".attn.w_msa.")
        key = key.replace("layers.", "stages.").replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        if "downsample" in key:
            channels, other = value.shape[-1] // 4, value.clone()
            for channel in range(channels):
                for row in range(2):
                    for column in range(2):
                        place = 4 * channel + 2 * row + column
                        other[..., place] = value[..., (2 * column + row) * channels + channel]
            value = other
        state[key] = value
    return state


def checkpoint(source, state):
    prefix = "backbone.backbone.bottom_up." if source == "microsoft/DynamicHead" else "backbone."
    return {f"{prefix}{key}": value for key, value in state.items()} | {MARKS[source]: torch.zeros(16)}


@pytest.mark.parametrize(
    ("source", "names"), [("microsoft/DynamicHead", authors_names), ("mmdetection", mmdetections_names)]
)
def test_every_weight_of_the_network_is_found_in_its_order(source, names):
    torch.manual_seed(0)
    network = TimmOptions("swin_tiny_patch4_window7_224", out_norm="LN").build(STAGES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_()
    conversion = convert(checkpoint(source, names(network)))
    assert conversion.source == source
    assert conversion.left_over == {}
    assert [key.rpartition(".")[2] for key in conversion.dropped] == ["relative_position_index"]
    found = {key.removeprefix(OURS): value for key, value in conversion.state.items() if key.startswith(OURS)}
    own = network.state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(value, own[key]) for key, value in found.items())


def test_mmdetections_merging_of_pixels_is_computed():
    from timm.models.swin_transformer import PatchMerging

    torch.manual_seed(0)
    norm, reduction = nn.LayerNorm(12), nn.Linear(12, 6, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    theirs = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": reduction.weight}
    state = {f"stages.0.downsample.{key}": value.detach() for key, value in theirs.items()}
    converted = convert(checkpoint("mmdetection", state)).state
    ours, prefix = PatchMerging(3), f"{OURS}network.layers_1.downsample."
    ours.load_state_dict({key.removeprefix(prefix): x for key, x in converted.items() if key.startswith(prefix)})
    x = torch.randn(1, 3, 4, 6)
    pixels = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # as mmdetection reads them
    expected = reduction(norm(pixels)).view(1, 2, 3, 6)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("dyhead_swint_atss_fpn_2x_ms", [192, 384, 768]),
        ("atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco", [384, 768, 1536]),
    ],
)
def test_the_published_recipes_are_built(name, widths):
    cfg = get_cfg()
    load_config(cfg, RELEASED / f"{name}.yaml")
    with torch.device("meta"):
        model = build_model(cfg)
    (network,) = (module for module in model.modules() if isinstance(module, TimmNetwork))
    assert [network.channels[stage] for stage in STAGES] == widths
    assert list(network.norms) == STAGES
    assert type(model.backbone.dyhead.blocks[0]).__name__ == "ReleasedDyHeadBlock"
    assert model.backbone.size_divisibility == 128
    assert model.detector.head.logits.kernel_size == (1, 1)
    assert cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.5
