#!/usr/bin/env python3
"""Detect objects in images and videos; write the detections to a file, and pictures with boxes.

With a checkpoint of train.py:

    python predict.py output/model_best.pth my_images film.mp4 --output-dir predictions

With torchvision's weights for the 80 categories of COCO:

    python predict.py COCO_V1 my_images --model fasterrcnn_resnet50_fpn --output-dir predictions

In Python: `from predict import Detector`, see the README.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

import models
import utils
from coco_utils import CocoIndex
from detector import THREADS, Detector, choose_thresholds, load_model
from internals.bit_depth import BIT_DEPTHS
from internals.command_line import (
    ArgumentParser,
    at_least,
    positive_int,
    prepare_output_dir,
    share_below_1,
    share_or_0,
)
from internals.detections import (
    BEST,
    BEST_PER_CATEGORY,
    DEFAULT_SCORE,
    MIN_TILE,
    Detections,
    Settings,
)
from internals.errors import RunError, UserError
from internals.failures import is_out_of_memory, run_command
from internals.image_arguments import find_images
from internals.image_notes import log_notes
from internals.images import DEEP_SUFFIXES, ImageRules, measure_bit_depth
from internals.pipeline import prefetch_map
from internals.video import VideoReader, import_av, is_video, parse_time
from internals.video_writer import VideoWriter
from reporting import drawing, fonts
from reporting.annotation_files import FOR_ANNOTATION, WRITERS, NamedImage
from reporting.prediction_speed import measure_speeds, print_speeds, write_picture
from reporting.truth import match_annotations

__all__ = ["Detections", "Detector"]

EPILOG = """\
output in DIR:
  pictures/              the images with boxes, names and scores
  videos/                the videos with boxes, without sound
  --format coco          detections.json (COCO results) and images.json (the file of each
                         image_id), both readable by pycocotools
  --format coco-dataset  annotations.json, to be corrected in an annotation tool and trained on
  --format voc           Annotations/*.xml of PASCAL VOC
  --format csv           detections.csv
  --format yolo          labels/ and classes.txt
  frames/                the frames of videos, with coco-dataset, voc and yolo

Exit codes: 0 done; 1 failed or interrupted (what was found until then is written); 2 error in the
command line, the checkpoint or some of the images.
"""


def score(text: str) -> float | str:
    """Parse a number from 0 to 1, or the name of thresholds of a checkpoint; an argparse type."""
    return text if text in (BEST, BEST_PER_CATEGORY) else share_or_0(text)


# fmt: off

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="a .pth file of train.py; with --model the name of torchvision's weights: COCO_V1")
    add("images", nargs="+", metavar="IMAGES",
        help="image or video files, folders of images (with their subfolders), patterns such as "
        "'day*/*.jpg', or addresses of video streams")
    add("--output-dir", type=Path, metavar="DIR",
        help="a new or empty folder, required; existing files are never overwritten")
    add("--score-threshold", type=score, metavar="SCORE|best|best-per-category",
        help="drop detections with a lower score, 0 to 1; most models themselves drop those below "
        "0.05; best: the threshold of the checkpoint with the highest F1 on its validation images, "
        f"best-per-category: with those of each category (default: {DEFAULT_SCORE})")
    add("--max-detections", type=positive_int, metavar="N",
        help="keep the N highest scores of an image (default: as in training, 100 in a "
        "Faster R-CNN; with --tile 100 of each tile)")
    add("--nms-threshold", type=share_or_0, metavar="IOU",
        help="of two boxes of a category with a higher IoU keep the one with the higher score "
        "(default: as in torchvision, 0.5 in a Faster R-CNN)")
    add("--class-agnostic-nms", action="store_true",
        help="also of two boxes of different categories")
    add("--tile", type=at_least(int, MIN_TILE), metavar="SIZE",
        help="for small objects in large images: detect in overlapping tiles of SIZE x SIZE pixels "
        "and in the whole image; best the size of the images in training (default: whole images "
        "only)")
    add("--tile-overlap", type=share_below_1, metavar="SHARE",
        help="overlap of neighbouring tiles, as a share of their side; objects up to it are whole "
        f"in a tile (default: {Settings.tile_overlap})")
    add("--format", choices=WRITERS, default="coco",
        help="format of the detections, see below (default: %(default)s)")
    add("--no-pictures", action="store_true",
        help="write no images and videos with boxes, only the detections")
    add("--every", type=positive_int, metavar="N",
        help="of videos: use the frames whose number, from 0, is a multiple of N (default: all)")
    add("--start", type=parse_time, metavar="TIME",
        help="of videos: begin at this time, in seconds or [H:]MM:SS (default: at the start)")
    add("--end", type=parse_time, metavar="TIME",
        help="of videos: end before this time (default: at the end)")
    add("--show-truth", type=Path, metavar="FILE",
        help="draw the boxes of this COCO annotation file on the left, and use its image ids "
        "(default: draw detections only, and number the images from 1)")
    add("--font", type=Path, metavar="FILE",
        help="a .ttf or .otf font for the names in the images (default: one of the system that has "
        "their characters; names that no font has are drawn as 'category ID')")
    add("--model", choices=models.MODELS, metavar="NAME",
        help=f"use a detector of torchvision with its weights: {', '.join(models.MODELS)} "
        "(default: the model of the checkpoint)")
    add("--truncated-images", choices=("refuse", "use"), default=Settings.truncated_images,
        help="skip a JPEG whose end is missing, or use it if three quarters of its rows can be "
        "decoded (default: %(default)s)")
    add("--bit-depth", type=int, choices=BIT_DEPTHS, metavar="BITS",
        help="the bits that 16-bit gray images hold: 8, 10, 12, 14 or 16 (default: as in training, "
        "or else those of the largest value in a sample of the images)")
    add("--device", metavar="DEVICE", help="cuda, cuda:N, mps (Apple) or cpu (default: cuda if "
        "available)")
    add("--batch-size", type=positive_int, metavar="N",
        help="run up to N images or tiles of one size together; affects only speed and memory "
        "(default: 8 on CUDA, 1 elsewhere)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU with instructions for it "
        "(default: float32)")
    add("--benchmark", action="store_true",
        help="write nothing; print the latency of reading, model and drawing, and images/s, of "
        "at least 50 images (those given are repeated)")
    args = parser.parse_intermixed_args(argv)
    if not args.benchmark and args.output_dir is None:
        parser.error("the following arguments are required: --output-dir")
    if args.tile_overlap is not None and not args.tile:
        parser.error("--tile-overlap has no effect without --tile")
    if args.start is not None and args.end is not None and args.start >= args.end:
        parser.error("--start must be before --end")
    return args

