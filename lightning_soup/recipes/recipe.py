"""Recipes choose coefficients; a soup is what they chose, with the record of how."""

import copy
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import RecipeError, UnwritableOutput
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, statistics_of
from lightning_soup.recipes.finishing import Repruning, finish_
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.soup_output import folder_of_output, save_terms
from lightning_soup.weights.adapter_merging import AdapterMerging
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.combine import combine
from lightning_soup.weights.formats import WEIGHT_SUFFIXES
from lightning_soup.weights.positions import Resampling, resampled
from lightning_soup.weights.save import save_weights
from lightning_soup.weights.variance import Correction
from lightning_soup.weights.weights_file import Source, WeightsFile, metric_prefixes

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[float, ...]


class Recipe(ABC):
    """Chooses coefficients for a list of ingredients.

    Recipes are frozen dataclasses, so each is a YAML node: ``{class_path: GreedySoup, init_args: {strict: true}}``.

    Attributes:
        needs_evaluator: Whether it chooses by score, and so cannot cook from files alone.
        needs_loss: Whether it learns from the loss that ``validation_step`` returns.
        from_init: Whether its first ingredient is the weights that the others started from.
        common_start: Whether ingredients without a common start are refused; see :func:`.check_ingredients`.
    """

    needs_evaluator: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    from_init: ClassVar[bool] = False
    common_start: CommonStart = "require"
    _masks_known: ClassVar[bool] = False

    def without_start_check(self, one_mask: bool = False) -> "Recipe":
        """The same recipe for checkpoints that are known to come from one start: those of one run.

        Args:
            one_mask: They are also known to be pruned at the same places, whatever else has become zero in some.
        """
        free = copy.copy(self)
        object.__setattr__(free, "common_start", "ignore")
        object.__setattr__(free, "_masks_known", self._masks_known or one_mask)
        return free

    def check(self, evaluator: Evaluator, new: bool = False) -> None:  # noqa: B027  (most recipes need nothing more)
        """Refuse what could not be cooked, as far as that is known before there are ingredients.

        Args:
            evaluator: It may lack what this recipe needs.
            new: Whether the ingredients are made from now on, so that no earlier soup can have been of them.

        Raises:
            RecipeError: It is so.
        """

    @abstractmethod
    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> "Soup":
        """Choose coefficients.

        Args:
            ingredients: At least two checkpoints with the same tensors.
            evaluator: Judges candidates on held-out data; some recipes do without.
            progress: Shows how far it is.

        Raises:
            RecipeError: The recipe cannot be cooked from these ingredients or without an evaluator.
            IncompatibleIngredients: Their tensors differ.
        """

    def __str__(self) -> str:
        """The recipe as it was called, without options at their defaults and those that change nothing in the soup."""
        if not is_dataclass(self):
            return type(self).__name__
        changed = []
        for option in fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if option.repr and value != default:
                changed.append(f"{option.name}={value}")
        return f"{type(self).__name__}({', '.join(changed)})" if changed else type(self).__name__


def require_evaluator(recipe: Recipe, evaluator: Evaluator | None) -> Evaluator:
    """The evaluator, or an error for a recipe that cannot do without."""
    if evaluator is None:
        raise RecipeError(
            f"{type(recipe).__name__} chooses by score, so it needs an evaluator: a module and validation data. "
            "Give them (--config, --model, --data on the command line), or use UniformSoup."
        )
    return evaluator


