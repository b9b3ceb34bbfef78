"""What is measured of the models of a zoo, and of the pairs of a cell's seeds."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_soup.errors import NonFiniteScore, NonFiniteWeights, RecipeError, UnsupportedSetup
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.evaluation.training_evaluator import TrainingEvaluator, of_one_loader
from lightning_soup.landscape.connectivity import bezier_connectivity, loss_barrier, mode_connectivity
from lightning_soup.landscape.curvature import hessian_top_eigenvalues, hessian_trace
from lightning_soup.landscape.objective import Objective
from lightning_soup.landscape.similarity import cka
from lightning_soup.landscape.weight_statistics import weight_statistics
from lightning_soup.landscape.wide_copy import on_wide_copies
from lightning_soup.recipes import UniformSoup
from lightning_soup.recipes.checks import statistics_of
from lightning_soup.runs.zoo_file import Measures
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["check_logged", "measure_cell", "measure_model"]

_OUTPUTS = 1000  # validation samples at most whose outputs are compared


def measure_model(
    module: LightningModule,
    datamodule: LightningDataModule,
    trainer: Trainer | None,
    model: Path,
    epochs: tuple[Path, Path] | None,
    measures: Measures,
) -> dict[str, float]:
    """Measure one model.

    Args:
        module: The module; it holds the model's weights afterwards.
        datamodule: Its data.
        trainer: Evaluates.
        model: File of the weights that training left: those after the last epoch, or what a callback made of them.
        epochs: Files of the weights after the last epoch, and of the mean of the last epochs'; None: there was one.
        measures: What is measured how.

    Returns:
        By name: ``train_loss``, ``train_acc``, ``majority`` (share of the most common class), ``val_loss``,
        ``val_acc``, ``lambda_max``, ``trace`` and its standard error ``trace_error``, and ``delta_epochs``, by how much
        the mean of the last epochs' weights is more accurate than those of the last. NaN where it is not finite.

    Raises:
        UnsupportedSetup: The metric is no accuracy from 0 to 1.
        LightningSoupError: Something cannot be measured.
    """
    training = TrainingEvaluator(module, datamodule, measures.metric, "max", trainer, samples=measures.samples)
    validation = ModuleEvaluator(module, datamodule, measures.metric, "max", trainer)
    names = of_one_loader(measures.metric), of_one_loader(measures.loss)
    found = _named("train", training.figures(open_checkpoint(model)), *names)
    batches = list(training.batches_of(measures.samples))
    found["majority"] = _majority(batches)
    with on_wide_copies(module):  # half precision is too coarse for second derivatives
        objective = Objective.of_module(module, batches, datamodule, device=training.trainer.strategy.root_device)
        try:
            found["lambda_max"] = hessian_top_eigenvalues(objective, max_steps=measures.lanczos).values[0]
            trace = hessian_trace(objective, max_probes=measures.probes, min_probes=min(10, measures.probes))
            found["trace"], found["trace_error"] = trace.value, trace.error
        except NonFiniteWeights:  # a loss that overflows, at weights that diverged
            found["lambda_max"] = found["trace"] = found["trace_error"] = math.nan
    found |= _named("val", validation.figures(open_checkpoint(model)), measures.metric, measures.loss)
    found["delta_epochs"] = math.nan
    if epochs is not None:
        found["delta_epochs"] = _fitted(validation, epochs[1], _has_statistics(epochs)) - _score(validation, epochs[0])
    return found


def check_logged(figures: Mapping[str, float], metric: str, loss: str) -> None:
    """See whether the validation step logs what a zoo is measured by.

    Args:
        figures: What it logs.
        metric: Name of the accuracy.
        loss: Name of the loss.

    Raises:
        UnsupportedSetup: It does not, or the metric is no accuracy from 0 to 1.
    """
    for name in (metric, loss):
        if name not in figures:
            raise UnsupportedSetup(
                f"zoo.measures: the validation step does not log {name!r}; it logs {', '.join(sorted(figures))}. Give "
                "zoo.measures.metric and zoo.measures.loss."
            )
    if not (math.isnan(figures[metric]) or 0 <= figures[metric] <= 1):
        raise UnsupportedSetup(
            f"zoo.measures.metric is {metric!r}, which is {figures[metric]:.4g}; expected an accuracy from 0 to 1."
        )


def _named(part: str, figures: Mapping[str, float], metric: str, loss: str) -> dict[str, float]:
    check_logged(figures, metric, loss)
    return {f"{part}_loss": figures[loss], f"{part}_acc": figures[metric]}


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
    if not norms:
        return _score(evaluator, average)
    evaluator.recalibrate(open_checkpoint(average))
    return _score(evaluator, None)


def _score(evaluator: ModuleEvaluator, model: Path | None) -> float:
    """The score of a file, or of the weights that the module holds; NaN where it is."""
    try:
        return evaluator.score(evaluator.slot() if model is None else open_checkpoint(model))
    except NonFiniteScore:
        return math.nan


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
        logits, NaN where there are none; ``distance`` of the weights. And ``delta_seeds``, by how much the average of
        all seeds is more accurate than they are on average. Seeds are not aligned.

    Raises:
        LightningSoupError: Something cannot be measured.
    """
    error = TrainingEvaluator(module, datamodule, measures.metric, "max", trainer, samples=measures.samples)
    loss = TrainingEvaluator(module, datamodule, measures.loss, "min", trainer, samples=measures.samples)
    validation = ModuleEvaluator(module, datamodule, measures.metric, "max", trainer)
    scores = [_score(validation, model) for model in models]  # first: this gives the module the Trainer's precision
    outputs = _outputs(validation, models)
    norms = _has_statistics(models)
    rows: list[dict[str, float]] = []
    for a, b in itertools.islice(itertools.combinations(range(len(models)), 2), measures.pairs):
        ends = models[a], models[b]
        row = {"cka": math.nan if outputs is None else _alike(outputs[a], outputs[b])}
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
    found["delta_seeds"] = _fitted(validation, soup, norms) - sum(scores) / len(scores) if len(models) > 1 else math.nan
    return found


def _outputs(evaluator: ModuleEvaluator, models: Sequence[Path]) -> list[torch.Tensor] | None:
    """Logits of the validation samples ``[n, classes]`` of each model; None where the module gives none."""
    found = []
    for model in models:
        try:
            with isolate_rng():
                torch.manual_seed(0)  # the same order for all, where the loader shuffles
                told = next(iter(evaluator.outcomes(open_checkpoint(model), "select").values()))
        except RecipeError as error:
            warnings.warn(
                "the outputs of the seeds are not compared, so there is no CKA, without which phase IV is not "
                f"determined ({str(error).partition('. ')[0]}): that takes validation batches (inputs, targets), and a "
                f"predict_step of {type(evaluator.module).__name__} that returns logits [batch, classes].",
                stacklevel=2,
            )
            return None
        found.append(told.logits[:_OUTPUTS])
    return found


def _alike(x: torch.Tensor, y: torch.Tensor) -> float:
    return cka(x, y) if x.isfinite().all() and y.isfinite().all() else math.nan
