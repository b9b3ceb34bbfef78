"""Soft labels in files, named by what they were made of, so that a changed table never meets labels of the old one."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lightning_soup.data.votes import Votes
from lightning_soup.errors import UnwritableOutput
from lightning_soup.weights.atomic import atomic_path

__all__ = ["VERSION", "LabelCache"]

VERSION = 1
"""To be counted up when a method gives other labels than before."""


class LabelCache:
    """The labels of one table by one method, as a safetensors file.

    Args:
        folder: Where files lie; it is made when one is written.
        votes: What the labels are made of.
        how: The method with its options, as text.
    """

    def __init__(self, folder: Path, votes: Votes, how: str):
        key = hashlib.blake2b(f"{votes.fingerprint} {how} {VERSION}".encode(), digest_size=16).hexdigest()
        self.path = folder / f"{key}.safetensors"
        self.shape = len(votes.items), len(votes.classes)

    def read(self) -> np.ndarray | None:
        """The labels, float64 [N, C]; None where there are none yet, or the file is damaged."""
        try:
            labels = load_file(self.path)["labels"]
        except (OSError, KeyError, SafetensorError):
            return None
        fits = labels.shape == self.shape and labels.dtype == np.float64
        return labels if fits and np.allclose(labels.sum(1), 1, atol=1e-6) else None

    def write(self, labels: np.ndarray) -> None:
        """Keep labels. Where that cannot be, warn: every process then makes them itself."""
        try:
            with atomic_path(self.path, size=labels.nbytes) as temporary:
                save_file({"labels": np.ascontiguousarray(labels)}, temporary)
        except (UnwritableOutput, SafetensorError) as error:  # safetensors' own, of a disk that becomes full
            warnings.warn(f"Soft labels are not kept, and made anew by every process: {error}", stacklevel=3)
