"""Evaluating a LightningModule: its own validation step, metric and data decide."""

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from lightning_soup.errors import NonFiniteScore, RecipeError, UnsupportedSetup
from lightning_soup.evaluation.evaluator import Evaluator, Split, Weights, direction, not_logged
from lightning_soup.evaluation.loading import (
    as_datamodule,
    handed_out,
    limited,
    listed,
    rebatched,
    warn_of_changing_samples,
    warn_of_random_setup,
)
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.evaluation.own_loops import OwnLoops, ctrl_c_unchanged, hidden, normed, quiet
from lightning_soup.weights.combine import combine
from lightning_soup.weights.in_place import open_target
from lightning_soup.weights.weights_file import (
    WeightsFile,
    clean_names,
    metric_prefixes,
    module_tensors,
    open_checkpoint,
)


class ModuleEvaluator(Evaluator):
    """Judges weights by the validation step and metric of a LightningModule.

    One Trainer and one model serve all candidates: their weights are written into the module in place, and the
    data loaders are made once, so workers of a loader with ``persistent_workers=True`` stay alive.

    Splits: ``"select"`` is the validation data, on which recipes choose; ``"report"`` the test data, which is never
    used to choose; ``"third"`` the data module's ``third_dataloader()``, for recipes that need data that neither chose.

    The validation data must be the same in all runs that gave the ingredients. A data module that splits by the global
    random state gives each seed another split, so that one ingredient was trained on what another is validated on:
    give the split a seed of its own. Random numbers that are drawn in ``setup`` are noticed and warned of; a split in
    the data module's ``__init__`` is not.

    Args:
        module: The module; its weights are overwritten.
        datamodule: Its data; or a DataLoader (or a list of them) of validation data, if nothing else is asked for.
        metric: A metric that the validation step logs.
        mode: ``"max"`` where larger is better, ``"min"`` where smaller is; by default losses and errors, known by their
            names (``val_loss``, ``val/mse``), are minimised and all else is maximised.
        trainer: Trainer that validates (devices, precision); a quiet one on one device by default.

    Raises:
        RecipeError: At the first score: the metric is not among those logged (they are listed), or is NaN.
    """

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | DataLoader | list[DataLoader],
        metric: str = "val_acc",
        mode: Literal["min", "max"] | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        mode = mode or direction(metric)
        if mode not in ("min", "max"):
            raise RecipeError(f"mode={mode!r}: expected 'max' (larger is better) or 'min'.")
        self.module, self.metric, self.mode = module, metric, mode
        self.datamodule = self._data(datamodule)
        self.trainer = trainer or _quiet_trainer()
        self._held: Any = None
        self._loaders: dict[str, list[Any]] = {}
        self._scores: dict[str, float] = {}
        self._told = False

    def _data(self, given: Any) -> LightningDataModule | None:
        return as_datamodule(given)

    # ------------------------------------------------------------------------------------------------------- weights

    def slot(self) -> dict[str, Tensor]:
        """The module's own tensors: a candidate written here needs no further copy."""
        return self._own()

    def ignored(self) -> tuple[str, ...]:
        """The states of metrics: they are in the state dict if they are persistent, but they are no weights."""
        return tuple(prefix.replace("_orig_mod.", "") for prefix in metric_prefixes(self.module))

    def load(self, weights: Weights) -> None:
        """Write weights into the module, unless they are the module's own tensors already."""
        own = self._own()
        names = clean_names(own, type(self.module).__name__)
        if not all(name in weights and weights[name].data_ptr() == own[raw].data_ptr() for raw, name in names.items()):
            combine([open_checkpoint(weights).without(self.ignored())], [1.0], self.module)

    def _own(self) -> dict[str, Tensor]:
        tensors, name = module_tensors(self.module), type(self.module).__name__
        if not tensors:
            raise UnsupportedSetup(
                f"{name} has no weights yet. If it is built in configure_model, call that before evaluating."
            )
        lazy = [key for key, value in tensors.items() if is_lazy(value)]
        if lazy:
            raise UnsupportedSetup(
                f"{name}: {lazy[0]!r} has no shape yet (a lazy layer). Run one batch through the module first."
            )
        open_target(self.module)  # refuses a state dict of copies, into which a candidate would be written in vain
        return tensors

    # --------------------------------------------------------------------------------------------------------- score

    def score(self, weights: Weights) -> float:
        """Validate, and return the metric, negated where ``mode="min"``. A file is validated once, by its digest."""
        key = weights.digest() if isinstance(weights, WeightsFile) else None
        if key is None or key not in self._scores:
            self.load(weights)
            score = self._signed(self._validate())
            if key is None:
                return score
            self._scores[key] = score
        return self._scores[key]

    def figures(self, weights: Weights) -> dict[str, float]:
        """All that the validation step logs for these weights; some may be NaN."""
        self.load(weights)
        return {name: float(value) for name, value in self._validate().items()}

    def splits(self) -> tuple[Split, ...]:
        """The validation data, and the third split where the data module has one."""
        return ("select", "third") if self._third_loaders() else ("select",)

    def score_on(self, weights: Weights, split: Split) -> float:
        """As :meth:`score`, through the validation step, on the validation data or on the third split."""
        if split != "third":
            return super().score_on(weights, split)
        self.load(weights)
        return self._signed(self._validate(split))

    def _validate(self, split: Split = "select") -> Mapping[str, Tensor]:
        trainer, loop = self.trainer, self.trainer.validate_loop
        inference_mode = loop.inference_mode
        loop.inference_mode = False  # metric states made in inference mode cannot be updated later
        try:
            with (
                quiet(),
                isolate_rng(),
                handed_out(self.datamodule, self._held_out(split)),
                hidden(trainer),
                ctrl_c_unchanged(),
            ):
                trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
        finally:
            loop.inference_mode = inference_mode
        return trainer.callback_metrics

    def _signed(self, metrics: Mapping[str, Tensor]) -> float:
        if self.metric not in metrics:
            raise RecipeError(not_logged(self.metric, metrics))
        value = float(metrics[self.metric])
        if math.isnan(value):
            raise NonFiniteScore(
                f"the metric {self.metric!r} is NaN for this candidate, so it cannot be compared. Check the validation "
                "data and the ingredients for broken values, or leave that ingredient out."
            )
        return -value if self.mode == "min" else value

    def _held_out(self, split: Split) -> Any:
        """The loaders of a split, as a data module gives them: of one, metrics have no number in their names."""
        if split == "select":
            return self._validation()
        loaders = self.loaders(split)
        return loaders[0] if len(loaders) == 1 else loaders

    def _validation(self) -> Any:
        """The validation loaders, made once."""
        if self._held is None:
            self.datamodule.prepare_data()
            with warn_of_random_setup(self.datamodule):
                self.datamodule.setup("validate")
            self._held = self.datamodule.val_dataloader()
            warn_of_changing_samples(listed(self._held), self.trainer.limit_val_batches)
        return self._held

    # ---------------------------------------------------------------------------------------------- loops of our own

    def batches(self, epoch: int, batch_size: int) -> Iterable[Any]:
        """The validation data, shuffled by ``epoch``, in batches of ``batch_size``; see :func:`.rebatched`.

        Of several loaders it is that of the metric (``val_acc/dataloader_idx_1``), or the first one.
        """
        loaders, index = self.loaders("select"), self._loader_of_metric()
        if not loaders:
            raise RecipeError("there is no validation data, so no coefficients can be learned. Give a val_dataloader.")
        if len(loaders) > 1 and "/dataloader_idx_" not in self.metric and not self._told:
            self._told = True
            warnings.warn(
                f"coefficients are learned on the first of {len(loaders)} validation loaders, since the name of the "
                f"metric, {self.metric!r}, does not say which it belongs to (…/dataloader_idx_1).",
                stacklevel=2,
            )
        return rebatched(loaders[min(index, len(loaders) - 1)], epoch, batch_size, self.trainer.limit_val_batches)

    def _loader_of_metric(self) -> int:
        found = re.search(r"/dataloader_idx_(\d+)$", self.metric)  # what Lightning appends
        return int(found[1]) if found else 0

    def loss_and_grad(self, weights: Weights, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """The loss that ``validation_step`` returns for a batch, and its gradient for every floating parameter.

        Raises:
            RecipeError: ``validation_step`` returns no loss.
        """
        self.load(weights)
        return self._loops.loss_and_grad(batch, self._loader_of_metric())

    def head(self) -> tuple[str, ...]:
        """Weight and bias of the linear layer whose output ``predict_step`` returns; nothing where there is none."""
        return self._loops.head(next(iter(self.batches(0, 2))))

    def outcomes(self, weights: Weights, split: Split = "report") -> dict[str, Outcome]:
        """Predict every sample of a split.

        Returns:
            Logits and targets by data set. For the report split the names are the data module's ``test_names``, and its
            ``test_groups``, a mapping from name to tensor, tell which rows of a set stem from one image, its
            ``test_classes`` which classes compete on a set (:mod:`.robustness`).

        Raises:
            RecipeError: Batches are not pairs of inputs and targets, or predictions are not [batch, classes].
        """
        self.load(weights)
        pairs = list(zip(self._names(split), self.loaders(split), strict=True))
        told = self.datamodule if split == "report" else None
        groups, classes = getattr(told, "test_groups", {}), getattr(told, "test_classes", {})
        return {name: self._loops.outcome(loader, groups.get(name), classes.get(name)) for name, loader in pairs}

    def recalibrate(self, weights: Weights, frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """Estimate BatchNorm statistics anew: the mean over training batches, in one pass without gradients.

        Only statistics and their counters change; afterwards the module holds these weights with them. Do this only
        where the statistics of the ingredients were themselves trained: with statistics that were frozen in fine-tuning
        it destroys the model. Name those in ``frozen``.

        Raises:
            RecipeError: There is no training data.
        """
        self.load(weights)
        with isolate_rng():
            torch.manual_seed(0)  # the same batches for the same weights
            batches = limited(self._training_loader(), self.trainer.limit_train_batches)
            statistics = self._loops.recalibrate(batches, [*self._frozen(), *self._layers_of(frozen)])
        return {name: value.clone() for name, value in statistics.items()}

    def _frozen(self) -> list[str]:
        """Layers whose statistics are not those of their training; outside a fit, modes say nothing."""
        return []

    def _layers_of(self, statistics: Collection[str]) -> list[str]:
        names = clean_names(self._own(), type(self.module).__name__)
        return [name for name in normed(self.module) if names.get(f"{name}.running_mean") in statistics]

    def _training_loader(self) -> Any:
        self._require("train_dataloader", "to recalibrate BatchNorm statistics on")
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return listed(self.datamodule.train_dataloader())[0]

    def _require(self, hook: str, purpose: str) -> None:
        if not is_overridden(hook, self.datamodule):
            name = type(self.datamodule).__name__.strip("_")
            raise RecipeError(
                f"{name} has no {hook}(), so there is no data {purpose}. Give a data module that has one."
            )

    # ------------------------------------------------------------------------------------------------------- helpers

    def loaders(self, split: Split) -> list[Any]:
        """The data loaders of a split, made once."""
        if split not in self._loaders:
            if split == "report":
                self._require("test_dataloader", "to report on")
                self.datamodule.prepare_data()
                self.datamodule.setup("test")
                made = self.datamodule.test_dataloader()
            elif split == "third":
                made = self._third_loaders()
                if not made:
                    raise RecipeError(
                        f"{type(self.datamodule).__name__} has no third split. Give it one (third_fraction), or a "
                        "third_dataloader() of its own."
                    )
            else:
                made = self._validation()
            if made is None:
                raise RecipeError(f"{type(self.datamodule).__name__} gives no data loader for the {split} split.")
            self._loaders[split] = listed(made)
        return self._loaders[split]

    def _third_loaders(self) -> list[Any]:
        if not hasattr(self.datamodule, "third_dataloader"):
            return []
        self._set_up()
        made = self.datamodule.third_dataloader()
        return [] if made is None else listed(made)

    def _set_up(self) -> None:
        """Have the data module set up as for validation, once."""
        self._validation()

    def _names(self, split: Split) -> list[str]:
        count = len(self.loaders(split))
        if split == "report" and len(names := getattr(self.datamodule, "test_names", ())) == count:
            return list(names)
        return [split if count == 1 else f"{split}_{i}" for i in range(count)]

    @property
    def _loops(self) -> OwnLoops:
        trainer = self.trainer
        return OwnLoops(self.module, self.datamodule, trainer.strategy.root_device, trainer.precision_plugin, trainer)


def _quiet_trainer() -> Trainer:
    with quiet():
        return Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
        )
