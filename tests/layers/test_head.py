import copy
import re

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.utils import prune

from dyhead.layers import P6P7, DyHead, ScaleAwareAttention, TaskAwareAttention
from dyhead.ops import library

BLOCKS = ("paper", "released", "mmdetection", "mmdetection_main")


@pytest.mark.parametrize("block", BLOCKS)
def test_takes_and_returns_the_same_kind_of_pyramid(make_pyramid, block):
    head = DyHead(16, 2, block=block)
    levels = make_pyramid(25, 18, channels=16, dtype=torch.float32)  # 25 -> 13 -> 7
    names = ["p3", "p4", "p5"]
    as_dict = head(dict(zip(names, levels, strict=True)))
    as_list, as_tuple = head(levels), head(tuple(levels))
    assert type(as_dict) is dict
    assert type(as_list) is list
    assert type(as_tuple) is tuple
    assert list(as_dict) == names
    for level, a, b, c in zip(levels, as_dict.values(), as_list, as_tuple, strict=True):
        assert a.shape == level.shape
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_takes_odd_sizes_rounded_down():
    levels = [torch.randn(1, 16, *size) for size in ((25, 7), (12, 4), (6, 2), (3, 1), (1, 1), (1, 1))]
    assert [out.shape for out in DyHead(16, 1, norm_groups=4)(levels)] == [level.shape for level in levels]


@pytest.mark.parametrize("block", BLOCKS)
def test_takes_an_empty_batch(block):
    levels = [torch.randn(0, 16, 8, 6), torch.randn(0, 16, 4, 3)]
    out = DyHead(16, 2, block=block)(levels)
    assert [level.shape for level in out] == [level.shape for level in levels]


def test_no_blocks_leave_the_pyramid_as_it_is(make_pyramid):
    levels = make_pyramid(8, 8)
    assert all(a is b for a, b in zip(DyHead(8, 0)(levels), levels, strict=True))


