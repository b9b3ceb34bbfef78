"""The head of a CLIPClassifier: where it comes from, and whether it agrees with the data."""

import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.zero_shot import IMAGENET, read_classnames
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = [
    "adopt_head",
    "check_classnames",
    "check_head",
    "check_stored_head",
    "fingerprint",
    "named_device",
    "text_parameters",
    "without_head",
]

_OWN = ("visual.", "logit_scale", "logit_bias", "text_decoder.")  # what is no part of the text tower

_OTHER_CLASSES = (
    "To judge other classes, give the weights as checkpoint_path, with head='text' and classnames of this data; a file "
    "that is given as ckpt_path brings its own."
)


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

    Where both are words and none is alike, that is a warning.

    Raises:
        UnsupportedSetup: They disagree.
    """
    if len(classnames) != len(found):
        raise UnsupportedSetup(
            f"The data has {len(found)} classes ({_some(found)}), classnames names {len(classnames)} "
            f"({_some(classnames)}). Give one name for each class of the data, in its order. {_OTHER_CLASSES}"
        )
    if (moved := _misplaced(classnames, found)) is not None:
        index, place = moved
        raise UnsupportedSetup(
            f"classnames has {classnames[index]!r} as class {index}, but in the data it is class {place}: the order "
            f"differs. The order of the data is: {_some(found)}."
        )
    words = not any(character.isdigit() for name in found for character in name)  # others are numbers or codes
    if words and not _alike(classnames, found):
        warnings.warn(
            f"No class of the data ({_some(found)}) is in classnames ({_some(classnames)}); they are compared by their "
            f"numbers. {_OTHER_CLASSES}",
            stacklevel=2,
        )


def _alike(first: Sequence[str], second: Sequence[str]) -> set[str]:
    return {_plain(name) for name in first} & {_plain(name) for name in second}


def _misplaced(classnames: Sequence[str], found: Sequence[str]) -> tuple[int, int] | None:
    """The first name that stands at another place in ``found``, and that place."""
    names, places = [_plain(name) for name in classnames], [_plain(name) for name in found]
    number = {name: index for index, name in enumerate(places)}
    for index, name in enumerate(names):
        place = number.get(name, index)
        # Of classes with one name, each may be at its own place.
        if places[index] != name and names[place] != name:
            return index, place
    return None


def adopt_head(head: nn.Linear, classnames: Sequence[str], path: str | os.PathLike) -> bool:
    """Copy the trained head of a checkpoint, if it has one.

    Args:
        head: Where to.
        classnames: What its classes are called.
        path: The checkpoint.

    Returns:
        Whether it has one.

    Raises:
        UnsupportedSetup: It is one for other classes.
    """
    weights = open_checkpoint(path)
    stored = {name: f"head.{name}" for name in head.state_dict()}
    if not all(name in weights for name in stored.values()):
        return False
    shape = weights.specs[stored["weight"]].shape
    check_stored_head(head, classnames, shape, weights.mapping_beside("hyper_parameters").get("classnames"), str(path))
    head.load_state_dict({name: weights[place] for name, place in stored.items()})
    return True


def check_stored_head(
    head: nn.Linear, classnames: Sequence[str], shape: Sequence[int], trained_for: object, place: str
) -> None:
    """Compare a trained head with the one that a checkpoint holds. Names may be others, as long as none has moved.

    Args:
        head: The head.
        classnames: What its classes are called.
        shape: Shape of the stored head's weight.
        trained_for: The class names that stand beside it, if there are any.
        place: The checkpoint, for the message.

    Raises:
        UnsupportedSetup: Another number of classes, or the same in another order.
    """
    if tuple(shape) != tuple(head.weight.shape):
        raise UnsupportedSetup(
            f"{place} has a head for {shape[0]} classes of dimension {shape[-1]}, but classnames names "
            f"{head.out_features} and the model has dimension {head.in_features}. Give the class names that it was "
            "trained with, or reset_head=True to start from the zero-shot head, or head='text' to judge other classes."
        )
    stored = read_classnames(IMAGENET) if trained_for == IMAGENET else trained_for
    if not isinstance(stored, (list, tuple)) or len(stored) != len(classnames):
        return
    stored = [str(name) for name in stored]
    if (moved := _misplaced(classnames, stored)) is not None:
        index, other = moved
        raise UnsupportedSetup(
            f"{place} has a head trained with {classnames[index]!r} as class {other}, but classnames has it as "
            f"class {index}. Keep the order of its classes ({_some(stored)}), or take reset_head=True or head='text'."
        )
    if not _alike(stored, classnames):
        warnings.warn(
            f"The head of {place} was trained for {_some(stored)}, and none of them is in classnames "
            f"({_some(classnames)}); it is kept, class by class. To judge other classes, take head='text'; to train on "
            "them, reset_head=True.",
            stacklevel=2,
        )


def named_device(device: str) -> torch.device:
    """The device of a name; ``auto``: the GPU, if there is one.

    Raises:
        UnsupportedSetup: The machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UnsupportedSetup(
            f"head_device={device!r} cannot be used: {str(error).splitlines()[0]} Expected auto, cpu, or a device of "
            "this machine, such as cuda or cuda:1."
        ) from error


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the text tower of an open_clip model, compiled or not."""
    named = model.named_parameters()
    return [value for name, value in named if not name.removeprefix("_orig_mod.").startswith(_OWN)]


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
