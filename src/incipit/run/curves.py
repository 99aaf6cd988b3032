"""The figure of a sweep: dev score against the swept value where one key has numbers, else against the steps."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from incipit import files

if TYPE_CHECKING:
    from incipit.run.sweep import Row

Curve = Sequence[tuple[int, float]]  # (step, dev score) of one seed, in the order of the steps
NAMED = 20  # combinations that a legend can name
MISSING = "no figure without matplotlib: pip install matplotlib"


def draw(rows: Sequence[Row], curves: Mapping[str, Sequence[Curve]], path: files.PathLike) -> tuple[str, str]:
    """Write the PNG: a panel for each recipe, task and metric. Returns (path, "") or ("", why there is none)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "", MISSING
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if any(curves[row.name]):
            panels.setdefault((row.base, row.task, row.metric), []).append(row)
    if not panels:
        return "", "no figure: no combination was scored on validation"
    figure = Figure(figsize=(6.4 * len(panels) + 2.0, 4.4), layout="constrained")
    for axes, ((base, task, metric), members) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        key = _number_key(members)
        if key:
            _by_value(axes, members, key)
        else:
            _by_step(axes, members, curves)
        seeds = max(len(row.seeds) for row in members)
        spread = f": mean of {seeds} seeds, band: standard deviation" if seeds > 1 else ""
        axes.set_title(f"{base}{f' ({task})' if task != base else ''}{spread}", fontsize=10)
        axes.set_ylabel(f"{metric} on validation")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=140)
    files.atomic_write(path, image.getvalue())
    return str(path), ""


def _number_key(rows: Sequence[Row]) -> str:
    """The one key that varies, where its values are positive numbers; else ""."""
    keys = [k for k in rows[0].values if len({repr(row.values.get(k)) for row in rows}) > 1]
    if len(keys) != 1 or not all(row.dev for row in rows):
        return ""
    values = [row.values[keys[0]] for row in rows]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return keys[0] if len(numbers) == len(values) else ""


def _by_value(axes: Any, rows: Sequence[Row], key: str) -> None:
    """A dot for each seed, the mean as a line, on a logarithmic axis; the best value is ringed."""
    from matplotlib.ticker import NullFormatter, NullLocator

    members = sorted(rows, key=lambda row: float(row.values[key]))
    spreads = [row.dev for row in members if row.dev is not None]
    values = [float(row.values[key]) for row in members]
    means, low, high = _band([spread.each for spread in spreads])
    axes.fill_between(values, low, high, color="#4477aa", alpha=0.15, linewidth=0)
    axes.plot(values, means, color="#4477aa", marker="o")
    for value, spread in zip(values, spreads, strict=True):
        axes.scatter([value] * len(spread.each), spread.each, s=14, color="#4477aa", alpha=0.5)
    best = [(v, m) for v, m, row in zip(values, means, members, strict=True) if row.best]
    axes.scatter(
        *zip(*best, strict=True), s=170, facecolors="none", edgecolors="#cc3311", linewidths=1.8, label="best"
    )
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(key)
    axes.legend(frameon=False, fontsize=8)


def _by_step(axes: Any, rows: Sequence[Row], curves: Mapping[str, Sequence[Curve]]) -> None:
    """A line for each combination, the mean of its seeds; the best is drawn thick."""
    from matplotlib import colormaps

    from incipit.recipe.sweeps import short_names

    short = short_names(rows[0].values)
    for n, row in enumerate(rows):
        colour = colormaps["viridis"](n / max(1, len(rows) - 1) * 0.85)
        steps, each = _together(curves[row.name])
        means, low, high = _band(each)
        told = ", ".join(f"{short[key]} {value}" for key, value in row.values.items()) or row.name
        label = f"{told} (best)" if row.best and len(rows) > 1 else told
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        style = {"linewidth": 3.0 if row.best else 1.3, "zorder": 3 if row.best else 2}
        axes.plot(steps, means, color=colour, label=label, marker="o", markersize=3, **style)
    axes.set_xlabel("step")
    if len(rows) <= NAMED:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _together(curves: Sequence[Curve]) -> tuple[list[int], list[list[float]]]:
    """Steps, and at each the scores of all seeds; a seed that stopped early keeps its last score."""
    steps = sorted({step for curve in curves for step, _ in curve})
    each = [[[s for at, s in curve if at <= step] for curve in curves if curve] for step in steps]
    return steps, [[known[-1] for known in seeds if known] for seeds in each]


def _band(each: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Means, and means minus and plus one standard deviation."""
    means = [statistics.fmean(scores) for scores in each]
    wide = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for scores in each]
    return (
        means,
        [m - w for m, w in zip(means, wide, strict=True)],
        [m + w for m, w in zip(means, wide, strict=True)],
    )
