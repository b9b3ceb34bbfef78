"""Pictures of a zoo: the phases over temperature and load, and what was measured."""

import json
import math
from typing import TYPE_CHECKING, Any, get_args

from lightning_soup.landscape.phases import Phase
from lightning_soup.runs.figures import BLACK, FAINT, Picture, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_soup.runs.zoo import Zoo

__all__ = ["zoo_pictures"]

# From underfitted and too small to generalising; readable in grey too.
_COLOURS = dict(zip(get_args(Phase), ("#4a1486", "#807dba", "#fd8d3c", "#a1d99b", "#238b45", FAINT), strict=True))
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
    with new_figure(2.2 + 0.75 * loaded, 1.2 + 0.55 * hot, pictures, "phases", "Phases over the grid.") as figure:
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
    with new_figure(7.2, 1.0 + 2 * (0.9 + 0.28 * hot), pictures, "measures", "What was measured.") as figure:
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
        set_ticks(range(len(axis.values)), [_short(value) for value in axis.values], fontsize=size)
    axes.tick_params(length=0)
    if not small:
        axes.set_xlabel(f"load: {zoo.file.load.option}")
        axes.set_ylabel(f"temperature: {zoo.file.temperature.option}")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value)
    return text if len(text) <= 10 else f"{text[:9]}…"


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
            if math.isfinite(value):
                dark = norm(value) > 0.6 if colours == "Blues" else not 0.2 < norm(value) < 0.8
                told = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 0.01 else f"{value:.0e}"
                axes.text(j, i, told, ha="center", va="center", fontsize=6, color="white" if dark else BLACK)
