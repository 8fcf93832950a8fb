# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import pytest

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model
from detectron2.utils.analysis import flop_count_operators

from dyhead.evaluation import count_flops

import torch  # isort: skip


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
def test_detectron2s_tools_count_the_operators_by_themselves(detector, tiny_cfg, inputs, caplog):
    model = build_model(tiny_cfg(detector)).eval()
    counted = flop_count_operators(model, inputs[:1])
    # One block of 32 channels on 64 x 96 pixels: every level reads itself and its neighbours by 3 x 3 weights.
    sizes = [8 * 12, 4 * 6, 2 * 3, 1 * 2, 1] if detector == "fcos" else [16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2]
    neighbours = [2, 3, 3, 3, 2]
    pixels = sum(size * levels for size, levels in zip(sizes, neighbours, strict=True))
    assert counted["pyramid_deform_conv2d"] == pytest.approx(pixels * 9 * 32 * 32 / 1e9)
    assert counted["affine_maximum"] > 0
    assert "dyhead::" not in caplog.text
    with torch.no_grad():
        torch_counter = count_flops(model, inputs[:1])
    assert sum(counted.values()) == pytest.approx(torch_counter, rel=0.03)  # without norms and upsampling
