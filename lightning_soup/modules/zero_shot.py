"""Zero-shot classifiers: class names and templates become the rows of a linear head.

Source: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022 (arXiv 2109.01903), section 3.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_soup.data.image_folder import class_folders
from lightning_soup.errors import UnsupportedSetup

__all__ = [
    "IMAGENET",
    "check_tokens",
    "evaluating",
    "fill",
    "mean_embeddings",
    "read_classnames",
    "read_templates",
    "zero_shot_head",
]

IMAGENET = "imagenet"
"""Stands for the class names of ImageNet."""

_TEXTS_AT_ONCE = 1024  # of which the activations of a ViT-B's text tower take about 2 GB

Tokenize = Callable[[list[str]], Tensor]


def read_classnames(classnames: Sequence[str] | str) -> list[str]:
    """Class names as they are given: a list, a text file with one name a line, or a folder of class folders.

    The names of class folders are used as words, ``great_white_shark`` as "great white shark". ``imagenet`` stands for
    the 1000 names that CLIP's authors chose, in the order of the class folders.

    Raises:
        UnsupportedSetup: No such file, one that is not UTF-8, fewer than two names, an empty name, or a set of names,
            which has no order.
    """
    place = "classnames"
    if classnames == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if isinstance(classnames, str):
        path = Path(classnames).expanduser()
        place = str(path)
        if path.is_dir():
            names = [name.replace("_", " ") for name in class_folders(path)]
        elif path.is_file():
            names = [line.strip() for line in _text_of(path).splitlines()]
            while names and not names[-1]:  # the file's last line break
                names.pop()
        else:
            raise UnsupportedSetup(
                f"classnames={classnames!r}: there is no such file. Expected a text file with one class name a line, "
                "a folder with one folder per class, 'imagenet', or a list of names."
            )
    elif isinstance(classnames, Sequence):
        names = list(classnames)
    else:
        raise UnsupportedSetup(
            f"classnames is a {type(classnames).__name__}. Expected a list: class c is the name at place c."
        )
    if len(names) < 2:
        raise UnsupportedSetup(
            f"{place}: expected the names of at least two classes, got {len(names)} ({', '.join(names) or 'none'})."
        )
    if not all(isinstance(name, str) and name.strip() for name in names):
        number = next(i for i, name in enumerate(names) if not (isinstance(name, str) and name.strip()))
        raise UnsupportedSetup(f"{place}: the name of class {number} is {names[number]!r}. Expected words.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        warnings.warn(
            f"{place}: several classes have one name ({', '.join(twice[:10])}), so their rows of the head are equal "
            "before training. Tell them apart: 'crane (bird)', 'crane (machine)'.",
            stacklevel=2,
        )
    return names


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark, which is part of no name
    except UnicodeDecodeError as error:
        raise UnsupportedSetup(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def read_templates(templates: Sequence[str] | str) -> list[str]:
    """The sentences around a class name, with ``{}`` in its place.

    Args:
        templates: ``openai``, the 80 that CLIP's authors wrote for ImageNet; ``simple``, their choice of 7; one
            sentence; or a list of sentences.

    Raises:
        UnsupportedSetup: An unknown name, no template, or one without ``{}``.
    """
    if isinstance(templates, str):
        if templates in ("openai", "simple"):
            from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

            known = OPENAI_IMAGENET_TEMPLATES if templates == "openai" else SIMPLE_IMAGENET_TEMPLATES
            return [template("{}") for template in known]
        if "{}" not in templates:
            raise UnsupportedSetup(
                f"templates={templates!r}: expected 'openai', 'simple', or sentences with {{}} where the class name "
                "goes, for example 'a photo of a {}.'."
            )
        return [templates]
    if not templates:
        raise UnsupportedSetup("templates is empty. Give at least one sentence, for example 'a photo of a {}.'.")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise UnsupportedSetup(
                f"The template {template!r} has no {{}}: it would be the same sentence for every class. Put {{}} where "
                "the class name goes, for example 'a photo of a {}.'."
            )
    return list(templates)


def fill(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name, class by class: C·T texts."""
    return [template.replace("{}", name) for name in classnames for template in templates]


def mean_embeddings(embeddings: Tensor) -> Tensor:
    """w_c = normalise(mean_t normalise(e_ct)), for text embeddings ``[C, T, D]``; unit rows ``[C, D]``."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(dim=1), dim=-1)


def zero_shot_head(
    model: nn.Module,
    tokenize: Tokenize,
    classnames: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """Rows of a zero-shot classifier: the template embeddings of each class, averaged and of unit length.

    Scale them by exp(logit_scale) for logits. The text tower runs in evaluation mode and full precision; gradients
    flow where they are enabled.

    Args:
        model: A model with ``encode_text(tokens [M, L])``.
        tokenize: Makes tokens ``[M, L]`` of M texts.
        classnames: Names of C classes.
        templates: T sentences with ``{}``.
        device: Where to compute it, ``cuda`` for instance; by default where the model is. The model is moved back.

    Returns:
        Unit rows, ``[C, D]``, where the model is.

    Raises:
        UnsupportedSetup: No class names, or two that become the same tokens.
    """
    if not classnames:
        raise UnsupportedSetup("There are no class names to build a head from.")
    home = next(model.parameters()).device
    place = torch.device(device or home)
    count = max(1, _TEXTS_AT_ONCE // len(templates))
    rows: list[Tensor] = []
    seen: dict[bytes, str] = {}
    if place != home:
        model.to(place)
    try:
        with evaluating(model), torch.autocast(place.type, enabled=False):
            for start in range(0, len(classnames), count):
                names = classnames[start : start + count]
                tokens = tokenize(fill(names, templates))
                check_tokens(names, tokens, seen)
                embeddings = model.encode_text(tokens.to(place))
                rows.append(mean_embeddings(embeddings.unflatten(0, (len(names), len(templates)))))
    finally:
        if place != home:
            model.to(home)
    return torch.cat(rows).to(home)


def check_tokens(names: Sequence[str], tokens: Tensor, seen: dict[bytes, str] | None = None) -> None:
    """Make sure that the texts of different classes are different to the model.

    Args:
        names: Names of C classes.
        tokens: Tokens of their texts, ``[C·T, L]``, class by class.
        seen: Tokens of classes that were looked at before; those of these are added.

    Raises:
        UnsupportedSetup: Two classes become the same tokens.
    """
    seen = {} if seen is None else seen
    for name, own in zip(names, tokens.numpy().reshape(len(names), -1), strict=True):
        other = seen.setdefault(own.tobytes(), name)
        if other != name:
            raise UnsupportedSetup(
                f"The classes {other!r} and {name!r} become the same tokens, so the model cannot tell them apart: "
                f"texts are cut after {tokens.shape[-1]} tokens, and most tokenizers ignore capitals. Use shorter "
                "names or templates, or a larger text_cfg.context_length."
            )


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode: no dropout, and BatchNorm by its statistics."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
