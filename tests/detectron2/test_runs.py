# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""Whole runs of the engine, as train_net.py starts them, on a few small pictures."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor, SimpleTrainer
from detectron2.modeling import build_model

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.detection.detector import DenseDetector
from dyhead.detectron2 import Checkpointer, Trainer, main, register_datasets, setup
from dyhead.runs.divergence import DivergedError
from dyhead.runs.interruption import Interrupted


@pytest.fixture(scope="module")
def finished(arguments_in, tmp_path_factory):
    """A run of 4 iterations: its command line, its folder and what main returned."""
    folder = tmp_path_factory.mktemp("finished")
    return arguments_in(folder), folder, main(arguments_in(folder)())


def test_a_run_leaves_its_files(finished):
    _, folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "log.txt", "metrics.json", "results.json", "model_final.pth", "last_checkpoint"}
    assert names >= files | {"predictions.png", "losses.png", "model_0000001.pth"}
    assert any(name.startswith("events.out.tfevents") for name in names)

    (result,) = json.loads((folder / "results.json").read_text())["results"]
    assert result["metrics"] == metrics["blocks_val"]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-red", "AP-green"} <= set(result["metrics"])
    assert result["timing"]["calls"] == 2
    assert result["gflops"] > 0
    assert result["input_size"] == [64, 96]
    model = build_model(setup(finished[0](eval_only=True, resume=True)))
    assert result["parameters"] == sum(p.numel() for p in model.parameters())

    assert "NaN" not in (folder / "metrics.json").read_text()  # which other readers of JSON refuse
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert result["metrics"]["APl"] is None  # no object is that large
    assert not any("bbox/APl" in line for line in lines)
    (last,) = [line for line in lines if line["iteration"] == 3]
    assert all(math.isfinite(last[key]) for key in ("total_loss", "loss_fcos_cls", "lr"))
    assert lines[-1]["bbox/AP"] == metrics["blocks_val"]["AP"]
    log = (folder / "log.txt").read_text()
    assert "images/s" in log
    assert "DyHeadFCOS" in log
    assert Image.open(folder / "predictions.png").size[0] > 100


def test_evaluating_the_checkpoint_gives_the_same_metrics(finished):
    arguments, folder, metrics = finished
    config = (folder / "config.yaml").read_text()
    weights = {"MODEL.WEIGHTS": str(folder / "model_final.pth")}
    assert main(arguments(weights, eval_only=True)) == metrics
    assert (folder / "config.yaml").read_text() == config  # what it was trained with
    assert main(arguments(eval_only=True, resume=True)) == metrics


def test_a_run_is_not_overwritten(finished):
    arguments, folder, _ = finished

    def times():
        # But for log.txt, into which this process still writes what is logged.
        return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "log.txt"}

    before = times()
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .* holds a run already .*--resume"):
        main(arguments())
    assert before == times()


def test_evaluation_refuses_weights_that_do_not_fit(finished):
    arguments, folder, _ = finished
    settings = {"MODEL.WEIGHTS": str(folder / "model_final.pth"), "MODEL.DYHEAD.NUM_BLOCKS": 2}
    with pytest.raises(ConfigError, match=r"missing in the file: backbone\.dyhead\.blocks\.1"):
        main(arguments(settings, eval_only=True))


def test_a_model_predicts_and_is_drawn(finished):
    arguments, folder, _ = finished
    settings = {"MODEL.WEIGHTS": str(folder / "model_final.pth"), "MODEL.FCOS.SCORE_THRESH_TEST": 0.01}
    picture = np.full((64, 96, 3), 128, dtype=np.uint8)
    instances = DefaultPredictor(setup(arguments(settings, eval_only=True)))(picture)["instances"]
    assert len(instances) > 0

    pytest.importorskip("cv2", reason="Detectron2's Visualizer needs OpenCV")
    from detectron2.utils.visualizer import Visualizer

    drawn = Visualizer(picture, MetadataCatalog.get("blocks_val")).draw_instance_predictions(instances).get_image()
    assert drawn.shape == picture.shape
    assert (drawn != picture).any()


