"""How accurate are detectors that were trained under one budget, and what do they cost?

`python -m benchmarks.accuracy STUDY --runs FOLDER` trains every entry of a study with every seed by `train_net.py`,
each into a folder of its own, and gathers the results in one JSON file and one table. Interrupted, the same command
goes on where it was.

A study is a YAML file, see benchmarks/studies:

    question: Does DyHead gain over the standard head?
    seeds: [0, 1, 2]
    common: {SOLVER.MAX_ITER: 900}                                  # keys of the configuration, for all entries
    entries:
      FCOS: {config: configs/quickstart/fcos_R18_shapes.yaml}
      FCOS, DyHead: {config: configs/quickstart/fcos_dyhead_R18_shapes.yaml, against: FCOS, MODEL.DYHEAD.NUM_BLOCKS: 3}

`base: OTHER.yaml` takes over another study, in which `common` and entries of the same name change keys or add some.

With `pretraining: {config: ..., KEY: VALUE}` beside the entries, that is trained first, once, with a seed of its own,
and every run starts from its network's weights, as detectors are used to start from ImageNet's; pyramid, necks, towers
and predictors are new.

An entry with `module: benchmarks.variants` is trained by `python -m benchmarks.variants`, which registers more necks,
instead of by train_net.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import yaml

from benchmarks.program import RESULTS, machine_name, markdown, write
from dyhead.config import load_config
from dyhead.evaluation import count_flops, describe_machine
from dyhead.files import replacing, write_text
from dyhead.torchvision import get_cfg
from dyhead.torchvision.backbone import build_pyramid

_ROOT = Path(__file__).parents[1]
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NETWORK = "backbone.backbone.bottom_up."
_SHOWN = ("AP50", "APs", "APm", "APl")


#: Not one that a study would compare.
PRETRAINING_SEED = 100


@dataclass(frozen=True)
class Entry:
    """A detector of a study.

    Attributes:
        name: what the table calls it.
        config: its configuration, from the root of the project.
        keys: of the configuration, with their values.
        against: the entry that its gain is over, or "".
        module: what trains it, with the arguments of train_net.py, or "" for that.
    """

    name: str
    config: str
    keys: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    module: str = ""


@dataclass(frozen=True)
class Study:
    """A question, and the detectors that answer it under one budget."""

    name: str
    question: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    pretraining: Entry | None = None


@dataclass(frozen=True)
class Run:
    """A training of an entry with a seed."""

    entry: Entry
    seed: int
    folder: Path

    def command(self, engine: str, more: Sequence[str]) -> list[str]:
        """What trains and evaluates it, from the root of the project."""
        keys = [text for key, value in self.entry.keys.items() for text in (key, str(value))]
        program = ["-m", self.entry.module] if self.entry.module else ["train_net.py"]
        command = [sys.executable, *program, "--config-file", self.entry.config, "--engine", engine]
        return [*command, *keys, *more, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]


def read_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        ValueError: it is not as described above.
    """
    text = _read_text(path)
    entries = [_entry(path, name, text["common"] | keys, text["entries"]) for name, keys in text["entries"].items()]
    pretraining = _entry(path, "pretraining", text["pretraining"]) if "pretraining" in text else None
    return Study(path.stem, text["question"], tuple(text["seeds"]), tuple(entries), pretraining)


