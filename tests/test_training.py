"""What a training can be told beside its model: gradients in parts, averages of weights, mixed precision."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dyhead.config import DETECTORS, ConfigError, load_config
from dyhead.detection.detector import DenseDetector
from dyhead.torchvision import build_model, get_cfg

ROOT = Path(__file__).parent.parent
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
DENSE = [detector.name.lower() for detector in DETECTORS.values()]
TWO_STAGE = [f"{kind}_rcnn" for kind in ("faster", "mask", "keypoint", "cascade")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(tmp_path, five_pictures):
    """`train(engine, folder, settings, *flags)`: the exit code of a tiny training in a folder."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    train_net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)

    def run(engine, folder, settings, *flags):
        settings = {
            "MODEL.DEVICE": "cpu",
            "MODEL.FPN.OUT_CHANNELS": 32,
            "MODEL.DYHEAD.NUM_BLOCKS": 1,
            "MODEL.FCOS.NUM_CLASSES": 2,
            "MODEL.FCOS.LOSS_NORMALIZER": "positives",
            "DATASETS.REGISTER": [five_pictures],
            "DATASETS.TRAIN": (five_pictures[0],),
            "DATASETS.TEST": (),
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": (48,),
            "INPUT.MIN_SIZE_TEST": 48,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.WARMUP_ITERS": 0,
            "TEST.BENCHMARK.NUM_IMAGES": 0,
            "OUTPUT_DIR": tmp_path / folder,
            **settings,
        }
        file = "fcos_dyhead_R18_shapes.yaml"  # of those that come with the package
        opts = [str(word) for pair in settings.items() for word in pair]
        return train_net.main(["--engine", engine, *flags, "--config-file", file, *opts])

    return run


