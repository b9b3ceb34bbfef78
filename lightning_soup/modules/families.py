"""The families of an ensemble: what each is built of, what its members load, and how it sees the images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from glob import glob, has_magic
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import normed
from lightning_soup.modules.initial_weights import load_initial_weights
from lightning_soup.modules.timm_models import build_timm_model
from lightning_soup.recipes import UniformSoup
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.formats import CLASS_NAMES_KEY
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["Family", "FamilyInput", "as_families", "build_family", "label_orders", "trained_statistics"]

_OPTIONS = "the family's model, model_args, img_size, and num_classes, in_chans and one_logit of AwareNet"


@dataclass(frozen=True)
class Family:
    """Networks of one kind, whose probabilities are averaged before families are weighted.

    Args:
        model: A timm model. Members start from different random weights, or with ``pretrained`` from the same ones with
            different heads.
        modules: Instead of ``model``: members of your own, each from images ``[B, C, H, W]`` to logits.
        name: In logs and pictures; by default that of the model, without its tag.
        members: How many; by default as many as there are checkpoints or modules, else AwareNet's
            ``members_per_family``.
        checkpoints: One file a member, in any format that :func:`.open_checkpoint` opens, or patterns.
        prefix: What the names of the network begin with in these files; names without it are taken as they are.
        pretrained: Start from timm's own weights (downloaded once).
        model_args: More arguments of the timm model.
        img_size: Side that images are resized to for this family; by default the model's own where it takes no other
            (most ViTs), else as they come.
        normalization: ``model``: bring images of three channels to the mean and deviation that timm's weights of the
            model were trained with; ``data``: leave them as the data module normalised them. Modules of your own get
            them as they come, unless ``mean`` and ``std`` are given.
        mean: Mean of each channel that the members were trained with, instead of timm's.
        std: Deviation likewise.

    Raises:
        UnsupportedSetup: Neither or both of ``model`` and ``modules``, counts that disagree, or a value out of range.
    """

    model: str | None = None
    modules: list[nn.Module] | None = None
    name: str | None = None
    members: int | None = None
    checkpoints: list[str | PathLike] | None = None
    prefix: str = "model."
    pretrained: bool = False
    model_args: dict[str, Any] | None = None
    img_size: int | None = None
    normalization: Literal["model", "data"] = "model"
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.modules):
            raise UnsupportedSetup(
                f"Family {self.title}: expected either model, the name of a timm model, or modules, networks of your "
                "own (which a checkpoint does not hold: give families again to load it)."
            )
        if isinstance(self.checkpoints, (str, PathLike)):
            raise UnsupportedSetup(
                f"Family {self.title}: checkpoints={str(self.checkpoints)!r}, expected a list of files or patterns: "
                f"[{str(self.checkpoints)!r}]."
            )
        for option, least in (("members", self.members), ("img_size", self.img_size)):
            if least is not None and least < 1:
                raise UnsupportedSetup(f"Family {self.title}: {option}={least}, expected 1 or more.")
        if (self.mean is None) != (self.std is None) or (self.mean and len(self.mean) != len(self.std or [])):
            raise UnsupportedSetup(f"Family {self.title}: expected mean and std together, one number each a channel.")
        if self.pretrained and (self.checkpoints or self.modules):
            raise UnsupportedSetup(
                f"Family {self.title}: pretrained beside checkpoints or modules, but members start from one of them."
            )
        if self.normalization not in ("model", "data"):
            raise UnsupportedSetup(
                f"Family {self.title}: normalization={self.normalization!r}, expected 'model' or 'data'."
            )

    @property
    def title(self) -> str:
        """The name in logs."""
        if self.name is not None:
            return self.name
        return self.model.partition(".")[0] if self.model is not None else type((self.modules or [self])[0]).__name__

    def files(self) -> list[str]:
        """The checkpoints, with patterns resolved in alphabetical order.

        Raises:
            UnsupportedSetup: A pattern that no file has.
        """
        found = []
        for given in self.checkpoints or []:
            path = user_path(given)  # a folder may be called run[1], which as a pattern would be run1
            pattern = has_magic(str(path)) and not path.exists()
            matches = sorted(glob(str(path), recursive=True)) if pattern else [str(path)]
            if not matches:
                raise UnsupportedSetup(f"Family {self.title}: no file is called {given}. Check the pattern.")
            found += matches
        return found

    def count(self, default: int) -> int:
        """How many members there are.

        Raises:
            UnsupportedSetup: ``members`` is not the number of checkpoints or modules.
        """
        known = [len(given) for given in (self.files(), self.modules) if given]
        expected = [*known, *([] if self.members is None else [self.members])] or [default]
        if len(set(expected)) > 1:
            raise UnsupportedSetup(
                f"Family {self.title}: {len(self.files())} checkpoints, {len(self.modules or [])} modules and "
                f"members={self.members} do not agree. Give one checkpoint a member."
            )
        return expected[0]

    def plain(self, **changes: Any) -> dict[str, Any]:
        """As plain values, for hyperparameters."""
        return asdict(replace(self, modules=None, model=self.model or "", **changes))


def as_families(given: Sequence["Family | str | nn.Module | Sequence[nn.Module] | dict"]) -> list[Family]:
    """Families from what a user gives: names of timm models, modules or lists of them, or families.

    Raises:
        UnsupportedSetup: None, or two of one name.
    """
    found = []
    for one in given:
        if isinstance(one, str):
            one = Family(one)
        elif isinstance(one, nn.Module) and not isinstance(one, nn.ModuleList):
            one = Family(modules=[one])
        elif isinstance(one, dict):
            one = Family(**{**one, "model": one.get("model") or None})
        elif not isinstance(one, Family):
            one = Family(modules=list(one))
        found.append(one)
    names = [family.title for family in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise UnsupportedSetup(
            "An ensemble needs at least one family."
            if not found
            else f"Two families are called {', '.join(twice)}. Give them names of their own: Family(name=…)."
        )
    return found


class FamilyInput(nn.Module):
    """Images as a family wants them: its size, and its normalisation instead of the data's.

    Args:
        size: Height and width, or None: as they come.
        mean: Mean that the members were trained with, or None: as they come.
        std: Deviation likewise.
    """

    def __init__(self, size: tuple[int, int] | None, mean: Sequence[float] | None, std: Sequence[float] | None):
        super().__init__()
        self.size, self.mean, self.std = size, mean, std

    def forward(self, images: Tensor, data_mean: Sequence[float] | None, data_std: Sequence[float] | None) -> Tensor:
        """Images ``[B, C, H, W]`` that are normalised as the data says; computed in float32.

        Raises:
            UnsupportedSetup: The family has a normalisation of its own, and the data's is not known.
        """
        found = images
        if self.mean is not None and (data_mean is None or data_std is None):
            raise UnsupportedSetup(
                f"A family wants images normalised with mean={list(self.mean)}, but it is not known what they are "
                "normalised with now. Give AwareNet(data_mean=[…], data_std=[…]), or Family(normalization='data')."
            )
        if self.mean is not None and (list(self.mean), list(self.std)) != (list(data_mean), list(data_std)):
            of_data, of_family = ((mean, std) for mean, std in ((data_mean, data_std), (self.mean, self.std)))
            scale = torch.tensor(of_data[1], device=images.device) / torch.tensor(of_family[1], device=images.device)
            shift = torch.tensor(of_data[0], device=images.device) - torch.tensor(of_family[0], device=images.device)
            shift = shift / torch.tensor(of_family[1], device=images.device)
            found = found.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        if self.size is not None and tuple(found.shape[-2:]) != self.size:
            found = functional.interpolate(
                found.float(), self.size, mode="bicubic", antialias=True, align_corners=False
            )
        return found.to(images.dtype) if images.is_floating_point() else found


def build_family(
    family: Family, members: int, outputs: int, in_chans: int, soup: bool
) -> tuple[nn.ModuleList, FamilyInput]:
    """Build the members and load their checkpoints.

    Args:
        family: What to build.
        members: How many.
        outputs: Outputs of their heads.
        in_chans: Channels of the images.
        soup: One network with the mean of the members' weights instead of the members.

    Raises:
        UnsupportedSetup: timm cannot build the model, or a checkpoint does not fit it.
        UnreadableCheckpoint: A file cannot be opened.
        IncompatibleIngredients: For a soup: the checkpoints cannot be averaged.
        RecipeError: For a soup: they do not start from the same weights.
    """
    files = family.files()
    if soup and len(files) < 2:
        raise UnsupportedSetup(
            f"tier1='soup' averages the weights of a family's members, but {family.title} has {len(files)} "
            "checkpoints. Give two or more that started from the same weights, or use tier1='prob'."
        )
    count = 1 if soup else members
    if family.modules is not None:
        networks = list(family.modules)[:count]
    else:
        networks = [_network(family, outputs, in_chans) for _ in range(count)]
    if soup:
        load_initial_weights(networks[0], files[0], options=_OPTIONS, prefix=family.prefix)  # tells what does not fit
        averaged = UniformSoup().cook(files).weights()
        load_initial_weights(networks[0], averaged, options=_OPTIONS, prefix=family.prefix)
    else:
        for network, path in zip(networks, files, strict=bool(files)):
            load_initial_weights(network, path, options=_OPTIONS, prefix=family.prefix)
    return nn.ModuleList(networks), _input_of(family, networks[0], in_chans)


def label_orders(family: Family) -> dict[str, list[str]]:
    """The classes that each of the family's files names, in the order of its outputs."""
    opened = {path: open_checkpoint(path).metadata.get(CLASS_NAMES_KEY) for path in family.files()}
    return {path: names for path, names in opened.items() if isinstance(names, list)}


