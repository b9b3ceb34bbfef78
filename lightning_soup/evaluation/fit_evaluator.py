"""Evaluating inside a running fit, without disturbing it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Split, Weights
from lightning_soup.evaluation.loading import handed_out, listed
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.evaluation.own_loops import hidden, normed, quiet
from lightning_soup.weights.weights_file import clean_names

# What a validation loop knows of its loaders.
_OF_LOADERS = ("_combined_loader", "_data_fetcher", "_max_batches", "_last_val_dl_reload_epoch")


class FitEvaluator(ModuleEvaluator):
    """Judges weights by the validation loop of a Trainer that is in ``fit``.

    The fit's own validation loop runs (its precision, its metrics, its reduction over ranks), with callbacks and
    loggers out of its sight; the Trainer's state, counters and metrics are put back. Every rank must take part, and
    gets the same score.

    Args:
        trainer: The Trainer, in ``fit``.
        module: Its module; its weights are overwritten.
        metric: A metric that the validation step logs.
        mode: ``"max"`` where larger is better, ``"min"`` where smaller is.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, metric: str, mode: Literal["min", "max"] = "max"
    ) -> None:
        super().__init__(module, trainer.datamodule, metric, mode, trainer)

    def metrics(self) -> Mapping[str, Tensor]:
        """All metrics that validation logs for the weights that the module holds."""
        return self._validate()

    def _data(self, given: LightningDataModule | None) -> LightningDataModule | None:
        return given  # a fit has its loaders, from a data module or not

    def _validate(self, split: Split = "select") -> Mapping[str, Tensor]:
        trainer = self.trainer
        loop = trainer.fit_loop.epoch_loop.val_loop
        with quiet(), isolate_rng(), hidden(trainer), self._undisturbed(loop), self._loading(loop, split):
            if trainer.val_dataloaders is None:
                loop.setup_data()
            if loop.skip:
                raise RecipeError(
                    "there is no validation data in this fit (limit_val_batches=0, or no val_dataloader), so nothing "
                    "can be scored. Add validation, or use UniformSoup."
                )
            loop.run()
            metrics = dict(trainer.callback_metrics)
        if self.metric in metrics:  # the same number on every rank, NaN too, so that all decide alike
            value = metrics[self.metric].to(trainer.strategy.root_device, torch.float64)
            metrics[self.metric] = trainer.strategy.reduce(value, reduce_op="mean")
        return metrics

    @contextmanager
    def _loading(self, loop: Any, split: Split) -> Iterator[None]:
        """Let the validation loop take its batches from another split; for ranks they are divided as its own are."""
        if split == "select":
            yield
            return
        kept = {name: getattr(loop, name) for name in _OF_LOADERS}
        loaders = self._held_out(split)
        loop._combined_loader = loop._data_fetcher = None
        try:
            with handed_out(self.datamodule, loaders):
                loop.setup_data()
                yield
        finally:
            for name, value in kept.items():
                setattr(loop, name, value)

    def _set_up(self) -> None:
        """The fit has done so."""

    @contextmanager
    def _undisturbed(self, loop: Any) -> Iterator[None]:
        """Place the module on its device, and restore every counter and metric."""
        trainer, connector = self.trainer, self.trainer._logger_connector
        kept = {
            name: dict(getattr(connector, name))
            for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
        }
        state = trainer.state.fn, trainer.state.stage, trainer.state.status
        progress, device = loop.state_dict(), self.module.device
        verbose, first_iteration = loop.verbose, connector._first_loop_iter
        modes = dict(loop._module_mode.mode)  # what a validation that is under way will give back
        loop.verbose = False
        logged = dict(loop._results)  # also by callbacks, which do not see this validation
        loop._results.clear()
        for name in kept:  # a metric of training is no score of a candidate
            getattr(connector, name).clear()
        self.module.to(trainer.strategy.root_device)
        loop._results.to(trainer.strategy.root_device)  # the loop's teardown has moved them away
        trainer.validating = True
        try:
            yield
        finally:
            loop._results.clear()
            loop._results.update(logged)
            loop.verbose = verbose
            loop._module_mode.mode = modes
            trainer.state.fn, trainer.state.stage, trainer.state.status = state
            connector._first_loop_iter = first_iteration
            loop.load_state_dict(progress)
            loop.restarting = False
            for name, values in kept.items():
                metrics = getattr(connector, name)
                metrics.clear()
                metrics.update(values)
            loop._results.cpu()
            self.module.to(device)

    def loaders(self, split: Split) -> list[Any]:
        """The fit's own validation loaders; other splits as outside a fit."""
        if split != "select":
            return super().loaders(split)
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        if self.trainer.val_dataloaders is None:
            loop.setup_data()
        return listed(self.trainer.val_dataloaders)

    def recalibrate(self, weights: Weights, frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """As outside a fit, on the fit's own training batches; the mean over ranks, each of which sees its share.

        Layers that are in evaluation mode while the rest trains keep their statistics, on which the rest relies.
        """
        reduce = self.trainer.strategy.reduce
        found = super().recalibrate(weights, frozen)
        found = {n: reduce(v, reduce_op="mean") if v.is_floating_point() else v for n, v in found.items()}
        own = self._own()
        names = clean_names(own, type(self.module).__name__)
        with torch.no_grad():
            for raw, name in names.items():
                if name in found:
                    own[raw].copy_(found[name])
        return found

    def _frozen(self) -> list[str]:
        return [name for name, layer in normed(self.module).items() if not layer.training]

    def _training_loader(self) -> Any:
        return listed(self.trainer.train_dataloader)[0]
