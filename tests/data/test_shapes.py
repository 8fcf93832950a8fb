import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dyhead.data import DataError, get, load, read_image, shapes
from dyhead.data.shapes import __main__ as command_line
from dyhead.data.shapes import cache

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

STANDARD = shapes.SPECS["shapes_train"]


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """The easy validation set, drawn once for this file."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        return get("shapes_easy_val")


@pytest.fixture(scope="module")
def standard():
    """(image shape, annotations) of 200 standard images; without textures, which annotations do not depend on."""
    plain = replace(STANDARD, textured=False, noise=0)
    return [(image.shape, found) for image, found in (shapes.draw(plain, i) for i in range(200))]


def masks(annotations):
    """Decoded by pycocotools."""
    coco = COCO()
    height, width = annotations[0]["segmentation"]["size"]
    coco.dataset = {"images": [{"id": 1, "height": height, "width": width}]}
    coco.createIndex()
    return [coco.annToMask({**a, "image_id": 1}).astype(bool) for a in annotations]


def tight_box(mask):
    (y0, x0), (y1, x1) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0) + 1
    return [x0, y0, x1 - x0, y1 - y0]


def test_a_drawn_set_is_sound_and_complete(easy):
    split = load(easy)
    assert split.class_names == ["circle", "triangle", "square"]
    assert len(split.records) == 100
    for record in split.records:
        assert 1 <= len(record["annotations"]) <= 4
        read_image(record["file_name"], size=(record["height"], record["width"]))
    assert {a["category_id"] for r in split.records for a in r["annotations"]} == {0, 1, 2}


def test_pycocotools_reads_the_annotations(easy):
    coco = COCO(easy.json_file)
    for a in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(a)
        assert tight_box(mask) == a["bbox"]
        assert mask.sum() == a["area"]


def test_boxes_and_areas_are_those_of_the_seen_part(standard):
    overlapping = 0
    for shape, annotations in standard:
        taken = np.zeros(shape[:2], int)
        for a, mask in zip(annotations, masks(annotations), strict=True):
            assert mask.shape == shape[:2]
            assert tight_box(mask) == a["bbox"]
            assert mask.sum() == a["area"]
            taken += mask
            overlapping += a["visibility"] < 0.95
        assert taken.max() == 1  # a pixel belongs to one object
    assert overlapping > 100  # and yet many objects are partly hidden


def test_masks_agree_with_the_drawn_image(easy):
    coco, compared = COCO(easy.json_file), 0
    for entry in coco.loadImgs(coco.getImgIds()):
        image = np.asarray(Image.open(os.path.join(easy.image_root, entry["file_name"]))).astype(float)
        objects = [coco.annToMask(a).astype(bool) for a in coco.loadAnns(coco.getAnnIds(entry["id"]))]
        ground = np.median(image[~np.any(objects, axis=0)], axis=0)
        elsewhere = np.ones(image.shape[:2], bool)
        for mask in objects:
            x, y, width, height = tight_box(mask)
            near = np.s_[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2]
            elsewhere[near] = False
            if sum(other[near].any() for other in objects) > 1:
                continue
            # How far each pixel is on the way from the ground's colour to the object's; halfway it is on the edge.
            way = np.median(image[mask], axis=0) - ground
            cover = (image[near] - ground) @ way / (way @ way)
            doubtful = np.abs(cover - 0.5) < 0.02
            np.testing.assert_array_equal((cover > 0.5) | doubtful, mask[near] | doubtful)
            compared += 1
        assert (image[elsewhere] == ground).all()  # nothing is drawn that is not annotated
    assert compared > 150


def test_shapes_are_what_they_are_called():
    """Whole objects have the area that geometry says, on a circle of radius 1."""
    b, w = 0.95, 0.31  # half length and half width of the bar and of the cross's arms
    apart, small = 0.5, 0.75  # the crescent's second circle
    lens = (
        math.acos((apart**2 + 1 - small**2) / (2 * apart))
        + small**2 * math.acos((apart**2 + small**2 - 1) / (2 * apart * small))
        - 0.5 * math.sqrt((1 + small - apart) * (apart + 1 - small) * (apart - 1 + small) * (apart + 1 + small))
    )
    areas = {
        "circle": math.pi,
        "triangle": 3 * math.sqrt(3) / 4,
        "square": 2.0,
        "bar": 4 * b * w,
        "star": 5 * 0.45 * math.sin(math.pi / 5),
        "cross": 8 * b * w - 4 * w**2,
        "ring": math.pi * (1 - 0.55**2),
        "crescent": math.pi - lens,
    }
    assert set(areas) == set(STANDARD.classes)
    for name, area in areas.items():
        spec = replace(STANDARD, classes=(name,), size=(80, 200), visible=1.0, objects=(1, 1), textured=False, noise=0)
        for i in range(3):
            (a,) = shapes.draw(spec, i)[1]
            assert a["area"] == pytest.approx(area * (a["size"] / 2) ** 2, rel=0.02), name
            assert max(a["bbox"][2:]) <= a["size"] + 1


def test_scales_are_log_uniform_from_8_to_200_pixels(standard):
    sizes = np.sort([a["size"] for _, annotations in standard for a in annotations])
    assert len(sizes) > 1000
    assert 8 <= sizes[0] < 9
    assert 185 < sizes[-1] <= 200
    # The Kolmogorov-Smirnov distance; 1,500 uniform numbers stay below 0.05 in 999 of 1,000 cases.
    place = np.log(sizes / 8) / np.log(200 / 8)
    assert np.abs(place - (np.arange(len(place)) + 0.5) / len(place)).max() < 0.05
    # And the sizes are true: whole circles are as wide and as high as they say.
    circles = [a for _, annotations in standard for a in annotations if a["category_id"] == 1 and a["visibility"] == 1]
    assert len(circles) > 50
    for a in circles:
        assert a["bbox"][2:] == pytest.approx([a["size"]] * 2, abs=1)


def test_objects_are_seen_as_far_as_the_set_promises(standard):
    seen = np.array([a["visibility"] for _, annotations in standard for a in annotations])
    assert seen.min() >= 0.5
    assert seen.min() < 0.55
    hard = replace(shapes.SPECS["shapes_hard_train"], textured=False, noise=0)
    seen = np.array([a["visibility"] for i in range(20) for a in shapes.draw(hard, i)[1]])
    assert 0.25 <= seen.min() < 0.3


def test_all_classes_are_drawn_about_equally_often(standard):
    classes = np.bincount([a["category_id"] for _, annotations in standard for a in annotations])[1:]
    assert len(classes) == len(STANDARD.classes) >= 6
    assert classes.min() > 0.7 * classes.mean()
    assert classes.max() < 1.3 * classes.mean()


def test_textures_and_noise_do_not_move_the_objects(standard):
    image, annotations = shapes.draw(STANDARD, 3)
    assert annotations == standard[3][1]
    assert image.std(axis=(0, 1)).min() > 3


def test_drawing_is_reproducible(easy):
    first, second = shapes.draw(STANDARD, 5), shapes.draw(STANDARD, 5)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    # Sets that are on disk already are found again, unless DRAWING_VERSION goes up.
    assert os.path.basename(os.path.dirname(easy.json_file)) == "shapes_easy_val-f286e2ec27"
    # The annotations are the same on every machine and in every version, or DRAWING_VERSION must go up.
    with open(easy.json_file, encoding="utf-8") as file:
        annotations = json.load(file)["annotations"]
    places = [(a["image_id"], a["category_id"], *a["bbox"], a["area"]) for a in annotations]
    assert hashlib.sha256(str(places).encode()).hexdigest()[:16] == "47b4744089bb3b82"
    points = [a["keypoints"] for a in annotations]
    assert hashlib.sha256(str(points).encode()).hexdigest()[:16] == "28cee74358a066e7"
    first = [(a["category_id"], *a["bbox"], a["area"]) for a in shapes.draw(STANDARD, 5)[1]]
    assert hashlib.sha256(str(first).encode()).hexdigest()[:16] == "a12cb35a5914d18f"


def test_keypoints_are_the_middle_and_the_outermost_pixels_of_the_visible_part(easy, standard):
    split = load(easy)
    assert split.keypoint_names == ["center", "top", "right", "bottom", "left"]
    assert all(len(a["keypoints"]) == 15 for record in split.records for a in record["annotations"])
    for _, annotations in standard[:20]:
        for annotation, mask in zip(annotations, masks(annotations), strict=True):
            (x, y, _), *outermost = np.reshape(annotation["keypoints"], (5, 3)).tolist()
            pixels = np.argwhere(mask)[:, ::-1]  # as x and y
            assert np.abs(pixels.mean(axis=0) - (x, y)).max() <= 0.5
            x0, y0, width, height = annotation["bbox"]
            for (x, y, seen), axis, edge in zip(
                outermost, (1, 0, 1, 0), (y0, x0 + width - 1, y0 + height - 1, x0), strict=True
            ):
                on_edge = pixels[pixels[:, axis] == edge]
                assert ((x, y)[axis], seen) == (edge, 2)
                assert mask[y, x]
                before = (on_edge[:, 1 - axis] < (x, y)[1 - axis]).sum()
                assert before == len(on_edge) // 2


@pytest.mark.parametrize("level", ["shapes_easy", "shapes", "shapes_hard"])
def test_train_and_val_share_no_image(level):
    train, val = ([shapes.draw(shapes.SPECS[f"{level}_{part}"], i) for i in range(10)] for part in ("train", "val"))
    assert not {p.tobytes() for p, _ in train} & {p.tobytes() for p, _ in val}
    assert not {str(a) for _, a in train} & {str(a) for _, a in val}


@pytest.fixture
def few(monkeypatch):
    """The easy validation set, cut to five images."""
    spec = replace(shapes.SPECS["shapes_easy_val"], images=5)
    monkeypatch.setitem(shapes.SPECS, "shapes_easy_val", spec)
    return spec


def test_a_set_is_drawn_once(few, monkeypatch, tmp_path):
    paths = shapes.prepare("shapes_easy_val", tmp_path)
    monkeypatch.setattr(cache, "draw", None)
    assert shapes.prepare("shapes_easy_val", tmp_path) == paths


def test_a_changed_set_is_drawn_anew(few, monkeypatch, tmp_path):
    json_file, images = shapes.prepare("shapes_easy_val", tmp_path)
    monkeypatch.setitem(shapes.SPECS, "shapes_easy_val", replace(few, images=6))
    changed, changed_images = shapes.prepare("shapes_easy_val", tmp_path)
    assert (len(os.listdir(images)), len(os.listdir(changed_images))) == (5, 6)
    monkeypatch.setattr(cache, "DRAWING_VERSION", cache.DRAWING_VERSION + 1)
    assert shapes.prepare("shapes_easy_val", tmp_path)[0] not in (json_file, changed)


def test_an_interrupted_drawing_leaves_nothing_behind(few, monkeypatch, tmp_path):
    draw = shapes.draw

    def interrupted(spec, index):
        if index == 3:
            raise KeyboardInterrupt
        return draw(spec, index)

    monkeypatch.setattr(cache, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.prepare("shapes_easy_val", tmp_path)
    assert [n for n in os.listdir(tmp_path / "shapes") if not n.endswith(".lock")] == []
    monkeypatch.setattr(cache, "draw", draw)
    assert len(os.listdir(shapes.prepare("shapes_easy_val", tmp_path)[1])) == 5


def test_the_slower_of_two_drawings_takes_the_faster_ones_result(few, monkeypatch, tmp_path):
    """As two machines that share a folder without locks would: the second draws the whole set inside the first."""
    draw, nested = shapes.draw, []

    def overtaken(spec, index):
        if index == 3 and not nested:
            nested.append(True)
            nested.append(shapes.prepare("shapes_easy_val", tmp_path))
        return draw(spec, index)

    monkeypatch.setattr(cache, "_lock", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(cache, "draw", overtaken)
    paths = shapes.prepare("shapes_easy_val", tmp_path)
    assert paths == nested[1]
    assert len(os.listdir(paths[1])) == 5
    assert len(os.listdir(tmp_path / "shapes")) == 1


def test_several_processes_may_draw_at_once(tmp_path):
    code = (
        "import sys; from dataclasses import replace; from dyhead.data import shapes;"
        "shapes.SPECS['shapes_easy_val'] = replace(shapes.SPECS['shapes_easy_val'], images=40);"
        "print(shapes.prepare('shapes_easy_val', sys.argv[1])[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("drawing" in err for _, err in outputs) == 1  # one draws, the others wait
    with open(outputs[0][0].strip(), encoding="utf-8") as file:
        assert len(json.load(file)["images"]) == 40
    assert [n for n in os.listdir(tmp_path / "shapes") if n.endswith(".partial")] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"'shapes_easy_val' could not be drawn .*file/shapes.*DETECTRON2_DATASETS"):
        shapes.prepare("shapes_easy_val", tmp_path / "file")


def test_the_command_line_draws_sets_and_previews(few, tmp_path, capsys):
    command_line.main(["shapes_easy_val", "--root", str(tmp_path)])
    assert os.path.isfile(capsys.readouterr().out.split()[0])
    command_line.main(["shapes_easy_val", "shapes_hard_val", "--preview", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 400
    with pytest.raises(SystemExit):
        command_line.main(["shapes_difficult"])
    assert "shapes_easy_val" in capsys.readouterr().err
