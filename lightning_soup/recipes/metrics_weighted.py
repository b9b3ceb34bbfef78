"""Metrics-weighted averaging: checkpoints of one training, weighted by their loss or their step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator, direction
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient, as_ingredients
from lightning_soup.recipes.recipe import Recipe, Soup, Trial
from lightning_soup.recipes.training_record import STEP, TRAIN_LOSS
from lightning_soup.weights.adapter_checks import MergeMode, check_adapters
from lightning_soup.weights.adapter_merging import AdapterMerging
from lightning_soup.weights.adapters import adapter_in, is_adapter
from lightning_soup.weights.weights_file import Source, WeightsFile

Scheme = Literal["linear", "power", "softmax"]


@dataclass(frozen=True)
class MetricsWeightedSoup(Recipe):
    """θ = Σᵢ wᵢ·θᵢ over the last N checkpoints of a training, with wᵢ from one metric and one penalty factor p.

    With the badness bᵢ ∈ [0, 1] of checkpoint i, (mᵢ − m_min)/(m_max − m_min) for a loss, turned round for a step or an
    accuracy:

    - ``"linear"``: wᵢ ∝ 1 − p·bᵢ, p in [0, 1]. p = 0 is the plain mean, p = 1 drops the worst checkpoint.
    - ``"softmax"``: wᵢ ∝ exp(−p·bᵢ), p ≥ 0.
    - ``"power"``: wᵢ ∝ mᵢ⁻ᵖ for a loss, mᵢᵖ otherwise, p ≥ 0, for positive metrics. Losses that lie close together give
      almost equal weights.

    Equal metrics give equal weights; a single checkpoint is the result itself. It needs no evaluation. It helps while
    the window still has a trend, does nothing on a plateau, and cannot repair a window that begins too early: the
    window matters more than p.

    The paper's formula could not be compared with its text, only with its abstract, figures and names of settings;
    ``"linear"`` is our reading of them.

    Args:
        metric: A metric that is known of every checkpoint: ``train_loss``, the mean since the checkpoint before
            (:class:`.MetricsWeightedAveraging` and transformers' ``trainer_state.json`` bring it), ``step``, or a
            validation metric. The training loss goes on falling where a model overfits; a validation metric does not.
        mode: Whether a large (max) or a small (min) value is good; by default max for steps, min for losses and errors,
            known by their names, and max for all else.
        penalty: The penalty factor p.
        scheme: How weights follow from the metric.
        window: N, the last so many checkpoints, by step where steps are known; all by default.
        stride: Take every ``stride``-th checkpoint only, counted back from the last.
        merge: How PEFT adapters are merged, see :class:`.AdapterMerging`: ``"factor"`` (their default; for checkpoints
            of one run), ``"exact"``, ``"svd"`` or ``"dense"``. Of checkpoints of whole models the adapters in them are
            taken then. None: adapters by their factors, all else tensor by tensor.
        rank: Rank of ``"svd"``; the largest of the adapters' own by default.
        base: The model that ``"dense"`` adds to, a checkpoint of any format.
        common_start: ``"require"`` refuses checkpoints of different runs, ``"ignore"`` takes your word that they are of
            one.

    Raises:
        RecipeError: An option out of range; no value, or one that is not finite, of the metric in a checkpoint, which
            is named; or fewer checkpoints than ``window`` and ``stride`` ask for.

    Source: Yu, Choi, Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging, 2025 (arXiv 2504.18580).
    """

    metric: str = TRAIN_LOSS
    mode: Literal["min", "max"] | None = None
    penalty: float = 0.8
    scheme: Scheme = "linear"
    window: int | None = None
    stride: int = 1
    merge: MergeMode | None = None
    rank: int | None = None
    base: str | None = None
    common_start: CommonStart = "require"

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise RecipeError(f"scheme={self.scheme!r}: expected one of {', '.join(get_args(Scheme))}.")
        if self.mode not in (None, "min", "max"):
            raise RecipeError(f"mode={self.mode!r}: expected 'min' or 'max'.")
        _check_penalty(self.penalty, self.scheme)
        if (self.window is not None and self.window < 1) or self.stride < 1:
            raise RecipeError(f"window={self.window}, stride={self.stride}: expected 1 or more.")
        if self.merge is None and (self.rank, self.base) != (None, None):
            raise RecipeError(
                f"rank={self.rank}, base={self.base}: they belong to merge='svd' and 'dense'; give merge."
            )
        self.merging()

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether a large or a small value of the metric is good."""
        return self.mode or ("max" if self.metric == STEP else direction(self.metric))

    def merging(self) -> AdapterMerging:
        """How adapters are merged."""
        return AdapterMerging(self.merge or "factor", self.rank, self.base)

    def needed(self, window: int) -> int:
        """How many checkpoints a window of so many needs."""
        return (window - 1) * self.stride + 1

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Weigh the checkpoints; see :meth:`.Recipe.cook`. One alone is its own soup.

        With an evaluator, the soup of whole models is scored once.
        """
        given = as_ingredients(ingredients)
        taken = self._window(given)
        adapters = self.merge is not None or any(is_adapter(item.weights) for item in taken)
        if adapters and evaluator is not None:
            raise RecipeError(
                "adapters are merged from their files alone, so no model is needed: leave --config, --model and --data "
                "out (evaluator=None). To score whole models with adapters in them, cook their checkpoints without "
                "merge."
            )
        values = [self._value(item) for item in taken]
        weights = metric_weights(values, self.penalty, self.scheme, self.direction)
        notes: tuple[str, ...] = ()
        if adapters:
            taken = [_as_adapter(item) for item in taken]
            files = [item.weights for item in taken]
            check_adapters(files, self.merging().mode, self.common_start)
        elif len(taken) > 1:
            found, notes = check_ingredients(taken, self.common_start, evaluator, not self._masks_known)
            taken = list(found)
        history = tuple(
            Trial(item.name, None, w > 0, f"{self.metric} {value:.6g}, weight {w:.4f}", {"metric": value, "weight": w})
            for item, value, w in zip(taken, values, weights, strict=True)
        )
        soup = Soup(
            str(self),
            tuple(taken),
            weights,
            history=history,
            notes=(*notes, self._note(len(given), len(taken))),
            merging=self.merging() if adapters else None,
        )
        return soup.rated(evaluator)

    def _window(self, given: list[Ingredient]) -> list[Ingredient]:
        if not given:
            raise RecipeError("no ingredients given. Name the checkpoints of a training.")
        steps = [_step_of(item) for item in given]
        if None not in steps:
            given = [given[i] for i in sorted(range(len(given)), key=lambda i: steps[i])]
        window = self.window or (len(given) - 1) // self.stride + 1
        if self.needed(window) > len(given):
            raise RecipeError(
                f"window={window} with stride={self.stride} needs {self.needed(window)} checkpoints, got {len(given)}. "
                "Give more, or ask for a smaller window."
            )
        return given[::-1][:: self.stride][:window][::-1]

    def _value(self, item: Ingredient) -> float:
        value = _step_of(item) if self.metric == STEP else item.metrics.get(self.metric)
        if value is None:
            known = ", ".join(item.metrics) or "none"
            raise RecipeError(
                f"{item.name}: its {self.metric!r} is not known (known are: {known}). Name a metric that every "
                "checkpoint has, or give it: Ingredient(path, metrics={…})."
            )
        if not math.isfinite(value):
            raise RecipeError(
                f"{item.name}: its {self.metric!r} is {value}, so it cannot be weighed. Leave this checkpoint out, or "
                "go by another metric."
            )
        return float(value)

    def _note(self, given: int, taken: int) -> str:
        of = (
            f"{taken} of {given} checkpoints" if taken < given else f"{taken} checkpoints" if taken > 1 else "one alone"
        )
        return f"{type(self).__name__} weighed {of} by {self.metric} ({self.direction})."


def metric_weights(
    values: Sequence[float], penalty: float, scheme: Scheme = "linear", mode: Literal["min", "max"] = "min"
) -> tuple[float, ...]:
    """Weights of checkpoints from a metric; see :class:`MetricsWeightedSoup` for the formulas.

    Args:
        values: mᵢ, finite.
        penalty: p.
        scheme: ``"linear"``, ``"power"`` or ``"softmax"``.
        mode: Whether a small or a large value is good.

    Returns:
        Weights that are not negative and add up to 1.

    Raises:
        RecipeError: The penalty does not suit the scheme, or ``"power"`` gets a metric that is not positive.

    Example:
        >>> [round(w, 10) for w in metric_weights([0.9, 0.6, 0.5], 0.8)]
        [0.1, 0.4, 0.5]
    """
    _check_penalty(penalty, scheme)
    low, high = min(values), max(values)
    if low == high:
        return (1.0 / len(values),) * len(values)
    if scheme == "power":
        if low <= 0:
            raise RecipeError(f"scheme='power' needs positive metrics, got {low:g}. Use 'linear' or 'softmax'.")
        sign = -penalty if mode == "min" else penalty
        best = low if mode == "min" else high
        raw = [(value / best) ** sign for value in values]  # in units of the best, so that none overflows
    else:
        bad = [(value - low if mode == "min" else high - value) / (high - low) for value in values]
        raw = [1.0 - penalty * b if scheme == "linear" else math.exp(-penalty * b) for b in bad]
    total = math.fsum(raw)
    return tuple(weight / total for weight in raw)


def _check_penalty(penalty: float, scheme: str) -> None:
    if not (0 <= penalty <= 1 if scheme == "linear" else 0 <= penalty < math.inf):
        wanted = "a number in [0, 1]" if scheme == "linear" else "a finite number of 0 or more"
        raise RecipeError(f"penalty={penalty}, scheme={scheme!r}: expected {wanted}.")


def _step_of(item: Ingredient) -> float | None:
    return item.step if item.step is not None else item.metrics.get(STEP)


def _as_adapter(item: Ingredient) -> Ingredient:
    """The ingredient with nothing but the adapter of its checkpoint."""
    adapter = adapter_in(item.weights)
    if adapter is item.weights:
        return item
    found = replace(item)
    found.__dict__["weights"] = adapter
    return found
