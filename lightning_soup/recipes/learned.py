"""The learned soup: coefficients by gradient descent on held-out data, with the gradient of one model only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.recipe import Recipe, Soup, Trial, require_evaluator
from lightning_soup.weights.combine import combine
from lightning_soup.weights.geometry import inner_products
from lightning_soup.weights.weights_file import Source, WeightsFile

# Shape suffixes: K ingredients, R rows of coefficients (1, or one per tensor).


@dataclass(frozen=True)
class LearnedSoup(Recipe):
    """argmin over α, β of Σⱼ ℓ(β·f(xⱼ; Σᵢ αᵢ θᵢ), yⱼ) on held-out data, α = softmax(z).

    With G the gradient of the loss at the mixed weights (one backward pass) and gᵢ = ⟨G, θᵢ⟩, the gradient of the
    coefficients is ∂L/∂zᵢ = αᵢ(gᵢ − Σⱼ αⱼgⱼ). The ingredients are streamed from their files, so memory is that of one
    model however many there are (the released code holds all k with gradients). The inverse temperature β multiplies
    the outputs; in the end it is part of the last layer's coefficients, so the result is an ordinary checkpoint.

    Args:
        by: ``"model"``: one α per ingredient. ``"tensor"``: one per ingredient and tensor (the paper's "by layer");
            tied tensors share a row, tensors without a gradient keep equal shares.
        epochs: Passes over the held-out data; the released code's 5.
        batch_size: Samples per step; the released code's 256.
        lr: Learning rate of AdamW for z and β; the released code's 0.05.
        weight_decay: Weight decay of AdamW; the released code's 0.
        temperature: Learn β. Without it the outputs may be less confident than those of the ingredients.
        head: Names of the tensors that hold the last, linear layer, where β goes. By default the evaluator finds them;
            where it finds none (CLIP's cosine logits) β stays 1 and a note says so.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.

    Source: Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482), section 2 and appendix I; defaults from the
    released code, which however evaluates the mixed model in training mode: here dropout is off.
    """

    by: Literal["model", "tensor"] = "model"
    epochs: int = 5
    batch_size: int = 256
    lr: float = 0.05
    weight_decay: float = 0.0
    temperature: bool = True
    head: list[str] | None = None
    common_start: CommonStart = "require"

    needs_evaluator: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Learn the coefficients; see :meth:`.Recipe.cook`. The history holds one trial per epoch."""
        if self.by not in ("model", "tensor") or self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise RecipeError(f"{self}: by is 'model' or 'tensor'; epochs, batch_size and lr are positive.")
        evaluator = require_evaluator(self, evaluator)
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        sources = [ingredient.weights for ingredient in found]
        mixture = _Mixture(sources, self.by, self._head(evaluator, sources[0]) if self.temperature else ())
        if self.temperature and not mixture.head:
            notes += (
                "LearnedSoup: no linear last layer was found, so β stays 1; name it with head=[…] if there is one.",
            )
        optimizer = torch.optim.AdamW([mixture.z_RK, mixture.beta], self.lr, weight_decay=self.weight_decay)
        history = []
        for epoch in progress(range(self.epochs), "learning coefficients", self.epochs):
            losses = []
            for batch in evaluator.batches(epoch, self.batch_size):
                weights = combine(sources, mixture.coefficients(), evaluator.slot())
                loss, gradient = evaluator.loss_and_grad(weights, batch)
                mixture.set_gradient(inner_products(sources, gradient))
                optimizer.step()
                losses.append(loss)
            if not losses:
                raise RecipeError("LearnedSoup: the evaluator gave no batches; the held-out data is empty.")
            mean = sum(losses) / len(losses)
            values = {"loss": mean, "beta": mixture.beta.item()}
            history.append(Trial(f"epoch {epoch + 1}", None, None, f"loss {mean:.4f}", values))
        return Soup(str(self), found, mixture.coefficients(), history=tuple(history), notes=notes).rated(evaluator)

    def _head(self, evaluator: Evaluator, weights: WeightsFile) -> tuple[str, ...]:
        names = evaluator.head() if self.head is None else tuple(self.head)
        unknown = [name for name in names if name not in weights.specs]
        if unknown:
            last = list(weights.specs)[-4:]
            raise RecipeError(f"LearnedSoup: head names {unknown}, which the ingredients lack. Their last are {last}.")
        tied = {name for group in weights.ties for name in group}
        return () if tied & set(names) else names


class _Mixture:
    """z and β, the coefficients they stand for, and their gradients from those of the mixed weights."""

    def __init__(self, sources: Sequence[WeightsFile], by: str, head: tuple[str, ...]) -> None:
        first = sources[0]
        self.head = head
        alias = {name: names[0] for names in first.ties for name in names}
        self.names = {name: alias.get(name, name) for name in first.specs}
        keys = list(dict.fromkeys(self.names.values())) if by == "tensor" else ["*"]
        self.rows = {key: r for r, key in enumerate(keys)}
        self.z_RK = torch.zeros(len(keys), len(sources), dtype=torch.float64, device="cpu", requires_grad=True)
        self.beta = torch.ones((), dtype=torch.float64, device="cpu", requires_grad=bool(head))

    def _row(self, name: str) -> int:
        return self.rows.get("*", self.rows.get(self.names[name], 0))

    def coefficients(self) -> tuple[float, ...] | dict[str, tuple[float, ...]]:
        """What :func:`.combine` takes: α, with β in the rows of the last layer."""
        alpha_RK = self.z_RK.detach().softmax(1)
        if "*" in self.rows and not self.head:
            return tuple(alpha_RK[0].tolist())
        scaled = {name: tuple((self.beta.detach() * alpha_RK[self._row(name)]).tolist()) for name in self.head}
        if "*" in self.rows:
            return {**scaled, "*": tuple(alpha_RK[0].tolist())}
        return {name: scaled.get(name) or tuple(alpha_RK[self._row(name)].tolist()) for name in self.names}

    def set_gradient(self, products: Mapping[str, Tensor]) -> None:
        """∂L/∂z and ∂L/∂β from gᵢ = ⟨G, θᵢ⟩ of every tensor, G taken at the mixed (and in the head scaled) weights."""
        alpha_RK = self.z_RK.detach().softmax(1)
        beta = self.beta.item()
        g_RK = torch.zeros_like(alpha_RK)
        beta_gradient = torch.zeros_like(self.beta)
        for name, g_K in products.items():
            row = self._row(name)
            g_RK[row] += g_K * (beta if name in self.head else 1.0)
            if name in self.head:
                beta_gradient += alpha_RK[row] @ g_K
        self.z_RK.grad = alpha_RK * (g_RK - (alpha_RK * g_RK).sum(1, keepdim=True))
        if self.head:
            self.beta.grad = beta_gradient
