"""What is measured of the models of a zoo, and of the pairs of a cell's seeds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_soup.errors import LightningSoupError, NonFiniteScore, UnsupportedSetup
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.evaluation.training_evaluator import TrainingEvaluator
from lightning_soup.landscape.connectivity import bezier_connectivity, loss_barrier, mode_connectivity
from lightning_soup.landscape.curvature import hessian_top_eigenvalues, hessian_trace
from lightning_soup.landscape.objective import Objective
from lightning_soup.landscape.similarity import cka
from lightning_soup.landscape.weight_statistics import weight_statistics
from lightning_soup.recipes import UniformSoup
from lightning_soup.recipes.checks import statistics_of
from lightning_soup.runs.zoo_file import Measures
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["measure_cell", "measure_model"]

_OUTPUTS = 1000  # validation samples at most whose outputs are compared


def measure_model(
    module: LightningModule,
    datamodule: LightningDataModule,
    trainer: Trainer | None,
    model: Path,
    average: Path | None,
    measures: Measures,
) -> dict[str, float]:
    """Measure one model.

    Args:
        module: The module; it holds the model's weights afterwards.
        datamodule: Its data.
        trainer: Evaluates.
        model: File of the weights after the last epoch.
        average: File of the mean of the last epochs' weights; None: there was one epoch.
        measures: What is measured how.

    Returns:
        By name: ``train_loss``, ``train_acc``, ``majority`` (share of the most common class), ``val_loss``,
        ``val_acc``, ``lambda_max``, ``trace`` and its standard error ``trace_error``, and ``delta_epochs``, by how much
        the mean of the last epochs' weights is more accurate.

    Raises:
        UnsupportedSetup: The metric is no accuracy from 0 to 1.
        LightningSoupError: Something cannot be measured.
    """
    training = TrainingEvaluator(module, datamodule, measures.metric, "max", trainer, samples=measures.samples)
    validation = ModuleEvaluator(module, datamodule, measures.metric, "max", trainer)
    found = _named("train", training.figures(open_checkpoint(model)), measures)
    batches = list(training.batches_of(measures.samples))
    found["majority"] = _majority(batches)
    objective = Objective.of_module(module, batches, datamodule, device=training.trainer.strategy.root_device)
    try:
        found["lambda_max"] = hessian_top_eigenvalues(objective, max_steps=measures.lanczos).values[0]
        trace = hessian_trace(objective, max_probes=measures.probes, min_probes=min(10, measures.probes))
        found["trace"], found["trace_error"] = trace.value, trace.error
    except LightningSoupError:  # a loss that overflows, at weights that diverged
        found["lambda_max"] = found["trace"] = found["trace_error"] = math.nan
    found["val_acc"] = own = validation.score(open_checkpoint(model))
    found["val_loss"] = -ModuleEvaluator(module, datamodule, measures.loss, "min", trainer).score(
        open_checkpoint(model)
    )
    norms = average is not None and _has_statistics([model, average])
    found["delta_epochs"] = math.nan if average is None else _fitted(validation, average, norms) - own
    return found


def _named(part: str, figures: Mapping[str, float], measures: Measures) -> dict[str, float]:
    for name in (measures.metric, measures.loss):
        if name not in figures:
            raise UnsupportedSetup(
                f"zoo.measures: the validation step does not log {name!r}; it logs {', '.join(sorted(figures))}."
            )
    accuracy = figures[measures.metric]
    if not 0 <= accuracy <= 1:
        raise UnsupportedSetup(
            f"zoo.measures.metric is {measures.metric!r}, which is {accuracy:.4g}; expected an accuracy from 0 to 1."
        )
    return {f"{part}_loss": figures[measures.loss], f"{part}_acc": accuracy}


def _majority(batches: Sequence[Any]) -> float:
    """Share of the most common class; NaN where targets are no classes."""
    targets = [batch[1] for batch in batches if isinstance(batch, (list, tuple)) and len(batch) > 1]
    if not targets or not all(isinstance(one, torch.Tensor) and not one.is_floating_point() for one in targets):
        return math.nan
    counts = torch.cat([one.flatten() for one in targets]).bincount()
    return float(counts.max() / counts.sum())


def _has_statistics(models: Sequence[Path]) -> bool:
    """Whether training estimated statistics of BatchNorm, which an average needs anew."""
    return bool(statistics_of([open_checkpoint(model) for model in models]).differing)


def _fitted(evaluator: ModuleEvaluator, average: Path, norms: bool) -> float:
    """The score of an average, with BatchNorm's statistics estimated anew where that is due."""
    opened = open_checkpoint(average)
    if not norms:
        return evaluator.score(opened)
    evaluator.recalibrate(opened)
    return evaluator.score(evaluator.slot())