def test_stacks_its_blocks(make_pyramid, randomize):
    head = randomize(DyHead(16, 3, norm_groups=4).double(), std=0.1)
    levels = [x.contiguous(memory_format=torch.channels_last) for x in make_pyramid(8, 8, channels=16)]
    expected = head.blocks[2](head.blocks[1](head.blocks[0](levels)))
    assert all(torch.equal(a, b) for a, b in zip(head(levels), expected, strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_state_dict_makes_the_same_head_again(make_pyramid, randomize, tmp_path, block):
    head, other = randomize(DyHead(16, 2, block=block)), DyHead(16, 2, block=block)
    levels = make_pyramid(9, 8, channels=16, dtype=torch.float32)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    other.load_state_dict(torch.load(tmp_path / "head.pth"))
    assert all(torch.equal(a, b) for a, b in zip(head(levels), other(levels), strict=True))


@pytest.mark.parametrize("block", ["paper", "released"])
def test_a_deep_stack_starts_with_sound_magnitudes(make_pyramid, block):
    head = DyHead(32, 6, block=block)
    levels = [level.requires_grad_() for level in make_pyramid(32, 24, levels=4, channels=32, dtype=torch.float32)]
    out = head(levels)
    for level in out:
        assert 0.1 < level.square().mean().sqrt() < 3
    for grad in torch.autograd.grad(out, levels, [torch.randn_like(level) for level in out]):
        assert 0.05 < grad.square().mean().sqrt() < 10


@pytest.mark.parametrize("block", BLOCKS)
def test_levels_have_channels_last_from_the_first_block_on(make_pyramid, block):
    head, seen = DyHead(16, 2, block=block), []
    for module in head.blocks:
        module.register_forward_hook(lambda module, inputs, outputs: seen.extend([*inputs[0], *outputs]))
    levels = make_pyramid(9, 8, channels=16, dtype=torch.float32)
    out = head([level.to(memory_format=torch.channels_last) for level in levels])
    for a, b in zip(out, head(levels), strict=True):
        torch.testing.assert_close(a, b)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", ["paper", "released"])
def test_autocast_stays_close_to_float32(make_pyramid, randomize, block, dtype):
    head = randomize(DyHead(16, 2, block=block), std=0.1)
    levels = make_pyramid(16, 12, channels=16, dtype=torch.float32)
    expected = head(levels)
    with torch.autocast("cpu", dtype=dtype):
        out = head(levels)
    for a, b in zip(out, expected, strict=True):
        # Half types have 8 and 11 bits; offsets amplify their rounding where neighbouring pixels differ (noise here).
        assert (a.float() - b).square().mean().sqrt() < (0.1 if dtype == torch.bfloat16 else 0.02)
    sum(level.float().sum() for level in out).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_runs_wholly_in_another_type(make_pyramid, dtype):
    head = DyHead(16, 2).to(dtype)
    assert all(level.dtype == dtype for level in head(make_pyramid(8, 6, channels=16, dtype=dtype)))


@pytest.mark.parametrize("block", ["paper", "released"])
def test_compiles_whole_for_pyramids_of_two_sizes(make_pyramid, randomize, block):
    head = randomize(DyHead(16, 1, block=block), std=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for size in ((25, 18), (40, 31)):
        levels = make_pyramid(*size, levels=2, channels=16, dtype=torch.float32)
        named = dict(zip(("p3", "p4"), levels, strict=True))
        expected, out = head(named), compiled(named)
        for name in named:
            torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-4)
        head.zero_grad()
        sum(level.square().sum() for level in out.values()).backward()
        grads = [p.grad.clone() for p in head.parameters()]
        head.zero_grad()
        sum(level.square().sum() for level in expected.values()).backward()
        for grad, p in zip(grads, head.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-3 * max(1.0, p.grad.abs().max().item()))


@pytest.mark.parametrize("block", ["paper", "released"])
def test_gradients_of_single_images_by_torch_func(make_pyramid, randomize, block):
    head = randomize(DyHead(16, 1, block=block).double())
    levels, parameters = make_pyramid(6, 5, channels=16), dict(head.named_parameters())

    def loss(parameters, *levels):
        pyramid = [level[None] for level in levels]
        return sum(level.square().sum() for level in torch.func.functional_call(head, parameters, (pyramid,)))

    dims = None, *[0] * len(levels)
    got = torch.func.vmap(torch.func.grad(loss), in_dims=dims)(parameters, *levels)
    for image in range(2):
        value = loss(parameters, *(level[image] for level in levels))
        expected = torch.autograd.grad(value, list(parameters.values()))
        torch.testing.assert_close([grad[image] for grad in got.values()], list(expected))


@pytest.mark.parametrize("block", ["paper", "released"])
def test_forward_mode(make_pyramid, randomize, block):
    head = randomize(DyHead(16, 1, block=block).double())
    levels, tangents = (tuple(make_pyramid(6, 5, channels=16)) for _ in range(2))
    _, got = torch.func.jvp(lambda *levels: head(levels), levels, tangents)
    with torch.no_grad():
        above, below = (
            head([level + step * tangent for level, tangent in zip(levels, tangents, strict=True)])
            for step in (1e-6, -1e-6)
        )
    for level, a, b in zip(got, above, below, strict=True):
        assert level.abs().max() > 0.1
        torch.testing.assert_close(level, (a - b) / 2e-6, rtol=1e-5, atol=1e-5)


def yolo_levels(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    widths_and_sizes = ((8, 12, 9), (24, 6, 5), (48, 3, 3))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in widths_and_sizes]


VARIANTS = [
    {"norm": "GN"},
    {"norm": "BN"},
    {"norm": None},
    {"block": "released"},
    {"out_channels": [8, 24, 48]},
    {"use_checkpoint": True},
]


def yolo_head(out_channels=32, **options):
    torch.manual_seed(0)
    return DyHead(32, 1, in_channels=[8, 24, 48], out_channels=out_channels, **options)


def test_levels_of_any_widths_go_through_1x1_convolutions(randomize):
    head = randomize(yolo_head(out_channels=[32, 24, 48]))
    levels = yolo_levels()
    narrow = [functional.conv2d(x, c.weight, c.bias) for x, c in zip(levels, head.adapt_in.convolutions, strict=True)]
    plain = DyHead(32, 1)
    plain.blocks.load_state_dict(head.blocks.state_dict())
    first, *others = plain(narrow)
    expected = (
        [first]
        + [  # as wide as the blocks: no convolution
            functional.conv2d(x, c.weight, c.bias) for x, c in zip(others, head.adapt_out.convolutions[1:], strict=True)
        ]
    )
    assert all(torch.equal(a, b) for a, b in zip(head(levels), expected, strict=True))
    assert (head.channels, head.in_channels, head.out_channels) == (32, [8, 24, 48], [32, 24, 48])


def test_a_width_for_all_levels_is_one_convolution(make_pyramid):
    head = DyHead(in_channels=8, out_channels=16, num_blocks=0)
    (convolution,) = head.adapt_in.convolutions
    levels = make_pyramid(6, 5, dtype=torch.float32)
    assert all(torch.equal(a, convolution(b)) for a, b in zip(head(levels), levels, strict=True))
    assert head.adapt_out is None


def test_adapters_keep_the_variance():
    head = DyHead(in_channels=[64, 256], out_channels=32, num_blocks=0)
    for out in head([torch.randn(4, 64, 32, 32), torch.randn(4, 256, 16, 16)]):
        assert 0.8 < out.std() < 1.2


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"channels": 16}, (16, 16, 16)),
        ({"in_channels": 16}, (16, 16, 16)),
        ({"in_channels": [16, 16]}, (16, [16, 16], 16)),
        ({"in_channels": [16, 32], "out_channels": 32}, (32, [16, 32], 32)),
        ({"in_channels": (16, np.int64(32)), "channels": 16}, (16, [16, 32], 16)),
        ({"in_channels": 16, "channels": 32, "out_channels": [16, 16]}, (32, 16, [16, 16])),
    ],
)
def test_widths(options, widths):
    head = DyHead(num_blocks=1, **options)
    assert (head.channels, head.in_channels, head.out_channels) == widths
    ins = widths[1] if isinstance(widths[1], list) else [widths[1]] * 2
    outs = widths[2] if isinstance(widths[2], list) else [widths[2]] * 2
    out = head([torch.randn(1, ins[0], 4, 4), torch.randn(1, ins[1], 2, 2)])
    assert [level.shape[1] for level in out] == outs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "channels: expected the width of the blocks, .* got none beside in_channels=None and out_channels=None"),
        ({"in_channels": [16, 32]}, r"channels: expected the width of the blocks.*in_channels=\[16, 32\]"),
        ({"in_channels": 16, "out_channels": [16, 32]}, "channels: expected the width of the blocks"),
        ({"in_channels": []}, "in_channels: expected a width for each level, got none"),
        ({"in_channels": [16, 0]}, r"in_channels\[1\]: expected an integer from 1"),
        ({"channels": 16, "out_channels": "32"}, "out_channels: expected an integer from 1"),
        ({"channels": 16, "in_channels": [1, 2], "out_channels": [1]}, "out_channels: expected 2 widths"),
        ({"channels": 16, "norm": "LN"}, "norm: expected one of 'GN', 'BN', 'SyncBN', None, got 'LN'"),
        ({"channels": 16, "norm": "BN", "use_checkpoint": True}, "use_checkpoint: expected norm='GN' or None"),
        ({"channels": 16, "norm": None, "block": "released"}, "expected no options, .*got norm=None"),
    ],
)
def test_names_a_wrong_width_or_norm(options, message):
    with pytest.raises(ValueError, match=message):
        DyHead(**options)