def _read_text(path: Path) -> dict[str, Any]:
    """What a study's file says, with what its base says."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = _read_text(path.parent / text.pop("base")) if isinstance(text, dict) and "base" in text else {}
    names = {"question", "seeds", "common", "entries", "pretraining"}
    if not isinstance(text, dict) or not {"question", "seeds", "entries"} <= set(base | text) <= names:
        raise ValueError(f"{path}: expected question, seeds, common, entries and pretraining, got {text!r:.80}")
    entries = base.get("entries", {})
    for name, keys in text.get("entries", {}).items():
        entries[name] = entries.get(name, {}) | keys
    common = base.get("common", {}) | text.get("common", {})
    return base | text | {"common": common, "entries": entries}


def _entry(path: Path, name: str, keys: dict[str, Any], others: Container[str] = ()) -> Entry:
    config, against, module = (keys.get(key, "") for key in ("config", "against", "module"))
    if not (_ROOT / config).is_file():
        raise ValueError(f"{path}: {name}: config: expected a file, got {config!r}")
    if against and against not in others:
        raise ValueError(f"{path}: {name}: against: expected another entry, got {against!r}")
    if module:
        importlib.import_module(module)  # with its keys, a configuration is read here as well
    keys = {key: value for key, value in keys.items() if key not in ("config", "against", "module")}
    return Entry(name, config, keys, against, module)


def runs(study: Study, folder: Path) -> list[Run]:
    """All trainings, seed by seed, so that what is there after an interruption can be compared."""
    return [
        Run(entry, seed, folder / study.name / f"{re.sub(r'[^A-Za-z0-9.+]+', '_', entry.name)}-{seed}")
        for seed in study.seeds
        for entry in study.entries
    ]


def train(run: Run, engine: str, more: Sequence[str], threads: int) -> bool:
    """Trains and evaluates what is not done yet; whether it is done now.

    Raises:
        ValueError: the folder holds a training by another command.
    """
    command = run.command(engine, more)
    said, done = run.folder / "command.json", run.folder / "done"
    before = json.loads(said.read_text(encoding="utf-8")) if said.exists() else None
    if before is None:
        run.folder.mkdir(parents=True)
        write_text(said, json.dumps(command[1:], indent=1))
    elif before != command[1:]:
        changed = [text for text in command[1:] if text not in before] or before
        raise ValueError(f"{run.folder}: expected no run or one by this command, got one that differs at {changed}")
    if done.exists():
        return True
    resume = ["--resume"] if (run.folder / "config.yaml").exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with open(run.folder / "output.txt", "a", encoding="utf-8") as output:
        at = command.index("--engine")
        process = [*command[:at], *resume, *command[at:]]
        code = subprocess.run(process, cwd=_ROOT, env=environment, stdout=output, stderr=output, check=False).returncode
    if code == 0:
        write_text(done, "")
    return code == 0


def pretrain(study: Study, folder: Path, engine: str, more: Sequence[str], threads: int) -> Path | None:
    """The weights of the network that all runs start from, in a file; None if that training failed."""
    run = Run(study.pretraining, PRETRAINING_SEED, folder / "pretraining")
    if not train(run, engine, more, threads):
        return None
    weights = run.folder / "network.pth"
    if not weights.exists():
        state = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
        network = {name: tensor for name, tensor in state.items() if name.startswith(_NETWORK)}
        with replacing(weights) as file:
            torch.save({"model": network}, file)
    return weights


def gather(study: Study, folder: Path) -> dict[str, Any]:
    """What is known so far: for each entry its cost and the results of the seeds that are done."""
    entries = []
    for entry in study.entries:
        own = [run for run in runs(study, folder) if run.entry == entry and (run.folder / "done").exists()]
        results = [json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["results"][0] for run in own]
        if not own:
            continue
        first = results[0]
        entries.append(
            {
                "name": entry.name,
                "config": entry.config,
                "keys": entry.keys,
                "against": entry.against,
                "parameters": first["parameters"],
                "gflops": first["gflops"],
                "head_gflops": first["gflops"] - _pyramid_gflops(entry, first["input_size"]),
                "input_size": first["input_size"],
                "engine": first["engine"],
                "runs": [
                    {
                        "seed": run.seed,
                        **{key: result["metrics"][key] for key in _METRICS},
                        "training_minutes": sum(seconds for *_, seconds in _times(run.folder)) / 60,
                        "latency_ms": result["timing"]["latency_ms"],
                    }
                    for run, result in zip(own, results, strict=True)
                ],
            }
        )
    return {"study": study.name, "question": study.question, "seeds": study.seeds, "entries": entries}


def _times(folder: Path) -> Iterator[tuple[int, float]]:
    """The iterations up to which a training's log has lines, and the seconds that led there."""
    last, seen = -1, {}
    for line in (folder / "metrics.json").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "time" in entry:
            seen[entry["iteration"]] = entry["time"]  # a resumed run repeats what came after its checkpoint
    for iteration, seconds in sorted(seen.items()):
        yield iteration, seconds * (iteration - last)
        last = iteration


