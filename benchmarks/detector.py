"""How fast are the torchvision engine's detectors, with their standard heads and with DyHead?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.block import COMPILED, RATIOS
from benchmarks.composition import composition
from benchmarks.program import Benchmark, parser, run, size
from dyhead.config import load_config, num_classes
from dyhead.detection import DETECTORS
from dyhead.torchvision import build_model, get_cfg

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {"R18": "quickstart/{}_R18_shapes.yaml", "R50": "{}_R50.yaml"}
SIZES = {"R18": (192, 256), "R50": (800, 1333)}

# What each eager peer's head is: the end of the detector's name in its file, and keys.
_HEADS = {
    "standard": ("", ()),
    "3 blocks": ("_dyhead", ("MODEL.DYHEAD.NUM_BLOCKS", "3")),
    "4 blocks": ("_dyhead", ("MODEL.DYHEAD.NUM_BLOCKS", "4")),
    "ours": ("_dyhead", ()),
    "released": ("_dyhead", ("MODEL.DYHEAD.BLOCK", "released")),
    "composition": ("_dyhead", ()),
}
NAMES = [*(detector.name.lower() for detector in DETECTORS.values()), "faster_rcnn"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        detector: a registered detector in lower case, or "faster_rcnn".
        backbone: "R18" (quickstart) or "R50" (full).
        mode: "inference", including post-processing, or "training": losses, backward, and a step of SGD.
        size: (height, width) of the images.
        dtype: "float32", or "bfloat16" by autocast.
        batch: number of images.
        threads: number of PyTorch's threads.
    """

    detector: str
    backbone: str
    mode: str
    size: tuple[int, int]
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """One inference or training step on random images with random weights."""
    kind, _, compiled = peer.partition(", ")
    end, keys = _HEADS[kind]
    cfg = get_cfg()
    load_config(cfg, CONFIGS / FILES[case.backbone].format(case.detector + end), keys)
    torch.manual_seed(0)
    model = build_model(cfg).to(device)
    # Zero-initialised offsets would read at whole pixels. Set by the bias, since random weights give levels any scale.
    for name, module in model.named_modules():
        if name.endswith("offset"):
            nn.init.normal_(module.bias, std=2)
    if compiled:
        model.backbone = torch.compile(model.backbone)
    height, width = case.size
    images = [torch.rand(3, height, width, device=device) * 255 for _ in range(case.batch)]
    corners = torch.rand(8, 2, device=device) * torch.tensor([width, height], device=device) / 2
    sides = corners.new_tensor([width, height]) * torch.linspace(0.05, 0.45, 8, device=device)[:, None]
    target = {
        "boxes": torch.cat([corners, corners + sides], dim=1),
        "labels": torch.arange(8, device=device) % num_classes(cfg),
    }
    targets = [target] * case.batch

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if case.dtype == "bfloat16" else nullcontext()

    if case.mode == "inference":
        model.eval()

        def infer() -> None:
            with composition(kind == "composition"), torch.no_grad(), autocast():
                model(images)

        return infer

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-9)

    def train() -> None:
        with composition(kind == "composition"):
            with autocast():
                loss = sum(model(images, targets).values())
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    return train


def warm(case: Case, peer: str) -> Case:
    """The case that runs before memory is measured: a small image; compiled code is specialised to one size."""
    return case if peer.endswith("compiled") else replace(case, backbone="R18", size=(64, 64), batch=1)


BENCHMARK = Benchmark(
    name="detector",
    question="How fast are the detectors of the torchvision engine, in inference and in a training step?",
    build=build,
    peers={
        "standard": "the detector without DyHead; dense ones have two towers of four convolutions",
        "3 blocks": "with three DyHead blocks, 0.88 of the multiply-adds of those towers at 256 channels",
        "4 blocks": "with four, 1.18 of them",
        "ours": "with DyHead as its file has it: six blocks (R50), two (R18)",
        "released": "with as many of the published block",
        "composition": "ours, but on torchvision.ops.deform_conv2d",
        "ours, compiled": "ours, backbone, pyramid and DyHead under torch.compile",
        "composition, compiled": "the composition in the same way",
    },
    columns={kind: (kind,) for kind in _HEADS} | COMPILED,
    ratios=(*((kind, "standard") for kind in ("3 blocks", "4 blocks", "ours", "released")), *RATIOS),
    warm=warm,
)
_DEFAULT = ["standard", "3 blocks", "ours", "released", "composition"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.set_defaults(repeats=9, seconds=120)
    options_of.add_argument("--detectors", nargs="+", choices=NAMES, default=NAMES)
    options_of.add_argument(
        "--backbones", nargs="+", choices=list(FILES), default=["R18"], help="R18: quickstart; R50: full"
    )
    options_of.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    options_of.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    options_of.add_argument("--sizes", nargs="+", type=size, help="of images; default: 192x256 (R18), 800x1333 (R50)")
    options_of.add_argument("--batch", type=int, default=1)
    options_of.add_argument("--peers", nargs="+", choices=list(BENCHMARK.peers), default=_DEFAULT)
    options = options_of.parse_args(argv)
    if options.quick:
        options.repeats, options.backbones, options.sizes = 3, ["R18"], options.sizes or [(64, 64)]
    cases = [
        Case(detector, backbone, mode, place, dtype, options.batch, options.threads)
        for detector, backbone, dtype, mode in product(
            options.detectors, options.backbones, options.dtype, options.modes
        )
        for place in options.sizes or [SIZES[backbone]]
    ]
    chosen = {peer: BENCHMARK.peers[peer] for peer in BENCHMARK.peers if peer in options.peers}
    return run(replace(BENCHMARK, peers=chosen), cases, options, argv)


if __name__ == "__main__":
    main()
