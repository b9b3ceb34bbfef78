"""CrowdDataModule: training on labels that a crowd gave, one distribution over the classes for each item."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_soup.data.crowd_items import (
    SoftTargets,
    as_evaluated,
    flat_images,
    item_names,
    loader_options,
    whole_set,
)
from lightning_soup.data.label_aggregation import Aggregate, Method, check_method, soft_labels
from lightning_soup.data.label_cache import LabelCache
from lightning_soup.data.simulated_crowd import SimulatedCrowd
from lightning_soup.data.vision import random_parts
from lightning_soup.data.votes import Duplicates, Votes, read_votes, row_list
from lightning_soup.errors import UnsupportedSetup

__all__ = ["CrowdDataModule"]


class CrowdDataModule(LightningDataModule):
    """Items of another data module, with the soft labels of a crowd as targets of training.

    Training batches are ``(items, rows)``, where a row holds the probability of each class; ``ImageClassifier`` takes
    them with ``targets: soft``. Validation, third and test sets are those of ``items``, with its experts' labels; with
    ``val_fraction`` validation is by the crowd's labels too. The labels are made once, by one process, and kept in
    ``cache``.

    In the table a task is called what :func:`.item_names` calls it: the path of an image inside its folder, or the
    number of a training item where there are no files; and a label is the name of a class. Votes on items that
    ``items`` holds out of the same set for validation are used to judge the workers, and for nothing else.

    Args:
        items: The data module that has the items, the classes, and the other sets.
        votes: The file of the table of votes, ``.csv``, ``.tsv`` or ``.parquet`` with the columns ``task``, ``worker``
            and ``label``; or a :class:`.SimulatedCrowd`, which votes on the training items by their true labels.
        method: How votes become labels: ``mean`` of the seven methods is the paper's result; see :func:`.soft_labels`.
        methods: Of which methods an aggregate is made; by default of all seven.
        weights: How much each of these counts; by default all alike.
        images: A folder of images to train on, in place of the training images of ``items``: they need not lie in
            folders of classes. A task is then the path inside this folder, and of the training part of an
            ``ImageFolderDataModule`` only the names of the classes are taken (``train: val`` will do).
        unvoted: What to do about training items that have no votes, and so no label: ``error``, or ``drop`` them.
        duplicates: What to do about a worker who voted more than once on an item: ``error``, or ``keep``, where each of
            these votes counts.
        val_fraction: Share of the voted items that are held out for validation, by the crowd's labels, in place of the
            validation set of ``items``: then no expert's label is looked at before the test.
        seed: Decides which these are.
        cache: Folder of labels that were made before; by default ``.soft_labels`` beside the table.

    Raises:
        UnsupportedSetup: A table that cannot be read, tasks that are no items, items without votes, or an option that
            cannot be.
    """

    soft_targets = True

    def __init__(
        self,
        items: LightningDataModule,
        # Path keeps jsonargparse from reading the table as a config of a SimulatedCrowd, which comes first to be saved.
        votes: SimulatedCrowd | str | Path,
        method: Method | Aggregate | Literal["majority"] = "mean",
        methods: list[Method] | None = None,
        weights: list[float] | None = None,
        images: str | None = None,
        unvoted: Literal["error", "drop"] = "error",
        duplicates: Duplicates = "error",
        val_fraction: float = 0.0,
        seed: int = 0,
        cache: str | None = None,
    ):
        super().__init__()
        if not isinstance(items, LightningDataModule) or not isinstance(votes, (SimulatedCrowd, str, Path)):
            raise UnsupportedSetup(
                f"items is a {type(items).__name__}, votes a {type(votes).__name__}: expected a LightningDataModule, "
                "and the name of a file or a SimulatedCrowd. Save a table that is in memory: every process reads it."
            )
        check_method(method, methods, weights)
        if unvoted not in ("error", "drop") or duplicates not in ("error", "keep"):
            raise UnsupportedSetup(
                f"unvoted={unvoted!r}, duplicates={duplicates!r}: expected error or drop, and error or keep."
            )
        if not 0 <= val_fraction < 1:
            raise UnsupportedSetup(f"val_fraction={val_fraction}: expected 0, or a fraction between 0 and 1.")
        if isinstance(votes, SimulatedCrowd) and images is not None:
            raise UnsupportedSetup("A SimulatedCrowd votes by true labels, which a folder of images has none of.")
        self.items, self.votes, self.images = items, votes, images
        self.method, self.methods = method, methods
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.unvoted, self.duplicates = unvoted, duplicates
        self.val_fraction, self.seed, self.cache = val_fraction, seed, cache
        self._train: SoftTargets | None = None
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            if is_overridden(hook, items):  # else the module's own would no longer be asked
                setattr(self, hook, getattr(items, hook))

    # ------------------------------------------------------------------------------------------- what `items` knows

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        names = getattr(self.items, "class_names", None)
        if names is None:  # only numbers are known
            names = range(getattr(self.items, "num_classes", 0))
        if len(names) < 2:
            raise UnsupportedSetup(
                f"{type(self.items).__name__} names no classes. Give it class_names or num_classes, so that every "
                "label in the table has its number."
            )
        return [str(name) for name in names]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def test_names(self) -> Sequence[str]:
        """Names of the test sets."""
        return getattr(self.items, "test_names", ())

    @property
    def test_groups(self) -> dict[str, Tensor]:
        """Which rows of a test set stem from one original."""
        return getattr(self.items, "test_groups", {})

    @property
    def test_classes(self) -> dict[str, list[list[int]]]:
        """Which classes compete on a test set."""
        return getattr(self.items, "test_classes", {})

    @property
    def preprocessing(self) -> Any:
        """How images become inputs, where ``items`` says so."""
        return getattr(self.items, "preprocessing", None)

    # ------------------------------------------------------------------------------------------------------ the labels

    @property
    def labels(self) -> Tensor:
        """The soft labels of the items that are trained on, in their order, float32 ``[N, C]``."""
        self._require()
        return self._train.rows

    @property
    def class_weights(self) -> list[float]:
        """N / (C · n_c), where n_c training items have c as their likeliest class: with it all classes count alike.

        A class that is nobody's likeliest has the weight 0, which no item then has.
        """
        counts = torch.bincount(self.labels.argmax(1), minlength=self.num_classes)
        return [len(self.labels) / (self.num_classes * n) if n else 0.0 for n in counts.tolist()]

    def prepare_data(self) -> None:
        """Let ``items`` prepare its data, then make and keep the labels of the table, where they will be needed."""
        self.items.prepare_data()
        if self._needed() and not isinstance(self.votes, SimulatedCrowd):
            votes = read_votes(self.votes, self.class_names, self.duplicates)
            cache = self._cache(votes)
            if cache.read() is None:
                cache.write(self._made(votes))

    def _needed(self) -> bool:
        """Whether labels are looked at: in a fit, and where validation is by them. A test goes without the table."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            return True
        return self.val_fraction > 0 and self.trainer.state.fn not in ("test", "predict")

    def _cache(self, votes: Votes) -> LabelCache:
        folder = Path(self.votes).expanduser().parent / ".soft_labels" if self.cache is None else Path(self.cache)
        how = json.dumps([self.method, self.methods, self.weights])
        return LabelCache(folder.expanduser(), votes, how)

    def _made(self, votes: Votes) -> np.ndarray:
        return soft_labels(votes, self.method, self.methods, self.weights)

    def _voted(self, dataset: Dataset, names: Sequence[str]) -> tuple[Votes, np.ndarray]:
        """The votes and their labels: what is kept, or as every process makes them alike."""
        if isinstance(self.votes, SimulatedCrowd):
            still = as_evaluated(dataset, self.items)  # without drawing random numbers
            votes = self.votes.votes([int(still[i][1]) for i in range(len(names))], self.class_names, names)
            return votes, self._made(votes)
        votes = read_votes(self.votes, self.class_names, self.duplicates)
        kept = self._cache(votes).read()
        return votes, self._made(votes) if kept is None else kept

    # -------------------------------------------------------------------------------------------------------- the sets

    def setup(self, stage: str | None = None) -> None:
        """Set up ``items``, and give its training items their labels, once."""
        self.items.trainer = self.trainer
        self.items.setup(stage)
        if stage in (None, "fit"):
            self._label()
        elif stage == "validate" and self.val_fraction:
            self._require()

    def _require(self) -> None:
        if self._train is None:
            self.items.setup("fit")
            self._label()

    def _label(self) -> None:
        """Give the training items, which are set up, their labels, unless they are those that have them already."""
        loader = self.items.train_dataloader()
        self._options = loader_options(loader)
        if self._train is not None and loader.dataset is self._labelled:
            return
        self._labelled = loader.dataset
        dataset = loader.dataset if self.images is None else flat_images(self.images, self.items)
        names = item_names(dataset)
        votes, labels = self._voted(dataset, names)
        row = {name: number for number, name in enumerate(votes.items)}
        self._check(votes, names, item_names(whole_set(dataset)))
        voted = [index for index, name in enumerate(names) if name in row]
        rows = torch.from_numpy(labels[[row[names[index]] for index in voted]]).float()
        kept: Sequence[int] = range(len(voted))
        if self.val_fraction:
            kept, held_out = random_parts(len(voted), self.val_fraction, self.seed)
            still = as_evaluated(dataset, self.items)
            self._val = SoftTargets(still, [voted[place] for place in held_out], rows[held_out])
        self._train = SoftTargets(dataset, [voted[place] for place in kept], rows[list(kept)])

    def _check(self, votes: Votes, names: Sequence[str], known: Sequence[str]) -> None:
        """Refuse votes on what is no item, and items without votes."""
        place = "The simulated votes" if isinstance(self.votes, SimulatedCrowd) else self.votes
        where = self.images or f"the items of {type(self.items).__name__}"
        items, voted = set(known), set(votes.items)
        if strangers := [name for name in votes.items if name not in items]:
            rows = votes.rows[np.isin(votes.item, [votes.items.index(name) for name in strangers[:3]])]
            raise UnsupportedSetup(
                f"{place}: {len(strangers)} tasks are not among {where}, such as {_shown(strangers)} in "
                f"{row_list(rows)}; expected names such as {_shown(names)}. Name tasks as the items are named, or "
                "remove the rows of those that are gone."
            )
        without = [name for name in names if name not in voted]
        if without and (self.unvoted == "error" or len(without) == len(names)):
            raise UnsupportedSetup(
                f"{place}: no votes on {len(without)} of the {len(names)} items to train on, such as {_shown(without)}"
                ": they have no label. Add votes, or leave these items out: unvoted: drop."
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches of items and probability rows."""
        return DataLoader(self._train, shuffle=True, **self._options)

    def val_dataloader(self) -> Any:
        """The validation set of ``items``, or with ``val_fraction`` items of the crowd and their probability rows."""
        if not self.val_fraction:
            return self.items.val_dataloader()
        return DataLoader(self._val, **self._options | {"drop_last": False})

    def third_dataloader(self) -> Any:
        """The third split of ``items``, or no loader at all."""
        return self.items.third_dataloader() if hasattr(self.items, "third_dataloader") else []

    def test_dataloader(self) -> Any:
        """The test sets of ``items``."""
        return self.items.test_dataloader()

    def predict_dataloader(self) -> Any:
        """What ``items`` predicts."""
        return self.items.predict_dataloader()

    def teardown(self, stage: str) -> None:
        """Let ``items`` clean up."""
        self.items.teardown(stage)

    def state_dict(self) -> dict[str, Any]:
        """The state of ``items``."""
        return self.items.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let ``items`` go on from it."""
        self.items.load_state_dict(state_dict)


def _shown(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most]))
