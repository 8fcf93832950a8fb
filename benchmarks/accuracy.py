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

`base: OTHER.yaml` takes over another study, or a part of one, in which `common` and entries of the same name change
keys or add some.

With `pretraining: {config: ..., KEY: VALUE}` beside the entries, that is trained first, once, with a seed of its own,
and every run starts from its network's weights, as detectors are used to start from ImageNet's; pyramid, necks, towers
and predictors are new.

`--latency` trains nothing and measures how long detectors that are done take for an image, in turns, at a time when the
machine has nothing else to do. The table has it then.

A study may be continued on another machine, with a network that was taught there: each machine's results are a file of
their own, and `combine` makes one table of them.

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
import time
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from benchmarks.program import RESULTS, machine_name, markdown, write
from dyhead import data, load_detector
from dyhead.config import load_config
from dyhead.evaluation import count_flops, describe_machine
from dyhead.files import replacing, write_text
from dyhead.torchvision import get_cfg
from dyhead.torchvision.backbone import build_pyramid

_ROOT = Path(__file__).parents[1]
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NETWORK = "backbone.backbone.bottom_up."
_SHOWN = ("AP50", "APs", "APm", "APl")
_MARKS = "os^D"
_IMAGES = 50  # through which latency is measured

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
    if missing := sorted({"question", "seeds", "entries"} - set(text)):
        raise ValueError(f"{path}: expected question, seeds and entries, got no {' and no '.join(missing)}")
    entries = [_entry(path, name, text["common"] | keys, text["entries"]) for name, keys in text["entries"].items()]
    pretraining = _entry(path, "pretraining", text["pretraining"]) if "pretraining" in text else None
    return Study(path.stem, text["question"], tuple(text["seeds"]), tuple(entries), pretraining)


def _read_text(path: Path) -> dict[str, Any]:
    """What a study's file says, with what its base says."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = _read_text(path.parent / text.pop("base")) if isinstance(text, dict) and "base" in text else {}
    names = {"question", "seeds", "common", "entries", "pretraining"}
    if not isinstance(text, dict) or not set(text) <= names:
        raise ValueError(f"{path}: expected base, question, seeds, common, entries and pretraining, got {text!r:.80}")
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


def pretrain(run: Run, engine: str, more: Sequence[str], threads: int) -> Path | None:
    """The weights of the network that all runs start from, in a file; None if that training failed."""
    if not train(run, engine, more, threads):
        return None
    weights = run.folder / "network.pth"
    if not weights.exists():
        state = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
        network = {name: tensor for name, tensor in state.items() if name.startswith(_NETWORK)}
        with replacing(weights) as file:
            torch.save({"model": network}, file)
    return weights


def measure_latency(study: Study, folder: Path, device: str, threads: int) -> None:
    """Writes how long the first run of each entry that is done takes for an image, for :func:`gather`.

    Milliseconds from pixels to detections, medians over `_IMAGES` test images, one at a time; every image goes through
    all detectors in turn, so that a slow moment of the machine slows all of them.

    Raises:
        ValueError: nothing is done.
    """
    torch.set_num_threads(threads)
    detectors = {}
    for run in runs(study, folder):
        if run.entry.name not in detectors and (run.folder / "done").exists():
            detectors[run.entry.name] = load_detector(run.folder, device=device)
    if not detectors:
        raise ValueError(f"{folder / study.name}: expected trainings that are done, got none")
    times: dict[str, list[float]] = {name: [] for name in detectors}
    images = _test_images(next(iter(detectors.values())).cfg)
    for image in [None, *images]:
        for name, detector in detectors.items():
            pixels = np.zeros((192, 192, 3), np.uint8) if image is None else image  # the first, which warms up
            start = time.perf_counter()
            detector(pixels)  # what it returns is on the CPU
            if image is not None:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {"threads": threads, "images": len(images), "ms": {name: median(own) for name, own in times.items()}}
    write_text(folder / study.name / "latency.json", json.dumps(result, indent=1))


def _test_images(cfg: CfgNode) -> list[np.ndarray]:
    data.register_from_config(cfg.DATASETS.REGISTER)
    records = data.load(data.get(cfg.DATASETS.TEST[0])).records[:_IMAGES]
    return [data.read_image(record["file_name"]) for record in records]


def gather(study: Study, folder: Path) -> dict[str, Any]:
    """What is known so far: for each entry its cost and the results of the seeds that are done."""
    measured = folder / study.name / "latency.json"
    latency = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
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
                "latency_ms": latency and latency["ms"].get(entry.name),
                "runs": [
                    {
                        "seed": run.seed,
                        **{key: result["metrics"][key] for key in _METRICS},
                        "training_minutes": _training_minutes(run.folder),
                    }
                    for run, result in zip(own, results, strict=True)
                ],
            }
        )
    return {
        "study": study.name,
        "question": study.question,
        "seeds": study.seeds,
        "entries": entries,
        "latency": latency and {key: latency[key] for key in ("threads", "images")},
    }


def combine(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several machines found for a study, as one result; a run has the number of its `machine` in `origins`.

    Costs and latencies are those of the first result that has them. An entry that the first lacks comes before the one
    that follows it in another.

    Raises:
        ValueError: they are not of one study.
    """
    first = results[0]
    entries: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    for machine, result in enumerate(results):
        at = len(order)
        for name in [entry["name"] for entry in reversed(result["entries"])]:
            if name in order:
                at = order.index(name)
            else:
                order.insert(at, name)
        for entry in result["entries"]:
            known = entries.setdefault(entry["name"], entry | {"runs": []})
            for key in ("config", "keys", "against"):
                if entry[key] != known[key]:
                    raise ValueError(f"{entry['name']}: {key}: expected {known[key]!r}, got {entry[key]!r}")
            known["runs"] += [run | {"machine": machine} for run in entry["runs"]]
    origins = [{key: value for key, value in result.items() if key != "entries"} for result in results]
    for result, about in zip(results, origins, strict=True):
        about["engine"] = result["entries"][0]["engine"]
        about["runs"] = sum(len(entry["runs"]) for entry in result["entries"])
    latency = next((result["latency"] for result in results if result["latency"]), None)
    return first | {"entries": [entries[name] for name in order], "origins": origins, "latency": latency}


