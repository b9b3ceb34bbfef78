"""Pictures of a zoo: the phases over temperature and load, and what was measured."""

import json
import math
from typing import TYPE_CHECKING, Any, get_args

from lightning_soup.landscape.phases import Phase
from lightning_soup.runs.figures import BLACK, FAINT, Picture, distinct, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_soup.runs.zoo import Zoo

__all__ = ["zoo_pictures"]

# From underfitted and too small to generalising; readable in grey too.
_COLOURS = dict(zip(get_args(Phase), ("#4a1486", "#807dba", "#fd8d3c", "#a1d99b", "#238b45", FAINT), strict=True))
_LETTERS = 10  # of a value at an axis
_LIGHT = ("IV-A", "III", "undetermined")  # with black letters
_PANELS = (
    ("train_loss", "training loss", 1, "Blues"),
    ("val_acc", "validation accuracy, %", 100, "Blues"),
    ("trace", "trace of the Hessian", 1, "Blues"),
    ("mc", "mode connectivity, points", 1, "RdBu"),
    ("line", "the same on the straight line", 1, "RdBu"),
    ("cka", "CKA of the seeds", 1, "Blues"),
    ("delta_epochs", "gain of averaging epochs, points", 100, "RdBu"),
    ("delta_seeds", "gain of averaging seeds, points", 100, "RdBu"),
)


def zoo_pictures(zoo: "Zoo") -> list[Picture]:
    """The phase diagram, and a map of each figure."""
    pictures: list[Picture] = []
    hot, loaded = len(zoo.file.temperature.values), len(zoo.file.load.values)
    width, height = max(2.2 + 0.75 * loaded, 3.6), max(1.2 + 0.55 * hot, 2.6)
    with new_figure(width, height, pictures, "phases", "Phases over the grid.") as figure:
        axes = figure.subplots()
        for number, cell in enumerate(zoo.cells):
            row, column = divmod(number, loaded)
            box = axes.inset_axes((column - 0.5, row - 0.5, 1, 1), transform=axes.transData)
            box.set(facecolor=_COLOURS[cell.phase], xticks=[], yticks=[])
            for spine in box.spines.values():
                spine.set(color="white", linewidth=2, visible=True)
            colour = BLACK if cell.phase in _LIGHT else "white"
            text = {"ha": "center", "va": "center", "color": colour, "transform": box.transAxes}
            box.text(0.5, 0.62, "?" if cell.phase == "undetermined" else cell.phase, fontsize=9, **text)
            accuracy = cell.mean("val_acc")
            box.text(0.5, 0.28, f"{100 * accuracy:.0f} %" if math.isfinite(accuracy) else "–", fontsize=7, **text)
        axes.set(xlim=(-0.5, loaded - 0.5), ylim=(hot - 0.5, -0.5))
        _label(axes, zoo)
    width, height = max(7.2, 4 * (0.6 + 0.32 * loaded)), 1.0 + 2 * (0.9 + 0.28 * hot)
    with new_figure(width, height, pictures, "measures", "What was measured.") as figure:
        panels = figure.subplots(2, 4).flat
        for axes, (name, title, scale, colours) in zip(panels, _PANELS, strict=True):
            rows = [[scale * cell.mean(name) for cell in zoo.cells[i * loaded : (i + 1) * loaded]] for i in range(hot)]
            _map(axes, rows, colours)
            axes.set_title(title, fontsize=7)
            _label(axes, zoo, small=True)
    return pictures


def _label(axes: "Axes", zoo: "Zoo", small: bool = False) -> None:
    size = 6 if small else 8
    for set_ticks, axis in ((axes.set_xticks, zoo.file.load), (axes.set_yticks, zoo.file.temperature)):
        labels = distinct([_text(value) for value in axis.values], _LETTERS)
        set_ticks(range(len(axis.values)), labels, fontsize=size)
        if small and set_ticks == axes.set_xticks and max(map(len, labels)) > _LETTERS // 2:
            axes.tick_params("x", rotation=90)
    axes.tick_params(length=0)
    if not small:
        width, height = axes.figure.get_size_inches()
        for set_label, side, axis, inches in (
            (axes.set_xlabel, "load", zoo.file.load, width),
            (axes.set_ylabel, "temperature", zoo.file.temperature, height),
        ):
            whole = f"{side}: {axis.option}"
            set_label(whole if len(whole) <= 12 * inches else f"{side}: {short(axis.name)}")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text(value: Any) -> str:
    if isinstance(value, float) and len(str(value)) > _LETTERS:
        return f"{value:g}"
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, default=str)


def _map(axes: "Axes", rows: list[list[float]], colours: str) -> None:
    from matplotlib.colors import LogNorm, Normalize

    known = [value for row in rows for value in row if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if colours == "RdBu":  # red is below zero
        top = max(abs(low), abs(high)) or 1.0
        norm = Normalize(-top, top)
    else:
        norm = LogNorm(low, high) if low > 0 and high > 30 * low else Normalize(min(0.0, low), high or 1.0)
    axes.imshow(rows, cmap=colours, norm=norm, aspect="auto", alpha=0.9)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if not math.isfinite(value):
                axes.text(j, i, "–", ha="center", va="center", fontsize=6, color=BLACK)
            else:
                dark = norm(value) > 0.6 if colours == "Blues" else not 0.2 < norm(value) < 0.8
                told = (
                    f"{value:.0f}"
                    if abs(value) >= 10
                    else f"{value:.2g}"
                    if abs(value) >= 0.01 or not value
                    else f"{value:.0e}"
                )
                axes.text(j, i, told, ha="center", va="center", fontsize=6, color="white" if dark else BLACK)
