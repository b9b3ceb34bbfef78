"""Choosing what to prune: by magnitude over all layers or in each, LAMP, ERK, at random, whole rows, or N of M."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.masks import Masks, pruned_in
from lightning_soup.layers.thresholds import above, kth_smallest

__all__ = [
    "Of",
    "Rounding",
    "check_selection",
    "check_shapes",
    "cubic_sparsity",
    "cycle_amounts",
    "erk_densities",
    "prune_",
]

Rounding = Literal["direct", "compound"]
Of = Literal["all", "survivors"]
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SELECTIONS = ("global", "uniform", "lamp", "erk", "random", "rows")


def check_selection(selection: str) -> tuple[int, int] | None:
    """N and M of an N:M selection; None for the others.

    Raises:
        UnsupportedSetup: It is unknown.
    """
    match = re.fullmatch(r"(\d+):(\d+)", str(selection))
    if match and 0 < int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    if selection not in _SELECTIONS:
        raise UnsupportedSetup(
            f"selection={selection!r}: expected {', '.join(_SELECTIONS)}, or N:M with 0 < N < M, such as '2:4'."
        )
    return None


def cycle_amounts(sparsity: float, cycles: int, rounding: Rounding = "direct") -> list[tuple[float, Of]]:
    """How much each cycle prunes, so that it takes the same share of the survivors and the last reaches the goal.

    ``s_c = 1 − (1 − S)^(c/n)``.

    Args:
        sparsity: S, above 0 and below 1.
        cycles: n.
        rounding: ``direct``: amounts are of all, ``N·s_c`` rounded, so that the count at the end is that of S.
            ``compound``: of the survivors each time, as torch's pruning rounds.

    Returns:
        Amounts as :func:`prune_` takes them.

    Raises:
        UnsupportedSetup: An option is out of range.

    Source: Zimmer et al., Sparse Model Soups (arXiv 2306.16788).
    """
    if not isinstance(sparsity, Real) or not 0 < sparsity < 1:
        raise UnsupportedSetup(f"sparsity={sparsity!r}: expected a share above 0 and below 1; 0.9 prunes 90 %.")
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise UnsupportedSetup(f"cycles={cycles!r}: expected 1 or more.")
    if rounding not in ("direct", "compound"):
        raise UnsupportedSetup(f"rounding={rounding!r}: expected direct or compound.")
    if rounding == "compound":
        return [(1 - (1 - sparsity) ** (1 / cycles), "survivors")] * cycles
    reached = [1 - (1 - sparsity) ** (cycle / cycles) for cycle in range(1, cycles)]
    return [(amount, "all") for amount in [*reached, sparsity]]


def cubic_sparsity(sparsity: float, progress: float) -> float:
    """``S·(1 − (1 − t)³)`` at progress t, 0 … 1: gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878)."""
    return sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


@torch.no_grad()
def prune_(
    tensors: Mapping[str, Tensor],
    amount: float,
    masks: Masks | None = None,
    selection: str = "global",
    of: Of = "all",
    seed: int = 0,
) -> Masks:
    """Prune more: give masks of exactly so many elements, and make them zero in place.

    What was pruned stays so, and only what is left is ranked. Among equal scores the lower tensor goes first, then the
    lower element, so that the choice is the same everywhere.

    Args:
        tensors: The weights, by name, in the order that decides between equals.
        amount: The share to be pruned in the end, if ``of`` is ``all``; of those left now, if ``survivors``. Rounded to
            whole elements, halves to even.
        masks: What is pruned so far.
        selection: ``global``: the smallest magnitudes of all tensors together. ``uniform``: of each tensor, the same
            share. ``lamp``: by ``w²`` over the sum of squares not smaller in its tensor, all together. ``erk``: of each
            tensor, more of the large ones (:func:`erk_densities`). ``random``. ``rows``: of each tensor, the same share
            of its rows (filters), by their L2 norms. ``N:M``: all but the N largest in each M neighbours along the
            inputs; ``amount`` must be ``1 − N/M``.
        of: As above.
        seed: Of ``random``.

    Returns:
        The new masks. Uniform and ERK shares are rounded so that their sum is exact.

    Raises:
        UnsupportedSetup: More is pruned already, a tensor's inputs do not divide by M, an option is unknown, or a
            tensor is sharded, on the meta device, or of another type than floats of 16, 32 or 64 bits.
        NonFiniteWeights: A weight is NaN or infinite.

    Source: Zimmer et al., Sparse Model Soups (arXiv 2306.16788); LAMP: Lee et al. (arXiv 2010.07611); ERK: Evci et al.
    (arXiv 1911.11134).
    """
    grouped = check_selection(selection)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, least_ndim=2 if grouped or selection == "rows" else 0)
    if masks is None:
        masks = Masks.full(tensors)
    else:
        masks.check(tensors, "prune_")
        masks.apply_(tensors, once=True)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise NonFiniteWeights(f"{name} has a NaN or an infinite value, so it cannot be pruned by magnitude.")
    old = [masks[name].to(tensor.device).contiguous() for name, tensor in tensors.items()]
    if grouped:
        new = _n_of_m(tensors, old, *grouped, amount)
    elif selection == "rows":
        new = [_rows(name, tensor, mask, amount, of) for (name, tensor), mask in zip(tensors.items(), old, strict=True)]
    else:
        goal = _goal("all prunable tensors", masks.size, masks.pruned, amount, of)
        new = _smallest(list(tensors.values()), old, goal, selection, seed)
    extended = Masks(dict(zip(tensors, new, strict=True)))
    extended.apply_(tensors, once=True)
    return extended


def erk_densities(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """The share kept of each tensor: ``ε·Σ dims / Π dims``, at most 1, with the ε at which the total is ``(1 − S)·N``.

    Args:
        shapes: Of the tensors.
        sparsity: S.
    """
    sizes = [math.prod(shape) for shape in shapes]
    kept, dense = (1 - sparsity) * sum(sizes), [size == 0 for size in sizes]
    while True:
        left = kept - sum(size for size, full in zip(sizes, dense, strict=True) if full)
        spread = sum(sum(shape) for shape, full in zip(shapes, dense, strict=True) if not full)
        scale = left / spread if spread else 0.0
        found = [1.0 if full else scale * sum(s) / n for s, n, full in zip(shapes, sizes, dense, strict=True)]
        over = [density > 1 for density in found]
        if not any(over):
            return found
        dense = [full or more for full, more in zip(dense, over, strict=True)]


def _check_tensor(name: str, tensor: Tensor, least_ndim: int) -> None:
    """Refuse what cannot be ranked element by element."""
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of layout {tensor.layout}"
        raise UnsupportedSetup(f"{name} is {kind}: expected a whole tensor with values. Gather or load it first.")
    if tensor.dtype not in _DTYPES:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise UnsupportedSetup(f"{name} is {tensor.dtype}: expected {types}. Convert it, or leave it out.")
    if tensor.ndim < least_ndim:
        raise UnsupportedSetup(f"{name} is {tuple(tensor.shape)}: expected rows and inputs. Exclude it.")


def _goal(what: str, size: int, pruned: int, amount: float, of: Of) -> int:
    """How many are pruned in the end."""
    if isinstance(amount, str) or not 0 <= amount <= 1:
        raise UnsupportedSetup(f"amount={amount!r}: expected a share, 0 … 1.")
    if of not in ("all", "survivors"):
        raise UnsupportedSetup(f"of={of!r}: expected all or survivors.")
    goal = round(size * amount) if of == "all" else pruned + round((size - pruned) * amount)
    if goal < pruned:
        raise UnsupportedSetup(
            f"{pruned:,} of {size:,} elements of {what} are pruned already, more than the {goal:,} asked for; what is "
            "pruned stays so. Begin with a dense model, or ask for more."
        )
    return goal


def _smallest(tensors: list[Tensor], old: list[Tensor], goal: int, selection: str, seed: int) -> list[Tensor]:
    if selection == "global":
        return _least(tensors, old, goal, absolute=True)
    if selection == "lamp":
        return _least([lamp_scores(tensor) for tensor in tensors], old, goal)
    if selection == "random":
        draw = torch.Generator().manual_seed(seed)
        scores = [torch.rand(t.shape, generator=draw).to(t.device) * m for t, m in zip(tensors, old, strict=True)]
        return _least(scores, old, goal)
    sizes, pruned = [tensor.numel() for tensor in tensors], [pruned_in(mask) for mask in old]
    if selection == "erk":
        densities = erk_densities([tensor.shape for tensor in tensors], goal / max(sum(sizes), 1))
        exact = [size * (1 - density) for size, density in zip(sizes, densities, strict=True)]
    else:
        share = (goal - sum(pruned)) / max(sum(sizes) - sum(pruned), 1)
        exact = [gone + share * (size - gone) for size, gone in zip(sizes, pruned, strict=True)]
    goals = _apportion(exact, goal, pruned, sizes)
    rows = zip(tensors, old, goals, strict=True)
    return [_least([tensor], [mask], one, absolute=True)[0] for tensor, mask, one in rows]


def _least(scores: list[Tensor], old: list[Tensor], goal: int, absolute: bool = False) -> list[Tensor]:
    """Masks without the ``goal`` smallest scores; those of what is pruned already are 0."""
    if goal == 0:
        return old
    value, below, _ = kth_smallest(scores, goal, absolute)
    if value == 0:  # there are zeros enough: what is pruned already is among them, and goes first
        missing = goal - sum(pruned_in(mask) for mask in old)
        zeros = [torch.logical_and(score == 0, mask) for score, mask in zip(scores, old, strict=True)]
        return _without_first(old, zeros, missing)
    return above(scores, value, goal - below, absolute)


def _without_first(kept: list[Tensor], ties: list[Tensor], count: int) -> list[Tensor]:
    """Masks without the first ``count`` of the ties."""
    new = [mask.clone() for mask in kept]
    for mask, tie in zip(new, ties, strict=True):
        places = tie.reshape(-1).nonzero().squeeze(1)[:count]
        mask.view(-1)[places] = False
        count -= len(places)
    return new


def lamp_scores(tensor: Tensor) -> Tensor:
    """``w_u² / Σ w_v²`` over all v with ``w_v² ≥ w_u²``, in one tensor; 0 for zeros."""
    squares = tensor.double().square().reshape(-1)
    ordered, places = squares.sort()
    # A GPU adds up in another order each time, and refuses to where deterministic algorithms are wanted.
    sums = ordered.flip(0).cpu().cumsum(0).flip(0).to(tensor.device)
    first = torch.searchsorted(ordered, ordered)  # of equals, whose sums are the same
    scores = torch.empty_like(squares)
    scores[places] = ordered / sums[first]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return scores.nan_to_num_(0.0).to(wide).reshape(tensor.shape)


def _rows(name: str, tensor: Tensor, mask: Tensor, amount: float, of: Of) -> Tensor:
    kept = mask.flatten(1).any(1)
    goal = _goal(f"rows of {name}", len(kept), pruned_in(kept), amount, of)
    # Wide enough for squares of any float32, else rows of tiny or huge weights would all be equal.
    norms = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).masked_fill_(~kept, -1.0)
    gone = norms.argsort(stable=True)[:goal]
    new = mask.clone()
    new[gone] = False
    return new


def check_shapes(tensors: Mapping[str, Tensor], selection: str, amount: float) -> None:
    """Refuse N:M of another amount, or of tensors that do not divide; other selections take any.

    Raises:
        UnsupportedSetup: It is so.
    """
    grouped = check_selection(selection)
    if grouped is None:
        return
    n, m = grouped
    if not math.isclose(amount, 1 - n / m):
        raise UnsupportedSetup(f"{n}:{m} prunes {1 - n / m:g} of the weights at once, not {amount:g}: ask for that.")
    odd = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.shape[1] % m]
    if odd:
        raise UnsupportedSetup(
            f"{n}:{m} needs numbers of inputs (dimension 1) that divide by {m}, but not these: "
            f"{', '.join(odd[:10])}{', …' if len(odd) > 10 else ''}. Exclude them."
        )


def _n_of_m(tensors: Mapping[str, Tensor], old: list[Tensor], n: int, m: int, amount: float) -> list[Tensor]:
    check_shapes(tensors, f"{n}:{m}", amount)
    new = []
    for tensor, mask in zip(tensors.values(), old, strict=True):
        scores = tensor.abs().masked_fill(~mask, -1.0).movedim(1, -1).unflatten(-1, (-1, m))
        gone = scores.argsort(dim=-1, stable=True)[..., : m - n]
        kept = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, gone, False)
        new.append(mask & kept.flatten(-2).movedim(-1, 1))
    return new


def _apportion(exact: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole numbers near ``exact`` within their bounds that add up to ``total``: the largest remainders go up."""
    whole = [min(max(math.floor(x), low), high) for x, low, high in zip(exact, least, most, strict=True)]
    while (missing := total - sum(whole)) != 0:
        step = 1 if missing > 0 else -1
        order = sorted(range(len(whole)), key=lambda i: (step * (whole[i] - exact[i]), i))
        room = [i for i in order if (whole[i] < most[i] if step > 0 else whole[i] > least[i])]
        for i in room[: abs(missing)]:
            whole[i] += step
    return whole
