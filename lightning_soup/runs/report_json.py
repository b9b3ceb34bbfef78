"""The numbers of a report as strict JSON, for whoever wants to plot or compare them again."""

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soup.runs.report import Entry, SoupReport

__all__ = ["natural_score", "numbers", "plain", "trials", "versions"]


def numbers(report: "SoupReport") -> str:
    """Everything the report shows and what it leaves out for space; percent and percentage points."""
    ingredients = report.of_kind("ingredient")
    content = {
        "title": report.title,
        "headline": report.headline,
        "metric": report.metric,
        "mode": report.mode,
        "selection_split": report.selection_split,
        "confidence": 0.95,
        "bootstrap_samples": report.samples,
        "test_sizes": {name: len(o.targets) for name, o in report.entries[0].outcomes.items()},
        "best_single": report.best_single.label,
        "best_soup": report.best_soup.label,
        "rows": report.rows(),
        "ingredients": [
            {**report.row(e).plain(), "label": e.label, "hparams": e.hparams, "digest": e.digest} for e in ingredients
        ],
        "soups": [_soup(entry) for entry in report.of_kind("soup")],
        "curve_points": [{**report.row(e).plain(), "alpha": e.alpha} for e in report.of_kind("interpolation")],
        "notes": list(report.notes),
        "commands": list(report.commands),
        "versions": versions(),
    }
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def natural_score(soup: Any, score: float | None) -> float | None:
    """A score of a soup's history as its metric gives it: a ``min`` metric was negated at the border."""
    return -score if soup.mode == "min" and score is not None else score


def trials(soup: Any) -> list[dict]:
    """What a recipe tried, in order, with the scores as the metric gives them."""
    return [
        {
            "trial": number,
            "label": trial.label,
            "score": natural_score(soup, trial.score),
            "kept": trial.kept,
            "reason": trial.reason,
            "values": dict(trial.values),
        }
        for number, trial in enumerate(soup.history, 1)
    ]


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for package in ("lightning_soup", "torch", "lightning", "timm", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree, or without the optional package
            continue
    return found


def _soup(entry: "Entry") -> dict:
    row = {"label": entry.label, "path": entry.path}
    if entry.soup is None:
        return row
    soup = entry.soup
    return row | {
        "recipe": soup.recipe,
        "metric": soup.metric,
        "mode": soup.mode,
        "score": soup.natural_score,
        **({} if soup.third_score is None else {"third_score": natural_score(soup, soup.third_score)}),
        "ingredients": [ingredient.name for ingredient in soup.ingredients],
        "coefficients": soup.coefficients,
        "history": trials(soup),
    }


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts only; what JSON cannot say (NaN, infinity) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
