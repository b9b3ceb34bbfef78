"""The pictures of a continual run: the matrix, each task over time, and the metrics."""

from typing import TYPE_CHECKING

from lightning_soup.runs.figures import BLACK, COLOURS, FAINT, GREY, MARKERS, Picture, distinct, new_figure

if TYPE_CHECKING:
    from lightning_soup.runs.continual import ContinualResult

__all__ = ["draw_continual"]


def draw_continual(result: "ContinualResult") -> list[Picture]:
    """Render the heat map, the curves and the metrics."""
    pictures: list[Picture] = []
    for painter in (_heatmap, _curves, _metrics):
        painter(result, pictures)
    return pictures


def _heatmap(result: "ContinualResult", pictures: list[Picture]) -> None:
    """The accuracies as colours and numbers; a frame around each cell whose task was just trained."""
    names, labels = result.names, distinct(result.names, 16)
    values = [[row[name] for name in names] for row in result.rows.values()]
    caption = (
        "Accuracy in % on every task (columns) after training the tasks one after the other (rows, from above). "
        "Framed: the task that was just trained. Right of the frames is zero-shot transfer, left of them memory."
    )
    cells = min(0.62 * len(names), max(5.6, 0.4 * len(names)))  # which must hold "100.0"
    with new_figure(max(3.6, 1.6 + cells), 1.3 + 0.36 * len(values), pictures, "heatmap", caption) as figure:
        axis = figure.subplots()
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        figure.colorbar(image, ax=axis, label="accuracy, %", fraction=0.05, pad=0.02)
        axis.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(values)), ["zero-shot", *(f"after {label}" for label in labels)])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if value < 60 else BLACK
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
        from matplotlib.patches import Rectangle

        for number in range(len(names)):
            for colour, linewidth in (("white", 3.4), (BLACK, 1.4)):  # seen on any colour, and at the edge
                place = (number - 0.47, number + 0.53)
                axis.add_patch(Rectangle(place, 0.94, 0.94, fill=False, edgecolor=colour, linewidth=linewidth))


def _curves(result: "ContinualResult", pictures: list[Picture]) -> None:
    """Each task's accuracy over the sequence: hollow before it was trained, filled from then on."""
    from matplotlib.ticker import MaxNLocator

    names, rows, titles = result.names, list(result.rows.values()), distinct(result.names, 24)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    caption = (
        "Accuracy in % on each task after every training (from left). Hollow: before the task itself was trained, "
        "which is transfer; filled: from then on. Dotted: the start, zero-shot."
    )
    with new_figure(7.2, 0.7 + 1.5 * lines, pictures, "curves", caption) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for number, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            values = [row[name] for row in rows]
            axis.axhline(values[0], color=GREY, linestyle=":", linewidth=0.9, zorder=0)
            axis.plot(range(len(values)), values, **look, markerfacecolor="white")
            axis.plot(range(number + 1, len(values)), values[number + 1 :], linestyle="", **look)
            axis.set_title(titles[number])
            axis.grid(axis="y", color=FAINT, linewidth=0.6)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if number + columns >= len(names):  # the lowest one of its column
                axis.tick_params(axis="x", labelbottom=True)
        for axis in axes.flat[len(names) :]:
            axis.remove()
        figure.supxlabel("tasks trained", fontsize=9)
        figure.supylabel("accuracy, %", fontsize=9)


def _metrics(result: "ContinualResult", pictures: list[Picture]) -> None:
    """Transfer, Avg and Last beside those of the start."""
    caption = (
        "Transfer (accuracy on tasks that were not trained yet), Avg (the whole matrix) and Last (after the last "
        "task), in %. Grey: the start, zero-shot."
    )
    keys = {"transfer": "Transfer", "average": "Avg", "last": "Last"}
    if len(result.names) == 1:  # no task comes before it
        del keys["transfer"]
    with new_figure(3.6, 2.6, pictures, "metrics", caption) as figure:
        axis = figure.subplots()
        for offset, metrics, colour, label in (
            (-0.2, result.zero_shot_metrics, GREY, "zero-shot"),
            (0.2, result.metrics, COLOURS[1], "after training"),
        ):
            values = [getattr(metrics, key) for key in keys]
            bars = axis.bar([x + offset for x in range(len(keys))], values, 0.38, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axis.set_xticks(range(len(keys)), list(keys.values()))
        axis.tick_params(axis="x", length=0)
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 108)
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
