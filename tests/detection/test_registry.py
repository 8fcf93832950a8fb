import pytest

from dyhead.detection import DETECTORS, register_detector
from dyhead.detection.retinanet import RetinaNetOptions


def test_detectors_by_the_names_of_their_meta_architectures():
    assert {name: entry.node for name, entry in DETECTORS.items()} | {
        "DyHeadFCOS": "MODEL.FCOS",
        "DyHeadRepPoints": "MODEL.REPPOINTS",
        "DyHeadRetinaNet": "MODEL.RETINANET",
        "DyHeadATSS": "MODEL.ATSS",
        "DyHeadAutoAssign": "MODEL.AUTOASSIGN",
        "DyHeadBorderDet": "MODEL.BORDERDET",
        "DyHeadSaccadeNet": "MODEL.SACCADENET",
    } == {name: entry.node for name, entry in DETECTORS.items()}
    assert DETECTORS["DyHeadRetinaNet"].options is RetinaNetOptions


def test_a_detector_of_ones_own(monkeypatch):
    monkeypatch.setattr("dyhead.detection.registry.DETECTORS", registered := {})

    @register_detector("Mine")
    class Options:
        pass

    (entry,) = registered.values()
    assert (entry.name, entry.node, entry.meta_architecture) == ("Mine", "MODEL.MINE", "DyHeadMine")
    assert entry.options is Options
    assert registered == {"DyHeadMine": entry}
    with pytest.raises(ValueError, match="detector 'Mine': registered before, by"):
        register_detector("Mine")(Options)
