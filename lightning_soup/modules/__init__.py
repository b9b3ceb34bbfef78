"""LightningModules: an image classifier with any timm model.

Each name is imported when it is first used, since Lightning and timm are slow to import.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soup.modules.classifier import ImageClassifier as ImageClassifier


def __getattr__(name: str) -> Any:
    if name == "ImageClassifier":
        from lightning_soup.modules.classifier import ImageClassifier

        return ImageClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
