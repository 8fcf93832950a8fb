"""Two machines, which are two addresses of this one, train as two processes of one machine do."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.fixture
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path, five_pictures):
    """`words(engine, folder, *flags, **settings)`: a command line of a tiny training, in float64's reach of exact."""

    def build(engine, folder, *flags, iterations=3):
        settings = {
            "MODEL.DEVICE": "cpu",
            "MODEL.FPN.OUT_CHANNELS": 32,
            "MODEL.DYHEAD.NUM_BLOCKS": 1,
            "MODEL.FCOS.NUM_CLASSES": 2,
            "DATASETS.REGISTER": [five_pictures],
            "DATASETS.TRAIN": (five_pictures[0],),
            "DATASETS.TEST": (),
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": (48,),
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "OUTPUT_DIR": tmp_path / folder,
        }
        file = ROOT / "configs/quickstart/fcos_dyhead_R18_shapes.yaml"
        opts = [str(word) for pair in settings.items() for word in pair]
        return ["--engine", engine, *flags, "--config-file", str(file), *opts]

    return build


@pytest.fixture
def two_machines():
    """`two_machines(words)`: flags for each of the two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        url = f"tcp://127.0.0.2:{probe.getsockname()[1]}"
    return [["--num-machines", "2", "--machine-rank", str(rank), "--dist-url", url] for rank in (0, 1)]


def start(words):
    command = [sys.executable, str(ROOT / "train_net.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        # Gradients are added up in another order.
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_they_train_as_two_processes_of_one_machine(engine, train_net, words, two_machines, tmp_path):
    other = start(words(engine, "two", *two_machines[1]))
    try:
        assert train_net.main(words(engine, "two", *two_machines[0])) == 0
        assert other.wait(60) == 0
    finally:
        other.kill()
    assert train_net.main(words(engine, "one", "--num-gpus", "2")) == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"))


@pytest.mark.slow
def test_one_that_dies_ends_the_other_and_both_go_on_with_resume(train_net, words, two_machines, tmp_path, capsys):
    other = start(words("torchvision", "run", *two_machines[1], iterations=2000))
    note = tmp_path / "run" / "last_checkpoint"

    def kill():
        while not note.exists():
            time.sleep(0.05)
        os.killpg(other.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    assert train_net.main(words("torchvision", "run", *two_machines[0], iterations=2000)) == 1
    killing.join()
    other.wait()
    assert "error: the machine of rank 1 (" in capsys.readouterr().err
    done = int(note.read_text()[len("model_") : -len(".pth")]) + 1
    other = start(words("torchvision", "run", "--resume", *two_machines[1], iterations=done + 2))
    try:
        assert train_net.main(words("torchvision", "run", "--resume", *two_machines[0], iterations=done + 2)) == 0
        assert other.wait(60) == 0
    finally:
        other.kill()
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["iteration"] == done + 1
