"""COCO files for BCCD."""

import json

from benchmarks import bccd

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def test_annotations_become_coco_files_with_boxes_inside_their_pictures(tmp_path, capsys):
    for folder in ("ImageSets/Main", "Annotations"):
        (tmp_path / "BCCD" / folder).mkdir(parents=True)
    objects = {
        "a": [("WBC", 1, 2, 31, 42), ("RBC", -3, 5, 90, 70)],
        "b": [("Platelets", 7, 8, 8, 30)],  # one pixel wide
        "c": [("Platelets", 0, 0, 2, 2)],
    }
    for name, boxes in objects.items():
        text = "".join(OBJECT.format(*box) for box in boxes)
        size = "<size><width>80</width><height>60</height></size>"
        (tmp_path / f"BCCD/Annotations/{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    (tmp_path / "BCCD/ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (tmp_path / "BCCD/ImageSets/Main/test.txt").write_text("c\n")
    bccd.main(tmp_path)
    train, val = (json.loads((tmp_path / f"{split}.json").read_text()) for split in ("train", "val"))
    assert [(image["id"], image["file_name"], image["width"]) for image in train["images"]] == [
        (1, "a.jpg", 80),
        (2, "b.jpg", 80),
    ]
    assert [(a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in train["annotations"]] == [
        (1, 2, [1, 2, 30, 40], 1200),
        (1, 1, [0, 5, 80, 55], 4400),
    ]
    assert [(a["id"], a["category_id"], a["bbox"]) for a in val["annotations"]] == [(1, 3, [0, 0, 2, 2])]
    assert {c["id"]: c["name"] for c in val["categories"]} == {1: "RBC", 2: "WBC", 3: "Platelets"}
    assert f"{tmp_path / 'train.json'}: 2 images, 2 boxes" in capsys.readouterr().out
