"""Pictures of how each soup was cooked: what was tried, and which coefficients came out."""

from collections.abc import Sequence
from itertools import accumulate
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lightning_soup.runs.figures import BLACK, FAINT, GREY, Picture, distinct, look_of, new_figure, short
from lightning_soup.runs.report_json import natural_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_soup.runs.report import Entry, SoupReport

__all__ = ["coefficients", "history", "tensor_coefficients"]

# More names than this cannot be read along an axis.
NAMED = 24


def history(report: "SoupReport") -> list[Picture]:
    """The score of everything a recipe tried, in order: kept, refused, and the best so far."""
    cooked = [e for e in _cooked(report) if len(_drawable(e.soup)) > 1]
    if not cooked:
        return []
    pictures: list[Picture] = []
    caption = (
        f"What each recipe tried, scored on {report.selection_split}. Filled: kept; cross or hollow: refused; step "
        f"line: the best so far. A recipe that learns by gradient shows its loss."
    )
    with new_figure(7.2, 2.5 * len(cooked), pictures, "history", caption) as figure:
        for axis, entry in zip(figure.subplots(len(cooked), 1, squeeze=False).flat, cooked, strict=True):
            _tried(axis, entry, look_of(report, entry)["color"])
    return pictures


def coefficients(report: "SoupReport") -> list[Picture]:
    """One row per ingredient, one column per soup; of per-tensor coefficients the mean and the range."""
    cooked = _cooked(report)
    if not cooked:
        return []
    names = _identities(cooked)
    rows = list(dict.fromkeys(name for labels in names for name in labels))
    columns = min(4, len(cooked))
    lines = -(-len(cooked) // columns)
    pictures: list[Picture] = []
    caption = "The coefficient of each ingredient in each soup. Whiskers: the range over tensors, around the mean."
    with new_figure(7.2, lines * (0.8 + 0.2 * len(rows)), pictures, "coefficients", caption) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for axis, entry, labels in zip(axes.flat, cooked, names, strict=False):
            places = [rows.index(label) for label in labels]
            _bars(axis, places, entry.soup, look_of(report, entry)["color"])
            axis.set_title(fill(short(entry.label, 108 // columns), 68 // columns))
        for axis in axes.flat[len(cooked) :]:
            axis.remove()
        for axis in axes[:, 0]:
            axis.set_yticks(range(len(rows)), distinct([label for label, _ in rows]))
            axis.set_ylim(len(rows) - 0.4, -0.6)
        low, high = axes[0][0].get_xlim()
        axes[0][0].set_xlim(low, high + 0.2 * (high - low))  # room for the numbers
    return pictures


def _bars(axis: "Axes", places: Sequence[int], soup: Any, colour: str) -> None:
    for i, (y, share) in enumerate(zip(places, soup.shares(), strict=True)):
        axis.barh(y, share, height=0.7, color=colour)
        span = _range(soup, i)
        if span is not None:
            axis.plot(span, [y, y], color=BLACK, linewidth=0.9)
        if share:
            end = (max(0, share, *(span or ())), y)
            axis.annotate(f"{share:.3g}", end, (3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("coefficient")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.spines["left"].set_visible(False)


def tensor_coefficients(report: "SoupReport") -> list[Picture]:
    """A heat map per soup whose tensors have their own coefficients: tensors down, ingredients across."""
    pictures: list[Picture] = []
    cooked = [e for e in _cooked(report) if isinstance(e.soup.coefficients, dict)]
    for number, entry in enumerate(cooked, 1):
        tensors, table = list(entry.soup.coefficients), list(entry.soup.coefficients.values())
        name = "coefficients-by-tensor" + (f"-{number}" if len(cooked) > 1 else "")
        caption = f"The coefficients of {entry.label}, tensor by tensor, in the order of the model."
        low, high = min(map(min, table)), max(map(max, table))
        # Negative coefficients are legal and must be seen as such: two colours that meet at zero.
        colours = {"cmap": "Blues", "vmin": 0, "vmax": high}
        if low < 0:
            colours = {"cmap": "PuOr_r", "vmin": -max(high, -low), "vmax": max(high, -low)}
        height = 1.6 + min(7.0, 0.16 * len(tensors))
        with new_figure(7.2, height, pictures, name, caption) as figure:
            axis = figure.subplots()
            image = axis.imshow(table, aspect="auto", **colours)
            step = -(-len(tensors) // 44)
            axis.set_yticks(range(0, len(tensors), step), [short(t, 40) for t in tensors[::step]], fontsize=7)
            _name_x(axis, [ingredient.name for ingredient in entry.soup.ingredients])
            axis.tick_params(length=0)
            axis.set_title(short(entry.label, 60))
            figure.colorbar(image, ax=axis, label="coefficient", shrink=0.8, aspect=30)
    return pictures


def _cooked(report: "SoupReport") -> list["Entry"]:
    return [entry for entry in report.of_kind("soup") if entry.soup is not None]


def _drawable(soup: Any) -> list[Any]:
    """The trials with a score; where none has one (a learned soup steps by gradient), those with a loss."""
    scored = [trial for trial in soup.history if trial.score is not None]
    return scored or [trial for trial in soup.history if "loss" in trial.values]


def _tried(axis: "Axes", entry: "Entry", colour: str) -> None:
    soup, trials = entry.soup, _drawable(entry.soup)
    sweep = all("alpha" in trial.values for trial in trials)
    chosen = any(trial.kept is not None for trial in trials)
    scored = trials[0].score is not None
    x = [trial.values["alpha"] if sweep else i for i, trial in enumerate(trials, 1)]
    y = [natural_score(soup, trial.score) if scored else trial.values["loss"] for trial in trials]
    if chosen and not sweep:
        best = accumulate(y, min if soup.mode == "min" else max)
        axis.step(x, list(best), where="post", color=GREY, linewidth=1, zorder=1)
    else:
        axis.plot(x, y, color=GREY, linewidth=1, zorder=1)
    refused = {"marker": "o", "color": colour, "markerfacecolor": "white"} if sweep else {"marker": "x", "color": BLACK}
    for kept, look in ((False, refused), (True, {"marker": "o", "color": colour})):
        places = [i for i, trial in enumerate(trials) if (trial.kept is not False) is kept]
        axis.plot([x[i] for i in places], [y[i] for i in places], linestyle="", markersize=5.5, **look)
    axis.set_title(short(entry.label, 70))
    axis.set_ylabel((soup.metric or "score") if scored else "loss")
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    if sweep:
        axis.set_xlabel("α")
    elif len(trials) <= NAMED:
        _name_x(axis, [trial.label for trial in trials], first=1)
    else:
        axis.set_xlabel("trial")


def _name_x(axis: "Axes", labels: Sequence[str], first: int = 0) -> None:
    if len(labels) <= NAMED:
        places = range(first, first + len(labels))
        axis.set_xticks(places, distinct(labels, 22), rotation=35, ha="right", fontsize=7)
        for tick in axis.get_xticklabels():
            tick.set_rotation_mode("anchor")
    else:
        axis.set_xlabel("ingredient, in the order of the table")


def _range(soup: Any, ingredient: int) -> tuple[float, float] | None:
    """The smallest and largest coefficient of an ingredient, where tensors have their own."""
    if not isinstance(soup.coefficients, dict):
        return None
    values = [row[ingredient] for row in soup.coefficients.values()]
    return min(values), max(values)


def _identities(cooked: Sequence["Entry"]) -> list[list[tuple[str, int]]]:
    """The ingredients of each soup; a label that occurs twice in one soup stands for two ingredients."""
    names = []
    for entry in cooked:
        labels = [ingredient.name for ingredient in entry.soup.ingredients]
        names.append([(label, labels[:i].count(label)) for i, label in enumerate(labels)])
    return names
