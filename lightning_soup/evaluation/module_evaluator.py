"""Evaluating a LightningModule: its own validation step, metric and data decide."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_soup.errors import RecipeError, UnsupportedSetup
from lightning_soup.evaluation.evaluator import Evaluator, Weights, direction
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.evaluation.own_loops import OwnLoops, ctrl_c_unchanged, quiet
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import WeightsFile, clean_names, module_tensors

Split = Literal["select", "third", "report"]
_WHOLE_SET = (SequentialSampler, RandomSampler, DistributedSampler)  # samplers that leave nothing out


class ModuleEvaluator(Evaluator):
    """Judges weights by the validation step and metric of a LightningModule.

    One Trainer and one model serve all candidates: their weights are written into the module in place, and the
    data loaders are made once, so workers of a loader with ``persistent_workers=True`` stay alive.

    Splits: ``"select"`` is the validation data, on which recipes choose; ``"report"`` the test data, which is never
    used to choose; ``"third"`` the data module's ``third_dataloader()``, for recipes that need data that neither chose.

    Args:
        module: The module; its weights are overwritten.
        datamodule: Its data.
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
        datamodule: LightningDataModule | None,
        metric: str = "val_acc",
        mode: Literal["min", "max"] | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        mode = mode or direction(metric)
        if mode not in ("min", "max"):
            raise RecipeError(f"mode={mode!r}: expected 'max' (larger is better) or 'min'.")
        self.module, self.datamodule, self.metric, self.mode = module, datamodule, metric, mode
        self.trainer = trainer or _quiet_trainer()
        self._check_data()
        self._held: Any = None
        self._loaders: dict[str, list[Any]] = {}
        self._scores: dict[str, float] = {}

    def _check_data(self) -> None:
        if self.datamodule is None:
            raise UnsupportedSetup(
                f"ModuleEvaluator needs a data module. Wrap the loaders of {type(self.module).__name__}: "
                "LightningDataModule.from_datasets(val_dataset=…, test_dataset=…)."
            )

    # ------------------------------------------------------------------------------------------------------- weights

    def slot(self) -> dict[str, Tensor]:
        """The module's own tensors: a candidate written here needs no further copy."""
        return self._own()

    def load(self, weights: Weights) -> None:
        """Write weights into the module, unless they are the module's own tensors already."""
        own = self._own()
        names = clean_names(own, type(self.module).__name__)
        if not all(name in weights and weights[name].data_ptr() == own[raw].data_ptr() for raw, name in names.items()):
            combine([weights], [1.0], own)

    def _own(self) -> dict[str, Tensor]:
        tensors = module_tensors(self.module)
        if not tensors:
            raise UnsupportedSetup(
                f"{type(self.module).__name__} has no weights yet. If it is built in configure_model, call that before "
                "evaluating."
            )
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

    def _validate(self) -> Mapping[str, Tensor]:
        trainer, loop = self.trainer, self.trainer.validate_loop
        inference_mode = loop.inference_mode
        loop.inference_mode = False  # metric states made in inference mode cannot be updated later
        try:
            with quiet(), isolate_rng(), self._held_data(), hidden(trainer), ctrl_c_unchanged():
                trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
        finally:
            loop.inference_mode = inference_mode
        return trainer.callback_metrics

    def _signed(self, metrics: Mapping[str, Tensor]) -> float:
        if self.metric not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            raise RecipeError(f"the metric {self.metric!r} is not logged in validation. Logged: {logged}.")
        value = float(metrics[self.metric])
        if math.isnan(value):
            raise RecipeError(
                f"the metric {self.metric!r} is NaN for this candidate, so it cannot be compared. Check the validation "
                "data and the ingredients for broken values, or leave that ingredient out."
            )
        return -value if self.mode == "min" else value

    def _validation(self) -> Any:
        """The validation loaders, made once."""
        if self._held is None:
            self.datamodule.prepare_data()
            self.datamodule.setup("validate")
            self._held = self.datamodule.val_dataloader()
        return self._held

    @contextmanager
    def _held_data(self) -> Iterator[None]:
        """Hand the same validation loaders to every run of the Trainer, and do not set the data up anew for each."""
        held, own = self._validation(), vars(self.datamodule)
        stand_ins = {
            "val_dataloader": lambda: held,
            "prepare_data": lambda: None,
            "setup": lambda stage: None,
            "teardown": lambda stage: None,
        }
        previous = {name: own[name] for name in stand_ins if name in own}
        own.update(stand_ins)
        try:
            yield
        finally:
            for name in stand_ins:
                del own[name]
            own.update(previous)

    # ---------------------------------------------------------------------------------------------- loops of our own

    def batches(self, epoch: int, batch_size: int) -> Iterable[Any]:
        """The validation data (of the first loader), shuffled by ``epoch``, in batches of ``batch_size``.

        A loader with a sampler of its own, or over a set without a length, is taken as it is.
        """
        loader = self.loaders("select")[0]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        if type(loader.batch_sampler) is not BatchSampler or not isinstance(loader.sampler, _WHOLE_SET):
            return loader
        return DataLoader(
            loader.dataset,
            batch_size=batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(epoch),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )

    def loss_and_grad(self, weights: Weights, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """The loss that ``validation_step`` returns for a batch, and its gradient for every floating parameter.

        Raises:
            RecipeError: ``validation_step`` returns no loss.
        """
        self.load(weights)
        return self._loops.loss_and_grad(batch)

    def head(self) -> tuple[str, ...]:
        """Weight and bias of the linear layer whose output ``predict_step`` returns; nothing where there is none."""
        return self._loops.head(next(iter(self.batches(0, 2))))

    def outcomes(self, weights: Weights, split: Split = "report") -> dict[str, Outcome]:
        """Predict every sample of a split.

        Returns:
            Logits and targets by data set. For the report split the names are the data module's ``test_names``, and its
            ``test_groups``, a mapping from name to tensor, tell which rows of a set stem from one image.

        Raises:
            RecipeError: Batches are not pairs of inputs and targets, or predictions are not [batch, classes].
        """
        self.load(weights)
        groups = getattr(self.datamodule, "test_groups", {}) if split == "report" else {}
        pairs = zip(self._names(split), self.loaders(split), strict=True)
        return {name: self._loops.outcome(loader, groups.get(name)) for name, loader in pairs}

    def recalibrate(self, weights: Weights) -> dict[str, Tensor]:
        """Estimate BatchNorm statistics anew: the mean over training batches, in one pass without gradients.

        Nothing but the statistics and their counters changes. Do this only where the statistics of the ingredients were
        themselves trained: with statistics that were frozen in fine-tuning it destroys the model.
        """
        self.load(weights)
        self.datamodule.setup("fit")
        self._loops.recalibrate(listed(self.datamodule.train_dataloader())[0])
        return {name: value.clone() for name, value in self.slot().items()}

    # ------------------------------------------------------------------------------------------------------- helpers

    def loaders(self, split: Split) -> list[Any]:
        """The data loaders of a split, made once."""
        if split not in self._loaders:
            if split == "report":
                self.datamodule.prepare_data()
                self.datamodule.setup("test")
                made = self.datamodule.test_dataloader()
            elif split == "third":
                if not hasattr(self.datamodule, "third_dataloader"):
                    raise RecipeError(
                        f"{type(self.datamodule).__name__} has no third_dataloader(); add one for this recipe."
                    )
                made = self.datamodule.third_dataloader()
            else:
                made = self._validation()
            if made is None:
                raise RecipeError(f"{type(self.datamodule).__name__} gives no data loader for the {split} split.")
            self._loaders[split] = listed(made)
        return self._loaders[split]

    def _names(self, split: Split) -> list[str]:
        count = len(self.loaders(split))
        if split == "report" and len(names := getattr(self.datamodule, "test_names", ())) == count:
            return list(names)
        return [split if count == 1 else f"{split}_{i}" for i in range(count)]

    @property
    def _loops(self) -> OwnLoops:
        trainer = self.trainer
        return OwnLoops(self.module, self.datamodule, trainer.strategy.root_device, trainer.precision_plugin)


def listed(loaders: Any) -> list[Any]:
    """Data loaders as a list: Lightning allows one, a list, or a mapping."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


@contextmanager
def hidden(trainer: Trainer) -> Iterator[None]:
    """Keep a Trainer's callbacks and loggers from seeing candidates: they are no part of anyone's training."""
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks, trainer.loggers = [], [DummyLogger() for _ in loggers]  # modules may use self.logger
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers


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