def _pyramid_gflops(entry: Entry, size: Sequence[int]) -> float:
    """Multiply-adds, in billions, of what is before the head: the network and its feature pyramid."""
    cfg = get_cfg()
    keys = entry.keys | {"MODEL.NECKS": []}
    load_config(cfg, _ROOT / entry.config, [text for key, value in keys.items() for text in (key, str(value))])
    with torch.device("meta"):
        pyramid = build_pyramid(cfg).eval()
    divisor = pyramid.size_divisibility
    padded = [-(-side // divisor) * divisor for side in size]
    return count_flops(pyramid, torch.empty(1, 3, *padded, device="meta"))


def table(result: dict[str, Any]) -> str:
    """Means and standard deviations over seeds, gains seed by seed, and costs."""
    head = ["", "AP", "gain", *_SHOWN, "head, G", "all, G", "M", "training, min", "ms", "seeds"]
    by_name = {entry["name"]: entry for entry in result["entries"]}
    lines = [head]
    for entry in result["entries"]:
        own = entry["runs"]
        lines.append(
            [
                entry["name"],
                _spread([run["AP"] for run in own]),
                _spread(gains(by_name[entry["against"]], entry), "+") if entry["against"] in by_name else "",
                *(_mean([run[key] for run in own]) for key in _SHOWN),
                f"{entry['head_gflops']:.2f}",
                f"{entry['gflops']:.2f}",
                f"{entry['parameters'] / 1e6:.2f}",
                f"{median(run['training_minutes'] for run in own):.1f}",
                f"{median(run['latency_ms'] for run in own):.0f}",
                str(len(own)),
            ]
        )
    return markdown(lines, left=1)


def short_table(result: dict[str, Any]) -> str:
    """A line for each entry that another is compared with: both, and the gain seed by seed."""
    by_name = {entry["name"]: entry for entry in result["entries"]}
    lines = [["", "AP", "head, G", "against", "AP", "head, G", "gain"]]
    for entry in result["entries"]:
        if entry["against"] in by_name:
            before = by_name[entry["against"]]
            sides = [
                text
                for side in (entry, before)
                for text in (side["name"], _spread([run["AP"] for run in side["runs"]]), f"{side['head_gflops']:.2f}")
            ]
            lines.append([*sides, _spread(gains(before, entry), "+")])
    return markdown(lines, left=1)


def gains(before: dict[str, Any], after: dict[str, Any]) -> list[float]:
    """Differences in AP of two entries, for each seed that both have."""
    of = {run["seed"]: run["AP"] for run in before["runs"]}
    return [run["AP"] - of[run["seed"]] for run in after["runs"] if run["seed"] in of]


def origin(result: dict[str, Any]) -> str:
    """When, where and with what a study was run."""
    machine = result["machine"]
    return (
        f"{result['date']}; {machine['device']}, {machine['processes']} trainings at once, threads of each: "
        f"{machine['threads']}; {machine['system']}; torch {machine['torch']}; {result['entries'][0]['engine']}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws AP as a PNG file: a row for each entry, a dot for each seed, a line at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = result["entries"]
    figure, axis = pyplot.subplots(figsize=(7, 0.9 + 0.3 * len(entries)))
    for row, entry in enumerate(entries):
        values = [run["AP"] for run in entry["runs"] if run["AP"] is not None]
        color = "C0" if entry["against"] else "0.45"
        axis.plot(values, [row] * len(values), "o", color=color, ms=5, alpha=0.6, mew=0)
        if values:
            axis.plot([mean(values)] * 2, [row - 0.35, row + 0.35], color=color, lw=2)
    axis.set_yticks(range(len(entries)), [f"{entry['name']}  ({entry['head_gflops']:.2f} G)" for entry in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.set_xlabel("AP: dots are seeds, lines means (G: multiply-adds of the head)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _spread(values: Sequence[float], sign: str = "") -> str:
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{mean(known):.1f}" if known else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; 1 if a training failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--runs", type=Path, required=True, help="folder for what the trainings write")
    parser.add_argument("--engine", choices=["detectron2", "torchvision"], default="torchvision")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to train; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the study's")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    options = parser.parse_args(argv)
    try:
        study = read_study(options.study)
        wanted = options.only or [entry.name for entry in study.entries]
        if unknown := sorted(set(wanted) - {entry.name for entry in study.entries}):
            raise ValueError(f"--only: expected entries of {options.study}, got {', '.join(unknown)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = options.runs.absolute()
    output = options.output or RESULTS / f"accuracy-{study.name}-{machine_name(options)}.json"
    seeds = study.seeds if options.seeds is None else options.seeds
    chosen = [run for run in runs(study, folder) if run.entry.name in wanted and run.seed in seeds]
    failed: list[Path] = []
    words = sys.argv[1:] if argv is None else argv

    more = ["MODEL.DEVICE", options.device]

    def work(run: Run) -> None:
        print(f"{run.entry.name}, seed {run.seed}", file=sys.stderr, flush=True)
        if not train(run, options.engine, more, options.threads):
            failed.append(run.folder / "output.txt")

    try:
        if study.pretraining:
            print("pretraining", file=sys.stderr, flush=True)
            weights = pretrain(study, folder, options.engine, more, options.threads * options.processes)
            if weights is None:
                print(f"error: the pretraining failed, see {folder / 'pretraining' / 'output.txt'}", file=sys.stderr)
                return 1
            more += ["MODEL.WEIGHTS", str(weights)]
        with ThreadPoolExecutor(options.processes) as pool:
            for _ in pool.map(work, chosen):
                write(
                    {
                        "benchmark": "accuracy",
                        "command": shlex.join(["python", "-m", "benchmarks.accuracy", *words]),
                        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                        "machine": describe_machine(options.device)
                        | {"threads": options.threads, "processes": options.processes},
                        **gather(study, folder),
                    },
                    output,
                )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = json.loads(output.read_text(encoding="utf-8"))
    print(table(result))
    plot(result, output.with_suffix(".png"))
    print(f"Written to {output} and {output.with_suffix('.png')}")
    for path in failed:
        print(f"error: a training failed, see {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