def test_resuming_continues_from_the_saved_state(blocks, tiny_cfg):
    register_datasets(["blocks_train", "blocks_val"], blocks)
    first = Trainer(tiny_cfg("fcos", {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ()}))
    first.resume_or_load(resume=True)
    first.train()
    second = Trainer(tiny_cfg("fcos", {"SOLVER.MAX_ITER": 4, "DATASETS.TEST": ()}, resume=True))
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    assert_equal(second.model.state_dict(), first.model.state_dict())
    assert_equal(second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"])
    assert second.scheduler.last_epoch == first.scheduler.last_epoch
    second.train()
    assert second.iter == 4
    moments = second.optimizer.state_dict()["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {4}


@pytest.fixture
def losses(monkeypatch):
    """Every iteration's losses, in the order in which they are computed."""
    seen, write = [], SimpleTrainer.write_metrics

    def recording(loss_dict, *args):
        seen.append({name: loss.item() for name, loss in loss_dict.items()})
        write(loss_dict, *args)

    monkeypatch.setattr(SimpleTrainer, "write_metrics", staticmethod(recording))
    return seen


@pytest.mark.parametrize(
    ("seed", "grouping", "workers"), [(3, True, (0, 1)), (-1, False, (1, 0))], ids=["seed", "drawn seed"]
)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(arguments, tmp_path, losses, seed, grouping, workers):
    settings = {
        "SEED": seed,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "SOLVER.OPTIMIZER": "SGD",
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "DATALOADER.ASPECT_RATIO_GROUPING": grouping,
        "DATASETS.TEST": (),
    }
    # Proposals are sampled at random, and images are flipped and resized; the last ones are of a second epoch.
    main(arguments(settings | {"DATALOADER.NUM_WORKERS": workers[0]}, "faster_rcnn"))
    uninterrupted = list(losses)
    assert len({entry["loss_cls"] for entry in uninterrupted}) == 6
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    losses.clear()
    main(arguments(settings | {"DATALOADER.NUM_WORKERS": workers[1]}, "faster_rcnn", resume=True))
    assert losses == uninterrupted[4:]


def test_a_resumed_run_has_the_settings_of_its_command_line(arguments, tmp_path):
    settings = {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": (), "MODEL.BACKBONE.FREEZE_AT": 2}
    main(arguments(settings))
    changes = {"SOLVER.WEIGHT_DECAY": 0.5, "SOLVER.BASE_LR": 0.25, "MODEL.BACKBONE.FREEZE_AT": 3}
    args = arguments(settings | changes | {"SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0}, resume=True)
    main(args)
    (line,) = (tmp_path / "run" / "metrics.json").read_text().splitlines()[-1:]
    assert json.loads(line)["lr"] == 0.25
    content = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    groups = content["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} >= {(0.25, 0.5)}
    assert "FREEZE_AT 2 -> 3, SOLVER.BASE_LR" in (tmp_path / "run" / "log.txt").read_text()
    assert "FREEZE_AT: 3" in (tmp_path / "run" / "config.yaml").read_text()


def test_ctrl_c_finishes_the_iteration_and_a_resumed_run_goes_on(arguments, tmp_path, monkeypatch):
    calls, original = [], DenseDetector.losses

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(DenseDetector, "losses", interrupted)
    settings = {"DATASETS.TEST": (), "DATALOADER.NUM_WORKERS": 1}
    with pytest.raises(Interrupted, match=r"after iteration 1; OUTPUT_DIR .*run holds a checkpoint.*--resume"):
        main(arguments(settings))
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    main(arguments(settings, resume=True))
    assert len(calls) == 4


def test_ctrl_c_ends_an_evaluation_at_once_and_keeps_the_training(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))
    with pytest.raises(Interrupted, match="after iteration 1") as raised:
        main(arguments({"TEST.EVAL_PERIOD": 2}))
    assert raised.value.number == signal.SIGTERM
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_loss_that_diverges_is_told_with_what_to_try(arguments, capfd):
    settings = {"SOLVER.BASE_LR": 1e30, "SOLVER.WARMUP_ITERS": 0, "SOLVER.CLIP_GRADIENTS.ENABLED": False}
    with pytest.raises(DivergedError, match=r"iteration \d: the loss is infinite or NaN.*Lower SOLVER.BASE_LR"):
        main(arguments(settings | {"SOLVER.MAX_ITER": 9}))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_resumed_run_refuses_another_model(finished):
    arguments, _, _ = finished
    with pytest.raises(ConfigError, match=r"of another shape: .*\(32,\) in the file, \(64,\) in the model"):
        main(arguments({"MODEL.FPN.OUT_CHANNELS": 64, "SOLVER.MAX_ITER": 5}, resume=True))


def test_a_resumed_run_refuses_another_optimizer(finished):
    arguments, _, _ = finished
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER: expected 'ADAMW', with which it was trained, got 'SGD'"):
        main(arguments({"SOLVER.OPTIMIZER": "SGD", "SOLVER.MAX_ITER": 5}, resume=True))


def test_training_from_other_weights_takes_what_fits(finished, arguments, tmp_path):
    _, folder, _ = finished
    settings = {
        "MODEL.WEIGHTS": str(folder / "model_final.pth"),
        "MODEL.DYHEAD.NUM_BLOCKS": 2,
        "SOLVER.BASE_LR": 1e-30,  # moves no weight
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 0,
        "DATASETS.TEST": (),
    }
    assert main(arguments(settings)) == {}
    loaded = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    given = torch.load(folder / "model_final.pth")["model"]
    assert torch.equal(loaded["detector.head.deltas.weight"], given["detector.head.deltas.weight"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "missing in the file: backbone.dyhead.blocks.1" in log


@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_precision_is_autocast_of_the_forward_pass(blocks, tiny_cfg, mixed):
    register_datasets(["blocks_train"], blocks)
    trainer = Trainer(tiny_cfg("fcos", {"SOLVER.AMP.ENABLED": mixed, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}))
    seen = []
    trainer.model.detector.head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert seen == [mixed]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_the_other_detectors_run_on_a_cpu_under_mixed_precision(arguments, detector, tmp_path):
    settings = {
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (1,),
        "SOLVER.OPTIMIZER": "SGD",
        "DATASETS.TEST": ("blocks_val", "blocks_train"),
        "TEST.EVAL_PERIOD": 1,
    }
    assert set(main(arguments(settings, detector))) == {"blocks_val", "blocks_train"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    (last,) = [line for line in lines if line["iteration"] == 1]
    assert math.isfinite(last["total_loss"])


def test_precise_statistics_are_the_means_over_batches_and_are_saved(blocks, tiny_cfg, tmp_path):
    register_datasets(["blocks_train"], blocks)
    settings = {
        "TEST.PRECISE_BN.ENABLED": True,
        "TEST.PRECISE_BN.NUM_ITER": 3,
        "MODEL.FPN.NORM": "BN",
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "DATASETS.TEST": (),
    }
    trainer = Trainer(tiny_cfg("fcos", settings))
    seen = []
    key, norm = next((key, m) for key, m in trainer.model.named_modules() if key.endswith("fpn_output4.norm"))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().mean(dim=(0, 2, 3))))
    trainer.train()
    assert len(seen) == 1 + 3  # one iteration of training
    torch.testing.assert_close(norm.running_mean, torch.stack(seen[1:]).mean(dim=0), rtol=1e-3, atol=1e-5)
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert torch.equal(saved[f"{key}.running_mean"], norm.running_mean)


def test_precise_statistics_of_a_model_without_any_are_named(blocks, tiny_cfg, caplog):
    register_datasets(["blocks_train"], blocks)
    Trainer(tiny_cfg("fcos", {"TEST.PRECISE_BN.ENABLED": True}))
    assert caplog.text.count("TEST.PRECISE_BN.ENABLED True: the model learns no statistics") == 1


def test_two_processes_share_a_batch(arguments, tmp_path):
    settings = {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (1,)}
    assert set(main(arguments(settings, num_gpus=2))) == {"blocks_val"}
    assert "World size: 2" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "flags", "error", "message"),
    [
        ({"MODEL.META_ARCHITECTURE": "NoNet"}, {}, ConfigError, "META_ARCHITECTURE: expected .*DyHeadFCOS"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, {}, ConfigError, "NECKS .*: RetinaNet does not know of necks"),
        (
            {"MODEL.BACKBONE.NAME": "build_resnet"},
            {},
            ConfigError,
            "BACKBONE.NAME: expected one of .*got 'build_resnet'",
        ),
        ({"MODEL.DYHEAD.NORM_GROUPS": 7}, {}, ConfigError, "norm_groups: expected a divisor of the 32 channels, got 7"),
        ({"MODEL.FCOS.IN_FEATURES": ["p2"]}, {}, ConfigError, "FCOS.IN_FEATURES: expected some of .*, got p2"),
        ({"MODEL.FCOS.NUM_CLASSES": 5}, {}, ConfigError, "MODEL.FCOS.NUM_CLASSES: expected 2"),
        ({"MODEL.WEIGHTS": "gone.pth"}, {}, ConfigError, "MODEL.WEIGHTS gone.pth: no such file"),
        ({}, {"eval_only": True}, ConfigError, "--eval-only: set MODEL.WEIGHTS"),
        ({}, {"eval_only": True, "resume": True}, ConfigError, "holds no checkpoint"),
        ({}, {"num_gpus": 3}, ConfigError, "IMS_PER_BATCH: expected a multiple of the 3 devices, got 2"),
        ({}, {"num_gpus": 0}, ConfigError, "--num-gpus"),
        ({}, {"machine_rank": 1}, ConfigError, "--machine-rank: expected 0 to 0, got 1"),
        ({"OUTPUT_DIR": "a${b}"}, {}, ConfigError, r"OUTPUT_DIR: .* without \$\{ in its name, got 'a\$\{b\}'"),
        ({"MODEL.DEVICE": "gpu"}, {}, ConfigError, "MODEL.DEVICE: expected cpu, .*got 'gpu'"),
        ({"DATASETS.TRAIN": ()}, {}, ConfigError, "DATASETS.TRAIN: expected at least one dataset"),
        ({"SOLVER.OPTIMIZER": "LION"}, {"num_gpus": 2}, ConfigError, "SOLVER.OPTIMIZER: expected .*'LION'"),
        ({"DATASETS.TRAIN": ("bloks_train",)}, {}, DataError, "'bloks_train' is not known.*blocks_train"),
    ],
)
def test_a_run_that_cannot_be_is_refused(arguments, settings, flags, error, message):
    with pytest.raises(error, match=message):
        main(arguments(settings, **flags))


def test_without_cuda_the_device_becomes_the_cpu(arguments, caplog):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert setup(arguments({"MODEL.DEVICE": "cuda"})).MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE is cuda, but there is no CUDA device" in caplog.text


def test_keys_that_are_not_read_are_named(arguments, caplog):
    setup(arguments({"MODEL.RETINANET.NORM": "GN"}, "retinanet"))
    assert "honour" not in caplog.text
    setup(arguments({"MODEL.MASK_ON": True}, "retinanet"))
    assert "The Detectron2 engine cannot honour, and ignores: MODEL.MASK_ON True" in caplog.text


@pytest.mark.parametrize("name", ["1e3", "2026_11_25", "0x10", "1e-4", "run"])
def test_a_folder_with_a_number_for_a_name_is_text_to_detectron2(arguments, name):
    from detectron2.engine.defaults import _try_get_key  # what its default_setup makes the folder from

    cfg = setup(arguments({"OUTPUT_DIR": name}))
    assert os.path.normpath(_try_get_key(cfg, "OUTPUT_DIR")) == os.path.normpath(cfg.OUTPUT_DIR) == name


def test_no_detections_are_zero_ap(blocks, arguments, tmp_path, tiny_cfg):
    cfg = tiny_cfg()
    Checkpointer(build_model(cfg), str(tmp_path)).save("fresh")
    settings = {"MODEL.WEIGHTS": str(tmp_path / "fresh.pth"), "MODEL.FCOS.SCORE_THRESH_TEST": 0.99}
    metrics = main(arguments(settings, eval_only=True))["blocks_val"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP-red"] == 0


def test_sets_that_share_a_file_and_sets_without_annotations_are_evaluated(finished, blocks, arguments, tmp_path):
    file, images = blocks[1][1:]
    data = json.loads(Path(file).read_text())
    del data["annotations"]
    (tmp_path / "bare.json").write_text(json.dumps(data))
    sets = [["a/val", file, images], ["b/val", file, images], ["bare", str(tmp_path / "bare.json"), images]]
    settings = {
        "MODEL.WEIGHTS": str(finished[1] / "model_final.pth"),
        "DATASETS.REGISTER": [*blocks, *sets],
        "DATASETS.TEST": ("a/val", "b/val", "bare"),
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
        "TEST.BENCHMARK.NUM_IMAGES": 0,
        "TEST.EXPECTED_RESULTS": [["a/val", "AP-red", 50, 50], ["bare", "AP", 0, 100]],
    }
    with pytest.raises(ConfigError, match=r"EXPECTED_RESULTS: expected AP of 0 \+- 100 on dataset 'bare', but"):
        main(arguments(settings, eval_only=True))
    run = tmp_path / "run"
    first, second, bare = json.loads((run / "results.json").read_text())["results"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["AP"] is not None
    assert bare["metrics"] == dict.fromkeys(first["metrics"])
    assert "'bare' has no annotated objects, so that there is no AP" in (run / "log.txt").read_text()
    found = sorted((run / "inference").glob("*/coco_instances_results.json"))
    assert [file.parent.name for file in found] == ["a%2Fval", "b%2Fval", "bare"]
    for file in found:
        detections = json.loads(file.read_text())
        assert {d["image_id"] for d in detections} == {1, 2, 3, 4}
        assert {d["category_id"] for d in detections} <= {3, 5}
    assert (run / "predictions.png").exists()


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        if isinstance(value, dict):
            assert_equal(value, other[key])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
