"""Whole runs of the torchvision engine, as train_net.py starts them."""

import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.detection import DETECTORS as REGISTERED
from dyhead.detection.detector import DenseDetector
from dyhead.runs.interruption import Interrupted
from dyhead.torchvision import engine, main, training
from dyhead.torchvision.logs import TrainingLog
from dyhead.torchvision.training import Autocast

DETECTORS = [*(detector.name.lower() for detector in REGISTERED.values()), "faster_rcnn"]


@pytest.fixture
def losses(monkeypatch):
    """Every iteration's losses, in the order in which they are computed."""
    seen = []
    note = TrainingLog.iteration

    def recording(self, iteration, losses, lr):
        seen.append(losses)
        note(self, iteration, losses, lr)

    monkeypatch.setattr(TrainingLog, "iteration", recording)
    return seen


@pytest.fixture
def interrupt_in(monkeypatch):
    """`interrupt_in(n)`: Ctrl-C comes during the n-th iteration."""

    def interrupt(number):
        calls, original = [], DenseDetector.losses

        def interrupted(self, *args):
            calls.append(None)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(DenseDetector, "losses", interrupted)

    return interrupt


def written(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.mark.slow
# One-stage, with a criterion of its own, two-stage with masks; every file is run in tests/test_every_config.py.
@pytest.mark.parametrize("detector", ["fcos", "autoassign", "mask_rcnn"])
def test_a_run_leaves_what_it_promises_and_evaluating_its_checkpoint_reproduces_its_results(
    detector, tiny, command, with_parts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if detector == "mask_rcnn":
        tiny |= with_parts
    # Long enough to find something: an AP of 0 would be reproduced by anything.
    options = tiny | {
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "SOLVER.BASE_LR": 0.003,
        "SOLVER.MAX_ITER": 60,
        "SOLVER.STEPS": (50,),
        "SOLVER.CHECKPOINT_PERIOD": 30,
        # A moving average that starts at hundreds lets the losses grow for as long as this run takes.
        "MODEL.FCOS.LOSS_NORMALIZER": "positives",
        "MODEL.RETINANET.LOSS_NORMALIZER": "positives",
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
    assert {p.name for p in tmp_path.iterdir()} == {"run", "parts.json"}  # nothing is written elsewhere
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


def test_augmented_evaluation_is_reported_beside_the_other(tiny, command, with_parts):
    options = tiny | with_parts | {
        "SOLVER.MAX_ITER": 1,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
        "TEST.AUG.ENABLED": True,
        "TEST.AUG.MIN_SIZES": (64, 80),
    }  # fmt: skip
    (name,) = options["DATASETS.TEST"]
    folder = Path(options["OUTPUT_DIR"])
    for flags in ({}, {"eval_only": True, "resume": True}):
        main(command(options, "mask_rcnn", **flags))
        (result,) = json.loads((folder / "results.json").read_text())["results"]
        assert list(result["tasks"]) == ["segm", "bbox_TTA", "segm_TTA"]
        (file,) = (folder / "inference_TTA" / "inference" / name).iterdir()
        assert any("segmentation" in detection for detection in json.loads(file.read_text()))
        file.unlink()


def test_precise_statistics_are_those_of_whole_batches_and_are_saved(tiny, command, monkeypatch):
    seen, norms = [], []
    build = engine.build_model

    def watched(cfg):
        model = build(cfg)
        norm = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.BatchNorm2d))
        norms.append(norm)
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().transpose(0, 1).flatten(1)))
        return model

    monkeypatch.setattr(engine, "build_model", watched)
    options = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 3, "MODEL.FPN.NORM": "BN"}
    main(command(tiny | options | {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ()}))
    assert len(seen) == 2 + 3  # two iterations of training
    pixels = torch.cat(seen[2:], dim=1).double()
    torch.testing.assert_close(norms[0].running_mean.double(), pixels.mean(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms[0].running_var.double(), pixels.var(dim=1, correction=0), rtol=1e-3, atol=1e-6)
    saved = torch.load(Path(tiny["OUTPUT_DIR"]) / "model_final.pth", weights_only=True)["model"]
    means = [value for key, value in saved.items() if key.endswith("running_mean") and len(value) == len(pixels)]
    assert any(torch.equal(mean, norms[0].running_mean) for mean in means)


def test_precise_statistics_of_a_model_without_any_are_named(tiny, command, caplog):
    main(command(tiny | {"TEST.PRECISE_BN.ENABLED": True, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))
    assert caplog.text.count("TEST.PRECISE_BN.ENABLED True: the model learns no statistics") == 1


def test_masks_and_keypoints_are_learned_and_reported(tiny, command, losses, with_parts):
    options = tiny | with_parts | {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01}
    (name,) = options["DATASETS.TEST"]
    main(command(options, "keypoint_rcnn"))
    assert all(losses[0][f"loss_{part}"] > 0 for part in ("mask", "keypoint"))
    folder = Path(options["OUTPUT_DIR"])
    (result,) = json.loads((folder / "results.json").read_text())["results"]
    assert {task: "AP" in metrics for task, metrics in result["tasks"].items()} == {"segm": True, "keypoints": True}
    (file,) = (folder / "inference" / name).iterdir()
    assert all({"segmentation", "keypoints"} <= set(detection) for detection in json.loads(file.read_text()))
    assert f"{name}/keypoints" in (folder / "log.txt").read_text()
    assert (folder / "predictions.png").is_file()


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tiny, command, losses):
    options = tiny | {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 3, "TEST.EVAL_PERIOD": 3}
    main(command(options))
    uninterrupted = list(losses)
    run = Path(options["OUTPUT_DIR"])
    weights = torch.load(run / "model_final.pth", weights_only=True)["model"]
    (run / "last_checkpoint").write_text("model_0000002.pth")
    losses.clear()
    main(command(options, resume=True))
    assert losses == uninterrupted[3:]
    assert len(losses) == 3
    resumed = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())
    assert [line["iteration"] for line in written(run, "metrics.json") if "total_loss" in line] == [5, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_finishes_the_iteration_and_a_resumed_run_goes_on(tiny, command, losses, interrupt_in, workers):
    options = tiny | {"SOLVER.MAX_ITER": 4, "DATASETS.TEST": (), "DATALOADER.NUM_WORKERS": workers}
    main(command(options | {"OUTPUT_DIR": tiny["OUTPUT_DIR"] + "_whole"}))
    uninterrupted = list(losses)
    losses.clear()
    interrupt_in(2)
    with pytest.raises(Interrupted, match=r"after iteration 1; OUTPUT_DIR .*run holds a checkpoint.*--resume"):
        main(command(options))
    assert (Path(options["OUTPUT_DIR"]) / "last_checkpoint").read_text() == "model_0000001.pth"
    main(command(options, resume=True))
    assert losses == uninterrupted


def test_ctrl_c_ends_an_evaluation_at_once_and_keeps_the_training(tiny, command, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))
    with pytest.raises(Interrupted, match="after iteration 1") as raised:
        main(command(tiny | {"TEST.EVAL_PERIOD": 2}))
    assert raised.value.number == signal.SIGTERM
    assert (Path(tiny["OUTPUT_DIR"]) / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_resumed_run_has_the_settings_of_its_command_line(tiny, command, caplog):
    caplog.set_level(logging.INFO)
    options = tiny | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": (), "MODEL.BACKBONE.FREEZE_AT": 2}
    main(command(options))
    changes = {"SOLVER.WEIGHT_DECAY": 0.5, "SOLVER.BASE_LR": 0.25, "MODEL.BACKBONE.FREEZE_AT": 3}
    main(command(options | changes | {"SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0}, resume=True))
    run = Path(options["OUTPUT_DIR"])
    groups = torch.load(run / "model_final.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {(group["lr"], group["weight_decay"]) for group in groups} >= {(0.25, 0.5)}
    assert "Changed since the run was last started: MODEL.BACKBONE.FREEZE_AT 2 -> 3, SOLVER.BASE_LR" in caplog.text
    assert "no longer trained (backbone.body.layer2" in caplog.text
    assert "FREEZE_AT: 3" in (run / "config.yaml").read_text()


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
        "SOLVER.OPTIMIZER": "SGD",  # AdamW's first steps are as large where a gradient is nothing but rounding
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
        "MODEL.FCOS.LOSS_NORMALIZER": "positives",  # a moving average starts at a number for each process
    }
    main(command(options | {"OUTPUT_DIR": str(tmp_path / "one")}))
    main(command(options | {"OUTPUT_DIR": str(tmp_path / "two")}, num_gpus=2))
    (a,), (b,) = (written(tmp_path / run, "metrics.json") for run in ("one", "two"))
    keys = [key for key in a if "loss" in key]
    assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-5)


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


def test_sets_that_share_a_file_and_sets_without_annotations_are_evaluated(tiny, command, draw, tmp_path, caplog):
    path = draw(tmp_path / "set", 3)
    data = json.loads(path.read_text())
    del data["annotations"]
    (path.parent / "bare.json").write_text(json.dumps(data))
    files = {"first/a": path, "second/a": path, "bare": path.parent / "bare.json"}
    options = tiny | {
        "DATASETS.REGISTER": [[f"{tmp_path.name} {name}", str(file), str(path.parent)] for name, file in files.items()],
        "DATASETS.TRAIN": (f"{tmp_path.name} first/a",),
        "DATASETS.TEST": tuple(f"{tmp_path.name} {name}" for name in files),
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
        "TEST.BENCHMARK.NUM_IMAGES": 0,
        "TEST.EXPECTED_RESULTS": [
            [f"{tmp_path.name} first/a", "AP-red", 50, 50],
            [f"{tmp_path.name} bare", "AP", 0, 100],
        ],
        "SOLVER.MAX_ITER": 1,
    }
    with pytest.raises(ConfigError, match=r"EXPECTED_RESULTS: expected AP of 0 \+- 100 on dataset '.* bare', but"):
        main(command(options))
    run = Path(options["OUTPUT_DIR"])
    first, second, bare = json.loads((run / "results.json").read_text())["results"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["AP"] is not None
    assert bare["metrics"] == dict.fromkeys(first["metrics"])
    assert "bare' has no annotated objects, so that there is no AP" in caplog.text
    found = sorted((run / "inference").glob("*/coco_instances_results.json"))
    assert [file.parent.name for file in found] == [
        f"{tmp_path.name} {name}" for name in ("bare", "first%2Fa", "second%2Fa")
    ]
    ids = {image["id"] for image in data["images"]}
    for file in found:
        detections = json.loads(file.read_text())
        assert {d["image_id"] for d in detections} == ids
        assert {d["category_id"] for d in detections} <= {10, 20, 30}


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
    config = (checkpoint.parent / "config.yaml").read_text()
    for other, message in (
        (
            {"MODEL.DYHEAD.NUM_BLOCKS": 2},
            r"does not fit the model.*\n.*missing in the file: backbone\.dyhead\.blocks\.1",
        ),
        (
            {"SOLVER.OPTIMIZER": "SGD"},
            r"SOLVER\.OPTIMIZER: expected 'ADAMW', with which it was trained, got 'SGD'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            main(command(options | other | {"SOLVER.MAX_ITER": 2}, resume=True))
        assert (checkpoint.parent / "config.yaml").read_text() == config
    torch.save({"model": {"weight": torch.zeros(1)}}, checkpoint)
    with pytest.raises(ConfigError, match="no checkpoint of a training on torchvision"):
        main(command(options, resume=True))
    checkpoint.write_bytes(before)
    main(command(options | {"SOLVER.MAX_ITER": 2}, resume=True))
    assert torch.load(checkpoint, weights_only=True)["iteration"] == 1


def test_a_checkpoint_is_a_plain_dict_in_detectron2_s_form(tiny, command):
    main(command(tiny | {"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "SEED": 7, "DATASETS.TEST": ()}))
    run = Path(tiny["OUTPUT_DIR"])
    assert (run / "last_checkpoint").read_text() == "model_final.pth"
    for name in ("model_0000001.pth", "model_final.pth"):
        content = torch.load(run / name, weights_only=True)
        assert content["iteration"] == 1
        assert content["dyhead"] == {"seed": 7}
        assert {state["step"].item() for state in content["optimizer"]["state"].values()} == {2}
        (stem,) = (value for key, value in content["model"].items() if key.endswith("stem.conv1.weight"))
        assert stem.shape == (64, 3, 7, 7)


def test_a_checkpoint_of_earlier_versions_gives_weights_but_is_not_resumed(tiny, command, tmp_path, caplog):
    """They were files of lightning's trainer."""
    caplog.set_level(logging.INFO)
    options = tiny | {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    main(command(options))
    checkpoint = Path(options["OUTPUT_DIR"]) / "model_final.pth"
    weights = torch.load(checkpoint, weights_only=True)["model"]
    old = {"state_dict": weights, "global_step": 1, "dyhead": {"seed": 1, "optimizer": "ADAMW"}}
    torch.save(old, checkpoint)
    with pytest.raises(ConfigError, match=r"--resume: .*model_final\.pth was written by an earlier version.*WEIGHTS"):
        main(command(options, resume=True))
    caplog.clear()
    main(command(options | {"MODEL.WEIGHTS": str(checkpoint), "OUTPUT_DIR": str(tmp_path / "other")}))
    assert f"Loaded {len(weights)} of {len(weights)} tensors" in caplog.text


def test_float16_scales_the_loss_and_a_resumed_run_goes_on_with_the_scale(tiny, command, losses, monkeypatch):
    """What a GPU does in mixed precision."""
    monkeypatch.setattr(engine, "Autocast", lambda precision, device: Autocast("16-mixed", device))
    options = tiny | {
        "DATASETS.TEST": (),
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.BASE_LR": 0.1,
        "MODEL.FCOS.LOSS_NORMALIZER": "positives",
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    main(command(options | {"OUTPUT_DIR": tiny["OUTPUT_DIR"] + "_float32"}))
    full = [entry["total_loss"] for entry in losses]
    losses.clear()
    options |= {"SOLVER.AMP.ENABLED": True}
    main(command(options))
    uninterrupted = list(losses)
    # Clipped at the norm of the gradient itself, not of the scaled one.
    assert [entry["total_loss"] for entry in losses] == pytest.approx(full, rel=0.02)
    assert full[2] < 0.95 * full[0]
    run = Path(options["OUTPUT_DIR"])
    scaler = torch.load(run / "model_final.pth", weights_only=True)["grad_scaler"]
    assert scaler["scale"] > 1
    (run / "last_checkpoint").write_text("model_0000001.pth")
    losses.clear()
    main(command(options, resume=True))
    assert losses == uninterrupted[2:]
    assert torch.load(run / "model_final.pth", weights_only=True)["grad_scaler"] == scaler


def test_mixed_precision_does_not_round_what_goes_into_the_model():
    """bfloat16 would move a box by half a pixel at 200."""
    precision = Autocast("bf16-mixed", "cpu")
    boxes = torch.tensor([[200.4, 0.1, 333.3, 299.7]])
    ((_, (target,)), _) = precision.convert_input((([], [{"boxes": boxes}]), {}))
    assert torch.equal(target["boxes"], boxes)
    with precision.forward_context():
        assert torch.mm(boxes, boxes.T).dtype == torch.bfloat16


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_go_to_the_terminal_or_give_way_to_a_progress_bar(tiny, command, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main(command(tiny | {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ()}))
    out, err = capsys.readouterr()
    assert ("iteration 2/2  loss_fcos_cls" in out) == (not terminal)
    assert ("training: 100%" in err) == terminal
    assert "Training on 10 images" in out
    log = (Path(tiny["OUTPUT_DIR"]) / "log.txt").read_text()
    assert re.search(
        r"iteration 2/2  loss_fcos_cls [\d.]+ .* total_loss [\d.]+  lr [\d.e-]+  .* s/iter  ETA 0:00:00", log
    )
    assert log.count("Training on 10 images") == 1


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
