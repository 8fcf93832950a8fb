import json
from pathlib import Path

import pytest
import torch

from dyhead.layers import DyHead, convert_checkpoint

KEYS = Path(__file__).parent / "released" / "keys.json"


@pytest.fixture(scope="module")
def released():
    """The DyHead of a released R-50 checkpoint, with zeros for weights, beside two keys of the rest of the model."""
    state = {key: torch.zeros(shape) for key, shape in json.loads(KEYS.read_text()).items()}
    state["backbone.backbone.fpn_lateral3.weight"] = torch.ones(2, 3)
    state["head.cls_score.weight"] = torch.ones(4)
    return state


def test_released_keys_fill_a_released_head(released):
    before = dict(released)
    converted = convert_checkpoint(released)
    assert released.keys() == before.keys()
    assert len(converted) == len(released)
    for key in ("backbone.backbone.fpn_lateral3.weight", "head.cls_score.weight"):
        assert converted[key] is released[key]
    prefix = "backbone.dyhead."
    with torch.device("meta"):
        head = DyHead(256, 6, block="released")
    # assign: a meta tensor takes no copy. Missing, unexpected and differently shaped keys all raise.
    head.load_state_dict(
        {key.removeprefix(prefix): value for key, value in converted.items() if key.startswith(prefix)}, assign=True
    )


def test_every_released_tensor_keeps_its_place():
    state = {f"dyhead_tower.0.DyConv.{i}.conv.weight": torch.full((16, 16, 3, 3), float(i)) for i in range(3)}
    state |= {f"dyhead_tower.0.DyConv.{i}.conv.bias": torch.full((16,), float(i)) for i in range(3)}
    converted = convert_checkpoint(state)
    for i, name in enumerate(("coarser", "same", "finer")):
        for parameter in ("weight", "bias"):
            assert (converted[f"dyhead.blocks.0.{name}.{parameter}"] == i).all()


def test_mmdetection_keys_get_biases_and_linear_shapes():
    prefix = "neck.1.dyhead_blocks.5."
    converted = convert_checkpoint(
        {
            prefix + "spatial_conv_low.conv.weight": torch.ones(16, 16, 3, 3, dtype=torch.float16),
            prefix + "task_attn_module.conv1.conv.weight": torch.ones(4, 16, 1, 1),
        }
    )
    assert {key: tuple(value.shape) for key, value in converted.items()} == {
        "neck.1.blocks.5.finer.weight": (16, 16, 3, 3),
        "neck.1.blocks.5.finer.bias": (16,),
        "neck.1.blocks.5.theta.0.weight": (4, 16),
    }
    assert (converted["neck.1.blocks.5.finer.bias"] == 0).all()
    assert converted["neck.1.blocks.5.finer.bias"].dtype == torch.float16


def test_our_own_keys_pass_through():
    state = DyHead(16, 1, block="released").state_dict()
    converted = convert_checkpoint(state)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_names_what_it_cannot_map():
    state = {
        "backbone.dyhead_tower.0.DyConv.3.conv.weight": torch.ones(1),
        "neck.1.dyhead_blocks.0.gate": torch.ones(1),
    }
    with pytest.warns(
        UserWarning, match=r"2 unknown keys .*dyhead_tower\.0\.DyConv\.3\.conv\.weight, neck\.1\.dyhead_blocks\.0\.gate"
    ):
        assert convert_checkpoint(state) == state


def test_wants_the_state_dict_not_the_file():
    with pytest.raises(TypeError, match="expected tensors by key, got a dict under 'model'; pass that"):
        convert_checkpoint({"model": {"a": torch.ones(1)}, "iteration": 5})