def _training_minutes(folder: Path) -> float:
    """What a training takes, by the median of its log's lines: without the time that a process was stopped for."""
    seen = {}
    for line in (folder / "metrics.json").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "time" in entry:
            seen[entry["iteration"]] = entry["time"]  # a resumed run repeats what came after its checkpoint
    return (max(seen) + 1) * median(seen.values()) / 60


def _pyramid_gflops(entry: Entry, size: Sequence[int]) -> float:
    """Multiply-adds, in billions, of what is before the head: the network and its feature pyramid."""

    def pyramid(keys: dict[str, Any]) -> nn.Module:
        cfg = get_cfg()
        load_config(cfg, _ROOT / entry.config, [text for key, value in keys.items() for text in (key, str(value))])
        with torch.device("meta"):
            return build_pyramid(cfg).eval()

    divisor = pyramid(entry.keys).size_divisibility  # images are padded as the necks want it
    padded = [-(-side // divisor) * divisor for side in size]
    return count_flops(pyramid(entry.keys | {"MODEL.NECKS": []}), torch.empty(1, 3, *padded, device="meta"))


def table(result: dict[str, Any]) -> str:
    """Means and standard deviations over seeds, gains seed by seed, and costs."""
    head = ["", "AP", "gain", *_SHOWN, "head, G", "all, G", "M", "training, min", "ms", "runs"]
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
                f"{median(run['training_minutes'] for run in own if _machine(run) == _machine(own[0])):.1f}",
                "-" if entry["latency_ms"] is None else f"{entry['latency_ms']:.1f}",
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
    """Differences in AP of two entries, for each seed that both have on a machine: they started from one network."""
    of = {(_machine(run), run["seed"]): run["AP"] for run in before["runs"]}
    pairs = [(run["AP"], of.get((_machine(run), run["seed"]))) for run in after["runs"]]
    return [ap - other for ap, other in pairs if other is not None]


def _machine(run: dict[str, Any]) -> int:
    return run.get("machine", 0)


def origin(result: dict[str, Any]) -> str:
    """When, where and with what a study was run, as :func:`combine` has it: a paragraph for each machine."""
    texts = []
    for about in result["origins"]:
        machine, latency = about["machine"], about["latency"]
        timed = f"; ms: medians over {latency['images']} images, {latency['threads']} threads" if latency else ""
        texts.append(
            f"{about['date']}; {about['runs']} runs; {machine['device']}, {machine['processes']} trainings at once, "
            f"threads of each: {machine['threads']}; {machine['system']}; torch {machine['torch']}; "
            f"{about['engine']}{timed}"
        )
    return "\n\n".join(texts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws AP as a PNG file: a row for each entry, a mark for each run and a line at the mean for each machine.

    Rows of entries that others are compared with are gray.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = result["entries"]
    origins = result.get("origins", [])
    styles = [(_MARKS[machine % len(_MARKS)], f"C{machine}") for machine in range(max(1, len(origins)))]
    figure, axis = pyplot.subplots(figsize=(7, 0.9 + 0.3 * len(entries)))
    compared = {entry["against"] for entry in entries}
    for row, entry in enumerate(entries):
        if entry["name"] in compared:
            axis.axhspan(row - 0.5, row + 0.5, color="0.93", lw=0)
        for machine, (mark, color) in enumerate(styles):
            values = [run["AP"] for run in entry["runs"] if run["AP"] is not None and _machine(run) == machine]
            axis.plot(values, [row] * len(values), mark, color=color, ms=5, alpha=0.6, mew=0)
            if values:
                axis.plot([mean(values)] * 2, [row - 0.35, row + 0.35], color=color, lw=2)
    axis.set_yticks(range(len(entries)), [f"{entry['name']}  ({entry['head_gflops']:.2f} G)" for entry in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    text = "AP: marks are runs, lines means, gray what others are compared with (G: multiply-adds of the head)"
    figure.supxlabel(text, fontsize="small")
    if len(origins) > 1:
        for about, (mark, color) in zip(origins, styles, strict=True):
            axis.plot([], [], mark, color=color, ms=5, mew=0, label=about["machine"]["device"])
        axis.legend(fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=1)
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
    parser.add_argument("--latency", action="store_true", help="train nothing, measure latencies of what is done")
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
    about = {
        "benchmark": "accuracy",
        "command": shlex.join(["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(options.device) | {"threads": options.threads, "processes": options.processes},
    }
    failed: list[Path] = []
    try:
        if options.latency:
            measure_latency(study, folder, options.device, options.threads)
            if output.exists():  # the command that trained is the one to tell
                before = json.loads(output.read_text(encoding="utf-8"))
                about = {key: before[key] for key in about}
            _save(about | gather(study, folder), output)
        else:
            for run, done in _train_all(study, chosen, folder, options):
                if not done:
                    failed.append(run.folder / "output.txt")
                elif run.entry is not study.pretraining:
                    _save(about | gather(study, folder), output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
        print(table(result))
        plot(result, output.with_suffix(".png"))
        print(f"Written to {output} and {output.with_suffix('.png')}")
    for path in failed:
        print(f"error: a training failed, see {path}", file=sys.stderr)
    return 1 if failed else 0


def _train_all(
    study: Study, chosen: Sequence[Run], folder: Path, options: argparse.Namespace
) -> Iterator[tuple[Run, bool]]:
    """What was trained, and whether it is done; after a pretraining that failed nothing else."""
    more = ["MODEL.DEVICE", options.device]
    if study.pretraining:
        run = Run(study.pretraining, PRETRAINING_SEED, folder / "pretraining")
        print("pretraining", file=sys.stderr, flush=True)
        weights = pretrain(run, options.engine, more, options.threads * options.processes)
        yield run, weights is not None
        if weights is None:
            return
        more += ["MODEL.WEIGHTS", str(weights)]

    def work(run: Run) -> tuple[Run, bool]:
        print(f"{run.entry.name}, seed {run.seed}", file=sys.stderr, flush=True)
        return run, train(run, options.engine, more, options.threads)

    with ThreadPoolExecutor(options.processes) as pool:
        yield from pool.map(work, chosen)


def _save(result: dict[str, Any], path: Path) -> None:
    write(result | {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}, path)


if __name__ == "__main__":
    sys.exit(main())
