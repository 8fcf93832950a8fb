"""The released block against the released arithmetic; mmdetection's against its own, written from its source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dyhead.layers import DyHead, convert_checkpoint

RELEASED = Path(__file__).parent / "released" / "block_small.npz"
NAMES = ("p3", "p4", "p5", "p6")


@pytest.fixture(scope="module")
def released():
    with np.load(RELEASED) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def tensors(released, folder):
    return {key.removeprefix(folder): value for key, value in released.items() if key.startswith(folder)}


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "output_tolerance", "parameter_tolerance"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 2e-4)],
)
def test_equals_the_released_blocks(released, num_blocks, dtype, output_tolerance, parameter_tolerance):
    # Ours by key, each with the key of its gradient in the file.
    state = tensors(released, "param/")
    head = DyHead(32, 2, block="released").to(dtype)
    loaded = convert_checkpoint(state)
    head.load_state_dict({key.removeprefix("dyhead."): value for key, value in loaded.items()})
    origin = {ours.removeprefix("dyhead."): theirs for ours, theirs in zip(loaded, state, strict=True)}

    inputs = {name: released[f"input/{name}"].to(dtype, copy=True).requires_grad_() for name in NAMES}
    out = inputs
    for block in head.blocks[:num_blocks]:
        out = block(out)
    sum((out[name] * released[f"cot{num_blocks}/{name}"].to(dtype)).sum() for name in NAMES).backward()

    def check(ours, key, tolerance):
        expected = released[key]
        error = (ours.detach().double().reshape(expected.shape) - expected).abs().max() / expected.abs().max()
        assert error < tolerance, key

    for name in NAMES:
        check(out[name], f"out{num_blocks}/{name}", output_tolerance)
        check(inputs[name].grad, f"grad{num_blocks}/input/{name}", output_tolerance)
    for name, parameter in head.blocks[:num_blocks].named_parameters():
        key = f"grad{num_blocks}/param/{origin[f'blocks.{name}']}"
        check(parameter.grad, key, parameter_tolerance)


def mmdetection_block(p, levels):
    """One block of mmdetection 3 on mmcv 2, read from their source, with torchvision's convolution.

    mmdetection cuts ``[..., :h, :w]`` out of offsets and mask logits for the coarser level. mmcv's kernels take the
    data pointer of an image's offsets and count on from there; the sigmoid has made a new, dense tensor of the mask.
    """
    deform_conv2d = pytest.importorskip("torchvision").ops.deform_conv2d

    def conv(name, x, offset, mask, stride=1):
        x = deform_conv2d(x, offset, p[f"{name}.conv.weight"], stride=stride, padding=1, mask=mask)
        return functional.group_norm(x, 16, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"])

    def conv1x1(name, x):
        return functional.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"])

    out = []
    for m, level in enumerate(levels):
        both = functional.conv2d(level, p["spatial_conv_offset.weight"], p["spatial_conv_offset.bias"], padding=1)
        offset, mask = both[:, :18], both[:, 18:].sigmoid()
        branches = [conv("spatial_conv_mid", level, offset, mask)]
        if m > 0:
            branches.append(conv("spatial_conv_low", levels[m - 1], offset, mask, stride=2))
        if m < len(levels) - 1:
            h, w = levels[m + 1].shape[2:]
            cut = both[:, :18, :h, :w]
            read = torch.stack([torch.as_strided(image, (18, h, w), (h * w, w, 1)) for image in cut])
            x = conv("spatial_conv_high", levels[m + 1], read, both[:, 18:, :h, :w].sigmoid())
            branches.append(functional.interpolate(x, level.shape[2:], mode="bilinear", align_corners=True))
        x = 0
        for branch in branches:
            gate = conv1x1("scale_attn_module.1", branch.mean((2, 3), keepdim=True)).relu()
            x = x + branch * ((gate + 3) / 6).clamp(0, 1) / len(branches)
        y = conv1x1("task_attn_module.conv1.conv", x.mean((2, 3), keepdim=True)).relu()
        y = ((conv1x1("task_attn_module.conv2.conv", y) + 3) / 6).clamp(0, 1) - 0.5
        a1, b1, a2, b2 = y.split(x.shape[1], dim=1)
        out.append(torch.max(x * (2 * a1 + 1) + b1, x * 2 * a2 + b2))
    return out


def mmdetection_state(channels):
    """Random weights of one mmdetection block under its names."""
    shapes = {
        "spatial_conv_offset.weight": (27, channels, 3, 3),
        "spatial_conv_offset.bias": (27,),
        "scale_attn_module.1.weight": (1, channels, 1, 1),
        "scale_attn_module.1.bias": (1,),
        "task_attn_module.conv1.conv.weight": (channels // 4, channels, 1, 1),
        "task_attn_module.conv1.conv.bias": (channels // 4,),
        "task_attn_module.conv2.conv.weight": (4 * channels, channels // 4, 1, 1),
        "task_attn_module.conv2.conv.bias": (4 * channels,),
    }
    for name in ("high", "mid", "low"):
        shapes[f"spatial_conv_{name}.conv.weight"] = (channels, channels, 3, 3)
        shapes[f"spatial_conv_{name}.norm.weight"] = (channels,)
        shapes[f"spatial_conv_{name}.norm.bias"] = (channels,)
    return {key: 0.2 * torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}


def test_equals_mmdetections_block(make_pyramid):
    state = mmdetection_state(32)
    levels = make_pyramid(9, 13, levels=4, channels=32)
    head = DyHead(32, 1, block="mmdetection").double()
    head.load_state_dict(convert_checkpoint({f"dyhead_blocks.0.{key}": value for key, value in state.items()}))
    for ours, theirs in zip(head(levels), mmdetection_block(state, levels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_mmdetections_block_is_not_the_released_one(make_pyramid):
    levels = make_pyramid(9, 13, levels=2, channels=32)
    state = {f"dyhead_blocks.0.{key}": value for key, value in mmdetection_state(32).items()}
    outputs = []
    for block in ("released", "mmdetection"):
        head = DyHead(32, 1, block=block).double()
        head.load_state_dict(convert_checkpoint(state))
        outputs.append(head(levels))
    assert not torch.allclose(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])  # the coarsest level has no coarser one
