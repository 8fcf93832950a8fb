# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""What Detectron2's own build_optimizer, in anybody's trainer, makes of this project's keys."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, get_vit_lr_decay_rate
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.solver import build_optimizer, get_default_optimizer_params

import dyhead.detectron2
import dyhead.runs.optimizer
from dyhead.config import ConfigError, add_dyhead_config
from dyhead.detectron2 import DyHeadBackbone, except_necks
from dyhead.detectron2.solver import maybe_add_gradient_clipping


def config(ours=True, **solver):
    cfg = add_dyhead_config(get_cfg()) if ours else get_cfg()
    for key, value in {"BASE_LR": 0.01, "WEIGHT_DECAY": 0.2, "WEIGHT_DECAY_NORM": 0.1, **solver}.items():
        cfg.SOLVER[key] = value
    return cfg


def clipping(kind, value=0.01):
    cfg = config()
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_other_cfg(type(cfg)({"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": value}))
    return cfg


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def after_steps(model, optimizer):
    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "cfg",
    [
        config(OPTIMIZER="ADAMW"),
        config(OPTIMIZER="ADAMW", BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.0),
        config(OPTIMIZER="SGD", NESTEROV=True),
        clipping("full_model"),
        clipping("norm"),
        clipping("value"),
    ],
    ids=["AdamW", "AdamW with biases", "SGD", "full_model", "norm", "value"],
)
def test_steps_are_those_of_this_projects_trainers(cfg):
    ours, theirs = network(), network()
    expected = after_steps(ours, dyhead.runs.optimizer.build_optimizer(cfg, ours))
    for got, want in zip(after_steps(theirs, build_optimizer(cfg, theirs)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_class_of_optimizers_clips_the_whole_model_as_well():
    cfg, model = clipping("full_model", 0.5), network()
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(model.parameters(), lr=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.5)


def test_an_unknown_optimizer_is_refused_and_other_projects_keys_are_left_alone():
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER: expected 'SGD' or 'ADAMW', got 'LAMB'"):
        build_optimizer(config(OPTIMIZER="LAMB"), network())
    other = config(ours=False, OPTIMIZER="LAMB")
    assert type(build_optimizer(other, network())) is torch.optim.SGD
    own = torch.optim.RMSprop(network().parameters(), lr=0.1)  # what a project makes itself stays its own
    before = copy.deepcopy(own.state_dict())
    assert maybe_add_gradient_clipping(config(OPTIMIZER="ADAMW"), own) is own
    assert own.state_dict() == before


class Transformer(Backbone):
    """The names of a vision transformer's parameters."""

    def __init__(self, depth):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(16, 16)}) for _ in range(depth))

    def forward(self, x):
        raise NotImplementedError

    def output_shape(self):
        return {"last": ShapeSpec(channels=16, stride=16)}


def test_a_transformers_learning_rate_decay_leaves_dyhead_alone():
    vit = Transformer(depth=3)
    pyramid = SimpleFeaturePyramid(vit, "last", 16, scale_factors=(2.0, 1.0), square_pad=32)
    model = nn.ModuleDict({"backbone": DyHeadBackbone(pyramid, num_blocks=2)})
    theirs = partial(get_vit_lr_decay_rate, lr_decay_rate=0.5, num_layers=3)
    ours = pickle.loads(pickle.dumps(except_necks(theirs)))  # as LazyConfig's are
    rates = {}
    for group in get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=ours):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    assert theirs(next(name for name in names if "dyhead.blocks.0" in name)) == 0.5**3  # what is wrong without it
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (1.0 if ".dyhead." in name else theirs(name)), name
    assert rates[id(vit.blocks[1].attn.weight)] == 0.25
