"""Pictures: what is drawn where, and that any label can be drawn."""

import io
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lightning_soup.runs import figures, figures_comparison, figures_recipes
from lightning_soup.runs.figures import distinct, short
from lightning_soup.runs.report import SoupReport
from tests.helpers.pictures import figures_kept
from tests.helpers.reports import entries, fake_report


@pytest.fixture
def drawn():
    """The figures that were rendered, for a look at their artists."""
    with figures_kept() as kept:
        yield kept


def texts(figure):
    return {t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()}


def test_robustness_shows_every_kind_of_model(drawn):
    [picture] = figures_comparison.robustness(fake_report())
    [figure] = drawn
    assert len(figure.axes) == 6  # two shifted sets and their mean, all and enlarged
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == [
        "ingredients", "best single", "uniform soup", "greedy soup", "learned soup, per tensor", "WiSE-FT, α = 0.9",
        "logit ensemble", "pre-trained on MNIST", "WiSE-FT curve",
    ]  # fmt: skip
    assert {"0.1", "0.5", "0.9"} <= texts(figure)
    assert "WiSE-FT" in picture.caption
    report = fake_report()
    overview, enlarged = figure.axes[:2]
    init = report.of_kind("init")[0]
    x = 100 * init.outcomes["uci_test"].accuracy
    assert overview.get_xlim()[0] < x < enlarged.get_xlim()[0]
    for entry in report.of_kind("ingredient") + report.of_kind("soup"):
        low, high = enlarged.get_xlim()
        assert low < 100 * entry.outcomes["uci_test"].accuracy < high


def test_alpha_labels_cover_neither_each_other_nor_the_frame(drawn):
    figures_comparison.robustness(fake_report())
    drawn[0].draw_without_rendering()
    for axis in drawn[0].axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        frame = axis.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_robustness_without_init_needs_no_second_panel(drawn):
    figures_comparison.robustness(fake_report(init=False, curve=False))
    assert len(drawn[0].axes) == 3
    figures_comparison.robustness(fake_report(init=False, curve=False, tests=["uci_test", "mnist"]))
    assert len(drawn[1].axes) == 1


def test_no_picture_of_shift_without_a_shifted_set():
    assert figures_comparison.robustness(fake_report(tests=["uci_test"])) == []


def test_gains_fill_what_is_sure_and_point_at_what_is_far(drawn):
    report = fake_report()
    figures_comparison.gains(report)
    axis = drawn[0].axes[2]
    rows = [row for row in report.comparisons if row.kind != "best"]
    dots = {round(line.get_ydata()[0]): line for line in axis.lines if line.get_marker() == "o"}
    for y, row in enumerate(rows[:-1]):
        filled = dots[y].get_markerfacecolor() != "white"
        assert filled is row.tests["mnist"].distinguishable
    assert len(dots) == len(rows) - 1
    assert f"{rows[-1].tests['mnist'].gain_texts[0]} ▸" in texts(drawn[0])


def test_history_marks_kept_and_refused(drawn):
    figures_recipes.history(fake_report())
    greedy, learned, wise = drawn[0].axes
    refused, kept = (list(line.get_xdata()) for line in greedy.lines if line.get_marker() != "None")
    assert (kept, refused) == ([1, 3, 5, 7], [2, 4, 6, 8])
    best = next(line for line in greedy.lines if line.get_drawstyle() == "steps-post")
    assert list(best.get_ydata()) == [0.955, 0.955, 0.958, 0.958, 0.958, 0.958, 0.9611, 0.9611]
    assert learned.get_ylabel() == "loss"
    assert list(learned.lines[0].get_ydata()) == pytest.approx([0.4, 0.2, 0.4 / 3, 0.1, 0.08])
    assert wise.get_xlabel() == "α"
    others, chosen = (line for line in wise.lines if line.get_marker() != "None")
    assert others.get_markerfacecolor() == "white"
    assert list(chosen.get_xdata()) == [0.9]


def test_history_of_a_min_metric_goes_down(drawn):
    figures_recipes.history(fake_report(mode="min"))
    best = next(line for line in drawn[0].axes[0].lines if line.get_drawstyle() == "steps-post").get_ydata()
    assert list(best) == sorted(best, reverse=True)
    assert best[0] == pytest.approx(0.045)
    assert drawn[0].axes[0].get_ylabel() == "val_loss"


def test_coefficients_share_a_scale_and_rows(drawn):
    figures_recipes.coefficients(fake_report())
    axes = drawn[0].axes
    assert len({axis.get_xlim() for axis in axes}) == 1
    assert [len(axis.patches) for axis in axes] == [8, 8, 8, 2]
    assert axes[0].patches[0].get_width() == pytest.approx(1 / 8)
    labels = [t.get_text() for t in axes[0].get_yticklabels()]
    assert labels[-2:] == ["pre-trained on MNIST", "uniform soup"]


def test_negative_coefficients_have_their_own_colour(drawn):
    report = fake_report()
    figures_recipes.tensor_coefficients(report)
    learned = report.of_kind("soup")[2].soup
    learned.coefficients["cls_token"] = (-1.0, *learned.coefficients["cls_token"][1:])
    figures_recipes.tensor_coefficients(report)
    plain, diverging = (figure.axes[0].images[0] for figure in drawn)
    assert plain.norm.vmin == 0
    assert (diverging.norm.vmin, diverging.norm.vmax) == (-1, 1)


def test_pictures_are_sharp_and_not_empty():
    for picture in figures.draw(fake_report(k=3)):
        image = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
        assert image.shape[1] == 1440
        assert 0.005 < (image < 200).mean() < 0.5
        assert picture.caption.endswith(".")


def test_labels_with_dollars_newlines_and_unknown_scripts():
    made = "$\\frac{{1}}$\n{} \u4e2d\u6587 {}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures_recipes.history(fake_report(label=made, tests=["uci_test"]))


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures_comparison.gains(fake_report(tests=["uci_test"]))
    assert dict(matplotlib.rcParams) == before


def test_looks_are_distinct_for_many_soups():
    report = fake_report(tests=["uci_test"])
    soups = entries(tests=["uci_test"])[-2:-1] * 12
    made = [*report.entries, *(type(e)(e.label, "soup", e.outcomes) for e in soups)]
    many = SoupReport("t", made)
    looks = [figures.look_of(many, e) for e in many.of_kind("soup")]
    pairs = [(look["marker"], look["color"]) for look in looks]
    assert len(set(pairs)) == len(pairs) == 16


def test_short_keeps_both_ends():
    assert short("run-1") == "run-1"
    assert short("abcdefghij" * 5, 11) == "abcde…fghij"
    assert short("two\n lines") == "two lines"


def test_distinct_labels_stay_distinct():
    long = [f"{'x' * 40}/run-{i}/{'y' * 40}" for i in range(12)]
    assert distinct(long) == [f"…{i}…" for i in range(12)]
    assert distinct(["a", "b"]) == ["a", "b"]
    assert distinct(["same" * 20] * 2) == [short("same" * 20)] * 2
    assert len(set(distinct(["p" * 40, "p" * 41]))) == 2
