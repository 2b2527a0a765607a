import copy
import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, run, write_split
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import checkpoint
import export
import models
from internals.errors import RunError, UserError
from internals.failures import run_command

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors")

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
TRANSFORM = GeneralizedRCNNTransform(96, 160, [0.5] * 3, [0.5] * 3)


THRESHOLDS = {"overall": 0.4375, "per_category": {"5": 0.75}}  # JSON has no numbers as keys


def spread_model() -> torch.nn.Module:
    """Return an untrained detector whose scores are as spread as those of a trained one.

    The scores of its proposals are as low as in images that are mostly background.
    """
    torch.manual_seed(0)
    model = models.build_model(
        NAME, 3, pretrained=None, min_sizes=(96,), max_size=160, rpn_score_thresh=0.0, stock=True
    )
    target = {"boxes": torch.tensor([[10.0, 10, 90, 90]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        for n in range(6):  # for the statistics of the norms
            images = [export.synthetic_image(n), export.synthetic_image(n + 1)]
            model(images, [target] * 2)
        model.rpn.head.cls_logits.weight *= 30
        model.rpn.head.cls_logits.bias -= 14
        model.roi_heads.box_predictor.cls_score.weight *= 200
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Write a checkpoint, and beside it the folder `data` with its validation images."""
    root = tmp_path_factory.mktemp("saved")
    write_split(root / "data", "val", [(64, 48), (48, 64), (90, 90)], [[[2, 4, 4, 30, 20]]] * 3)
    args = {
        "model": NAME, "weights": None, "weights_backbone": "none", "min_size": 96,
        "max_size": 160, "fixed_size": None, "rpn_score_thresh": 0.0,
        "data_path": str(root / "data"), "val_annotations": None, "val_images": None,
    }  # fmt: skip
    categories = [{"id": 2, "name": "cat", "label": 1}, {"id": 5, "name": "dög", "label": 2}]
    state = {
        "model": spread_model().state_dict(), "optimizer": {}, "scaler": {}, "epoch": 1, "step": 1,
        "best_AP": None, "categories": categories, "args": args,
        "score_thresholds": {"overall": 0.4375, "per_category": {5: 0.75}},
    }  # fmt: skip
    return checkpoint.save(root, state)


@pytest.fixture(scope="module")
def exporting(saved) -> tuple[Path, str, str]:
    """Export to ONNX into a new folder; return the file, the output and the errors."""
    file = saved.parent / "a b/model.onnx"
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        export.main([str(saved), "--output", str(file)])
    return file, output.getvalue(), errors.getvalue()


@pytest.fixture
def exported(exporting) -> Path:
    return exporting[0]


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the script and returns its exit code, output and errors."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_command(export.main)
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return command


# -------------------------------------------------------------------------------------- ONNX


@pytest.mark.slow
@pytest.mark.parametrize("size", [(60, 80), (110, 70), (48, 300), (200, 200)])
def test_onnx_matches_pytorch(saved, exported, size):
    session = onnxruntime.InferenceSession(exported)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(size[0]))
    image[:, 10:40, 10:40] = 0.9
    detector = models.from_checkpoint(checkpoint.load(saved), stock=True)
    result = export.compare(export.SingleImageDetector(detector).eval(), session, [image])
    assert result.unmatched == 0, result
    assert result.matched > 20
    assert np.ptp(session.run(["scores"], {"image": image.numpy()})[0]) > 0.1


@pytest.mark.slow
def test_onnx_inputs_outputs_and_metadata(exported):
    session = onnxruntime.InferenceSession(exported)
    (image,) = session.get_inputs()
    assert (image.name, image.shape) == ("image", [3, "height", "width"])
    assert [o.name for o in session.get_outputs()] == ["boxes", "labels", "scores"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["categories"]) == [
        {"id": 2, "name": "cat", "label": 1},
        {"id": 5, "name": "dög", "label": 2},
    ]
    assert metadata["model"] == NAME
    assert (metadata["num_classes"], metadata["min_size"], metadata["max_size"]) == (
        "3",
        "96",
        "160",
    )
    assert "red, green and blue" in metadata["input"]
    assert "fixed_size" not in metadata
    assert json.loads(metadata["score_thresholds"]) == THRESHOLDS


def test_output_order():
    class Model(torch.nn.Module):
        def forward(self, images):
            return [{"boxes": 1, "scores": 2, "labels": 3}]  # as RetinaNet, FCOS and SSD do

    assert export.SingleImageDetector(Model())(None) == (1, 3, 2)


@pytest.mark.slow
def test_check_uses_validation_images(saved, exporting):
    file, output, errors = exporting
    assert errors == ""  # no warnings of the exporter either
    assert f"validation images of {saved.parent / 'data/val2017'}" in output
    assert "on 3 images of 3 sizes and a black one: " in output
    assert [p.name for p in file.parent.iterdir()] == ["model.onnx"]


def test_check_falls_back_to_synthetic_images(tmp_path):
    args = {"data_path": str(tmp_path), "val_annotations": None, "val_images": None}
    images, source = export.load_check_images(None, args, TRANSFORM)
    assert "synthetic images, as the validation images are missing" in source
    assert len({image.shape for image in images}) > 1


def test_check_samples_folder_at_two_sizes(tmp_path, capsys):
    for n in range(30):
        Image.new("RGB", (20, 10), (n, 0, 0)).save(tmp_path / f"{n:02}.png")
    (tmp_path / "00.png").write_bytes(b"")
    Image.new("RGB", (200, 1)).save(tmp_path / "29.png")
    images, _ = export.load_check_images(tmp_path, {}, TRANSFORM)
    assert [image.shape for image in images] == [(3, 10, 20)] * 18 + [(3, 8, 12)]
    reds = [round(float(image[0, 0, 0]) * 255) for image in images]
    assert reds[-2] == 27  # from all over the folder
    output = capsys.readouterr().out
    assert f"skipped: {tmp_path / '00.png'} cannot be read" in output
    assert f"skipped: {tmp_path / '29.png'}: 200 x 1 pixels are too narrow for this" in output


@pytest.mark.parametrize("size", [(40, 1), (1, 1), (1, 160)])
def test_check_takes_tiny_images(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "0.png")
    images, _ = export.load_check_images(tmp_path, {}, TRANSFORM)
    assert images[0].shape == (3, *size[::-1])
    for image in images:
        assert TRANSFORM([image])[0].tensors.shape[0] == 1


def test_check_without_usable_images_is_an_error(tmp_path):
    Image.new("RGB", (12_000, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="no usable image in this folder"):
        export.load_check_images(tmp_path, {}, TRANSFORM)
    with pytest.raises(UserError, match="no such folder"):
        export.load_check_images(tmp_path / "none", {}, TRANSFORM)


@pytest.mark.slow
def test_model_that_fails_check_is_not_written(saved, tmp_path, command, monkeypatch):
    def export_spoilt(model, file, export_graph=export.export_graph):
        model = copy.deepcopy(model)
        model.model.roi_heads.box_predictor.bbox_pred.weight.data *= 3
        export_graph(model, file)

    monkeypatch.setattr(export, "export_graph", export_spoilt)
    file = tmp_path / "x.onnx"
    file.write_text("an earlier one")
    code, _, errors = command(saved, "--output", file)
    assert code == 1
    assert errors.startswith(f"export.py: error: {file} was not written: it does not agree with")
    assert errors.count("\n") == 1
    assert re.search(r"detections match, [1-9]\d* do not; matching boxes differ by up to", errors)
    assert file.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_half_precision_export(saved, exported, tmp_path, command):
    code, output, errors = command(saved, "--output", tmp_path / "x.onnx", "--half")
    assert code == 0, errors
    assert "agrees with PyTorch with the same rounded weights on 3 images" in output
    assert re.search(r"before rounding, \d+ detections match within 1 pixel", output)
    size = (tmp_path / "x.onnx").stat().st_size
    assert 0.48 < size / exported.stat().st_size < 0.52
    (image,) = onnxruntime.InferenceSession(tmp_path / "x.onnx").get_inputs()
    assert image.type == "tensor(float)"


def test_weights_beyond_float16_are_not_rounded():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e5
    before = model[1].weight.clone()
    assert export.round_to_half(model) == {"0.weight"}
    assert torch.equal(model[1].weight, before)
    assert torch.equal(model[0].weight, model[0].weight.half().float())


# ------------------------------------------------------- images in which nothing is found


def set_class_biases(model: torch.nn.Module, silent: bool) -> None:
    """Make an untrained detector find nothing anywhere, or something everywhere."""
    if hasattr(model, "rpn"):
        model.rpn.head.cls_logits.bias.data.fill_(-40 if silent else 0)
        return
    head = model.head.classification_head
    if hasattr(head, "cls_logits"):
        head.cls_logits.bias.data.fill_(-40 if silent else 0)
        return
    for layer in head.module_list:  # of SSD, with background
        bias = getattr(layer, "bias", None)
        bias = layer[-1].bias if bias is None else bias
        bias.data = torch.tensor([40.0 * silent, 0, 0]).repeat(len(bias) // 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "traced_silent"),
    [(models.MODELS[0], False), ("fasterrcnn_mobilenet_v3_large_320_fpn", False)]
    + [(name, True) for name in models.MODELS],
)
def test_graph_does_not_depend_on_the_traced_image(name, traced_silent, tmp_path):
    """With other biases the same graph finds nothing, or something."""
    sizes = {"min_sizes": (64,), "max_size": 100} if models.ARCHITECTURES[name].resizable else {}
    if name.startswith("fasterrcnn"):
        sizes["rpn_score_thresh"] = 0.05
    torch.manual_seed(0)
    detector = models.build_model(name, 3, pretrained=None, stock=True, **sizes).eval()
    getattr(detector, "roi_heads", detector).score_thresh = 0.001
    model = export.SingleImageDetector(detector).eval()
    set_class_biases(detector, traced_silent)
    export.export_graph(model, tmp_path / "x.onnx")
    exported = onnx.load(str(tmp_path / "x.onnx"))
    for silent in (True, False):
        set_class_biases(detector, silent)
        state = {f"model.{key}": value for key, value in detector.state_dict().items()}
        for tensor in exported.graph.initializer:
            if tensor.name.endswith("bias") and tensor.name in state:
                values = state[tensor.name].numpy()
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        session = onnxruntime.InferenceSession(exported.SerializeToString())
        for image in (export.synthetic_image(1), torch.zeros(3, 30, 40), torch.zeros(3, 1, 1)):
            boxes, labels, scores = export.detect(session, image)
            assert boxes.shape == (len(scores), 4)
            assert labels.shape == scores.shape
            assert (len(scores) == 0) == (len(model(image)[2]) == 0) == silent


@pytest.mark.slow
def test_graph_resizes_as_pytorch(tmp_path):
    """In float32 as in torchvision's graph, 1 x 100 would become 1 x 159 pixels."""

    class Sizes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = TRANSFORM

        def forward(self, image):
            images, _ = self.transform([image])
            height, width = images.image_sizes[0]
            return images.tensors, torch.as_tensor(height), torch.as_tensor(width)

    model = Sizes().eval()
    with export.adapt_for_tracing(model):
        torch.onnx.export(
            *(model, (export.synthetic_image(0),), str(tmp_path / "x.onnx")),
            dynamo=False, opset_version=export.OPSET, input_names=["image"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(20, 400, (100, 2), generator=generator).tolist()
    for size in [(1, 100), (100, 2), (7, 1000), (1, 159), (1, 1), *others]:
        image = torch.rand(3, *size, generator=generator)
        pixels, *resized = session.run(None, {"image": image.numpy()})
        expected, *expected_size = model(image)
        assert resized == expected_size, size
        assert np.abs(pixels - expected.numpy()).max() < 1e-3


class FailingSession:
    def __init__(self, scores=None):
        self.scores = scores

    def run(self, names, inputs):
        if self.scores is None:
            raise ValueError("Non-zero status code\nmore")
        n = len(self.scores)
        return np.zeros((n, 4)), np.ones(n, np.int64), np.array(self.scores, np.float32)


def test_check_includes_a_black_image():
    class Blind(torch.nn.Module):
        score_thresh, detections_per_img = 0.05, 3

        def forward(self, images):
            assert not images[0].any()
            return [dict(zip(export.OUTPUTS, detections(), strict=True))]

    model = export.SingleImageDetector(Blind())
    export.check_black_image(model, FailingSession([]), (3, 20, 30))
    export.check_black_image(model, FailingSession([0.0504]), (3, 20, 30))  # rounding
    with pytest.raises(RunError, match="detects something in a black image"):
        export.check_black_image(model, FailingSession([0.3]), (3, 20, 30))
    with pytest.raises(RunError, match="it fails on an image of 30 x 20 pixels: Non-zero status"):
        export.check_black_image(model, FailingSession(), (3, 20, 30))


# ------------------------------------------------------------------------------- comparison


class Head:
    score_thresh, detections_per_img = 0.05, 3


def detections(*rows) -> tuple[torch.Tensor, ...]:
    """Boxes, labels and scores of (label, score, x), boxes of 10 pixels."""
    labels, scores, x = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T
    boxes = torch.stack([x, 0 * x, x + 10, 0 * x + 10], dim=1).float()
    return boxes, labels.long(), scores.float()


def match(expected, actual) -> export.Agreement:
    return export.match_detections(expected, actual, Head, (0.1, 1e-3))


def test_detections_match_in_any_order():
    result = match(
        detections((1, 0.5, 0), (1, 0.5, 40)), detections((1, 0.5, 40.01), (1, 0.5001, 0))
    )
    assert (result.matched, result.unmatched) == (2, 0)
    assert result.box_difference == pytest.approx(0.01, abs=1e-5)
    assert result.score_difference == pytest.approx(1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("actual", "unmatched"),
    [
        (detections((1, 0.5, 0.05), (2, 0.4, 40)), 0),
        (detections((1, 0.5, 0.2), (2, 0.4, 40)), 2),  # box
        (detections((1, 0.502, 0), (2, 0.4, 40)), 2),  # score
        (detections((2, 0.5, 0), (2, 0.4, 40)), 2),  # label
        (detections((1, 0.5, 0)), 1),
        (detections(), 2),
        (detections((1, float("nan"), 0), (2, 0.4, 40)), 2),
        (detections((1, 0.5, 0), (2, 0.4, 40), (2, 0.3, 80)), 0),  # the last of the 3 allowed
        (detections((1, 0.5, 0), (2, 0.4, 40), (2, 0.45, 80)), 1),
        (detections((1, 0.5, 0), (2, 0.4, 40), (2, 0.0504, 80)), 0),  # just above the threshold
    ],
)
def test_differences_beyond_tolerance_are_unmatched(actual, unmatched):
    assert match(detections((1, 0.5, 0), (2, 0.4, 40)), actual).unmatched == unmatched


def test_no_detections_are_reported():
    result = match(detections(), detections())
    assert "nothing was detected in them: use --check-images with objects" in export.describe(
        result, [torch.zeros(3, 9, 9)]
    )


# ------------------------------------------------------------------------------- safetensors


def test_safetensors_load_into_torchvision(saved, tmp_path, command):
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = tmp_path / "weights.safetensors"
    code, output, errors = command(saved, "--output", file)
    assert code == 0, errors
    assert "identical after loading into torchvision's model" in output
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["score_thresholds"]) == THRESHOLDS
    assert [row["name"] for row in json.loads(metadata["categories"])] == ["cat", "dög"]
    model = torchvision.models.get_model(
        metadata["model"],
        weights=None,
        weights_backbone=None,
        num_classes=int(metadata["num_classes"]),
        min_size=int(metadata["min_size"]),
        max_size=int(metadata["max_size"]),
        rpn_score_thresh=0.0,
    ).eval()
    model.load_state_dict(load_file(file), strict=True)
    image = export.synthetic_image(1)
    ours = models.from_checkpoint(checkpoint.load(saved), stock=True)
    with torch.inference_mode():
        expected, actual = ours([image])[0], model([image])[0]
    assert len(expected["boxes"]) > 20
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_weights_that_differ_after_loading_are_not_written(saved, tmp_path, command, monkeypatch):
    import safetensors.torch

    load = safetensors.torch.load_file

    def load_spoilt(file):
        state = load(file)
        state["backbone.fpn.inner_blocks.0.0.bias"] += 1
        return state

    monkeypatch.setattr(safetensors.torch, "load_file", load_spoilt)
    code, _, errors = command(saved, "--output", tmp_path / "x.safetensors")
    assert code == 1
    assert "backbone.fpn.inner_blocks.0.0.bias differ after loading" in errors
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ command line


REQUIRED_PACKAGES = {"x.onnx": "onnx onnxruntime", "x.safetensors": "safetensors"}


@pytest.mark.parametrize(
    ("missing", "name"),
    [("onnx", "x.onnx"), ("onnxruntime", "x.onnx"), ("safetensors", "x.safetensors")],
)
def test_missing_package_is_reported(saved, tmp_path, command, monkeypatch, missing, name):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, errors = command(saved, "--output", tmp_path / name)
    assert code == 2
    assert missing in errors.partition(": pip")[0]
    assert errors.endswith(f": pip install {REQUIRED_PACKAGES[name]}\n")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_invalid_arguments_are_rejected(saved, tmp_path, command):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for arguments, message in (
        ((saved,), "required: --output"),
        ((saved, "--output", "x.pt"), "--output x.pt: the suffix must be .onnx or .safetensors"),
        ((saved, "--output", "x.safetensors", "--half"), "--half and --check-images are for"),
        (("no.pth", "--output", tmp_path / "x.onnx"), "no.pth: no such file"),
        ((tmp_path / "broken.pth", "--output", tmp_path / "x.onnx"), "broken.pth cannot be read"),
        ((saved, "--output", tmp_path / "folder.onnx"), "folder.onnx is a folder: name a file"),
        ((saved, "--output", tmp_path / "file/x.onnx"), "x.onnx cannot be written: "),
        (
            (saved, "--output", tmp_path / "x.onnx", "--check-images", tmp_path),
            "no usable image in this folder",
        ),
    ):
        code, _, errors = command(*arguments)
        assert code == 2, arguments
        assert errors.startswith("export.py: error: ")
        assert message in errors
        assert errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.pth", "file", "folder.onnx"]


@pytest.mark.slow
def test_script_runs_from_any_folder(tmp_path):
    done = run(sys.executable, ROOT / "export.py", "x.pth", "--output", "x.onnx", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "export.py: error: x.pth: no such file\n"


def test_help_lists_flags_formats_and_exit_codes(command):
    code, output, _ = command("--help")
    assert code == 0
    for words in ("CHECKPOINT", "--half", "safetensors", "Exit codes"):
        assert words in output


# ------------------------------------------------------------------------- the documentation


@pytest.mark.slow
def test_documented_example_runs(exported, tmp_path):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/output-formats.md").read_text(), flags=re.S
    )
    (example,) = [block for block in blocks if "import onnxruntime" in block]
    file = tmp_path / re.search(r'Image\.open\("(.*?)"\)', example)[1]
    (tmp_path / "model.onnx").symlink_to(exported)
    pixels = (255 * export.synthetic_image(1)).byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, quality=95)
    # The model is untrained, so its scores are low.
    done = run(sys.executable, "-c", example.replace("0.5", "0.0"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert {line.split()[0] for line in lines} <= {"cat", "dög"}
    session = onnxruntime.InferenceSession(exported)
    image = np.asarray(Image.open(file), np.float32).transpose(2, 0, 1) / 255
    boxes, _, _ = session.run(None, {"image": image})
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", lines[0])[-4:]]
    assert numbers == pytest.approx(boxes[0].tolist(), abs=0.06)
    Image.new("RGB", (80, 60)).save(file)  # nothing is found with the score of the example
    done = run(sys.executable, "-c", example, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
