"""LandscapeMonitor: how sharp the loss is around the weights of a training, epoch by epoch."""

import math
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_soup.callbacks.fit_batches import Data
from lightning_soup.callbacks.landscape_figures import LossFigures, movable, norm
from lightning_soup.callbacks.rank_zero_files import on_rank_zero
from lightning_soup.callbacks.selected_tensors import trainable
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.errors import UnsupportedSetup

Figure = Literal["lambda_max", "trace", "loss", "distance_from_start", "norm"]


class LandscapeMonitor(Callback):
    """Log figures of the loss landscape at the weights that an epoch ends with.

    Each is logged as ``<name>/<figure>`` and can be monitored by ModelCheckpoint and EarlyStopping at the end of an
    epoch, with a progress in epochs:

    - ``lambda_max``, the largest algebraic eigenvalue of the Hessian over the trained parameters, and
      ``lambda_max_error``, a bound on its distance from an eigenvalue;
    - ``trace``, the Hessian's trace, which may be below 0, and ``trace_error``, its standard error;
    - ``loss``, the mean of what ``validation_step`` returns, in evaluation mode, on the same batches each time;
    - ``distance_from_start``, ‖θ − θ_0‖₂ over all parameters that were trained so far, and ``norm``, ‖θ‖₂ over those
      that are trained now;
    - ``barrier`` with ``previous``: the loss in the middle between these weights and those measured before, over the
      mean of the losses of both. BatchNorm's statistics are averaged like weights, so that it is fair for near ones.

    Measuring changes nothing in training: it runs on copies of the tensors, with random numbers of its own, in float32
    without autocast (float64 where training is), uncompiled. An average over time is not measured, but the weights that
    are trained. Where the loss is not finite the figures are NaN, with a warning.

    Works on one device, and under DDP, where rank 0 measures on its share of the data and the others wait: for long
    measurements raise ``DDPStrategy(timeout=…)``. A fit that is resumed goes on with the start of the first: θ_0 (and,
    with ``previous``, the weights measured last) is kept in memory of the processor, and in each checkpoint.

    Args:
        every_n_epochs: Measure at the end of every n-th epoch.
        epochs: Measure at the end of these epochs instead, as Lightning numbers them: 0 is the first.
        metrics: Which figures to log; all by default. Without ``lambda_max``, ``trace``, ``loss`` and ``previous`` no
            data is needed.
        previous: Also log ``barrier``, from the second measurement on; costs two losses.
        data: Take the batches from the first ``"val"`` loader, or from the first ``"train"`` loader.
        batches: How many, from the first on, or all where there are fewer; kept in the loader's memory. With shuffled
            data, those that ``seed`` draws. Samplers and data sets with a state of their own, other than a torch
            generator, would move on: keep to ``"val"`` with those.
        max_steps: Hessian products for ``lambda_max`` at most.
        tolerance: ``lambda_max`` is done when its bound is below this share of it.
        max_probes: Hessian products for ``trace`` at most.
        trace_tolerance: ``trace`` is done when its standard error is below this share of it.
        keep_graph: Hold the gradient's graph of all batches in memory: a product costs two gradients then, not three
            and a half.
        seed: Of the batches and of the vectors.
        name: Prefix of what is logged; of two monitors in one Trainer, each needs its own.

    Attributes:
        figures: What was measured last, by name without the prefix; on every rank.

    Raises:
        UnsupportedSetup: Before training: an option out of range, no epoch at which it would measure, no data, no
            parameter that is trained, ``validation_step`` returns no loss or gathers from other ranks, or a strategy
            that shards or has several models.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        epochs: list[int] | None = None,
        metrics: list[Figure] | None = None,
        previous: bool = False,
        data: Data = "val",
        batches: int = 4,
        max_steps: int = 30,
        tolerance: float = 0.01,
        max_probes: int = 50,
        trace_tolerance: float = 0.05,
        keep_graph: bool = False,
        seed: int = 0,
        name: str = "landscape",
    ) -> None:
        least = {"every_n_epochs": every_n_epochs, "batches": batches, "max_steps": max_steps, "max_probes": max_probes}
        for option, value in least.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UnsupportedSetup(f"LandscapeMonitor({option}={value!r}): expected a whole number, 1 or more.")
        for option, share in {"tolerance": tolerance, "trace_tolerance": trace_tolerance}.items():
            if not 0 < share < math.inf:
                raise UnsupportedSetup(f"LandscapeMonitor({option}={share!r}): expected a share above 0, such as 0.01.")
        if epochs is not None and (not epochs or min(epochs) < 0):
            raise UnsupportedSetup(f"LandscapeMonitor(epochs={epochs}): expected numbers of epochs, from 0 on.")
        if data not in get_args(Data):
            raise UnsupportedSetup(f"LandscapeMonitor(data={data!r}): expected 'val' or 'train'.")
        metrics = list(get_args(Figure)) if metrics is None else metrics
        unknown = [figure for figure in metrics if figure not in get_args(Figure)]
        if unknown or not (metrics or previous):
            known = ", ".join(get_args(Figure))
            raise UnsupportedSetup(f"LandscapeMonitor(metrics={metrics}): expected some of {known}.")
        self.every_n_epochs, self.epochs, self.metrics, self.previous = every_n_epochs, epochs, metrics, previous
        self.data, self.batches, self.name = data, batches, name
        curvature = tuple(figure for figure in metrics if figure in ("lambda_max", "trace"))
        self._of_loss = LossFigures(
            self.state_key, curvature, max_steps, tolerance, max_probes, trace_tolerance, keep_graph, seed
        )
        self._needs_data = bool(curvature) or previous or "loss" in metrics
        self.figures: dict[str, float] = {}
        self._start: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._loss_before = math.nan
        self._batches: list[Any] = []

    @property
    def state_key(self) -> str:
        """Two of them in one Trainer are told apart by what they log."""
        return f"LandscapeMonitor({self.name})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        if stage == "fit":
            check_strategy(trainer, type(self).__name__, "Hessian products need the whole weights")

    # ------------------------------------------------------------------------------------------------ before training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the batches, try one, and keep the start unless a checkpoint brought it."""
        epochs = trainer.max_epochs
        if epochs is not None and epochs >= 0 and not any(map(self._due, range(epochs))):
            raise UnsupportedSetup(
                f"{self.state_key}: every_n_epochs={self.every_n_epochs}, epochs={self.epochs} would measure nothing "
                f"in {epochs} epochs, the first of which is number 0. Measure earlier, or train longer."
            )
        if not trainable(pl_module):
            raise UnsupportedSetup(
                f"{self.state_key}: {type(pl_module).__name__} has no trainable parameter, so there is no landscape. "
                "Set requires_grad before fit."
            )
        if trainer.ckpt_path is None:
            self.figures, self._start, self._before, self._loss_before = {}, {}, {}, math.nan
        on_rank_zero(trainer, lambda: self._begin(trainer, pl_module), f"{self.state_key}: no batch can be measured")
        if not trainer.is_global_zero:  # which had them from the checkpoint
            self._start, self._before = {}, {}

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._needs_data:
            self._batches = self._of_loss.draw(trainer, self.data, self.batches)
            self._of_loss.check(trainer, module, self._batches)
        if trainer.ckpt_path is not None and "distance_from_start" in self.metrics and not self._start:
            rank_zero_warn(
                f"{self.state_key}: the checkpoint that this fit goes on from holds no start for distance_from_start, "
                "which counts from here."
            )
        self._keep_new(module)

    # ------------------------------------------------------------------------------------------------ during training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep parameters that begin to be trained with this epoch as they are until now."""
        if batch_idx == 0 and trainer.is_global_zero:
            self._keep_new(pl_module)

    def _keep_new(self, module: LightningModule) -> None:
        wanted = [self._start] if "distance_from_start" in self.metrics else []
        for kept in [*wanted, *([self._before] if self._before else [])]:
            for slot in trainable(module):
                if slot.name not in kept:
                    kept[slot.name] = slot.tensor.detach().to("cpu", copy=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, if it is time."""
        if not self._due(trainer.current_epoch):
            return
        failed = f"{self.state_key}: cannot measure epoch {trainer.current_epoch}"
        self.figures = on_rank_zero(trainer, lambda: self._measured(trainer, pl_module), failed)
        if not trainer.barebones:  # which logs nothing, and warns of each attempt
            named = {f"{self.name}/{figure}": value for figure, value in self.figures.items()}
            self.log_dict(named, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every_n_epochs == 0 if self.epochs is None else epoch in self.epochs

    def _measured(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        found: dict[str, float] = {}
        if self._needs_data:
            found = self._of_loss.measure(trainer, module, self._batches, self._before)
        if self.previous:
            if self._before:
                found["barrier"] = found.pop("middle") - (found["loss"] + self._loss_before) / 2
            self._before = {name: value.to("cpu", copy=True) for name, value in movable(module).items()}
            self._loss_before = found["loss"]
        if "loss" not in self.metrics:
            found.pop("loss", None)
        trained = {slot.name: slot.tensor.detach() for slot in trainable(module)}
        if "distance_from_start" in self.metrics:
            everything = {slot.name: slot.tensor.detach() for slot in trainable(module, frozen=True)} | trained
            found["distance_from_start"] = norm(everything, self._start)
        if "norm" in self.metrics:
            found["norm"] = norm(trained)
        return found

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the batches go."""
        self._batches = []

    # ---------------------------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """θ_0 as ``start``, and what was measured last: its weights as ``before``, and its loss."""
        return {"start": self._start, "before": self._before, "loss_before": self._loss_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an interrupted fit."""
        self._start, self._before = dict(state_dict["start"]), dict(state_dict["before"])
        self._loss_before = state_dict["loss_before"]
