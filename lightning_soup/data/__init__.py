"""Data modules: handwritten digits that need no network, image folders, torchvision's sets, texts, prompts, crowds.

References for ZSCL, too. Each name is imported when it is first used, since Lightning and torchvision are slow to
import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soup.data.crowd import CrowdDataModule as CrowdDataModule
    from lightning_soup.data.digit_styles import DigitStyleReference as DigitStyleReference
    from lightning_soup.data.digit_styles import DigitStylesDataModule as DigitStylesDataModule
    from lightning_soup.data.handwriting import Affine as Affine
    from lightning_soup.data.handwriting import HandwritingDataModule as HandwritingDataModule
    from lightning_soup.data.image_folder import ImageFolderDataModule as ImageFolderDataModule
    from lightning_soup.data.label_aggregation import method_labels as method_labels
    from lightning_soup.data.label_aggregation import soft_labels as soft_labels
    from lightning_soup.data.prompts import PromptDataModule as PromptDataModule
    from lightning_soup.data.reference import Reference as Reference
    from lightning_soup.data.reference import ReferenceFiles as ReferenceFiles
    from lightning_soup.data.simulated_crowd import SimulatedCrowd as SimulatedCrowd
    from lightning_soup.data.texts import TextDataModule as TextDataModule
    from lightning_soup.data.torchvision_sets import TorchvisionDataModule as TorchvisionDataModule
    from lightning_soup.data.transforms import Augmentation as Augmentation
    from lightning_soup.data.votes import Votes as Votes
    from lightning_soup.data.votes import read_votes as read_votes

_HOME = {
    "Affine": "handwriting",
    "Augmentation": "transforms",
    "CrowdDataModule": "crowd",
    "DigitStyleReference": "digit_styles",
    "DigitStylesDataModule": "digit_styles",
    "HandwritingDataModule": "handwriting",
    "ImageFolderDataModule": "image_folder",
    "PromptDataModule": "prompts",
    "Reference": "reference",
    "ReferenceFiles": "reference",
    "SimulatedCrowd": "simulated_crowd",
    "TextDataModule": "texts",
    "TorchvisionDataModule": "torchvision_sets",
    "Votes": "votes",
    "method_labels": "label_aggregation",
    "read_votes": "votes",
    "soft_labels": "label_aggregation",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
