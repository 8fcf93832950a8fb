"""Loading canonical weights into models whose modules have other names."""

import logging

import pytest
import torch
from torch import nn

from dyhead.checkpoints import CheckpointError, Conversion, load_into


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("normalizer", torch.tensor(100.0))


NAMES = {
    "head.weight": "detector.head.logits.weight",
    "head.bias": "detector.head.logits.bias",
    "normalizer": "detector.loss_normalizer.average",
}


@pytest.fixture
def weights():
    """Weights that fit a Model, from a file that calls the head `cls`."""
    state = {NAMES.get(key, key): torch.rand_like(value.float()) for key, value in Model().state_dict().items()}
    renamed = {"cls.weight": "detector.head.logits.weight", "cls.bias": "detector.head.logits.bias"}
    return Conversion(state, "theirs", renamed | {key: key for key in state if not key.startswith("detector.head")})


def load(weights, *, strict=True):
    model = Model()
    load_into(model, weights, NAMES, strict=strict, origin="checkpoint w.pth")
    return model


def test_weights_are_loaded_under_the_models_own_names(weights):
    loaded = load(weights).state_dict()
    for key, value in loaded.items():
        if key != "norm.num_batches_tracked":
            assert torch.equal(value, weights.state[NAMES.get(key, key)]), key


def test_without_names_the_models_are_canonical():
    model = nn.Linear(2, 3)
    state = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    load_into(model, Conversion(state, "ours"), strict=True, origin="w")
    assert torch.equal(model.bias, state["bias"])


@pytest.mark.parametrize("key", ["detector.loss_normalizer.average", "norm.num_batches_tracked"])
def test_what_training_alone_needs_may_be_missing(weights, key, caplog):
    caplog.set_level(logging.INFO)
    del weights.state[key]
    model = load(weights)
    assert model.normalizer == (
        100 if key.startswith("detector") else weights.state["detector.loss_normalizer.average"]
    )
    assert "Loaded 7 of 8 tensors from checkpoint w.pth (theirs)" in caplog.text
    assert "Not loaded" not in caplog.text


def test_counters_of_a_norm_that_is_frozen_here_do_no_harm(weights):
    weights.state["backbone.norm.num_batches_tracked"] = torch.tensor(3)
    load(weights)


def spoil(weights):
    del weights.state["norm.running_mean"]
    weights.state["detector.head.logits.weight"] = torch.rand(5, 2)
    weights.state["detector.head.quality.weight"] = torch.rand(1)
    weights.renamed["ctr.weight"] = "detector.head.quality.weight"
    weights.left_over["fc.weight"] = "ImageNet's classifier"


PROBLEMS = (
    "  missing in the file: norm.running_mean\n"
    "  not in the model: ctr.weight\n"
    "  of another shape: head.weight (5, 2) in the file, (3, 2) in the model\n"
    "  without a counterpart in any model (ImageNet's classifier): fc.weight"
)


def test_strict_loading_names_all_that_does_not_fit_in_one_error_and_loads_nothing(weights):
    spoil(weights)
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_into(model, weights, NAMES, strict=True, origin="checkpoint w.pth")
    assert str(error.value) == f"checkpoint w.pth (theirs) does not fit the model (6 of 8 tensors do)\n{PROBLEMS}"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "left over"])
def test_each_fault_alone_is_an_error_of_strict_loading(weights, fault):
    if fault == "missing":
        del weights.state["norm.bias"]
    elif fault == "surplus":
        weights.state["x"] = torch.rand(1)
    elif fault == "shape":
        weights.state["norm.bias"] = torch.rand(5)
    else:
        weights.left_over["x"] = "why"
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(weights)
    load(weights, strict=False)


def test_otherwise_what_fits_is_loaded_and_the_rest_logged(weights, caplog):
    caplog.set_level(logging.INFO)
    spoil(weights)
    model = load(weights, strict=False)
    assert torch.equal(model.head.bias, weights.state["detector.head.logits.bias"])
    assert model.head.weight.shape == (3, 2)
    assert PROBLEMS in caplog.records[-1].getMessage()


def test_weights_of_which_nothing_fits_are_always_an_error():
    with pytest.raises(CheckpointError, match=r"does not fit the model \(0 of 8 tensors do\)"):
        load(Conversion({"x": torch.rand(1)}, "theirs"), strict=False)