# fmt: on


# ---------------------------------------------------------------------------------- the input


def find_inputs(arguments: list[str]) -> tuple[list[NamedImage], list[tuple[str, str, str]]]:
    """Find images and videos.

    Returns:
        The images, with ids from 1; and the source, the name and a unique stem of each video.
    """
    streams = [text for text in arguments if "://" in text]
    files = find_images([text for text in arguments if "://" not in text])
    images = [row for row in files if not is_video(str(row[0]))]
    videos = [(str(path), name, stem) for path, name, stem in files if is_video(str(path))]
    taken = {stem for _, _, stem in videos}
    names = (name for n in count(1) if (name := f"stream-{n}") not in taken)
    videos += [(text, text, next(names)) for text in streams]
    for folder in filter(os.path.isdir, arguments):
        unused = [name for _, _, names in os.walk(folder) for name in names if is_video(name)]
        if unused:
            utils.log(f"note: {len(unused)} videos in {folder} are not used, name them one by one")
    numbered = enumerate(images, start=1)
    return [
        NamedImage(path=path, file_name=name, stem=stem, image_id=image_id)
        for image_id, (path, name, stem) in numbered
    ], videos


def check_videos(args: argparse.Namespace, images: list, videos: list[tuple]) -> None:
    """Raise UserError if flags and inputs do not fit, or PyAV is missing."""
    if not videos:
        for flag in ("every", "start", "end"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} is for videos, but none is given")
        return
    if args.benchmark or args.show_truth:
        flag = "--benchmark" if args.benchmark else "--show-truth"
        raise UserError(f"{flag} is for images: remove {videos[0][0]}")
    if images and args.format in FOR_ANNOTATION:
        raise UserError(
            f"--format {args.format} is for images or videos: run them separately, as the frames "
            "of videos are saved in a folder of their own"
        )
    import_av()


def choose_rules(images: list[NamedImage], rules: ImageRules) -> ImageRules:
    """Decide how images are read: 16-bit ones as in training, else by the largest value of all."""
    if rules.bit_depth is not None:
        return rules
    files = [image.path for image in images if image.path.suffix.lower() in DEEP_SUFFIXES]
    bit_depth, text = measure_bit_depth(files) or (None, "")
    if text:
        utils.log(text)
    return ImageRules(bit_depth, rules.use_truncated)


# ---------------------------------------------------------------------------------- inference


