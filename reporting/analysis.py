"""What a training has left in its output folder, sorted, and compared with the true boxes."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import coco_eval
import coco_utils
from internals.errors import UserError

LEAST_SCORE, LEAST_IOU = 0.5, 0.5  # from which on boxes are shown, and belong together


# -------------------------------------------------------------------------- what the run wrote


@dataclass
class Record:
    """What `metrics.jsonl` says of the last training in its folder, or of evaluations alone.

    Lines are dicts as in the file. `start` is that of the training, `tested` that of the last
    evaluation, `{}` where there is none; `train` and `evals` have a line for each step, in order;
    `last` is the last evaluation, whose boxes are in `detections.json`.
    """

    start: dict = field(default_factory=dict)
    tested: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    last: dict | None = None
    end: dict | None = None
    resumed: int = 0  # how often
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> dict | None:
        """The evaluation with the best AP: the first of equals, as `model_best.pth` is."""
        known = [line for line in self.evals or [self.last] if number(line, "AP") is not None]
        return max(known, key=lambda line: line["AP"], default=None)


def number(line: dict | None, key: str) -> float | None:
    """A finite number of a line; None for what is absent, null or anything else."""
    value = (line or {}).get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 else None


def column(lines: list[dict], key: str) -> np.ndarray:
    """The numbers of many lines, float64, NaN where there is none."""
    return np.array([number(line, key) for line in lines], dtype=np.float64)


def read_lines(file: Path, notes: list[str]) -> list[dict]:
    """The lines of `metrics.jsonl`; UserError names the first that cannot be what it should."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: give the folder that train.py had as --output-dir"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start})") from None
    rows, lines = text.split("\n"), []
    for n, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except ValueError as error:
            if n == len(rows):
                notes.append(f"{file}: the last line was cut by a crash and is left out")
                continue
            raise UserError(f"{file}:{n} is not JSON ({error}): mend or remove the line") from None
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
            raise UserError(f"{file}:{n} is no object with a 'kind': mend or remove the line")
        lines.append(line)
    if not lines:
        raise UserError(f"{file} is empty: there is nothing to report yet")
    return lines


def read_record(file: Path) -> Record:
    """Sort the lines; of steps that a crash undid, what was done again counts.

    Raises UserError. Lines of other kinds than train.py writes are passed over.
    """
    record, start, train, evals = Record(), {}, {}, {}
    for line in read_lines(file, record.notes):
        kind, step = line["kind"], number(line, "step") or 0
        if kind == "start":
            start, args = line, arguments(line)
            if not args.get("test_only"):
                record.start, record.end = line, None
                record.resumed += 1
                if not args.get("resume"):  # a new training, whatever was in the folder before
                    train, evals, record.resumed = {}, {}, 0
        elif kind == "train":
            forget_from(step, train)
            forget_from(step, evals)
            train[step] = line
        elif kind == "eval":
            record.last, record.tested = line, start
            if not arguments(start).get("test_only"):
                forget_from(step, evals)
                evals[step] = line
        elif kind == "end":
            record.end = line
    record.start, record.tested = record.start or start, record.tested or start
    record.train, record.evals = list(train.values()), list(evals.values())
    return record


def forget_from(step: float, lines: dict[float, dict]) -> None:
    """Take out the lines of `step` and later ones; keys ascend."""
    while lines and next(reversed(lines)) >= step:
        lines.popitem()


def arguments(start: dict) -> dict:
    """The flags of a run, as its `start` line has them."""
    args = start.get("args")
    return args if isinstance(args, dict) else {}


# ------------------------------------------------------------------------ truth and detections


@dataclass
class Results:
    """The detections of the last evaluation beside the true boxes.

    `detections` are rows of `coco_eval.detection_rows`, `sure` those with a score of 0.5 or more;
    `truth_of` and `found_by` say which of these has which true box, whatever their categories;
    `found_at` `[M]` is the score at which a true box was found by its own category, NaN if never.
    `numbers` and `curves` are as of `coco_eval.evaluate_with_curves`.
    """

    index: coco_utils.CocoIndex
    detections: np.ndarray
    numbers: dict
    curves: np.ndarray

    def __post_init__(self):
        self.sure = self.detections[self.detections[:, 5] >= LEAST_SCORE]
        self.truth_of, self.found_by = coco_eval.match(self.index, self.sure, LEAST_IOU, False)
        finder = coco_eval.match(self.index, self.detections, LEAST_IOU, True)[1]
        scores = np.append(self.detections[:, 5], np.nan)
        self.found_at = scores[np.where(finder < 0, -1, finder)]
        self.true_category = self.position_of(self.index.category_ids)
        self.found_category = self.position_of(self.sure[:, 6])
        of_partner = np.append(self.true_category, [-1, -1])[self.truth_of]  # -1 for none
        self.right = of_partner == self.found_category
        self.mixed_up = (self.truth_of >= 0) & ~self.right
        self.false = self.truth_of == -1
        self.missed = self.found_by == -1

    def position_of(self, category_ids: np.ndarray) -> np.ndarray:
        """The position of each category among those of the annotation file."""
        return np.searchsorted(self.index.categories.ids, category_ids)

    def counts(self) -> dict[str, int]:
        """How many boxes are right and how many are not, at a score of 0.5 or more."""
        return {
            "images": len(self.index),
            "true": int(self.index.usable.sum()),
            "found": int((self.truth_of != -2).sum()),
            "right": int(self.right.sum()),
            "mixed_up": int(self.mixed_up.sum()),
            "false": int(self.false.sum()),
            "missed": int(self.missed.sum()),
            "crowds": int(self.index.iscrowd.sum()),
        }


