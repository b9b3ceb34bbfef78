"""AMA: one learned ratio per part of the network between the model before and after, at a given mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.parts import divide, given_parts
from lightning_soup.recipes.recipe import Recipe, Soup, Trial, require_evaluator
from lightning_soup.recipes.search import cma_strategy
from lightning_soup.recipes.uniform import UniformSoup
from lightning_soup.weights.combine import combine
from lightning_soup.weights.geometry import inner_products
from lightning_soup.weights.weights_file import Source, WeightsFile

__all__ = ["AdaptiveSoup", "project", "ratios"]


def ratios(s: Tensor, mean: float, spread: float) -> Tensor:
    """α_k = K · α · h_k / Σ_j h_j with h_k = σ(s_k) + ε, whose mean is α whatever s is.

    The paper's equation 11 lacks the factor K, so that there the ratios add up to α; its code has it. A ratio above 1
    is brought back by :func:`project`.

    Args:
        s: Free parameters, ``[K]``.
        mean: α.
        spread: ε ≥ 0: the larger, the closer all ratios are.
    """
    h = s.sigmoid() + spread
    return project(len(s) * mean * h / h.sum(), mean)


def project(alpha: Tensor, mean: float) -> Tensor:
    """The closest ratios in [0, 1] with this mean: a constant is added, and they are clipped.

    Args:
        alpha: ``[K]``; gradients go through those that are not clipped.
        mean: Mean of the result, in [0, 1].
    """
    found = alpha
    if bool(((alpha >= 0) & (alpha <= 1)).all()):
        return found
    low, high = -float(alpha.detach().max()), 1 - float(alpha.detach().min())
    for _ in range(100):  # the mean of the clipped ratios rises with the constant
        middle = (low + high) / 2
        below = float((alpha.detach() + middle).clamp(0, 1).mean()) < mean
        low, high = (middle, high) if below else (low, middle)
    shifted = alpha.detach() + high
    free = (shifted > 0) & (shifted < 1)
    if not bool(free.any()):
        return torch.where(free, alpha, shifted.clamp(0, 1))  # zero gradients, not none
    rest = (len(alpha) * mean - int((shifted >= 1).sum()) - alpha[free].sum()) / int(free.sum())
    return torch.where(free, alpha + rest, shifted.clamp(0, 1))


@dataclass(frozen=True)
class AdaptiveSoup(Recipe):
    """θ^[k] = (1 − α_k)·θ_0^[k] + α_k·θ^[k] for each part k of the network, with mean α_k = α.

    The **first** ingredient is θ_0, the model before: pre-trained, or before RLHF. The second is θ, the model after.
    With more, the others are cooked with ``soup`` first. α is the weight on θ: the method's advice is 0.8, that is 80 %
    of the model after and 20 % of the one before. (Its code and figures count the other way round.)

    The ratios are chosen on the evaluator's data, which should be of the *new* skill. In the paper they are samples of
    the model after, so that no labels are needed; what is forgotten of the old skill is assumed to depend on α alone.
    That is not so in general: compare with :class:`.InterpolatedSoup`, whose curve is that of equal ratios, by the new
    skill **and** the old one.

    The history begins with equal ratios; where nothing better is found on the evaluator's data, they are the result.

    Source: Lin et al., Mitigating the Alignment Tax of RLHF, EMNLP 2024 (arXiv 2309.06256): adaptive (AMA), later
    heterogeneous model averaging. Where the authors' code differs: its forward pass does not see the ratios that it
    learns, its first parts take what does not divide, and ratios above 1 are not prevented.

    Args:
        mean: α, the mean weight on the model after.
        parts: K, parts of consecutive layers, whose sizes differ by one at most.
        groups: Instead of ``parts``: for each part patterns of tensor names, ``[["*.0.*", "*.1.*"], ["*.2.*"]]``; what
            none of them fits has the ratio α.
        spread: ε: how far ratios may be apart. For K = 3, α = 0.2 and ε = 0.2 they are in [0.05, 0.45].
        scope: ``all``: what comes before the first layer has the ratio of the first part, what comes after the last has
            α. ``linear``: matrices only are averaged so, all other tensors are those of the model after.
        method: ``gradient``: Adam on s, through the gradient of one model, by the loss that ``validation_step``
            returns. ``cma``: CMA-ES on s by the score, for metrics without a gradient.
        steps: Steps of Adam, or candidates of CMA-ES.
        batch_size: Samples in a step of Adam.
        lr: Rate of Adam; the first step of CMA-ES is ten times as wide.
        regularization: λ of λ · mean |α_k − α|, added to the loss.
        seed: Of CMA-ES.
        soup: How several models after become one.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.
    """

    mean: float = 0.8
    parts: int = 3
    groups: list[list[str]] | None = None
    spread: float = 0.2
    scope: Literal["all", "linear"] = "all"
    method: Literal["gradient", "cma"] = "gradient"
    steps: int = 200
    batch_size: int = 64
    lr: float = 0.05
    regularization: float = 0.0
    seed: int = 0
    soup: Recipe = field(default_factory=UniformSoup)
    common_start: CommonStart = "require"

    needs_evaluator: ClassVar[bool] = True
    from_init: ClassVar[bool] = True

    @property
    def needs_loss(self) -> bool:
        """Whether it learns by gradient."""
        return self.method == "gradient"

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Choose the ratios; see :meth:`.Recipe.cook`. Each trial has them as ``values["α_1"]`` and so on."""
        self._check_options()
        evaluator = require_evaluator(self, evaluator)
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        after = (1.0,)
        if len(found) > 2:
            inner = self.soup.without_start_check(self._masks_known).cook(found[1:], evaluator, progress)
            if isinstance(inner.coefficients, dict):
                raise RecipeError(
                    f"AdaptiveSoup(soup={self.soup}): expected a recipe with one coefficient an ingredient."
                )
            after = inner.coefficients
        sources = [ingredient.weights for ingredient in found]
        place = divide(sources[0], self.parts) if self.groups is None else given_parts(sources[0], self.groups)
        mixture = _Mixture(self, sources, place, after)
        search = self._by_gradient if self.method == "gradient" else self._by_score
        s, history = search(mixture, evaluator, progress)
        soup = Soup(str(self), found, mixture.coefficients(s), history=tuple(history), notes=notes)
        return soup.rated(evaluator)

    def _check_options(self) -> None:
        expectations = (
            (0 <= self.mean <= 1, f"mean={self.mean}: expected a weight in [0, 1]."),
            (self.parts >= 1, f"parts={self.parts}: expected 1 or more."),
            (self.groups is None or (self.groups and all(self.groups)), "groups: expected one pattern or more a part."),
            (self.spread >= 0, f"spread={self.spread}: expected 0 or more."),
            (self.scope in ("all", "linear"), f"scope={self.scope!r}: expected 'all' or 'linear'."),
            (self.method in ("gradient", "cma"), f"method={self.method!r}: expected 'gradient' or 'cma'."),
            (self.steps >= 1 and self.batch_size >= 1, "steps and batch_size: expected 1 or more."),
            (self.lr > 0, f"lr={self.lr}: expected more than 0."),
            (self.regularization >= 0, f"regularization={self.regularization}: expected 0 or more."),
        )
        for holds, message in expectations:
            if not holds:
                raise RecipeError(f"AdaptiveSoup: {message}")

    def _by_gradient(self, mixture: "_Mixture", evaluator: Evaluator, progress: Progress) -> tuple[Tensor, list[Trial]]:
        s = mixture.start().requires_grad_()
        optimizer = torch.optim.Adam([s], self.lr)
        history = [self._loss_trial("equal ratios", mixture, s, evaluator)]
        if not mixture.leaves_a_choice:
            return s.detach(), history
        taken, epoch = 0, 0
        steps = iter(progress(range(self.steps), "learning ratios", self.steps))
        while taken < self.steps:
            before = taken
            for batch in evaluator.batches(epoch, self.batch_size):
                if next(steps, None) is None:
                    break
                alpha = mixture.alpha(s)
                weights = combine(mixture.sources, mixture.coefficients(s), evaluator.slot())
                _, gradient = evaluator.loss_and_grad(weights, batch)
                optimizer.zero_grad()
                # dL/dα_k = ⟨G, θ − θ_0⟩ over the tensors of part k: one gradient, of one model.
                loss = alpha @ mixture.direction(gradient) + self._penalty(alpha)
                loss.backward()
                optimizer.step()
                taken += 1
            if taken == before:
                raise RecipeError("AdaptiveSoup: the evaluator gave no batches; the held-out data is empty.")
            epoch += 1
        next(steps, None)
        history.append(self._loss_trial("learned ratios", mixture, s, evaluator))
        if self._objective(history[-1], mixture.alpha(s)) <= self._objective(
            history[0], mixture.alpha(mixture.start())
        ):
            return s.detach(), history
        return mixture.start(), [history[0], replace(history[1], reason=f"{history[1].reason}: no better, not taken")]

    def _by_score(self, mixture: "_Mixture", evaluator: Evaluator, progress: Progress) -> tuple[Tensor, list[Trial]]:
        def tried(s: Tensor, label: str) -> Trial:
            weights = combine(mixture.sources, mixture.coefficients(s), evaluator.slot())
            return Trial(label, evaluator.score(weights), None, "", mixture.values(s))

        best_s = mixture.start()
        history = [replace(tried(best_s, "equal ratios"), kept=True)]
        best = history[0].score - float(self._penalty(mixture.alpha(best_s)))
        if not mixture.leaves_a_choice or self.steps == 1:
            return best_s, history
        strategy = cma_strategy(len(best_s), 10 * self.lr, self.seed)
        budget = iter(progress(range(self.steps - 1), "searching ratios", self.steps - 1))
        left = self.steps - 1
        while left > 0 and not strategy.stop():
            asked, losses = strategy.ask(), []
            for row in asked[:left]:
                next(budget, None)
                s = torch.tensor(row, dtype=torch.float64)
                trial = tried(s, f"candidate {len(history)}")
                value = trial.score - float(self._penalty(mixture.alpha(s)))
                losses.append(-value)
                history.append(replace(trial, kept=value > best))
                if value > best:
                    best, best_s = value, s
            left -= len(losses)
            if len(losses) < len(asked):
                break
            strategy.tell(asked, losses)
        return best_s, history

    def _penalty(self, alpha: Tensor) -> Tensor:
        return self.regularization * (alpha - self.mean).abs().mean()

    def _objective(self, trial: Trial, alpha: Tensor) -> float:
        return trial.values["loss"] + float(self._penalty(alpha.detach()))

    def _loss_trial(self, label: str, mixture: "_Mixture", s: Tensor, evaluator: Evaluator) -> Trial:
        weights = combine(mixture.sources, mixture.coefficients(s), evaluator.slot())
        losses = [evaluator.loss_and_grad(weights, batch)[0] for batch in evaluator.batches(0, self.batch_size)]
        if not losses:
            raise RecipeError("AdaptiveSoup: the evaluator gave no batches; the held-out data is empty.")
        loss = sum(losses) / len(losses)
        if loss != loss:
            raise RecipeError(f"AdaptiveSoup: the loss of {label} is NaN. Check the held-out data and the two models.")
        values = mixture.values(s)
        told = ", ".join(f"{value:.3f}" for value in values.values())
        return Trial(label, None, None, f"loss {loss:.4f} at α = ({told})", {"loss": loss, **values})


