"""What the families of an ensemble predict on held-out data: one pass of each member, kept to learn weights from."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
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
            batch = loops.precision.convert_input(loops.placed(batch))
            if not isinstance(batch, (list, tuple)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
                raise UnsupportedSetup(
                    f"Weights of families are learned from batches (inputs, targets), got {type(batch).__name__}. "
                    "Change the validation loader."
                )
            with loops.precision.forward_context():
                log_p = stack_families(loops.module.member_logits(batch), names)
            check_predictions(log_p, batch[1], names)
            parts.append((log_p.cpu(), batch[1].cpu()))
    if not parts:
        raise UnsupportedSetup("There are no held-out batches to learn the weights of families from.")
    log_p, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    return FamilyPredictions(log_p.clone(), targets.clone())


def check_predictions(log_p: Tensor, targets: Tensor, names: Sequence[str]) -> None:
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
    trainer: Trainer, loops: OwnLoops, names: Sequence[str], loaders: Any, progress: Progress = silent
) -> FamilyPredictions:
    """Predictions of the first of a fit's validation loaders; each rank predicts its share, and all get the whole.

    Args:
        trainer: The Trainer, in ``fit``.
        loops: See :func:`predictions_of`.
        names: Likewise.
        loaders: The loaders, as their hook gives them.
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
    batches = limited(loader, trainer.limit_val_batches)
    count = len(batches) if hasattr(batches, "__len__") else None
    found = predictions_of(loops, names, progress(batches, "predictions of the members", count))
    return gathered(trainer, found, len(loader.dataset)) if shared else found


def gathered(trainer: Trainer, own: FamilyPredictions, total: int) -> FamilyPredictions:
    """Put the shares of all ranks together in the order of the set, without the samples that pad the last ones."""
    columns = [trainer.strategy.all_gather(part.to(trainer.strategy.root_device)).cpu() for part in own]
    return FamilyPredictions(*(column.transpose(0, 1).flatten(0, 1)[:total] for column in columns))
