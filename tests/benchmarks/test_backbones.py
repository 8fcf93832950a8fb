"""The table of docs/backbones.md is what the code says, and what it says is right."""

import pytest

from benchmarks import backbones


def cells(text):
    """The lines of a table as cells, by the first one."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first.strip("`"): [first, *rest] for first, *rest in lines if first.endswith(".yaml`")}


def test_every_configuration_has_its_line_in_the_committed_document():
    committed = cells(backbones.DOCUMENT.read_text(encoding="utf-8"))
    assert list(committed) == [f"{name}.yaml" for name in backbones.names()]
    for name in backbones.names():
        assert (committed[f"{name}.yaml"][2] == "timm") == (backbones._network_name(name) == "timm")
        assert committed[f"{name}.yaml"][-1] == backbones.PUBLISHED.get(name, "")


@pytest.mark.parametrize("name", ["R50", "CSPR50"])
def test_lines_are_what_the_code_says(name):
    if name == "CSPR50":
        pytest.importorskip("timm", reason="timm is not installed")
    committed = cells(backbones.DOCUMENT.read_text(encoding="utf-8"))
    assert backbones.row(name) == committed[f"{name}.yaml"], "write it again: python -m benchmarks.backbones"


def test_resnet_50_by_hand():
    # torchvision's, without the classifier and without batch normalization: 64 channels in the stem, and so on.
    stages = [(64, 3, 4), (128, 4, 8), (256, 6, 16), (512, 3, 32)]
    parameters, products, before = 3 * 64 * 49, 3 * 64 * 49 * 400 * 672, 64
    for width, blocks, stride in stages:
        fine = 800 * 1344 // (stride if width == 64 else stride // 2) ** 2  # of what the stage gets
        coarse = 800 * 1344 // stride**2
        for block in range(blocks):
            first, middle, last = before * width, 9 * width * width, width * 4 * width
            shortcut = before * 4 * width if block == 0 else 0
            parameters += first + middle + last + shortcut
            products += first * (fine if block == 0 else coarse) + (middle + last + shortcut) * coarse
            before = 4 * width
    assert backbones.row("R50")[3:5] == [f"{products / 1e9:.1f}", f"{parameters / 1e6:.1f}"]
