"""The classes of a dataset by its name, also where its pictures are not at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dyhead.data import catalog, shapes
from dyhead.data.coco import Classes, classes_of, read_json
from dyhead.data.errors import DataError
from dyhead.data.shapes.drawing import KEYPOINTS

# COCO's 80 classes in the order of their ids, 1 to 90, of which ten are not used.
_COCO_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def classes_by_name(name: str, registered: Iterable[Sequence[str]] = ()) -> Classes | None:
    """The classes of a dataset; nothing is drawn, and no picture is looked for.

    Args:
        name: of the dataset.
        registered: entries of the config key `DATASETS.REGISTER`, each `[name, JSON file, image folder]`.

    Returns:
        None where they are not known: nobody has registered the name, or the annotation file is not there or broken.
    """
    if name in shapes.SPECS:
        names = list(shapes.SPECS[name].classes)
        return Classes(names, list(range(1, len(names) + 1)), list(KEYPOINTS))
    if name.startswith("coco_20"):
        ids = [i for i in range(1, 91) if i not in _COCO_UNUSED]
        return Classes([part.strip() for part in _COCO_NAMES.replace("\n", " ").split(",")], ids)
    if name.startswith("keypoints_coco_20"):
        return Classes(["person"], [1])
    files = [entry[1] for entry in registered if entry[0] == name]
    try:
        info = catalog.DatasetInfo(name, files[0], "") if files else catalog.get(name)
        return classes_of(read_json(info.json_file), info)
    except DataError:
        return None
