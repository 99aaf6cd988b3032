"""Figures of the report: means over seeds with their deviation, as SVG; equal records give equal bytes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence

from incipit.errors import RecipeError

Series = Mapping[
    str, Sequence[tuple[str, Sequence[float]]]
]  # label -> (place on the axis, numbers of the seeds)
COLOURS = ("#cc3311", "#4477aa", "#228833", "#aa7733", "#aa3377", "#555555", "#66ccee")


def lines(
    series: Series,
    places: Sequence[str],
    x: str,
    y: str,
    title: str,
    joined: bool = True,
    log: bool = False,
) -> str:
    """One line a series over named places, with bars of one deviation and a dot a seed; text of an <svg> element.

    joined: whether the places have an order; else no line joins them, and series that share a place stand side by side.
    log: a logarithmic axis of numbers.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError("the report needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    used = [place for points in series.values() for place, _ in points]
    apart = 0.0 if joined or len(used) == len(set(used)) else min(0.12, 0.7 / len(series))
    for n, (label, points) in enumerate(series.items()):
        aside = apart * (n - (len(series) - 1) / 2)
        at = [places.index(place) + aside for place, _ in points]
        means = [100 * statistics.fmean(numbers) for _, numbers in points]
        wide = [100 * statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for _, numbers in points]
        colour = COLOURS[n % len(COLOURS)]
        axes.errorbar(
            at,
            means,
            yerr=wide,
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.4,
            linestyle="-" if joined else "none",
            label=label,
        )
        for place, (_, numbers) in zip(at, points, strict=True):
            axes.scatter(
                [place] * len(numbers), [100 * v for v in numbers], s=9, color=colour, alpha=0.4, linewidth=0
            )
    axes.set_xticks(range(len(places)), [_broken(place) for place in places], fontsize=8)
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    image = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    text = image.getvalue()
    return text[text.index("<svg") :]


def _broken(name: str) -> str:
    """A long name in lines, so that it does not reach its neighbour's."""
    return name.replace("_", "\n") if len(name) > 10 else name
