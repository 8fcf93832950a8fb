"""The released block against the released arithmetic; mmdetection's against its own results and its source."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dyhead.checkpoints import convert
from dyhead.layers import DyHead

DATA = Path(__file__).parent / "released"
RELEASED = DATA / "block_small.npz"
MMDETECTION = DATA / "mmdetection_block.npz"
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
    loaded = convert(state)
    head.load_state_dict({key.removeprefix("backbone.dyhead."): value for key, value in loaded.state.items()})
    origin = {ours.removeprefix("backbone.dyhead."): theirs for theirs, ours in loaded.renamed.items()}

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


def mmdetection_head(state, block):
    """A head of one block with weights under mmdetection's names, `dyhead_blocks.0.` left out."""
    converted = convert({f"dyhead_blocks.0.{key}": value for key, value in state.items()}).state
    offset = state["spatial_conv_offset.weight"]
    head = DyHead(offset.shape[1], 1, block=block).to(offset.dtype)
    head.load_state_dict({key.removeprefix("backbone.dyhead."): value for key, value in converted.items()})
    return head


def mmdetection_block(p, levels, main=False):
    """One block of mmdetection 2.20 to 3.3, or of its later main branch, read from their source.

    Offsets and masks of a level go as they are to the convolution of the coarser level. mmcv's kernels take the data
    pointer of an image's and count on from there with the output's size. The main branch cuts `[..., :h, :w]` out of
    both: of the offsets that is a view, of which the kernels again take the pointer; the sigmoid has made a new, dense
    tensor of the masks.
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

            def from_pointer(x, channels, h=h, w=w):
                return torch.stack([torch.as_strided(image, (channels, h, w), (h * w, w, 1)) for image in x])

            read = mask[:, :, :h, :w] if main else from_pointer(mask, 9)
            x = conv("spatial_conv_high", levels[m + 1], from_pointer(offset, 18), read)
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


@pytest.mark.parametrize(("block", "main"), [("mmdetection", False), ("released", False), ("mmdetection_main", True)])
def test_equals_mmdetections_block(make_pyramid, block, main):
    state = mmdetection_state(32)
    levels = make_pyramid(9, 13, levels=4, channels=32)
    head = mmdetection_head(state, block)
    for ours, theirs in zip(head(levels), mmdetection_block(state, levels, main), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_main_branch_of_mmdetection_reads_other_importances(make_pyramid):
    levels = make_pyramid(9, 13, levels=2, channels=32)
    state = mmdetection_state(32)
    published, main = (mmdetection_head(state, block)(levels) for block in ("mmdetection", "mmdetection_main"))
    assert not torch.allclose(published[0], main[0])
    torch.testing.assert_close(published[1], main[1])  # the coarsest level has no coarser one


# Gains and shifts of the stored case's weights: the first whose name is in the key applies.
GAINS = [
    ("spatial_conv_offset.weight", 1.5, 0.0),
    ("high.norm.weight", 1.6, 0.0),
    ("mid.norm.weight", 1.6, 0.0),
    ("low.norm.weight", 1.6, 0.0),
    ("scale_attn_module.1.weight", 1.5, 0.0),
    ("scale_attn_module.1.bias", 8.0, 1.2),
    ("task_attn_module.conv1.conv.weight", 2.5, 0.0),
    ("task_attn_module.conv2.conv.weight", 1.6, 0.0),
]


def stored_weight(key, shape):
    """Uniform values in a fixed order from the key, as tests/data/released.md says."""
    generator = np.random.Philox(key=zlib.crc32(f"1:neck.1.dyhead_blocks.0.{key}".encode()))
    uniform = (generator.random_raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    value = 2 * uniform.reshape(shape) - 1
    if key.endswith("bias"):
        value = 0.1 * value
    elif len(shape) > 1:
        value = value * math.sqrt(3 / math.prod(shape[1:]))
    else:
        value = 1 + 0.2 * value
    gain, shift = next(((gain, shift) for name, gain, shift in GAINS if name in key), (1.0, 0.0))
    return torch.from_numpy((gain * value + shift).astype(np.float32))


@pytest.mark.parametrize("block", ["mmdetection", "released"])
def test_gives_what_mmdetection_computed(block):
    """Weights of the published recipe's shapes: the two coarsest levels behind mmdetection 3.3's own first block."""
    head = mmdetection_head({k: stored_weight(k, v.shape) for k, v in mmdetection_state(256).items()}, block)
    with np.load(MMDETECTION) as arrays, torch.no_grad():
        out = head({name: torch.from_numpy(arrays[f"input/{name}"])[None] for name in ("p5", "p6", "p7")})
        for name in ("p6", "p7"):  # p5 lacks its finer neighbour here
            expected = torch.from_numpy(arrays[f"out/{name}"])
            error = (out[name][0, ::16] - expected).abs().max() / expected.abs().max()
            assert error < 2e-5, name
