"""Batches of a running fit, from a loader of our own: the one in use must not lose its place."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, SequentialSampler

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.module_evaluator import listed

Data = Literal["val", "train"]


def batches_of_fit(trainer: Trainer, data: Data, seed: int | None = None) -> Generator[Any, None, None]:
    """Batches of the first loader, each rank its share; close the generator when there are enough.

    Random numbers are drawn from torch's state, which is the caller's to isolate, and from generators that a user made
    for a loader, which get their states back. What else has a state (a sampler or a data set that counts) moves on.

    Args:
        trainer: The Trainer, in ``fit``.
        data: Of validation or of training.
        seed: Draw as with this seed, whatever the states are; None: go on from them.

    Raises:
        UnsupportedSetup: The fit has no such data.
    """
    loop = trainer.fit_loop if data == "train" else trainer.fit_loop.epoch_loop.val_loop
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        raise UnsupportedSetup(f"this fit has no {data}_dataloader to take batches from. Give it one.")
    loader = listed(source.dataloader())[0]
    if trainer.world_size > 1 and isinstance(loader, DataLoader):
        shuffled = data == "train" and not isinstance(loader.sampler, SequentialSampler)
        stage = RunningStage.TRAINING if data == "train" else RunningStage.VALIDATING
        loader = trainer._data_connector._prepare_dataloader(loader, shuffle=shuffled, mode=stage)
    if isinstance(loader, DataLoader) and loader.persistent_workers and loader.batch_sampler is not None:
        # Asking a loader with persistent workers for an iterator starts the one in use again.
        loader = DataLoader(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
        )
    with _own_randomness(loader, seed):
        yield from loader


@contextmanager
def _own_randomness(loader: Any, seed: int | None) -> Iterator[None]:
    """Give the generators that a user made for a loader their states back: they decide the order of training."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    holders = [loader, *samplers, getattr(samplers[1], "sampler", None)]
    found = {
        id(own): own for holder in holders if isinstance(own := getattr(holder, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        if seed is not None:
            torch.manual_seed(seed)
            for generator, _ in states:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
