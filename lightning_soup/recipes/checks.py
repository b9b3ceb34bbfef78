"""What can be said of ingredients before any of them is evaluated."""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.recipes.ingredient import Ingredient, as_ingredients
from lightning_soup.weights.adapter_checks import check_adapters, check_one_run
from lightning_soup.weights.adapters import holds_adapter, is_adapter
from lightning_soup.weights.compatibility import check_compatible, is_head
from lightning_soup.weights.geometry import cosines, differing
from lightning_soup.weights.weights_file import Source, WeightsFile
from lightning_soup.weights.zeros import compare_zeros, is_pruned

CommonStart = Literal["require", "ignore"]
_UNRELATED = 0.5  # cosine; fine-tunes of one start lie above 0.9, independent random matrices near 0
_BY_CHANCE = 1e-3  # share of the kept weights that may be zero in some networks though they have one mask
_COMPARED = 24  # matrices that are sampled, spread over the depth of the network


def check_ingredients(
    ingredients: Sequence[Ingredient | Source | WeightsFile],
    common_start: CommonStart = "require",
    evaluator: Evaluator | None = None,
    one_mask: bool = True,
) -> tuple[tuple[Ingredient, ...], tuple[str, ...]]:
    """Check ingredients before anything is evaluated.

    Args:
        ingredients: Checkpoints or ingredients.
        common_start: ``"require"`` refuses networks that cannot come from one starting point; ``"ignore"`` skips that
            check.
        evaluator: Says which tensors are no weights (:meth:`.Evaluator.ignored`).
        one_mask: Whether pruned networks must be zero at the same places, as their average is else less sparse.

    Returns:
        The ingredients, with unique labels and without tensors that are no weights, and notes for the user: duplicates,
        heads that were initialised independently, and dense networks among pruned ones. Each note is also given as a
        warning.

    Raises:
        RecipeError: Fewer than two ingredients, ingredients without a common start, or pruned ones with other masks.
        IncompatibleIngredients: Their tensors differ.
    """
    ignored = () if evaluator is None else evaluator.ignored()
    found = [item.without(ignored) for item in as_ingredients(ingredients)]
    if len(found) < 2:
        given = f"one ({found[0].name})" if found else "none"
        raise RecipeError(
            f"a soup needs at least two ingredients, got {given}. Add checkpoints of other runs or steps."
        )
    files = [item.weights for item in found]
    adapters = any(map(is_adapter, files))
    if adapters:
        check_adapters(files, "factor", common_start)
    else:
        check_compatible(files)
    notes = [
        f"{item.name} is itself a soup ({item.weights.provenance.get('recipe')}). Is it meant to be an ingredient?"
        for item in found
        if item.weights.provenance
    ]
    notes += _duplicates(found)
    if common_start == "require" and not adapters:
        if all(map(holds_adapter, files)):
            check_one_run(files)
        notes += _unrelated(found)
    if one_mask:
        notes += _other_masks(found)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return tuple(found), tuple(notes)


class Statistics(NamedTuple):
    """Names of BatchNorm statistics: those that differ between ingredients, and those that were frozen in training."""

    differing: tuple[str, ...]
    frozen: tuple[str, ...]


def statistics_of(sources: Sequence[WeightsFile]) -> Statistics:
    """The BatchNorm statistics of ingredients, of which those that are the same in all were frozen."""
    names = [name for name in sources[0].specs if name.endswith((".running_mean", ".running_var"))]
    found = differing([source.only(names) for source in sources]) if names else ()
    return Statistics(found, tuple(name for name in names if name not in found))


