"""Whole runs of the torchvision engine, as train_net.py starts them."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.torchvision import main
from dyhead.torchvision.training import Training

DETECTORS = ("atss", "fcos", "retinanet", "faster_rcnn")


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
    options = tiny | {
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "SOLVER.BASE_LR": 0.003,
        "SOLVER.MAX_ITER": 60,
        "SOLVER.STEPS": (50,),
        "SOLVER.CHECKPOINT_PERIOD": 30,
    }
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
    assert [line["iteration"] for line in lines] == [19, 39, 59]
    assert [line["lr"] for line in lines] == pytest.approx([0.003, 0.003, 0.0003])
    assert lines[2]["total_loss"] < lines[0]["total_loss"]
    assert lines[2]["total_loss"] == pytest.approx(sum(v for k, v in lines[2].items() if k.startswith("loss_")))

    (name,) = tiny["DATASETS.TEST"]
    assert trained[name]["AP"] > 1  # percent
    again = options | {"MODEL.WEIGHTS": str(run / "model_final.pth"), "OUTPUT_DIR": str(tmp_path / "evaluation")}
    assert main(command(again, detector, eval_only=True)) == trained
    assert main(command(options, detector, eval_only=True, resume=True)) == trained
    if detector == "fcos":  # the same for all: each of ten pictures is evaluated by one of two processes
        assert main(command(again, detector, eval_only=True, num_gpus=2)) == trained


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


def test_two_processes_train_as_one(tiny, command, tmp_path, draw):
    path = draw(tmp_path / "squares", 5, size=(64, 64))  # of one size, so that both pad them alike
    options = tiny | {
        "DATASETS.REGISTER": [[str(path), str(path), str(path.parent)]],
        "DATASETS.TRAIN": (str(path),),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "SOLVER.MAX_ITER": 3,
        "SOLVER.WARMUP_ITERS": 0,
    }
    main(command(options | {"OUTPUT_DIR": str(tmp_path / "one")}))
    main(command(options | {"OUTPUT_DIR": str(tmp_path / "two")}, num_gpus=2))
    (a,), (b,) = (written(tmp_path / run, "metrics.json") for run in ("one", "two"))
    keys = [key for key in a if "loss" in key]
    assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4)


def test_several_processes_pass_on_the_error_of_one_as_it_was(tiny, command, draw, tmp_path):
    path = draw(tmp_path / "broken", 2)
    (path.parent / "1.png").write_bytes(b"no picture")
    options = tiny | {
        "DATASETS.REGISTER": [[str(path), str(path), str(path.parent)]],
        "DATASETS.TRAIN": (str(path),),
        "DATASETS.TEST": (),
    }
    with pytest.raises(DataError, match=r"^\S*1\.png: "):
        main(command(options, num_gpus=2))


def test_mixed_precision_trains(tiny, command, losses):
    main(command(tiny | {"SOLVER.AMP.ENABLED": True, "DATASETS.TEST": ()}))
    amp = [entry["total_loss"] for entry in losses]
    losses.clear()
    main(command(tiny | {"OUTPUT_DIR": tiny["OUTPUT_DIR"] + "_float32", "DATASETS.TEST": ()}))
    full = [entry["total_loss"] for entry in losses]
    assert amp[0] == pytest.approx(full[0], rel=0.02)
    assert amp[0] != full[0]
    assert min(amp[1:]) < amp[0]


def test_several_test_sets_are_each_evaluated(tiny, command, draw, tmp_path):
    path = draw(tmp_path / "more", 3, seed=5)
    (name,) = tiny["DATASETS.TEST"]
    options = tiny | {
        "DATASETS.REGISTER": [*tiny["DATASETS.REGISTER"], [str(path), str(path), str(path.parent)]],
        "DATASETS.TEST": (name, str(path)),
        "SOLVER.MAX_ITER": 2,
        "TEST.EVAL_PERIOD": 1,
    }
    assert set(main(command(options))) == {name, str(path)}
    lines = written(options["OUTPUT_DIR"], "metrics.json")
    assert [line["iteration"] for line in lines if f"{name}/bbox/AP" in line and "total_loss" not in line] == [0, 1]


def test_a_folder_that_holds_a_run_is_left_alone(tiny, command):
    run = Path(tiny["OUTPUT_DIR"])
    run.mkdir()
    (run / "metrics.json").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds a run already \(metrics\.json\).*--resume.*another OUTPUT_DIR"):
        main(command(tiny))
    assert [(p.name, p.read_text()) for p in run.iterdir()] == [("metrics.json", "kept")]


def test_a_folder_that_cannot_be_written_to_is_named(tiny, command):
    Path(tiny["OUTPUT_DIR"]).write_text("a file")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*run: cannot be written to"):
        main(command(tiny))


def test_what_was_said_before_the_folder_was_there_is_in_its_log(tiny, command):
    main(command(tiny | {"MODEL.MASK_ON": True, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))
    assert "ignores: MODEL.MASK_ON True" in (Path(tiny["OUTPUT_DIR"]) / "log.txt").read_text()


@pytest.mark.cuda
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_gpu_trains_in_mixed_precision_and_evaluates(tiny, command, detector):
    options = tiny | {"MODEL.DEVICE": "cuda", "SOLVER.AMP.ENABLED": True}
    trained = main(command(options, detector))
    assert main(command(options, detector, eval_only=True, resume=True)).keys() == trained.keys()
    assert written(tiny["OUTPUT_DIR"], "metrics.json")[-1]["total_loss"] > 0


def test_evaluation_without_weights_is_refused(tiny, command):
    with pytest.raises(ConfigError, match=r"--eval-only: set MODEL\.WEIGHTS"):
        main(command(tiny, eval_only=True))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        main(command(tiny, eval_only=True, resume=True))
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file"):
        main(command(tiny | {"MODEL.WEIGHTS": "nowhere.pth"}, eval_only=True))


def test_other_classes_than_the_data_set_s_are_refused_and_leave_nothing_in_the_way(tiny, command):
    with pytest.raises(ConfigError, match=r"MODEL\.FCOS\.NUM_CLASSES: expected 3.*red, green, blue.*got 4"):
        main(command(tiny | {"MODEL.FCOS.NUM_CLASSES": 4}))
    main(command(tiny | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))  # into the same folder


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_and_not_harmed(tiny, command):
    options = tiny | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    main(command(options))
    checkpoint = Path(options["OUTPUT_DIR"]) / "model_final.pth"
    before = checkpoint.read_bytes()
    for other, message in (
        (
            {"MODEL.DYHEAD.NUM_BLOCKS": 2},
            r"does not fit the model.*\n.*missing in the file: backbone\.dyhead\.blocks\.1",
        ),
        (
            {"SOLVER.OPTIMIZER": "SGD"},
            r"SOLVER\.OPTIMIZER: expected 'ADAMW', with which .*model_final\.pth was trained",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            main(command(options | other | {"SOLVER.MAX_ITER": 2}, resume=True))
    torch.save({"model": {"weight": torch.zeros(1)}}, checkpoint)
    with pytest.raises(ConfigError, match="no checkpoint of a training on torchvision"):
        main(command(options, resume=True))
    checkpoint.write_bytes(before)
    main(command(options | {"SOLVER.MAX_ITER": 2}, resume=True))


def test_a_loss_that_is_not_finite_names_the_iteration(tiny, command):
    message = r"iteration [12]: the loss is infinite or NaN \(loss_fcos_cls"
    with pytest.raises(FloatingPointError, match=message):
        main(command(tiny | {"SOLVER.BASE_LR": 1e30, "SOLVER.WARMUP_ITERS": 0, "SOLVER.OPTIMIZER": "SGD"}))
    assert re.search(message, (Path(tiny["OUTPUT_DIR"]) / "log.txt").read_text())


def test_resuming_where_nothing_was_trained_starts_with_a_warning(tiny, command, caplog):
    caplog.set_level(logging.WARNING)
    main(command(tiny | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}, resume=True))
    assert "holds no checkpoint yet" in caplog.text
    assert (Path(tiny["OUTPUT_DIR"]) / "model_final.pth").exists()
