"""Pictures of continual runs: what is drawn where, and that it can be read with any number and names of tasks."""

import io
import random
import warnings
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lightning_soup.runs.continual import ContinualResult
from lightning_soup.runs.figures_continual import draw_continual
from tests.helpers.pictures import figures_kept

COUNTS = [1, 2, 5, 11, pytest.param(20, marks=pytest.mark.slow)]
LONG = tuple(f"/data/collections/with-a-very-long-name/of-the-year-{i}/and-some-images-in-it" for i in range(11))
WIDE = tuple(f"{letter}-FGVC-AIRCRAFT-MANUFACTURERS-AND-MODELS" for letter in "MWABCDEFGHI")


def result(names, value=None):
    """A run with made-up accuracies: zero-shot below 80, trained ones above 85; or the same everywhere."""
    draw = random.Random(3)
    zero = {name: value or draw.uniform(1, 80) for name in names}
    matrix = {
        row: {
            column: value or (draw.uniform(85, 100) if number <= i else zero[column] * draw.uniform(0.7, 1))
            for number, column in enumerate(names)
        }
        for i, row in enumerate(names)
    }
    return ContinualResult(Path("."), tuple(names), {}, zero, matrix)


def tasks(count):
    return tuple(f"task {i}" for i in range(count))


@cache
def draw(names, value=None):
    """The run, its pictures and their figures by name, with everything in its place. Drawn once: it takes a second."""
    run = result(names, value)
    with figures_kept() as kept:
        pictures = draw_continual(run)
    for figure in kept:
        figure.draw_without_rendering()  # in the resolution that sizes are asked in
    return run, pictures, {picture.name: figure for picture, figure in zip(pictures, kept, strict=True)}


