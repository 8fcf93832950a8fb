import dataclasses

import numpy as np
import pytest
from PIL import Image

from dyhead.data import CocoSplit, DatasetInfo
from dyhead.evaluation import draw_predictions, plot_losses, visualization


@pytest.fixture
def split(tmp_path):
    """Five grey images of 320 x 160 (width x height), each with one object."""
    records = []
    for i in range(5):
        Image.fromarray(np.full((160, 320, 3), 128, np.uint8)).save(tmp_path / f"{i}.png")
        truth = {"bbox": [100, 50, 200, 100], "category_id": 0, "iscrowd": 0}
        records.append({"file_name": str(tmp_path / f"{i}.png"), "height": 160, "width": 320, "image_id": 10 + i,
                        "annotations": [truth]})  # fmt: skip
    return CocoSplit(DatasetInfo("five", "", str(tmp_path)), ["cat", "dog"], [3, 8], records)


def drawn(split, detections, tmp_path, **options):
    draw_predictions(split, detections, tmp_path / "sheet.png", **options)
    return np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)


def detection(image, score=0.9):
    return {"image_id": image, "category_id": 8, "bbox": [200, 60, 80, 40], "score": score}


def test_predictions_are_drawn_right_of_the_ground_truth_and_in_place(split, tmp_path):
    empty = drawn(split, [], tmp_path, count=1)
    changed = np.argwhere((drawn(split, [detection(10)], tmp_path, count=1) != empty).any(axis=2))
    # The right image's left edge: a gap, an image of 320, a gap. The label stands above the box.
    left, top = 8 + 320 + 8, 22
    rows, columns = changed[:, 0] - top, changed[:, 1] - left
    assert (columns.min(), rows.max()) == (200 - 1, 60 + 40)
    assert 200 + 80 <= columns.max() + 1 < 320
    assert 60 - 20 < rows.min() < 60
    # The ground truth's box is in the left image and in no other.
    grey = (empty == 128).all(axis=2)
    assert not grey[top + 50, 8 + 100 : 8 + 200].any()
    assert grey[top + 50, left + 100 : left + 200].all()


def test_masks_tint_the_image_and_keypoints_are_dots(split, tmp_path):
    plain = drawn(split, [detection(10)], tmp_path, count=1)
    mask = np.zeros((160, 320), bool)
    mask[70:90, 210:250] = True
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.flatten(), [0]]))), prepend=0, append=mask.size)
    with_mask = detection(10) | {"segmentation": {"size": [160, 320], "counts": [int(n) for n in runs]}}
    left, top = 8 + 320 + 8, 22
    changed = (drawn(split, [with_mask], tmp_path, count=1) != plain).any(axis=2)
    np.testing.assert_array_equal(changed[top : top + 160, left : left + 320], mask)
    points = detection(10) | {"keypoints": [230, 80, 0.7, 10, 10, 0]}  # the second is none
    changed = np.argwhere((drawn(split, [points], tmp_path, count=1) != plain).any(axis=2))
    assert np.abs(changed - (top + 80, left + 230)).max() <= 3
    assert len(changed) > 8


def test_unsure_detections_and_those_of_other_images_are_not_drawn(split, tmp_path):
    empty = drawn(split, [], tmp_path, count=1)
    np.testing.assert_array_equal(drawn(split, [detection(10, 0.29), detection(11)], tmp_path, count=1), empty)


def test_as_many_images_as_there_are(split, tmp_path):
    three, all_five = drawn(split, [], tmp_path, count=3), drawn(split, [], tmp_path, count=50)
    assert three.shape[0] == 22 + 2 * (160 + 8)
    assert all_five.shape[0] == 22 + 3 * (160 + 8)


def test_losses_are_read_by_iteration(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 0, "total_loss": 3.0, "loss_cls": 2.0, "lr": 0.1}\n'
        '{"iteration": 20, "total_loss": 2.0, "loss_cls": 1.0}\n'
        '{"iteration": 20, "bbox/AP": 12.0}\n'
        '{"iteration": 20, "total_loss": 2.5, "loss_cls": 1.5}\n'  # a resumed run
        '{"iteration": 40, "total_'
    )
    assert visualization.read_losses(tmp_path / "metrics.json") == {
        "total_loss": {0: 3.0, 20: 2.5},
        "loss_cls": {0: 2.0, 20: 1.5},
    }
    plot_losses(tmp_path / "metrics.json", tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24)) > 10


