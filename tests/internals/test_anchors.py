"""Detectors with other anchors: torchvision's structure, loading of weights, flags."""

import argparse
import math

import pytest
import torch
from torchvision.models import get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator

import models
from coco_utils import COCO_CATEGORY_IDS, Categories
from internals import anchors
from internals.errors import UserError

FASTER_RCNN, RETINANET = "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"
MOBILENET = "fasterrcnn_mobilenet_v3_large_320_fpn"
ALL = [name for name in models.MODELS if name.startswith(anchors.DETECTORS)]
COCO = Categories.from_names({i: str(i) for i in COCO_CATEGORY_IDS})
OTHER = Categories.from_names({1: "cell", 7: "dust"})
RATIOS = [0.25, 0.5, 1.0, 2.0, 4.0]


def sizes_for(name: str, count: int) -> list[list[int]]:
    levels = len(anchors.default_anchors(name)[0])
    return [[2**level * 8 + 5 * i for i in range(count)] for level in range(levels)]


def build(name: str, classes: int = 4, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return models.build_model(name, classes, pretrained="detector", **options)


def fill(model: torch.nn.Module, number: float) -> dict[str, torch.Tensor]:
    """Return a state_dict with one number in every tensor, which takes no memory."""
    return {
        key: torch.tensor(number, dtype=value.dtype).expand(value.shape)
        for key, value in model.state_dict().items()
    }


def resolve(line: str, model: str = FASTER_RCNN) -> argparse.Namespace:
    import arguments

    args = arguments.parse_arguments(["--model", model, *line.split()])
    anchors.resolve(args)
    return args


# ---------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(("name", "keyword"), [
    (FASTER_RCNN, "rpn_anchor_generator"), (RETINANET, "anchor_generator"),
])  # fmt: skip
def test_structure_is_that_of_torchvisions_argument(name, keyword):
    sizes = sizes_for(name, 2)
    generator = AnchorGenerator(sizes, [RATIOS] * len(sizes))
    torch.manual_seed(0)
    stock = get_model(name, weights=None, weights_backbone=None, num_classes=4,
                      **{keyword: generator})  # fmt: skip
    ours = models.build_model(
        name, 4, pretrained=None, anchor_sizes=sizes, anchor_ratios=RATIOS, stock=True
    )
    assert {k: v.shape for k, v in stock.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    for a, b in zip(generator.cell_anchors, anchors.find_generator(ours).cell_anchors, strict=True):
        assert torch.equal(a, b)
    state = ours.state_dict()
    for layer in anchors.LAYERS:  # torchvision's initial weights
        if f"{layer}weight" in state:
            assert state[f"{layer}weight"].std().item() == pytest.approx(0.01, rel=0.1)
            bias = -math.log(99) if "classification" in layer else 0.0
            torch.testing.assert_close(state[f"{layer}bias"], stock.state_dict()[f"{layer}bias"])
            assert state[f"{layer}bias"].unique().tolist() == [pytest.approx(bias)]


@pytest.mark.parametrize("name", ALL)
def test_all_detectors_take_other_anchors(name):
    """The head has the right number of outputs, and a model runs with them."""
    sizes = sizes_for(name, 2)
    options = {"min_sizes": (64,), "max_size": 96, "stock": True}
    model = build(name, anchor_sizes=sizes, anchor_ratios=RATIOS, **options)
    assert anchors.per_location(model.state_dict()) == 10
    default = build(name, **options)
    assert model.state_dict().keys() == default.state_dict().keys()
    images, _ = default.transform([torch.rand(3, 64, 96)])
    features = list(model.backbone(images.tensors.to("meta")).values())
    total = sum(x.shape[-1] * x.shape[-2] * 10 for x in features)
    assert len(anchors.find_generator(model)(images, features)[0]) == total
    if name.startswith("retinanet"):
        outputs = model.head(features)
        assert outputs["cls_logits"].shape == (1, total, 4)
        assert outputs["bbox_regression"].shape == (1, total, 4)
    else:
        objectness, deltas = model.rpn.head(features)
        assert sum(x.numel() for x in objectness) == total
        assert sum(x.numel() for x in deltas) == 4 * total


@pytest.mark.parametrize("name", ALL)
def test_default_anchors_as_flags_change_nothing(name):
    sizes, ratios = anchors.default_anchors(name)
    plain, given = build(name), build(name, anchor_sizes=sizes, anchor_ratios=ratios)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in given.state_dict().items()
    }
    cells = [anchors.find_generator(model).cell_anchors for model in (plain, given)]
    assert all(torch.equal(a, b) for a, b in zip(*cells, strict=True))


