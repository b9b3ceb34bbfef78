"""CrowdDataModule: items of another data module with soft labels from a table of votes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_soup.data.soft_labelling import AGGREGATES, METHODS, soft_labels
from lightning_soup.data.votes import Votes, read_votes
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights.atomic import atomic_path

__all__ = ["CrowdDataModule", "SoftLabelled"]

_VERSION = 1  # of the methods: a new one does not take labels of an old one from the cache


class SoftLabelled(Dataset):
    """Some items of a data set with a row of probabilities in the place of their class.

    Args:
        items: The data set, of pairs.
        indices: Which of them, ``[N]``.
        rows: p_i(c), ``[N, C]``, in float32.
    """

    def __init__(self, items: Dataset, indices: list[int], rows: Tensor):
        self.items, self.indices, self.rows = items, indices, rows

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.items[self.indices[index]][0], self.rows[index]

    def __getitems__(self, wanted: list[int]) -> list[tuple[Any, Tensor]]:
        own = [self.indices[i] for i in wanted]
        taken = self.items.__getitems__(own) if hasattr(self.items, "__getitems__") else [self.items[i] for i in own]
        return [(pair[0], self.rows[i]) for pair, i in zip(taken, wanted, strict=True)]


class CrowdDataModule(LightningDataModule):
    """Trains on what annotators said: each training item gets a distribution over classes instead of a label.

    The items are those of another data module, whose validation and test data stay as they are (so a model that is
    chosen on them has seen experts' labels). Tasks in the table are numbers of training items, from 0 on, in the order
    of the data module's training set; for image folders also their paths as ``samples`` has them, or the ends of these.
    Batches of training are ``(images, p)`` with p ``[B, C]``: take ``ImageClassifier(targets="soft")``.

    Args:
        votes: Table with ``task``, ``worker``, ``label``: CSV, or parquet (with the extra ``crowd``).
        items: The data module.
        method: ``mean``, the mean of the seven methods; one of them; ``majority``; or another way to join them: see
            :func:`.soft_labels`.
        class_names: All classes, in the order of the items' class numbers; None: those of ``items``.
        drop_unvoted: Leave training items without votes out. False: they are refused.
        cache: A folder that keeps soft labels, by the contents of the table, the method and its version; None: they are
            computed in each process, the same in all.

    Raises:
        UnsupportedSetup: No such method; in ``prepare_data`` and ``setup``: a table that cannot be read or has wrong
            votes, tasks that are no items, or items without votes.
        MissingExtra: A parquet table, and pyarrow is not installed.
    """

    soft_targets = True

    def __init__(
        self,
        votes: str,
        items: LightningDataModule,
        method: str = "mean",
        class_names: list[str] | None = None,
        drop_unvoted: bool = False,
        cache: str | None = None,
    ):
        super().__init__()
        if method != "majority" and method not in METHODS and method not in AGGREGATES:
            raise UnsupportedSetup(
                f"method={method!r}: expected one of majority, {', '.join(METHODS)}, {', '.join(AGGREGATES)}."
            )
        names = class_names or getattr(items, "class_names", None)
        if names is None:
            raise UnsupportedSetup(
                f"{type(items).__name__} has no class_names, so the labels of votes cannot be numbered. Give "
                "class_names, all classes in the order of their numbers."
            )
        self.votes_file, self.items, self.method = Path(votes).expanduser(), items, method
        self.class_names, self.num_classes = [str(name) for name in names], len(names)
        self.drop_unvoted, self.cache = drop_unvoted, None if cache is None else Path(cache).expanduser()
        self.votes: Votes | None = None
        self.labels: np.ndarray | None = None
        self._train: SoftLabelled | None = None

    def __getattr__(self, name: str) -> Any:
        """Of the data module of the items: names of test sets, groups, preprocessing, batch size."""
        if name.startswith("_") or "items" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.items, name)

    def prepare_data(self) -> None:
        """Compute the soft labels once, where there is a cache."""
        self.items.prepare_data()
        if self.cache is not None:
            self._soft()

    def setup(self, stage: str | None = None) -> None:
        """Set the items up, and match them with the votes."""
        self.items.trainer = self.trainer
        self.items.setup(stage)
        if stage in (None, "fit") and self._train is None:
            self.votes, self.labels = self._soft()
            data = self.items.train_dataloader().dataset
            places = _places(self.votes, data, self.votes_file)
            unvoted = sorted(set(range(len(data))) - set(places))
            if unvoted and not self.drop_unvoted:
                raise UnsupportedSetup(
                    f"{self.votes_file}: {len(unvoted)} of {len(data)} training items have no vote, the first is item "
                    f"{unvoted[0]}. Without a vote there is no soft label: give votes, or drop_unvoted=True."
                )
            self._train = SoftLabelled(data, places, torch.from_numpy(self.labels).float())

    def train_dataloader(self) -> DataLoader:
        """The items' own loader, over soft labels."""
        loader = self.items.train_dataloader()
        return DataLoader(
            self._train,
            batch_size=loader.batch_size,
            shuffle=True,
            num_workers=loader.num_workers,
            drop_last=loader.drop_last,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.num_workers > 0,
        )

    def val_dataloader(self) -> Any:
        """The items' own."""
        return self.items.val_dataloader()

    def test_dataloader(self) -> Any:
        """The items' own."""
        return self.items.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The items' own."""
        return self.items.predict_dataloader()

    def _soft(self) -> tuple[Votes, np.ndarray]:
        votes = read_votes(self.votes_file, self.class_names)
        if self.cache is None:
            return votes, soft_labels(votes, self.method)
        content = xxhash.xxh3_128(self.votes_file.read_bytes())
        content.update(repr((self.method, self.class_names, _VERSION)).encode())
        path = self.cache / f"soft-{content.hexdigest()}.npy"
        if path.is_file():
            try:
                found = np.load(path, allow_pickle=False)
            except (OSError, ValueError):  # damaged: computed anew
                found = None
            if found is not None and found.shape == (len(votes.items), len(votes.classes)):
                return votes, found
        labels = soft_labels(votes, self.method)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, labels, allow_pickle=False)
        return votes, labels


def _places(votes: Votes, data: Any, file: Path) -> list[int]:
    """The number of the training item of each task."""
    count = len(data)
    names = {str(sample[0]): i for i, sample in enumerate(getattr(data, "samples", ()))}
    found, strange = [], []
    for task in votes.items:
        if task.isdecimal() and int(task) < count:
            found.append(int(task))
            continue
        ends = [i for name, i in names.items() if name == task or name.endswith(f"/{task}")]
        if len(ends) == 1:
            found.append(ends[0])
        else:
            strange.append(task)
    if strange:
        raise UnsupportedSetup(
            f"{file}: {len(strange)} tasks are no training items, the first is {strange[0]!r}; expected numbers from 0 "
            f"to {count - 1}{', or paths of images' if names else ''}."
        )
    if len(set(found)) != len(found):
        raise UnsupportedSetup(f"{file}: two tasks are the same training item; name each in one way.")
    return found
