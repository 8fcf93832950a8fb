"""`dyhead predict` as a user runs it: what it writes, names, keeps and refuses."""

import importlib.util
import json
import re
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dyhead import cli, load_detector
from dyhead.data import read_image
from dyhead.prediction import command, videos


@pytest.fixture
def predict(tmp_path, run_folder, detector, monkeypatch):
    """`predict(*words)`: the exit code of the command on a small detector, and the folder it writes to."""

    def load(*args, **options):
        changed = args[1:] != (None,) or options != {"opts": [], "device": None, "engine": "auto"}
        return load_detector(*args, **options) if changed else detector

    monkeypatch.setattr(command, "load_detector", load)

    def run(*words):
        out = tmp_path / "out"
        return cli.main(["predict", str(run_folder), "--out", str(out), *map(str, words)]), out

    return run


def written(out):
    return [json.loads((out / f"{name}.json").read_text()) for name in ("images", "detections")]


def test_a_folder_becomes_json_and_pictures(predict, detector, pictures, capsys):
    code, out = predict(pictures, "--score-threshold", "0", "--batch-size", "2")
    assert code == 3  # for one is broken
    printed = capsys.readouterr()
    assert f"{pictures / 'broken.jpg'}: the image cannot be read" in printed.err
    images, detections = written(out)
    assert printed.out == f"{out}: pictures 3, detections {len(detections)}, left out 1\n"
    names = ["a.png", "b.jpg", "below/a.png"]
    assert [image["file_name"] for image in images["images"]] == [str(pictures / name) for name in names]
    assert [(c["id"], c["name"]) for c in images["categories"]] == [(7, "ant"), (8, "bee"), (11, "cow")]
    for image in images["images"]:
        assert Image.open(image["file_name"]).size == (image["width"], image["height"])
    drawn = sorted(str(path.relative_to(out / "pictures")) for path in (out / "pictures").rglob("*.*"))
    assert drawn == sorted(names)
    for name in names:
        assert Image.open(out / "pictures" / name).size == Image.open(pictures / name).size
        assert Image.open(out / "pictures" / name).format == {".png": "PNG", ".jpg": "JPEG"}[name[-4:]]

    found = detector(pictures / "below/a.png")
    (number,) = [image["id"] for image in images["images"] if "below" in image["file_name"]]
    own = [d for d in detections if d["image_id"] == number]
    assert len(own) == len(found) > 0
    np.testing.assert_allclose([d["score"] for d in own], found.scores, atol=0.02)  # padded, in a batch

    loaded = COCO(out / "images.json").loadRes(str(out / "detections.json"))
    assert len(loaded.anns) == len(detections)


def test_the_threshold_holds_in_json_and_pictures(predict, pictures):
    code, out = predict(pictures / "a.png", "--score-threshold", "1")
    assert code == 0
    assert written(out)[1] == []
    assert np.array_equal(np.asarray(Image.open(out / "pictures/a.png")), np.asarray(Image.open(pictures / "a.png")))


def test_a_threshold_below_the_detectors_own_is_told(predict, pictures, caplog):
    opts = ["--opts", "MODEL.FCOS.SCORE_THRESH_TEST", "0.2"]
    code, out = predict(pictures / "a.png", "--no-pictures", "--score-threshold", "0.1", *opts)
    assert code == 0
    assert "nothing below MODEL.FCOS.SCORE_THRESH_TEST 0.2" in caplog.text
    assert not (out / "pictures").exists()


def test_pictures_of_one_name_and_of_other_kinds_do_not_replace_each_other(predict, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (40, 30)).save(other / "a.png")
    Image.new("L", (40, 30)).save(other / "a.tif")
    patterns = str(other / "*.*")
    code, out = predict(pictures / "a.png", patterns, pictures / "a.png")
    assert code == 0
    assert [image["width"] for image in written(out)[0]["images"]] == [64, 40, 40]
    sizes = {path.name: Image.open(path).size for path in (out / "pictures").iterdir()}
    assert sizes == {"a.png": (64, 48), "a-2.png": (40, 30), "a.tif.png": (40, 30)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none*.jpg"], r"none\*.jpg: expected a picture"),
        (["{empty}"], "a folder without pictures"),
        (["{pictures}", "--score-threshold", "30"], "--score-threshold: expected 0 to 1, got 30"),
        (["{pictures}", "--batch-size", "0"], "--batch-size: expected at least 1"),
        (["{pictures}", "--device", "tpu"], "MODEL.DEVICE"),
        (["{pictures}", "--opts", "MODEL.FCOS.NONE", "1"], "unknown key MODEL.FCOS.NONE"),
        (["{pictures}", "--weights", "none.pth"], "none.pth"),
    ],
)
def test_what_a_user_did_wrong_is_told(predict, pictures, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    words = [word.format(empty=tmp_path / "empty", pictures=pictures) for word in words]
    code, out = predict(*words)
    error = capsys.readouterr().err
    assert code == 1
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not out.exists()


def test_nothing_is_overwritten(predict, pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert predict(pictures)[0] == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_was_done_before_an_interruption_is_kept(predict, pictures, monkeypatch, capsys):
    def interrupted(path):
        if "broken" in path:
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(command, "read_image", interrupted)
    code, out = predict(pictures, "--score-threshold", "0")
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    images, detections = written(out)
    assert [image["file_name"][-5:] for image in images["images"]] == ["a.png", "b.jpg"]
    assert {d["image_id"] for d in detections} == {1, 2}


def test_quiet_says_what_is_wrong_alone(predict, pictures, capsys):
    code, _ = predict(pictures, "--quiet")
    printed = capsys.readouterr()
    assert code == 3
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "broken.jpg" in printed.err


@pytest.mark.parametrize("name", ["cv2", "av"])
def test_frames_of_a_video(predict, tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setattr(videos, "library", lambda: name)
    frames = [Image.new("RGB", (65, 48), (40 * i, 90, 200)) for i in range(5)]
    path = tmp_path / "clip.mp4"
    with videos.VideoWriter(str(path), Fraction(10)) as writer:
        for frame in frames:
            writer.write(frame)
    code, out = predict(path, "--batch-size", "2", "--score-threshold", "0")
    assert code == 0
    images = written(out)[0]["images"]
    assert [(image["file_name"], image["frame"]) for image in images] == [(str(path), i) for i in range(5)]
    assert {(image["width"], image["height"]) for image in images} == {(64, 48)}
    drawn = videos.Video(str(out / "pictures/clip.mp4"))
    assert drawn.rate == 10
    assert len(list(drawn.frames())) == 5
    colours = [frame.mean(axis=(0, 1)) for frame in videos.Video(str(path)).frames()]
    np.testing.assert_allclose(colours, [frame.getpixel((0, 0)) for frame in frames], atol=6)  # RGB, not BGR


@pytest.mark.parametrize(
    ("there", "message"), [(["cv2"], "clip.mp4: the video"), ([], "clip.mp4: videos need PyAV or OpenCV")]
)
def test_a_broken_video_is_left_out(predict, pictures, monkeypatch, capfd, there, message):
    if there:
        pytest.importorskip("cv2")
    find_spec = importlib.util.find_spec
    absent = {"av", "cv2"} - set(there)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    (pictures / "clip.mp4").write_bytes(b"no video")
    code, out = predict(pictures / "a.png", pictures / "clip.mp4")
    assert code == 3
    assert message in capfd.readouterr().err
    assert len(written(out)[0]["images"]) == 1
