"""Choosing the size of test images on held-out data (MindVL's test-time resolution search)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from xxhash import xxh3_128_hexdigest

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation.detection import detection_metrics
from lightning_soup.evaluation.image_sizes import check_bounds, patch_of, snapped, tokens_of
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.evaluation.own_loops import OwnLoops
from lightning_soup.evaluation.resolution_table import (
    Resolution,
    ResolutionChoice,
    Rule,
    SizeScore,
    Table,
    choose,
    mean_score,
)
from lightning_soup.evaluation.sized_images import HeldOut, SizedImages, images_of
from lightning_soup.evaluation.sized_modules import Clock, at_size, rehearse, vision_model
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["ResolutionSearch"]

Metric = Literal["acc", "nll", "auc", "f1"]


@dataclass(frozen=True)
class ResolutionSearch:
    """Evaluate a model at several sizes of images, and choose one on held-out data.

    Search after averaging: the best size belongs to the weights. MindVL chooses bounds of the area for each benchmark,
    and does not say on what; here test data is refused, and the size of training is left only for a gain that is more
    than chance.

    Args:
        sizes: Sides in pixels, or pairs of height and width. With neither sizes nor bounds: the size of training times
            0.75, 0.875, 1, 1.125, 1.25 and 1.5, to the nearest multiple of the patch.
        bounds: Pairs of a lowest and a highest area in pixels: each image keeps its aspect ratio, up to rounding.
        rule: ``keep_train``, ``best`` or ``one_se``; see :func:`choose`.
        snap: What becomes of a size that patches do not divide: an ``error``, or the ``nearest`` one.
        metric: ``acc``, ``nll``, ``auc`` or ``f1``.
        min_gain: What a gain must be more than; for metrics other than accuracy, where no standard error says it.
        per_task: Choose for each data set, not one for the mean of all.
        split: What to select on: ``val``, or ``test`` with ``force``.
        force: Select on test data all the same.
        train_size: Size of training; by default that of the data module's preprocessing, or of the images.
        factor: Multiple that sides are rounded to within ``bounds``; the patch by default, 28 without patches.

    Raises:
        UnsupportedSetup: Options that cannot be, when built; or a size that the model cannot take, before anything is
            evaluated.

    Source: Chen et al., MindVL (arXiv 2509.11662), of which no code is public; the rules are ours.
    """

    sizes: list[int | tuple[int, int]] | None = None
    bounds: list[tuple[int, int]] | None = None
    rule: Rule = "keep_train"
    snap: Literal["error", "nearest"] = "error"
    metric: Metric = "acc"
    min_gain: float | None = None
    per_task: bool = False
    split: Literal["val", "test"] = "val"
    force: bool = False
    train_size: int | tuple[int, int] | None = None
    factor: int | None = None

    _smaller_is_better = ("nll",)

    def __post_init__(self) -> None:
        if self.rule not in ("keep_train", "best", "one_se"):
            raise UnsupportedSetup(f"rule={self.rule!r}: expected 'keep_train', 'best' or 'one_se'.")
        if self.snap not in ("error", "nearest"):
            raise UnsupportedSetup(f"snap={self.snap!r}: expected 'error' or 'nearest'.")
        if self.metric not in ("acc", "nll", "auc", "f1"):
            raise UnsupportedSetup(f"metric={self.metric!r}: expected 'acc', 'nll', 'auc' or 'f1'.")
        for name, given in (("sizes", self.sizes), ("bounds", self.bounds)):
            if given is None:
                continue
            if not isinstance(given, (list, tuple)) or not given:
                raise UnsupportedSetup(
                    f"{name}={given!r}: a search needs at least one size: sizes=[192, 224, 256], or none for the usual "
                    "grid."
                )
            for one in given:
                if not (name == "sizes" and isinstance(one, int)) and not _is_pair(one):
                    wanted = "height and width, or one side" if name == "sizes" else "the lowest and highest area"
                    raise UnsupportedSetup(f"{name} holds {one!r}: expected whole numbers, {wanted}.")
        if self.metric != "acc" and self.rule != "best" and self.min_gain is None:
            raise UnsupportedSetup(
                f"metric={self.metric!r} has no standard error that tells a gain from chance. Give min_gain, what a "
                "gain must be more than, or rule='best'."
            )
        if self.min_gain is not None and not self.min_gain >= 0:
            raise UnsupportedSetup(f"min_gain={self.min_gain}: expected 0 or more.")
        if self.split not in ("val", "test"):
            raise UnsupportedSetup(f"split={self.split!r}: expected 'val' or 'test'.")
        if self.split == "test" and not self.force:
            raise UnsupportedSetup(
                "split='test': a size that is chosen on test data makes its figures too good. Choose on validation "
                "data, or say force=True."
            )
        if self.factor is not None and self.factor < 1:
            raise UnsupportedSetup(f"factor={self.factor}: expected 1 or more.")
        for low, high in self.bounds or []:
            check_bounds(low, high)

    def run(
        self,
        module: LightningModule,
        data: HeldOut,
        table: str | Path | None = None,
        progress: Progress = silent,
        trainer: Trainer | None = None,
    ) -> ResolutionChoice:
        """Evaluate every candidate once, and choose.

        Args:
            module: Its ``predict_step`` gives logits. It is left as it was: the size is put to a copy of its ``model``.
                A trainer moves it to its device, and one of true half precision converts it, as in its own validation.
            data: Held-out data: a data module, a loader, or several by the name of the task. From data modules over
                image files each size is made of the files' own pixels, from all others of the tensors that they give.
            table: A JSON file that is written after each candidate; what it holds of the same weights, data and
                hyperparameters is not evaluated again.
            progress: Shows how far it is.
            trainer: Decides device and precision; by default where the module is.

        Raises:
            UnsupportedSetup: A size that the model cannot take, or there is no such data.
            LightningSoupError: A metric is NaN.
        """
        module, device, precision = _placed(module, trainer)
        tasks = images_of(data, self.split)
        model = vision_model(module)
        train = self._train(next(iter(tasks.values())), model)
        candidates = self._candidates(model, train)
        factor = self._factor(model) if self.bounds else None
        for candidate in candidates:
            if candidate.size is not None:
                _rehearse(module, next(iter(tasks.values())), candidate.size, device, precision)
        judged = f"{precision.precision} {dict(module.hparams)}"
        marks = {task: xxh3_128_hexdigest(f"{judged} {images.digest}".encode()) for task, images in tasks.items()}
        kept = Table(table, open_checkpoint(module).digest(), self.split, self.metric, factor, marks)
        scores: dict[str, dict[Resolution, SizeScore]] = {task: {} for task in tasks}
        work = [(candidate, task) for candidate in candidates for task in tasks]
        for candidate, task in progress(work, "evaluating sizes", len(work)):
            found = kept.get(task, candidate)
            if found is None:
                found = self._evaluate(module, tasks[task], candidate, device, precision)
                kept.put(task, candidate, found)
            scores[task][candidate] = found
        return ResolutionChoice(scores, self._chosen(scores, train), train, self.rule, self.metric, self.split)

    def evaluate(
        self,
        module: LightningModule,
        data: HeldOut,
        candidate: Resolution,
        split: Literal["val", "test"] = "test",
        trainer: Trainer | None = None,
    ) -> dict[str, SizeScore]:
        """The metric of each task at one size: what is reported, once, after the choice."""
        module, device, precision = _placed(module, trainer)
        tasks = images_of(data, split)
        return {task: self._evaluate(module, images, candidate, device, precision) for task, images in tasks.items()}

    def _train(self, images: SizedImages, model: nn.Module) -> Resolution:
        size = images.own_size if self.train_size is None else self.train_size
        height, width = (size, size) if isinstance(size, int) else size
        patch = patch_of(model) or (1, 1)
        return Resolution((snapped(height, patch[0], "nearest"), snapped(width, patch[1], "nearest")))

    def _candidates(self, model: nn.Module, train: Resolution) -> list[Resolution]:
        patch = patch_of(model) or (1, 1)
        height, width = train.size
        if self.sizes is None and self.bounds is None:
            grid = [(height * part, width * part) for part in (0.75, 0.875, 1, 1.125, 1.25, 1.5)]
            sides = [tuple(snapped(round(x), p, "nearest") for x, p in zip(size, patch, strict=True)) for size in grid]
        else:
            pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in self.sizes or []]
            sides = [tuple(snapped(x, p, self.snap) for x, p in zip(size, patch, strict=True)) for size in pairs]
        found = [Resolution(size) for size in sides] + [Resolution(bounds=tuple(one)) for one in self.bounds or []]
        return list(dict.fromkeys([*found, train]))

    def _factor(self, model: nn.Module) -> int:
        patch = patch_of(model)
        least = 1 if patch is None else math.lcm(*patch)
        if self.factor is not None and self.factor % least:
            raise UnsupportedSetup(
                f"factor={self.factor}: expected a multiple of the patch size {least}, or no factor to take just that."
            )
        return self.factor or (28 if patch is None else least)

    def _evaluate(
        self,
        module: LightningModule,
        images: SizedImages,
        candidate: Resolution,
        device: torch.device,
        precision: Precision,
    ) -> SizeScore:
        if candidate.size is not None:
            groups = {candidate.size: images.at(candidate.size)}
        else:
            groups = images.within(*candidate.bounds, self._factor(vision_model(module)))
            for size in groups:
                _rehearse(module, images, size, device, precision)
        clock, outcomes, tokens = Clock(), [], 0
        for size, batches in groups.items():
            with at_size(module, size) as model, clock.on(*{module, model}):
                outcomes.append(OwnLoops(module, images.datamodule, device, precision).outcome(batches))
                tokens += tokens_of(model, size) * len(outcomes[-1].targets)
        outcome = Outcome(torch.cat([one.logits for one in outcomes]), torch.cat([one.targets for one in outcomes]))
        count, value = len(outcome.targets), self._value(outcome)
        if math.isnan(value):
            raise LightningSoupError(
                f"{self.metric} is NaN at {candidate}: the model's outputs are, or the images are all of one class. "
                "Check the weights and the data."
            )
        error = math.sqrt(value * (1 - value) / count) if self.metric == "acc" else float("nan")
        return SizeScore(value, error, tokens / count, clock.seconds / count, count)

    def _value(self, outcome: Outcome) -> float:
        if outcome.logits.isnan().any():
            return float("nan")
        if self.metric in ("acc", "nll"):
            return outcome.accuracy if self.metric == "acc" else outcome.nll
        measures = detection_metrics(outcome.logits.shape[1])
        measures.update(outcome.logits.softmax(1), outcome.targets)
        return float(measures.compute()[self.metric])

    def _chosen(self, scores: Mapping[str, Mapping[Resolution, SizeScore]], train: Resolution) -> dict[str, Resolution]:
        mode = "min" if self.metric in self._smaller_is_better else "max"
        if self.per_task:
            return {task: choose(row, train, self.rule, mode, self.min_gain) for task, row in scores.items()}
        rows = list(scores.values())
        mean = {candidate: mean_score([row[candidate] for row in rows]) for candidate in rows[0]}
        return dict.fromkeys(scores, choose(mean, train, self.rule, mode, self.min_gain))


def _placed(module: LightningModule, trainer: Trainer | None) -> tuple[LightningModule, torch.device, Precision]:
    """The module where a trainer has it, and as precise; compiling it anew for each size would gain nothing."""
    module = getattr(module, "_orig_mod", module)
    if trainer is None:
        return module, module.device, Precision()
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    return precision.convert_module(module.to(device)), device, precision


def _rehearse(
    module: LightningModule, images: SizedImages, size: tuple[int, int], device: torch.device, precision: Precision
) -> None:
    loops, target = OwnLoops(module, images.datamodule, device, precision), torch.zeros(1, dtype=torch.long)
    rehearse(module, size, images.channels, lambda image: loops.outcome([(image, target)]))


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and [type(part) for part in value] == [int, int]