def measure_cell(
    module: LightningModule,
    datamodule: LightningDataModule,
    trainer: Trainer | None,
    models: Sequence[Path],
    soup: Path,
    measures: Measures,
) -> dict[str, float]:
    """Measure what the seeds of a cell have in common, and average them.

    Args:
        module: A module of the cell's architecture; its weights are overwritten.
        datamodule: Its data.
        trainer: Evaluates.
        models: Files of the weights, one for each seed.
        soup: File that their plain average is written to.
        measures: What is measured how.

    Returns:
        Means over pairs of seeds: ``mc``, the mode connectivity of a Bézier curve, and ``line``, that of the straight
        line, in points of training error; ``barrier`` of the training loss on the line; ``cka`` of the validation
        logits; ``distance`` of the weights. And ``delta_seeds``, by how much the average of all seeds is more accurate
        than they are on average. Seeds are not aligned.

    Raises:
        LightningSoupError: Something cannot be measured.
    """
    error = TrainingEvaluator(module, datamodule, measures.metric, "max", trainer, samples=measures.samples)
    loss = TrainingEvaluator(module, datamodule, measures.loss, "min", trainer, samples=measures.samples)
    validation = ModuleEvaluator(module, datamodule, measures.metric, "max", trainer)
    outputs = [_outputs(validation, model) for model in models]
    norms = _has_statistics(models)
    rows: list[dict[str, float]] = []
    for a, b in itertools.islice(itertools.combinations(range(len(models)), 2), measures.pairs):
        ends = models[a], models[b]
        row = {"cka": _alike(outputs[a], outputs[b])}
        row["distance"] = float(weight_statistics(ends).distances[0, 1])
        try:
            straight = loss_barrier(*ends, error, 5, recalibrate=norms)
            row["line"] = 100 * mode_connectivity(straight.t, straight.q)[0]
            row["barrier"] = loss_barrier(*ends, loss, 5, recalibrate=norms).barrier
            bent = bezier_connectivity(
                *ends,
                error,
                epochs=measures.curve_epochs,
                lr=measures.curve_lr,
                batch_size=measures.curve_batch,
                seed=a + b,
                recalibrate=norms,
            )
            row["mc"] = 100 * mode_connectivity(bent.t, bent.q)[0]
        except NonFiniteScore:
            row |= dict.fromkeys(("line", "barrier", "mc"), math.nan)
        rows.append(row)
    names = ("mc", "line", "barrier", "cka", "distance")
    found = {name: sum(row[name] for row in rows) / len(rows) if rows else math.nan for name in names}
    UniformSoup(common_start="ignore").cook([str(model) for model in models]).save(str(soup))
    scores = [validation.score(open_checkpoint(model)) for model in models]
    found["delta_seeds"] = _fitted(validation, soup, norms) - sum(scores) / len(scores) if len(models) > 1 else math.nan
    return found


def _outputs(evaluator: ModuleEvaluator, model: Path) -> torch.Tensor:
    """Logits of the validation samples, ``[n, classes]``."""
    found = next(iter(evaluator.outcomes(open_checkpoint(model), "select").values()))
    return found.logits[:_OUTPUTS]


def _alike(x: torch.Tensor, y: torch.Tensor) -> float:
    return cka(x, y) if x.isfinite().all() and y.isfinite().all() else math.nan
