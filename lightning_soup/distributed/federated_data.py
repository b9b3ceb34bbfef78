"""One training set in parts, a part for each client, with the labels that each should have."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_soup.errors import UnsupportedSetup

__all__ = ["ClientPart", "client_parts", "split_by_labels"]


class ClientPart(LightningDataModule):
    """Some of the training images of a data module, shuffled, in its batches and with its hooks.

    Args:
        whole: The data module; it is set up once, by whoever split it.
        indices: Which training examples.
        loader: The data module's for training, as it was when the examples were dealt out: a later ``setup`` may order
            them otherwise. ``None``: it is asked for.
    """

    def __init__(self, whole: LightningDataModule, indices: Sequence[int], loader: DataLoader | None = None) -> None:
        super().__init__()
        self.whole, self.indices = whole, list(indices)
        self.loader = whole.train_dataloader() if loader is None else loader

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the part."""
        whole = self.loader
        size = whole.batch_size or getattr(whole.batch_sampler, "batch_size", None) or 1
        last = whole.drop_last or getattr(whole.batch_sampler, "drop_last", False)
        return DataLoader(
            Subset(whole.dataset, self.indices),
            min(size, len(self.indices)),
            shuffle=True,
            drop_last=last,  # BatchNorm cannot train on a last batch of one
            collate_fn=whole.collate_fn,
            num_workers=whole.num_workers,
            pin_memory=whole.pin_memory,
            worker_init_fn=whole.worker_init_fn,
            multiprocessing_context=whole.multiprocessing_context,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The whole's."""
        self.whole.trainer = self.trainer
        return self.whole.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The whole's."""
        return self.whole.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The whole's."""
        return self.whole.on_after_batch_transfer(batch, dataloader_idx)


def client_parts(data: LightningDataModule, mixes: np.ndarray, seed: int = 0) -> list[ClientPart]:
    """Split the training set of a data module over clients, each example to one.

    Args:
        data: The data module, whose training examples are (input, label).
        mixes: q, ``[N, C]``: the share of each label that a client should have.
        seed: Of the split.

    Raises:
        UnsupportedSetup: There are fewer examples than clients, or labels that the mixes do not know; there is no
            training DataLoader, or several.
    """
    if not is_overridden("train_dataloader", data):
        raise UnsupportedSetup(f"{type(data).__name__} has no train_dataloader, whose data are split over clients.")
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise UnsupportedSetup(
            f"{type(data).__name__}.train_dataloader gave a {type(loader).__name__}. Expected one DataLoader, whose "
            "data are split over clients."
        )
    return [ClientPart(data, indices, loader) for indices in split_by_labels(_labels(loader.dataset), mixes, seed)]


def split_by_labels(labels: Sequence[int], mixes: np.ndarray, seed: int = 0) -> list[list[int]]:
    """Deal examples out to N clients, equally many each, by the labels that each should have.

    Clients draw in turns, a label by their mix among those that are left. So the last draws of a client may be of
    labels that it should not have, where others were faster.

    Args:
        labels: Of the examples, 0 to C − 1.
        mixes: q, ``[N, C]``.
        seed: Of the draws.

    Returns:
        The indices of each client's examples.

    Raises:
        UnsupportedSetup: There are fewer examples than clients, or labels that the mixes do not know.
    """
    labels, (clients, classes) = np.asarray(labels), mixes.shape
    if len(labels) < clients:
        raise UnsupportedSetup(f"{len(labels)} training examples for {clients} clients. Take fewer clients.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UnsupportedSetup(
            f"labels from {labels.min()} to {labels.max()}, but the mixes are over {classes} classes. Give classes="
            f"{labels.max() + 1}, with labels from 0."
        )
    draw = np.random.default_rng(seed)
    pools = [draw.permutation(np.flatnonzero(labels == label)).tolist() for label in range(classes)]
    left = np.array([len(pool) for pool in pools])
    found: list[list[int]] = [[] for _ in range(clients)]
    for turn in range(len(labels)):
        if turn % clients == 0:
            order = draw.permutation(clients)
        client = order[turn % clients]
        q = np.where(left > 0, mixes[client], 0.0)
        total = q.sum()
        cumulated = (q / total if total > 0 else left / left.sum()).cumsum()
        # draw.choice(classes, p=q) without its checks, which take ten times as long
        label = int((cumulated / cumulated[-1]).searchsorted(draw.random(), side="right"))
        left[label] -= 1
        found[client].append(pools[label].pop())
    return found


def _labels(dataset: Dataset) -> list[int]:
    try:
        targets = getattr(dataset, "targets", None)
        if targets is not None and len(targets) == len(dataset):
            return [_label(label) for label in targets]
        return [_label(dataset[i][1]) for i in range(len(dataset))]
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise UnsupportedSetup(
            f"{type(dataset).__name__}: its examples are no pairs (input, label), so they cannot be split by labels "
            f"({error})."
        ) from error


def _label(value: Any) -> int:
    label = int(value)
    if label != value:  # a number that is measured
        raise ValueError(f"{float(value):g} is no label")
    return label
