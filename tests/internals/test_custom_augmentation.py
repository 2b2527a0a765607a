"""An augmentation of the user's own: loading, what it draws, errors, spawned workers, resuming."""

import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL_FLAGS, main_in_process, read_losses, train_in_process

import coco_utils
import transforms
from internals.custom_augmentation import CustomAugmentation, code_version
from internals.errors import DataError, UserError
from internals.layouts import find_split

HEAD = """
import random
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

"""
EXAMPLE = ROOT / "docs/my_augmentation.py"


def write(folder: Path, body: str, name: str = "mine.py") -> str:
    """Write a file with a function `build` of this body, or whole code; return the flag's value."""
    code = body if "\n" in body else f"def build():\n    {body}\n"
    (folder / name).write_text(HEAD + code)
    return f"{folder / name}:build"


def per_image(body: str) -> str:
    """Return code of a transform that has this body."""
    return (
        f"def build():\n    def transform(image, target):\n        {body}\n    return transform\n"
    )


def sample() -> tuple[torch.Tensor, dict]:
    target = {
        "boxes": torch.tensor([[2.0, 4, 20, 30], [30, 10, 39, 29], [1, 1, 4, 3]]),
        "labels": torch.tensor([2, 1, 2]),
        "iscrowd": torch.zeros(3, dtype=torch.int64),
        "area": torch.tensor([9.0, 8.0, 7.0]),
        "image_id": 7,
    }
    return torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8), target


def dataset_of(root: Path, name: str) -> coco_utils.CocoDetection:
    index = coco_utils.CocoIndex(find_split(root, "train", None, None))
    return coco_utils.CocoDetection(index, index.categories, None, CustomAugmentation(name, 80))


def test_boxes_and_labels_are_transformed_together(tmp_path):
    """The middle box is cut off, the small one is dropped; the others keep their labels."""
    steps = "v2.RandomCrop((30, 25)), v2.SanitizeBoundingBoxes(min_size=5)"
    transform = CustomAugmentation(write(tmp_path, f"return v2.Compose([{steps}])"))
    seen = set()
    for seed in range(20):
        image, target = transforms.augment(transform, *sample(), seed)
        assert image.shape == (3, 30, 25)
        assert type(image) is type(target["boxes"]) is torch.Tensor
        boxes, count = target["boxes"], len(target["labels"])
        sides = boxes[:, 2:] - boxes[:, :2]
        assert torch.equal(target["area"], sides[:, 0] * sides[:, 1])
        assert target["iscrowd"].tolist() == [0] * count
        # The first box is 26 high and has label 2, the second is 19 high and has label 1.
        assert target["labels"].tolist() == [{26: 2, 19: 1}[h] for h in sides[:, 1].tolist()]
        seen |= {tuple(target["labels"].tolist())}
    assert {(2,), (2, 1)} <= seen


def test_all_generators_depend_on_the_seed_of_the_image(tmp_path):
    body = "n = random.randrange(99) + np.random.randint(99) + int(torch.randint(99, ()))"
    code = per_image(f"{body}\n        return torch.full_like(image, n % 256), target")
    transform = CustomAugmentation(write(tmp_path, code))

    def draw(seed: int) -> int:
        return int(transforms.augment(transform, *sample(), seed)[0][0, 0, 0])

    first = [draw(seed) for seed in (5, 2**64 - 1, 7, 8)]
    random.random(), np.random.rand(), torch.rand(1)
    assert [draw(seed) for seed in (5, 2**64 - 1, 7, 8)] == first
    assert len(set(first)) > 1


def test_code_reaches_spawned_workers_as_it_was_read(tmp_path):
    """The transform, a closure, cannot be pickled; a later edit of the file has no effect."""
    name = write(tmp_path, per_image("return image, target"))
    transform = CustomAugmentation(name)
    content = pickle.dumps(transform)
    write(tmp_path, per_image("raise ValueError"))
    image, target = sample()
    copy, _ = transforms.augment(pickle.loads(content), image, target, 1)
    assert torch.equal(copy, image)


