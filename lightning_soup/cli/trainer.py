"""The Trainer that can also cook: ``lightning-soup soup`` and ``resolution`` are its methods."""

import shlex
import sys
import warnings
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_soup.cli.terminal import plain
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.evaluation.resolution import ResolutionSearch
from lightning_soup.evaluation.resolution_table import ResolutionChoice
from lightning_soup.progress import rich_progress, silent
from lightning_soup.recipes import Ingredient, Recipe, Soup, UniformSoup, gather_ingredients
from lightning_soup.recipes.soup_output import check_soup_output
from lightning_soup.runs.cooking import cook_all, measure
from lightning_soup.runs.inspection import Inspected, inspect_checkpoints
from lightning_soup.runs.inspection_report import inspection_table, verdict, write_inspection
from lightning_soup.runs.resolution_report import log_resolution, resolution_table, test_scores, write_resolution
from lightning_soup.runs.tracking import log_report, log_soup
from lightning_soup.weights.atomic import check_writable, user_path
from lightning_soup.weights.formats import WEIGHT_SUFFIXES
from lightning_soup.weights.save import check_output
from lightning_soup.weights.weights_file import open_checkpoint


class SoupTrainer(Trainer):
    """A Lightning Trainer with ``soup``, ``inspect`` and ``resolution`` beside its own methods."""

    def soup(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ingredients: list[str] | str,
        recipe: Recipe | None = None,
        output: str = "soup.safetensors",
        metric: str = "val_acc",
        mode: Literal["min", "max"] | None = None,
        init: str | None = None,
        beside: list[Recipe] | None = None,
        recalibrate: bool = False,
        report: bool = True,
    ) -> Soup:
        """Cook a soup from checkpoints, save it, and report what it gains on the test data.

        Candidates are judged on the validation data; the report's numbers come from the test data. The report
        (``report.html``, pictures, ``report.json``) lies in a folder beside the output, and goes to the loggers.

        Args:
            model: The module that the ingredients belong to; its weights are overwritten and hold the soup afterwards.
            datamodule: Validation data to choose on, test data to report on.
            ingredients: Checkpoint files, run folders, patterns (``runs/*/checkpoints/*.ckpt``) or
                ``wandb:entity/project/artifact:version``.
            recipe: How the coefficients are chosen; UniformSoup by default.
            output: The soup's file: .safetensors, or .ckpt, .pt, .pth, .bin in the shape of the first ingredient.
            metric: Metric that the validation step logs.
            mode: Whether a large (max) or a small (min) value of the metric is good; by default min for losses and
                errors, known by their names, and max for all else.
            init: The weights that all ingredients started from: for WiSE-FT, and for the report's curve.
            beside: Other recipes to show beside this one in the report.
            recalibrate: Estimate BatchNorm statistics anew for each soup, in one pass over the training data after the
                coefficients are chosen; score and report are those with the new ones. A model without BatchNorm, or
                whose statistics are the same in all ingredients (frozen in fine-tuning), stays as it is, with a note.
            report: Measure on the test data and write the report. Costs a validation and a test pass per ingredient, a
                test pass per soup, and with ``init`` one for each of the 11 points of the curve.

        Returns:
            The soup.

        Raises:
            LightningSoupError: Ingredients that cannot be read or averaged, an unknown metric, an output that cannot be
                written. Nothing half-written is left. Test data that cannot be reported on is a warning: the soup is
                saved by then.
        """
        if self.world_size > 1:
            raise UnsupportedSetup(
                f"soup evaluates on one device, but the Trainer has {self.world_size}. Pass --trainer.devices=1."
            )
        if datamodule is None:
            raise UnsupportedSetup(
                "soup needs a data module with validation data (--data). Without, cook from files only."
            )
        if not is_overridden("val_dataloader", datamodule):
            raise UnsupportedSetup(
                f"soup chooses on validation data, but {type(datamodule).__name__} has no val_dataloader(). Add one, "
                "or cook from files only, without --config, --model and --data."
            )
        if recalibrate and not is_overridden("train_dataloader", datamodule):
            raise UnsupportedSetup(
                f"soup with recalibrate estimates BatchNorm statistics on training data, but "
                f"{type(datamodule).__name__} has no train_dataloader(). Add one, or pass --recalibrate=false."
            )
        if user_path(output).suffix in WEIGHT_SUFFIXES:
            check_output(output)
        found = gather_ingredients(ingredients, output=output)
        check_soup_output(output, found)  # whether it may be a folder, they say
        start = None if init is None else Ingredient.from_path(init)
        evaluator = ModuleEvaluator(model, datamodule, metric, mode, self)
        shown = silent if self.progress_bar_callback is None else rich_progress
        chosen = recipe or UniformSoup()
        soups = cook_all([chosen, *(beside or ())], found, evaluator, start, shown, recalibrate=recalibrate)
        soup = soups[str(chosen)]
        path = soup.save(output)
        changed = [f"{trial.label}: {trial.reason}" for trial in soup.history[-1:] if soup.statistics]
        self._tell(soup.table(), *changed, f"Saved: {plain(path)}")
        measured = None
        if report and is_overridden("test_dataloader", datamodule):
            title = f"Soup of {len(found)} ingredients"
            saved = {str(chosen): path}
            try:
                measured = measure(
                    soups, found, evaluator, start, saved=saved, title=title, commands=_typed(), progress=shown
                )
                page = measured.write(path.parent / f"{path.stem}_report")
            except LightningSoupError as error:  # the soup is there; data that cannot be reported on does not undo it
                measured = None
                warnings.warn(f"no report was written: {error}", stacklevel=2)
            else:
                self._tell(measured.table(), measured.headline, f"Report: {plain(page)}")
        if measured is None:
            log_soup(self.loggers, soup, path)
        else:
            log_report(self.loggers, measured, path)
        soup.apply_to(model)
        return soup

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        checkpoints: list[str] | str,
        metric: str = "val_loss",
        mode: Literal["min", "max"] | None = None,
        init: str | None = None,
        budget: int | None = None,
        tolerance: float | None = None,
        output: str = "inspection",
    ) -> Inspected:
        """Say which checkpoints can be averaged: by their weights, and by what validation says in between.

        Args:
            model: The module that the checkpoints belong to; its weights are overwritten.
            datamodule: Validation data, and training data where BatchNorm's statistics were trained.
            checkpoints: Checkpoint files, run folders, patterns or ``wandb:entity/project/artifact:version``.
            metric: Metric that the validation step logs.
            mode: Whether a large (max) or a small (min) value of the metric is good.
            init: The weights that all started from, if they are there still.
            budget: Evaluations at most; by default four for each checkpoint.
            tolerance: Barriers up to this count as none; by default a tenth of the median value of the metric.
            output: Folder of ``inspection.json`` and the pictures.

        Returns:
            What was found.

        Raises:
            LightningSoupError: Fewer than two checkpoints, files that cannot be read, an unknown metric, a folder that
                cannot be written.
        """
        if self.world_size > 1:
            raise UnsupportedSetup(
                f"inspect evaluates on one device, but the Trainer has {self.world_size}. Pass --trainer.devices=1."
            )
        if datamodule is None or not is_overridden("val_dataloader", datamodule):
            raise UnsupportedSetup(
                "inspect with a module needs a data module with validation data (--data). Without, leave out the model "
                "too: weights are compared by themselves."
            )
        folder = user_path(output)
        check_writable(folder / "inspection.json")
        start = None if init is None else Ingredient.from_path(init)
        shown = silent if self.progress_bar_callback is None else rich_progress
        found = inspect_checkpoints(
            gather_ingredients(checkpoints),
            start,
            ModuleEvaluator(model, datamodule, metric, mode, self),
            budget=budget,
            tolerance=tolerance,
            progress=shown,
        )
        write_inspection(folder, found.seen, found.basins, found.alike)
        self._tell(
            inspection_table(found.seen, found.basins),
            *verdict(found.seen, found.basins),
            f"Written to {plain(folder)}",
        )
        return found

    def resolution(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        search: ResolutionSearch | None = None,
        ckpt: str | None = None,
        output: str = "resolution",
        test: bool = True,
    ) -> ResolutionChoice:
        """Evaluate a model at several image sizes, choose one on validation data, and test there, once.

        Args:
            model: The module.
            datamodule: Validation data to choose on, test data to report on.
            search: Which sizes, and by which rule one is chosen.
            ckpt: Weights to evaluate, in any format; by default those that the model is built with.
            output: Folder of ``resolution.json``, ``resolution.png`` (accuracy and cost over size) and ``table.json``,
                which the same command goes on with as long as weights, data and hyperparameters are the same.
            test: Report the metric of the test data at the chosen size and at that of training.

        Returns:
            The table and the choice.

        Raises:
            LightningSoupError: Weights that do not fit, sizes that the model cannot take, no validation data.
        """
        if self.world_size > 1:
            raise UnsupportedSetup(
                f"resolution evaluates on one device, but the Trainer has {self.world_size}. Pass --trainer.devices=1."
            )
        if datamodule is None:
            raise UnsupportedSetup("resolution needs a data module with validation data (--data).")
        datamodule.trainer = self  # as in its own loops: setup may ask for it
        folder = user_path(output)
        check_writable(folder / "resolution.json")
        if ckpt is not None:
            ModuleEvaluator(model, datamodule).load(open_checkpoint(ckpt))
        chosen_by = search or ResolutionSearch()
        shown = silent if self.progress_bar_callback is None else rich_progress
        found = chosen_by.run(model, datamodule, folder / "table.json", shown, self)
        testable = test and is_overridden("test_dataloader", datamodule)
        tested = test_scores(chosen_by, found, model, datamodule, self) if testable else {}
        write_resolution(found, tested, folder)
        log_resolution(self.loggers, found, tested)
        self._tell(resolution_table(found, tested), f"Written to {plain(folder)}")
        return found

    def _tell(self, *lines: object) -> None:
        from rich.console import Console

        if self.is_global_zero:
            for line in lines:
                Console().print(line)


def _typed() -> list[str]:
    """The command that was typed, where this is the command line."""
    program, *arguments = sys.argv
    return [shlex.join(["lightning-soup", *arguments])] if Path(program).name == "lightning-soup" else []
