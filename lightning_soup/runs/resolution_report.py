"""What a search over image sizes is told as: a table, a picture, files, and entries in experiment trackers."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_soup.evaluation.resolution import ResolutionSearch
from lightning_soup.evaluation.resolution_table import Resolution, ResolutionChoice, SizeScore
from lightning_soup.evaluation.sized_images import HeldOut
from lightning_soup.runs.figures import BLUE, COLOURS, GREY, MARKERS, Picture, new_figure
from lightning_soup.runs.report_json import plain
from lightning_soup.runs.tracking import log_pictures
from lightning_soup.weights.atomic import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Tested", "log_resolution", "resolution_picture", "resolution_table", "test_scores", "write_resolution"]

Tested = Mapping[str, Mapping[Resolution, SizeScore]]


def test_scores(
    search: ResolutionSearch,
    found: ResolutionChoice,
    module: LightningModule,
    data: HeldOut,
    trainer: Trainer | None,
) -> Tested:
    """Each test set at the size that was chosen and at that of training: what may be reported, measured once.

    A test set that is called like a task has the choice of that task.
    """
    several = len(set(found.chosen.values())) > 1
    common = found.train if several else found.choice
    tested: dict[str, dict[Resolution, SizeScore]] = {}
    for candidate in dict.fromkeys([found.train, common, *found.chosen.values()]):
        for task, score in search.evaluate(module, data, candidate, trainer=trainer).items():
            if candidate in (found.train, found.chosen.get(task, common)):
                tested.setdefault(task, {})[candidate] = score
    return tested


def resolution_table(found: ResolutionChoice, tested: Tested | None = None) -> "Table":
    """A rich table: a row for each task and candidate."""
    from rich.table import Table

    share = found.metric != "nll"
    title = f"{found.metric} on {found.selection_split}, rule {found.rule}"
    table = Table("data", "size", f"{found.metric}{', %' if share else ''}", "tokens", "ms an image", "", title=title)
    for task, row in found.scores.items():
        for candidate in sorted(row, key=lambda one: row[one].tokens):
            score = row[candidate]
            notes = ["chosen"] if candidate == found.chosen[task] else []
            notes += ["training"] if candidate == found.train else []
            table.add_row(task, *_cells(candidate, score, share), ", ".join(notes))
        table.add_section()
    for task, row in (tested or {}).items():
        for candidate, score in row.items():
            table.add_row(
                f"{task} (test)", *_cells(candidate, score, share), "training" if candidate == found.train else "chosen"
            )
    return table


def _cells(candidate: Resolution, score: SizeScore, share: bool) -> list[str]:
    scale = 100 if share else 1
    error = "" if math.isnan(score.error) else f" ± {scale * score.error:.1f}"
    value = f"{scale * score.metric:.1f}" if share else f"{score.metric:.4f}"
    return [str(candidate), value + error, f"{score.tokens:.0f}", f"{1000 * score.seconds:.2f}"]


def resolution_picture(found: ResolutionChoice) -> Picture:
    """The metric with its standard error over the candidates, and their cost in tokens and time."""
    pictures: list[Picture] = []
    scale = 1 if found.metric == "nll" else 100
    caption = f"{found.metric} and cost over image size, on {found.selection_split}; ringed: chosen"
    with new_figure(7.2, 3.0, pictures, "resolution", caption) as figure:
        left, right = figure.subplots(1, 2)
        styles = cycle(zip((BLUE, *COLOURS), ("o", *MARKERS), strict=True))
        for (task, row), (colour, marker) in zip(found.scores.items(), styles, strict=False):
            order = sorted(row, key=lambda one: row[one].tokens)
            labels = [str(candidate) for candidate in order]
            values = [scale * row[one].metric for one in order]
            errors = [0 if math.isnan(row[one].error) else scale * row[one].error for one in order]
            left.errorbar(labels, values, errors, marker=marker, color=colour, capsize=2, label=task)
            place = order.index(found.chosen[task])
            left.plot([labels[place]], [values[place]], "o", markersize=13, markerfacecolor="none", color=colour)
            right.plot(labels, [1000 * row[one].seconds for one in order], marker=marker, color=colour, label=task)
        tokens = right.twinx()
        tokens.plot(labels, [row[one].tokens for one in order], color=GREY, linestyle="--", linewidth=1)
        tokens.set_ylabel("tokens (dashed)", color=GREY)
        if str(found.train) in labels:
            left.axvline(str(found.train), color=GREY, linestyle=":", linewidth=1)
        left.set(xlabel="size, pixels (dotted: training)", ylabel=found.metric + (", %" if scale == 100 else ""))
        right.set(xlabel="size, pixels", ylabel="ms an image", ylim=(0, None))
        for axis in (left, right):
            axis.tick_params(axis="x", labelrotation=30 if max(map(len, labels)) > 5 else 0)
        if len(found.scores) > 1:
            left.legend()
    return pictures[0]


def write_resolution(found: ResolutionChoice, tested: Tested, folder: Path) -> Path:
    """Write ``resolution.json`` and ``resolution.png``.

    Raises:
        UnwritableOutput: The folder cannot be written.
    """
    held = {**found.as_dict(), "test": _plain(tested)}
    with atomic_path(folder / "resolution.json") as temporary:
        temporary.write_text(json.dumps(plain(held), indent=1, allow_nan=False), encoding="utf-8")
    with atomic_path(folder / "resolution.png") as temporary:
        temporary.write_bytes(resolution_picture(found).png)
    return folder


def _plain(tested: Tested) -> dict[str, Any]:
    return {
        task: {str(candidate): {"metric": score.metric, "images": score.images} for candidate, score in row.items()}
        for task, row in tested.items()
    }


@rank_zero_only
def log_resolution(loggers: Iterable[Logger], found: ResolutionChoice, tested: Tested) -> None:
    """Log the metric of every candidate and of the test sets to all loggers, and the picture to W&B."""
    loggers = list(loggers)
    values = {
        f"resolution/{task}/{candidate}": score.metric
        for task, row in found.scores.items()
        for candidate, score in row.items()
    }
    values |= {
        f"resolution/test/{task}/{candidate}": score.metric
        for task, row in tested.items()
        for candidate, score in row.items()
    }
    for logger in loggers:
        logger.log_metrics(values)
        logger.save()
    log_pictures(loggers, "resolution", [resolution_picture(found)])
