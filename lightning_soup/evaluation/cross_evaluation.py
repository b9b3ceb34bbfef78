"""Trained on one data set, tested on another: a table of every model on every test set, with nothing tuned anew."""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.detection import detection_metrics
from lightning_soup.evaluation.loading import listed
from lightning_soup.evaluation.own_loops import OwnLoops
from lightning_soup.weights.atomic import atomic_path, user_path

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CrossEvaluation", "cross_evaluate"]

MEASURES = ("auc", "f1", "precision", "recall", "acc", "nll")


@dataclass(frozen=True)
class CrossEvaluation:
    """What every model scores on every test set.

    Attributes:
        scores: By what a model was trained on, by test set: ``auc``, ``f1``, ``precision``, ``recall``, ``acc``
            (0 to 1) and ``nll``. The AUC of a set with one class only is NaN.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]

    def table(self, *measures: str) -> "Table":
        """A rich table: a row for each model, a column for each test set and measure (AUC and F1 by default)."""
        from rich.table import Table

        header, rows = self._cells(measures or ("auc", "f1"))
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self, *measures: str) -> str:
        """The same as Markdown."""
        header, rows = self._cells(measures or ("auc", "f1"))
        return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])

    def save(self, path: str | Path) -> None:
        """Write every score as CSV.

        Raises:
            UnwritableOutput: It cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trained on", "tested on", *MEASURES])
        for trained, row in self.scores.items():
            writer.writerows([trained, tested, *(found[name] for name in MEASURES)] for tested, found in row.items())
        with atomic_path(user_path(path)) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")

    def _cells(self, measures: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
        tests = list(dict.fromkeys(name for row in self.scores.values() for name in row))
        header = ["trained on", *(f"{test}: {name}" for test in tests for name in measures)]
        rows = [
            [trained, *(_told(row[test], name) if test in row else "" for test in tests for name in measures)]
            for trained, row in self.scores.items()
        ]
        return header, rows


def cross_evaluate(
    modules: Mapping[str, LightningModule],
    data: Mapping[str, LightningDataModule | DataLoader],
    positive: int = 1,
    device: str | torch.device = "cpu",
) -> CrossEvaluation:
    """Evaluate every model on every test set, at the one threshold of 0.5.

    Args:
        modules: By what they were trained on; their ``predict_step`` returns logits or log-probabilities ``[B, C]``.
            Those with a ``check_data(datamodule)``, as AwareNet, are shown each data module, and may refuse it.
        data: Test sets by name: loaders, or data modules, whose first test loader is taken.
        positive: Of two classes the one that is detected.
        device: Where to evaluate.

    Raises:
        UnsupportedSetup: A data module has no test data, there is nothing to evaluate, or ``positive`` is no class.
        LightningSoupError: A set's classes are more than a model's.
    """
    from lightning.pytorch.plugins.precision import Precision

    if not modules or not data:
        raise UnsupportedSetup("cross_evaluate needs one module and one test set at least.")
    loaders = {name: _test_loader(name, given) for name, given in data.items()}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for trained, module in modules.items():
        scores[trained] = {}
        for tested, (loader, datamodule) in loaders.items():
            with _shown(module, datamodule):
                outcome = OwnLoops(module, datamodule, torch.device(device), Precision()).outcome(loader)
            logits, targets = outcome.competing
            if positive not in range(logits.shape[1]):
                raise UnsupportedSetup(f"positive={positive!r}: expected a class, 0 to {logits.shape[1] - 1}.")
            metrics = detection_metrics(logits.shape[1], positive)
            metrics.update(logits.softmax(dim=1), targets)
            found = {name: float(value) for name, value in metrics.compute().items()}
            scores[trained][tested] = {**found, "acc": outcome.accuracy, "nll": outcome.nll}
    return CrossEvaluation(scores)


@contextmanager
def _shown(module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[None]:
    """Let a module note what it has to know of the data, for these alone."""
    noted = dict(module.hparams)
    try:
        if callable(check := getattr(module, "check_data", None)):
            check(datamodule)
        yield
    finally:
        module.hparams.update(noted)


def _told(found: Mapping[str, float], name: str) -> str:
    return f"{found[name]:.3f}" if name == "nll" else f"{100 * found[name]:.1f}"


def _test_loader(name: str, given: Any) -> tuple[Any, LightningDataModule | None]:
    if not isinstance(given, LightningDataModule):
        return given, None
    given.prepare_data()
    given.setup("test")
    loaders = listed(given.test_dataloader()) if is_overridden("test_dataloader", given) else []
    if not loaders:
        raise UnsupportedSetup(f"The data module of {name} has no test data. Give it some, or a loader.")
    return loaders[0], given
