"""Pictures of an inspection: a tree and a heat map of distances, barriers, and the way to each network."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_soup.landscape.basins import Basins
from lightning_soup.landscape.inspection import Inspection
from lightning_soup.landscape.linkage import average_linkage
from lightning_soup.runs.figures import BLACK, BLUE, COLOURS, GREY, Picture, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["inspection_pictures"]

_WIDE = 30  # from this ratio on the scale is logarithmic
_NUMBERS = 14  # more networks than this, and numbers would not fit into their cells


def inspection_pictures(seen: Inspection, basins: Basins | None = None, alike: Tensor | None = None) -> list[Picture]:
    """All pictures that there is something to show in.

    Args:
        seen: What the weights said.
        basins: What validation said of those that are not hopeless by their weights.
        alike: CKA between their outputs, ``[K, K]``.
    """
    pictures: list[Picture] = []
    if seen.statistics is not None and len(seen.compared) > 1:
        _distances(seen, pictures)
    if basins is not None:
        names = [seen.labels[i] for i in seen.compared if i not in seen.broken]
        apart = {i for basin in basins.basins[1:] for i in basin}
        barriers = basins.barriers
        _matrix("barriers", "Barriers", barriers, names, apart, f"barrier in {basins.metric}", pictures)
        _ways(basins, names, pictures)
        if alike is not None:
            _matrix("cka", "CKA", alike, names, apart, "CKA of the outputs", pictures)
    return pictures


def _distances(seen: Inspection, pictures: list[Picture]) -> None:
    whole = [k for k, i in enumerate(seen.compared) if i not in seen.broken]
    matrix = seen.statistics.distances[whole][:, whole]
    names = [seen.labels[seen.compared[k]] for k in whole]
    marked = {n for n, k in enumerate(whole) if seen.compared[k] in seen.hopeless}
    if len(whole) < 2:
        return
    joins = average_linkage(matrix)
    order = list(joins[-1].members)
    side = 2.0 + 0.24 * len(names)
    caption = "Distances between the weights, and the tree that they make. Orange names are poor ingredients."
    with new_figure(min(side + 1.6, 7.2), min(side + 1.2, 7.2), pictures, "distances", caption) as figure:
        tree, map_ = figure.subplots(2, 1, height_ratios=[1, 3.2])
        place = {leaf: n for n, leaf in enumerate(order)}
        top: dict[tuple[int, ...], tuple[float, float]] = {(leaf,): (place[leaf], 0.0) for leaf in order}
        for join in joins:
            (x1, y1), (x2, y2) = top[join.left], top[join.right]
            tree.plot([x1, x1, x2, x2], [y1, join.height, join.height, y2], color=BLUE, linewidth=1)
            top[join.members] = ((x1 + x2) / 2, join.height)
        tree.set_xlim(-0.5, len(names) - 0.5)
        heights = [join.height for join in joins if join.height > 0]
        if heights and max(heights) > _WIDE * min(heights):
            tree.set_yscale("log")
            tree.set_ylim(bottom=min(heights) / 2)
            tree.yaxis.set_major_formatter("{x:g}")  # the style has no mathematical signs
        else:
            tree.set_ylim(bottom=0)
        tree.set_xticks([])
        tree.set_ylabel("distance")
        _heat(map_, matrix[order][:, order], [names[i] for i in order], {place[i] for i in marked}, "distance")


def _matrix(
    name: str, title: str, matrix: Tensor, names: Sequence[str], marked: set[int], label: str, pictures: list[Picture]
) -> None:
    side = 2.2 + 0.24 * len(names)
    caption = f"{title} of all pairs that were measured. Orange names lie outside the largest basin."
    with new_figure(min(side + 1.6, 7.2), min(side + 0.4, 6.4), pictures, name, caption) as figure:
        _heat(figure.subplots(), matrix, names, marked, label)


def _heat(axes: "Axes", matrix: Tensor, names: Sequence[str], marked: set[int], label: str) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = matrix.clone()
    values.fill_diagonal_(math.nan)
    values[~values.isfinite()] = math.nan
    known = values[values.isfinite() & (values > 0)]
    top = float(known.max()) if len(known) else 1.0
    wide = len(known) > 0 and top > _WIDE * float(known.min()) and not bool((values < 0).any())
    norm = LogNorm(float(known.min()), top) if wide else Normalize(0, top)
    image = axes.imshow(values.numpy(), cmap="Blues", aspect="equal", norm=norm)
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.8, format="{x:g}")
    shown = [short(name, 22) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90)
    axes.set_yticks(range(len(names)), shown)
    for i in marked:
        for tick in (axes.get_xticklabels()[i], axes.get_yticklabels()[i]):
            tick.set_color(COLOURS[0])
            tick.set_fontweight("bold")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(names) <= _NUMBERS:
        for i in range(len(names)):
            for j in range(len(names)):
                value = float(values[i, j])
                if math.isfinite(value):
                    dark = image.norm(value) > 0.55
                    axes.text(
                        j,
                        i,
                        f"{value:.1e}" if abs(value) >= 1e4 else f"{value:.2g}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else BLACK,
                    )


def _ways(basins: Basins, names: Sequence[str], pictures: list[Picture]) -> None:
    """From the best network to each other one, by way of the middle."""
    best = basins.order[0]
    caption = f"{basins.metric} on the way from the best network, {names[best]}, to each other one."
    main = set(basins.basins[0])
    with new_figure(7.2, 3.2, pictures, "ways", caption) as figure:
        axes = figure.subplots()
        for other in range(len(names)):
            middle = float(basins.middle[best, other])
            if other == best or other in basins.poor or not math.isfinite(middle):
                continue
            inside = other in main
            axes.plot(
                [0, 0.5, 1],
                [basins.q[best], middle, basins.q[other]],
                "o-" if inside else "s--",
                color=GREY if inside else COLOURS[other % len(COLOURS)],
                markersize=3,
                label=None if inside else short(names[other], 26),
            )
        axes.set_xticks([0, 0.5, 1], [short(names[best], 22), "the middle", "the other"])
        axes.set_ylabel(basins.metric)
        if len(basins.basins) > 1:
            axes.legend(title="outside its basin")
