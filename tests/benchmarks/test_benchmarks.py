"""The programs run and write valid results. Nothing here asserts how long anything takes."""

import json
import math
import os

import pytest
import torch
from PIL import Image

from benchmarks import (
    additions,
    block,
    border,
    composition,
    detector,
    kernels,
    measure,
    operator,
    program,
    regions,
    scaling,
)
from dyhead.layers import DyHead
from dyhead.ops import reference

TINY = ["--threads", "1", "--repeats", "3", "--seconds", "0", "--quick"]


def read(path, peers, cases):
    """The JSON at `path`, after checking what all programs write."""
    result = json.loads(path.read_text())
    assert len(result["cases"]) == cases
    assert result["command"].startswith(f"python -m benchmarks.{result['benchmark']} --threads 1")
    assert {"device", "threads", "torch", "cpus", "operator", "packages"} <= result["machine"].keys()
    for row in result["cases"]:
        assert set(peers) <= row["measured"].keys()
        for values in row["measured"].values():
            ms = values["ms"]
            assert 0 < ms["lower_quartile"] <= ms["median"] <= ms["upper_quartile"]
            assert values["runs"] == 3
        for ratio in row["ratios"].values():
            assert ratio["time"]["median"] > 0
    return result


def test_operator_compares_all_peers_that_are_there(tmp_path, capsys):
    file = tmp_path / "new" / "operator.json"
    options = ["--sizes", "4x5", "--dtype", "float32", "--levels", "1", "--modes", "forward"]
    operator.main([*TINY, *options, "--output", str(file)])
    result = read(file, ["ours, channels_last", "ours, NCHW", "torchvision", "dense, NCHW", "copy"], cases=1)
    row = result["cases"][0]
    assert row["measured"]["torchvision"]["mib"] >= 0
    assert list(row["ratios"]) == ["torchvision / ours", "ours / dense"]
    for engine in ("OpenVINO", "ONNX Runtime"):
        assert engine in row["measured"] or "not installed" in result["skipped"][engine][0]
    printed = capsys.readouterr().out
    assert "| torchvision / ours | ours / dense |" in printed
    assert program.table(result, "ms") in printed
    assert program.table(result, "mib") in printed


def test_operator_compares_gradients_and_levels(tmp_path):
    file = tmp_path / "operator.json"
    options = ["--sizes", "4x5", "--dtype", "float32", "--modes", "forward+backward", "--no-memory"]
    operator.main([*TINY, *options, "--output", str(file)])
    result = read(file, ["ours, channels_last", "ours, NCHW", "torchvision", "dense, NCHW", "copy"], cases=2)
    assert [row["case"]["levels"] for row in result["cases"]] == [1, 3]


def test_operator_says_that_torchvision_has_no_bfloat16(tmp_path):
    file = tmp_path / "operator.json"
    options = ["--sizes", "4x5", "--dtype", "bfloat16", "--modes", "forward", "--levels", "1", "--no-memory"]
    operator.main([*TINY, *options, "--output", str(file)])
    result = read(file, ["ours, channels_last", "dense, NCHW"], cases=1)
    assert "torchvision" not in result["cases"][0]["measured"]
    assert result["skipped"]["torchvision"] == ["has no bfloat16 on a CPU"]
    assert "mib" not in result["cases"][0]["measured"]["ours, NCHW"]


def test_border_alignment_is_compared_with_the_same(tmp_path):
    file = tmp_path / "border.json"
    border.main([*TINY, "--no-memory", "--output", str(file)])
    result = read(file, ["ours, channels_last", "ours, NCHW", "definition", "grid_sample"], cases=2)
    assert list(result["cases"][1]["ratios"]) == ["definition / ours NCHW", "grid_sample / ours NCHW"]
    case = border.Case("forward", "float32", (7, 9), channels=3)
    ours, composed = (border.build(case, peer, torch.device("cpu"))() for peer in ("ours, NCHW", "grid_sample"))
    torch.testing.assert_close(ours, composed, rtol=1e-4, atol=1e-4)


def test_deformable_roi_pooling_is_compared_with_the_same(tmp_path):
    file = tmp_path / "regions.json"
    regions.main([*TINY, "--no-memory", "--output", str(file)])
    result = read(file, ["ours, channels_last", "ours, NCHW", "definition"], cases=4)
    assert [row["case"]["moved"] for row in result["cases"]] == [True, False] * 2
    assert list(result["cases"][1]["ratios"]) == ["definition / ours NCHW", "torchvision / ours NCHW"]
    assert result["skipped"] == {"torchvision": ["moves no cell"]}


