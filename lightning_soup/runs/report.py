"""The honest report of a soup: chosen on the selection split, measured on the test sets, with intervals."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.runs.comparison import Comparison, Row, compare
from lightning_soup.weights.atomic import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_soup.recipes.recipe import Soup
    from lightning_soup.runs.figures import Picture

__all__ = ["Entry", "SoupReport"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of the report and what is known of it.

    Args:
        label: Name shown in tables and pictures.
        kind: What it is: the shared start, an ingredient, a soup, the logit ensemble of the ingredients, or a
            point of a WiSE-FT curve (points with one label form one curve).
        outcomes: Test set to outcome, the same sets in every entry. The first is the main test set, the
            others are shifted.
        selection_score: Score on the selection split, *higher is better* (the negated value of a ``min``
            metric). Every ingredient needs one: the best single ingredient is chosen by it.
        alpha: Place on the curve, for points of a curve only.
        soup: What the recipe returned, for its history and coefficients; soups only.
        path: Where the soup was saved; soups only.
        hparams: Hyperparameters of an ingredient's run; the report shows those that differ.
        digest: Content hash of an ingredient's weights.
        forward_passes: Cost per image; by default the number of ingredients for the ensemble, else 1.
    """

    label: str
    kind: Literal["init", "ingredient", "soup", "ensemble", "interpolation"]
    outcomes: Mapping[str, Outcome]
    selection_score: float | None = None
    alpha: float | None = None
    soup: "Soup | None" = None
    path: Path | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None
    forward_passes: int | None = None


