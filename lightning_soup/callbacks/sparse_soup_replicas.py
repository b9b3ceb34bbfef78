"""SparseModelSoup with a process for each copy: they retrain at once, and every process cooks the same soup of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_soup.callbacks.retraining import Phase, Plan
from lightning_soup.distributed.replicas import ReplicaStrategy
from lightning_soup.errors import UnsupportedSetup

if TYPE_CHECKING:
    from lightning_soup.callbacks.sparse_soup import SparseModelSoup


def on_replicas(trainer: Trainer) -> bool:
    """Whether copies are trained by processes of their own."""
    return isinstance(trainer.strategy, ReplicaStrategy) and trainer.world_size > 1


def plan_of_replica(dense_epochs: int, cycles: int, retrain_epochs: Sequence[int], copy: int) -> Plan:
    """What one process trains: the dense network as all do, and its copy of each cycle."""
    own = Plan.of(dense_epochs, cycles, retrain_epochs[:1])
    return Plan(Phase(p.cycle, copy if p.cycle else 0, p.first_epoch, p.epochs, p.last) for p in own)


def take_over(callback: "SparseModelSoup", trainer: Trainer) -> None:
    """Let all ranks train as one process would: on all the data, with the random numbers of their copy.

    Raises:
        UnsupportedSetup: There is not one process for each copy, or they would not train alike.
    """
    strategy, name = trainer.strategy, "SparseModelSoup on replicas"
    if trainer.world_size != callback.copies:
        raise UnsupportedSetup(
            f"{name}: {callback.copies} copies on {trainer.world_size} processes. Give devices={callback.copies}, one "
            "for each copy, or train them in turn on one device."
        )
    if len(set(callback.retrain_epochs)) > 1:
        raise UnsupportedSetup(
            f"{name}: vary: retrain_epochs={callback.retrain_epochs}, but copies that train side by side end together. "
            "Train them in turn, or vary something else."
        )
    if strategy.data != "full":
        raise UnsupportedSetup(
            f"{name}: ReplicaStrategy(data={strategy.data!r}) gives each copy a part of the data, where copies differ "
            "by their seeds and settings alone. Give data='full'."
        )
    if strategy.overrides:
        raise UnsupportedSetup(
            f"{name}: ReplicaStrategy(overrides) would train other dense networks. Use vary of SparseModelSoup."
        )
    if strategy.final == "best":
        raise UnsupportedSetup(f"{name}: the fit ends with the soup. Leave final='best' and its monitor out.")
    strategy.final = "all"  # the soup, which all have; a mean before it would be one of copies
    strategy.seeds = False
    trainer._accelerator_connector.use_distributed_sampler = False  # all the data, in the order of this rank's numbers
