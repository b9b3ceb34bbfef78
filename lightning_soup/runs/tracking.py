"""Reports and soups in experiment trackers: numbers everywhere; tables, pictures and the model in W&B."""

import io
import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_soup.runs.report_json import plain, trials

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_soup.recipes.recipe import Soup
    from lightning_soup.runs.continual import ContinualResult
    from lightning_soup.runs.figures import Picture
    from lightning_soup.runs.report import SoupReport

__all__ = ["folder_of_run", "log_continual", "log_pictures", "log_report", "log_soup"]

_log = logging.getLogger(__name__)


@rank_zero_only
def log_report(loggers: Iterable[Logger], report: "SoupReport", soup_path: str | Path | None = None) -> None:
    """Log a report: its accuracies and gains to every logger; tables, pictures and histories to W&B.

    Args:
        loggers: The loggers of a Trainer.
        report: The report.
        soup_path: File of the report's first soup, which becomes a W&B artifact; see `log_soup`.
    """
    loggers = list(loggers)
    scalars = _scalars(report)
    for logger in loggers:
        logger.log_metrics(scalars)
        logger.save()
    for run in _wandb_runs(loggers):
        content = {"report/comparison": _comparison(report), "report/headline": report.headline}
        run.log({**content, **_images("report", report.pictures)})
    for number, entry in enumerate(report.of_kind("soup")):
        if entry.soup is not None:
            log_soup(loggers, entry.soup, soup_path if number == 0 else None, label=entry.label)


@rank_zero_only
def log_soup(loggers: Iterable[Logger], soup: "Soup", path: str | Path | None = None, *, label: str = "soup") -> None:
    """Log what a recipe tried to W&B, and the soup's file as an artifact of type ``model``.

    The artifact's metadata name the recipe and the ingredients with their digests and coefficients.
    Ingredients that are artifacts themselves become its inputs, where the run is online; offline W&B knows no
    lineage, so the metadata must do, with a warning.

    Args:
        loggers: The loggers of a Trainer; others than W&B's are passed over.
        soup: The soup.
        path: Its file; without one only the history is logged.
        label: Name of the soup in the run.
    """
    for run in _wandb_runs(loggers):
        import wandb

        tried = trials(soup)
        if tried:
            names = list(dict.fromkeys(name for trial in tried for name in trial["values"]))
            table = wandb.Table(columns=["trial", "tried", "score", "kept", "reason", *names])
            for trial in tried:
                values = [trial["values"].get(name) for name in names]
                table.add_data(*(trial[k] for k in ("trial", "label", "score", "kept", "reason")), *values)
            run.log({f"history/{_slug(label)}": table})
        if path is not None:
            artifact = wandb.Artifact(f"soup-{run.id}", type="model", metadata=_metadata(soup))
            (artifact.add_dir if Path(path).is_dir() else artifact.add_file)(str(path))
            _use_ingredients(run, soup)
            run.log_artifact(artifact)


@rank_zero_only
def log_continual(loggers: Iterable[Logger], result: "ContinualResult") -> None:
    """Log a continual run: the metrics and every cell to every logger; the matrix and the pictures to W&B.

    Args:
        loggers: The loggers of a Trainer.
        result: The run.
    """
    from lightning_soup.runs.figures_continual import draw_continual

    loggers, metrics = list(loggers), result.metrics
    scalars = {f"continual/{name}": getattr(metrics, name) for name in ("transfer", "average", "last", "forget")}
    for logger in loggers:
        logger.log_metrics({name: value for name, value in scalars.items() if not math.isnan(value)})
        for step, row in enumerate(result.rows.values()):
            logger.log_metrics({f"accuracy/{_slug(name)}": value for name, value in row.items()}, step)
        logger.save()
    for run in _wandb_runs(loggers):
        import wandb

        table = wandb.Table(columns=["accuracy, %", *result.names])
        for label, row in result.rows.items():
            table.add_data(label, *(row[name] for name in result.names))
        run.log({"continual/matrix": table, **_images("continual", draw_continual(result))})


@rank_zero_only
def log_pictures(loggers: Iterable[Logger], place: str, pictures: "Iterable[Picture]") -> None:
    """Log pictures to W&B, as ``<place>/<name of the picture>``; other loggers are passed over."""
    pictures = list(pictures)
    for run in _wandb_runs(loggers):
        run.log(_images(place, pictures))


def folder_of_run(trainer: "Trainer") -> Path:
    """The folder of a run, as ModelCheckpoint finds it."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def _images(place: str, pictures: "Iterable[Picture]") -> dict[str, Any]:
    import wandb
    from PIL import Image

    return {
        f"{place}/{picture.name}": wandb.Image(Image.open(io.BytesIO(picture.png)), caption=picture.caption)
        for picture in pictures
    }


def _wandb_runs(loggers: Iterable[Logger]) -> Iterator[Any]:
    return (logger.experiment for logger in loggers if isinstance(logger, WandbLogger))


def _scalars(report: "SoupReport") -> dict[str, float]:
    scalars = {}
    for row in report.comparisons:
        name = {"mean": "mean_ingredient", "best": "best_single"}.get(row.kind, _slug(row.label))
        for test, c in row.tests.items():
            scalars[f"report/{name}/{_slug(test)}_accuracy"] = c.accuracy.mean
            if c.gain is not None:
                scalars[f"report/{name}/{_slug(test)}_gain"] = c.gain.mean
    return scalars


def _comparison(report: "SoupReport") -> Any:
    import wandb

    columns = ["model", "passes per image", f"{report.selection_split} {report.metric}"]
    for test in report.test_names:
        columns += [
            f"{test} {what}" for what in ("accuracy", "low", "high", "gain", "gain low", "gain high", "verdict")
        ]
    table = wandb.Table(columns=columns)
    for row in report.comparisons:
        cells: list[Any] = [row.label, row.forward_passes, row.selection_score]
        for c in row.tests.values():
            gain = (None,) * 3 if c.gain is None else (c.gain.mean, c.gain.low, c.gain.high)
            cells += [c.accuracy.mean, c.accuracy.low, c.accuracy.high, *gain, c.verdict]
        table.add_data(*cells)
    return table


def _metadata(soup: "Soup") -> dict[str, Any]:
    """What went into the soup; of coefficients per tensor the mean, for the file itself holds all of them."""
    ingredients = [
        {
            "label": ingredient.name,
            "source": str(ingredient.source) if isinstance(ingredient.source, str | Path) else None,
            "digest": ingredient.weights.digest(),
            "coefficient": share,
            "step": ingredient.step,
            "metrics": ingredient.metrics,
        }
        for ingredient, share in zip(soup.ingredients, soup.shares(), strict=True)
    ]
    return plain(
        {
            "recipe": soup.recipe,
            "metric": soup.metric,
            "mode": soup.mode,
            "score": soup.natural_score,
            "per_tensor": isinstance(soup.coefficients, dict),
            "ingredients": ingredients,
        }
    )


def _use_ingredients(run: Any, soup: "Soup") -> None:
    """Record which artifacts the soup was made of; never at the price of the run."""
    for ingredient in soup.ingredients:
        source = str(ingredient.source)
        if not source.startswith("wandb:"):
            continue
        try:
            run.use_artifact(source.removeprefix("wandb:"))
        except Exception as error:  # offline a TypeError; online whatever the server answers
            _log.warning(
                "W&B could not record which artifacts the soup was made of (%s: %s). "
                "The metadata of the soup's artifact name them.",
                type(error).__name__,
                error,
            )
            return


def _slug(text: str) -> str:
    """A key that every tracker takes: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("_")