@pytest.mark.slow
def test_spawned_workers_give_the_same_images(tiny):
    dataset = dataset_of(tiny, f"{EXAMPLE}:build")
    keys = [(n, 50 + n) for n in range(4)]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[keys[:2], keys[2:]],
        collate_fn=coco_utils.collate,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    found = torch.cat([batch.buffer for batch in loader])
    expected = [coco_utils.collate([dataset[key] for key in part]) for part in (keys[:2], keys[2:])]
    assert torch.equal(found, torch.cat([batch.buffer for batch in expected]))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "returned 3: return a transform"),
        ("return None", "returned None: return a transform"),
        ("raise KeyError('x')", r"raised KeyError in line 9: 'x'"),
        ("return v2.NoSuchTransform()", r"raised AttributeError in line 9: .*NoSuchTransform"),
        ("return v2.Compose([)", r"raised SyntaxError: .*mine.py, line 9"),
        ("def other():\n    pass", "the file has no function 'build'"),
        ("build = 3\n", "the file has no function 'build'"),
        ("import sys; sys.exit(0)", "raised SystemExit in line 9: 0"),
        ("import no_such_package\n", "raised ModuleNotFoundError in line 8: No module named"),
    ],
)
def test_functions_that_fail_are_rejected(tmp_path, body, message):
    name = write(tmp_path, body)
    with pytest.raises(UserError, match=f"^--data-augmentation {re.escape(name)}.*{message}"):
        transforms.training_preset(name, 64)


def test_missing_file_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"none.py:build: the file cannot be read \(No such file"):
        transforms.training_preset(f"{tmp_path}/none.py:build", 64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return image", "returned Image|returned a tensor uint8"),
        ("return image, target['boxes']", "instead of an image and a dict of boxes and labels"),
        ("return image / 255, target", r"returned a tensor float32 \[3, \d+, \d+\] instead of"),
        ("return image[:1], target", r"returned a tensor uint8 \[1, \d+, \d+\] instead of an im"),
        ("return image[:, :0], target", "an image without pixels"),
        ("return v2.functional.resize(image, [1, 81]), target", "resizing its longer side to 80 p"),
        ("return image.numpy(), target", "returned ndarray instead of an image"),
        ("return image, {**target, 'boxes': target['boxes'][:, :3]}", r"instead of float32 \[N, 4"),
        ("return image, {**target, 'boxes': target['boxes'].long()}", "boxes instead of float32"),
        ("return image, {'labels': target['labels']}", "NoneType as boxes"),
        ("return v2.functional.pad(image, [9]), target", "it must transform both"),
        ("return image, {**target, 'labels': target['labels'][:-1]}", "boxes with . labels"),
        ("return image, {**target, 'labels': target['labels'] + 7}", "label that the image has no"),
        ("return image, {**target, 'labels': target['labels'].float()}", "instead of int64"),
        (
            "return v2.ConvertBoundingBoxFormat('CXCYWH')(image, target)",
            "boxes of format CXCYWH instead of XYXY",
        ),
        ("target['boxes'][0, 0] = float('nan'); return image, target", r"the box \[nan, "),
        ("target['boxes'][-1, 2] = 999; return image, target", r"999.0, .* is not in its image"),
        ("target['boxes'][0, 1] = -2; return image, target", "v2.ClampBoundingBoxes"),
        ("target['boxes'][0] = target['boxes'][0].flip(0); return image, target", "is not in its"),
    ],
)
def test_wrong_results_name_function_and_image(tiny, tmp_path, body, message):
    name = write(tmp_path, per_image(body))
    dataset = dataset_of(tiny, name)
    image = f"{tiny / 'train2017/1.png'} (id 101)"
    start = f"^{re.escape(image)}: --data-augmentation {re.escape(name)}: its transform "
    with pytest.raises(DataError, match=f"{start}.*({message})"):
        dataset[(1, 5)]
    dataset[1]  # without a seed it is not augmented


