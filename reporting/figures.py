"""The figures of the report: SVG that stands in a page, follows its colours and uses its font."""

import io
import math
import re
import warnings
from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reporting.analysis import Record, Results, column, recall_by_size, short

FEW = 12  # categories that still have curves of their own

# Colours that colour-blind people can tell apart (Okabe and Ito). In the page they become
# variables, so that the page can choose lighter ones on a dark ground.
INK, SOFT, GRID = "#1b1f24", "#5b6470", "#dfe3e8"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", **{c: f"c{n}" for n, c in enumerate(LINES)}}
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "text.parse_math": False,  # a category may be called $x$
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
}
NOT_LOSSES = (
    *("epoch", "step", "lr", "loss", "skipped_steps"),
    *("images_per_second", "data_seconds", "peak_memory_mib"),
)
PLAIN_NAMES = {
    "loss_classifier": "category of the box",
    "loss_box_reg": "place of the box",
    "loss_objectness": "proposals: object or not",
    "loss_rpn_box_reg": "proposals: place",
    "classification": "category of the box",
    "bbox_regression": "place of the box",
    "bbox_ctrness": "centre of the box",
}


def svg(name: str, draw: Callable, height: float = 3.5, rows: int = 1) -> Markup:
    """What `draw(axes)` draws as an <svg> to stand in a page among others.

    `axes` is one, or an array of as many as `rows`. The element `{name}-title` of the page is its
    title.
    """
    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts decide, not those here
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(5.9, height), layout="constrained")
        draw(figure.subplots(rows, sharex=rows > 1))
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = out.getvalue()
    view = re.search(r'viewBox="[\d. ]+"', drawn)[0]
    body = re.search(r"</style>\s*</defs>(.*)</svg>", drawn, re.DOTALL)[1]
    body = re.sub("<[^>]+>", partial(_in_page, name), body)
    return Markup(f'<svg role="img" aria-labelledby="{name}-title" {view}>{body}</svg>')


