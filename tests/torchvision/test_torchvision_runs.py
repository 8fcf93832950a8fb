"""Whole runs of the torchvision engine, as train_net.py starts them."""

import json
import logging
from pathlib import Path

import pytest
import torch

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.torchvision import main
from dyhead.torchvision.training import Training

DETECTORS = ("fcos", "retinanet", "faster_rcnn")


@pytest.fixture
def losses(monkeypatch):
    """Every iteration's losses, in the order in which they are computed."""
    seen = []
    step = Training.training_step

    def recording(self, *args):
        total = step(self, *args)
        seen.append(dict(self.losses))
        return total

    monkeypatch.setattr(Training, "training_step", recording)
    return seen


def written(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_leaves_what_it_promises_and_evaluating_its_checkpoint_reproduces_its_results(
    detector, tiny, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # Long enough to find something: an AP of 0 would be reproduced by anything.
    options = tiny | {"SOLVER.MAX_ITER": 40, "SOLVER.BASE_LR": 0.003, "SOLVER.CHECKPOINT_PERIOD": 30}
    options |= {"INPUT.MIN_SIZE_TRAIN": (64,)}
    trained = main(command(options, detector))
    run = Path(tiny["OUTPUT_DIR"])
    files = {p.name for p in run.iterdir()}
    assert {
        "config.yaml", "log.txt", "metrics.json", "results.json", "losses.png", "predictions.png", "last_checkpoint",
        "model_0000029.pth", "model_final.pth",
    } <= files  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".partial") for name in files)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}  # nothing is written elsewhere
    lines = written(run, "metrics.json")
    assert [line["iteration"] for line in lines] == [19, 39]
    assert lines[1]["total_loss"] < lines[0]["total_loss"]
    assert lines[1]["total_loss"] == pytest.approx(sum(v for k, v in lines[1].items() if k.startswith("loss_")))

    (name,) = tiny["DATASETS.TEST"]
    assert trained[name]["AP"] > 0
    again = options | {"MODEL.WEIGHTS": str(run / "model_final.pth"), "OUTPUT_DIR": str(tmp_path / "evaluation")}
    assert main(command(again, detector, eval_only=True)) == trained
    assert main(command(options, detector, eval_only=True, resume=True)) == trained


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tiny, command, losses):
    options = tiny | {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 3, "TEST.EVAL_PERIOD": 3}
    main(command(options))
    uninterrupted = list(losses)
    run = Path(options["OUTPUT_DIR"])
    weights = torch.load(run / "model_final.pth", weights_only=True)["state_dict"]
    (run / "last_checkpoint").write_text("model_0000002.pth")
    losses.clear()
    main(command(options, resume=True))
    assert losses == uninterrupted[3:]
    assert len(losses) == 3
    resumed = torch.load(run / "model_final.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())
    assert [line["iteration"] for line in written(run, "metrics.json") if "total_loss" in line] == [5, 5]


def test_a_run_that_draws_its_seed_keeps_it_when_resumed(tiny, command, losses):
    options = tiny | {"SEED": -1, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "DATASETS.TEST": ()}
    main(command(options, "faster_rcnn"))  # whose proposals are sampled at random
    uninterrupted = list(losses)
    (Path(options["OUTPUT_DIR"]) / "last_checkpoint").write_text("model_0000001.pth")
    losses.clear()
    main(command(options, "faster_rcnn", resume=True))
    assert losses == uninterrupted[2:]


def test_two_processes_train_and_evaluate_as_one(tiny, command, tmp_path, draw):
    path = draw(tmp_path / "squares", 5, size=(64, 64))  # of one size, so that both pad them alike
    options = tiny | {
        "DATASETS.REGISTER": [[str(path), str(path), str(path.parent)]],
        "DATASETS.TRAIN": (str(path),),
        "DATASETS.TEST": (str(path),),
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "SOLVER.MAX_ITER": 3,
        "SOLVER.WARMUP_ITERS": 0,
    }
    one = main(command(options | {"OUTPUT_DIR": str(tmp_path / "one")}))
    two = main(command(options | {"OUTPUT_DIR": str(tmp_path / "two")}, num_gpus=2))
    (a,), (b,) = (written(tmp_path / run, "metrics.json") for run in ("one", "two"))
    keys = [key for key in a if "loss" in key]
    assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4)

    # Each picture is evaluated once, five by two processes: what two find with the weights of one is what one found.
    weights = {"MODEL.WEIGHTS": str(tmp_path / "one" / "model_final.pth"), "OUTPUT_DIR": str(tmp_path / "two_evaluate")}
    assert main(command(options | weights, eval_only=True, num_gpus=2)) == one
    assert two.keys() == one.keys()
