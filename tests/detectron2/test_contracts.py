# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""What Detectron2 expects of any meta-architecture, of every one that is registered here."""

import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.export import TracingAdapter
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from dyhead.config import DETECTORS, add_dyhead_config, load_config
from dyhead.detectron2 import Trainer

DENSE = [detector.name.lower() for detector in DETECTORS.values()]
TWO_STAGE = ["faster_rcnn", "faster_rcnn_dyhead_box_head", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn"]
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.DYHEAD.NUM_BLOCKS": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}


NODES = [*(detector.node for detector in DETECTORS.values()), "MODEL.ROI_HEADS"]
NOTHING, ANYTHING = ({f"{node}.SCORE_THRESH_TEST": value for node in NODES} for value in (1.0, 0.0))


@pytest.fixture
def build(configs):
    """`build(name, {key: value})`: a tiny detector with DyHead of a quickstart file, with random weights."""

    def build_one(name, settings=None):
        name = name if name.endswith("box_head") else f"{name}_dyhead"
        cfg = add_dyhead_config(get_cfg())
        opts = [str(word) for pair in (SMALL | (settings or {})).items() for word in pair]
        load_config(cfg, configs / "quickstart" / f"{name}_R18_shapes.yaml", opts)
        torch.manual_seed(0)
        return Trainer.build_model(cfg)

    return build_one


def picture(height, width, objects=None, keypoints=17):
    image = torch.arange(3 * height * width).remainder(251).view(3, height, width).to(torch.uint8)
    record = {"image": image, "height": height, "width": width}
    if objects is not None:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 5, 50, 40]] * objects).view(-1, 4))
        instances.gt_classes = torch.zeros(objects, dtype=torch.int64)
        instances.gt_masks = BitMasks(torch.ones(objects, height, width, dtype=torch.bool))
        instances.gt_keypoints = Keypoints(torch.full((objects, keypoints, 3), 20.0))
        record["instances"] = instances
    return record


def keypoints_of(model):
    heads = getattr(model, "roi_heads", None)
    return heads.keypoint_head.num_keypoints if hasattr(getattr(heads, "keypoint_head", None), "num_keypoints") else 17


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_it_takes_images_without_objects_and_finds_none(build, name):
    model = build(name)
    number = keypoints_of(model)
    for sizes in ((64, 80, 0), (48, 61, 0)), ((64, 80, 0), (64, 80, 1)):
        with EventStorage():
            losses = model([picture(*size, number) for size in sizes])
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model = build(name, NOTHING).eval()
    with torch.no_grad():
        found = model([picture(64, 80), picture(48, 61) | {"height": 96, "width": 122}])
    assert [each["instances"].image_size for each in found] == [(64, 80), (96, 122)]
    assert [len(each["instances"]) for each in found] == [0, 0]
    assert all(each["instances"].pred_boxes.tensor.shape == (0, 4) for each in found)


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_boxes_and_sizes_are_those_of_the_image_that_is_asked_for(build, name):
    model = build(name, ANYTHING).eval()
    with torch.no_grad():
        (one,), (larger,) = model([picture(64, 80)]), model([picture(64, 80) | {"height": 128, "width": 160}])
    one, larger = one["instances"], larger["instances"]
    assert 0 < len(one) == len(larger)
    torch.testing.assert_close(larger.pred_boxes.tensor, 2 * one.pred_boxes.tensor)
    torch.testing.assert_close(larger.scores, one.scores)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DENSE, "faster_rcnn", "mask_rcnn", "d2det", "released"])
def test_a_trace_by_its_adapter_finds_the_same_in_images_of_any_size(build, name):
    settings = {"MODEL.DYHEAD.BLOCK": "released"} if name == "released" else {}
    name = "atss" if name == "released" else name
    model = build(name, ANYTHING | settings).eval()

    def infer(model, inputs):
        if name in DENSE:
            return [{"instances": each["instances"]} for each in model(inputs)]
        return [{"instances": each} for each in model.inference(inputs, do_postprocess=False)]

    adapter = TracingAdapter(model, [{"image": picture(64, 80)["image"]}], infer)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for image in (picture(64, 80)["image"].flip(2), picture(200, 144)["image"], picture(40, 72)["image"]):
            (expected,) = infer(model, [{"image": image}])
            (found,) = adapter.outputs_schema(traced(image))
            expected, found = expected["instances"], found["instances"]
            assert len(expected) > 0
            assert tuple(map(int, found.image_size)) == image.shape[1:]
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            torch.testing.assert_close(found.scores, expected.scores)
            assert torch.equal(found.pred_classes, expected.pred_classes)
