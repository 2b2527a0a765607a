"""Draw the figures of the report as inline SVG in the colors and font of the page."""

import io
import math
import re
import warnings
from collections.abc import Callable
from functools import partial

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from internals.score_thresholds import best_point, overall_curve
from reporting.analysis import DetectionResults, RunHistory, recall_by_size, shorten
from reporting.fonts import one_line

MAX_CURVES = 12  # with more categories only the mean is drawn

# A palette for color-blind readers (Okabe and Ito). In the page the colors are CSS variables,
# which are lighter on a dark background.
INK, SOFT, GRID = "#1b1f24", "#5b6470", "#dfe3e8"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", **{c: f"c{n}" for n, c in enumerate(LINES)}}
STYLE = {
    "svg.fonttype": "none",  # text in the font of the page, not paths
    "text.parse_math": False,  # the name of a category may have dollar signs
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2,
    "lines.markersize": 4,
}
LOSS_TERMS = {  # of torchvision's detectors
    "loss_classifier": "box classification",
    "loss_box_reg": "box regression",
    "loss_objectness": "proposal objectness",
    "loss_rpn_box_reg": "proposal regression",
    "classification": "box classification",
    "bbox_regression": "box regression",
    "bbox_ctrness": "box centerness",
}
SHORT_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


def draw_figures(history: RunHistory, results: DetectionResults | None) -> dict[str, Markup]:
    """Draw all figures that have data.

    Returns:
        The SVG by name; in the page the title of a figure has the id `{name}-title`.
    """
    train, evals, svgs = history.train, history.evals, {}
    if series(train, "loss").size:
        svgs["loss"] = to_svg("loss", partial(draw_loss, history=history))
    if loss_terms(train):
        svgs["loss_terms"] = to_svg("loss_terms", partial(draw_loss_terms, train=train))
    if series(evals, "AP", "epoch").size:
        svgs["ap"] = to_svg("ap", partial(draw_ap, evals=evals))
    if series(train, "lr").size:
        svgs["lr"] = to_svg("lr", partial(draw_lr, train=train))
    if results and np.isfinite(results.curves).any():
        for name, threshold in (("precision50", 0), ("precision75", 5)):
            draw = partial(draw_precision, results=results, threshold=threshold)
            svgs[name] = to_svg(name, draw, height=4)
    if results and best_point(overall_curve(results.matches)):
        svgs["f1"] = to_svg("f1", partial(draw_f1, results=results), height=4)
    if results and results.index.usable.any():
        svgs["sizes"] = to_svg("sizes", partial(draw_sizes, results=results), height=5, rows=2)
    return svgs


def series(lines: list[dict], y: str, x: str = "step") -> np.ndarray:
    """Return x and y of the lines that have both, float64 `[2, N]`."""
    points = [(line.get(x), line.get(y)) for line in lines]
    return np.array([p for p in points if None not in p], dtype=np.float64).reshape(-1, 2).T


def loss_terms(train: list[dict]) -> list[str]:
    """Return the names of the terms of the loss, in the order of the lines."""
    names = dict.fromkeys(name for line in train for name in line)
    terms = [name for name in names if name in LOSS_TERMS or name.startswith("loss_")]
    return [name for name in terms if series(train, name).size]


# ------------------------------------------------------------------------------------------ SVG


def to_svg(name: str, draw: Callable, height: float = 3.5, rows: int = 1) -> Markup:
    """Draw a figure as SVG; `draw` gets its axes, an array if there are several rows."""
    file = io.StringIO()
    style = matplotlib.style.context({**STYLE, "svg.hashsalt": name}, after_reset=True)
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing here, but not in the fonts of the page
        figure = Figure(figsize=(5.9, height), layout="constrained")
        draw(figure.subplots(rows, sharex=rows > 1))
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    view = re.search(r'viewBox="[\d. ]+"', file.getvalue())[0]
    body = re.search(r"</style>\s*</defs>(.*)</svg>", file.getvalue(), re.DOTALL)[1]
    body = re.sub("<[^>]+>", partial(_adapt_tag, name), body)
    return Markup(f'<svg role="img" aria-labelledby="{name}-title" {view}>{body}</svg>')


