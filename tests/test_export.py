import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, run, write_part
from PIL import Image

import checkpoint
import export
import models

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors")

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
BCCD = ROOT.parent / "shared/data/bccd/val2017"


def untied_model(name: str = NAME) -> torch.nn.Module:
    """A detector that nobody has trained, but whose scores differ as those of a trained one do."""
    torch.manual_seed(0)
    model = models.build_model(name, 3, pretrained=None, min_sizes=(96,), max_size=160, stock=True)
    target = {"boxes": torch.tensor([[10.0, 10, 90, 90]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        for n in range(6):  # the statistics of its norms
            model([export.made_up_picture(n), export.made_up_picture(n + 1)], [target] * 2)
        model.rpn.head.cls_logits.weight *= 30
        model.roi_heads.box_predictor.cls_score.weight *= 200
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint, and in the folder `data` beside it the data that it was trained on."""
    root = tmp_path_factory.mktemp("saved")
    write_part(root / "data", "val", [(64, 48), (48, 64), (90, 90)], [[[2, 4, 4, 30, 20]]] * 3)
    args = {
        "model": NAME, "weights": None, "weights_backbone": "none", "min_size": 96,
        "max_size": 160, "fixed_size": None, "rpn_score_thresh": None,
        "data_path": str(root / "data"), "val_annotations": None, "val_images": None,
    }  # fmt: skip
    categories = [{"id": 2, "name": "cat", "label": 1}, {"id": 5, "name": "dög", "label": 2}]
    state = {
        "model": untied_model().state_dict(), "optimizer": {}, "scaler": {}, "epoch": 1, "step": 1,
        "best_AP": None, "categories": categories, "args": args,
    }  # fmt: skip
    return checkpoint.save(root, state)


@pytest.fixture(scope="module")
def exported(saved) -> Path:
    export.main([str(saved), "--output", str(saved.parent / "model.onnx")])
    return saved.parent / "model.onnx"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script as from a command line, in this process: its exit code, output, errors."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            export.run_and_exit()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return command


# -------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("size", [(60, 80), (110, 70), (48, 300), (200, 200)])
def test_any_size_gives_what_pytorch_gives(saved, exported, size):
    session = onnxruntime.InferenceSession(exported)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(size[0]))
    image[:, 10:40, 10:40] = 0.9
    model = export.OneImage(models.from_checkpoint(checkpoint.load(saved), stock=True)).eval()
    result = export.compare(model, session, [image])
    assert not result.failed, result
    assert len(result.boxes) > 20
    assert np.ptp(session.run(["scores"], {"image": image.numpy()})[0]) > 0.1  # no mere ties


def test_the_file_says_what_goes_in_and_what_comes_out(exported):
    session = onnxruntime.InferenceSession(exported)
    (image,) = session.get_inputs()
    assert (image.name, image.shape) == ("image", [3, "height", "width"])
    assert [o.name for o in session.get_outputs()] == ["boxes", "labels", "scores"]
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["categories"]) == [
        {"id": 2, "name": "cat", "label": 1},
        {"id": 5, "name": "dög", "label": 2},
    ]
    assert known["model"] == NAME
    assert (known["num_classes"], known["min_size"], known["max_size"]) == ("3", "96", "160")
    assert "RGB" in known["input"] or "red, green and blue" in known["input"]
    assert "fixed_size" not in known


def test_outputs_have_one_order_whatever_the_model(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, images):
            return [{"boxes": 1, "scores": 2, "labels": 3}]  # as RetinaNet, FCOS and SSD do

    assert export.OneImage(Model())(None) == (1, 3, 2)


def test_it_is_checked_on_the_pictures_that_are_there(saved, tmp_path, command, monkeypatch):
    code, output, errors = command(saved, "--output", tmp_path / "a b/x.onnx")
    assert (code, errors) == (0, "")  # no noise of the exporter's either
    assert f"validation pictures of {saved.parent / 'data/val2017'}" in output
    assert "on 3 pictures of 3 sizes: " in output
    assert [p.name for p in (tmp_path / "a b").iterdir()] == ["x.onnx"]

    args = {"data_path": str(tmp_path), "val_annotations": None, "val_images": None}
    pictures, source = export.check_pictures(None, args)
    assert "made-up pictures, as the validation pictures are gone" in source
    assert len({image.shape for image in pictures}) > 1


def test_twenty_pictures_at_most_and_two_sizes_at_least(tmp_path, capsys):
    for n in range(30):
        Image.new("RGB", (20, 10), (n, 0, 0)).save(tmp_path / f"{n:02}.png")
    (tmp_path / "00.png").write_bytes(b"")
    Image.new("RGB", (200, 2)).save(tmp_path / "29.png")
    pictures, _ = export.check_pictures(tmp_path, {})
    assert [image.shape for image in pictures] == [(3, 10, 20)] * 18 + [(3, 8, 12)]
    reds = [round(float(image[0, 0, 0]) * 255) for image in pictures]
    assert reds[-2] == 27  # from all over the folder
    output = capsys.readouterr().out
    assert f"left out: {tmp_path / '00.png'} cannot be read" in output
    assert f"left out: {tmp_path / '29.png'} is too narrow" in output


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD pictures are not here")
def test_twenty_real_pictures(saved, exported):
    pictures, _ = export.check_pictures(BCCD, {})
    assert len(pictures) == 21
    model = export.OneImage(models.from_checkpoint(checkpoint.load(saved), stock=True)).eval()
    result = export.compare(model, onnxruntime.InferenceSession(exported), pictures)
    assert not result.failed, result
    assert len(result.boxes) > 500
    assert result.ties <= 2


def test_what_fails_the_check_is_not_written(saved, tmp_path, command, monkeypatch):
    def spoil(graph, modules):
        (weights,) = [
            t for t in graph.initializer if t.name.endswith("box_predictor.bbox_pred.weight")
        ]
        values = onnx.numpy_helper.to_array(weights) * 3
        weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))

    monkeypatch.setattr(export, "resolve_low_scores", spoil)
    file = tmp_path / "x.onnx"
    file.write_text("an earlier one")
    code, _, errors = command(saved, "--output", file)
    assert code == 1
    assert errors.startswith(f"export.py: error: {file} was not written: it does not agree with")
    assert errors.count("\n") == 1
    assert re.search(r"differ by up to \d[\d.]* pixels \(0\.1 allowed\)", errors)
    assert file.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [file]


def test_half_is_half_the_size_and_the_same_as_rounded_weights(saved, exported, tmp_path, command):
    code, output, errors = command(saved, "--output", tmp_path / "x.onnx", "--half")
    assert code == 0, errors
    assert "its weights rounded alike, on 3 pictures" in output
    assert re.search(r"rounding the weights to float16 has changed: boxes by [\d.e-]+ pix", output)
    size = (tmp_path / "x.onnx").stat().st_size
    assert 0.48 < size / exported.stat().st_size < 0.52
    (image,) = onnxruntime.InferenceSession(tmp_path / "x.onnx").get_inputs()
    assert image.type == "tensor(float)"


def test_numbers_that_float16_lacks_stay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e5
    before = model[1].weight.clone()
    assert export.round_to_half(model) == {"0.weight"}
    assert torch.equal(model[1].weight, before)
    assert torch.equal(model[0].weight, model[0].weight.half().float())


def test_low_scores_keep_their_order(tmp_path):
    make = onnx.helper
    floats = [make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N"]) for n in "xy"]
    graph = make.make_graph([make.make_node("Sigmoid", ["x"], ["y"])], "g", floats[:1], floats[1:])
    export.resolve_low_scores(graph, onnx)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", export.OPSET)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    x = np.float32([-200, -60, -40, -39.999, -20, -1, 0, 3, 200])
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert y == pytest.approx(torch.from_numpy(x).sigmoid().numpy(), rel=1e-5, abs=1e-30)
    assert (np.diff(y)[1:-1] > 0).all()


# --------------------------------------------------------------------------------- the check


class Head:
    score_thresh, detections_per_img = 0.05, 3


def found(*rows) -> dict:
    """Detections of (label, score, x) as boxes of 10 pixels."""
    labels, scores, x = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {
        "boxes": torch.stack([x, 0 * x, x + 10, 0 * x + 10], dim=1).float(),
        "labels": labels,
        "scores": scores.float(),
    }


def test_equal_scores_may_change_places():
    one, other = found((1, 0.5, 0), (1, 0.5, 40)), found((1, 0.5, 40.01), (1, 0.5001, 0))
    result = export.compare_one(one, other, Head)
    assert not result.failed
    assert result.boxes == pytest.approx([0, 0.01], abs=1e-5)
    assert max(result.scores) == pytest.approx(1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("other", "failed", "alone", "near"),
    [
        (found((1, 0.5, 0.05), (2, 0.4, 40)), False, 0, 0),
        (found((1, 0.5, 0.2), (2, 0.4, 40)), True, 0, 0),
        (found((1, 0.502, 0), (2, 0.4, 40)), True, 0, 0),
        (found((2, 0.5, 0), (2, 0.4, 40)), True, 2, 0),
        (found((1, 0.5, 0)), True, 1, 0),
        (found((1, 0.5, 0), (2, 0.4, 40), (2, 0.3, 80)), False, 0, 1),  # the third is the last
        (found((1, 0.5, 0), (2, 0.4, 40), (2, 0.0504, 80)), False, 0, 1),
    ],
)
def test_what_differs_is_counted(other, failed, alone, near):
    result = export.compare_one(found((1, 0.5, 0), (2, 0.4, 40)), other, Head)
    assert (result.failed, result.alone, result.at_cut_off) == (failed, alone, near)


def test_nothing_found_is_no_agreement():
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0), "scores": torch.empty(0)}
    result = export.compare_one(nothing, nothing, Head)
    assert not result.failed
    assert "nothing was found in them: use --check-images with objects" in str(result)
    assert export.compare_one(nothing, found((1, 0.5, 0)), Head).alone == 1


def test_boxes_without_an_area_have_partners_as_well():
    flat = {**found((1, 0.5, 0)), "boxes": torch.tensor([[5.0, 5, 5, 9]])}
    assert not export.compare_one(flat, flat, Head).failed


@pytest.mark.parametrize(("tied", "ties"), [(True, 1), (False, 0)])
def test_a_tie_is_forgiven_where_pytorch_itself_is_undecided(tied, ties):
    class Model(torch.nn.Module):
        roi_heads = Head
        calls = 0

        def detections(self, image):
            self.calls += 1
            return found((1, 0.5, 0 if tied and self.calls > 3 else 4))

    class Session:
        def run(self, names, inputs):
            return [found((1, 0.5, 0))[name].numpy() for name in names]

    model = Model()
    model.model = Head
    result = export.compare(model, Session(), [torch.zeros(3, 9, 9)])
    assert (result.failed, result.ties, result.pictures) == (not tied, ties, 1)


# ------------------------------------------------------------------------------- safetensors


def test_weights_load_into_torchvision_s_own_class(saved, tmp_path, command):
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = tmp_path / "weights.safetensors"
    code, output, errors = command(saved, "--output", file)
    assert code == 0, errors
    assert "loaded into torchvision's own class bit for bit" in output
    with safe_open(file, "pt") as opened:
        known = opened.metadata()
    categories = json.loads(known["categories"])
    assert [row["name"] for row in categories] == ["cat", "dög"]
    model = torchvision.models.get_model(
        known["model"],
        weights=None,
        weights_backbone=None,
        num_classes=int(known["num_classes"]),
        min_size=int(known["min_size"]),
        max_size=int(known["max_size"]),
    ).eval()
    model.load_state_dict(load_file(file), strict=True)
    image = export.made_up_picture(1)
    with torch.inference_mode():
        ours, theirs = (
            models.from_checkpoint(checkpoint.load(saved), stock=True)([image])[0],
            model([image])[0],
        )
    assert len(ours["boxes"]) > 20
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_weights_that_differ_after_loading_are_not_left(saved, tmp_path, command, monkeypatch):
    import safetensors.torch

    load = safetensors.torch.load_file

    def spoilt(file):
        state = load(file)
        state["backbone.fpn.inner_blocks.0.0.bias"] += 1
        return state

    monkeypatch.setattr(safetensors.torch, "load_file", spoilt)
    code, _, errors = command(saved, "--output", tmp_path / "x.safetensors")
    assert code == 1
    assert "backbone.fpn.inner_blocks.0.0.bias differ after loading" in errors
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("missing", "name"),
    [("onnx", "x.onnx"), ("onnxruntime", "x.onnx"), ("safetensors", "x.safetensors")],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    saved, tmp_path, command, monkeypatch, missing, name
):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, errors = command(saved, "--output", tmp_path / name)
    assert code == 2
    assert errors == f"export.py: error: a package is missing for this: pip install {missing}\n"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_one_message(saved, tmp_path, command):
    (tmp_path / "file").touch()
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for arguments, message in (
        ((saved,), "required: --output"),
        ((saved, "--output", "x.pt"), "--output x.pt: end the name with .onnx or .safetensors"),
        ((saved, "--output", "x.safetensors", "--half"), "--half and --check-images are for"),
        (("no.pth", "--output", tmp_path / "x.onnx"), "no.pth: no such file"),
        ((tmp_path / "broken.pth", "--output", tmp_path / "x.onnx"), "broken.pth cannot be read"),
        ((saved, "--output", tmp_path / "file/x.onnx"), "x.onnx cannot be written: "),
        (
            (saved, "--output", tmp_path / "x.onnx", "--check-images", tmp_path),
            "there is no picture that can be read",
        ),
    ):
        code, _, errors = command(*arguments)
        assert code == 2, arguments
        assert errors.startswith("export.py: error: ")
        assert message in errors
        assert errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.pth", "file"]


def test_the_script_runs_from_any_folder(tmp_path):
    done = run(sys.executable, ROOT / "export.py", "x.pth", "--output", "x.onnx", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "export.py: error: x.pth: no such file\n"


def test_help_is_complete(command):
    code, output, _ = command("--help")
    assert code == 0
    for words in ("CHECKPOINT", "--half", "safetensors", "Exit codes"):
        assert words in output


# -------------------------------------------------------------------------------- the README


def test_the_example_of_the_readme_runs(exported, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    examples = [block for block in blocks if "import onnxruntime" in block]
    if not examples:
        pytest.skip("README.md has no example with onnxruntime yet")
    (tmp_path / "model.onnx").symlink_to(exported)
    pixels = (255 * export.made_up_picture(1)).byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.jpg", quality=95)
    # Nobody has trained this model, so its scores are low.
    done = run(sys.executable, "-c", examples[0].replace("0.5", "0.0"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert {line.split()[0] for line in lines} <= {"cat", "dög"}
    session = onnxruntime.InferenceSession(exported)
    image = np.asarray(Image.open(tmp_path / "picture.jpg"), np.float32).transpose(2, 0, 1) / 255
    boxes, _, _ = session.run(None, {"image": image})
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", lines[0])[-4:]]
    assert numbers == pytest.approx(boxes[0].tolist(), abs=0.06)