def _in_page(name: str, tag: re.Match) -> str:
    """A tag with ids of its own, the page's colours, and no more digits than can be seen."""
    text = re.sub(r'\bid="', f'id="{name}-', tag[0])
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", text)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a fortieth of the values, over three at least where there are nine."""
    width = 2 * max(len(values) // 80, int(len(values) >= 9)) + 1
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), np.ones(width), "same")
    count = np.convolve(known.astype(np.float64), np.ones(width), "same")
    return np.where(count > 0, total / count.clip(min=1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, most: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """The points of a line that are needed to draw it: the lowest and highest of each stretch."""
    if len(x) <= most:
        return x, y
    finite, keep = np.isfinite(y), set()
    for part in np.array_split(np.arange(len(x)), most // 2):
        keep.add(part[np.argmin(np.where(finite[part], y[part], np.inf))])
        keep.add(part[np.argmax(np.where(finite[part], y[part], -np.inf))])
    kept = np.array(sorted(keep))
    return x[kept], y[kept]


def style_of(n: int) -> dict:
    """Line n of a figure: another colour, and after six of them another dash."""
    return {"color": LINES[n % len(LINES)], "linestyle": ("-", "--", ":")[n // len(LINES) % 3]}


def marker_for(points: np.ndarray) -> str:
    """So few points would be no line, or one with corners that look measured."""
    return "o" if np.isfinite(points).sum() <= 30 else ""


def legend(axes, columns: int = 3) -> None:
    """Below the figure, where no line can be in its way."""
    axes.figure.legend(loc="outside lower center", ncols=columns)


def step_axis(axes, label: str = "step") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def plain_scale(axes, *lines: np.ndarray) -> None:
    """From 0 up; logarithmic where most of the highest line would lie at the bottom."""
    known = [line[np.isfinite(line)] for line in lines if np.isfinite(line).any()]
    highest, positive = max(known, key=np.max), min(map(np.min, known)) > 0
    if positive and highest.max() > 8 * np.median(highest):
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()} (logarithmic)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def draw_loss(axes, record: Record) -> None:
    steps, loss = column(record.train, "step"), column(record.train, "loss")
    marker = marker_for(loss)
    axes.plot(*thinned(steps, loss), color=LINES[0], alpha=0.35, linewidth=1, marker=marker, ms=3)
    axes.plot(*thinned(steps, smoothed(loss)), color=LINES[0], label="training, smoothed")
    val = validation_loss(record)
    if np.isfinite(val).any():
        at = column(record.evals, "step")
        axes.plot(at, val, color=LINES[1], marker=marker_for(val), label="validation")
    axes.set_ylabel("loss")
    legend(axes)
    step_axis(axes)
    plain_scale(axes, loss, val)


def validation_loss(record: Record) -> np.ndarray:
    """The loss on the validation pictures of each evaluation, NaN where it was not computed."""
    parts = [line.get("val_loss") for line in record.evals]
    return column([part if isinstance(part, dict) else {} for part in parts], "loss")


def loss_parts(record: Record) -> list[str]:
    names = dict.fromkeys(key for line in record.train for key in line if key not in NOT_LOSSES)
    return [name for name in names if np.isfinite(column(record.train, name)).any()]


def draw_parts(axes, record: Record) -> None:
    steps = column(record.train, "step")
    for n, name in enumerate(loss_parts(record)):
        part = column(record.train, name)
        label = PLAIN_NAMES.get(name, name.removeprefix("loss_"))
        marker = marker_for(part)
        axes.plot(*thinned(steps, smoothed(part)), label=label, marker=marker, ms=3, **style_of(n))
    axes.set_ylabel("part of the loss")
    legend(axes, columns=2)
    step_axis(axes)
    plain_scale(axes, *(column(record.train, name) for name in loss_parts(record)))


def draw_rate(axes, record: Record) -> None:
    steps, rate = column(record.train, "step"), column(record.train, "lr")
    axes.plot(*thinned(steps, rate), color=LINES[0], marker=marker_for(rate), ms=3)
    axes.set_ylabel("learning rate")
    step_axis(axes)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def draw_ap(axes, record: Record) -> None:
    epochs = column(record.evals, "epoch")
    for n, name in enumerate(("AP", "AP50", "AP75")):
        values = column(record.evals, name)
        width = 3 if name == "AP" else 1.5
        axes.plot(
            epochs, values, label=name, marker=marker_for(values), lw=width, ms=4, **style_of(n)
        )
    axes.set_ylim(0, 1)
    axes.set_ylabel("AP on validation pictures")
    legend(axes)
    step_axis(axes, "epoch, counted from 0")


def draw_precision(axes, results: Results, threshold: int) -> None:
    """The curves at IoU 0.50 + 0.05 x `threshold`: the mean, and of each category if few."""
    curves, recall = results.curves[threshold], np.linspace(0, 1, 101)
    names = results.index.categories.names
    known = [k for k in range(len(names)) if np.isfinite(curves[:, k]).all()]
    if 1 < len(known) <= FEW:
        for n, k in enumerate(known):
            # The number first: matplotlib leaves out a label that begins with "_".
            label = f"{curves[:, k].mean():.2f} {short(names[k])}"
            axes.plot(recall, curves[:, k], label=label, lw=1.3, **style_of(n))
    mean = curves[:, known].mean(axis=1)
    label = "mean" if len(known) > 1 else short(names[known[0]])
    axes.plot(recall, mean, color=INK, lw=3, label=f"{mean.mean():.2f} {label}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    legend(axes)


def draw_sizes(both, results: Results) -> None:
    """Above how many boxes there are of each size, below how many of them were found."""
    usable = results.index.usable
    sides = np.sqrt(results.index.boxes[usable, 2:].prod(axis=1))
    edges, total, sure, found = recall_by_size(sides, results.found_at[usable])
    left, width = edges[:-1], np.diff(edges) * 0.94
    counts, recall = both
    for count, below, colour, label in (
        (sure, 0 * sure, LINES[0], "found, score 0.5 or more"),
        (found - sure, sure, LINES[5], "found, lower score"),
        (total - found, found, LINES[1], "not found"),
    ):
        counts.bar(left, count, width, below, align="edge", color=colour, label=label)
    counts.set(ylabel="true boxes", ylim=(0, 1.08 * total.max()))
    counts.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    counts.figure.legend(loc="outside upper center", ncols=3, columnspacing=1, handlelength=1)
    there = total > 0
    middle = np.sqrt(edges[1:] * edges[:-1])[there]
    for part, colour, style in ((found, LINES[5], "--"), (sure, LINES[0], "-")):
        recall.plot(middle, part[there] / total[there], style, marker="o", ms=4, color=colour)
    recall.set(ylim=(0, 1.05), ylabel="share found", xlabel="square root of the box's area, pixels")
    for axes in both:
        axes.set_xscale("log")
        for bound in (32, 96):
            axes.axvline(bound, color=SOFT, lw=1, ls=":")
    ticks = edges if len(edges) < 8 else [x for x in edges if math.log2(x).is_integer()]
    recall.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    recall.xaxis.set_minor_locator(NullLocator())
    recall.set_xlim(edges[0], edges[-1])


def draw_all(record: Record, results: Results | None) -> dict[str, Markup]:
    """The figures that there is something to draw for, by name."""
    drawings = {}
    if np.isfinite(column(record.train, "loss")).any():
        drawings["loss"] = svg("loss", partial(draw_loss, record=record))
    if loss_parts(record):
        drawings["parts"] = svg("parts", partial(draw_parts, record=record))
    if np.isfinite(column(record.evals, "AP") + column(record.evals, "epoch")).any():
        drawings["ap"] = svg("ap", partial(draw_ap, record=record))
    if np.isfinite(column(record.train, "lr")).any():
        drawings["rate"] = svg("rate", partial(draw_rate, record=record))
    if results and np.isfinite(results.curves).any():
        for name, threshold in (("precision50", 0), ("precision75", 5)):
            draw = partial(draw_precision, results=results, threshold=threshold)
            drawings[name] = svg(name, draw, height=4)
    if results and results.index.usable.any():
        drawings["sizes"] = svg("sizes", partial(draw_sizes, results=results), height=5, rows=2)
    return drawings
