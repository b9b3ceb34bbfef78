"""Validation data as an evaluator needs it: from whatever was given, in any batch size, the same for every score."""

import pickle
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_soup.errors import RecipeError, UnsupportedSetup


class _ValidationLoaders(LightningDataModule):
    """The data module of loaders that were given without one."""

    def __init__(self, loaders: Any) -> None:
        super().__init__()
        self.loaders = loaders

    def val_dataloader(self) -> Any:
        return self.loaders


def as_datamodule(data: Any) -> LightningDataModule:
    """Take a data module as it is, and a DataLoader (or a list of them) as validation data.

    Raises:
        UnsupportedSetup: It is neither.
    """
    if isinstance(data, LightningDataModule):
        return data
    loaders = data if isinstance(data, (list, tuple)) else [data]
    if loaders and all(isinstance(loader, DataLoader) for loader in loaders):
        return _ValidationLoaders(data)
    given = "nothing" if data is None else f"a {type(data).__name__}"
    raise UnsupportedSetup(
        f"an evaluator needs a data module, or a DataLoader of validation data, but was given {given}. Wrap data sets: "
        "LightningDataModule.from_datasets(val_dataset=…, test_dataset=…)."
    )


def listed(loaders: Any) -> list[Any]:
    """Data loaders as a list: Lightning allows one, a list, a mapping, or a CombinedLoader.

    Raises:
        RecipeError: A CombinedLoader that mixes the batches of several loaders.
    """
    if isinstance(loaders, CombinedLoader):
        if loaders._mode != "sequential":
            raise RecipeError(
                f"a CombinedLoader in mode {loaders._mode!r} mixes batches of several loaders, which cannot be told "
                "apart here. Return the loaders as a list, or use mode='sequential'."
            )
        return list(loaders.flattened)
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


@contextmanager
def handed_out(datamodule: LightningDataModule, loaders: Any) -> Iterator[None]:
    """Let a data module hand these validation loaders to every run of the Trainer, and not set up its data anew."""
    own = vars(datamodule)
    stand_ins = {
        "val_dataloader": lambda: loaders,
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


def limited(loader: Any, limit: int | float) -> Iterable[Any]:
    """As many batches as the Trainer's ``limit_…_batches`` lets through."""
    count = _limit(loader, limit)
    return loader if count is None else islice(loader, count)


def rebatched(loader: Any, epoch: int, batch_size: int, limit: int | float) -> Iterable[Any]:
    """The samples of a validation loader, shuffled by ``epoch``, in batches of ``batch_size``.

    A loader with a sampler of its own, or over a set without a length, is taken as it is.

    Args:
        loader: The loader.
        epoch: Decides the order.
        batch_size: Samples in a batch.
        limit: The Trainer's ``limit_val_batches``: the samples are those that its validation sees.
    """
    sampler = getattr(loader, "sampler", None)
    fixed = isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)
    whole = isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler))
    count = _limit(loader, limit)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return limited(loader, limit)
    if type(loader.batch_sampler) is not BatchSampler or not (whole if count is None else fixed):
        return limited(loader, limit)
    dataset = loader.dataset
    if count is not None:
        seen = count * loader.batch_size * getattr(sampler, "num_replicas", 1)
        dataset = Subset(dataset, range(min(seen, len(dataset))))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(epoch),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )


def warn_of_changing_samples(loaders: Iterable[Any], limit: int | float) -> None:
    """Warn of loaders that draw other samples for every pass."""
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, RandomSampler):
            continue
        drops = loader.drop_last and len(sampler) % (loader.batch_size or 1) > 0
        partly = sampler.replacement or len(sampler) < len(loader.dataset) or _limit(loader, limit) is not None
        if drops or partly:
            warnings.warn(
                "the validation loader shuffles and leaves samples out (drop_last, limit_val_batches, or a sampler "
                "that draws some), so a score depends on the random state and not on the weights alone. Use "
                "shuffle=False for validation.",
                stacklevel=4,
            )


@contextmanager
def warn_of_random_setup(datamodule: LightningDataModule) -> Iterator[None]:
    """Warn if the block, which sets the data up, draws from the random state that ``seed_everything`` sets."""
    before = _random_state()
    yield
    if _random_state() != before:
        warnings.warn(
            f"{type(datamodule).__name__} draws random numbers from the global state while it sets up the validation "
            "data. If it splits training from validation data so, every run with another seed gets another split: "
            "what one ingredient is validated on, another was trained on, and scores come out too high. Give the split "
            "a seed of its own, the same in all runs: torch.Generator().manual_seed(split_seed).",
            stacklevel=5,
        )


def _random_state() -> tuple[bytes, bytes]:
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps((random.getstate(), np.random.get_state()))


def _limit(loader: Any, limit: int | float) -> int | None:
    """How many batches a limit stands for; None for all."""
    if isinstance(limit, float):
        return None if limit == 1.0 else int(len(loader) * limit)
    try:
        return None if limit >= len(loader) else limit
    except TypeError:  # a loader without a length
        return limit
