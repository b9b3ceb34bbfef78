"""SoupReference: a frozen model with the mean of some checkpoints' weights, beside the one that is trained."""

import copy
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.initial_weights import names_in_file
from lightning_soup.weights.adapters import holds_adapter, is_adapter
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint

__all__ = ["SoupReference"]


@dataclass(frozen=True)
class SoupReference:
    """The weights θ_ref = Σ_i c_i·θ_i of a frozen model that a training is held to.

    The checkpoints are added where they lie, chunk by chunk: in memory there is one copy, θ_ref. Modules keep it out of
    their parameters, so that no optimizer, checkpoint or DDP sees it; a checkpoint of theirs says which it was, and
    resuming with another one is refused.

    Args:
        checkpoints: Files or folders in any format that :func:`.open_checkpoint` opens, folders of transformers among
            them; one is enough, such as a soup that is cooked already. All must have started from the same weights, or
            their mean is of no use.
        coefficients: c, one a checkpoint, with the sum 1; None: all the same.
        dtype: Type in which θ_ref is kept, ``bfloat16`` to halve its memory. The sum is always formed in float32 and
            rounded once. None: as the trained model.

    Raises:
        UnsupportedSetup: No list of checkpoints, coefficients that are not one each, finite, and 1 in sum, or another
            type.

    Source: Chegini et al., SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF (arXiv 2411.01798),
    whose c is (α, 1 − α) with α = ½.
    """

    checkpoints: list[str]
    coefficients: list[float] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoints, (list, tuple)) or not self.checkpoints:
            given = f"{self.checkpoints!r:.200}"
            raise UnsupportedSetup(f"SoupReference(checkpoints={given}): expected a list of files or folders.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise UnsupportedSetup(f"SoupReference(dtype={self.dtype!r}): expected float32, bfloat16 or float16.")
        if self.coefficients is None:
            return
        fitting = len(self.coefficients) == len(self.checkpoints) and all(map(math.isfinite, self.coefficients))
        if not fitting or abs(math.fsum(self.coefficients) - 1) > 1e-6:
            raise UnsupportedSetup(
                f"SoupReference(coefficients={list(self.coefficients)}): expected one finite number for each of the "
                f"{len(self.checkpoints)} checkpoints, with the sum 1."
            )

    @property
    def row(self) -> list[float]:
        """The coefficients c, also where none were given."""
        return list(self.coefficients or [1 / len(self.checkpoints)] * len(self.checkpoints))

    def plain(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        names = [open_checkpoint(item).label if not _is_path(item) else os.fspath(item) for item in self.checkpoints]
        return {"checkpoints": names, "coefficients": self.row, "dtype": self.dtype}

    def into(self, model: nn.Module, prefix: str = "model.", options: str = "") -> str:
        """Write θ_ref into a model, and freeze it in evaluation mode.

        Args:
            model: Built as the trained one; its own weights are lost.
            prefix: What its names begin with in the files of a LightningModule.
            options: The arguments that the model was built with, for the message.

        Returns:
            The digest of θ_ref.

        Raises:
            UnsupportedSetup: A checkpoint's tensors are not those of the model, or it is an adapter.
            NonFiniteWeights: A checkpoint holds NaN.
            UnreadableCheckpoint: A file cannot be opened.
        """
        if self.dtype is not None:
            for parameter in model.parameters():  # not the buffers, such as the frequencies of rotary embeddings
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
        found = [_named_as(model, item, prefix, options) for item in self.checkpoints]
        combine(found, self.row, out=model)
        model.requires_grad_(False).eval()
        return open_checkpoint(model).digest()


def _is_path(item: object) -> bool:
    return isinstance(item, (str, os.PathLike))


def _named_as(model: nn.Module, item: Any, prefix: str, options: str) -> WeightsFile:
    """A checkpoint under the names that its tensors have in the model."""
    opened = open_checkpoint(item)
    if is_adapter(opened) or holds_adapter(opened):
        raise UnsupportedSetup(
            f"{opened.path or opened.label} is an adapter, and a reference has whole weights. Merge it into its base "
            "first: by peft's merge_and_unload(), or a checkpoint by `lightning-soup soup --recipe MetricsWeightedSoup "
            "--recipe.metric step --recipe.merge dense --recipe.base BASE --ingredients FILE --output OTHER`."
        )
    # What files of older versions hold and the model does not: transformers' classes know it.
    ignored: Sequence[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    optional = {name for name in opened if any(re.search(pattern, name) for pattern in ignored)}
    where = str(opened.path or opened.label)
    names = names_in_file(
        model, opened, where, optional=optional, options=options or "its arguments", prefix=prefix, new_head=False
    )
    renamed = copy.copy(opened)
    renamed.tensors = {name: opened.tensors[stored] for name, stored in names.items()}
    renamed.original_names = {name: opened.original_names[stored] for name, stored in names.items()}
    renamed._digest = None
    return renamed