@dataclass(frozen=True, eq=False)
class SoupReport:
    """Compares soups with the best single ingredient and says how sure the difference is.

    What is *chosen* (the best single ingredient, the soup of the headline) is chosen by the selection score;
    what is *reported* comes from test sets that chose nothing. Gains carry the paired bootstrap's 95 %
    interval.

    Args:
        title: Heading of the report.
        entries: The models: at least one ingredient and one soup.
        metric: Name of the selection metric.
        mode: Whether the metric is best when large or small.
        selection_split: Name of the split the selection scores come from.
        notes: Remarks printed under the table.
        commands: How to make this report again, one shell command each.
        samples: Resamples of the bootstrap.

    Raises:
        LightningSoupError: Entries that cannot be compared: no ingredient or soup, a missing or NaN selection
            score, other test sets or targets than the first entry's.
    """

    title: str
    entries: Sequence[Entry]
    metric: str = "val_acc"
    mode: Literal["max", "min"] = "max"
    selection_split: str = "validation"
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    samples: int = 2000

    def __post_init__(self) -> None:
        for kind in ("ingredient", "soup"):
            if not self.of_kind(kind):
                raise LightningSoupError(f"A report needs at least one entry of kind {kind!r}; got none.")
        for entry in self.entries:
            _check_same_tests(entry, self.entries[0])
            missing = entry.selection_score is None and entry.kind == "ingredient"
            if missing or (entry.selection_score is not None and math.isnan(entry.selection_score)):
                raise LightningSoupError(
                    f"{entry.label!r} has the selection score {entry.selection_score}, so the best single "
                    f"ingredient cannot be chosen. Give every ingredient its {self.metric} on "
                    f"{self.selection_split}; test sets must not choose."
                )
            if entry.kind == "interpolation" and entry.alpha is None:
                raise LightningSoupError(f"The curve point {entry.label!r} has no alpha.")

    def of_kind(self, kind: str) -> list[Entry]:
        """The entries of one kind, in the order given."""
        return [entry for entry in self.entries if entry.kind == kind]

    @property
    def test_names(self) -> list[str]:
        """The test sets: the main one, then the shifted ones."""
        return list(self.entries[0].outcomes)

    @cached_property
    def best_single(self) -> Entry:
        """The ingredient with the best selection score; of equal ones the first."""
        return max(self.of_kind("ingredient"), key=lambda entry: entry.selection_score)

    @cached_property
    def best_soup(self) -> Entry:
        """The soup with the best selection score; of equal ones, or when none has a score, the first."""
        return max(self.of_kind("soup"), key=lambda entry: _or_lowest(entry.selection_score))

    def natural(self, score: float | None) -> float | None:
        """A score as the metric itself gives it: a ``min`` metric was negated at the border."""
        return -score if self.mode == "min" and score is not None else score

    @cached_property
    def comparisons(self) -> list[Row]:
        """The table: mean ingredient, best single, each soup, the ensemble, the init."""
        ingredients = self.of_kind("ingredient")
        mean = {
            name: torch.stack([e.outcomes[name].correct.double() for e in ingredients]).mean(0)
            for name in self.test_names
        }
        scores = [self.natural(entry.selection_score) for entry in ingredients]
        nll = {name: _mean([e.outcomes[name].nll for e in ingredients]) for name in self.test_names}
        label = f"mean of the {len(ingredients)} ingredients"
        rows = [Row(label, "mean", 1, _mean(scores), self._compare(mean), nll)]
        named = [e for kind in ("soup", "ensemble", "init") for e in self.of_kind(kind)]
        return [*rows, *(self.row(entry) for entry in (self.best_single, *named))]

    def row(self, entry: Entry) -> Row:
        """An entry's accuracies and gains."""
        kind, label, passes = entry.kind, entry.label, entry.forward_passes
        if entry is self.best_single:
            kind, label = "best", f"best single ({label})"
        if passes is None:
            passes = len(self.of_kind("ingredient")) if kind == "ensemble" else 1
        tests = self._compare({name: outcome.correct for name, outcome in entry.outcomes.items()}, entry)
        nll = {name: outcome.nll for name, outcome in entry.outcomes.items()}
        return Row(label, kind, passes, self.natural(entry.selection_score), tests, nll)

    def _compare(self, correct: Mapping[str, Tensor], entry: Entry | None = None) -> dict[str, Comparison]:
        tests = {}
        for name, best in self.best_single.outcomes.items():
            reference = None if entry is self.best_single else best.correct
            tests[name] = compare(correct[name], reference, best.groups, samples=self.samples)
        return tests

    def rows(self) -> list[dict]:
        """The table as plain values: accuracies in percent, gains in percentage points."""
        return [row.plain() for row in self.comparisons]

    @cached_property
    def findings(self) -> list[str]:
        """What the headline's soup gains or loses on each test set, one clause each."""
        soup, best = self.row(self.best_soup), self.row(self.best_single)
        clauses = []
        for name, c in soup.tests.items():
            mean, low, high = c.gain_texts
            ours, theirs = (f"{x.accuracy.mean:.{c.digits}f} %" for x in (c, best.tests[name]))
            numbers = f"{ours} against {theirs}; 95 % interval of the gain {low} to {high}"
            if c.distinguishable:
                verb = "gains" if c.gain.mean > 0 else "loses"
                clauses.append(f"on {name} it {verb} {mean[1:]} points ({numbers})")
            else:
                clauses.append(f"on {name} it is {c.verdict} (gain {mean} points, {numbers})")
        return clauses

    @property
    def claim(self) -> str:
        """Who is compared with whom, and how both were chosen."""
        split, soups = self.selection_split, self.of_kind("soup")
        soup, best = self.best_soup.label, self.best_single.label
        if len(soups) == 1:
            chosen = f"The soup ({soup})"
        elif self.best_soup.selection_score is None:
            chosen = f"The first of {len(soups)} soups ({soup}; none has a score on {split})"
        else:
            chosen = f"The soup chosen on {split} ({soup}, of {len(soups)})"
        count = len(self.of_kind("ingredient"))
        return f"{chosen} against the single ingredient chosen on {split} ({best}, of {count})"

    @property
    def headline(self) -> str:
        """The report in one sentence."""
        return f"{self.claim}: {'; '.join(self.findings)}."

    @cached_property
    def pictures(self) -> "list[Picture]":
        """The pictures as PNG, with captions."""
        from lightning_soup.runs.figures import draw

        return draw(self)

    def table(self) -> "Table":
        """The comparison as a rich table: accuracy, gain over the best single, and whether that is sure."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.title),
            caption=f"accuracy in % and gain over the best single in points, 95 % intervals; ≈ not "
            f"distinguishable from the best single; best single chosen on {self.selection_split}",
        )
        for heading in ("model", "passes", *self.test_names):
            table.add_column(Text(heading), justify="right" if heading == "passes" else "left")
        for row in self.comparisons:
            cells = [
                f"{c.accuracy_text}\n{c.gain_text}{' ≈' if c.gain and not c.distinguishable else ''}"
                for c in row.tests.values()
            ]
            table.add_row(*(Text(cell) for cell in (row.label, str(row.forward_passes), *cells)))
        return table

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html`` (self-contained), its pictures as PNG, and ``report.json``; return the HTML.

        Everything is rendered before the first byte is written, and each file appears whole or not at all.

        Raises:
            UnwritableOutput: The folder cannot be made or written to.
        """
        from lightning_soup.runs.report_html import render
        from lightning_soup.runs.report_json import numbers

        files = {f"{picture.name}.png": picture.png for picture in self.pictures}
        files["report.json"] = numbers(self).encode()
        files["report.html"] = render(self).encode()
        with ExitStack() as pending:  # every file is complete beside its place before the first takes it
            for name, content in files.items():
                path = Path(folder) / name
                pending.enter_context(atomic_path(path, size=len(content))).write_bytes(content)
        return Path(folder) / "report.html"


def _check_same_tests(entry: Entry, first: Entry) -> None:
    if list(entry.outcomes) != list(first.outcomes) or not entry.outcomes:
        raise LightningSoupError(
            f"{entry.label!r} was measured on the test sets {list(entry.outcomes)}, {first.label!r} on "
            f"{list(first.outcomes)}. Every entry needs an outcome on the same sets, in the same order."
        )
    for name, outcome in entry.outcomes.items():
        if not torch.equal(outcome.targets, first.outcomes[name].targets):
            raise LightningSoupError(
                f"{entry.label!r} and {first.label!r} have different targets on {name!r} "
                f"({len(outcome.targets)} and {len(first.outcomes[name].targets)} images). Measure every "
                f"entry on the same images in the same order (shuffle=False)."
            )


def _or_lowest(score: float | None) -> float:
    return -math.inf if score is None else score


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