def overlapping(texts):
    """Pairs of texts that cover each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)]


@pytest.mark.parametrize("count", COUNTS)
def test_the_heat_map_shows_every_cell_and_frames_what_was_just_trained(count):
    run, _, figures = draw(tasks(count))
    axis = figures["heatmap"].axes[0]
    written = {tuple(map(round, text.get_position())): text.get_text() for text in axis.texts}
    rows = [run.zero_shot, *run.matrix.values()]
    assert written == {(x, y): f"{row[n]:.1f}" for y, row in enumerate(rows) for x, n in enumerate(run.names)}
    assert np.allclose(axis.images[0].get_array(), [[row[name] for name in run.names] for row in rows])
    assert (axis.images[0].norm.vmin, axis.images[0].norm.vmax) == (0, 100)
    middles = {tuple(map(round, patch.get_center())) for patch in axis.patches}
    assert middles == {(number, number + 1) for number in range(count)}


@pytest.mark.parametrize("count", COUNTS)
def test_numbers_stay_within_their_cells(count):
    axis = draw(tasks(count), value=100.0)[2]["heatmap"].axes[0]
    cells = axis.get_window_extent()
    width, height = cells.width / count, cells.height / (count + 1)
    for text in axis.texts:
        box = text.get_window_extent()
        assert text.get_text() == "100.0"
        assert box.width < 0.95 * width
        assert box.height < 0.6 * height


@pytest.mark.parametrize(("names", "value"), [(tasks(5), None), (tasks(2), 0.01), (tasks(2), 100.0)])
def test_numbers_and_frames_stand_out_from_the_colour_behind_them(names, value):
    axis = draw(names, value)[2]["heatmap"].axes[0]
    image = axis.images[0]
    for text in axis.texts:
        x, y = map(round, text.get_position())
        behind = image.cmap(image.norm(image.get_array()[y, x]))[:3]
        assert contrast(text.get_color(), behind) > 3
    for number in range(len(names)):
        frames = [patch for patch in axis.patches if round(patch.get_center()[0]) == number]
        behind = image.cmap(image.norm(image.get_array()[number + 1, number]))[:3]
        assert max(contrast(patch.get_edgecolor()[:3], behind) for patch in frames) > 3
        assert max(contrast(patch.get_edgecolor()[:3], (1, 1, 1)) for patch in frames) > 3  # at the edge of the picture


def contrast(colour, other):
    """The contrast ratio of WCAG, from 1 to 21."""

    def luminance(one):
        channels = np.array(matplotlib.colors.to_rgb(one))
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("names", [LONG, WIDE, tasks(11), LONG[:2], ("W" * 60, "W" * 61)])
def test_labels_are_distinct_and_cover_nothing(names):
    _, _, figures = draw(names)
    heat = figures["heatmap"].axes[0]
    columns = [text.get_text() for text in heat.get_xticklabels()]
    assert len(set(columns)) == len(names)
    assert [text.get_text() for text in heat.get_yticklabels()] == ["zero-shot", *(f"after {c}" for c in columns)]
    assert not overlapping(heat.get_yticklabels())
    page = figures["heatmap"].bbox
    for text in (*heat.get_xticklabels(), *heat.get_yticklabels()):
        box = text.get_window_extent()
        assert page.x0 <= box.x0
        assert page.y0 <= box.y0
        assert box.x1 <= page.x1
    assert heat.get_window_extent().width > 0.5 * page.width  # the labels leave room for the matrix
    titles = [axis._left_title for axis in figures["curves"].axes]
    assert len({title.get_text() for title in titles}) == len(names)
    assert not overlapping(titles)
    assert all(title.get_window_extent().x1 <= figures["curves"].bbox.x1 for title in titles)


def test_names_that_only_differ_in_the_middle_keep_what_differs():
    heat = draw(LONG)[2]["heatmap"].axes[0]
    assert [text.get_text() for text in heat.get_xticklabels()] == [f"…{i}…" for i in range(11)]


@pytest.mark.parametrize("count", COUNTS)
def test_curves_are_hollow_until_the_task_is_trained(count):
    run, _, figures = draw(tasks(count))
    axes = figures["curves"].axes
    assert [axis.get_title(loc="left") for axis in axes] == list(run.names)
    for number, (axis, name) in enumerate(zip(axes, run.names, strict=True)):
        values = [run.zero_shot[name], *(row[name] for row in run.matrix.values())]
        dotted, whole, filled = axis.lines
        assert dotted.get_linestyle() == ":"
        assert set(dotted.get_ydata()) == {run.zero_shot[name]}
        assert list(whole.get_xdata()) == list(range(count + 1))
        assert list(whole.get_ydata()) == values
        assert whole.get_markerfacecolor() == "white"
        assert list(filled.get_xdata()) == list(range(number + 1, count + 1))
        assert list(filled.get_ydata()) == values[number + 1 :]
        assert filled.get_markerfacecolor() == filled.get_color() == whole.get_color()


@pytest.mark.parametrize("count", COUNTS)
def test_curves_count_whole_tasks_below_every_column(count):
    axes = draw(tasks(count))[2]["curves"].axes
    columns = min(3, count)
    for number, axis in enumerate(axes):
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2
        assert all(tick == round(tick) for tick in ticks)
        labels = [text for text in axis.get_xticklabels() if text.get_visible() and text.get_text()]
        assert bool(labels) == (number + columns >= count)
        assert not overlapping(labels)


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_stand_beside_those_of_the_start(count):
    run, _, figures = draw(tasks(count))
    axis = figures["metrics"].axes[0]
    keys = ["transfer", "average", "last"][count == 1 :]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["Transfer", "Avg", "Last"][count == 1 :]
    before, after = axis.containers
    assert [bar.get_height() for bar in before] == [getattr(run.zero_shot_metrics, key) for key in keys]
    assert [bar.get_height() for bar in after] == [getattr(run.metrics, key) for key in keys]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["zero-shot", "after training"]


@pytest.mark.parametrize("value", [0.01, 93.0, 100.0])
def test_the_legend_covers_no_number_of_the_metrics(value):
    figure = draw(tasks(2), value)[2]["metrics"]
    axis = figure.axes[0]
    legend = axis.get_legend().get_window_extent()
    assert len(axis.texts) == 6
    assert not any(legend.overlaps(text.get_window_extent()) for text in axis.texts)
    assert not overlapping(axis.texts)
    assert all(text.get_window_extent().y1 <= legend.y0 for text in axis.texts)
    assert legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("count", COUNTS)
def test_pictures_are_sharp_and_not_empty(count):
    _, pictures, _ = draw(tasks(count))
    assert [picture.name for picture in pictures] == ["heatmap", "curves", "metrics"]
    for picture in pictures:
        image = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
        assert image.shape[1] >= 720
        assert 0.005 < (image < 250).mean() < 0.95
        assert picture.caption.endswith(".")


def test_any_name_can_be_drawn_and_matplotlib_stays_as_it_was():
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_continual(result(["$\\frac{1}$", "two\nlines", "\u4e2d\u6587", "100% <b>"]))
    assert dict(matplotlib.rcParams) == before