def read_results(output_dir: Path, record: Record) -> Results:
    """Raises UserError, DataError or ResultsError, which say what is not there to compare."""
    if record.last is None:
        raise UserError("there was no evaluation yet; train.py evaluates after each epoch")
    file = output_dir / "detections.json"
    if not file.exists():
        raise UserError(
            f"{file} is missing: train.py --test-only --resume {output_dir / 'model_best.pth'} "
            "writes it again"
        )
    detections = coco_eval.read_results(file)
    index = scored_index(record)
    detections = known_only(index, detections, record.notes)
    numbers, curves = coco_eval.evaluate_with_curves(
        index, detections, coco_eval.default_evaluator()
    )
    said, here = number(record.last, "AP"), numbers["AP"]
    if abs((said or 0) - (here or 0)) > 1e-6:
        record.notes.append(
            f"with {index.annotation_file}, detections.json has AP {digits(here)}, but "
            f"metrics.jsonl says {digits(said)}: one of the files was changed since. The table and "
            "the curve of AP are from metrics.jsonl, all else is from detections.json"
        )
    return Results(index, detections, numbers, curves)


def scored_index(record: Record) -> coco_utils.CocoIndex:
    """The images that the last evaluation was made of. Raises DataError."""
    args = arguments(record.tested)
    part = "train" if args.get("overfit") else "val"
    paths = [args.get(f"{part}_{what}") for what in ("annotations", "images")]
    paths = [path and Path(path) for path in paths]
    home = Path(args.get("data_path") or ".")
    try:
        split = coco_utils.find_split(home, part, *paths)
    except coco_utils.DataError:
        where = f"{paths[0]} and {paths[1]}" if all(paths) else home
        raise UserError(
            f"the validation data are not where the run found them, {where}: put them back"
        ) from None
    index = coco_utils.CocoIndex(split)
    if args.get("overfit"):
        return index.first_with_boxes(args["overfit"])
    left_out = np.array(record.tested.get("val_images_left_out") or [], dtype=np.int64)
    return index.without(index.positions_of(left_out))


def known_only(index: coco_utils.CocoIndex, detections: np.ndarray, notes: list[str]) -> np.ndarray:
    """The detections whose image and category the annotation file has."""
    known_image = index.positions_of(detections[:, 0].astype(np.int64)) >= 0
    known_category = np.isin(detections[:, 6], index.categories.ids)
    for known, what in ((known_image, "images"), (known_category, "categories")):
        if count := np.count_nonzero(~known):
            notes.append(
                f"{count:,} detections are of {what} that {index.annotation_file} does not have, "
                "and are left out"
            )
    return detections[known_image & known_category]


def read_picture(index: coco_utils.CocoIndex, i: int) -> torch.Tensor:
    """Image i of the index, uint8 `[3, H, W]`. Raises DataError."""
    return coco_utils.read_image(index.image_dir / index.file_name(i), *index.sizes[i].tolist())


# ----------------------------------------------------------------------------- counting mistakes


def confusion(results: Results) -> np.ndarray:
    """int64 `[K + 1, K + 1]`: how many boxes of one category were found as another.

    Rows are the truth, columns what was found; the last row holds false detections, the last column
    missed boxes.
    """
    k = len(results.index.categories.ids)
    matrix = np.zeros((k + 1, k + 1), dtype=np.int64)
    matched = results.truth_of >= 0
    true = results.true_category[results.truth_of[matched]]
    np.add.at(matrix, (true, results.found_category[matched]), 1)
    np.add.at(matrix, (k, results.found_category[results.false]), 1)
    np.add.at(matrix, (results.true_category[results.missed], k), 1)
    return matrix


def most_confused(matrix: np.ndarray, most: int) -> np.ndarray:
    """The positions of the categories that are taken for others most often, in their order."""
    mixed = matrix[:-1, :-1] * (1 - np.eye(len(matrix) - 1, dtype=np.int64))
    total = mixed.sum(axis=0) + mixed.sum(axis=1)
    return np.sort(np.argsort(-total, kind="stable")[:most])


def recall_by_size(
    sides: np.ndarray, found_at: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """True boxes by the square root of their area: edges `[B + 1]`, and counts `[B]` of all, of
    those found with a score of 0.5 or more, and of those found with any.

    Two bins double the side; 32 is an edge.
    """
    low, high = np.log2([sides.min(), sides.max()])
    edges = 2.0 ** (np.arange(math.floor(2 * low), math.floor(2 * high) + 2) / 2)
    kinds = (np.ones(len(sides), dtype=bool), found_at >= LEAST_SCORE, np.isfinite(found_at))
    return edges, *(np.histogram(sides[kind], edges)[0] for kind in kinds)


# ------------------------------------------------------------------------------------ in words


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
