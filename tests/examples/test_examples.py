"""The examples run as they stand, in an empty folder."""

import copy
import pickle
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from dyhead.checkpoints import read_state
from dyhead.checkpoints.block import DYNAMIC_HEAD
from dyhead.layers import DyHead, DyHeadBlock, ReleasedDyHeadBlock

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(name): what an example defines, without running it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    return lambda name: types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example"))


def test_a_detector_of_torchvision(load, capsys):
    example = load("torchvision_detector")
    example.main()
    printed = capsys.readouterr().out
    assert "classification" in printed
    assert "detections: [" in printed
    model = example.build(num_classes=4, num_blocks=1)
    assert sum(isinstance(module, DyHeadBlock) for module in model.modules()) == 1


def test_a_backbone_of_timm(load, capsys):
    pytest.importorskip("timm")
    load("timm_backbone").main()
    assert "resnet18 [128, 256, 512] [(2, 3, 19, 25), (2, 3, 10, 13), (2, 3, 5, 7)]" in capsys.readouterr().out


def test_a_tower_of_language_and_vision(load, capsys):
    load("glip_tower").main()
    assert capsys.readouterr().out == "[(1, 256, 16, 16), (1, 256, 8, 8), (1, 256, 4, 4)] ['hidden', 'masks']\n"


def test_the_tower_takes_the_blocks_of_glip(load):
    example = load("glip_tower")
    tower = example.build(num_blocks=2, channels=16)
    blocks = [ReleasedDyHeadBlock(16, zero_init_offset=False) for _ in range(2)]
    state = {}
    for place, block in zip((2, 5), blocks, strict=True):  # behind fusion and language layers
        for theirs, ours in DYNAMIC_HEAD.items():
            for kind in ("weight", "bias"):
                value = block.state_dict()[f"{ours}.{kind}"]
                state[f"module.rpn.head.dyhead_tower.{place}.{theirs}.{kind}"] = value
    torch.save({"model": state}, "glip.pth")
    example.load_blocks(tower, read_state("glip.pth"))
    levels = [torch.randn(1, 16, size, size) for size in (8, 4)]
    inputs = {"visual": levels, "lang": {"hidden": torch.randn(1, 5, 768)}}
    out = tower(inputs)
    expected = inputs
    for i, block in enumerate(blocks):
        expected = {"visual": block(tower[2 * i](expected)["visual"]), "lang": inputs["lang"]}
    assert out["lang"] is inputs["lang"]
    for a, b in zip(out["visual"], expected["visual"], strict=True):
        torch.testing.assert_close(a, b)


class Convolution(nn.Module):
    """Holds its convolution as `conv`, as Ultralytics' does."""

    def __init__(self, ins, outs):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Detect(nn.Module):
    """What the example uses of Ultralytics' class, of which nothing is here: constructor, attributes, a list in."""

    def __init__(self, nc=80, ch=()):
        super().__init__()
        self.nc = nc
        self.stride = torch.zeros(len(ch))
        self.cv2 = nn.ModuleList(nn.Sequential(Convolution(c, 16), nn.Conv2d(16, 64, 1)) for c in ch)
        self.cv3 = nn.ModuleList(nn.Conv2d(c, nc, 1) for c in ch)

    def bias_init(self):
        assert self.stride.gt(0).all()

    def forward(self, x):
        for i in range(len(self.cv2)):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), dim=1)
        return x


def test_a_head_in_the_manner_of_ultralytics(load, monkeypatch):
    modules = types.ModuleType("ultralytics.nn.modules")
    modules.Detect = Detect
    for name, module in (("ultralytics", types.ModuleType("u")), ("ultralytics.nn", types.ModuleType("n"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ultralytics.nn.modules", modules)
    example = load("ultralytics_head")
    monkeypatch.setitem(sys.modules, "example", example)  # where pickle looks the class up

    old = Detect(3, (8, 16, 24))
    old.i, old.f, old.stride = 22, [15, 18, 21], torch.tensor([8.0, 16.0, 32.0])
    layers = nn.Sequential(nn.Identity(), old)
    head = example.replace_head(layers, hidc=32, block_num=2)
    assert layers[-1] is head
    assert (head.i, head.f, head.stride.tolist()) == (22, [15, 18, 21], [8, 16, 32])
    assert isinstance(head, Detect)
    assert len(head.dyhead.blocks) == 2

    levels = [torch.randn(1, c, size, size) for c, size in ((8, 8), (16, 4), (24, 2))]
    given = list(levels)
    out = head(levels)
    assert [tuple(level.shape) for level in out] == [(1, 67, size, size) for size in (8, 4, 2)]
    assert all(a is b for a, b in zip(levels, given, strict=True))  # the graph's list stays as it is
    plain = Detect(3, (32,) * 3)
    plain.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("dyhead.")})
    head_alone = DyHead(in_channels=[8, 16, 24], out_channels=32, num_blocks=2)
    head_alone.load_state_dict(head.dyhead.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(out, plain(head_alone(levels)), strict=True))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert all(torch.equal(a, b) for a, b in zip(other(levels), out, strict=True))


def test_without_ultralytics_it_says_so(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(SystemExit, match="expected the package ultralytics"):
        load("ultralytics_head")
