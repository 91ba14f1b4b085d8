"""Figures, made with matplotlib's object interface: no display, no global state.

Figures use a few fixed colours. In a page, each is replaced by a variable of the style sheet, so that a figure turns
dark with the page; elsewhere, as in TensorBoard, the colours stay.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "Band",
    "Dose",
    "as_svg",
    "banded_curves",
    "changes",
    "chosen_by_layer",
    "contrast_distribution",
    "curves",
    "dose_response",
    "for_notebook",
    "relevance_by_layer",
    "relevance_of_sets",
    "score_distribution",
    "sparsity_curves",
    "upset",
    "window_losses",
]

INK, MUTED, LINE, FAINT = "#1b1f24", "#59636e", "#d8dee4", "#afb8c1"
SERIES = ("#0a66c2", "#bc4c00", "#1a7f37", "#8250df", MUTED, FAINT)
_VARIABLES = {
    **{INK: "ink", MUTED: "muted", LINE: "line", FAINT: "faint"},
    **{SERIES[0]: "accent", SERIES[1]: "accent2", SERIES[2]: "accent3", SERIES[3]: "accent4"},
}
WIDTH = 7.4  # inches
_SMALL, _NORMAL = 8, 9  # points
_MARKERS = "osD^vP"
_MOST_TICKS = 32


def as_svg(figure: Figure, name: str) -> str:
    """The ``<svg>`` element of a figure, with the variables of the page's style sheet as colours, and text as text.

    Args:
        figure: A figure in the colours of this module.
        name: Prefix of every id in the figure, so that one page can hold several figures.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=about)
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def for_notebook(figure: Figure) -> Figure:
    """The figure, made to show itself in a notebook, which by itself shows only those of ``pyplot``."""
    from sparc3_pl.document.blocks import Picture
    from sparc3_pl.document.page import fragment

    name = f"figure{id(figure):x}"
    figure._repr_html_ = lambda: fragment([Picture(as_svg(figure, name), "a figure")])  # type: ignore[attr-defined]
    return figure


