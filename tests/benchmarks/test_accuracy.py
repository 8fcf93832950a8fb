"""Studies: what they may say, that they go on where they were, and the table."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import accuracy
from dyhead.config import load_config
from dyhead.torchvision import build_model, get_cfg
from dyhead.torchvision.checkpoint import load_weights, portable_state

STUDIES = sorted((Path(accuracy.__file__).parent / "studies").glob("*.yaml"))
FCOS = "configs/quickstart/fcos_R18_shapes.yaml"
DYHEAD = "configs/quickstart/fcos_dyhead_R18_shapes.yaml"
STUDY = f"""
question: Does it gain?
seeds: [0, 1]
common: {{SOLVER.MAX_ITER: 3}}
entries:
  plain: {{config: {FCOS}}}
  with it: {{config: {DYHEAD}, against: plain, MODEL.DYHEAD.NUM_BLOCKS: 1}}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "gain.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def trainings(monkeypatch):
    """The commands of trainings that take no time, end with code 0 and leave the results of a run."""
    started = []

    def run(command, **_):
        value = dict(itertools.pairwise(command))
        started.append(command)
        folder = Path(value["OUTPUT_DIR"])
        (folder / "config.yaml").write_text("")
        if folder.name == "pretraining":
            cfg = get_cfg()
            load_config(cfg, DYHEAD)
            torch.save({"model": portable_state(build_model(cfg))}, folder / "model_final.pth")
        with_it, seed = "with_it" in folder.name, int(value["SEED"])
        metrics = dict.fromkeys(("AP50", "AP75", "APs", "APm"), 40.0)
        metrics |= {"AP": 20.0 + seed + with_it * (1 + seed), "APl": None}
        result = {"metrics": metrics, "parameters": 2_000_000, "gflops": 2.0, "input_size": [64, 96], "engine": "x"}
        (folder / "results.json").write_text(json.dumps({"results": [result | {"timing": {"latency_ms": 7.0}}]}))
        lines = [{"iteration": 19, "time": 3.0}, {"iteration": 39, "time": 6.0}, {"iteration": 19, "time": 3.0}]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, [*lines, {"iteration": 39, "bbox/AP": 1.0}])))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=run))
    return started


def test_every_entry_is_trained_with_every_seed_and_its_results_are_compared(study, trainings, tmp_path, capsys):
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    assert accuracy.main([*arguments, "--processes", "2", "--threads", "3"]) == 0
    assert sorted(command[command.index("SEED") + 1] for command in trainings) == ["0", "0", "1", "1"]
    assert all(command[command.index("SOLVER.MAX_ITER") + 1] == "3" for command in trainings)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:4]]
    # AP 20 and 21, and 21 and 23: gains of 1 and 2, whose standard deviation is the root of 1/2.
    assert rows[2][:4] == ["plain", "20.5 ± 0.7", "", "40.0"]
    assert rows[3][:4] == ["with it", "22.0 ± 1.4", "+1.5 ± 0.7", "40.0"]
    assert rows[2][6] == "-"  # no large objects
    result = json.loads((tmp_path / "out.json").read_text())
    plain, with_it = result["entries"]
    assert plain["runs"][0]["training_minutes"] == pytest.approx((20 * 3 + 20 * 6) / 60)
    assert plain["head_gflops"] == pytest.approx(with_it["head_gflops"])  # both are "2" without the same pyramid
    assert 0 < plain["head_gflops"] < 2
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > image.height > 100
    short = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy.short_table(result).splitlines()[2:]]
    head = f"{plain['head_gflops']:.2f}"
    assert short == [["with it", "22.0 ± 1.4", head, "plain", "20.5 ± 0.7", head, "+1.5 ± 0.7"]]
    origin = accuracy.origin(accuracy.combine([result]))
    assert "; 4 runs; " in origin
    assert "2 trainings at once, threads of each: 3" in origin


