"""What the families of an ensemble predict on held-out data: one pass of each member, kept to learn weights from."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.evaluation.loading import limited, listed
from lightning_soup.evaluation.mixture import stack_families
from lightning_soup.evaluation.own_loops import OwnLoops
from lightning_soup.progress import Progress, silent

__all__ = ["FamilyPredictions", "held_out_predictions", "predictions_of"]


class FamilyPredictions(NamedTuple):
    """log p_k of every family on some samples, and the answers.

    Attributes:
        log_p: ``[N, K, C]``, float32 or float64.
        targets: ``[N]``.
    """

    log_p: Tensor
    targets: Tensor

    def cpu(self) -> "FamilyPredictions":
        """The same on the CPU."""
        return FamilyPredictions(self.log_p.cpu(), self.targets.cpu())


def predictions_of(loops: OwnLoops, names: Sequence[str], batches: Iterable[Any]) -> FamilyPredictions:
    """Let every member predict batches once, in evaluation mode and without gradients.

    Args:
        loops: Of a module that has ``member_logits(batch)``: logits by family and member.
        names: Of the families.
        batches: Pairs ``(inputs, targets)``.

    Returns:
        On the CPU.

    Raises:
        UnsupportedSetup: There are no batches, or they are no such pairs, or members disagree on the classes.
        NonFiniteWeights: A family predicts NaN; names it.
    """
    parts = []
    with loops.apart(), torch.inference_mode():
        for batch in batches:
            parts.append(predicted(loops.module, loops.placed(batch), names, loops.precision).cpu())
    return joined(parts)


def predicted(module: LightningModule, batch: Any, names: Sequence[str], precision: Precision) -> FamilyPredictions:
    """What the families predict of one batch on the module's device; raises as :func:`predictions_of`."""
    batch = precision.convert_input(batch)
    if not isinstance(batch, (list, tuple)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise UnsupportedSetup(
            f"Weights of families are learned from batches (inputs, targets), got {type(batch).__name__}. "
            "Change the loader."
        )
    with precision.forward_context(), torch.no_grad():
        log_p = stack_families(module.member_logits(batch), names)
    targets = batch[1]
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if targets.shape != log_p.shape[:1] or not whole:
        raise UnsupportedSetup(
            f"The targets are {targets.dtype} of shape {list(targets.shape)}; expected the number of "
            f"the class of each of the {len(log_p)} samples, torch.int64 of shape [{len(log_p)}]. Change the data set."
        )
    _check(log_p, targets, names)
    return FamilyPredictions(log_p, targets.long())


def joined(parts: Sequence[FamilyPredictions]) -> FamilyPredictions:
    """The predictions of several batches as one.

    Raises:
        UnsupportedSetup: There are none.
    """
    if not parts:
        raise UnsupportedSetup("There are no held-out batches to learn the weights of families from.")
    log_p, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    return FamilyPredictions(log_p.clone(), targets.clone())  # no tensors of inference mode


def _check(log_p: Tensor, targets: Tensor, names: Sequence[str]) -> None:
    """Refuse NaN, which would make every weight NaN, and answers that are no classes.

    Raises:
        NonFiniteWeights: Names the families that predict it.
        UnsupportedSetup: A target that is not one of the classes that members answer for.
    """
    broken = [name for name, bad in zip(names, log_p.isnan().any(0).any(-1).tolist(), strict=True) if bad]
    if broken:
        raise NonFiniteWeights(
            f"Members of the families {', '.join(broken)} predict NaN, so no average can be formed. Leave these "
            "members out, or load weights that are whole."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= log_p.shape[-1]:
        raise UnsupportedSetup(
            f"Targets run from {low} to {high}, but the members answer for {log_p.shape[-1]} classes. Number the "
            "classes of the held-out data from 0, or build members for all of them."
        )


def held_out_predictions(
    trainer: Trainer,
    loops: OwnLoops,
    names: Sequence[str],
    loaders: Any,
    limit: int | float,
    progress: Progress = silent,
) -> FamilyPredictions:
    """Predictions of the first of some loaders of a fit; each rank predicts its share, and all get the whole.

    Args:
        trainer: The Trainer, in ``fit``.
        loops: See :func:`predictions_of`.
        names: Likewise.
        loaders: The loaders, as their hook gives them.
        limit: The Trainer's ``limit_…_batches`` for them.
        progress: Shows how far it has come.

    Raises:
        UnsupportedSetup: There is none, or see :func:`predictions_of`.
        NonFiniteWeights: See :func:`predictions_of`.
    """
    given = [] if loaders is None else listed(loaders)
    if not given:
        raise UnsupportedSetup(
            "The weights of families are learned on held-out data, but there is no validation loader. Give one."
        )
    loader, shared = given[0], False
    if trainer.world_size > 1 and isinstance(loader, DataLoader):
        loader = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=RunningStage.VALIDATING)
        shared = isinstance(loader.sampler, DistributedSampler)
    batches = limited(loader, limit)
    found = predictions_of(loops, names, progress(batches, "predictions of the members", sized_len(batches)))
    return gathered(trainer, found, len(loader.dataset)) if shared else found


def gathered(trainer: Trainer, own: FamilyPredictions, total: int) -> FamilyPredictions:
    """Put the shares of all ranks together in the order of the set, without the samples that pad the last ones."""
    columns = [trainer.strategy.all_gather(part.to(trainer.strategy.root_device)).cpu() for part in own]
    return FamilyPredictions(*(column.transpose(0, 1).flatten(0, 1)[:total] for column in columns))