def saved(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def assert_same(one, other, **tolerances):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerances)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_in_parts_are_those_of_the_whole(engine, train, tmp_path, five_pictures, monkeypatch):
    # Of one picture, all parts have the same gradient, which the mean leaves as it is.
    content = json.loads(Path(five_pictures[1]).read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    Path(five_pictures[1]).write_text(json.dumps(content))
    sizes, original = [], DenseDetector.losses

    def counting(self, predictions, targets, *args):
        sizes.append(len(targets))
        return original(self, predictions, targets, *args)

    monkeypatch.setattr(DenseDetector, "losses", counting)
    settings = {"SOLVER.OPTIMIZER": "SGD", "SOLVER.BASE_LR": 0.01, "SOLVER.MAX_ITER": 2, "INPUT.RANDOM_FLIP": "none"}
    assert train(engine, "whole", settings | {"SOLVER.IMS_PER_BATCH": 2}) == 0
    assert train(engine, "parts", settings | {"SOLVER.IMS_PER_BATCH": 6, "SOLVER.ACCUMULATE": 3}) == 0
    assert sizes == [2, 2] + 6 * [2]
    assert_same(saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"], rtol=1e-3, atol=1e-5)
    logged = [json.loads((tmp_path / run / "metrics.json").read_text().splitlines()[-1]) for run in ("whole", "parts")]
    assert logged[0]["total_loss"] == pytest.approx(logged[1]["total_loss"], rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_that_the_images_do_not_make_are_refused(engine, train, capsys):
    assert train(engine, "run", {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.ACCUMULATE": 3}) == 1
    assert "error: SOLVER.ACCUMULATE: expected a divisor of the 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_the_average_of_the_weights_is_the_model(engine, train, tmp_path, five_pictures):
    settings = {
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.EMA.DECAY": 0.15,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "DATASETS.TEST": (five_pictures[0],),
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    }
    run = tmp_path / "run"
    assert train(engine, "run", settings) == 0
    first, second, third = (saved(run, f"model_000000{i}.pth") for i in range(3))
    for before, after, decay in ((first, second, 0.15), (second, third, 0.15)):  # 2 / 11 and 3 / 12 are more
        for key, weight in after["trained"].items():
            if weight.is_floating_point():
                expected = decay * before["model"][key] + (1 - decay) * weight
                torch.testing.assert_close(after["model"][key], expected)
    assert any(not torch.equal(third["model"][key], weight) for key, weight in third["trained"].items())

    report = json.loads((run / "results.json").read_text())["results"]
    detections = next((run / "inference").glob("*/*.json")).read_text()
    again = {"MODEL.WEIGHTS": run / "model_final.pth", "OUTPUT_DIR": tmp_path / "evaluation"}
    assert train(engine, "evaluation", settings | again, "--eval-only") == 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"] == report
    assert next((tmp_path / "evaluation" / "inference").glob("*/*.json")).read_text() == detections

    (run / "last_checkpoint").write_text("model_0000000.pth")
    assert train(engine, "run", settings, "--resume") == 0
    resumed = saved(run)
    assert_same(resumed["model"], third["model"], rtol=0, atol=0)
    assert_same(resumed["trained"], third["trained"], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_either_precision_trains_under_either_engine(engine, dtype, train, tmp_path, monkeypatch):
    seen, original = [], torch.nn.functional.conv2d

    def noting(*args, **options):
        result = original(*args, **options)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
    settings = {
        "SOLVER.MAX_ITER": 2,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": dtype,
        "SOLVER.CHECKPOINT_PERIOD": 1,
    }
    assert train(engine, "run", settings) == 0
    assert getattr(torch, dtype) in seen
    content = saved(tmp_path / "run")
    scaler = (content["trainer"]["_trainer"] if "trainer" in content else content)["grad_scaler"]
    assert bool(scaler) == (dtype == "float16")
    assert all(weight.isfinite().all() for weight in content["model"].values() if weight.is_floating_point())
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    assert train(engine, "run", settings, "--resume") == 0
    assert_same(saved(tmp_path / "run")["model"], content["model"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_every_detector_takes_a_step_in_half_precision(name):
    cfg = get_cfg()
    opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.DYHEAD.NUM_BLOCKS": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    }
    load_config(
        cfg,
        ROOT / f"configs/quickstart/{name}_dyhead_R18_shapes.yaml",
        [str(word) for pair in opts.items() for word in pair],
    )
    image = torch.arange(3 * 64 * 96).remainder(251).view(3, 64, 96).to(torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 6, 60, 50], [30, 10, 90, 60]]), "labels": torch.tensor([0, 1])}
    target["masks"] = torch.zeros(2, 64, 96, dtype=torch.bool)
    target["masks"][:, 10:40, 35:55] = True
    target["keypoints"] = torch.tensor([40.0, 20, 2]).expand(2, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
    torch.manual_seed(0)
    model = build_model(cfg)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    losses = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.load_state_dict(state)  # with the moving averages of positives
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            found = model([image], [target])
        sum(found.values()).backward()
        assert all(loss.dtype == torch.float32 for loss in found.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        losses[dtype] = sum(found.values()).item()
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("key", "value"), [("SOLVER.ACCUMULATE", 2), ("SOLVER.AMP.DTYPE", "bfloat16"), ("SOLVER.EMA.ENABLED", True)]
)
def test_the_trainers_of_others_refuse_what_they_would_ignore(key, value):
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.solver import build_optimizer

    from dyhead.detectron2 import add_dyhead_config

    cfg = add_dyhead_config(detectron2_cfg())
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=rf"{key}: expected .* with another trainer than dyhead.detectron2.Trainer"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_quiet_leaves_the_terminal_to_warnings(train, engine, tmp_path, capfd):
    assert train(engine, "quiet", {"SOLVER.MAX_ITER": 1, "SOLVER.STEPS": "()"}, "--quiet") == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "iteration" not in printed.err
    log = (tmp_path / "quiet/log.txt").read_text()
    assert "total_loss" in log
    assert json.loads((tmp_path / "quiet/run.json").read_text()) == {
        "engine": engine,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "keypoints": [],
    }