def test_names_a_level_of_another_width():
    with pytest.raises(ValueError, match="level 1: expected 24 channels, got 8"):
        yolo_head()([yolo_levels()[0]] * 2 + [yolo_levels()[2]])
    with pytest.raises(ValueError, match="pyramid: expected 3 levels, got 2"):
        yolo_head()(yolo_levels()[:2])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_copies_compute_the_same(randomize, options, tmp_path):
    head = randomize(yolo_head(**options)).eval()
    expected = head(yolo_levels())
    torch.save(head, tmp_path / "head.pth")  # pickled whole, as YOLO's checkpoints are
    average = torch.optim.swa_utils.AveragedModel(head, use_buffers=True)
    average.update_parameters(head)
    copies = copy.deepcopy(head), torch.load(tmp_path / "head.pth", weights_only=False), average.eval()
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(other(yolo_levels()), expected, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_runs_in_half_precision(options):
    head = yolo_head(**options).eval()
    expected = head(yolo_levels())
    for a, b in zip(head.half()(yolo_levels(dtype=torch.float16)), expected, strict=True):
        assert a.dtype == torch.float16
        assert (a.float() - b).square().mean().sqrt() < 0.02 * b.square().mean().sqrt()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_learns(options):
    head = yolo_head(zero_init_offset=False, **options)
    sum(x.square().sum() for x in head(yolo_levels())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.ne(0).any() for p in head.parameters())
    assert all(block.offset.weight.std() > 0.005 for block in head.modules() if hasattr(block, "offset"))


def test_a_checkpoint_computes_blocks_again_in_the_backward_pass(make_pyramid, randomize):
    plain, other = randomize(DyHead(16, 2)), DyHead(16, 2, use_checkpoint=True)
    other.load_state_dict(plain.state_dict())
    calls = []
    for block in other.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    levels = [x.requires_grad_() for x in make_pyramid(9, 8, channels=16, dtype=torch.float32)]
    named = dict(zip(("p3", "p4", "p5"), levels, strict=True))
    grads = [
        torch.autograd.grad(sum(x.square().sum() for x in head(named).values()), [*levels, *head.parameters()])
        for head in (plain, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(calls) == 4
    with torch.no_grad():
        other(named)
    assert len(calls) == 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(library.PROBLEM is not None, reason="torch.jit.script takes the compiled operator")
@pytest.mark.parametrize(
    "options", [{"norm": "GN"}, {"norm": None}, {"out_channels": [8, 24, 48], "shortcut": True}], ids=str
)
def test_torchscript_takes_adapters(randomize, options):
    head = randomize(yolo_head(**options)).eval()
    named = dict(zip(("p3", "p4", "p5"), yolo_levels(), strict=True))
    expected, found = head(named), torch.jit.script(copy.deepcopy(head))(named)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], level) for name, level in expected.items())