class _Mixture:
    """The tensors of each part, and what coefficients and gradients its ratio stands for."""

    def __init__(
        self,
        recipe: AdaptiveSoup,
        sources: Sequence[WeightsFile],
        place: dict[str, int | None],
        after: tuple[float, ...],
    ) -> None:
        self.recipe, self.sources, self.place, self.after = recipe, sources, place, after
        self.count = recipe.parts if recipe.groups is None else len(recipe.groups)
        self.whole = {
            name for name, spec in sources[0].specs.items() if recipe.scope == "linear" and not _is_linear(name, spec)
        }

    @property
    def leaves_a_choice(self) -> bool:
        """Whether ratios can differ: not that of one part, nor where the mean is at an end of [0, 1]."""
        return self.count > 1 and 0 < self.recipe.mean < 1

    def start(self) -> Tensor:
        """S of equal ratios."""
        return torch.zeros(self.count, dtype=torch.float64)

    def alpha(self, s: Tensor) -> Tensor:
        """α of each part."""
        return ratios(s, self.recipe.mean, self.recipe.spread)

    def values(self, s: Tensor) -> dict[str, float]:
        """The ratios, for a trial."""
        return {f"α_{k}": value for k, value in enumerate(self.alpha(s.detach()).tolist(), 1)}

    def coefficients(self, s: Tensor) -> dict[str, tuple[float, ...]]:
        """What :func:`.combine` takes."""
        alpha = self.alpha(s.detach()).tolist()
        return {name: self._row(1.0 if name in self.whole else self._ratio(name, alpha)) for name in self.place}

    def _ratio(self, name: str, alpha: Sequence[float]) -> float:
        part = self.place[name]
        return self.recipe.mean if part is None else alpha[part]

    def _row(self, ratio: float) -> tuple[float, ...]:
        return (1.0 - ratio, *(ratio * share for share in self.after))

    def direction(self, gradient: dict[str, Tensor]) -> Tensor:
        """dL/dα of each part, from the gradient at the mixed weights."""
        own = {n: g for n, g in gradient.items() if self.place[n] is not None and n not in self.whole}
        found = torch.zeros(self.count, dtype=torch.float64)
        shares = torch.tensor([-1.0, *self.after], dtype=torch.float64)
        for name, products in inner_products(self.sources, own).items():
            found[self.place[name]] += products @ shares
        return found


def _is_linear(name: str, spec: Any) -> bool:
    """Whether a tensor is the matrix of a linear layer, as far as its name and shape tell."""
    return len(spec.shape) == 2 and name.endswith("weight") and "embed" not in name.rpartition(".")[0]
