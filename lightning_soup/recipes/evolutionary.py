"""LCSC: coefficients of any sign for the checkpoints of one training, found by search."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.candidates import Candidates
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.parts import blocks_of
from lightning_soup.recipes.recipe import Recipe, Soup, require_evaluator
from lightning_soup.recipes.search import CovarianceAdaptation, Evolution, Search, ema_coefficients
from lightning_soup.recipes.search_record import SearchRecord
from lightning_soup.recipes.tried import Tried, told_amplification
from lightning_soup.weights.atomic import check_writable, user_path
from lightning_soup.weights.weights_file import Source, WeightsFile

# Shape suffixes: R rows of coefficients (1, or one per block of the network), K checkpoints.


def _decays() -> list[float]:
    return [0.0, 0.3, 0.6, 0.8, 0.9, 0.95]


@dataclass(frozen=True)
class EvolutionarySoup(Recipe):
    """min over α of F(Σᵢ αᵢ θᵢ) where Σᵢ αᵢ = 1 and the αᵢ may have any sign and size; F need not have a gradient.

    For checkpoints of *one* training, in their order, some tens of steps apart: :class:`.CheckpointTrail` keeps them.
    Averages over time are special points of the set that is searched; the search begins at some of them and never ends
    below the best of those on the data that it searches. Σα stays 1 by :func:`.project`.

    The search fits the data that it is judged on, the more so the smaller that data is. Where the data module has a
    ``third_dataloader()``, the candidate is chosen there, among the best ones on the way (``finalists``), and the soup
    tells both scores. ``ridge`` restrains it. Choose a smooth metric: accuracy has plateaus on which a search stalls,
    ``val_loss`` has none. Single coefficients mean nothing; they differ between seeds of equal score.

    Coefficients of both signs amplify the rounding errors of the files by Σ|α|: save checkpoints in float32. BatchNorm
    statistics that differ between the checkpoints are estimated anew for each candidate on training data, since a
    variance could become negative. (No other stored quantity that must stay positive is known by its name; leave such
    tensors out of the files.) The coefficients hold for the metric and its settings only, which are recorded.

    Args:
        strategy: ``"evolution"``: an elitist population, crossover, mixing and noise. ``"cma"``: CMA-ES around the best
            start vector, which reaches optima sooner that lie far from the start; on a network no difference was
            measured.
        budget: Evaluations on the selection data, exactly; those of the start vectors included.
        population: P: the most candidates that ``"evolution"`` keeps.
        generation: Candidates that are proposed together, and formed in one read of the checkpoints. More of them cost
            less each, but learn later from one another.
        decays: Decays from one checkpoint to the next, whose averages (:func:`.ema_coefficients`) the search begins
            with, beside the uniform one. 0 is the last checkpoint.
        sigma: σ of the noise; of CMA-ES the first step.
        mutation: The probability that a coefficient gets noise.
        crossover: The probability that parents are crossed, not mixed.
        local: The probability that a candidate is the best one with two coefficients changed. Where ``memory`` is
            short, such a candidate costs reading two checkpoints and not all.
        by: ``"model"``: one α per checkpoint. ``"block"``: one per checkpoint and block of the network (``layers.3``),
            which multiplies the dimensions of the search, and the overfitting.
        ridge: λ: what is maximised is the score less λ‖α − α_start‖², α_start the best of the start vectors (the mean
            over blocks).
        third: Whether the third split chooses: ``"auto"``: where there is one; ``"require"``: it must be there;
            ``"ignore"``: the best score of the search is taken.
        finalists: How many of the best-so-far candidates are judged on the third split, spread over the search.
        memory: GB for candidates of a generation that wait to be judged. With room for fewer than two models they are
            formed one by one in the evaluator's own.
        seed: Of the search: the same seed gives the same history.
        record: JSON file that is kept up to date with every candidate; a search that finds its own goes on from it,
            also with a larger budget, and evaluates nothing again. For ``ModelSoup``, a new one for each fit.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.

    Raises:
        RecipeError: An option out of its range, at once; a record of another search; all start vectors score NaN or
            infinity (later ones are passed over).

    Source: Liu et al., Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better, ICLR 2025
    (arXiv 2404.02241). Its search was not released; what the paper leaves open (P, σ, the operators' details, the third
    split) is ours.
    """

    strategy: Literal["evolution", "cma"] = "evolution"
    budget: int = 400
    population: int = 20
    generation: int = 8
    decays: list[float] = field(default_factory=_decays)
    sigma: float = 0.1
    mutation: float = 0.25
    crossover: float = 0.5
    local: float = 0.0
    by: Literal["model", "block"] = "model"
    ridge: float = 0.0
    third: Literal["auto", "require", "ignore"] = "auto"
    finalists: int = 8
    memory: float = field(default=2.0, repr=False)
    seed: int = 0
    record: str | None = field(default=None, repr=False)
    common_start: CommonStart = "require"

    needs_evaluator: ClassVar[bool] = True

    def __post_init__(self) -> None:
        starts = len(self.decays) + 1
        expected = {
            "strategy": (self.strategy in ("evolution", "cma"), "'evolution' or 'cma'"),
            "by": (self.by in ("model", "block"), "'model' or 'block'"),
            "third": (self.third in ("auto", "require", "ignore"), "'auto', 'require' or 'ignore'"),
            "decays": (_rising(self.decays), "different numbers of 0 ≤ d < 1, rising, at least one"),
            "population": (_whole(self.population, 2), "a whole number, 2 or more"),
            "generation": (
                _whole(self.generation, 2 if self.strategy == "cma" else 1),
                "a whole number, 1 or more; for 'cma' 2",
            ),
            "sigma": (0 < self.sigma < math.inf, "more than 0"),
            **{n: (0 <= getattr(self, n) <= 1, "from 0 to 1") for n in ("mutation", "crossover", "local")},
            "ridge": (0 <= self.ridge < math.inf, "0 or more"),
            "finalists": (_whole(self.finalists, 1), "a whole number, 1 or more"),
            "memory": (0 <= self.memory < math.inf, "0 GB or more, not infinity"),
            "seed": (_whole(self.seed, -math.inf), "a whole number"),
            "budget": (
                _whole(self.budget, starts),
                f"a whole number, {starts} or more, one for each start vector (decays, and uniform)",
            ),
        }
        for name, (held, what) in expected.items():
            if not held:
                raise RecipeError(f"EvolutionarySoup({name}={getattr(self, name)!r}): expected {what}.")

    def check(self, evaluator: Evaluator, new: bool = False) -> None:
        """Refuse an evaluator without the third split that is required, and a record of other checkpoints."""
        if new and self.record is not None:
            path = user_path(self.record)
            if path.exists():
                raise RecipeError(
                    f"EvolutionarySoup(record={self.record!r}): the file is there already, so it is of other "
                    "checkpoints than those that come. Name another file, or remove it."
                )
            check_writable(path)
        if self.third == "require" and "third" not in evaluator.splits():
            raise RecipeError(
                "EvolutionarySoup(third='require'): there is no third split to choose on. Give the data module one "
                "(third_fraction; of your own, a third_dataloader()), or leave the option out."
            )

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Search; see :meth:`.Recipe.cook`. The history holds one trial per evaluation, with Σ|α| and the α."""
        evaluator = require_evaluator(self, evaluator)
        self.check(evaluator)
        third_judges = self.third != "ignore" and "third" in evaluator.splits()
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        if self.strategy == "cma" and len(found) < 3:
            raise RecipeError("EvolutionarySoup(strategy='cma') needs three checkpoints or more; take 'evolution'.")
        groups = blocks_of(found[0].weights) if self.by == "block" else dict.fromkeys(found[0].weights, 0)
        starts = self._starts(found, max(groups.values()) + 1)
        record = SearchRecord(self.record, self._about(found, evaluator))
        candidates = Candidates([item.weights for item in found], evaluator, groups, self.memory * 1e9)
        try:
            tried = self._search(starts, candidates, record, progress)
        finally:
            record.save()
        named = tried.finalists(self.finalists) if third_judges else []
        third = {i: candidates.score_on(tried.alphas[i], "third") for i in progress(named, "third split", len(named))}
        judged = {i: score for i, score in third.items() if math.isfinite(score)}
        chosen = max(judged, key=lambda i: (judged[i], tried.worths[i]), default=tried.improvements[-1])
        alpha_RK = tried.alphas[chosen]
        notes += (*tried.notes(third, chosen, evaluator), *told_amplification(candidates.coarsest, alpha_RK))
        return Soup(
            str(self),
            found,
            candidates.coefficients(alpha_RK),
            score=tried.scores[chosen],
            metric=evaluator.metric,
            mode=evaluator.mode,
            history=tried.history(third, chosen, evaluator),
            notes=notes,
            accumulate="float64",
            statistics=candidates.recalibrated(alpha_RK),
            third_score=judged.get(chosen),
        )

    # ------------------------------------------------------------------------------------------------------- search

    def _search(
        self, starts: dict[str, Tensor], candidates: Candidates, record: SearchRecord, progress: Progress
    ) -> Tried:
        """Evaluate until the budget is spent; what the record holds is not evaluated again."""
        search, tried = self._strategy(), Tried(list(starts), self.ridge)
        left = max(self.budget - len(record.scores), 0)
        shown = iter(progress(range(left), "searching", left))
        generation, number = list(starts.values()), 0
        while generation:
            known = record.take(len(tried), generation)
            scores = list(known)
            with closing(candidates.scores(generation, len(known), tried.best)) as judged:
                for alpha_RK, score in zip(generation[len(known) :], judged, strict=True):
                    next(shown, None)
                    record.add(alpha_RK, score)
                    scores.append(score)
            search.learn(tried.add(generation, scores))
            room = self.budget - len(tried)
            generation = search.propose(number)[:room] if room else []
            number += 1
        next(shown, None)  # lets a progress bar end
        return tried

    def _strategy(self) -> Search:
        if self.strategy == "cma":
            return CovarianceAdaptation(self.generation, self.sigma, self.seed)
        options = (self.sigma, self.mutation, self.crossover, self.local, self.seed)
        return Evolution(self.population, self.generation, *options)

    # ---------------------------------------------------------------------------------------------------- the problem

    def _starts(self, found: Sequence[Ingredient], rows: int) -> dict[str, Tensor]:
        """The start vectors by name: averages over the checkpoints, in the order of their steps where that is known."""
        count = len(found)
        steps = [item.step for item in found]
        order = range(count) if None in steps else sorted(range(count), key=lambda i: steps[i])
        starts = {}
        for d in self.decays:
            alpha_K = torch.zeros(count, dtype=torch.float64)
            alpha_K[list(order)] = torch.tensor(ema_coefficients(count, d), dtype=torch.float64)
            starts["the last checkpoint" if d == 0 else f"EMA, d = {d:g}"] = alpha_K
        starts["uniform"] = torch.full((count,), 1.0 / count, dtype=torch.float64)
        return {name: alpha_K.repeat(rows, 1) for name, alpha_K in starts.items()}

    def _about(self, found: Sequence[Ingredient], evaluator: Evaluator) -> dict[str, object]:
        """What the history of a search depends on."""
        later = {"budget", "third", "finalists", "memory", "record", "common_start"}
        settings = {option.name: getattr(self, option.name) for option in fields(self) if option.name not in later}
        digests = [item.weights.digest() for item in found]
        return {**settings, "metric": evaluator.metric, "mode": evaluator.mode, "ingredients": digests}


def _rising(decays: Sequence[float]) -> bool:
    return bool(decays) and all(0 <= d < 1 for d in decays) and all(a < b for a, b in pairwise(decays))


def _whole(number: object, least: float) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and number >= least
