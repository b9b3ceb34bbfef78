"""Replicas in tests: a fit on ranks, and the same training written out in one process."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_soup import ReplicaStrategy, SimulatedReplicas
from lightning_soup.distributed.outer_step import OuterStep
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer


def fit_replicas(
    world_size: int,
    callbacks: Sequence[Callback] = (),
    strategy: dict[str, Any] | None = None,
    make: Callable[[], LightningModule] = TinyClassifier,
    ckpt_path: str | None = None,
    **options: Any,
) -> Trainer:
    """Fit on this rank, all replicas kept, and give the Trainer; called on every rank."""
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        devices=world_size,
        strategy=ReplicaStrategy(**{"final": "all", "timeout": 60.0, **(strategy or {})}),
        callbacks=list(callbacks),
        **{"max_epochs": 2, "limit_val_batches": 0, **options},
    )
    trainer.fit(make(), datamodule=TinyData(), ckpt_path=ckpt_path)
    return trainer


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a state dict holds."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def simulate(
    world_size: int,
    step: OuterStep,
    every: int,
    epochs: int = 2,
    make: Callable[[], LightningModule] = TinyClassifier,
    accumulate: int = 1,
) -> list[dict[str, Tensor]]:
    """The weights that :func:`fit_replicas` ends with, trained in this process and without Lightning."""
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    modules = [make()]
    for _ in range(world_size - 1):
        modules.append(make())
        modules[-1].load_state_dict(modules[0].state_dict())
    replicas = SimulatedReplicas(modules, step)
    optimizers = [module.configure_optimizers() for module in modules]
    data = TinyData()
    samplers = [
        DistributedSampler(data.train, world_size, rank, seed=int(os.environ["PL_GLOBAL_SEED"]))
        for rank in range(world_size)
    ]
    loaders = [DataLoader(data.train, data.batch_size, sampler=sampler) for sampler in samplers]
    taken = 0
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = list(zip(*loaders, strict=True))
        for index, parts in enumerate(batches):
            stepping = (index + 1) % accumulate == 0 or index + 1 == len(batches)
            for module, optimizer, (x, y) in zip(modules, optimizers, parts, strict=True):
                (nn.functional.cross_entropy(module.net(x), y) / accumulate).backward()
                if stepping:
                    optimizer.step()
                    optimizer.zero_grad()
            taken += stepping
            if stepping and taken % every == 0:
                replicas.average()
    return [weights_of(module) for module in modules]
