"""Bad arguments: the operator, the reference and the operator without data say the same, and nothing crashes."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dyhead import ops
from dyhead.ops import reference

operator = torch.ops.dyhead.pyramid_deform_conv2d


def meta(*arguments):
    def move(value):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [move(item) for item in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return operator(*map(move, arguments))


NAMES = [
    "features",
    "offset",
    "weight",
    "bias",
    "mask",
    "level_weight",
    "aligned",
    "scales",
    "stride",
    "padding",
    "dilation",
]


def good():
    """Arguments by name: two levels, C_in = 4, C_out = 2, groups 2, offset groups 2."""
    values = (
        [torch.randn(2, 4, 10, 8), torch.randn(2, 4, 5, 4)],
        torch.randn(2, 36, 5, 4),
        torch.randn(2, 2, 2, 3, 3),
        torch.randn(2),
        torch.rand(2, 18, 5, 4),
        torch.rand(2, 2),
        True,
        [2.0, 1.0],
        [1, 1],
        [0, 0],
        [1, 1],
    )
    return dict(zip(NAMES, values, strict=True))


def convolution():
    changed = {"features": [torch.randn(2, 4, 5, 4)], "weight": torch.randn(1, 2, 2, 3, 3), "level_weight": None}
    return {**good(), **changed, "aligned": False, "scales": None, "padding": [1, 1]}


BAD = {
    "no levels": ({"features": []}, "features: expected at least one level, got an empty list"),
    "dtype of features": (
        {"features": [torch.zeros(2, 4, 10, 8, dtype=torch.int32)] * 2},
        "features[0]: expected float64, float32, bfloat16 or float16, got ",
    ),
    "dtype of a level": (
        {"features": [torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 5, 4).half()]},
        "features[1]: expected torch.float32, got torch.float16",
    ),
    "dtype of offset": (
        {"offset": torch.zeros(2, 36, 5, 4).double()},
        "offset: expected torch.float32, got torch.float64",
    ),
    "dtype of mask": ({"mask": torch.zeros(2, 18, 5, 4).half()}, "mask: expected torch.float32, got torch.float16"),
    "dtype of weight": (
        {"weight": torch.zeros(2, 2, 2, 3, 3).bfloat16()},
        "weight: expected torch.float32, got torch.bfloat16",
    ),
    "dtype of bias": ({"bias": torch.zeros(2).double()}, "bias: expected torch.float32, got torch.float64"),
    "dtype of level_weight": (
        {"level_weight": torch.zeros(2, 2).double()},
        "level_weight: expected torch.float32, got torch.float64",
    ),
    "dimensions of features": (
        {"features": [torch.zeros(4, 10, 8)] * 2},
        "features[0]: expected (N, C, H, W), got (4, 10, 8)",
    ),
    "channels of a level": (
        {"features": [torch.zeros(2, 4, 10, 8), torch.zeros(2, 5, 5, 4)]},
        "features[1]: expected (2, 4, H, W), got (2, 5, 5, 4)",
    ),
    "batch of a level": (
        {"features": [torch.zeros(2, 4, 10, 8), torch.zeros(1, 4, 5, 4)]},
        "features[1]: expected (2, 4, H, W), got (1, 4, 5, 4)",
    ),
    "empty map": (
        {"features": [torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 0, 4)]},
        "features[1]: expected at least one channel and one pixel, got (2, 4, 0, 4)",
    ),
    "levels of weight": (
        {"weight": torch.zeros(3, 2, 2, 3, 3)},
        "weight: expected (2, C_out, C_in/groups, kh, kw), got (3, 2, 2, 3, 3)",
    ),
    "dimensions of weight": (
        {"weight": torch.zeros(2, 2, 3, 3)},
        "weight: expected (2, C_out, C_in/groups, kh, kw), got (2, 2, 3, 3)",
    ),
    "empty kernel": (
        {"weight": torch.zeros(2, 2, 2, 0, 3)},
        "weight: expected no empty dimension, got (2, 2, 2, 0, 3)",
    ),
    "input channels of weight": (
        {"weight": torch.zeros(2, 2, 3, 3, 3)},
        "weight: expected C_in/groups to divide the features' 4 channels, got (2, 2, 3, 3, 3)",
    ),
    "output channels of weight": (
        {"weight": torch.zeros(2, 3, 2, 3, 3)},
        "weight: expected C_out to be a multiple of the 2 groups, got (2, 3, 2, 3, 3)",
    ),
    "shape of bias": ({"bias": torch.zeros(2, 1)}, "bias: expected (2,), got (2, 1)"),
    "dimensions of offset": ({"offset": torch.zeros(36, 5, 4)}, "offset: expected (N, 2*G*K, H, W), got (36, 5, 4)"),
    "channels of offset": (
        {"offset": torch.zeros(2, 27, 5, 4)},
        "offset: expected a multiple of 2*K = 18 channels, got (2, 27, 5, 4)",
    ),
    "batch of offset": ({"offset": torch.zeros(1, 36, 5, 4)}, "offset: expected (2, 36, 5, 4), got (1, 36, 5, 4)"),
    "offset groups": (
        {"offset": torch.zeros(2, 54, 5, 4)},
        "offset: expected offset groups that divide the features' 4 channels, got 3 groups",
    ),
    "empty grid": (
        {"offset": torch.zeros(2, 36, 0, 4)},
        "offset: expected an output grid of at least one pixel, got (2, 36, 0, 4)",
    ),
    "shape of mask": ({"mask": torch.zeros(2, 18, 10, 8)}, "mask: expected (2, 18, 5, 4), got (2, 18, 10, 8)"),
    "groups of mask": ({"mask": torch.zeros(2, 9, 5, 4)}, "mask: expected (2, 18, 5, 4), got (2, 9, 5, 4)"),
    "shape of level_weight": ({"level_weight": torch.zeros(2, 3)}, "level_weight: expected (2, 2), got (2, 3)"),
    "number of scales": ({"scales": [1.0]}, "scales: expected 2 numbers, one a level, got 1"),
    "negative scale": ({"scales": [1.0, -2.0]}, "scales[1]: expected a positive finite number, got -2"),
    "infinite scale": ({"scales": [float("inf"), 1.0]}, "scales[0]: expected a positive finite number, got inf"),
    "scale that is no number": (
        {"scales": [float("nan"), 1.0]},
        "scales[0]: expected a positive finite number, got nan",
    ),
    "dilation": ({"dilation": [0, 1]}, "dilation: expected two integers of at least 1, got (0, 1)"),
    "number of dilations": ({"dilation": [1]}, "dilation: expected two integers of at least 1, got (1,)"),
    "stride": ({"stride": [1, -1]}, "stride: expected two integers of at least 1, got (1, -1)"),
    "padding": ({"padding": [-1, 0]}, "padding: expected two integers of at least 0, got (-1, 0)"),
    "huge dilation": ({"dilation": [2**62, 1]}, "dilation: expected two integers of at least 1"),
}
BAD_CONVOLUTION = {
    "size of offset": (
        {"offset": torch.zeros(2, 36, 50, 84)},
        "offset: expected (2, 36, 5, 4), got (2, 36, 50, 84)",
    ),
    "dimensions of input": ({"features": [torch.zeros(4, 5, 4)]}, "input: expected (N, C, H, W), got (4, 5, 4)"),
    "two levels": (
        {"features": [torch.zeros(2, 4, 5, 4)] * 2},
        "features: expected one level in the convolution geometry, got 2 levels",
    ),
    "large kernel": (
        {"dilation": [9, 9]},
        "weight: expected a kernel that fits the padded input (2, 4, 5, 4), got (2, 2, 3, 3)",
    ),
}


@pytest.mark.parametrize(
    "function", [operator, reference.pyramid_deform_conv, meta], ids=["operator", "reference", "meta"]
)
class TestErrors:
    def check(self, function, arguments, change, text):
        with pytest.raises(RuntimeError) as error:
            function(*{**arguments, **change}.values())
        assert text in str(error.value)

    @pytest.mark.parametrize("name", BAD)
    def test_aligned(self, function, name):
        self.check(function, good(), *BAD[name])

    @pytest.mark.parametrize("name", BAD_CONVOLUTION)
    def test_convolution(self, function, name):
        self.check(function, convolution(), *BAD_CONVOLUTION[name])

    def test_good_arguments_pass(self, function):
        assert function(*good().values()).shape == (2, 2, 5, 4)
        assert function(*convolution().values()).shape == (2, 2, 5, 4)


@pytest.mark.parametrize("name", ["offset", "mask", "weight", "bias", "level_weight"])
def test_another_device_is_named(name):
    arguments = {**good(), name: good()[name].to("meta")}
    for function in (operator, reference.pyramid_deform_conv):
        with pytest.raises(RuntimeError, match=f"^{name}: expected cpu, got meta"):
            function(*arguments.values())


def test_backward_checks_the_gradient():
    backward = torch.ops.dyhead._pyramid_deform_conv2d_backward
    for grad, text in [
        (torch.zeros(2, 2, 5, 5), "grad: expected (2, 2, 5, 4), got (2, 2, 5, 5)"),
        (torch.zeros(2, 2, 5, 4).double(), "grad: expected torch.float32, got torch.float64"),
    ]:
        with pytest.raises(RuntimeError) as error:
            backward(grad, *good().values(), [True] * 6)
        assert str(error.value) == text
    with pytest.raises(RuntimeError, match="^needs_grad: expected 6 values, got 2"):
        backward(torch.zeros(2, 2, 5, 4), *good().values(), [True] * 2)


@pytest.mark.parametrize("module", [ops, reference], ids=["operator", "reference"])
class TestPublicFunctions:
    def test_features_are_a_list(self, module):
        feature, offset, weight = torch.zeros(2, 4, 5, 4), torch.zeros(2, 18, 5, 4), torch.zeros(1, 2, 4, 3, 3)
        with pytest.raises(RuntimeError, match=r"^features: expected a list .* got one tensor \(2, 4, 5, 4\)"):
            module.pyramid_deform_conv2d(feature, offset, weight)
        with pytest.raises(RuntimeError, match="^features: expected a list .* got an empty list"):
            module.pyramid_deform_conv2d([], offset, weight)

    def test_weight_has_four_dimensions(self, module):
        with pytest.raises(
            RuntimeError, match=r"^weight: expected \(C_out, C_in/groups, kh, kw\), got \(1, 2, 4, 3, 3\)"
        ):
            module.deform_conv2d(torch.zeros(2, 4, 5, 4), torch.zeros(2, 18, 3, 2), torch.zeros(1, 2, 4, 3, 3))

    def test_wide_or_integer_offsets_are_refused(self, module):
        input, weight = torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 3, 3)
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(RuntimeError, match=f"^offset: expected torch.float32 or a narrower .* got {dtype}"):
                module.deform_conv2d(input, torch.zeros(2, 18, 3, 2, dtype=dtype), weight)

    def test_positions_of_half_types_are_widened(self, module):
        torch.manual_seed(0)
        features = [torch.randn(1, 4, 8, 6).half(), torch.randn(1, 4, 4, 3).half()]
        offset, mask = torch.randn(1, 18, 4, 3).half().requires_grad_(), torch.rand(1, 9, 4, 3).half().requires_grad_()
        level_weight, weight = torch.rand(1, 2).half().requires_grad_(), torch.randn(2, 2, 4, 3, 3).half()
        got = module.pyramid_deform_conv2d(features, offset, weight, None, mask, level_weight)
        wide = [tensor.detach().float().requires_grad_() for tensor in (offset, mask, level_weight)]
        expected = module.pyramid_deform_conv2d(features, wide[0], weight, None, *wide[1:])
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        for tensor, other in zip((offset, mask, level_weight), wide, strict=True):
            assert tensor.grad.dtype == torch.half
            assert torch.equal(tensor.grad, other.grad.half())


def convolve(module, **options):
    torch.manual_seed(0)
    input, offset, weight = torch.randn(1, 2, 5, 6), torch.randn(1, 18, 5, 6), torch.randn(3, 2, 3, 3)
    return module.deform_conv2d(input, offset, weight, **{"padding": 1, **options})


NO_INTEGERS = {
    "text": "same",
    "other text": "valid",
    "digits": "11",
    "bytes": b"ab",
    "none": None,
    "whole float": 1.0,
    "float": 1.5,
    "nan": float("nan"),
    "float of NumPy": np.float32(1),
    "bool": True,
    "bool of NumPy": np.bool_(True),
    "bool tensor": torch.tensor(True),
    "float tensor": torch.tensor(1.0),
    "tensor without data": torch.tensor(1, device="meta"),
    "complex": 1j,
    "dict": {1: 1, 2: 2},
    "set": {1, 2},
    "iterator": iter([1, 1]),
    "type": int,
    "no number": [],
    "one number": [1],
    "three numbers": (1, 1, 1),
    "tensor of one": torch.tensor([1]),
    "floats": [1, 1.0],
    "bools": (1, True),
    "texts": ["1", "1"],
    "lists": [[1, 1], [1, 1]],
    "negative": -1,
    "a negative one": (1, -1),
    "2^31": 2**31,
    "2^63": 2**63,
    "10^30": [1, 10**30],
    "more digits than Python writes": 10**5000,
}


@pytest.mark.parametrize("module", [ops, reference], ids=["operator", "reference"])
class TestIntegers:
    @pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
    @pytest.mark.parametrize("value", NO_INTEGERS.values(), ids=NO_INTEGERS.keys())
    def test_what_is_none_is_named(self, module, name, value):
        least = 0 if name == "padding" else 1
        text = f"^{name}: expected an integer from {least} to 2147483647, or two of them .vertical, horizontal., got ."
        with pytest.raises(RuntimeError, match=text) as error:
            convolve(module, **{name: value})
        assert len(str(error.value)) < 200
        if name == "dilation":
            with pytest.raises(RuntimeError, match=text):
                module.pyramid_deform_conv2d(good()["features"], good()["offset"], good()["weight"], dilation=value)

    def test_the_error_shows_what_came(self, module):
        with pytest.raises(RuntimeError, match=r"^padding: expected .*, got 'same'$"):
            convolve(module, padding="same")
        with pytest.raises(RuntimeError, match=r"^stride: expected .*, got \[1, 1\.0\]$"):
            convolve(module, stride=[1, 1.0])
        with pytest.raises(RuntimeError, match=r"^stride: expected .*, got Tensor \(1,\) of torch\.int64$"):
            convolve(module, stride=torch.tensor([1]))
        with pytest.raises(RuntimeError, match=r"^stride: expected .*, got (a number of type int|1000+\.\.\.)$"):
            convolve(module, stride=10**5000)

    @pytest.mark.parametrize(
        "two",
        [
            (1, 2),
            [np.int64(1), np.uint8(2)],
            np.array([1, 2]),
            torch.tensor([1, 2]),
            torch.Size([1, 2]),
            range(1, 3),
            (torch.tensor(1), np.array(2)),
        ],
        ids=repr,
    )
    def test_of_any_library_are_taken(self, module, two):
        expected = convolve(module, padding=(1, 2), dilation=(1, 2))
        assert torch.equal(convolve(module, padding=two, dilation=two), expected)

    @pytest.mark.parametrize("one", [np.int8(1), np.array(1), torch.tensor(1)], ids=repr)
    def test_one_of_any_library_is_taken(self, module, one):
        assert torch.equal(convolve(module, stride=one, padding=one, dilation=one), convolve(module))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_largest_read_where_they_say(self, module, dtype):
        """Every output pixel but the middle one is far from the map, and of its taps all but the middle one."""
        most = 2**31 - 1
        torch.manual_seed(0)
        input, weight = torch.randn(1, 2, 6, 7).to(dtype), torch.randn(3, 2, 3, 3).to(dtype)
        offset = torch.zeros(1, 18, 3, 3)
        got = module.deform_conv2d(input, offset, weight, stride=most, padding=most)
        expected = torch.zeros_like(got)
        expected[:, :, 1, 1] = (weight * input[:, :, :3, :3]).float().sum((1, 2, 3)).to(dtype)
        expected[:, :, 1, 2] = expected[:, :, 2, 1] = expected[:, :, 2, 2] = 0
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        got = module.pyramid_deform_conv2d([input], torch.zeros(1, 18, 6, 7), weight[None], dilation=most)
        expected = torch.einsum("nchw,oc->nohw", input, weight[:, :, 1, 1])
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("module", [ops, reference], ids=["operator", "reference"])
class TestOtherArguments:
    def call(self, module, **changed):
        names = ("features", "offset", "weight", "bias", "mask", "level_weight", "scales")
        return module.pyramid_deform_conv2d(**({name: good()[name] for name in names} | changed))

    @pytest.mark.parametrize(
        ("scales", "text"),
        [
            (1.0, "scales: expected a list of numbers, one a level, got 1.0"),
            ("12", "scales: expected a list of numbers, one a level, got '12'"),
            ({1.0, 2.0}, "scales: expected a list of numbers, one a level, got {1.0, 2.0}"),
            ([1.0, "2"], "scales[1]: expected a number above 0 and below 2147483648, got '2'"),
            ([True, 2.0], "scales[0]: expected a number above 0 and below 2147483648, got True"),
            ([1.0, None], "scales[1]: expected a number above 0 and below 2147483648, got None"),
            ([1.0, 1j], "scales[1]: expected a number above 0 and below 2147483648, got 1j"),
            ([-1, 1], "scales[0]: expected a number above 0 and below 2147483648, got -1"),
            ([1.0, float("nan")], "scales[1]: expected a number above 0 and below 2147483648, got nan"),
            # Infinite in float32.
            ([1e300, 1.0], "scales[0]: expected a number above 0 and below 2147483648, got 1e+300"),
            ([10**400, 1.0], "scales[0]: expected a number above 0 and below 2147483648, got 1000"),
            ([1.0], "scales: expected 2 numbers, one a level, got 1"),
        ],
        ids=repr,
    )
    def test_scales_that_are_not_numbers(self, module, scales, text):
        with pytest.raises(RuntimeError) as error:
            self.call(module, scales=scales)
        assert str(error.value).startswith(text)

    @pytest.mark.parametrize("scales", [(2, 1), [np.float32(2), Fraction(1)], np.array([2, 1]), torch.tensor([2.0, 1])])
    def test_scales_of_any_library_are_taken(self, module, scales):
        torch.manual_seed(0)
        arguments = {name: good()[name] for name in ("features", "offset", "weight")}
        expected = module.pyramid_deform_conv2d(**arguments, scales=[2.0, 1.0])
        assert torch.equal(module.pyramid_deform_conv2d(**arguments, scales=scales), expected)

    @pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask", "level_weight"])
    def test_no_tensors(self, module, name):
        for value, text in [
            (1.0, "1.0"),
            (np.zeros((2, 2)), r"ndarray \(2, 2\) of float64"),
            ([[1.0]], r"\[\[1\.0\]\]"),
        ]:
            with pytest.raises(RuntimeError, match=f"^{name}: expected a tensor, got {text}$"):
                self.call(module, **{name: value})

    def test_needed_tensors(self, module):
        for name in ("offset", "weight"):
            with pytest.raises(RuntimeError, match=f"^{name}: expected a tensor, got None$"):
                self.call(module, **{name: None})
        with pytest.raises(RuntimeError, match=r"^features\[1\]: expected a tensor, got None$"):
            self.call(module, features=[good()["features"][0], None])
        for value in (None, 3, {"p3": torch.zeros(1, 1, 2, 2)}, "p3"):
            with pytest.raises(RuntimeError, match=r"^features: expected a list of at least one level, got ['{N3]"):
                self.call(module, features=value)
        with pytest.raises(RuntimeError, match=r"^input: expected a tensor, got None$"):
            module.deform_conv2d(None, torch.zeros(2, 18, 3, 2), torch.zeros(2, 4, 3, 3))
        with pytest.raises(RuntimeError, match=r"^weight: expected a tensor, got None$"):
            module.deform_conv2d(torch.zeros(2, 4, 5, 4), torch.zeros(2, 18, 3, 2), None)
