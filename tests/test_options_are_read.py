"""Options: each is read by what it belongs to, so that none is ignored in silence; and its type is checked."""

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dyhead
from dyhead.config_options import option_nodes
from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.roi import BOX_HEADS
from dyhead.necks import NECKS
from dyhead.options import above, at_least, choice, each, leaves, of_type, one_of, option, part
from tests.detection.objects import levels_of

STRIDES = {"p3": 8, "p4": 16}
PACKAGE = Path(dyhead.__file__).parent


def others(field, value, check):
    """Other legal values of an option that has few of them."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str) and check is not None:
        named = ast.literal_eval(f"({check.text.removeprefix('one of ')},)")
        return [name for name in named if name != value]
    return []


def variants(options):
    """``options`` and, for each switch among its options, the same with this one switched."""
    yield options
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if "registry" in field.metadata:
            changed = [v for member in field.metadata["registry"].values() for v in variants(member())]
        elif "prefix" in field.metadata:
            changed = list(variants(value))[1:]
        else:
            changed = others(field, value, field.metadata["check"])
        yield from (dataclasses.replace(options, **{field.name: each}) for each in changed)


def declared(options):
    """(class, field) of each option in an options dataclass and its parts."""
    for field in dataclasses.fields(options):
        yield type(options), field.name
        if "registry" in field.metadata:
            for member in field.metadata["registry"].values():
                yield from declared(member())
        elif "prefix" in field.metadata:
            yield from declared(getattr(options, field.name))


@pytest.fixture
def watch(monkeypatch):
    """A function that starts to note which fields of some classes are read, into the set that it returns."""

    def start(classes):
        seen = set()

        def get(self, name):
            seen.add((type(self), name))
            return object.__getattribute__(self, name)

        for watched in classes:
            monkeypatch.setattr(watched, "__getattribute__", get)
        return seen

    return start


def run(options, anchors):
    """Build a detector, train it on two images and let it detect in them; its losses and detections."""
    torch.manual_seed(0)
    detector = options.build(32, [STRIDES[level] for level in options.in_features], anchors=anchors)
    pyramid = {name: torch.randn(2, 32, 64 // stride, 64 // stride) for name, stride in STRIDES.items()}
    predictions = detector(pyramid)
    targets = [
        Targets(torch.tensor([[4.0, 4.0, 40.0, 44.0]]), torch.tensor([2])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    losses = detector.losses(predictions, targets)
    return losses, detector.detections(predictions, [(64, 64), (60, 64)])


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_reads_each_of_its_options(name, watch):
    options = DETECTORS[name].options(
        num_classes=3, in_features=levels_of(name, STRIDES), score_thresh_test=0.0, num_convs=1
    )
    candidates, wanted = list(variants(options)), set(declared(options))
    anchors = AnchorOptions(((32.0,),), ((1.0,),), 0.5)
    seen = watch({cls for cls, _ in wanted})
    for candidate in candidates:
        losses, _ = run(candidate, anchors)
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert {f"{cls.__name__}.{field}" for cls, field in wanted - seen} == set()


def test_detectors_with_anchors_read_each_option_of_theirs(watch):
    options = DETECTORS["DyHeadRetinaNet"].options(num_classes=3, in_features=tuple(STRIDES))
    anchors = AnchorOptions(((32.0,),), ((1.0,),), 0.5)
    seen = watch({AnchorOptions})
    run(options, anchors)
    assert {field for _, field in declared(anchors)} <= {field for _, field in seen}


# Another value of each option of each neck.
CHANGES = {
    "DyHead": {
        "num_blocks": 1,
        "block": "released",
        "window": None,
        "scale_aware": False,
        "spatial_aware": False,
        "task_aware": False,
        "offset_groups": 2,
        "norm": "BN",
        "norm_groups": 4,
        "shortcut": True,
    },
    "SEPC": {"num_blocks": 1, "conv": "plain", "task_convs": "plain", "norm": "", "task_padding": 0},
    "FPT": {"parts": 4, "similarity": "softmax", "dropout": 0.5},
}
# Those of which a single process computes the same: tests/necks/test_fpt.py.
ELSEWHERE = {"DyHead": {"zero_init_offset", "use_checkpoint"}, "FPT": {"norm"}}


@pytest.mark.parametrize(("neck", "name"), [(neck, name) for neck, changes in CHANGES.items() for name in changes])
def test_each_option_of_a_neck_changes_what_it_computes(neck, name):
    options = NECKS[neck].options

    def outcome(**changed):
        torch.manual_seed(0)
        usual = {"num_blocks": 2} if "num_blocks" in CHANGES[neck] else {}
        head = options(**usual | changed).build(16, 4)
        torch.manual_seed(0)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # offsets start at 0
        pyramid = {f"p{i}": torch.randn(1, 16, 32 // 2**i, 32 // 2**i) for i in range(4)}
        levels = [level if isinstance(level, tuple) else (level,) for level in head(pyramid).values()]
        return torch.cat([x.flatten() for level in levels for x in level])

    usual, other = outcome(), outcome(**{name: CHANGES[neck][name]})
    assert torch.equal(usual, outcome())
    assert usual.shape != other.shape or not torch.allclose(usual, other)


def test_that_covers_every_option_of_every_neck():
    assert {neck: set(changes) | ELSEWHERE.get(neck, set()) for neck, changes in CHANGES.items()} == {
        name: {field.name for field in dataclasses.fields(neck.options)} for name, neck in NECKS.items()
    }


@pytest.mark.parametrize("name", BOX_HEADS)
def test_a_box_head_reads_each_of_its_options(name, watch):
    options = BOX_HEADS[name].options()
    seen = watch({type(options)})
    options.build(8, 3)
    assert {field for _, field in declared(options)} <= {field for _, field in seen}


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_each_engine_reads_each_option_that_belongs_to_no_part(engine):
    parts = {registered.node for registered in (*DETECTORS.values(), *NECKS.values(), *BOX_HEADS.values())}
    shared = [path for path in PACKAGE.glob("*.py") if path.stem not in ("config_page", "config_options")]
    read_names = set()
    folders = (PACKAGE / name for name in (engine, "backbones", "evaluation", "runs"))
    for path in (*shared, *(path for folder in folders for path in folder.glob("*.py"))):
        tree = ast.parse(path.read_text())
        read_names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    elsewhere = {"MODEL.ANCHOR_GENERATOR", "MODEL.DSFPN"}  # above, and in test_dually_supervised.py
    for node in set(option_nodes()) - parts - elsewhere:
        for field in dataclasses.fields(option_nodes()[node]):
            assert {field.name, field.name.upper()} & read_names, f"{node}.{field.name.upper()}"


@dataclass(frozen=True)
class Color:
    shade: float = option(0.5, "how light", at_least(0))


@dataclass(frozen=True)
class Shape:
    corners: int = option(3, "how many", at_least(3))


@dataclass(frozen=True)
class Drawing:
    title: str = option("", "above it", one_of("", "no title"))
    sizes: tuple[tuple[int, ...], ...] = option(((1, 2),), "in pixels")
    limit: int | None = option(None, "at most", above(0))
    color: Color = part(Color(0.25), prefix="BACK_")
    outline: object = choice("shape", "what is drawn", {"shape": Shape, "color": Color})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("TITLE", "no title", None),
        ("TITLE", "title", "one of '', 'no title'"),
        ("TITLE", 3, "a string, one of '', 'no title'"),
        ("SIZES", [[1], []], None),
        ("SIZES", [1], "a list of lists of whole numbers"),
        ("SIZES", [[1.5]], "a list of lists of whole numbers"),
        ("LIMIT", None, None),
        ("LIMIT", 0, "above 0"),
        ("LIMIT", True, "a whole number or null, above 0"),
        ("BACK_SHADE", 1, None),
        ("BACK_SHADE", float("nan"), "a number, at least 0"),
        ("BACK_SHADE", float("inf"), "a number, at least 0"),
        ("BACK_SHADE", "1", "a number, at least 0"),
        ("OUTLINE", "line", "one of 'shape', 'color'"),
    ],
)
def test_an_option_says_what_was_expected(key, value, expected):
    (leaf,) = (leaf for leaf in leaves(Drawing) if leaf.key == key)
    assert leaf.expected(value) == expected


def test_checks_are_combined():
    check = of_type(tuple[float, float]) & each(above(0))
    assert check.text == "a list of 2 numbers, each above 0"
    assert check.fits([1, 2.5])
    assert not any(map(check.fits, [[1], [1, 2, 3], [1, 0], [1, "a"], None, 1]))


@pytest.mark.parametrize("annotation", [list, dict, tuple, object])
def test_a_type_that_options_cannot_have_is_refused(annotation):
    with pytest.raises(TypeError, match="expected bool, int, float, str"):
        of_type(annotation)
