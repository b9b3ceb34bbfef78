"""Pictures that compare models: accuracy under shift, and gains over the best single ingredient."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_soup.runs.comparison import Row
from lightning_soup.runs.figures import BLACK, BLUE, FAINT, GREY, Picture, look_of, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_soup.runs.report import Entry, SoupReport

__all__ = ["gains", "robustness"]

Point = Callable[["Entry"], tuple[float, float]]
REST = {"mean": GREY, "ensemble": BLUE, "init": BLACK}


def robustness(report: "SoupReport") -> list[Picture]:
    """Main accuracy (x) against shifted accuracy (y), as in the Model Soups and WiSE-FT papers.

    One row per shifted set, and one for their mean. The init and its WiSE-FT curve often lie far from the
    rest, so each row then has two panels: everything, and the ingredients and soups alone.
    """
    main, *shifted = report.test_names
    if not shifted:
        return []
    panels = [(name, _point(main, [name])) for name in shifted]
    if len(shifted) > 1:
        panels.append((f"mean of {len(shifted)} shifted sets", _point(main, shifted)))
    zooms = any(_is_far(report, point) for _, point in panels)
    columns = 2 if zooms or len(panels) > 1 else 1
    rows = len(panels) if zooms else -(-len(panels) // columns)

    from matplotlib.patches import Rectangle

    pictures: list[Picture] = []
    caption = (
        f"Accuracy on {main} (right is better) against accuracy under shift (up is better). Dotted lines "
        f"cross at the best single ingredient, chosen on {report.selection_split}: what lies right of and "
        f"above them is better on both."
    )
    if report.of_kind("interpolation"):
        caption += " The curve is WiSE-FT: α = 0 is the init, α = 1 the fine-tuned end."
    with new_figure(7.2, 0.5 + 3.1 * rows, pictures, "robustness", caption) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for index, (name, point) in enumerate(panels):
            row = axes[index] if zooms else [axes.flat[index]]
            for axis in row:
                _scatter(axis, report, point)
                axis.set_xlabel(f"accuracy on {short(main)}, %")
                axis.set_ylabel(f"accuracy on {short(name)}, %")
                axis.locator_params(nbins=6)
            _limit(row[-1], [point(e) for e in (_near(report) if zooms else report.entries)])
            if zooms:
                row[0].set_title("all")
                row[1].set_title("the frame enlarged: ingredients and soups")
                (left, right), (low, high) = row[1].get_xlim(), row[1].get_ylim()
                frame = Rectangle((left, low), right - left, high - low, fill=False, edgecolor=GREY, linewidth=0.6)
                row[0].add_patch(frame)
        for axis in axes.flat[len(panels) if not zooms else axes.size :]:
            axis.remove()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.4, handletextpad=0.4)
        figure.draw_without_rendering()  # settles the layout, in which distances are measured now
        for index, (_, point) in enumerate(panels):
            for axis in axes[index] if zooms else [axes.flat[index]]:
                _label_curves(axis, report, point)
    return pictures


def gains(report: "SoupReport") -> list[Picture]:
    """Forest plot: each model's gain over the best single ingredient with its 95 % interval, per test set."""
    rows = [row for row in report.comparisons if row.kind != "best"]
    soups = iter(report.of_kind("soup"))  # the rows of the soups stand in the same order
    colours = [look_of(report, next(soups))["color"] if r.kind == "soup" else REST[r.kind] for r in rows]
    names = report.test_names
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    pictures: list[Picture] = []
    caption = (
        "Gain over the best single ingredient in percentage points, with the paired bootstrap's 95 % "
        "interval. Filled: the gain is sure at 95 %; hollow: not distinguishable from the best single."
    )
    with new_figure(7.2, lines * (0.75 + 0.27 * len(rows)), pictures, "gains", caption) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axis, name in zip(axes.flat, names, strict=False):
            _forest(axis, rows, colours, name)
        for axis in axes.flat[len(names) :]:
            axis.remove()
        for axis in axes[:, 0]:
            axis.set_yticks(range(len(rows)), [short(row.label) for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
    return pictures


def _point(main: str, shifted: Sequence[str]) -> Point:
    def point(entry: "Entry") -> tuple[float, float]:
        values = [100 * entry.outcomes[name].accuracy for name in shifted]
        return 100 * entry.outcomes[main].accuracy, sum(values) / len(values)

    return point


def _near(report: "SoupReport") -> list["Entry"]:
    return [entry for entry in report.entries if entry.kind in ("ingredient", "soup", "ensemble")]


def _is_far(report: "SoupReport", point: Point) -> bool:
    """Whether init or curve would squeeze the rest into less than half the panel."""
    near, drawn = [point(e) for e in _near(report)], [point(e) for e in report.entries]
    spans = [(_span([p[i] for p in near]), _span([p[i] for p in drawn])) for i in (0, 1)]
    return any(whole > 2 * max(part, 0.5) for part, whole in spans)


def _span(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _limit(axis: "Axes", points: Sequence[tuple[float, float]]) -> None:
    for values, set_limits in zip(zip(*points, strict=True), (axis.set_xlim, axis.set_ylim), strict=True):
        pad = 0.12 * max(_span(values), 0.5)
        set_limits(min(values) - pad, max(values) + pad)


def _scatter(axis: "Axes", report: "SoupReport", point: Point) -> None:
    best = point(report.best_single)
    axis.axvline(best[0], color=FAINT, linestyle=":", zorder=0)
    axis.axhline(best[1], color=FAINT, linestyle=":", zorder=0)
    for number, entry in enumerate(report.of_kind("ingredient")):
        axis.scatter(*point(entry), **look_of(report, entry), label=None if number else "ingredients")
    axis.scatter(*best, s=70, facecolors="none", edgecolors=BLACK, linewidths=1, zorder=4, label="best single")
    for kind in ("soup", "ensemble", "init"):
        for entry in report.of_kind(kind):
            axis.scatter(*point(entry), **look_of(report, entry), label=short(entry.label))
    for label, curve in _curves(report).items():
        x, y = zip(*map(point, curve), strict=True)
        axis.plot(x, y, color=BLUE, marker=".", markersize=4, linewidth=1, zorder=2, label=short(label))


def _curves(report: "SoupReport") -> dict[str, list["Entry"]]:
    curves: dict[str, list[Entry]] = {}
    for entry in sorted(report.of_kind("interpolation"), key=lambda entry: entry.alpha):
        curves.setdefault(entry.label, []).append(entry)
    return curves


def _label_curves(axis: "Axes", report: "SoupReport", point: Point) -> None:
    """Write α below the points of a curve, the ends first, where it covers nothing."""
    place = axis.transData.transform
    taken = [place(point(entry)) for entry in report.entries if entry.kind != "interpolation"]
    frame = axis.bbox.padded(-6)
    for curve in _curves(report).values():
        spots = place([point(entry) for entry in curve])
        for i in [0, len(curve) - 1, *range(1, len(curve) - 1)]:
            along = spots[min(i + 1, len(curve) - 1)] - spots[max(i - 1, 0)]
            length = max(1e-9, (along**2).sum() ** 0.5)
            below = (along[1] / length, -along[0] / length) if along[0] >= 0 else (0, -1)
            # In pixels of the figure's own resolution, 100 to the inch: 14 are 10 points.
            x, y = spots[i] + [14 * part for part in below]
            free = all(abs(x - other[0]) > 17 or abs(y - other[1]) > 12 for other in taken)
            if free and frame.contains(x, y):
                spot = axis.transData.inverted().transform((x, y))
                text = f"{curve[i].alpha:g}"
                axis.text(*spot, text, fontsize=7, color=BLUE, ha="center", va="center")
                taken.append((x, y))


def _forest(axis: "Axes", rows: Sequence[Row], colours: Sequence[str], name: str) -> None:
    axis.set_title(short(name, 34))
    axis.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    near = [row.tests[name].gain for row in rows if row.kind != "init"]
    low, high = min(0, *(g.low for g in near)), max(0, *(g.high for g in near))
    pad = 0.08 * max(high - low, 0.5)
    low, high = low - pad, high + pad
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        c = row.tests[name]
        if low <= c.gain.mean <= high:
            axis.plot([c.gain.low, c.gain.high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
            face = colour if c.distinguishable else "white"
            axis.plot(c.gain.mean, y, "o", color=colour, markerfacecolor=face, markersize=5.5)
        else:  # far away (the init, usually): an arrow and the number, so that the others keep their scale
            edge, side, sign = (low, "left", "◂") if c.gain.mean < low else (high, "right", "▸")
            number = c.gain_texts[0]
            text = f"{sign} {number}" if side == "left" else f"{number} {sign}"
            axis.text(edge, y, text, ha=side, va="center", fontsize=8, color=colour)
    axis.set_xlim(low, high)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_xlabel("gain, points")