def test_parameters_that_are_pruned_stay_so_in_training():
    """The masks of torch.nn.utils.prune are applied where a module is called."""
    head = yolo_head(norm="BN")
    attention = head.blocks[0].spatial_attention
    for module in (attention, attention.offset, attention.norm):
        prune.random_unstructured(module, "weight", 0.5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(x.square().mean() for x in head(yolo_levels())).backward()
        optimizer.step()
    head(yolo_levels())
    for module in (attention, attention.offset, attention.norm):
        assert (module.weight == module.weight_orig * module.weight_mask).all()


@pytest.mark.skipif(library.PROBLEM is not None, reason="the plain PyTorch operator has fixed sizes when exported")
@pytest.mark.parametrize("block", ["paper", "released"])
def test_exports_with_dynamic_sizes(make_pyramid, randomize, block):
    head = randomize(DyHead(16, 1, block=block), std=0.1).eval()
    dynamic = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    levels = make_pyramid(12, 9, channels=16, dtype=torch.float32)
    exported = torch.export.export(head, (levels,), dynamic_shapes=([dynamic] * 3,)).module()
    for size in ((12, 9), (37, 50)):
        levels = make_pyramid(*size, channels=16, dtype=torch.float32)
        for a, b in zip(exported(levels), head(levels), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def level(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("pyramid", "error", "message"),
    [
        (level(1, 16, 8, 8), TypeError, "pyramid: expected a dict, list or tuple of levels, got Tensor"),
        ([], ValueError, "pyramid: expected at least one level, got none"),
        ({}, ValueError, "pyramid: expected at least one level, got none"),
        ([None], TypeError, "level 0: expected a tensor, got NoneType"),
        ([level(16, 8, 8)], ValueError, "level 0: expected 4 dimensions (N, C, H, W), got (16, 8, 8)"),
        (
            [level(1, 16, 8, 8, dtype=torch.int64)],
            TypeError,
            "level 0: expected a floating-point tensor, got torch.int64",
        ),
        ({"p3": level(1, 8, 8, 8)}, ValueError, "level 'p3': expected 16 channels, got 8"),
        ([level(1, 16, 0, 8)], ValueError, "level 0: expected a height and width of at least 1, got 0 x 8"),
        (
            {"p3": level(1, 16, 8, 8), "p4": level(1, 32, 4, 4)},
            ValueError,
            "level 'p4': expected 16 channels, got 32",
        ),
        (
            {"p3": level(2, 16, 8, 8), "p4": level(1, 16, 4, 4)},
            ValueError,
            "level 'p4': expected batch size 2 as in level 'p3', got 1",
        ),
        (
            [level(1, 16, 8, 8), level(1, 16, 4, 4, dtype=torch.float64)],
            TypeError,
            "level 1: expected torch.float32 as in level 0, got torch.float64",
        ),
        (
            [level(1, 16, 8, 8), level(1, 16, 4, 4, device="meta")],
            ValueError,
            "level 1: expected device cpu as in level 0, got meta",
        ),
        (
            {"p5": level(1, 16, 7, 7), "p4": level(1, 16, 13, 13)},
            ValueError,
            "level 'p4': expected no more than the size of level 'p5' (7 x 7), height and width in one ratio, got "
            "13 x 13; levels run from fine to coarse",
        ),
        (
            {"p3": level(1, 16, 32, 32), "p4": level(1, 16, 16, 8)},
            ValueError,
            "level 'p4': expected no more than the size of level 'p3' (32 x 32), height and width in one ratio, got "
            "16 x 8",
        ),
    ],
)
def test_names_what_is_wrong_with_a_pyramid(pyramid, error, message):
    with pytest.raises(error, match=re.escape(message) + "$"):
        DyHead(16, 1)(pyramid)


def test_the_released_block_wants_sizes_rounded_up():
    with pytest.raises(
        ValueError, match=r"level 1: expected half the size of level 0 \(9 x 8\), rounded up, got 4 x 4"
    ):
        DyHead(16, 1, block="released")([level(1, 16, 9, 8), level(1, 16, 4, 4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block": "papre"},
            "block: expected one of 'paper', 'released', 'mmdetection', 'mmdetection_main', got 'papre'",
        ),
        ({"num_blocks": -1}, "num_blocks: expected an integer from 0 to 2147483647, got -1"),
        ({"norm_groups": 5}, "norm_groups: expected a divisor of the 16 channels, got 5"),
        ({"block": "released", "window": None}, "block='released': expected no options, .*got window=None"),
        ({"block": "mmdetection", "task_aware": False, "norm_groups": 8}, "got task_aware=False, norm_groups=8"),
        ({"block": "released", "shortcut": True}, "block='released': expected no options, .*got shortcut=True"),
    ],
)
def test_names_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        DyHead(16, **options)


def test_the_released_block_names_a_wrong_number_of_channels():
    with pytest.raises(ValueError, match="16 norm groups: expected a divisor of the 24 channels, got 16"):
        DyHead(24, block="released")


@pytest.mark.parametrize("value", [2.0, "2", True, 0, -1, 10**30, np.float32(2), [2]], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: DyHead(value, 1), "channels"),
        (lambda value: DyHead(16, 1, window=value), "window"),
        (lambda value: DyHead(16, 1, offset_groups=value), "offset_groups"),
        (lambda value: DyHead(16, 1, norm_groups=value), "norm_groups"),
        (lambda value: DyHead(value, 1, block="released"), "channels"),
        (lambda value: ScaleAwareAttention(value), "channels"),
        (lambda value: TaskAwareAttention(value), "channels"),
        (lambda value: TaskAwareAttention(16, value), "reduction"),
        (lambda value: P6P7(value, 16), "in_channels"),
        (lambda value: P6P7(16, value), "out_channels"),
    ],
)
def test_names_an_argument_that_is_no_integer(make, name, value):
    if name == "window" and value == 10**30:
        return  # the whole pyramid
    expected = "at least 1" if name == "window" else "(an integer from 1 to|a divisor of the 16 channels)"
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}.*, got {re.escape(repr(value))}$"):
        make(value)


def test_takes_integers_of_numpy():
    one, sixteen = np.int64(1), np.int32(16)
    head = DyHead(sixteen, one, window=one, offset_groups=one, norm_groups=np.uint8(8))
    assert str(head) == str(DyHead(16, 1, norm_groups=8))