class Run:
    """The images of a command on their way from files to results.

    Attributes:
        done: The finished images, without pixels.
        skipped: Messages about images and videos that could not be used, or not to their end.
    """

    def __init__(self, args: argparse.Namespace, detector: Detector, index: CocoIndex | None):
        """Run `detector`; `index` is the annotation file of --show-truth."""
        self.args, self.detector, self.index = args, detector, index
        self.done, self.skipped = [], []

    def detect_images(self, images: list[NamedImage]) -> None:
        """Detect objects in images, and write pictures."""
        folder = None if self.args.no_pictures else self.args.output_dir / "pictures"

        def finish(item: NamedImage) -> NamedImage:
            write_picture(item, self.draw, folder)
            if not item.error:
                self.done.append(item)
            return item

        with self._progress(len(images), "image"):
            for item in self.detector.pipeline(images, finish):
                log_notes(item.notes)
                if item.error:
                    self._skip(item.error)

    def detect_video(self, source: str, name: str, stem: str) -> None:
        """Detect objects in the frames of a video, and write a video with boxes."""
        args = self.args
        try:
            with VideoReader(source, args.every or 1, args.start, args.end) as reader:
                self._detect_frames(reader, name, stem)
        except UserError as error:
            self._skip(str(error))
        else:
            if reader.problem:
                self._skip(f"the rest of {source}: {reader.problem}")

    def _detect_frames(self, reader: VideoReader, name: str, stem: str) -> None:
        file = self.args.output_dir / f"videos/{stem}.mp4"
        with self._video_writer(file, reader) as writer:
            finish = partial(self._finish_frame, is_drawn=writer is not None)
            frames = map(self.detector.read, self._frames(reader, name, stem))
            finished = prefetch_map(finish, self.detector.stream(frames), THREADS, 2 * THREADS)
            with self._progress(reader.total, "frame", name):
                for item, drawn in finished:
                    if item.error:  # all frames have one size
                        raise UserError(item.error)
                    if drawn is not None:
                        writer.write(drawn, item.video_frame)
                    item.pixels = item.video_frame = None
                    self.done.append(item)

    def _video_writer(self, file: Path, reader: VideoReader):
        if self.args.no_pictures:
            return nullcontext()
        file.parent.mkdir(parents=True, exist_ok=True)
        return VideoWriter(file, reader)

    def _frames(self, reader: VideoReader, name: str, stem: str) -> Iterator[NamedImage]:
        first_id = 1 + max((image.image_id for image in self.done), default=0)
        saves = self.args.format in FOR_ANNOTATION
        for image_id, frame in enumerate(reader, start=first_id):
            frame_stem = f"{stem}/{frame.number:06d}"
            yield NamedImage(
                path=Path(reader.source),
                pixels=torch.from_numpy(frame.pixels).permute(2, 0, 1),
                file_name=f"{frame_stem}.jpg" if saves else name,
                stem=frame_stem,
                image_id=image_id,
                frame=frame.number,
                time=frame.time,
                video_frame=frame,
            )

    def _finish_frame(self, item: NamedImage, is_drawn: bool) -> tuple:
        """Save the frame if its format needs it, and return it with its picture, if wanted."""
        if item.error:
            return item, None
        if self.args.format in FOR_ANNOTATION:
            drawing.save(item.pixels, self.args.output_dir / "frames" / item.file_name, quality=95)
        drawn = self.draw(item).permute(1, 2, 0).numpy() if is_drawn else None
        return item, drawn

    @contextmanager
    def _progress(self, total: int | None, unit: str, name: str | None = None) -> Iterator[None]:
        """Show a progress bar of images or frames, with --tile of tiles."""
        if self.args.tile:
            total, unit = None, "tile"
        options = {"unit": unit, "leave": False, "disable": None}  # on a terminal only
        with tqdm(desc=name, total=total, **options) as bar:
            self.detector.on_batch = bar.update
            yield

    def _skip(self, message: str) -> None:
        tqdm.write(f"skipped: {message}", file=sys.stderr)
        self.skipped.append(message)

    def draw(self, item: NamedImage) -> torch.Tensor:
        """Draw an image with its detections, beside its ground truth if it is annotated."""
        rows, categories = item.rows(), self.detector.categories
        if item.row is None:
            return drawing.draw_detections(item.pixels, rows, categories, item.factor)
        truth = (self.index, item.row)
        return drawing.draw_comparison(item.pixels, *truth, rows, categories, item.factor)


# ---------------------------------------------------------------------------------- the command


