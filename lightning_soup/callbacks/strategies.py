"""Which of Lightning's strategies a callback can serve."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_soup.distributed.replicas import ReplicaStrategy
from lightning_soup.errors import UnsupportedSetup


def have_one_model(trainer: Trainer) -> bool:
    """Whether there are several ranks with one model, whose statistics they share."""
    return trainer.world_size > 1 and not isinstance(trainer.strategy, ReplicaStrategy)


def check_strategy(
    trainer: Trainer, owner: str, why: str, *, shards: bool = False, replicas: bool = False, instead: str = ""
) -> None:
    """Refuse strategies whose parameters or files a callback cannot work on, by name.

    Args:
        trainer: The Trainer.
        owner: The callback.
        why: What is wrong with the others.
        shards: Whether FSDP2 (``ModelParallelStrategy``) is served beside one device and DDP.
        replicas: Whether each of the models of :class:`.ReplicaStrategy` can be served for itself.
        instead: What else could be done.

    Raises:
        UnsupportedSetup: The strategy is not among those that are served.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ReplicaStrategy) and not replicas:
        raise UnsupportedSetup(
            f"{owner} does not work with ReplicaStrategy, whose ranks have a model each: it works on that of rank 0 "
            "for all of them. Train each model in a fit of its own, or soup the checkpoints of the replicas afterwards "
            "(`lightning-soup soup --ingredients FOLDER`)."
        )
    served = (SingleDeviceStrategy, DDPStrategy, *([ModelParallelStrategy] if shards else []))
    if isinstance(strategy, served) and not isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
        return
    ways = "one device, strategy='ddp', or ModelParallelStrategy (FSDP2)" if shards else "one device or strategy='ddp'"
    ways += f", or {instead}" if instead else ""
    raise UnsupportedSetup(f"{owner} does not work with {type(strategy).__name__}: {why}. Use {ways}.")
