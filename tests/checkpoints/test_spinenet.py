"""SpineNet's weights from three other programs, by the names that these have for them."""

import hashlib
import logging
import pickle

import numpy as np
import pytest
import torch

from dyhead.backbones import SpineNetOptions
from dyhead.checkpoints import CheckpointError, convert
from dyhead.checkpoints.spinenet import _keras_order
from dyhead.cli import main
from dyhead.torchvision import build_model
from dyhead.torchvision.checkpoint import load_weights
from tests.backbones.test_spinenet import configured

OURS = "backbone.backbone.bottom_up.spinenet."
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"
# In tensorflow/tpu, of SpineNet-49 and of SpineNet-96, whose blocks are repeated.
TPU = {
    "49": {
        "conv2d/kernel": "stem.conv.weight",
        "batch_normalization/moving_mean": "stem.norm.running_mean",
        "conv2d_1/kernel": "blocks.0.0.shortcut.conv.weight",
        "batch_normalization_1/gamma": "blocks.0.0.shortcut.norm.weight",
        "conv2d_2/kernel": "blocks.0.0.conv1.conv.weight",
        "conv2d_5/kernel": "blocks.1.0.conv1.conv.weight",
        "batch_normalization_7/moving_variance": "blocks.1.0.conv3.norm.running_var",
        "sub_policy0/resample_with_alpha_resample_0_1/conv2d_1/kernel": "merges.2.1.expand.conv.weight",
        "sub_policy1/resample_with_alpha_resample_1_0/conv2d_1/kernel": "merges.3.0.down.conv.weight",
        "sub_policy2/resample_with_alpha_resample_2_0/batch_normalization_2/beta": "merges.4.0.expand.norm.bias",
        "sub_policy2/resample_with_alpha_resample_2_1/batch_normalization_1/beta": "merges.4.1.expand.norm.bias",
        "sub_policy1/scale_permuted_block_3/conv2d_1/kernel": "blocks.3.0.conv2.conv.weight",
        "sub_policy14/scale_permuted_block_16/conv2d_2/kernel": "blocks.16.0.conv3.conv.weight",
        "conv2d_8/kernel": "outputs.p3.conv.weight",
        "batch_normalization_12/gamma": "outputs.p7.norm.weight",
    },
    "96": {
        "conv2d_5/kernel": "blocks.0.1.conv1.conv.weight",
        "conv2d_8/kernel": "blocks.1.0.conv1.conv.weight",
        "batch_normalization_13/gamma": "blocks.1.1.conv3.norm.weight",
        "sub_policy0/scale_permuted_block_2/conv2d_3/kernel": "blocks.2.1.conv1.conv.weight",
        "sub_policy1/scale_permuted_block_3/conv2d_2/kernel": "blocks.3.1.conv1.conv.weight",
        "sub_policy7/scale_permuted_block_9/batch_normalization_3/beta": "blocks.9.1.conv2.norm.bias",
        "sub_policy13/scale_permuted_block_15/conv2d_5/kernel": "blocks.15.1.conv3.conv.weight",
        "conv2d_14/kernel": "outputs.p3.conv.weight",
        "conv2d_18/kernel": "outputs.p7.conv.weight",
    },
}
# In tensorflow/models, of SpineNet-49.
GARDEN = {
    "0/kernel": "stem.conv.weight",
    "1/moving_variance": "stem.norm.running_var",
    "2/_shortcut/kernel": "blocks.0.0.shortcut.conv.weight",
    "2/_norm0/beta": "blocks.0.0.shortcut.norm.bias",
    "2/_norm1/gamma": "blocks.0.0.conv1.norm.weight",
    "3/_conv3/kernel": "blocks.1.0.conv3.conv.weight",
    "4/kernel": "merges.3.0.squeeze.conv.weight",
    "10/moving_mean": "merges.3.0.down.norm.running_mean",
    "24/_conv2/kernel": "blocks.3.0.conv2.conv.weight",
    "25/_norm3/gamma": "blocks.2.0.conv3.norm.weight",
    "104/_conv1/kernel": "blocks.10.0.conv1.conv.weight",
    "169/_conv1/kernel": "blocks.16.0.conv1.conv.weight",
    "171/kernel": "outputs.p3.conv.weight",
    "180/gamma": "outputs.p7.norm.weight",
}


