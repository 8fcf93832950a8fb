"""Whatever stands at a place of an annotation file, loading either takes it or names the file and the place."""

import copy
import json
import logging
import math

import numpy as np
import pytest

from dyhead.data import DataError, load
from dyhead.data.coco import area, is_crowd, read_json


def deep(levels):
    value = 1
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    return value


NASTY = [
    None, True, False, 0, 1, -1, 2, 3.0, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**63, 10**400, -(10**400),
    math.nan, math.inf, -math.inf, "", "1", "7", "a.png", "/", "..", "a\0b", "\ud800", "\udce9", "\n", "x" * 300,
    [], {}, [1], [[]], [None], [1, 2, 3, 4], [math.nan] * 4, [True] * 4, ["1"] * 4, [10**400] * 4, [1e308] * 4,
    [[1]] * 4, {"id": 1}, {"counts": [], "size": []}, {"counts": "a", "size": [10**400, 1]}, deep(3), deep(200),
]  # fmt: skip


@pytest.fixture(scope="module")
def quiet():
    """No warnings: there is one for nearly every file."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def places(value, path=()):
    """The path of every value within lists and dicts, outermost first."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(data, path, change):
    """A copy of the data, with `change(parent, key)` made at a path; the whole where that is empty."""
    root = [copy.deepcopy(data)]
    parent, key = root, 0
    for step in path:
        parent, key = parent[key], step
    change(parent, key)
    return root[0] if root else None


def try_file(small_set, data, path):
    """Loads the data, and reads what the evaluation reads of it; a fault is a DataError that names file and field."""
    info = small_set.write(json.dumps(data))
    try:
        split = load(info)
    except DataError as error:
        message = str(error)
        if "CLIP_BOXES" in message:
            split = load(info, clip_boxes=True)
            boxes = np.array([a["bbox"] for record in split.records for a in record["annotations"]]).reshape(-1, 4)
            assert ((boxes >= 0) & (boxes <= [40, 30, 40, 30])).all()
        message.encode()
        assert "small.json" in message
        assert len(message) < 3000
        if len(path) >= 3:
            assert str(path[2]) in message, (path, message)
        return False
    json.dumps(split.records)
    copy.deepcopy(split.records)
    boxes = np.array([a["bbox"] for record in split.records for a in record["annotations"]], float).reshape(-1, 4)
    assert np.isfinite(boxes).all()
    read = read_json(info.json_file)
    known = {record["image_id"] for record in split.records}
    for a in read.get("annotations", []):
        assert 0 <= area(a) <= 1e10
        assert is_crowd(a) in (0, 1)
        assert a["image_id"] in known
        assert a["category_id"] in split.category_ids
    return True


def set_to(value):
    return lambda parent, key: parent.__setitem__(key, value)


def test_nasty_values_at_every_place(small_set, quiet):
    small_set.data["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 22]]
    taken = refused = 0
    for path in places(small_set.data):
        for value in NASTY:
            if try_file(small_set, changed(small_set.data, path, set_to(value)), path):
                taken += 1
            else:
                refused += 1
    assert taken > 200
    assert refused > 1000


def test_missing_and_doubled_values_at_every_place(small_set, quiet):
    for path in places(small_set.data):
        if path:
            try_file(small_set, changed(small_set.data, path, lambda parent, key: parent.__delitem__(key)), path)
        if path and isinstance(path[-1], int):
            doubled = changed(small_set.data, path, lambda parent, key: parent.insert(key, parent[key]))
            try_file(small_set, doubled, path if len(path) > 2 else ())


def test_several_nasty_values_at_once(small_set, quiet):
    random = np.random.default_rng(0)
    paths = [path for path in places(small_set.data) if len(path) >= 3]
    for _ in range(300):
        data = small_set.data
        for i in random.integers(len(paths), size=3):
            try:
                data = changed(data, paths[i], set_to(NASTY[random.integers(len(NASTY))]))
            except (AttributeError, IndexError, KeyError, TypeError):  # another change has taken the place away
                continue
        try_file(small_set, data, ())


def test_bytes_cut_and_flipped(small_set, quiet):
    text = json.dumps(small_set.data).encode()
    random = np.random.default_rng(0)
    path = small_set.folder / "small.json"
    for _ in range(300):
        broken = bytearray(text[: random.integers(len(text) // 2, len(text) + 1)])
        for i in random.integers(len(broken), size=2):
            broken[i] = random.integers(256)
        path.write_bytes(broken)
        try:
            load(small_set.info)
        except DataError as error:
            message = str(error)
            assert "small.json" in message