# ------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("categories", [COCO, OTHER], ids=["coco", "other"])
def test_coco_weights_are_kept_but_for_the_outputs(name, categories, monkeypatch, capsys):
    donor = fill(build(name, 91), 1.0)
    monkeypatch.setattr(models, "download", lambda *_: donor)
    options = {"anchor_sizes": sizes_for(name, 1), "anchor_ratios": RATIOS}
    model = build(name, categories.num_classes, **options).to_empty(device="cpu")
    model.load_state_dict(fill(model, 2.0))
    models.load_pretrained_detector(model, name, "COCO_V1", categories, False)
    state = model.state_dict()
    fresh = {key for key, value in state.items() if (value == 2).all()}
    outputs = {key for key in state if key.startswith(anchors.LAYERS)}
    head = {key for key in state if models.CLASS_HEAD_PATTERN.match(key)}
    assert outputs
    assert fresh == (outputs if categories is COCO else outputs | head)
    assert all((value == 1).all() for key, value in state.items() if key not in fresh)
    text = capsys.readouterr().out
    count = len(anchors.default_anchors(name)[0][0]) * 3
    assert f"the layers of their outputs start anew: 5 per location instead of {count}" in text
    if categories is COCO:
        with pytest.raises(UserError, match="has other anchors than this model: 5 per location"):
            models.load_pretrained_detector(model, name, "COCO_V1", COCO, True)


def test_other_sizes_keep_all_weights(monkeypatch, capsys):
    monkeypatch.setattr(models, "download", lambda *_: fill(build(FASTER_RCNN, 91), 1.0))
    options = {"anchor_sizes": sizes_for(FASTER_RCNN, 1), "anchor_ratios": [0.5, 1.0, 2.0]}
    model = build(FASTER_RCNN, 91, **options).to_empty(device="cpu")
    models.load_pretrained_detector(model, FASTER_RCNN, "COCO_V1", COCO, False)
    assert all((value == 1).all() for value in model.state_dict().values())
    assert (
        "other anchors, all layers are kept: sizes 8 16 32 64 128, height / width 0.5 1 2; trained "
        "with sizes 32 64 128 256 512, height / width 0.5 1 2"
    ) in capsys.readouterr().out
    with pytest.raises(UserError, match="Use the --anchor-sizes and --anchor-ratios of its train"):
        models.load_pretrained_detector(model, FASTER_RCNN, "COCO_V1", COCO, True)


def test_checkpoint_knows_its_anchors(tmp_path, capsys):
    own = {"anchor_sizes": sizes_for(MOBILENET, 5), "anchor_ratios": [0.5, 1.0, 2.0]}
    donor = {"model": fill(build(MOBILENET, 3, **own), 1.0), "categories": OTHER.to_list()}
    args = {"model": MOBILENET, "backbone": "mobilenet_v3_large", **own}
    torch.save({**donor, "format": 1, "args": args}, tmp_path / "x.pth")
    flags = (MOBILENET, str(tmp_path / "x.pth"), OTHER, True)
    same = build(MOBILENET, 3, **own).to_empty(device="cpu")
    models.load_pretrained_detector(same, *flags)
    assert "anchors" not in capsys.readouterr().out
    model = build(MOBILENET, 3).to_empty(device="cpu")
    with pytest.raises(UserError, match="other anchors than this model: sizes 32,64,128,256,512 "):
        models.load_pretrained_detector(model, *flags)
    torch.save({**donor, "args": {"lr": 0.1}}, tmp_path / "x.pth")  # of another loop
    models.load_pretrained_detector(model, *flags)