def summarize(images: list[NamedImage], id_to_name: dict[int, str]) -> str:
    """Return the number of detections by category, the most frequent first, as a line."""
    counts = Counter(i for image in images for i in image.detections.category_ids.tolist())
    names = [f"{count:,} {fonts.one_line(id_to_name[i])}" for i, count in counts.most_common()]
    more = f" and {len(names) - 10} more categories" if names[10:] else ""
    by_category = f" ({', '.join(names[:10])}{more})" if names else ""
    frames = sum(image.frame is not None for image in images)
    kinds = [(len(images) - frames, "images"), (frames, "frames")]
    parts = [f"{kind}: {n:,}" for n, kind in kinds if n] or ["images: 0"]
    return f"{'; '.join(parts)}; detections: {counts.total():,}{by_category}"


def write_results(run: Run, seconds: float) -> None:
    """Write the detections, and log what was found and where it is."""
    args, categories = run.args, run.detector.categories
    # Images of one size are run together, and may have overtaken others.
    done = sorted(run.done, key=lambda image: image.image_id)
    file = WRITERS[args.format](args.output_dir, done, categories)
    unlisted = [image.file_name for image in done if image.row is None]
    if run.index and unlisted:
        names = ", ".join(unlisted[:20]) + (", ..." if len(unlisted) > 20 else "")
        utils.log(f"not in {args.show_truth}, no ground truth drawn: {names}")
    text, speed = summarize(done, categories.id_to_name), len(done) / seconds
    utils.log(f"{text}; {speed:.2f} images/s")
    if done and run.detector.highest_score < run.detector.lowest_threshold:
        highest = run.detector.highest_score
        utils.log(f"highest score: {highest:.2f}; try a lower --score-threshold")
    others = [args.output_dir / name for name in ("pictures", "videos", "frames")]
    written = [str(file), *(f"{path}{os.sep}" for path in others if any(path.glob("*")))]
    utils.log(f"output: {', '.join(written[:-1])}{' and ' if written[1:] else ''}{written[-1]}")


def detect_all(
    run: Run, images: list[NamedImage], videos: list[tuple[str, str, str]]
) -> BaseException | None:
    """Detect in images and videos; return what ended it early: an error, Ctrl-C or SIGTERM."""
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.detect_images(images)
        for video in videos:
            run.detect_video(*video)
    except (Exception, KeyboardInterrupt) as error:
        return error
    finally:
        signal.signal(signal.SIGTERM, handler)
    return None


def raise_early_end(error: BaseException, done: str) -> None:
    """Raise what ended a run early, after its results are written."""
    if isinstance(error, KeyboardInterrupt):
        raise RunError(f"interrupted after {done}")
    if is_out_of_memory(error):
        first_line = str(error).partition("\n")[0][:200]
        raise RunError(
            f"out of memory after {done}: lower --batch-size, or use --tile ({first_line})"
        ) from error
    raise error


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_arguments(argv)
    fonts.prefer_font(args.font)
    images, videos = find_inputs(args.images)
    check_videos(args, images, videos)
    loaded = load_model(args.checkpoint, args.model)
    thresholds, text = choose_thresholds(args.score_threshold, loaded, args.checkpoint)
    categories = loaded.categories
    index = match_annotations(images, args.show_truth, categories) if args.show_truth else None
    settings = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = {name: value for name, value in settings.items() if value is not None}
    detector = Detector(loaded, Settings(**settings), thresholds)
    if not args.benchmark:
        prepare_output_dir(args.output_dir, must_be_empty=True)
    if text:
        utils.log(text)
    utils.log(f"{args.checkpoint}: {len(categories.ids)} categories; on {detector.device}, "
              f"{detector.precision}")  # fmt: skip
    detector.rules = choose_rules(images, detector.rules)
    run = Run(args, detector, index)
    if args.benchmark:
        print_speeds(measure_speeds(detector, images, run.draw))
        return
    start, total = time.perf_counter(), len(images)
    error = detect_all(run, images, videos)
    write_results(run, time.perf_counter() - start)
    if error:
        of_all = " images and frames" if videos else f" of {total} images"
        raise_early_end(error, f"{len(run.done)}{of_all}")
    if run.skipped:
        inputs, end = ("inputs", ", or not to their end") if videos else ("images", "")
        others = "; the others are done" if run.done else ""
        raise UserError(
            f"{len(run.skipped)} of {total + len(videos)} {inputs} could not be used{end}, see "
            f"above{others}"
        )


if __name__ == "__main__":
    run_command(main)