def test_latency_is_measured_in_turns_of_what_is_done_and_the_command_that_trained_is_kept(
    study, trainings, five_pictures, tmp_path, monkeypatch, capsys
):
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    assert accuracy.main([*arguments, "--latency"]) == 1
    assert "expected trainings that are done, got none" in capsys.readouterr().err
    accuracy.main([*arguments, "--processes", "2"])
    now, turns = [0.0], []

    class Detector:
        cfg = SimpleNamespace(DATASETS=SimpleNamespace(REGISTER=[five_pictures], TEST=five_pictures[:1]))

        def __init__(self, folder, device):
            self.name = folder.name

        def __call__(self, pixels):
            turns.append((self.name, pixels.shape, int(pixels.sum())))
            now[0] += 0.002 if self.name == "plain-0" else 0.005

    monkeypatch.setattr(accuracy, "load_detector", Detector)
    monkeypatch.setattr(accuracy, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert accuracy.main([*arguments, "--latency", "--threads", "1"]) == 0
    assert len(trainings) == 4
    assert [name for name, *_ in turns] == ["plain-0", "with_it-0"] * 6  # once to warm up
    pictures = [np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(1, 6)]
    for picture, turn in zip(pictures, turns[2::2], strict=True):
        assert turn == ("plain-0", (48, 64, 3), picture.sum())
    result = json.loads((tmp_path / "out.json").read_text())
    assert [entry["latency_ms"] for entry in result["entries"]] == pytest.approx([2, 5])
    assert "--processes 2" in result["command"]
    assert "--latency" not in result["command"]
    assert accuracy.origin(accuracy.combine([result])).endswith("ms: medians over 5 images, 1 threads")


def test_what_is_done_is_not_repeated_and_what_is_not_is_resumed(study, trainings, tmp_path):
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    accuracy.main([*arguments, "--only", "plain"])
    assert len(trainings) == 2
    (tmp_path / "runs" / "gain" / "plain-1" / "done").unlink()
    accuracy.main([*arguments, "--seeds", "1"])
    assert ["--resume" in command for command in trainings[2:]] == [True, False]


def test_all_runs_start_from_the_network_of_one_pretraining(study, trainings, tmp_path, capsys):
    study.write_text(STUDY + f"pretraining: {{config: {DYHEAD}, SOLVER.MAX_ITER: 7, MODEL.DYHEAD.NUM_BLOCKS: 0}}")
    folder = tmp_path / "runs" / "pretraining"
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    assert accuracy.main([*arguments, "--only", "plain"]) == 0
    first, *others = trainings
    assert first[first.index("SOLVER.MAX_ITER") + 1] == "7"
    assert len(others) == 2
    assert all(run[run.index("MODEL.WEIGHTS") + 1] == str(folder / "network.pth") for run in others)
    # The network of a checkpoint of ours, and nothing else: it is read, but for what is not there.
    cfg = get_cfg()
    load_config(cfg, DYHEAD)
    model = build_model(cfg)
    load_weights(model, str(folder / "network.pth"), strict=False)
    accuracy.main(arguments)
    assert len(trainings) == 3 + 2  # once
    first_network = torch.load(folder / "network.pth", weights_only=True)["model"]
    assert first_network
    for name, parameter in model.backbone.named_parameters():
        key = f"backbone.{name}"
        assert (key in first_network) == (".bottom_up." in key)
        if key in first_network:
            assert torch.equal(parameter, first_network[key])


def test_a_failed_training_is_named_and_the_others_go_on(study, trainings, tmp_path, monkeypatch, capsys):
    good = accuracy.subprocess.run
    monkeypatch.setattr(
        accuracy.subprocess,
        "run",
        lambda command, **more: SimpleNamespace(returncode=1) if FCOS in command else good(command, **more),
    )
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    assert accuracy.main(arguments) == 1
    said = capsys.readouterr()
    assert str(Path("plain-0") / "output.txt") in said.err
    assert "with it" in said.out


def test_a_folder_of_another_command_is_refused(study, trainings, tmp_path, capsys):
    arguments = [str(study), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    accuracy.main(arguments)
    study.write_text(STUDY.replace("MAX_ITER: 3", "MAX_ITER: 4"))
    assert accuracy.main(arguments) == 1
    assert "plain-0: expected no run or one by this command, got one that differs at ['4']" in capsys.readouterr().err


def test_results_of_two_machines_are_one_with_gains_within_each(study, trainings, tmp_path, capsys):
    results = []
    for machine, seeds in (("a", ["0", "1"]), ("b", ["1"])):
        output = tmp_path / f"{machine}.json"
        arguments = [str(study), "--runs", str(tmp_path / machine), "--output", str(output), "--processes", "2"]
        assert accuracy.main([*arguments, "--seeds", *seeds]) == 0
        results.append(json.loads(output.read_text()))
        results[-1]["machine"]["device"] = machine
    # On b both have 10 more, and seed 0 of "plain" was trained on it alone: no pair.
    for entry in results[1]["entries"]:
        entry["runs"][0]["AP"] += 10
    results[1]["entries"][0]["runs"].append(results[1]["entries"][0]["runs"][0] | {"seed": 0})
    both = accuracy.combine(results)
    plain, with_it = both["entries"]
    assert [run["AP"] for run in plain["runs"]] == [20, 21, 31, 31]
    assert [run["AP"] for run in with_it["runs"]] == [21, 23, 33]
    assert accuracy.gains(plain, with_it) == [1, 2, 2]
    last = [cell.strip() for cell in accuracy.table(both).splitlines()[3].split("|")[1:-1]]
    assert (last[2], last[-1]) == ("+1.7 ± 0.6", "3")
    first, second = accuracy.origin(both).split("\n\n")
    assert "; 4 runs; a, 2 trainings" in first
    assert "; 3 runs; b, 2 trainings" in second
    accuracy.plot(both, tmp_path / "both.png")
    assert (tmp_path / "both.png").exists()
    # What was trained on b alone comes where b has it.
    results[1]["entries"].insert(1, results[1]["entries"][1] | {"name": "more"})
    assert [entry["name"] for entry in accuracy.combine(results)["entries"]] == [plain["name"], "more", with_it["name"]]
    results[1]["entries"][0]["keys"]["SOLVER.MAX_ITER"] = 4
    with pytest.raises(ValueError, match="plain: keys: expected .*'SOLVER.MAX_ITER': 3.*, got .*: 4"):
        accuracy.combine(results)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FCOS, "configs/none.yaml", "plain: config: expected a file"),
        ("against: plain", "against: nothing", "with it: against: expected another entry"),
        ("question", "Question", "expected base, question, seeds, common, entries and pretraining"),
        ("question: Does it gain?", "", "expected question, seeds and entries, got no question"),
    ],
)
def test_a_study_that_is_none_is_refused(study, before, after, message, tmp_path, capsys):
    study.write_text(STUDY.replace(before, after))
    with pytest.raises(SystemExit):
        accuracy.main([str(study), "--runs", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_sets_keys_that_there_are(path):
    study = accuracy.read_study(path)
    pretraining = accuracy.Run(study.pretraining, 0, Path("runs"))
    for run in [pretraining, *accuracy.runs(study, Path("runs"))]:
        command = run.command("torchvision", [])
        load_config(get_cfg(), run.entry.config, command[command.index("--engine") + 2 :])
    assert len({run.folder for run in accuracy.runs(study, Path("runs"))}) == len(study.entries) * len(study.seeds)


def test_a_study_changes_keys_of_its_base_and_adds_entries(study):
    path = study.parent / "longer.yaml"
    path.write_text(
        "base: gain.yaml\ncommon: {SOLVER.MAX_ITER: 9, SOLVER.BASE_LR: 0.1}\n"
        f"entries: {{with it: {{MODEL.DYHEAD.NUM_BLOCKS: 2}}, more: {{config: {DYHEAD}, SOLVER.MAX_ITER: 4}}}}\n"
    )
    read = accuracy.read_study(path)
    assert (read.name, read.question, read.seeds) == ("longer", "Does it gain?", (0, 1))
    common = {"SOLVER.MAX_ITER": 9, "SOLVER.BASE_LR": 0.1}
    assert [(entry.name, entry.against, entry.keys) for entry in read.entries] == [
        ("plain", "", common),
        ("with it", "plain", common | {"MODEL.DYHEAD.NUM_BLOCKS": 2}),
        ("more", "", common | {"SOLVER.MAX_ITER": 4}),
    ]


def test_what_is_before_the_head_is_counted_as_the_head_pads_images():
    paper, released = (accuracy.Entry(block, DYHEAD, {"MODEL.DYHEAD.BLOCK": block}) for block in ("paper", "released"))
    counted = accuracy._pyramid_gflops(released, [64, 96])
    assert counted == accuracy._pyramid_gflops(paper, [128, 128])
    assert counted > 2 * accuracy._pyramid_gflops(paper, [64, 96])
