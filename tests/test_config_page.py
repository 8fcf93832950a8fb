"""The page of the configuration's keys: complete, and as the code has them."""

import re
from pathlib import Path

from dyhead import cli
from dyhead.config_checks import (
    CASCADE_CHECKS,
    CHECKS,
    FPN_CHECKS,
    KEYPOINT_CHECKS,
    MASK_CHECKS,
    RESNET_CHECKS,
    TWO_STAGE_CHECKS,
)
from dyhead.config_options import option_nodes
from dyhead.config_page import page
from dyhead.options import leaves

PAGE = Path(__file__).parent.parent / "docs" / "config.md"


def rows_by_section():
    """For each heading of the committed page its rows, by their key."""
    sections = re.split(r"^#{2,3} ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: {
            re.match(r"\| `(\w[\w.]*)`", line).group(1): line for line in section.splitlines() if line.startswith("| `")
        }
        for section in sections
    }


def test_the_committed_page_is_what_the_code_says(capsys):
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "run: dyhead config > docs/config.md"
    assert page() == PAGE.read_text()


def test_the_page_lists_every_key_with_its_meaning():
    sections = rows_by_section()
    for node, options in option_nodes().items():
        for leaf in leaves(options):
            row = sections[node].get(leaf.key) or sections["One-stage detectors"][leaf.key]
            assert leaf.doc in row
            assert leaf.check is None or leaf.check.text in row
    rows = {key: row for section in sections.values() for key, row in section.items()}
    for key, check in (
        CHECKS | RESNET_CHECKS | FPN_CHECKS | TWO_STAGE_CHECKS | CASCADE_CHECKS | MASK_CHECKS | KEYPOINT_CHECKS
    ).items():
        assert check.text in rows[key]


def test_the_page_says_what_detectors_have_for_themselves_and_which_keys_are_detectron2s():
    sections = rows_by_section()
    assert "; `MODEL.RETINANET`: `4` |" in sections["One-stage detectors"]["NUM_CONVS"]
    assert "; not in `MODEL.NOISYANCHORS`;" in sections["One-stage detectors"]["CLASS_LOSS"]
    assert "SOFT_FOCAL_LOSS_ALPHA" in sections["MODEL.NOISYANCHORS"]
    assert sections["One-stage detectors"]["NUM_CONVS"].startswith("| `NUM_CONVS` (D2: `MODEL.RETINANET`) |")
    assert sections["One-stage detectors"]["CLIP_BOXES"].startswith("| `CLIP_BOXES` |")
    assert "; not in `MODEL.AUTOASSIGN`;" in sections["One-stage detectors"]["CLASS_LOSS"]
    assert sections["MODEL.RETINANET"]["IOU_LABELS"].startswith("| `IOU_LABELS` (D2) | `[0, -1, 1]` |")
    assert sections["MODEL.FCOS"]["BBOX_REG_LOSS_TYPE"].startswith('| `BBOX_REG_LOSS_TYPE` | `"giou"` |')
    assert "NUM_CONVS" not in sections["MODEL.RETINANET"]
    assert "exactly one level" in sections["MODEL.SACCADENET"]["IN_FEATURES"]


def test_tables_are_tables():
    """Each row has as many cells as its header, whatever the texts hold."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