def _adapt_tag(name: str, tag: re.Match) -> str:
    """Make ids unique in the page, use its colors, and drop insignificant digits."""
    text = re.sub(r'\bid="', f'id="{name}-', tag[0])
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)


# ----------------------------------------------------------------------------------- the curves


def draw_loss(axes: Axes, history: RunHistory) -> None:
    """Draw the training loss, smoothed and not, and the validation loss if there is one."""
    steps, loss = series(history.train, "loss")
    draw_line(axes, steps, loss, color=LINES[0], alpha=0.35, linewidth=1)
    draw_line(axes, steps, smooth(loss), color=LINES[0], label="training, smoothed", marker="")
    evals = [{"step": e["step"], **e["val_loss"]} for e in history.evals if e.get("val_loss")]
    if evals:
        draw_line(axes, *series(evals, "loss"), color=LINES[1], label="validation")
    axes.set_ylabel("loss")
    set_loss_scale(axes, loss)
    finish_axes(axes)


def draw_loss_terms(axes: Axes, train: list[dict]) -> None:
    """Draw the smoothed terms of the training loss."""
    terms = {term: series(train, term) for term in loss_terms(train)}
    for n, (term, (steps, values)) in enumerate(terms.items()):
        label = LOSS_TERMS.get(term, term.removeprefix("loss_"))
        draw_line(axes, steps, smooth(values), label=label, **line_style(n))
    axes.set_ylabel("term of the loss")
    set_loss_scale(axes, max((values for _, values in terms.values()), key=np.max))
    finish_axes(axes, columns=2)


def draw_lr(axes: Axes, train: list[dict]) -> None:
    """Draw the learning rate."""
    draw_line(axes, *series(train, "lr"), color=LINES[0])
    axes.set_ylabel("learning rate")
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(SHORT_NUMBERS)
    finish_axes(axes, columns=0)


def draw_ap(axes: Axes, evals: list[dict]) -> None:
    """Draw AP, AP50 and AP75 by epoch."""
    for n, name in enumerate(("AP", "AP50", "AP75")):
        width = 3 if name == "AP" else 1.5
        draw_line(axes, *series(evals, name, "epoch"), label=name, lw=width, **line_style(n))
    axes.set(ylim=(0, 1), ylabel="AP on validation images")
    finish_axes(axes, "epoch, counted from 0")


