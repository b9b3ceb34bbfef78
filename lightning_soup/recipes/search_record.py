"""The file of a search: every candidate with its coefficients and score, so that no evaluation is lost or repeated."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.weights.atomic import atomic_path, user_path

_SECONDS = 1.0  # between two writings, so that fast evaluations are not slowed down


class SearchRecord:
    """Coefficients and scores in the order in which they were tried, in a JSON file if there is to be one.

    Args:
        path: The file; ``None``: the search is not recorded beyond its own life.
        about: What the candidates depend on, as plain values: a record is only gone on with where it is the same.

    Attributes:
        alphas: The coefficients, each ``[R, K]``.
        scores: Their scores; NaN where there is none.

    Raises:
        RecipeError: The file is no such record, or one of another search.
    """

    def __init__(self, path: str | os.PathLike | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else user_path(path)
        self.about = json.loads(json.dumps(dict(about), default=float))  # as it is read: a tuple becomes a list
        self.alphas: list[Tensor] = []
        self.scores: list[float] = []
        self._written, self._saved = 0.0, 0
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def take(self, begin: int, generation: Sequence[Tensor]) -> list[float]:
        """The scores that are known of a generation whose first candidate has this number.

        Raises:
            RecipeError: The record holds other candidates there.
        """
        recorded = self.alphas[begin : begin + len(generation)]
        if not all(_same(*pair) for pair in zip(recorded, generation, strict=False)):
            raise RecipeError(
                f"{self.path}: its candidates are not those of this search, though its settings are: it was changed, "
                "or written by another version. Name another file."
            )
        return self.scores[begin : begin + len(recorded)]

    def add(self, alpha_RK: Tensor, score: float) -> None:
        """Note one more candidate; written at most once in a second, and by :meth:`save`."""
        self.alphas.append(alpha_RK)
        self.scores.append(score)
        if time.monotonic() - self._written > _SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is new, atomically."""
        if self.path is None or self._saved == len(self.scores):
            return
        scores = [score if math.isfinite(score) else None for score in self.scores]
        tried = [{"coefficients": a.tolist(), "score": s} for a, s in zip(self.alphas, scores, strict=True)]
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps({**self.about, "tried": tried}))
        self._written, self._saved = time.monotonic(), len(self.scores)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            tried = content.pop("tried")
            alphas = [torch.tensor(item["coefficients"], dtype=torch.float64) for item in tried]
            scores = [math.nan if item["score"] is None else float(item["score"]) for item in tried]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RecipeError(
                f"{path}: is no record of a search ({type(error).__name__}: {error}). Name another file, or remove it."
            ) from error
        other = [name for name, value in self.about.items() if content.get(name) != value]
        if other:
            told = "; ".join(f"{name} was {_short(content.get(name))}, is {_short(self.about[name])}" for name in other)
            raise RecipeError(
                f"{path}: is the record of another search ({told}). Cook with the same settings and ingredients to go "
                "on with it, or name another file."
            )
        self.alphas, self.scores, self._saved = alphas, scores, len(scores)


def _same(a_RK: Tensor, b_RK: Tensor) -> bool:
    return a_RK.shape == b_RK.shape and torch.allclose(a_RK, b_RK, rtol=0.0, atol=1e-9)


def _short(value: Any) -> str:
    text = f"{len(value)} values" if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
