"""What DyHead costs beside the towers that it replaces, against the paper's table of depths (its Table 3)."""

from pathlib import Path

import pytest
import torch

from dyhead.config import load_config
from dyhead.evaluation import count_flops
from dyhead.torchvision import build_model, get_cfg

CONFIGS = Path(__file__).parents[1] / "configs"
LEVELS = [100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11]  # of an image of 800 x 1344 pixels, P3 to P7


def gflops(name, **dyhead):
    cfg = get_cfg()
    opts = {"MODEL.DEVICE": "cpu", **{f"MODEL.DYHEAD.{key}": value for key, value in dyhead.items()}}
    load_config(cfg, CONFIGS / f"{name}.yaml", [str(word) for pair in opts.items() for word in pair])
    model = build_model(cfg).eval().to("meta")
    image = torch.empty(1, 3, 800, 1344, device="meta")
    return count_flops(lambda x: model.detector(model.backbone(x)), image)


def test_two_blocks_save_what_the_paper_says():
    baseline = gflops("atss_R50")
    # The paper counts the released block, whose coarser level is convolved before it is resized: 63.45.
    assert baseline - gflops("atss_dyhead_R50", BLOCK="released", NUM_BLOCKS=2) == pytest.approx(63.45, rel=0.01)

    # Eq. 4 samples every level at every place: 3 x 3 weights and the convolution of 18 offsets and 9 importances.
    levels = [2, 3, 3, 3, 2]
    block = sum(9 * 256 * (256 * n + 27) * size for n, size in zip(levels, LEVELS, strict=True)) / 1e9
    towers = 8 * 9 * 256 * 256 * sum(LEVELS) / 1e9
    assert baseline - gflops("atss_dyhead_R50", NUM_BLOCKS=2) == pytest.approx(towers - 2 * block, abs=0.15)
