"""The report's choices, words and files."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_soup.errors import LightningSoupError, UnwritableOutput
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.runs.report import Entry, SoupReport
from lightning_soup.runs.report_json import numbers, trials
from tests.helpers.reports import SIZES, entries, fake_report, soup, trial

TARGETS = torch.zeros(200, dtype=torch.long)


def model(label, kind, right, score=None, **options):
    """A model that has the first `right` of 200 images right."""
    logits = torch.zeros(200, 2)
    logits[:right, 0] = 1.0
    logits[right:, 1] = 1.0
    return Entry(label, kind, {"test": Outcome(logits, TARGETS)}, score, **options)


@pytest.fixture(scope="module")
def report():
    return fake_report()


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "made" / "on the way"
    assert report.write(folder) == folder / "report.html"
    return folder


def test_the_best_single_is_chosen_on_validation_not_on_test():
    lucky = model("lucky on test", "ingredient", 190, 0.80)
    chosen = model("best on validation", "ingredient", 150, 0.90)
    report = SoupReport("t", [lucky, chosen, model("soup", "soup", 170, 0.91)])
    assert report.best_single is chosen
    gains = {row["label"]: row["tests"]["test"].get("gain") for row in report.rows()}
    assert gains == {
        "mean of the 2 ingredients": pytest.approx(10.0),
        "best single (best on validation)": None,
        "soup": pytest.approx(10.0),
    }


def test_the_soup_of_the_headline_is_chosen_on_validation_too():
    ingredient = model("run", "ingredient", 150, 0.9)
    soups = [model("lucky on test", "soup", 190, 0.90), model("chosen", "soup", 120, 0.95)]
    report = SoupReport("t", [ingredient, *soups])
    assert report.best_soup.label == "chosen"
    assert report.headline == (
        "The soup chosen on validation (chosen, of 2) against the single ingredient chosen on validation (run, of 1): "
        "on test it loses 15.0 points (60.0 % against 75.0 %; 95 % interval of the gain "
        f"{report.comparisons[3].tests['test'].gain_texts[1]} to {report.comparisons[3].tests['test'].gain_texts[2]})."
    )


def test_equal_scores_go_to_the_first():
    pair = [model("a", "ingredient", 150, 0.9), model("b", "ingredient", 160, 0.9)]
    assert SoupReport("t", [*pair, model("s", "soup", 150)]).best_single.label == "a"


@pytest.mark.parametrize(
    ("soups", "start"),
    [
        ([("s", None)], "The soup (s) against"),
        ([("s", None), ("t", None)], "The first of 2 soups (s; none has a score on validation) against"),
        ([("s", None), ("t", 0.1)], "The soup chosen on validation (t, of 2) against"),
    ],
)
def test_the_headline_says_how_the_soup_was_chosen(soups, start):
    made = [model(label, "soup", 150, score) for label, score in soups]
    assert SoupReport("t", [model("run", "ingredient", 150, 0.9), *made]).headline.startswith(start)


def test_a_gain_is_called_a_gain_and_noise_noise():
    def headline(right):
        return SoupReport("t", [model("run", "ingredient", 150, 0.9), model("s", "soup", right, 0.9)]).headline

    assert "on test it gains 10.0 points (85.0 % against 75.0 %" in headline(170)
    assert "it is not distinguishable from the best single at 95 %: only 2 images differ (gain +1.0" in headline(152)
    assert "it gains" not in headline(152)


def test_rows_come_in_order_and_cost_is_counted(report):
    assert [(row.kind, row.forward_passes) for row in report.comparisons] == [
        ("mean", 1), ("best", 1), ("soup", 1), ("soup", 1), ("soup", 1), ("soup", 1), ("ensemble", 8), ("init", 1)
    ]  # fmt: skip


def test_ensemble_of_some_ingredients_costs_what_it_says():
    made = [model("run", "ingredient", 150, 0.9)] * 5
    few = model("greedy ensemble", "ensemble", 150, forward_passes=3)
    report = SoupReport("t", [*made, model("s", "soup", 150), few])
    assert report.comparisons[-1].forward_passes == 3


def test_mean_of_the_ingredients_is_their_mean(report):
    ingredients = report.of_kind("ingredient")
    for name in SIZES:
        mean = sum(entry.outcomes[name].accuracy for entry in ingredients) / 8
        assert report.comparisons[0].tests[name].accuracy.mean == pytest.approx(100 * mean)
    assert report.comparisons[0].selection_score == pytest.approx(sum(e.selection_score for e in ingredients) / 8)


def test_a_min_metric_is_shown_as_it_is():
    report = fake_report(mode="min")
    losses = [row.selection_score for row in report.comparisons]
    assert all(loss > 0 for loss in losses)
    assert losses[1] == min(-e.selection_score for e in report.of_kind("ingredient"))


def test_rows_repeat_to_the_digit():
    assert fake_report().rows() == fake_report().rows()


def test_grouped_test_sets_have_wider_intervals():
    def width(groups):
        made = [
            replace(e, outcomes={n: replace(o, groups=groups) for n, o in e.outcomes.items()})
            for e in (model("run", "ingredient", 100, 0.9), model("s", "soup", 150, 0.9))
        ]
        gain = SoupReport("t", made).comparisons[2].tests["test"].gain
        return gain.high - gain.low

    assert width(torch.arange(200) // 10) > 1.5 * width(None)


def test_table_is_plain_text_whatever_the_labels_hold():
    report = SoupReport("[red]t", [model("[bold]run[/nothing]", "ingredient", 150, 0.9), model("s", "soup", 150, 0.9)])
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    console.file.close()
    assert "best single ([bold]run[/nothing])" in text
    assert "75.0 [68.6, 80.5]" in text
    assert "0.0 [0.0, 0.0] ≈" in text


def test_write_gives_html_pictures_and_numbers(folder):
    pictures = ["robustness", "gains", "history", "coefficients", "coefficients-by-tensor"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["report.html", "report.json", *(f"{name}.png" for name in pictures)]
    )
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_json_holds_all_numbers(folder, report):
    content = json.loads((folder / "report.json").read_text())
    assert content["rows"] == json.loads(json.dumps(report.rows()))
    assert content["headline"] == report.headline
    assert content["test_sizes"] == SIZES
    assert len(content["ingredients"]) == 8
    assert content["ingredients"][3]["digest"] == f"xxh3-128:{3:032x}"
    assert content["ingredients"][3]["hparams"]["epochs"] == 24
    assert [point["alpha"] for point in content["curve_points"]] == [a / 10 for a in range(11)]
    uniform, greedy, learned, wise = content["soups"]
    assert uniform["coefficients"] == [0.125] * 8
    assert greedy["history"][1] == {
        "trial": 2, "label": "run-1-lr1.2e-03", "score": 0.952, "kept": False, "reason": "0.9550 → 0.9520",
        "values": {"distance": pytest.approx(0.21)},
    }  # fmt: skip
    assert list(learned["coefficients"]) == ["cls_token", "blocks.0.attn.weight", "blocks.1.attn.weight", "head.weight"]
    assert wise["ingredients"] == ["pre-trained on MNIST", "uniform soup"]
    assert "torch" in content["versions"]


def test_json_is_strict_and_plain():
    strange = {"lr": math.nan, "model": torch.nn.Identity(), "size": (1, 2)}
    made = model("run", "ingredient", 150, 0.9, hparams=strange)
    text = numbers(SoupReport("t", [made, model("s", "soup", 150, 0.9)]))
    assert "NaN" not in text
    hparams = json.loads(text)["ingredients"][0]["hparams"]
    assert hparams == {"lr": None, "model": "Identity()", "size": [1, 2]}


def test_min_mode_history_is_natural_in_json():
    made = soup("GreedySoup", ["a", "b"], (0.5, 0.5), -0.04, [trial("a", -0.05)], mode="min")
    assert trials(made)[0]["score"] == 0.05


def test_a_second_write_replaces_the_first(report, folder):
    (folder / "report.html").write_text("old")
    report.write(folder)
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_nothing_half_written_when_the_folder_is_in_the_way(report, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UnwritableOutput, match="file"):
        report.write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_half_written_on_a_full_disk(report, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if "report.html" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UnwritableOutput, match="disk is full"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([model("s", "soup", 1, 0.9)], "at least one entry of kind 'ingredient'"),
        ([model("a", "ingredient", 1, 0.9)], "at least one entry of kind 'soup'"),
        ([model("a", "ingredient", 1), model("s", "soup", 1)], "'a' has the selection score None.*val_acc on val"),
        ([model("a", "ingredient", 1, 0.9), model("s", "soup", 1, math.nan)], "'s' has the selection score nan"),
        ([model("a", "ingredient", 1, 0.9), model("s", "soup", 1), model("c", "interpolation", 1)], "'c' has no alpha"),
        (
            [model("a", "ingredient", 1, 0.9), replace(model("s", "soup", 1), outcomes={})],
            r"'s' was measured on the test sets \[\], 'a' on \['test'\]",
        ),
        (
            [
                model("a", "ingredient", 1, 0.9),
                Entry("s", "soup", {"test": Outcome(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))}),
            ],
            r"'s' and 'a' have different targets on 'test' \(3 and 200 images\).*shuffle=False",
        ),
    ],
)
def test_entries_that_cannot_be_compared(made, message):
    with pytest.raises(LightningSoupError, match=message):
        SoupReport("t", made)


def test_entries_of_the_helper_have_the_shape_of_the_demo():
    kinds = [entry.kind for entry in entries()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "init": 1, "ingredient": 8, "soup": 4, "interpolation": 11, "ensemble": 1
    }  # fmt: skip