def trained_statistics(family: Family, network: nn.Module) -> list[str]:
    """The BatchNorm layers of a family's soup whose statistics its files do not share: training changed them."""
    opened = [open_checkpoint(path) for path in family.files()]
    found = []
    for layer in normed(network):
        name = f"{layer}.running_mean"
        means = [weights.get(f"{family.prefix}{name}", weights.get(name)) for weights in opened]
        if not all(torch.equal(mean, means[0]) for mean in means):
            found.append(layer)
    return found


def _network(family: Family, outputs: int, in_chans: int) -> nn.Module:
    given: dict[str, int | None] = {"num_classes": outputs, "in_chans": in_chans}
    arguments = family.model_args or {}
    if family.img_size is not None and _has_one_size(family.model):
        given["img_size"] = family.img_size
    return build_timm_model(family.model, family.pretrained, arguments, **given)


def _has_one_size(model: str) -> bool:
    """Whether the model is built for one size of images."""
    import timm

    config = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return config is not None and bool(config.fixed_input_size)


def _input_of(family: Family, network: nn.Module, in_chans: int) -> FamilyInput:
    config = getattr(network, "pretrained_cfg", None) or {}
    size = None if family.img_size is None else (family.img_size, family.img_size)
    if size is None and hasattr(network, "patch_embed") and config.get("fixed_input_size"):
        own = getattr(network.patch_embed, "img_size", None)  # after img_size in model_args, too
        size = tuple(own) if own is not None else tuple(config["input_size"][1:])
    mean, std = family.mean, family.std
    if mean is None and family.model is not None and family.normalization == "model" and in_chans == 3:
        mean, std = list(config["mean"]), list(config["std"])
    if mean is not None and len(mean) != in_chans:
        raise UnsupportedSetup(
            f"Family {family.title}: {len(mean)} means, but images have {in_chans} channels. Give one a channel."
        )
    return FamilyInput(size, mean, std)
