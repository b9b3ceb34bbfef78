"""How image files become tensors: timm's transforms, with size and normalisation taken from a model's name."""

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = ["Augmentation", "Preprocessing", "check_model_name"]


def check_model_name(model_name: str) -> None:
    """Make sure that timm knows a model.

    Args:
        model_name: An architecture (``vit_base_patch16_224``), with a pre-trained tag if wanted (``….augreg_in21k``).

    Raises:
        UnsupportedSetup: timm has no such model or tag; the message lists the closest names.
    """
    import timm

    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        hint = f"Closest names: {', '.join(close)}." if close else "timm.list_models() prints all names."
        raise UnsupportedSetup(f"model_name={model_name!r}: timm has no model of this name. {hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and model_name not in tagged:
        raise UnsupportedSetup(
            f"model_name={model_name!r}: timm has {architecture}, but with no tag {tag!r}. "
            f"With tags it has: {', '.join(tagged) or 'none'}."
        )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; the defaults are timm's.

    Args:
        scale: Smallest and largest share of the image's area that a random crop takes. For short fine-tuning, or
            where the object fills the image, 0.5 to 1 is gentler.
        ratio: Smallest and largest aspect ratio of the crop.
        hflip: Probability of a mirror image. 0 for digits and letters.
        vflip: Probability of an upside-down image.
        color_jitter: Strength of random changes of brightness, contrast and saturation. Not used together with
            ``auto_augment``.
        auto_augment: A policy of timm, for example ``rand-m9-mstd0.5-inc1``, ``augmix-m5-w4-d2``, ``original``.
            ``none`` is the same as None: sweeps pass every value as a text.
        re_prob: Probability of erasing a random rectangle.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    re_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.auto_augment is not None and self.auto_augment.lower() in ("", "none", "null"):
            object.__setattr__(self, "auto_augment", None)
        for name in ("hflip", "vflip", "re_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UnsupportedSetup(f"{name}={getattr(self, name)}: a probability lies between 0 and 1.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UnsupportedSetup(f"scale={self.scale}: expected two shares with 0 < smallest ≤ largest ≤ 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UnsupportedSetup(f"ratio={self.ratio}: expected two numbers with 0 < smallest ≤ largest.")


DEFAULT_AUGMENTATION = Augmentation()


class Preprocessing:
    """Size and normalisation of images, and the two transforms that follow from them.

    Args:
        model_name: The timm model whose size, mean, deviation, interpolation and crop are used.
        img_size: Side of the square image, instead of the model's.
        mean: Mean of each channel, instead of the model's (ImageNet's without a model).
        std: Deviation of each channel, likewise.
        crop_pct: Share of the side that the centre crop of evaluation keeps, instead of the model's. CLIP was
            trained and is judged with 1, which timm does not say of all its tags.

    Raises:
        UnsupportedSetup: Neither a model nor a size was given, or the model is unknown.
    """

    def __init__(
        self,
        model_name: str | None = None,
        img_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
    ):
        import timm
        from timm.data import resolve_data_config

        if model_name is None and img_size is None:
            raise UnsupportedSetup(
                "Neither model_name nor img_size is given, so the size of the images is not known. Give model_name, "
                "the timm model that is trained (its size and normalisation are used), or img_size."
            )
        if img_size is not None and img_size < 1:
            raise UnsupportedSetup(f"img_size={img_size}: expected a number of pixels.")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise UnsupportedSetup(f"crop_pct={crop_pct}: expected a share with 0 < share ≤ 1.")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise UnsupportedSetup(f"{name}={list(values)}: expected three numbers, one a colour channel.")
        if model_name is not None:
            check_model_name(model_name)
        pretrained = timm.get_pretrained_cfg(model_name) if model_name is not None else None
        given = {"img_size": img_size, "mean": mean, "std": std, "crop_pct": crop_pct}
        config = resolve_data_config(given, pretrained.to_dict() if pretrained is not None else {})
        self.input_size: tuple[int, int, int] = tuple(config["input_size"])
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.interpolation: str = config["interpolation"]
        self.crop_pct: float = config["crop_pct"]
        self.crop_mode: str = config["crop_mode"]

    def train(self, augmentation: Augmentation = DEFAULT_AUGMENTATION) -> Callable[..., Tensor]:
        """The transform of training images: random crop and the other random changes."""
        from timm.data import create_transform

        return create_transform(
            self.input_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.re_prob,
            re_mode="pixel",
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )

    def at_size(self, size: tuple[int, int]) -> "Preprocessing":
        """The same for images of another height and width."""
        changed = copy.copy(self)
        changed.input_size = (self.input_size[0], *size)
        return changed

    def exactly(self, size: tuple[int, int]) -> Callable[..., Tensor]:
        """The transform that brings the whole image to this height and width, whatever its aspect ratio is."""
        from timm.data.transforms import str_to_interp_mode
        from torchvision.transforms import Compose, Normalize, Resize, ToTensor

        interpolation = str_to_interp_mode(self.interpolation)
        return Compose([Resize(list(size), interpolation), ToTensor(), Normalize(self.mean, self.std)])

    def evaluate(self) -> Callable[..., Tensor]:
        """The transform of validation and test images: resize and centre crop."""
        from timm.data import create_transform

        return create_transform(
            self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
