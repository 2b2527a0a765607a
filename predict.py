#!/usr/bin/env python3
"""Find objects in pictures: the pictures with boxes drawn, and the boxes as a file.

With a checkpoint that train.py has written:

    python predict.py output/model_best.pth my_pictures --output-dir found

With torchvision's own weights for COCO's 80 categories:

    python predict.py COCO_V1 my_pictures --model fasterrcnn_resnet50_fpn --output-dir found
"""

import argparse
import csv
import glob
import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import checkpoint
import coco_eval
import coco_utils
import models
import utils
from arguments import choose_device
from internals.command_line import ArgumentParser, positive_int
from internals.errors import DataError, UserError
from internals.mixed_precision import autocast, resolve_precision
from reporting import drawing

JPEG_LONGEST = 65_500  # pixels: the format has no more


class Interrupted(RuntimeError):
    """The user has pressed Ctrl-C."""


class BadPictures(ValueError):
    """Some of the pictures could not be used."""


# --------------------------------------------------------------------------------- arguments


def score(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


# fmt: off

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Find objects in pictures with a trained detector.",
        epilog="Written into DIR: pictures/ with boxes, names and scores; the boxes as coco: "
        "detections.json (COCO results) and images.json (which image_id is which file; both fit "
        "pycocotools), csv: detections.csv, or yolo: labels/ and classes.txt. Exit codes: 0 done; "
        "2 the command line, the checkpoint or some of the pictures are wrong; 1 failed.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="a .pth file of train.py, or with --model the name of torchvision's weights: COCO_V1")
    add("images", nargs="+", metavar="IMAGES",
        help="picture files, folders (with the folders in them), or patterns such as 'day*/*.jpg'")
    add("--output-dir", type=Path, required=True, metavar="DIR",
        help="a new or empty folder: nothing is written over")
    add("--model", choices=models.MODELS, metavar="NAME",
        help=f"torchvision's detector, with its own weights: one of {', '.join(models.MODELS)}")
    add("--score-threshold", type=score, default=0.5, metavar="SCORE",
        help="leave out boxes with a lower score, 0 to 1; models have a threshold of their own, "
        "most often 0.05 (default: %(default)s)")
    add("--format", choices=WRITERS, default="coco",
        help="of the boxes, see below (default: %(default)s)")
    add("--show-truth", type=Path, metavar="FILE",
        help="an annotation file in COCO format: draw its boxes, too, on the left, and use its "
        "image ids")
    add("--device", metavar="DEVICE", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU that is made for it")
    add("--batch-size", type=positive_int, metavar="N",
        help="pictures of one size in a row that are looked at together; changes nothing but speed "
        "and memory (default: 8 on CUDA, 1 on a CPU)")
    return parser.parse_intermixed_args(argv)

# fmt: on


# ------------------------------------------------------------------------------- the pictures


@dataclass
class Picture:
    """A picture to look at, and what it is called in the results."""

    path: Path
    file_name: str  # from the folder that holds all of them, or as the annotation file says
    stem: str  # of the files that are written for it: no two pictures have the same
    image_id: int
    stated_size: tuple[int, int] | None = None  # width and height by the annotation file
    true_row: int | None = None  # its position in the annotation file
    size: tuple[int, int] | None = None  # width and height, once it has been read


def find_pictures(arguments: list[str]) -> list[Picture]:
    """The pictures that files, folders and patterns stand for, in that order, each once."""
    found = [pair for argument in arguments for pair in expand(argument)]
    paths = {os.path.abspath(path): None for _, path in found}
    home = common_folder([os.path.abspath(base) for base, _ in found])
    pictures, taken = [], set()
    for n, path in enumerate(paths, start=1):
        name = PurePath(path).relative_to(home).as_posix() if home else path.replace(":", "")
        stem = unused(PurePath(name).with_suffix("").as_posix(), taken)
        pictures.append(Picture(Path(path), name, stem, image_id=n))
    return pictures


def expand(argument: str) -> list[tuple[Path, Path]]:
    """(folder, file) for each picture that an argument stands for.

    What exists is no pattern, whatever brackets its name has. A shell may have expanded a pattern
    or left it, as those of Windows do: the same comes of it.
    """
    path = Path(argument)
    if path.is_dir():
        inside = coco_utils.image_files(path)
        if not inside:
            kinds = ", ".join(coco_utils.IMAGE_SUFFIXES)
            raise UserError(f"there is no picture in the folder {argument} ({kinds})")
        return [(path, file) for file in inside]
    if path.exists():
        return [(path.parent, path)]
    if not glob.has_magic(argument):
        raise UserError(f"{argument}: no such file or folder")
    matches = sorted(glob.glob(argument, recursive=True))
    if not matches:
        raise UserError(f"{argument}: no file has a name like this")
    return [pair for match in matches for pair in expand(match)]


def common_folder(folders: list[str]) -> str | None:
    try:
        return os.path.commonpath(folders)
    except ValueError:  # several drives of Windows
        return None


def unused(stem: str, taken: set[str]) -> str:
    """The stem, with a number if needed to differ from those taken, also to systems that take
    small and capital letters for the same."""
    free, number = stem, 1
    while free.lower() in taken:
        number += 1
        free = f"{stem}-{number}"
    taken.add(free.lower())
    return free


def find_truth(pictures: list[Picture], index: coco_utils.CocoIndex) -> None:
    """Give pictures the name, id and size that the annotation file has for them.

    A picture belongs to the longest file name that its path ends with. Those that the file does
    not list get new ids.
    """
    names = [os.path.normpath(index.file_name(i)).replace("\\", "/") for i in range(len(index))]
    rows = {name: i for i, name in reversed(list(enumerate(names)))}
    owners, unlisted = {}, int(index.image_ids.max())
    for picture in pictures:
        parts = picture.path.parts
        ends = ("/".join(parts[n:]) for n in range(len(parts)))
        row = next((rows[end] for end in ends if end in rows), None)
        if row is None:
            unlisted += 1
            picture.image_id = unlisted
            continue
        if row in owners:
            raise UserError(
                f"--show-truth: {index.annotation_file} lists {index.file_name(row)} once (id "
                f"{index.image_ids[row]}), but it may be {owners[row]} or {picture.path}: leave "
                "one out"
            )
        owners[row] = picture.path
        picture.true_row, picture.stated_size = row, tuple(index.sizes[row].tolist())
        picture.file_name, picture.image_id = index.file_name(row), int(index.image_ids[row])
    if not owners:
        raise UserError(f"--show-truth: {index.annotation_file} lists none of the pictures")


def read(picture: Picture) -> torch.Tensor | DataError:
    """The picture, uint8 `[3, H, W]`, as it is shown or as its annotations see it."""
    try:
        if picture.stated_size:
            image = coco_utils.read_image(picture.path, *picture.stated_size)
        else:
            image = coco_utils.read_upright(picture.path)
    except DataError as error:
        return error
    picture.size = (image.shape[2], image.shape[1])
    return image


# ------------------------------------------------------------------------------ the detections


@dataclass
class Detector:
    """A model with what is needed to ask it."""

    model: nn.Module
    categories: coco_utils.Categories
    device: torch.device
    amp_dtype: torch.dtype | None
    score_threshold: float

    def misfit(self, picture: Picture) -> str | None:
        """Why the model cannot look at a picture: one side would be resized to nothing."""
        transform, (short, long) = self.model.transform, sorted(picture.size)
        if transform.fixed_size is None and long > short * transform.max_size:
            return (
                f"{picture.path}: {picture.size[0]} x {picture.size[1]} pixels are too narrow for "
                f"this model, which makes the longest side {transform.max_size}: cut it in parts"
            )
        return None

    @torch.inference_mode()
    def __call__(self, batch: list[tuple]) -> list[tuple[Picture, torch.Tensor, np.ndarray]]:
        """For pairs of picture and image also the rows of `coco_eval.detection_rows`, the highest
        score first."""
        images = coco_utils.PackedImages([image for _, image in batch]).to(self.device)
        with autocast(self.device, self.amp_dtype):
            outputs = self.model(images)
        category_ids, found = self.categories.ids_of_labels(), []
        for (picture, image), output in zip(batch, outputs, strict=True):
            rows = coco_eval.detection_rows([output], [picture.image_id], category_ids)
            found.append((picture, image, rows[rows[:, 5] >= self.score_threshold]))
        return found


def load_detector(args: argparse.Namespace) -> tuple[nn.Module, coco_utils.Categories]:
    """The model of a checkpoint, or torchvision's own, and its categories."""
    path = Path(args.checkpoint)
    if args.model and path.exists():
        raise UserError(f"--model is for torchvision's weights: {path} knows its own model")
    if args.model:
        model, rows = models.pretrained(args.model, args.checkpoint)
    elif path.is_dir():
        raise UserError(f"{path} is a folder: give a checkpoint in it, {path / checkpoint.BEST}")
    elif not path.exists():
        raise UserError(f"{path}: no such file. For torchvision's own weights say --model, too")
    else:
        saved = checkpoint.load(path)
        model, rows = models.from_checkpoint(saved), saved["categories"]
    return model, coco_utils.Categories.from_list(rows)


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, most: int) -> Iterator:
    """`function` of each item, in order, by the threads of `pool`, at most so many ahead."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(pairs: Iterable, size: int) -> Iterator[list]:
    """Pairs of picture and image in lists of up to `size`, each of pictures of one size in a row.

    Others would be padded, which changes what the model sees near their borders.
    """
    for _, alike in groupby(pairs, key=lambda pair: pair[0].size):
        batch = []
        for pair in alike:
            batch.append(pair)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


@dataclass
class Findings:
    """What has come of the pictures."""

    found: list[tuple[Picture, np.ndarray]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # what is wrong with those that are left out
    seconds: float = 0.0
    interrupted: bool = False


def look_at(pictures: list[Picture], detector: Detector, draw: Callable, size: int) -> Findings:
    """Read, detect and draw all pictures: threads read and draw while the model is at work.

    `draw(picture, image, rows)` is called for each that can be used.
    """
    findings, begin = Findings(), time.perf_counter()
    threads = min(4, os.cpu_count() or 1)
    bar = tqdm(
        total=len(pictures),
        unit="picture",
        leave=False,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as drawers, bar:
        images = ahead(readers, read, pictures, size + threads)
        pairs = usable(zip(pictures, images, strict=True), detector, findings.bad)
        found = (each for batch in batches(pairs, size) for each in detector(batch))
        try:
            for picture, rows in ahead(drawers, draw, found, 2 * threads):
                findings.found.append((picture, rows))
                bar.update(len(findings.found) + len(findings.bad) - bar.n)
        except KeyboardInterrupt:
            findings.interrupted = True
    findings.seconds = time.perf_counter() - begin
    return findings


def usable(pairs: Iterable, detector: Detector, bad: list[str]) -> Iterator:
    """The pairs of picture and image that the model can look at; says what is wrong with others."""
    for picture, image in pairs:
        wrong = str(image) if isinstance(image, Exception) else detector.misfit(picture)
        if wrong is None:
            yield picture, image
        else:
            bad.append(wrong)
            tqdm.write(f"left out: {wrong}", file=sys.stderr)


# --------------------------------------------------------------------------------- the results


@dataclass
class Drawer:
    """Draws what was found, and with `index` what is there, into `folder`."""

    folder: Path
    categories: coco_utils.Categories
    index: coco_utils.CocoIndex | None

    def __call__(self, found: tuple) -> tuple[Picture, np.ndarray]:
        picture, image, rows = found
        texts = [f"{self.name(row[6])} {row[5]:.2f}" for row in rows]
        drawn = self.boxes(image, rows[:, 1:5], rows[:, 6], texts)
        if picture.true_row is not None:
            boxes, ids, texts = self.truth(picture.true_row)
            drawn = drawing.side_by_side(
                [self.boxes(image, boxes, ids, texts), drawn],
                [f"truth: {counted(len(boxes))}", f"prediction: {counted(len(rows))}"],
            )
        suffix = ".png" if max(drawn.shape) > JPEG_LONGEST else ".jpg"
        file = self.folder / (picture.stem + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Halved colours, Pillow's default, would smear the thin lines.
        options = {"quality": 90, "subsampling": 0} if suffix == ".jpg" else {}
        Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()).save(file, **options)
        return picture, rows

    def name(self, category_id: float) -> str:
        return dict(zip(self.categories.ids, self.categories.names, strict=True))[category_id]

    def boxes(
        self, image: torch.Tensor, xywh: np.ndarray, category_ids: np.ndarray, texts: list[str]
    ) -> torch.Tensor:
        """The image with boxes, the first of them on top."""
        xyxy = torch.from_numpy(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])).float()
        shades = [drawing.colour(self.categories.ids.index(i)) for i in category_ids]
        return drawing.draw_boxes(image, xyxy.flip(0), texts[::-1], shades[::-1])

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Boxes, category ids and texts of image i of the annotation file, those with a size."""
        rows = self.index.box_range(i)
        boxes, ids = self.index.boxes[rows], self.index.category_ids[rows]
        drawable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
        drawable &= np.isin(ids, self.categories.ids)
        crowds = self.index.iscrowd[rows][drawable]
        texts = [
            self.name(i) + " (crowd)" * bool(crowd)
            for i, crowd in zip(ids[drawable], crowds, strict=True)
        ]
        return boxes[drawable], ids[drawable], texts


def counted(boxes: int) -> str:
    return f"{boxes:,} box" if boxes == 1 else f"{boxes:,} boxes"


def write_coco(
    folder: Path, found: list[tuple[Picture, np.ndarray]], categories: coco_utils.Categories
) -> Path:
    """`detections.json` in COCO's results format; `images.json`, an annotation file without
    annotations, says which `image_id` is which file: `COCO(images).loadRes(detections)`."""
    file = folder / "detections.json"
    coco_eval.write_results(np.concatenate([np.empty((0, 7)), *(r for _, r in found)]), file)
    images = [
        {"id": p.image_id, "file_name": p.file_name, "width": p.size[0], "height": p.size[1]}
        for p, _ in found
    ]
    named = [{"id": row["id"], "name": row["name"]} for row in categories.to_list()]
    content = {"images": images, "annotations": [], "categories": named}
    (folder / "images.json").write_text(json.dumps(content), encoding="utf-8")
    return file


def write_csv(
    folder: Path, found: list[tuple[Picture, np.ndarray]], categories: coco_utils.Categories
) -> Path:
    """`detections.csv`: a line for each box, x and y of its upper left corner, in pixels."""
    file = folder / "detections.csv"
    names = dict(zip(categories.ids, categories.names, strict=True))
    # Linux has file names that are no UTF-8: they are written as the bytes that they are.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened)
        box = ("x", "y", "width", "height")
        writer.writerow(("file_name", "category_id", "category", "score", *box))
        for picture, rows in found:
            for _, *xywh, sure, i in rows.astype(np.float32):  # as exact as they are, and shorter
                writer.writerow((picture.file_name, int(i), names[int(i)], sure, *xywh))
    return file


def write_yolo(
    folder: Path, found: list[tuple[Picture, np.ndarray]], categories: coco_utils.Categories
) -> Path:
    """`labels/`: a text file for each picture, with a line `class cx cy w h score` for each box,
    in shares of its width and height; `classes.txt`: the name of class 0, 1, ..."""
    for picture, rows in found:
        file = folder / "labels" / f"{picture.stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for _, x, y, w, h, sure, i in rows.tolist():
            shares = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(picture.size, 2)
            numbers = " ".join(f"{number:.6f}" for number in (*shares, sure))
            lines.append(f"{categories.ids.index(i)} {numbers}\n")
        file.write_text("".join(lines), encoding="utf-8")
    names = "".join(f"{name}\n" for name in categories.names)
    (folder / "classes.txt").write_text(names, encoding="utf-8")
    return folder / "labels"


WRITERS = {"coco": write_coco, "csv": write_csv, "yolo": write_yolo}


def summary(findings: Findings, categories: coco_utils.Categories, file: Path) -> str:
    """The last line: how much was found, where it lies and how long it took."""
    rows = np.concatenate([np.empty((0, 7)), *(rows for _, rows in findings.found)])
    numbers = [(np.count_nonzero(rows[:, 6] == i), i) for i in categories.ids]
    names = dict(zip(categories.ids, categories.names, strict=True))
    most = [f"{n:,} {names[i]}" for n, i in sorted(numbers, key=lambda pair: -pair[0]) if n]
    shown = ", ".join(most[:10]) + (f" and {len(most) - 10} more categories" if most[10:] else "")
    pictures = len(findings.found)
    return (
        f"{pictures:,} picture{'s' * (pictures != 1)}, {counted(len(rows))}"
        f"{f' ({shown})' * bool(most)}: {file} and {file.parent / 'pictures'}{os.sep}, "
        f"{pictures / findings.seconds:.2f} images/s"
    )


# ------------------------------------------------------------------------------------ the run


def prepare_output(folder: Path) -> None:
    """Make the folder, which must not hold anything: not results, and least of all the pictures."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}") from None
    if used:
        raise UserError(
            f"--output-dir {folder} is not empty, and nothing is written over: name a new folder"
        )


def read_truth(file: Path, categories: coco_utils.Categories) -> coco_utils.CocoIndex:
    index = coco_utils.CocoIndex(coco_utils.Split(file, file.parent))
    categories.check_contains(index.categories, file)
    return index


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    pictures = find_pictures(args.images)
    model, categories = load_detector(args)
    index = read_truth(args.show_truth, categories) if args.show_truth else None
    if index:
        find_truth(pictures, index)
    prepare_output(args.output_dir)
    amp_dtype, precision = resolve_precision(device, args.amp)
    utils.log(f"{args.checkpoint}: {len(categories.ids)} categories; on {device}, {precision}")

    detector = Detector(model.to(device), categories, device, amp_dtype, args.score_threshold)
    draw = Drawer(args.output_dir / "pictures", categories, index)
    size = args.batch_size or (8 if device.type == "cuda" else 1)
    findings = look_at(pictures, detector, draw, size)
    file = WRITERS[args.format](args.output_dir, findings.found, categories)

    unlisted = [p.file_name for p, _ in findings.found if p.true_row is None]
    if index and unlisted:
        shown = ", ".join(unlisted[:20]) + ", ..." * (len(unlisted) > 20)
        utils.log(f"drawn without truth, as {args.show_truth} does not list them: {shown}")
    utils.log(summary(findings, categories, file))
    if findings.interrupted:
        raise Interrupted(f"interrupted after {len(findings.found)} of {len(pictures)} pictures")
    if findings.bad:
        raise BadPictures(
            f"{len(findings.bad)} of {len(pictures)} pictures could not be used, see above; "
            "the others are done"
        )


def run_and_exit() -> None:
    """Run `main`; say in one message why it failed."""
    try:
        main()
    except (UserError, BadPictures, DataError) as error:
        give_up(str(error), 2)
    except Interrupted as error:
        give_up(str(error), 1)
    except KeyboardInterrupt:
        give_up("interrupted", 1)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(
            error
        ):
            give_up(f"out of memory: lower --batch-size, or use --device cpu ({error})", 1)
        if isinstance(error, OSError):
            give_up(f"{error.filename or 'the results'} cannot be written: {error.strerror}", 1)
        traceback.print_exc()
        give_up(f"{type(error).__name__}: {error}", 1)


def give_up(message: str, exit_code: int) -> None:
    print(f"predict.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    run_and_exit()
