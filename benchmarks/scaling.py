"""How do time and memory of a DyHead block grow with image area, channels, levels, batch and threads?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import block
from benchmarks.program import Benchmark, output_path, parser, run

# All lines share one point; each line varies one quantity. Finest levels of images from 200x333 to 800x1333.
BASE = block.Case("paper", "training", (50, 84), blocks=1)
POINTS = {
    "area": [(25, 42), (35, 59), (50, 84), (71, 119), (100, 168)],
    "channels": [32, 64, 128, 256, 512],
    "levels": [1, 2, 3, 4, 5],
    "batch": [1, 2, 4, 8],
    "threads": [1, 2, 4, 8, 16, 32, 64],  # up to --threads
}
MODES = ["inference", "training"]
TITLES = {name: "pixels of the finest level" if name == "area" else name for name in POINTS}


@dataclass(frozen=True)
class Case(block.Case):
    """A block's case, and the line that it belongs to.

    Attributes:
        varied: a key of `POINTS`.
    """

    varied: str = ""


def lines(base: block.Case) -> list[Case]:
    """All points of all lines through `base`."""
    fields = {"area": "size"}
    return [
        Case(**asdict(replace(base, **{fields.get(varied, varied): point})), varied=varied)
        for varied, points in POINTS.items()
        for point in points
        if varied != "threads" or point <= base.threads
    ]


def value(case: dict[str, Any]) -> float:
    """The position of a case, as written to JSON, on its line: pixels of the finest level for "area"."""
    height, width = case["size"]
    return height * width if case["varied"] == "area" else case[case["varied"]]


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots times (top) and memory (bottom) against each quantity, with logarithmic axes, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = "{x:g}".format
    varied = [name for name in TITLES if any(row["case"]["varied"] == name for row in result["cases"])]
    quantities = {"ms": "milliseconds", "mib": "MiB at the peak"}
    figure, axes = pyplot.subplots(2, len(varied), figsize=(3.1 * len(varied), 6.2), sharey="row", squeeze=False)
    for column, name in enumerate(varied):
        for axis, quantity in zip(axes[:, column], quantities, strict=True):
            places = set()
            for mode, style in zip(MODES, ("-", "--"), strict=True):
                rows = [row for row in result["cases"] if (row["case"]["varied"], row["case"]["mode"]) == (name, mode)]
                for color, peer in enumerate(result["peers"]):
                    points = [(value(row["case"]), _measured(row, peer, quantity)) for row in rows]
                    points = [point for point in points if point[1] is not None]
                    if points:
                        axis.plot(*zip(*points, strict=True), f"C{color}o{style}", ms=3, label=f"{peer}, {mode}")
                        places.update(x for x, _ in points)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(sorted(places))
            axis.xaxis.set_major_formatter(lambda x, _: plain(x=x))
            axis.yaxis.set_major_formatter(lambda y, _: plain(x=y))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(TITLES[name])
    for axis, label in zip(axes[:, 0], quantities.values(), strict=True):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _measured(row: dict[str, Any], peer: str, quantity: str) -> float | None:
    found = row["measured"].get(peer, {}).get(quantity)
    return found["median"] if quantity == "ms" and found else found


BENCHMARK = Benchmark(
    name="scaling",
    question="How do time and memory of one DyHead block grow with its input?",
    build=block.build,
    peers={peer: block.PEERS[peer] for peer in block.EAGER},
    columns=block.EAGER,
    ratios=(("composition", "ours"),),
    warm=block.warm,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program; the plot is written beside the JSON file."""
    options_of = parser(BENCHMARK)
    options_of.set_defaults(repeats=7, seconds=10)
    options_of.add_argument("--block", choices=["paper", "released"], default="paper")
    options_of.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options_of.add_argument("--varied", nargs="+", choices=list(POINTS))
    options_of.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = options_of.parse_args(argv)
    base = replace(BASE, block=options.block, dtype=options.dtype, threads=options.threads)
    cases = lines(base)
    if options.quick:
        options.repeats = 3
        cases = [
            replace(case, size=(case.size[0] // 5, case.size[1] // 5), channels=min(case.channels, 64))
            for case in cases
        ]
    cases = [
        replace(case, mode=mode)
        for mode in options.modes
        for case in cases
        if options.varied is None or case.varied in options.varied
    ]
    result = run(BENCHMARK, cases, options, argv)
    image = output_path(BENCHMARK, options).with_suffix(".png")
    plot(result, image)
    print(f"Plotted in {image}")
    return result


if __name__ == "__main__":
    main()