def tpu(size, tensor):
    """Of tensorflow/tpu's names those in TPU and, for the number of repeats, the second block's kernels."""
    repeats = {"49": 1, "96": 2}[size]
    second = [f"sub_policy0/scale_permuted_block_2/conv2d{f'_{i}' if i else ''}/kernel" for i in range(3 * repeats)]
    return {f"spinenet/{name}": tensor(name) for name in (*TPU[size], *second)}


def garden(names, tensor, layers=181):
    """Of tensorflow/models' names some and, for the number of layers, a tensor of each."""
    numbers = {name.split("/")[0] for name in names}
    others = {f"{i}/_norm1/gamma" for i in range(layers) if str(i) not in numbers}
    return {f"backbone/layer_with_weights-{name}{VARIABLE}": tensor(name) for name in (*names, *others)}


def tensor(name):
    return torch.rand((3, 3, 2, 5) if name.endswith("kernel") else (5,))


@pytest.mark.parametrize("size", TPU)
def test_names_of_tensorflow_tpu(size):
    state = tpu(size, tensor)
    conversion = convert(state)
    assert conversion.source == "SpineNet of tensorflow/tpu"
    assert "DIALECT tpu" in conversion.note
    for theirs, ours in TPU[size].items():
        expected = state[f"spinenet/{theirs}"]
        expected = torch.einsum("hwio->oihw", expected) if theirs.endswith("kernel") else expected
        assert torch.equal(conversion.state[OURS + ours], expected), theirs
    alone = convert({key.removeprefix("spinenet/"): value for key, value in state.items()})
    assert alone.state.keys() == conversion.state.keys()


def test_names_of_tensorflow_models():
    state = garden(GARDEN, tensor)
    conversion = convert(state)
    assert conversion.source == "SpineNet of tensorflow/models"
    assert "DIALECT garden" in conversion.note
    for theirs, ours in GARDEN.items():
        expected = state[f"backbone/layer_with_weights-{theirs}{VARIABLE}"]
        expected = torch.einsum("hwio->oihw", expected) if theirs.endswith("kernel") else expected
        assert torch.equal(conversion.state[OURS + ours], expected), theirs
    alone = convert({key.removeprefix("backbone/"): value for key, value in state.items()})
    assert alone.state.keys() == conversion.state.keys()


@pytest.mark.parametrize(
    ("repeats", "layers", "digest"),
    [
        (1, 181, "509373580af84a4c"),
        (2, 198, "94704451a74b386d"),
        (3, 215, "28e628f28f467806"),
        (4, 232, "543ba0ed132fcf94"),
    ],
)
def test_layers_are_in_the_order_that_keras_gives_them(repeats, layers, digest):
    """Digests of the names, one after the other, as tf-models-official 2.20.0 built and numbered them."""
    order = _keras_order(repeats)
    assert len(order) == layers
    assert hashlib.sha256(" ".join(order).encode()).hexdigest().startswith(digest)


PORT = {
    "conv1.conv.weight": "stem.conv.weight",
    "conv1.bn.running_var": "stem.norm.running_var",
    "init_block1.0.downsample.0.weight": "blocks.0.0.shortcut.conv.weight",
    "init_block1.0.downsample.1.bias": "blocks.0.0.shortcut.norm.bias",
    "init_block2.3.conv3.weight": "blocks.1.3.conv3.conv.weight",
    "scale_permuted_blocks.0.0.bn1.bias": "blocks.2.0.conv1.norm.bias",
    "scale_permuted_blocks.14.1.conv2.weight": "blocks.16.1.conv2.conv.weight",
    "merge_ops.1.resample_ops.0.downsample_conv.bn.weight": "merges.3.0.down.norm.weight",
    "merge_ops.14.resample_ops.1.squeeze_conv.conv.weight": "merges.16.1.squeeze.conv.weight",
    "merge_ops.2.resample_ops.1.expand_conv.bn.bias": "merges.4.1.expand.norm.bias",
    "endpoint_convs.3.conv.weight": "outputs.p3.conv.weight",
    "endpoint_convs.7.bn.running_mean": "outputs.p7.norm.running_mean",
}


