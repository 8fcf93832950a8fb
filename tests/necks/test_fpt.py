import inspect

import pytest
import torch

from dyhead.build import build_necks
from dyhead.config import ConfigError
from dyhead.layers import FPT
from dyhead.necks import NECKS, FPTOptions
from dyhead.options import leaves
from dyhead.torchvision import get_cfg
from tests.test_contract import CONFIGS, Detectron2, Torchvision

NECKS_OF = {"MODEL.NECKS": ["FPT", "DyHead"], "MODEL.DYHEAD.NUM_BLOCKS": 1}


def test_defaults_are_the_modules():
    parameters = inspect.signature(FPT).parameters
    assert {leaf.key.lower(): leaf.default for leaf in leaves(FPTOptions)} == {
        name: parameter.default for name, parameter in parameters.items() if name not in ("channels", "num_levels")
    }


def test_is_registered():
    assert NECKS["FPT"].node == "MODEL.FPT"
    assert NECKS["FPT"].options is FPTOptions


def test_builds_what_the_options_say():
    options = {"parts": 4, "similarity": "distance", "dropout": 0.0, "norm": "SyncBN"}
    torch.manual_seed(0)
    mine = FPTOptions(**options).build(8, 3)
    torch.manual_seed(0)
    same = FPT(8, 3, **options)
    assert repr(mine) == repr(same)
    for (name, got), (other, want) in zip(mine.state_dict().items(), same.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(got, want)


@pytest.mark.parametrize("strides", [[8], [8, 16, 32], [4, 8, 16, 32, 64, 128]])
def test_a_configuration_builds_it_for_the_levels_that_there_are(strides):
    cfg = get_cfg()
    cfg.MODEL.NECKS = ["FPT"]
    assert len(build_necks(cfg, ["FPT"], 8, strides).fpt.levels) == len(strides)


def test_asks_nothing_of_the_images_size():
    assert FPTOptions().size_divisibility((8, 16, 32)) == 1


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_both_engines_give_the_same_losses_and_read_each_others_checkpoints(name, tmp_path):
    file = CONFIGS / f"{name}_dyhead_R18_shapes.yaml"
    torch.manual_seed(0)
    options = NECKS_OF | {"MODEL.FPT.DROPOUT": 0.0}
    ours, theirs = Torchvision(file, options), Detectron2(file, options)
    image = torch.randint(0, 256, (3, 70, 97), dtype=torch.uint8)  # padded to 96 x 128: p5 has 3 x 4 cells
    targets = [(torch.tensor([[5.0, 6, 60, 50]]), torch.tensor([1]))]
    for source, other in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        source.save(tmp_path / "w.pth")
        assert sum("backbone.fpt.levels." in key for key in torch.load(tmp_path / "w.pth")["model"]) > 100
        other.load(tmp_path / "w.pth")
        expected, got = source.losses([image], targets), other.losses([image], targets)
        assert set(got) == set(expected)
        for loss, value in expected.items():
            torch.testing.assert_close(got[loss], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [Torchvision, pytest.param(Detectron2, marks=pytest.mark.detectron2)])
def test_options_that_do_not_fit_the_channels_are_refused(engine):
    file = CONFIGS / "atss_dyhead_R18_shapes.yaml"
    with pytest.raises(ConfigError, match=r"MODEL.NECKS \['FPT', 'DyHead'\] cannot be built as configured: parts: "):
        engine(file, NECKS_OF | {"MODEL.FPT.PARTS": 7})
