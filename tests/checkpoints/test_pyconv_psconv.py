"""The names of iduta/pyconv and d-li14/PSConv, pair by pair, as far as their code says."""

import pytest
import torch

from dyhead.checkpoints import CheckpointError, convert
from dyhead.cli import main

NETWORK = "backbone.backbone.bottom_up."
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def block(conv2, downsample):
    """The keys of a network's first layers; of the 3x3 convolution as given, with shapes."""
    keys = {"conv1.weight": (4, 3, 7, 7), "fc.weight": (10, 16), "fc.bias": (10,)}
    keys |= {f"layer1.0.conv{i}.weight": (4, 4, 1, 1) for i in (1, 3)} | {f"layer1.0.{k}": v for k, v in conv2.items()}
    keys |= {f"layer1.0.downsample.{downsample}.weight": (16, 4, 1, 1)}
    norms = ["bn1", *(f"layer1.0.bn{i}" for i in (1, 2, 3)), f"layer1.0.downsample.{downsample + 1}"]
    keys |= {f"{norm}.{key}": () if key == "num_batches_tracked" else (4,) for norm in norms for key in NORM}
    torch.manual_seed(0)
    return {key: torch.randn(shape) for key, shape in keys.items()}


def pyconv():
    return block({f"conv2.conv2_{i}.weight": (1, 4, 2 * i + 1, 2 * i + 1) for i in range(1, 5)}, downsample=1) | {
        "layer4.2.conv2.weight": torch.randn(4, 4, 3, 3)
    }


def psconv(channels=4, groups=1, zero=True):
    read = channels // groups
    parts = {"gwconv": read // 4, "gwconv_shift": read // 4, "conv": read}
    state = block({f"conv2.{name}.weight": (channels, width, 3, 3) for name, width in parts.items()}, downsample=0)
    if zero:  # where the distance of the blocks is even
        o, c = torch.arange(channels)[:, None] * 4 // read, torch.arange(read) * 4 // read
        state["layer1.0.conv2.conv.weight"][(o - c) % 2 == 0] = 0
    return state


def test_kernels_of_pyconv_are_counted_from_0(check_account):
    state = pyconv()
    conversion = convert(state)
    assert conversion.source == "PyConv"
    check_account(state, conversion)
    assert set(conversion.left_over) == {"fc.weight", "fc.bias"}
    assert set(conversion.dropped) == {key for key in state if key.endswith("num_batches_tracked")}
    for i in range(1, 5):
        ours = conversion.state[f"{NETWORK}pyconv.layer1.0.conv2.levels.{i - 1}.weight"]
        assert ours is state[f"layer1.0.conv2.conv2_{i}.weight"]
    for key in ("conv1.weight", "layer1.0.bn2.running_var", "layer1.0.downsample.2.bias", "layer4.2.conv2.weight"):
        assert conversion.state[f"{NETWORK}pyconv.{key}"] is state[key]


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_of_psconvs_undilated_convolution_what_stands_for_something_is_taken(prefix, check_account):
    state = {prefix + key: x for key, x in psconv(8).items()}
    if prefix:
        state |= {"neck.lateral_convs.0.conv.weight": torch.randn(4, 4, 1, 1)}
    conversion = convert(state)
    assert conversion.source == ("mmdetection" if prefix else "PSConv")
    check_account(state, conversion)
    theirs, ours = f"{prefix}layer1.0.conv2.", f"{NETWORK}psconv.layer1.0.conv2."
    assert conversion.state[f"{ours}same.weight"] is state[f"{theirs}gwconv.weight"]
    assert conversion.state[f"{ours}opposite.weight"] is state[f"{theirs}gwconv_shift.weight"]
    rest, whole = conversion.state[f"{ours}rest.weight"], state[f"{theirs}conv.weight"]
    # Two channels a block; even blocks read the odd ones.
    assert torch.equal(rest[[0, 1, 4, 5]], whole[[0, 1, 4, 5]][:, [2, 3, 6, 7]])
    assert torch.equal(rest[[2, 3, 6, 7]], whole[[2, 3, 6, 7]][:, [0, 1, 4, 5]])
    for key in ("conv1.weight", "bn1.bias", "layer1.0.bn2.weight", "layer1.0.downsample.0.weight"):
        assert conversion.state[f"{NETWORK}psconv.{key}"] is state[prefix + key]


@pytest.mark.parametrize("zero", [True, False])
def test_of_several_groups_all_weights_are_taken(zero):
    state = psconv(16, groups=2, zero=zero)
    ours = convert(state).state[f"{NETWORK}psconv.layer1.0.conv2.rest.weight"]
    assert ours is state["layer1.0.conv2.conv.weight"]


@pytest.mark.parametrize("where", [(0, 0), (0, 2), (3, 1)])
def test_weights_that_no_others_stand_for_are_refused_by_name(where, tmp_path, capsys):
    state = psconv()
    state["layer1.0.conv2.conv.weight"][where][1, 1] = -0.25
    torch.save(state, tmp_path / "ps.pth")
    message = "layer1.0.conv2.conv.weight: expected 0 where the dilated convolutions read, got 1 other weights of 72"
    with pytest.raises(CheckpointError, match=message):
        convert(state)
    assert main(["convert", str(tmp_path / "ps.pth"), str(tmp_path / "out.pth")]) == 1
    assert not (tmp_path / "out.pth").exists()
    assert f"ps.pth: {message}, up to 0.25. Only a network with MODEL.PSCONV.DENSE True" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (4, 3, 3, 3), (6, 6, 3, 3), (0, 0, 3, 3)])
def test_weights_of_odd_shapes_are_refused_by_name(shape):
    state = psconv() | {"layer1.0.conv2.conv.weight": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"layer1.0.conv2.conv.weight: expected \(C, C / groups, 3, 3\), .*got"):
        convert(state)