def test_no_losses_is_an_error(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 20, "bbox/AP": 12.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.json: expected lines"):
        plot_losses(tmp_path / "metrics.json", tmp_path / "losses.png")


def with_names(split, *names):
    return dataclasses.replace(split, class_names=list(names))


def test_names_of_any_kind_keep_the_sheet_in_shape(split, tmp_path, caplog):
    plain = drawn(with_names(split, "cat", "dog"), [detection(10)], tmp_path)
    for name in ("a\nb\n" * 50, "x" * 1000, "قطة " * 50, "\0\u202e", ""):
        sheet = drawn(with_names(split, "cat", name), [detection(10)], tmp_path)
        assert sheet.shape == plain.shape
        # A line of letters above the box, and nothing else, is changed.
        rows = np.nonzero((sheet != plain).any(axis=(1, 2)))[0]
        assert 22 + 60 - 20 < rows.min() <= rows.max() < 22 + 60
    assert not caplog.records


def test_a_long_name_leaves_room_for_the_score(split, tmp_path):
    pictures = [
        drawn(with_names(split, "cat", "x" * 1000), [detection(10, score)], tmp_path, count=1) for score in (0.7, 0.9)
    ]
    columns = np.nonzero((pictures[0] != pictures[1]).any(axis=(0, 2)))[0]
    assert 8 + 320 + 8 + 280 < columns.min() <= columns.max() < 8 + 320 + 8 + 320


def test_a_class_whose_name_has_no_font_has_its_number_and_is_told_once(split, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(visualization.lettering, "readable", lambda text: (text.replace("犬", "?"), "犬" in text))
    escaped = drawn(with_names(split, "cat", "犬"), [detection(10)], tmp_path)
    (record,) = caplog.records
    assert "letters of the name of 1 classes, the first '犬'" in record.getMessage()
    np.testing.assert_array_equal(escaped, drawn(with_names(split, "cat", "1: ?"), [detection(10)], tmp_path))


@pytest.mark.parametrize("size", [(3, 900), (900, 3), (2, 2), (700, 900)])
def test_pictures_of_any_shape_have_room_for_their_labels(split, tmp_path, size):
    height, width = size
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(tmp_path / "odd.png")
    truth = {"bbox": [0, 0, width, height], "category_id": 0, "iscrowd": 0}
    odd = {
        "file_name": str(tmp_path / "odd.png"),
        "height": height,
        "width": width,
        "image_id": 1,
        "annotations": [truth],
    }
    sheet = drawn(dataclasses.replace(split, records=[odd, *split.records]), [], tmp_path)
    label = (sheet[22 : 22 + 320, 8 : 8 + 320] == 0).all(axis=2)[2:-2, 2:-2].sum()
    assert label > 150  # black pixels behind the name


def test_boxes_far_outside_are_drawn_as_what_can_be_seen_of_them(split, tmp_path):
    far = {**detection(10), "bbox": [-1e300, -1e30, 1e305, 1e300]}
    near = {**detection(10), "bbox": [-20, -20, 400, 400]}
    np.testing.assert_array_equal(drawn(split, [far], tmp_path, count=1), drawn(split, [near], tmp_path, count=1))


def test_a_set_without_images_gives_an_empty_sheet(split, tmp_path):
    assert drawn(dataclasses.replace(split, records=[]), [], tmp_path).shape[0] == 22


def test_a_drawing_is_there_as_a_whole_or_not_at_all(split, tmp_path, monkeypatch):
    drawn(split, [], tmp_path)
    before = (tmp_path / "sheet.png").read_bytes()

    def fail(self, file, *args):
        file.write(before[:50])
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        draw_predictions(split, [detection(10)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("box", [(100, 100, 140, 130), (0, 0, 30, 30), (280, 290, 320, 320), (-9, 50, 640, 300)])
def test_labels_of_objects_at_one_place_do_not_cover_each_other(box):
    taken = []
    for _ in range(6):
        x, y = visualization._free_place(box, (60, 14), (320, 320), taken)
        assert 0 <= x <= 320 - 60
        assert 0 <= y <= 320 - 14
        assert not any(x < right and left < x + 60 and y < low and top < y + 14 for left, top, right, low in taken)
        taken.append((x, y, x + 60, y + 14))


def test_a_label_that_has_no_room_covers_the_least_of_others():
    crowd = [(0, 0, 50, 20), (0, 0, 50, 20), (0, 20, 50, 40)]
    assert visualization._free_place((0, 0, 10, 40), (50, 20), (50, 40), crowd) == (0, 20)