def test_own_anchors_are_not_forgotten():
    trained = {"anchor_sizes": [[8], [16, 24.5]], "anchor_ratios": [0.5, 1.0]}
    trained["backbone"] = "resnet18"
    flags = "add --backbone resnet18 --anchor-sizes 8 16,24.5 --anchor-ratios 0.5 1, or that"
    with pytest.raises(UserError, match=flags):
        anchors.raise_if_forgotten("x.pth", trained)
    for trained in (None, {}, {"anchor_sizes": None}, "Ignored"):
        anchors.raise_if_forgotten("x.pth", trained)


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "ssd300_vgg16"])
def test_models_without_anchors_are_not_compared(name):
    model = build(name)
    trained = {"model": name, "anchor_sizes": None, "anchor_ratios": None}
    assert anchors.compare(model, model.state_dict(), trained) == ([], "")


# -------------------------------------------------------------------------------------- flags


def test_flags_are_parsed():
    args = resolve("--anchor-sizes 16,24 32,48 64,96 128,192.5 256,384 --anchor-ratios 0.5 2")
    assert args.anchor_sizes == [[16, 24], [32, 48], [64, 96], [128, 192.5], [256, 384]]
    assert args.anchor_ratios == [0.5, 2.0]
    assert anchors.describe_sizes(args.anchor_sizes) == "16,24 32,48 64,96 128,192.5 256,384"


def test_one_flag_takes_the_default_of_the_other():
    assert resolve("--anchor-sizes 8 16 32 64 128").anchor_ratios == [0.5, 1.0, 2.0]
    args = resolve("--anchor-ratios 1", RETINANET)
    assert args.anchor_sizes[0] == [32, 40, 50]
    assert (resolve("").anchor_sizes, resolve("").anchor_ratios) == (None, None)


@pytest.mark.parametrize(
    ("line", "model", "message"),
    [
        ("--anchor-sizes 16 32", FASTER_RCNN, "is for 2 feature levels, but .* has 5: give 5"),
        ("--anchor-sizes 8 16 32 64 128", MOBILENET, "is for 5 feature levels, but .* has 3"),
        ("--anchor-sizes 8 16,20 32 64 128", FASTER_RCNN, "give all of them as many sizes"),
        ("--anchor-ratios 1", "fcos_resnet50_fpn", "are for Faster R-CNN and RetinaNet, not fcos"),
        ("--anchor-sizes 1 2", "ssd300_vgg16", "are for Faster R-CNN and RetinaNet, not ssd300"),
        ("--anchor-sizes 8 16 32 64 x", FASTER_RCNN, "invalid anchor size value: 'x'"),
        ("--anchor-sizes 8 16 32 64 0", FASTER_RCNN, "0: a size is from 1 to 100,000"),
        ("--anchor-sizes 8 16 32 64 inf", FASTER_RCNN, "inf: a size is from 1 to 100,000"),
        ("--anchor-sizes 8 16 32 64 nan", FASTER_RCNN, "nan: a size is from 1 to 100,000"),
        ("--anchor-sizes 8,,9 16 32 64 9", FASTER_RCNN, "invalid anchor size value: '8,,9'"),
        ("--anchor-ratios 0.5,1 2", FASTER_RCNN, "invalid float value: '0.5,1'"),
        ("--anchor-ratios 0", FASTER_RCNN, "0 is not a number above 0"),
        ("--anchor-sizes 2 4 8 16 32 --anchor-ratios 0.1", FASTER_RCNN, "anchor without a pixel"),
        (f"--anchor-ratios {' '.join('1' * 86)}", RETINANET, "make 258 anchors per location"),
    ],
)
def test_impossible_anchors_are_rejected(line, model, message):
    with pytest.raises(UserError, match=message):
        resolve(line, model)
