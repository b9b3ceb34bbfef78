"""What replicas begin with: their weights, their settings, and signals that each of them minds for itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_soup.distributed.ranks import Ranks
from lightning_soup.distributed.replica_ends import saved_tensors
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.settings import set_optimizer_options

_ALIKE = "ReplicaStrategy(common_start=False): all replicas have the same weights"
_INSTEAD = (
    "Build the layers in the module's configure_model, which is called with random numbers of each rank's own, or let "
    "save_hyperparameters() keep all arguments; or leave the option out."
)

__all__ = ["begin", "leave_signals_local", "override_options"]


def begin(module: LightningModule, ranks: Ranks, common_start: bool, seed: int) -> None:
    """Begin with one model on all ranks, or with one for each.

    Where those that ought to differ are alike, each rank makes the module once more, from its hyperparameters and with
    random numbers of its own, and takes the weights.

    Args:
        module: The module, on its device.
        ranks: All ranks.
        common_start: Whether all begin with rank 0's weights.
        seed: This rank's.

    Raises:
        UnsupportedSetup: Replicas have other parameters than rank 0; or are alike, where they should not be.
    """
    tensors = saved_tensors(module)
    _check_shapes({name: list(tensor.shape) for name, tensor in tensors.items()}, ranks)
    if common_start:
        for tensor in tensors.values():
            tensor.copy_(ranks.send_from(0, tensor))
        return
    if _are_alike(tensors, ranks):
        ranks.agree(lambda: _make_anew(module, tensors, seed))
        rank_zero_info(
            "ReplicaStrategy(common_start=False): the weights were the same on all ranks; each begins with new ones "
            "instead, of the module made anew from its hyperparameters."
        )
    if _are_alike(tensors, ranks):
        raise UnsupportedSetup(f"{_ALIKE}, also when made anew: do they come from a file? {_INSTEAD}")


def _are_alike(tensors: Mapping[str, Tensor], ranks: Ranks) -> bool:
    sums = ranks.gather([float(tensor.double().sum()) for tensor in tensors.values() if tensor.is_floating_point()])
    return len(sums) > 1 and all(other == sums[0] for other in sums)


@torch.no_grad()
def _make_anew(module: LightningModule, tensors: Mapping[str, Tensor], seed: int) -> None:
    given = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    try:
        with isolate_rng():
            torch.manual_seed(seed)
            made = saved_tensors(type(module)(**given))
    except Exception as error:
        raise UnsupportedSetup(
            f"{_ALIKE}, and {type(module).__name__} cannot be made anew from its hyperparameters "
            f"({type(error).__name__}: {error}). {_INSTEAD}"
        ) from error
    if made.keys() != tensors.keys():
        raise UnsupportedSetup(f"{_ALIKE}, and made anew it has other parameters. {_INSTEAD}")
    for name, tensor in tensors.items():
        tensor.copy_(made[name])


def _check_shapes(shapes: Mapping[str, list[int]], ranks: Ranks) -> None:
    first, *others = ranks.gather(shapes)
    for rank, found in zip(ranks.members[1:], others, strict=True):
        apart = sorted(name for name in found.keys() | first.keys() if found.get(name) != first.get(name))
        if apart:
            raise UnsupportedSetup(
                f"replicas must have the same parameters, but {apart[0]} has the shape {first.get(apart[0])} on rank 0 "
                f"and {found.get(apart[0])} on rank {rank}. Override no size of the model."
            )


def override_options(
    module: LightningModule, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], settings: Mapping[str, Any]
) -> None:
    """Set options of optimizers that the module has no hyperparameter for.

    Raises:
        UnsupportedSetup: An optimizer has no such option, or a schedule would set it back.
    """
    driving = [type(one).__name__ for one in schedulers if not isinstance(one, ReduceLROnPlateau)]
    if "lr" in settings and driving:  # which have kept the rates that they began with
        raise UnsupportedSetup(
            f"ReplicaStrategy(overrides): {type(module).__name__} has no hyperparameter 'lr', and as an option of the "
            f"optimizer {driving[0]} would set it back. Let configure_optimizers read self.hparams.lr."
        )
    for name, value in settings.items():
        if any(name not in optimizer.defaults for optimizer in optimizers):
            known = [one for one in module.hparams if not one.startswith("_")]  # without what LightningCLI adds
            options = sorted({option for optimizer in optimizers for option in optimizer.defaults})
            raise UnsupportedSetup(
                f"ReplicaStrategy(overrides): {type(module).__name__} has no hyperparameter {name!r}, and its optimizer"
                f" no such option. The module has {', '.join(known) or 'none'}; the optimizer {', '.join(options)}."
            )
        for optimizer in optimizers:
            set_optimizer_options(optimizer, {name: value})


def leave_signals_local(trainer: Trainer) -> None:
    """Let a rank that is told to end do so by itself.

    Lightning broadcasts from rank 0 before every batch whether it was told, and all wait for that: a global barrier in
    each step, which training without synchronisation must not have, and an error once any rank is gone.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector

    def look() -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    def notified(signum: Any, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True

    loop._broadcast_sigterm_tensor = look
    connector._sigterm_notifier_fn = notified
