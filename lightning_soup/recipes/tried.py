"""What a search has tried: the candidates in order, what they are worth, which were the best yet, what to say of it."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.recipes.recipe import Trial
from lightning_soup.recipes.search import Member

# Shape suffixes: R rows of coefficients (1, or one per block of the network), K checkpoints.

_AMPLIFIED = 1e-3  # of a weight's size: rounding errors that Σ|α| makes of those of the files
_PLATEAU = 0.5  # share of the candidates whose score another one has already


class Tried:
    """Candidates in the order in which they were tried.

    Args:
        starts: Names of the start vectors, which are tried first.
        ridge: λ; see :class:`.EvolutionarySoup`.

    Attributes:
        alphas: Their coefficients ``[R, K]``.
        scores: Their scores, higher is better; NaN and infinities among them.
        worths: Score less ridge, −∞ where the score is not finite: what is maximised.
        improvements: The numbers of those that were the best yet, beginning with the best start vector.
    """

    def __init__(self, starts: Sequence[str], ridge: float) -> None:
        self.starts, self.ridge = list(starts), ridge
        self.alphas: list[Tensor] = []
        self.scores: list[float] = []
        self.worths: list[float] = []
        self.improvements: list[int] = []

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def best(self) -> Tensor | None:
        """The coefficients that are worth most; ``None`` before the start vectors are judged."""
        return self.alphas[self.improvements[-1]] if self.improvements else None

    def add(self, alphas: Sequence[Tensor], scores: Sequence[float]) -> list[Member]:
        """Add a generation, first of all the start vectors, and give what its members are worth.

        Raises:
            RecipeError: No start vector has a finite score.
        """
        begun = len(self)
        self.alphas += alphas
        self.scores += scores
        start = max(range(len(self.starts)), key=lambda i: lowered(self.scores[i]))
        if not math.isfinite(self.scores[start]):
            raise RecipeError(
                f"none of the {len(self.starts)} start vectors of the search has a finite score (they are "
                f"{', '.join(map(str, self.scores[:3]))}, …). Check the validation data and the checkpoints for broken "
                "values; of a training that diverged take earlier ones."
            )
        for alpha_RK, score in zip(alphas, scores, strict=True):
            far = float((alpha_RK - self.alphas[start]).square().sum(1).mean())
            self.worths.append(lowered(score) - self.ridge * far)
        if not begun:
            self.improvements.append(start)
        for i in range(begun or len(self), len(self)):
            if self.worths[i] > self.worths[self.improvements[-1]]:
                self.improvements.append(i)
        return [Member(*pair) for pair in zip(alphas, self.worths[begun:], strict=True)]

    def finalists(self, count: int) -> list[int]:
        """So many of those that were the best yet, spread from the best start vector to the best of all."""
        path = self.improvements
        if count == 1 or len(path) == 1:
            return path[-1:]
        count = min(count, len(path))
        return [path[round(i * (len(path) - 1) / (count - 1))] for i in range(count)]

    def history(self, third: Mapping[int, float], chosen: int, evaluator: Evaluator) -> tuple[Trial, ...]:
        """One trial per candidate.

        Args:
            third: Scores on the third split.
            chosen: The number of the candidate that was chosen.
            evaluator: Judged them.
        """
        kept, found = set(self.improvements), []
        for i, (alpha_RK, score) in enumerate(zip(self.alphas, self.scores, strict=True)):
            finite = math.isfinite(score)
            row = alpha_RK[0].tolist() if len(alpha_RK) == 1 else []
            values = {"amplification": amplification(alpha_RK), **{f"α{k}": a for k, a in enumerate(row, 1)}}
            reason = "" if finite else "no finite score"
            if i in third and math.isfinite(third[i]):
                values["third"] = evaluator.natural(third[i])
                reason = f"{evaluator.metric} {values['third']:.4f} on the third split"
            elif i in third:
                reason = "no finite score on the third split"
            if i == chosen:
                reason = f"chosen: {reason}" if reason else "chosen"
            label = self.starts[i] if i < len(self.starts) else f"candidate {i + 1}"
            found.append(Trial(label, score if finite else None, i in kept, reason, values))
        return tuple(found)

    def notes(self, third: Mapping[int, float], chosen: int, evaluator: Evaluator) -> Iterator[str]:
        """What the user should know of the search: both splits' scores, and where it could not be trusted."""

        def told(scores: Sequence[float] | Mapping[int, float], i: int) -> str:
            return f"{evaluator.natural(scores[i]):.4f}"

        first, count, different = self.improvements[0], len(self), len(set(self.scores))
        where = f"{evaluator.metric} {told(self.scores, first)} → {told(self.scores, chosen)} on the searched data"
        if chosen in third and math.isfinite(third[chosen]):
            before = f"{told(third, first)} → " if math.isfinite(third.get(first, math.nan)) else ""
            yield f"EvolutionarySoup: {where}, {before}{told(third, chosen)} on the third split, which chose."
        else:
            if third:
                yield (
                    f"EvolutionarySoup: none of the {len(third)} finalists has a finite {evaluator.metric} on the "
                    "third split, so the searched data chose. Check the third split for broken values."
                )
            yield (
                f"EvolutionarySoup: {where}. That is no estimate of how good the soup is, since the search has fitted "
                "this data: look at test data, or give the data module a third_dataloader()."
            )
        failed = sum(not math.isfinite(score) for score in self.scores)
        if failed:
            yield f"EvolutionarySoup: {failed} of {count} candidates scored NaN or infinity."
        if different <= _PLATEAU * count:
            yield (
                f"EvolutionarySoup: {count} candidates have {different} different values of {evaluator.metric}, so the "
                "search was on a plateau for much of the time. Search by a loss."
            )


def lowered(score: float) -> float:
    """A score to compare by: −∞ where it is not finite."""
    return score if math.isfinite(score) else -math.inf


def amplification(alpha_RK: Tensor) -> float:
    """Σ|α|, the most of any row: so many times larger the rounding errors of the checkpoints become."""
    return float(alpha_RK.abs().sum(1).max())


def told_amplification(coarse: torch.dtype | None, alpha_RK: Tensor) -> tuple[str, ...]:
    """A note, also given as a warning, where the rounding of the files becomes too large in the soup.

    Args:
        coarse: The coarsest floating type of what is combined, if there is one.
        alpha_RK: The coefficients.
    """
    factor, eps = amplification(alpha_RK), 0.0 if coarse is None else torch.finfo(coarse).eps
    if factor * eps <= _AMPLIFIED:
        return ()
    note = (
        f"EvolutionarySoup: Σ|α| = {factor:.2f} amplifies the rounding errors of the checkpoints, which are in "
        f"{str(coarse).removeprefix('torch.')}, to {factor * eps:.1e} of a weight. Save checkpoints in float32 "
        "(CheckpointTrail does)."
    )
    warnings.warn(note, stacklevel=3)
    return (note,)