@pytest.mark.parametrize(
    ("prefix", "source"), [("", "yan-roo"), ("backbone.", "yan-roo"), ("backbone.", "mmdetection")]
)
def test_names_of_the_port_alone_and_in_a_detector_of_mmdetection(prefix, source):
    state = {prefix + theirs: torch.rand(2) for theirs in PORT}
    head = {"bbox_head.retina_reg.weight": torch.rand(4, 2, 3, 3), "bbox_head.retina_reg.bias": torch.rand(4)}
    conversion = convert(state | (head if source == "mmdetection" else {}))
    assert conversion.source.startswith(source)
    for theirs, ours in PORT.items():
        assert torch.equal(conversion.state[OURS + ours], state[prefix + theirs])
    assert ("detector.head.deltas.bias" in conversion.state) == (source == "mmdetection")


def test_what_is_not_of_the_network_is_named():
    weights = garden(GARDEN, tensor)
    slot = f"backbone/layer_with_weights-0/kernel/.OPTIMIZER_SLOT/optimizer/average{VARIABLE}"
    others = [f"head/layer_with_weights-0/kernel{VARIABLE}", f"save_counter{VARIABLE}"]
    conversion = convert(weights | {slot: torch.rand(2)} | {key: torch.rand(1) for key in others})
    assert list(conversion.dropped) == [slot]
    assert list(conversion.left_over) == others
    conversion = convert(
        tpu("49", tensor) | {"spinenet/conv2d/kernel/Momentum": torch.rand(2), "class-0/bias": torch.rand(2)}
    )
    assert list(conversion.dropped) == ["spinenet/conv2d/kernel/Momentum"]
    assert list(conversion.left_over) == ["class-0/bias"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (garden(GARDEN, tensor, layers=183), "expected 181, 198, 215, 232 layers with weights in SpineNet, got 183"),
        (garden({}, lambda name: torch.rand(2)) | {f"backbone/layer_with_weights-0/kernel{VARIABLE}": torch.rand(3, 3)},
         r"layer_with_weights-0/kernel/.*: not of a shape that SpineNet of tensorflow/models has: \(3, 3\)"),
    ],
)  # fmt: skip
def test_what_is_no_spinenet_is_refused(state, message):
    with pytest.raises(CheckpointError, match=message):
        convert(state)


def test_a_file_of_tensorflows_arrays_is_converted_and_loads(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    network = SpineNetOptions("spinenet49s").build()
    state = {}
    for name, value in network.state_dict().items():
        layer, _, tensor = name.rpartition(".")
        kind = {"weight": "kernel" if value.ndim == 4 else "gamma", "bias": "beta"}
        kind |= {"running_mean": "moving_mean", "running_var": "moving_variance"}
        order = _keras_order(1)
        if tensor not in kind:
            continue
        if layer in order:
            key = f"{order.index(layer)}"
        else:
            block, part, of = layer.rsplit(".", 2)
            short = {"shortcut.conv": "_shortcut", "shortcut.norm": "_norm0"}.get(f"{part}.{of}", f"_{of}{part[-1]}")
            key = f"{order.index(block)}/{short}"
        array = value.permute(2, 3, 1, 0) if value.ndim == 4 else value
        state[f"backbone/layer_with_weights-{key}/{kind[tensor]}{VARIABLE}"] = array.numpy()
    state["_CHECKPOINTABLE_OBJECT_GRAPH"] = b"graph"
    (tmp_path / "garden.pkl").write_bytes(pickle.dumps(state | {f"global_step{VARIABLE}": np.int64(5)}))
    assert main(["convert", str(tmp_path / "garden.pkl"), str(tmp_path / "ours.pth")]) == 0
    assert "note: these weights need MODEL.SPINENET.DIALECT garden" in capsys.readouterr().out
    model = build_model(configured({}))
    for name in ("garden.pkl", "ours.pth"):
        load_weights(model, str(tmp_path / name), strict=False)
    assert caplog.text.count("garden.pkl: these weights need MODEL.SPINENET.DIALECT garden") == 1
    loaded = model.backbone.body.spinenet.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded[name], value) or name.endswith("num_batches_tracked"), name