def _other_masks(ingredients: Sequence[Ingredient]) -> list[str]:
    """Refuse pruned networks with other masks; note that dense ones are among them."""
    dense, pruned = [], []
    for item in ingredients:
        (pruned if is_pruned(item.weights) else dense).append(item.name)
    if dense and pruned:
        return [
            f"{pruned[0]} is pruned, but {dense[0]} is dense, and so is every average of both. To have a sparse soup, "
            "leave out those that are dense, or prune it afterwards (lightning_soup.layers.prune_)."
        ]
    zeros = compare_zeros([ingredient.weights for ingredient in ingredients])
    if zeros is not None and zeros.apart is not None and zeros.together > (1 + _BY_CHANCE) * min(zeros.densities):
        own = ", ".join(f"{density:.1%}" for density in zeros.densities[:4])
        raise RecipeError(
            f"the ingredients are pruned, but at different places ({zeros.apart!r} is the first): their matrices keep "
            f"{own}{' …' if len(zeros.densities) > 4 else ''} of their weights, and the average would keep "
            f"{zeros.together:.1%}. Soup copies that were retrained from one pruned network, as SparseModelSoup makes "
            "them, or prune the average again: UniformSoup(reprune=True), --recipe.reprune=true on the command line."
        )
    return []


def _duplicates(ingredients: Sequence[Ingredient]) -> list[str]:
    seen: dict[str, str] = {}
    notes = []
    for ingredient in ingredients:
        digest = ingredient.weights.digest()
        if digest in seen:
            notes.append(f"{ingredient.name} and {seen[digest]} hold the same weights: together they count twice.")
        seen.setdefault(digest, ingredient.name)
    return notes


def _unrelated(ingredients: Sequence[Ingredient]) -> list[str]:
    """Refuse networks from different random starts; note heads that only the head's own cosine gives away."""
    specs = ingredients[0].weights.specs
    matrices = [n for n, s in specs.items() if s.dtype.is_floating_point and s.numel > max(s.shape, default=1)]
    if len(matrices) < 2:  # nothing to compare the parts of a network by
        return []
    heads = [name for name in matrices if is_head(name)]
    body = [name for name in matrices if name not in heads] or matrices
    spread = body[:: max(1, len(body) // _COMPARED)]
    found = cosines([ingredient.weights for ingredient in ingredients], [*spread, *heads])
    names = [ingredient.name for ingredient in ingredients]
    for i in range(1, len(names)):
        if not torch.isfinite(torch.stack([found[name][0, i] for name in spread])).all():
            continue  # the kernel says which tensor of which file is not finite
        angles = [float(found[name][0, i]) for name in spread if _has_angle(found[name], i)]
        middle = statistics.median(angles) if angles else 1.0
        if middle < _UNRELATED:
            raise RecipeError(
                f"{names[0]} and {names[i]} have no common start: the median cosine between their weight matrices is "
                f"{middle:.2f} (fine-tunes of one model lie above 0.9). The average of networks from different random "
                "initialisations is worse than any of them. Fine-tune all ingredients from one checkpoint. To cook "
                "anyway: common_start='ignore' in the recipe, --recipe.common_start=ignore on the command line."
            )
    return _parts_apart(names, heads, spread, found)


def _has_angle(cosines: Tensor, i: int) -> bool:
    """Whether neither matrix is all zero, as layers are that start so and were not trained yet."""
    return float(cosines[0, 0]) > _UNRELATED and float(cosines[i, i]) > _UNRELATED


def _parts_apart(
    names: Sequence[str], heads: Sequence[str], spread: Sequence[str], found: Mapping[str, Tensor]
) -> list[str]:
    """Notes on parts that do not come from one start although the network as a whole does."""
    notes, apart = [], []
    for tensor in [*heads, *spread]:
        to_first = found[tensor][0]
        lowest = min(range(1, len(names)), key=lambda i, row=to_first: float(row[i]))
        cosine = float(to_first[lowest])
        if not (cosine < _UNRELATED and _has_angle(found[tensor], lowest)):
            continue
        if tensor in heads:
            notes.append(
                f"the head {tensor!r} differs between {names[0]} and {names[lowest]} (cosine {cosine:.2f}): heads that "
                "were initialised independently. Start all fine-tunes from one head (zero-shot or linear probe)."
            )
        else:
            apart.append(f"{tensor} ({names[0]} and {names[lowest]}, cosine {cosine:.2f})")
    if apart:
        notes.append(
            f"{len(apart)} of {len(spread)} compared matrices have little in common, as if they were initialised "
            f"independently: {', '.join(apart[:3])}{' …' if len(apart) > 3 else ''}. Start all runs from one file."
        )
    return notes