def _new(height: float, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    """An empty figure with quiet axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _quiet(axes)
    axes.set_xlabel(x, fontsize=_NORMAL, color=MUTED)
    axes.set_ylabel(y, fontsize=_NORMAL, color=MUTED)
    return figure, axes


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(labelsize=_SMALL, labelcolor=MUTED, color=LINE, length=3)
    axes.set_axisbelow(True)
    axes.grid(True, color=LINE, linewidth=0.6)


def _plain(name: str) -> str:
    """``name`` with escapes, so that matplotlib reads no formula in it."""
    return name.replace("$", r"\$")


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize=_SMALL, labelcolor=INK, frameon=False, **options)


def relevance_by_layer(sums: Mapping[str, float]) -> Figure:
    """One bar per layer: the sum of its scores, in the order of the model.

    Args:
        sums: Sum of the scores of each layer, by name.
    """
    figure, axes = _new(max(1.6, 0.16 * len(sums) + 0.8), "relevance (sum of scores)")
    axes.barh(range(len(sums)), list(sums.values()), color=SERIES[0])
    axes.set_yticks(range(len(sums)), list(map(_plain, sums)), fontsize=6)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return figure


def relevance_of_sets(sets: Mapping[str, Mapping[str, float]]) -> Figure:
    """One line per score folder: the sum of the scores of each layer, in the order of the model.

    Args:
        sets: The sum of the scores of each layer, by name, for each folder, by name.
    """
    figure, axes = _new(2.9, y="sum of scores")
    for place, (name, sums) in enumerate(sets.items()):
        style = {"color": SERIES[place % len(SERIES)], "marker": _MARKERS[place % len(_MARKERS)]}
        axes.plot(range(len(sums)), list(sums.values()), label=_plain(name), linewidth=1.4, markersize=3, **style)
    _layer_ticks(axes, list(next(iter(sets.values()))))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    _legend(axes)
    return figure


def chosen_by_layer(counts: Mapping[str, Sequence[int]], names: Sequence[str]) -> Figure:
    """Numbers of chosen components by layer, with one bar per plan.

    Args:
        counts: One number per plan for each layer; all layers to choose from.
        names: Names of the plans.
    """
    figure, axes = _new(2.5, y="chosen")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = np.arange(len(counts)) + (place - (len(names) - 1) / 2) * width
        values = [row[place] for row in counts.values()]
        axes.bar(at, values, width, color=SERIES[place % len(SERIES)], label=_plain(name))
    _layer_ticks(axes, list(counts))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    _legend(axes)
    return figure


def _layer_ticks(axes: Axes, layers: Sequence[str]) -> None:
    """Ticks with the numbers of the decoder layers if names differ only in these; at most ``_MOST_TICKS``."""
    numbers = [re.search(r"\d+", layer) for layer in layers]
    step = -(-len(layers) // _MOST_TICKS)
    ticks = range(0, len(layers), step)
    if all(numbers) and len({match[0] for match in numbers if match}) == len(layers):
        axes.set_xticks(ticks, [numbers[i][0] for i in ticks])
        axes.set_xlabel(_plain(re.sub(r"\d+", "N", layers[0], count=1)), fontsize=_NORMAL, color=MUTED)
    else:
        axes.set_xticks(ticks, [_plain(_short(layers[i])) for i in ticks], rotation=90)


def _short(layer: str) -> str:
    """``model.layers.3.mlp.up_proj`` as ``3 up_proj``."""
    number = re.search(r"\d+", layer)
    return f"{number[0]} {layer.rpartition('.')[2]}" if number else layer.rpartition(".")[2]


def contrast_distribution(values: NDArray[np.float32], chosen: NDArray[np.float32], name: str) -> Figure:
    """Histogram of a contrast, of all components and of the chosen ones; the axis of numbers is logarithmic.

    Args:
        values: Values of all components ``[n]``, finite.
        chosen: Values of the chosen components ``[k]``.
        name: Name of the contrast.
    """
    figure, axes = _new(2.6, f"{name} (general – behaviour): to the left, used more by the behaviour", "components")
    edges = np.linspace(values.min(), values.max(), 81) if values.min() < values.max() else np.linspace(-1, 1, 81)
    axes.hist(values, edges, color=SERIES[0], label=f"all {len(values):,}")
    axes.hist(chosen, edges, color=SERIES[1], label=f"chosen, {len(chosen):,}")
    axes.set_yscale("log")
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    _legend(axes)
    return figure


def score_distribution(scores: NDArray[np.float32], label: str) -> Figure:
    """Histogram of a judge's scores, with their mean.

    Args:
        scores: Scores of the completions, in [0, 1].
        label: Name of the scored property.
    """
    figure, axes = _new(2.4, f"{_plain(label)} of a completion", "completions")
    axes.hist(scores, np.linspace(0, 1, 21), color=SERIES[0])
    axes.axvline(float(scores.mean()), color=SERIES[1], linewidth=1.4, label=f"mean {scores.mean():.3f}")
    axes.set_xlim(0, 1)
    _legend(axes)
    return figure


@dataclass(frozen=True)
class Dose:
    """A measured edit.

    Attributes:
        label: Text beside the point.
        perplexity: Relative change of perplexity in per cent.
        toxicity: Mean toxicity.
        low: Lower end of the interval of ``toxicity``.
        high: Upper end.
    """

    label: str
    perplexity: float
    toxicity: float
    low: float
    high: float


def dose_response(
    series: Mapping[str, Sequence[Dose]], before: float, bound: float = 1.0, axis: str = "change of perplexity, %"
) -> Figure:
    """Toxicity against the change of perplexity: a line through edits of growing size, and points for the controls.

    Args:
        series: Edits in order of size, by name of the series.
        before: Mean toxicity of the unedited model.
        bound: Change of perplexity in per cent up to which the area is shaded.
        axis: Label of the horizontal axis.
    """
    figure, axes = _new(3.4, _plain(axis), "mean toxicity of completions")
    axes.axvspan(
        min(0.0, *(dose.perplexity for doses in series.values() for dose in doses)), bound, color=LINE, alpha=0.35
    )
    axes.plot(0, before, "*", color=INK, markersize=11, label="unedited model", zorder=4)
    axes.axhline(before, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for place, (name, doses) in enumerate(series.items()):
        x, y = [dose.perplexity for dose in doses], [dose.toxicity for dose in doses]
        error = [[max(0.0, d.toxicity - d.low) for d in doses], [max(0.0, d.high - d.toxicity) for d in doses]]
        style = {"color": SERIES[place % len(SERIES)], "marker": _MARKERS[place % len(_MARKERS)]}
        axes.errorbar(x, y, error, linewidth=1.4, markersize=5, elinewidth=0.9, capsize=2, label=_plain(name), **style)
        for dose in doses if len(doses) > 1 else ():
            at = {"xytext": (5, 5), "textcoords": "offset points"}
            axes.annotate(dose.label, (dose.perplexity, dose.toxicity), **at, fontsize=_SMALL, color=MUTED)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def changes(names: Sequence[str], relative: Sequence[tuple[float, float | None, float | None]]) -> Figure:
    """A point with its interval for each figure that changed, in per cent of what it was.

    Args:
        names: Names of the figures.
        relative: Change, and the ends of its interval where there is one, in per cent.
    """
    figure, axes = _new(0.9 + 0.34 * len(names), "change, %")
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for place, (value, low, high) in enumerate(relative):
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=SERIES[0], linewidth=2.2, alpha=0.5)
        axes.plot(value, place, "o", color=SERIES[0], markersize=6)
    axes.set_yticks(range(len(names)), list(map(_plain, names)))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    return figure


def window_losses(losses: Sequence[float]) -> Figure:
    """Mean negative log-likelihood of a token of each window, in nats, in the order of the text."""
    figure, axes = _new(2.4, "window of the text", "nats per token")
    axes.plot(range(len(losses)), losses, color=SERIES[0], linewidth=1.2, marker="o", markersize=3)
    return figure


def curves(x: Sequence[float], series: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> Figure:
    """Lines over the same points, with y from 0 to 1; a series with a single value is a horizontal line."""
    figure, axes = _new(2.7, x_name, y_name)
    for place, (name, y) in enumerate(series.items()):
        colour = SERIES[place % len(SERIES)]
        if len(y) == 1:
            axes.axhline(y[0], color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=name)
        else:
            axes.plot(x, y, color=colour, marker=_MARKERS[place % len(_MARKERS)], markersize=4, label=name)
    axes.set_ylim(0, 1.02)
    _legend(axes)
    return figure


@dataclass(frozen=True)
class Band:
    """A point of a curve with its interval."""

    x: float
    y: float
    low: float
    high: float


def banded_curves(
    panels: Mapping[str, Mapping[str, Sequence[Band]]], x_name: str, y_name: str, marks: Sequence[float] = ()
) -> Figure:
    """Curves with bands, one panel beside the other, over a logarithmic axis; a name has one colour in all panels.

    Args:
        panels: The curves of each panel, by name; the panels by title.
        x_name: Label of the horizontal axis.
        y_name: Label of the vertical axis, which the panels share.
        marks: Values of y at which a broken line stands.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axes, (title, panel) in zip(every, panels.items(), strict=True):
        _quiet(axes)
        axes.set_xscale("log")
        axes.set_title(_plain(title), fontsize=_NORMAL, color=INK)
        axes.set_xlabel(x_name, fontsize=_NORMAL, color=MUTED)
        for mark in marks:
            axes.axhline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for name, points in panel.items():
            place = names.index(name)
            x, y, low, high = zip(*((p.x, p.y, p.low, p.high) for p in points), strict=True)
            style = {"color": SERIES[place % len(SERIES)], "marker": _MARKERS[place % len(_MARKERS)]}
            axes.plot(x, y, linewidth=1.4, markersize=4, label=_plain(name), **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    every[0].set_ylabel(y_name, fontsize=_NORMAL, color=MUTED)
    _legend(every[0])
    return figure


def sparsity_curves(
    series: Mapping[str, Sequence[tuple[float, float, float | None]]],
    dense: float,
    y_name: str,
    is_logarithmic: bool = False,
) -> Figure:
    """A line for each way to prune through its shares, and the value of the model as it was.

    Args:
        series: The points of each way, by its name: (share removed, mean, deviation or None), with rising share.
        dense: Value of the unpruned model.
        y_name: Label of the vertical axis.
        is_logarithmic: Whether the axis of values is logarithmic, as for perplexity, which grows by powers of ten.
    """
    figure, axes = _new(3.4, "share removed, %", y_name)
    axes.axhline(dense, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="dense")
    for place, (name, points) in enumerate(series.items()):
        style = {"color": SERIES[place % len(SERIES)], "marker": _MARKERS[place % len(_MARKERS)]}
        x, y = [100 * share for share, *_ in points], [mean for _, mean, _ in points]
        error = [deviation or 0.0 for *_, deviation in points]
        axes.errorbar(x, y, error, linewidth=1.4, markersize=4, elinewidth=0.9, capsize=2, label=_plain(name), **style)
    if is_logarithmic:
        axes.set_yscale("log")
    _legend(axes)
    return figure


def upset(sizes: Mapping[str, int], exclusive: Mapping[frozenset[str], int], most: int = 20) -> Figure:
    """UpSet plot (Lex et al., IEEE TVCG 2014): the size of every exclusive intersection over a matrix of members.

    Args:
        sizes: Size of each set, by name.
        exclusive: The number of elements that are in all of some sets and in no other, by the names of these sets.
        most: Number of intersections to show, the largest first.
    """
    from matplotlib.figure import Figure

    names = list(sizes)
    columns = sorted(((m, n) for m, n in exclusive.items() if n), key=lambda item: (-item[1], len(item[0])))[:most]
    figure = Figure(figsize=(WIDTH, 2.0 + 0.27 * len(names)), layout="constrained")
    top, matrix = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 0.27 * len(names)])
    bars = top.bar(range(len(columns)), [n for _, n in columns], 0.62, color=SERIES[0])
    top.bar_label(bars, fontsize=_SMALL, color=INK, padding=2)
    top.set_ylabel("in exactly these", fontsize=_NORMAL, color=MUTED)
    for axes in (top, matrix):
        _quiet(axes)
    top.grid(False, axis="x")
    top.tick_params(axis="x", length=0)
    _members(matrix, names, [members for members, _ in columns])
    matrix.set_yticks(range(len(names)), [f"{_plain(name)}  ({size})" for name, size in sizes.items()], fontsize=_SMALL)
    return figure


def _members(axes: Axes, names: Sequence[str], columns: Sequence[frozenset[str]]) -> None:
    """A dot for every member of every column, joined from the first to the last."""
    for x, members in enumerate(columns):
        rows = [y for y, name in enumerate(names) if name in members]
        axes.plot([x] * len(names), range(len(names)), "o", color=LINE, markersize=7)
        axes.plot([x] * len(rows), rows, "o-", color=INK, markersize=7, linewidth=1.6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