def test_block_compares_with_the_composition(tmp_path):
    file = tmp_path / "block.json"
    block.main([*TINY, "--no-memory", "--output", str(file)])
    result = read(file, ["ours", "composition"], cases=4)
    assert {(row["case"]["block"], row["case"]["mode"]) for row in result["cases"]} == {
        ("paper", "inference"),
        ("paper", "training"),
        ("released", "inference"),
        ("released", "training"),
    }


def test_detector_compares_with_the_composition(tmp_path):
    file = tmp_path / "detector.json"
    options = ["--modes", "inference", "--peers", "ours", "composition", "--no-memory"]
    detector.main([*TINY, *options, "--output", str(file)])
    read(file, ["ours", "composition"], cases=len(detector.NAMES))


def test_detector_compares_heads(tmp_path):
    file = tmp_path / "detector.json"
    options = ["--modes", "training", "--detectors", "fcos", "faster_rcnn", "--no-memory"]
    detector.main([*TINY, *options, "--output", str(file)])
    result = read(file, ["standard", "3 blocks", "ours", "released", "composition"], cases=2)
    for row in result["cases"]:
        assert {"3 blocks / standard", "ours / standard", "released / standard"} <= row["ratios"].keys()


def test_scaling_draws_a_plot(tmp_path):
    file = tmp_path / "scaling.json"
    options = ["--varied", "levels", "threads", "--modes", "inference", "--no-memory"]
    scaling.main([*TINY, *options, "--output", str(file)])
    result = read(file, ["ours", "composition"], cases=6)
    assert [scaling.value(row["case"]) for row in result["cases"]] == [1, 2, 3, 4, 5, 1]
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.width >= image.height > 100


def test_peers_take_turns():
    order = []

    def build(case, peer, device):
        assert (case, device.type) == ("case", "cpu")
        if peer == "absent":
            raise measure.Unavailable("not here")
        return lambda: order.append(peer)

    threads = torch.get_num_threads()
    samples, reasons, others = measure.sample_times(
        build, "case", ["a", "absent", "b"], device="cpu", threads=threads, repeats=4, seconds=60, same=[], tolerance=0
    )
    assert {peer: len(values) for peer, values in samples.items()} == {"a": 4, "b": 4}
    assert reasons == {"absent": "not here"}
    assert others is None or -0.5 < others <= os.cpu_count() + 0.5
    turns = [peer for i, peer in enumerate(order) if i == 0 or peer != order[i - 1]]
    assert turns == ["a", "b"] * 6  # warm-up, how long a call takes, four rounds


def test_peers_that_compute_something_else_are_not_compared():
    def build(case, peer, device):
        return lambda: torch.tensor([1.0, 2.0 if peer == "a" else 2.1])

    with pytest.raises(AssertionError, match=r"a and b: result 0 differs by 5.0e-02"):
        measure.sample_times(
            build, "case", ["a", "b"], device="cpu", threads=torch.get_num_threads(), repeats=1, seconds=0,
            same=["a", "b"], tolerance=1e-3,
        )  # fmt: skip


def allocate_twice(case, peer, device):
    """Allocates 64 MiB, and then 32 MiB more."""
    return lambda: (torch.ones(64, 2**20, dtype=torch.uint8), torch.ones(32, 2**20, dtype=torch.uint8))


def test_peak_memory_is_what_a_call_takes():
    mib = measure.in_fresh_process(measure.peak_memory, allocate_twice, "case", "a", "case", device="cpu", threads=1)
    assert mib == pytest.approx(96, abs=8)


def test_composition_of_one_level_is_the_operator():
    torch.manual_seed(0)
    feature, offset = torch.randn(2, 4, 5, 7), torch.randn(2, 18, 5, 7)
    weight, mask, share = torch.randn(1, 6, 4, 3, 3), torch.rand(2, 9, 5, 7), torch.rand(2, 1)
    arguments = [feature], offset, weight, torch.randn(6), mask, share
    torch.testing.assert_close(
        composition.pyramid_deform_conv2d(*arguments), reference.pyramid_deform_conv2d(*arguments)
    )


def test_composition_resizes_the_other_levels():
    torch.manual_seed(0)
    levels = [torch.randn(1, 4, *size) for size in [(10, 14), (5, 7), (3, 4)]]
    resized = [torch.nn.functional.interpolate(level, (5, 7), mode="bilinear") for level in levels]
    offset, weight, share = torch.randn(1, 18, 5, 7), torch.randn(3, 6, 4, 3, 3), torch.rand(1, 3)
    torch.testing.assert_close(
        composition.pyramid_deform_conv2d(levels, offset, weight, level_weight=share, scales=[2, 1, 0.5]),
        reference.pyramid_deform_conv2d(resized, offset, weight, level_weight=share),
    )