def draw_precision(axes: Axes, results: DetectionResults, threshold: int) -> None:
    """Draw precision by recall at IoU 0.50 + 0.05 x `threshold`; the mean, and few categories."""
    curves, recall = results.curves[threshold], np.linspace(0, 1, 101)
    names = [shorten(one_line(name)) for name in results.index.categories.display_names]
    known = np.flatnonzero(np.isfinite(curves).all(axis=0)).tolist()
    if 1 < len(known) <= MAX_CURVES:
        for n, k in enumerate(known):
            # The number first, as matplotlib hides labels that start with "_".
            label = f"{curves[:, k].mean():.2f} {names[k]}"
            axes.plot(recall, curves[:, k], label=label, lw=1.3, **line_style(n))
    mean = curves[:, known].mean(axis=1)
    label = "mean" if len(known) > 1 else names[known[0]]
    axes.plot(recall, mean, color=INK, lw=3, label=f"{mean.mean():.2f} {label}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.figure.legend(loc="outside lower center", ncols=3)


def draw_f1(axes: Axes, results: DetectionResults) -> None:
    """Draw F1, precision and recall of all categories together by score threshold."""
    curve = overall_curve(results.matches)
    best = best_point(curve)
    # Those next to 300 equally spaced thresholds: a curve may have a million.
    shown = np.searchsorted(-curve.thresholds, np.linspace(-1, 0, 301))
    shown = np.unique(shown.clip(max=len(curve.thresholds) - 1))
    for n, (label, values) in enumerate(
        (("F1", curve.F1), ("precision", curve.precision), ("recall", curve.recall))
    ):
        width = 3 if label == "F1" else 1.5
        draw_line(axes, curve.thresholds[shown], values[shown], label=label, lw=width, marker="",
                  **line_style(n))  # fmt: skip
    label = f"best F1 {best['F1']:.2f} at {best['threshold']:.2f}"
    axes.axvline(best["threshold"], color=SOFT, lw=1, ls=":")
    axes.plot(best["threshold"], best["F1"], "o", color=INK, markersize=8, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score threshold")
    axes.figure.legend(loc="outside lower center", ncols=4, columnspacing=1)


def draw_sizes(both: np.ndarray, results: DetectionResults) -> None:
    """Draw the number of ground-truth boxes by size, and below it their recall."""
    usable = results.index.usable
    sides = np.sqrt(results.index.boxes[usable, 2:].prod(axis=1))
    edges, total, confident, detected = recall_by_size(sides, results.matched_score[usable])
    counts, recall = both
    for count, below, color, label in (
        (confident, 0 * confident, LINES[0], "detected, score ≥ 0.5"),
        (detected - confident, confident, LINES[5], "detected, lower score"),
        (total - detected, detected, LINES[1], "missed"),
    ):
        width = np.diff(edges) * 0.94
        counts.bar(edges[:-1], count, width, below, align="edge", color=color, label=label)
    counts.set(ylabel="ground-truth boxes", ylim=(0, 1.08 * total.max()))
    counts.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    counts.figure.legend(loc="outside upper center", ncols=3, columnspacing=1, handlelength=1)
    filled = total > 0
    centers = np.sqrt(edges[1:] * edges[:-1])[filled]
    for count, color, dash in ((detected, LINES[5], "--"), (confident, LINES[0], "-")):
        recall.plot(centers, count[filled] / total[filled], dash, marker="o", color=color)
    recall.set(ylim=(0, 1.05), ylabel="recall", xlabel="square root of the box area in pixels")
    for axes in both:
        axes.set_xscale("log")
        for bound in (32, 96):  # of small, medium and large boxes in COCO
            axes.axvline(bound, color=SOFT, lw=1, ls=":")
    ticks = edges if len(edges) < 8 else [x for x in edges if math.log2(x).is_integer()]
    recall.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    recall.xaxis.set_minor_locator(NullLocator())
    recall.set_xlim(edges[0], edges[-1])


# ------------------------------------------------------------------------------------- helpers


def draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    """Draw a line, with markers if there are few points."""
    axes.plot(x, y, **{"marker": "o" if len(x) <= 30 else "", **style})


def line_style(n: int) -> dict:
    """Return the style of line n of a figure: six colors, repeated with other dashes."""
    return {"color": LINES[n % len(LINES)], "linestyle": ("-", "--", ":")[n // len(LINES) % 3]}


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a moving average over a fortieth of the values; over at least three of nine."""
    window = np.ones(2 * max(len(values) // 80, int(len(values) >= 9)) + 1)
    counts = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / counts


def set_loss_scale(axes: Axes, values: np.ndarray) -> None:
    """Scale the y axis from 0, or logarithmically if most values are far below the largest."""
    if values.min() > 0 and values.max() > 8 * np.median(values):
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()} (logarithmic)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0)
    axes.yaxis.set_major_formatter(SHORT_NUMBERS)


def finish_axes(axes: Axes, x_label: str = "step", columns: int = 3) -> None:
    """Label the integer x axis, and put a legend with `columns` (0: none) below the figure."""
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if columns:
        axes.figure.legend(loc="outside lower center", ncols=columns)
