"""The mean training loss over a stretch of training: over its batches, and over all ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

WeighBy = Literal["samples", "tokens", "batches"]
_IGNORED = -100  # the target that torch's and transformers' losses leave out


class TrainingLoss:
    """Sums up what ``training_step`` returns. Nothing waits for an accelerator before the mean is asked for.

    Losses that are not finite (an overflow in half precision, whose step is skipped) are left out and counted.

    Args:
        weigh_by: What a batch counts for: its ``"samples"``, its ``"tokens"`` (the ``labels`` of a batch that are not
            -100, or else the ``attention_mask``), or as one, ``"batches"``.
    """

    def __init__(self, weigh_by: WeighBy) -> None:
        if weigh_by not in get_args(WeighBy):
            raise UnsupportedSetup(f"weigh_by={weigh_by!r}: expected one of {', '.join(get_args(WeighBy))}.")
        self.weigh_by = weigh_by
        self._sums: Tensor | None = None  # weighted losses, weights, and batches left out

    def add(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Add a batch, in ``on_train_batch_end``.

        Raises:
            UnsupportedSetup: The training step returns no loss, or the batch does not tell how much it counts.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            if outputs or not trainer.lightning_module.automatic_optimization:
                raise UnsupportedSetup(
                    "MetricsWeightedAveraging records the training loss, but training_step returns none. Return the "
                    "loss (or a dict with 'loss') from it, in manual optimization, too."
                )
            return  # the module skipped this batch
        if trainer.lightning_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided it
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        value = loss.detach().to(dtype)
        weight = torch.as_tensor(self._weight(batch), device=value.device).to(dtype)
        finite = value.isfinite()
        zero = torch.zeros_like(value)
        parts = [torch.where(finite, value * weight, zero), torch.where(finite, weight, zero), (~finite).to(dtype)]
        row = torch.stack(parts)
        self._sums = row if self._sums is None else self._sums + row

    def _weight(self, batch: Any) -> int | Tensor:
        if self.weigh_by == "batches":
            return 1
        if self.weigh_by == "tokens":
            if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
                return (batch["labels"] != _IGNORED).sum()
            if isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
                return batch["attention_mask"].sum()
            raise UnsupportedSetup(
                "weigh_by='tokens' counts the 'labels' or the 'attention_mask' of a batch, but this one is a "
                f"{type(batch).__name__} without them. Use weigh_by='samples'."
            )
        try:
            return extract_batch_size(batch)
        except MisconfigurationException as error:
            raise UnsupportedSetup(
                f"weigh_by='samples': the size of a batch ({type(batch).__name__}) is unknown. Use weigh_by='batches'."
            ) from error

    def reset(self) -> None:
        """Begin a new stretch."""
        self._sums = None

    def mean(self, trainer: Trainer) -> tuple[float, int]:
        """The mean over all ranks, NaN where there was no batch, and how many batches were left out; on every rank."""
        total, weight, skipped = torch.tensor(self.rows(trainer), dtype=torch.float64).sum(0).tolist()
        return (total / weight if weight else float("nan")), int(skipped)

    def rows(self, trainer: Trainer) -> list[list[float]]:
        """The sums of each rank; on every rank."""
        device = trainer.strategy.root_device
        own = torch.zeros(3, dtype=torch.float64) if self._sums is None else self._sums
        gathered = trainer.strategy.all_gather(own.to(device if device.type != "mps" else "cpu"))
        return gathered.reshape(-1, 3).double().tolist()

    def restore(self, trainer: Trainer, rows: Sequence[Sequence[float]]) -> None:
        """Go on from the sums of each rank; with another number of ranks, rank 0 takes all."""
        if len(rows) == trainer.world_size:
            row: Sequence[float] = rows[trainer.global_rank]
        else:
            row = torch.tensor(rows, dtype=torch.float64).sum(0).tolist() if trainer.is_global_zero else [0.0] * 3
        device = trainer.strategy.root_device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.tensor(row, dtype=dtype, device=device)