def test_a_vector_that_does_not_fit_is_named_as_the_file_does(weights):
    weights.state["detector.head.delta_scale"] = torch.rand(5)
    weights.renamed.update({f"scales.{i}.scale": f"detector.head.delta_scale[{i}]" for i in range(5)})
    with pytest.raises(CheckpointError, match=r"not in the model: scales\.0\.scale$"):
        load(weights)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(weights, strict, dtype, caplog):
    caplog.set_level(logging.INFO)
    weights.state["norm.bias"] = weights.state["norm.bias"].to(dtype)
    message = f"of another type: norm.bias {dtype} in the file, torch.float32 in the model"
    if strict:
        with pytest.raises(CheckpointError, match=message):
            load(weights)
    else:
        load(weights, strict=False)
        assert message in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_weights_that_become_infinite_in_the_model_are_refused(weights, strict):
    weights.state["norm.bias"] = torch.tensor([1.0, 1e300], dtype=torch.float64)
    with pytest.raises(
        CheckpointError, match=r"expected weights that torch\.float32 holds, got larger ones in norm\.b"
    ):
        load(weights, strict=strict)


PARTS = {
    "backbone.backbone.bottom_up.conv.weight": (4, 3),
    "backbone.backbone.bottom_up.norm.weight": (4,),
    "backbone.backbone.bottom_up.norm.num_batches_tracked": (),
    "backbone.backbone.fpn_lateral3.weight": (8, 4),
    "backbone.backbone.fpn_output3.weight": (8, 4),
    "backbone.backbone.fpn_output3.bias": (8,),
    "detector.head.logits.weight": (5, 8),
    "detector.head.logits.bias": (5,),
    "detector.loss_normalizer.average": (),
}


def detector():
    model = nn.Module()
    for key, shape in PARTS.items():
        *path, name = key.split(".")
        owner = model
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_buffer(name, torch.zeros(shape))
    return model


def named(key):
    """A full key from a part of it."""
    return next(full for full in PARTS if key in full)


@pytest.mark.parametrize(
    ("theirs", "fits"),
    [
        ({key: () for key in ("conv.weight", "norm.weight")}, True),  # the network alone
        ({"conv.weight": ()}, True),  # what there is of it
        ({"fpn_output3.weight": (), "fpn_output3.bias": (), "conv.weight": (9, 9), "norm.weight": (9,)}, True),
        ({"logits.weight": (7, 8), "logits.bias": (7,), "conv.weight": (), "norm.weight": ()}, True),  # other classes
        ({"conv.weight": (9, 9), "norm.weight": ()}, False),  # another network with vectors of one length
        ({"fpn_output3.weight": (8, 9), "fpn_output3.bias": (), "logits.weight": (5, 9), "logits.bias": ()}, False),
        ({"fpn_output3.weight": (), "fpn_lateral3.weight": (8, 9)}, False),
        ({"logits.bias": ()}, False),  # vectors alone
        ({"num_batches_tracked": ()}, False),
        ({"loss_normalizer": ()}, False),
        ({"num_batches_tracked": (), "loss_normalizer": (), "conv.weight": (9, 9)}, False),
    ],
)
def test_training_starts_from_weights_of_which_a_part_fits_and_not_from_the_odd_tensor(theirs, fits, caplog):
    caplog.set_level(logging.INFO)
    state = {named(key): torch.ones(shape or PARTS[named(key)]) for key, shape in theirs.items()}
    weights = Conversion(state, "theirs", {key: key for key in state})
    if fits:
        load_into(detector(), weights, strict=False, origin="w")
        count = sum(not shape for shape in theirs.values())
        assert f"Loaded {count} of {len(PARTS)} tensors" in caplog.text
    else:
        with pytest.raises(CheckpointError, match="w .* does not fit the model"):
            load_into(detector(), weights, strict=False, origin="w")


@pytest.mark.parametrize(("count", "fits"), [(1, False), (2, True)])
def test_the_odd_tensor_of_a_large_model_does_not_start_a_training(count, fits):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    state = {f"{i}.weight": torch.ones(2, 2) for i in range(count)} | {f"{i}.bias": torch.ones(2) for i in range(40)}
    weights = Conversion(state, "theirs")
    if fits:
        load_into(model, weights, strict=False, origin="w")
        assert model[1].weight.tolist() == [[1, 1], [1, 1]]
    else:
        with pytest.raises(CheckpointError, match=r"does not fit the model \(41 of 80 tensors do\)"):
            load_into(model, weights, strict=False, origin="w")