@pytest.mark.parametrize(
    ("body", "message"),
    [("raise KeyError('x')", "KeyError in line 10: 'x'"), ("sys.exit(0)", "SystemExit in line 10")],
)
def test_failing_transforms_name_function_and_image(tiny, tmp_path, body, message):
    dataset = dataset_of(tiny, write(tmp_path, per_image(f"import sys; {body}")))
    with pytest.raises(DataError, match=rf"1.png \(id 101\): --data-augmentation .*{message}"):
        dataset[(1, 5)]


def test_boxes_may_be_a_part_of_a_tensor(tmp_path):
    """Indexing returns a plain tensor."""
    body = "n = len(target['boxes']) - 1; return image, {k: v[:n] for k, v in target.items()}"
    image, target = sample()
    _, found = transforms.augment(
        transforms.training_preset(write(tmp_path, per_image(body)), 64), image, target, 1
    )
    assert torch.equal(found["boxes"], target["boxes"][:-1])
    assert type(found["boxes"]) is torch.Tensor


def test_file_may_change_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path.cwd()
    (tmp_path / "other").mkdir()
    transforms.training_preset(
        write(tmp_path, "import os; os.chdir('other'); return v2.Identity()"), 64
    )
    assert Path.cwd() == folder


def test_boxes_may_reach_out_by_rounding(tmp_path):
    name = write(tmp_path, per_image("target['boxes'][1, 2] += 1.5; return image, target"))
    _, target = transforms.augment(CustomAugmentation(name), *sample(), 1)
    assert target["boxes"][1].tolist() == [30, 10, 40, 29]


def test_code_version_is_a_hash_of_the_content(tmp_path):
    assert code_version("hflip") is code_version(None) is None
    first = code_version(write(tmp_path, "return 1"))
    assert re.fullmatch("[0-9a-f]{12} of mine.py", first)
    (tmp_path / "moved").mkdir()
    assert code_version(write(tmp_path / "moved", "return 1")) == first
    assert code_version(write(tmp_path, "return 2")) != first


def test_example_of_the_guide_is_the_file():
    guide = (ROOT / "docs/augmentations.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", guide, re.DOTALL)
    assert EXAMPLE.read_text(encoding="utf-8").endswith(code)
    assert len(code.splitlines()) <= 15
    assert all(f"`{name}`" in guide for name in transforms.PRESETS)


@pytest.mark.slow
def test_example_trains_and_resumes_with_the_same_code_only(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    shutil.copy(EXAMPLE, folder)
    monkeypatch.chdir(folder)
    flags = ("--data-path", tiny, "--data-augmentation", "my_augmentation.py:build")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_in_process(*flags, "--output-dir", whole)
    assert len(read_losses(whole)) == 4
    train_in_process(*flags, "--output-dir", parts, "--max-steps", 2)
    monkeypatch.chdir(tmp_path)
    resume = (*SMALL_FLAGS, "--data-path", tiny, "--output-dir", parts, "--resume", "auto")
    file = folder / EXAMPLE.name
    code = file.read_text()
    file.write_text(code + "# changed\n")
    with pytest.raises(UserError, match=r"augmentation code \w{12} of my_augmentation.py \(now"):
        main_in_process(*resume)
    file.write_text(code)
    with pytest.raises(UserError, match=r"--data-augmentation hflip differs from .*my_augm"):
        main_in_process(*resume, "--data-augmentation", "hflip")
    moved = shutil.move(file, tmp_path / file.name)
    with pytest.raises(UserError, match=r"cannot be read .*give the new one if it was moved"):
        main_in_process(*resume)
    main_in_process(*resume, "--data-augmentation", f"{moved.name}:build")
    assert read_losses(parts) == read_losses(whole)
    Path(moved).unlink()  # an evaluation does not need it
    test = ("--test-only", "--resume", parts / "checkpoint.pth", "--output-dir", tmp_path / "test")
    assert "AP" in main_in_process(*SMALL_FLAGS, "--data-path", tiny, *test)