@dataclass(frozen=True)
class Trial:
    """One candidate that a recipe tried.

    Attributes:
        label: What was tried: the ingredient that was added, or the setting.
        score: Its score, higher is better.
        kept: Whether it was taken; ``None`` where there was no such choice.
        reason: Why, in words.
        values: Numbers that belong to it, such as ``before``, ``distance``, ``alpha``.
    """

    label: str
    score: float | None
    kept: bool | None = None
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Soup:
    """The result of a recipe: coefficients, and how they were found.

    Attributes:
        recipe: The recipe as it was called, for example ``GreedySoup(strict=True)``.
        ingredients: What it was cooked from, in the order of the coefficients.
        coefficients: One number per ingredient, or such a row per tensor name or pattern.
        score: Score of the soup on the selection data, higher is better; ``None`` without an evaluator.
        metric: The metric behind the score.
        mode: Whether the metric itself is maximised or minimised.
        history: What was tried, in order.
        notes: What the user should know: duplicates, independently initialised heads, …
        accumulate: Type of the kernel's accumulator.
        statistics: BatchNorm statistics that were estimated anew, which take the place of the combined ones; see
            :meth:`recalibrated`.
        repruned: What is pruned after combining: which share of which tensors, and by which selection of
            :func:`.prune_`; ``None``: nothing is.
        resampled: Position embeddings that are brought to one grid before combining; see :class:`.LengthAverage`.
        merging: How the ingredients are merged where they are PEFT adapters; ``None``: tensor by tensor.
        third_score: Score on the third split, where that chose among the finalists of a search.
        corrected: Matrices whose variance is corrected after combining; see :class:`.VarianceCorrectedSoup`.
    """

    recipe: str
    ingredients: tuple[Ingredient, ...]
    coefficients: Row | dict[str, Row]
    score: float | None = None
    metric: str | None = None
    mode: Literal["min", "max"] = "max"
    history: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()
    accumulate: Literal["float32", "float64"] = "float32"
    statistics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    repruned: Repruning | None = None
    resampled: Mapping[str, Resampling] = field(default_factory=dict)
    merging: AdapterMerging | None = None
    third_score: float | None = None
    corrected: Mapping[str, Correction] = field(default_factory=dict, repr=False)

    def weights(self, out: nn.Module | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The combined weights, in a new dictionary or written into ``out``."""
        sources, coefficients = self._terms()
        if isinstance(out, nn.Module):  # it knows what in the files is no weight
            sources = [source.without(metric_prefixes(out)) for source in sources]
        result = combine(sources, coefficients, out, accumulate=self.accumulate)
        assert isinstance(result, dict)
        finish_(result, self.repruned, self.corrected)
        return result

    def rated(self, evaluator: Evaluator | None) -> "Soup":
        """This soup with the evaluator's score, metric and mode; unchanged where there is no evaluator."""
        if evaluator is None:
            return self
        score = evaluator.score(self.weights(evaluator.slot()))
        return replace(self, score=score, metric=evaluator.metric, mode=evaluator.mode)

    def recalibrated(self, evaluator: Evaluator) -> "Soup":
        """This soup with BatchNorm statistics that are estimated anew on training data, and its score with them.

        The average of the ingredients' statistics is not what the averaged weights produce. Whether new statistics are
        better depends on the model and the data: the history and a note hold the score before and after.

        A soup is returned as it was, with a warning and a note, where there is nothing to estimate: the model has no
        BatchNorm, or its statistics are the same in all ingredients. They were frozen in fine-tuning then, and new ones
        would undo what the weights were trained with. Where that is so of some layers only, these keep theirs.

        Args:
            evaluator: Has the training data; see :meth:`.Evaluator.recalibrate`.

        Raises:
            RecipeError: There is no training data, or the score with the new statistics is NaN.
        """
        frozen = statistics_of(self.sources).frozen
        found = evaluator.recalibrate(self.weights(evaluator.slot()), frozen)
        specs = self.sources[0].specs
        statistics = {
            name: value.to("cpu", specs[name].dtype, copy=True) for name, value in found.items() if name not in frozen
        }
        if not any(value.is_floating_point() for value in statistics.values()):
            if not frozen:
                return self._left_alone("the model has no BatchNorm layer with running statistics")
            return self._left_alone(
                f"the BatchNorm statistics ({frozen[0]}, …) are the same in all ingredients; they were frozen in "
                "fine-tuning, and the weights fit only them"
            )
        before = self if self.score is not None else self.rated(evaluator)
        after = replace(self, statistics=statistics).rated(evaluator)
        values = {"before": before.score, "after": after.score}
        reason = f"{after.metric} {before.natural_score:.4f} → {after.natural_score:.4f}"
        # No score of its own: the recipe did not choose among such, and pictures show what it chose among.
        trial = Trial("BatchNorm recalibrated", None, None, reason, values)
        note = (
            f"{self.recipe}: the BatchNorm statistics were estimated anew on training data ({reason}); recooking "
            "copies them from the soup."
        )
        return replace(after, history=(*self.history, trial), notes=(*self.notes, note))

    def _left_alone(self, why: str) -> "Soup":
        note = f"nothing was recalibrated: {why}."
        warnings.warn(note, stacklevel=3)
        return replace(self, notes=(*self.notes, note))

    def apply_to(self, module: nn.Module) -> None:
        """Write the combined weights into a module, in place."""
        self.weights(module)

    def save(
        self, path: str | os.PathLike, *, like: Source | WeightsFile | None = None, progress: Progress = silent
    ) -> Path:
        """Write the soup with its provenance: ``lightning-soup show`` prints it, ``recook`` cooks it again.

        Args:
            path: ``.safetensors`` (streamed, so memory stays small), or ``.ckpt``, ``.pt``, ``.pth``, ``.bin``. Of
                adapters, and of folders of transformers, any other name is that of a folder for ``from_pretrained``.
            like: Checkpoint whose shape a torch file keeps; the first ingredient by default.
            progress: Shows how far it is.

        Returns:
            The path.

        Raises:
            UnwritableOutput: It cannot be written, or is a file for an adapter that needs a configuration of its own.
            NonFiniteWeights: An ingredient holds a NaN.
        """
        from lightning_soup.recipes.provenance import provenance_of

        path = user_path(path)
        if self.merging is not None and self.merging.mode in ("exact", "svd") and path.suffix in WEIGHT_SUFFIXES:
            raise UnwritableOutput(
                f"{path}: merge={self.merging.mode!r} makes an adapter of another rank and scaling, which no file "
                f"of weights holds. Name a folder for it, such as {path.with_suffix('').name}."
            )
        sources, coefficients = self._terms(progress)
        first = self.sources[0] if self.merging is None else sources[0]
        kept = {"like": like or first, "provenance": provenance_of(self, folder_of_output(path, first))}
        if self.repruned is not None or self.corrected:  # which needs all tensors, or whole ones
            return save_weights(self.weights(), path, **kept)
        return save_terms(sources, coefficients, path, accumulate=self.accumulate, progress=progress, **kept)

    def shares(self) -> Row:
        """One coefficient per ingredient: the coefficients, or their mean over elements where tensors differ."""
        if not isinstance(self.coefficients, dict):
            return self.coefficients
        from lightning_soup.weights.coefficients import coefficient_rows

        specs = self.sources[0].specs
        rows = coefficient_rows(specs, self.coefficients, len(self.ingredients))
        floating = {name: spec.numel for name, spec in specs.items() if spec.dtype.is_floating_point}
        weight = torch.tensor(list(floating.values()), dtype=torch.float64, device="cpu")
        values = torch.tensor([rows[name] for name in floating], dtype=torch.float64, device="cpu")
        return tuple((weight @ values / weight.sum()).tolist())

    def table(self) -> "Table":
        """The ingredients with their coefficients, as a rich table."""
        from rich.table import Table

        title = self.recipe if self.score is None else f"{self.recipe}: {self.metric} {self.natural_score:.4f}"
        if self.third_score is not None:
            title += f", on the third split {self._natural(self.third_score):.4f}"
        table = Table(title=title, title_justify="left")
        table.add_column("ingredient", overflow="fold")
        table.add_column("coefficient", justify="right")
        table.add_column("")
        shares = self.shares()
        longest = max(abs(share) for share in shares)
        for ingredient, share in zip(self.ingredients, shares, strict=True):
            table.add_row(ingredient.name, f"{share:.4f}", "█" * round(24 * abs(share) / longest))
        return table

    @property
    def natural_score(self) -> float | None:
        """The score as the metric's own value."""
        return None if self.score is None else self._natural(self.score)

    def _natural(self, score: float) -> float:
        return -score if self.mode == "min" else score

    @property
    def sources(self) -> list[WeightsFile]:
        """The weights of the ingredients as they are combined: position embeddings on one grid."""
        return [resampled(item.weights, i, self.resampled) for i, item in enumerate(self.ingredients)]

    def _terms(self, progress: Progress = silent) -> tuple[list[WeightsFile], Row | dict[str, Row]]:
        sources, coefficients = with_statistics(self.sources, self.coefficients, self.statistics)
        return (sources, coefficients) if self.merging is None else self.merging.terms(sources, coefficients, progress)


def with_statistics(
    sources: Sequence[WeightsFile], coefficients: Row | dict[str, Row], statistics: Mapping[str, Tensor]
) -> tuple[list[WeightsFile], Row | dict[str, Row]]:
    """Checkpoints and coefficients whose combination holds ``statistics`` bit by bit."""
    if not statistics:
        return list(sources), coefficients
    alone = dict.fromkeys(statistics, (1.0,) + (0.0,) * (len(sources) - 1))  # one ingredient alone is copied exactly
    rest = coefficients if isinstance(coefficients, dict) else {"*": coefficients}
    return [sources[0].replaced(statistics), *sources[1:]], {**rest, **alone}
