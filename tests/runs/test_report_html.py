"""The page: self-contained, escaped, complete, whatever the report holds."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lightning_soup.runs import report_html
from lightning_soup.runs.report import SoupReport
from tests.helpers.reports import entries, fake_report, trial

EVIL = '<script>alert("x")</script> & $\\frac{{1}}{{2}}$ [bold]{}_{:.1e}/checkpoints/' + "long" * 40 + ".ckpt"
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every element closed in order; what is loaded and every text collected."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads, self.texts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def checked(report):
    page = report_html.render(report)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def page():
    return checked(fake_report())


def test_nothing_is_loaded_from_elsewhere(page):
    assert len(page.loads) == 5
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_sections_and_numbers_are_there(page):
    text = "\n".join(page.texts)
    for expected in (
        "The soup chosen on validation (greedy soup, of 4)",
        "uci_test (630 images), corrupted (3,780 images), mnist (1,000 images)",
        "not distinguishable from the best single at 95\u00a0%",
        "better than the best single",
        "logit ensemble",
        "0.9550 → 0.9520",
        "optimizer.lr=0.0012, epochs=24",
        f"xxh3-128:{7:032x}",
        "lightning-soup demo --seed 0\nlightning-soup recook out/uniform.safetensors",
        "corrupted: six corruptions of every test image.",
        "Made with python",
    ):
        assert expected in text, expected
    assert "weight_decay" not in text  # equal in all runs
    assert page.tags.count("h3") == 4


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in report_html.STYLE


def test_labels_are_text_not_markup():
    report = fake_report(label=EVIL, mode="min")
    evil = replace(report, title="<b>", notes=["<i>"], commands=["soup --x '<u>'  --p 5 %"])
    checker = checked(evil)
    assert not {"script", "b>", "i", "u"} & set(checker.tags)
    text = "".join(checker.texts)
    assert '<script>alert("x")</script> & $\\frac{1}{2}$ [bold]0_8.0e-04/checkpoints/' in text
    assert "soup --x '<u>'  --p 5 %" in text  # commands are to be copied: no fine typography
    assert "0.0480" in text  # the loss of the best ingredient, not its negative
    assert "-0.0480" not in text


@pytest.mark.parametrize(
    "options",
    [
        {"tests": ["uci_test"], "k": 2, "init": False, "curve": False},
        {"tests": ["uci_test", "mnist"], "k": 1, "curve": False},
        pytest.param(
            {"tests": [f"shift {i}" for i in range(7)], "k": 60, "init": False, "curve": False}, marks=pytest.mark.slow
        ),
    ],
    ids=["one test set, two ingredients", "one shifted set, one ingredient", "seven test sets, sixty ingredients"],
)
def test_any_number_of_test_sets_and_ingredients(options):
    checker = checked(fake_report(**options))
    text = "".join(checker.texts)
    assert ("mean of shifted sets" in text) is (len(options["tests"]) > 2)
    assert f"mean of the {options['k']} ingredients" in text


def test_bare_soups_without_recipe_history_or_file():
    bare = [replace(e, soup=None, path=None) for e in entries(k=2, tests=["uci_test"], init=False, curve=False)]
    checker = checked(SoupReport("t", bare))
    assert "Reproduce" not in "".join(checker.texts)
    assert len(checker.loads) == 1  # gains


def test_long_histories_are_folded_and_cut():
    made = entries(k=2, tests=["uci_test"], init=False, curve=False)
    steps = [trial(f"step {i}", 0.9 + i / 1e5) for i in range(1000)]
    made = [
        replace(e, soup=replace(e.soup, history=tuple(steps), notes=("a duplicate",))) if e.kind == "soup" else e
        for e in made
    ]
    page = report_html.render(SoupReport("t", made))
    assert page.count("<details><summary>1000 trials</summary>") == 3
    assert "step 399" in page
    assert "step 400" not in page
    assert "600 more in report.json" in page
    assert page.count("<li>a duplicate</li>") == 3


def test_empty_columns_are_left_out(page):
    heads = re.findall(r"<th>(.*?)</th>", report_html._table(["a", "b"], [["1", ""], ["2", ""]]))
    assert heads == ["a"]