def test_composition_takes_the_place_of_the_operator_only_within():
    torch.manual_seed(0)
    head = DyHead(32, 1, block="paper")
    torch.nn.init.normal_(head.blocks[0].spatial_attention.offset.bias)
    levels = [torch.randn(1, 32, 8, 8), torch.randn(1, 32, 4, 4)]
    ours = head(levels)
    with composition.composition():
        other = head(levels)
    assert not torch.allclose(ours[0], other[0])
    torch.testing.assert_close(head(levels), ours, rtol=0, atol=0)
    with composition.composition(False):
        torch.testing.assert_close(head(levels), ours, rtol=0, atol=0)


def test_levels_halve_rounding_up():
    assert program.pyramid_sizes((100, 168), 5) == [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (3910.4, "3910"), (None, "-")],
)
def test_numbers_have_three_digits(value, text):
    assert program.number(value) == text
    assert program.number(math.nan) == "-"


def test_kernels_ask_for_a_cuda_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "expected a CUDA device, found none" in capsys.readouterr().err


@pytest.mark.cuda
def test_kernels_take_the_time_of_a_pass(tmp_path, capsys):
    options = ["--size", "8x9", "--channels", "16", "--batch", "1", "--repeats", "2", "--levels", "1"]
    result = kernels.main([*options, "--blocks", "paper", "--output", str(tmp_path / "kernels.json")])
    names = " ".join(result["cases"][0]["kernels, ms"])
    assert all(kernel in names for kernel in ("Forward", "SampleGradient", "WeightGradient"))
    assert any("AffineMaximumGradient" in name for name in result["cases"][1]["kernels, ms"])
    assert result["cases"][1]["launches"] > result["cases"][0]["launches"] > 3
    said = capsys.readouterr().out
    assert "floor: additions" in said
    assert "training step of six blocks (paper)" in said


@pytest.mark.cuda
def test_operator_runs_on_a_gpu(tmp_path):
    file = tmp_path / "operator.json"
    options = ["--device", "cuda", "--sizes", "4x5", "--dtype", "bfloat16", "--modes", "forward+backward"]
    operator.main([*TINY, *options, "--output", str(file)])
    read(file, ["ours, channels_last", "ours, NCHW", "torchvision, float16", "dense, channels_last"], cases=2)


def test_no_peer_is_timed_while_threads_of_the_last_one_compute(monkeypatch):
    pause, slept = measure._PAUSE_SECONDS, []
    # What the process has computed before and after three pauses: in the third, next to nothing.
    spent = iter([0, pause, pause, 1.5 * pause, 1.5 * pause, 1.55 * pause])
    monkeypatch.setattr(measure.time, "process_time", lambda: next(spent))
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    measure._wait_for_threads()
    assert slept == [pause] * 3


def test_additions_without_windows_are_corners_inside_the_level():
    """Of 8 x 8 pixels without offsets a tap's rows have 14, 15 or 13 corners inside, and so have its columns."""
    assert additions.corners(torch.zeros(1, 18, 8, 8), 1.0, (8, 8)) == (14 + 15 + 13) ** 2
    far = torch.zeros(1, 18, 8, 8)
    far[:, ::2] = 100.0
    assert additions.corners(far, 1.0, (8, 8)) == 0
    # Pixel i of a level of half the size is at 2 i + 1/2: the output's 2 and 3 read it, and the next one, by quarters.
    assert additions.corners(torch.zeros(1, 18, 4, 4), 0.5, (2, 2)) == sum(
        (math.floor(y) + corner in (0, 1)) for y in [0.5 * (i + r - 0.5) - 0.5 for i in range(4) for r in range(3)]
        for corner in (0, 1)
    ) ** 2  # fmt: skip


def test_table_of_additions_has_a_row_for_each_deviation():
    cases = [
        {"scale": scale, "deviation": deviation, "without": 72 * scale, "with": 8.0, "ratio": 9 * scale}
        for scale in (1.0, 2.0)
        for deviation in (0.0, 4.0)
    ]
    lines = additions.table({"size": [2, 4], "cases": cases}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0", "4"]
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["9.00", "1.00", "9.00", "18.0", "1.00", "18.0"]
