"""The head of a CLIPClassifier: where it comes from, and whether it agrees with the data."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["adopt_head", "check_classnames", "check_head", "check_head_shape", "fingerprint", "text_parameters"]

_OWN = ("visual.", "logit_scale", "logit_bias", "text_decoder.")  # what is no part of the text tower


def check_head(train: str, head: str, classnames: object) -> None:
    """Refuse combinations of ``train``, ``head`` and ``classnames`` that cannot work.

    Raises:
        UnsupportedSetup: One of them.
    """
    known = {"train": (train, ("both", "image", "head")), "head": (head, ("text", "trained"))}
    for name, (value, values) in known.items():
        if value not in values:
            raise UnsupportedSetup(f"{name}={value!r}: expected one of {', '.join(values)}.")
    if train == "both" and head == "trained":
        raise UnsupportedSetup(
            "train='both' with head='trained': a trained head does not look at the text tower, which would learn "
            "nothing. Take train='image', or head='text'."
        )
    if train == "head" and head == "text":
        raise UnsupportedSetup("train='head' with head='text': nothing would be trained. Take head='trained'.")
    if head == "trained" and classnames is None:
        raise UnsupportedSetup(
            "head='trained' needs classnames when it is built: a list, a text file with one name a line, or a folder "
            "of class folders. Only a text head can take them from the data module."
        )


def check_classnames(classnames: Sequence[str], found: Sequence[str]) -> None:
    """Compare the class names of the head with those of the data: as many, and where they are alike, in their order.

    Raises:
        UnsupportedSetup: They disagree.
    """
    if len(classnames) != len(found):
        raise UnsupportedSetup(
            f"The data has {len(found)} classes ({_some(found)}), classnames names {len(classnames)} "
            f"({_some(classnames)}). Give one name for each class of the data, in its order."
        )
    number = {_plain(name): index for index, name in enumerate(found)}
    for index, name in enumerate(classnames):
        place = number.get(_plain(name), index)
        if place != index:
            raise UnsupportedSetup(
                f"classnames has {name!r} as class {index}, but in the data it is class {place}: the order differs. "
                f"The order of the data is: {_some(found)}."
            )


def adopt_head(head: nn.Linear, path: str | os.PathLike) -> bool:
    """Copy the trained head of a checkpoint, if it has one.

    Returns:
        Whether it has.

    Raises:
        UnsupportedSetup: It is one for other classes.
    """
    weights = open_checkpoint(path)
    stored = {name: f"head.{name}" for name in head.state_dict()}
    if not all(name in weights for name in stored.values()):
        return False
    shapes = {name: tuple(weights.specs[name].shape) for name in stored.values()}
    check_head_shape(head, shapes["head.weight"], str(path))
    head.load_state_dict({name: weights[place] for name, place in stored.items()})
    return True


def check_head_shape(head: nn.Linear, shape: Sequence[int], place: str) -> None:
    """Refuse a trained head for other classes.

    Raises:
        UnsupportedSetup: The shapes differ.
    """
    if tuple(shape) != tuple(head.weight.shape):
        raise UnsupportedSetup(
            f"{place} has a head for {shape[0]} classes of dimension {shape[-1]}, but classnames names "
            f"{head.out_features} and the model has dimension {head.in_features}. Give the class names that it was "
            "trained with, or reset_head=True to start from the zero-shot head, or head='text' to judge other classes."
        )


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the text tower of an open_clip model."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith(_OWN)]


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of every tensor, ``[len(tensors)]`` in float32 or more: tells whether weights were replaced.

    Soups, live averages and checkpoints all write into a module in ways of their own, some of which torch's version
    counters do not see.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32) if tensors else torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype))


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those of a trained head."""
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
