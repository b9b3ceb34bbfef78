"""Experts as weights: their mean, how far they are from it, and the step that pulls them towards it."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.threads import one_thread

__all__ = ["average_experts_", "check_count", "check_share_rate", "expert_spread", "mean_expert", "mean_of"]

_CHUNK = 1 << 17  # elements worked on at a time: those of all experts stay in the cache between two passes over them


def check_count(option: str, count: int, least: int) -> None:
    """Refuse what is not a whole number, or too small a one.

    Args:
        option: Its name.
        count: What was given.
        least: The smallest that has a meaning.

    Raises:
        UnsupportedSetup: It is one of these.
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise UnsupportedSetup(f"{option}={count!r}: expected a whole number, {least} or more.")


def check_share_rate(beta: float, count: int) -> None:
    """Refuse a share rate that would take experts beyond their mean.

    Args:
        beta: β.
        count: N.

    Raises:
        UnsupportedSetup: β is no number or lies outside 0 … (N − 1)/N, or there are fewer than two experts.
    """
    check_count("num_experts", count, 2)
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise UnsupportedSetup(f"share_rate={beta!r}: expected a number, such as 0.3.")
    highest = (count - 1) / count
    if not 0 <= beta <= highest + 1e-12:  # NaN is refused, too
        raise UnsupportedSetup(
            f"share_rate={beta}: expected 0 ≤ β ≤ (N − 1)/N = {highest:.4g} for {count} experts. At the upper end each "
            "becomes the mean of all; beyond it they would change sides. (A rate that counts the expert itself among "
            f"those averaged, β', is β = β'·(N − 1)/N.)"
        )


@torch.no_grad()
def average_experts_(experts: Sequence[nn.Module], beta: float) -> None:
    """Move all experts towards their mean at once, in place.

    ``W_i ← (1 − β)·W_i + β/(N − 1)·Σ_{j≠i} W_j``, which is ``W̄ + ρ·(W_i − W̄)`` with ``ρ = 1 − βN/(N − 1)``, for each
    parameter: the mean W̄ stays, distances from it shrink by ρ. Computed in float32, or float64 for such parameters; one
    read and one write of the experts. Parameters stay the same objects, as their optimizer needs.

    Args:
        experts: N modules alike.
        beta: β, 0 … (N − 1)/N.

    Raises:
        UnsupportedSetup: β out of range, or experts that are not alike.

    Source: Huang et al., Experts Weights Averaging (arXiv 2308.06093).
    """
    check_share_rate(beta, len(experts))
    if beta == 0:
        return
    pull = min(1.0, beta * len(experts) / (len(experts) - 1))  # 1 − ρ
    rows = list(_rows(experts).values())
    with one_thread(rows[0] if rows else []):
        scratch: dict[torch.dtype, Tensor] = {}
        for tensors in rows:
            _pull_(tensors, pull, scratch)


def mean_expert(experts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """W̄ of every parameter and floating-point buffer by name, in its own type; equal ones are kept exactly.

    Gradients flow to all experts. Buffers are what each expert has gathered of its own tokens: they meet here only, and
    are no part of the averaging step.
    """
    buffers = [dict(expert.named_buffers()) for expert in experts]
    floating = [name for name, buffer in buffers[0].items() if buffer.is_floating_point()]
    return {
        **{name: mean_of(tensors) for name, tensors in _rows(experts).items()},
        **{name: mean_of([found[name] for found in buffers]) for name in floating},
    }


@torch.no_grad()
def expert_spread(experts: Sequence[nn.Module]) -> float:
    """‖W − W̄‖ / ‖W‖ over the weight matrices of all experts: 0 where they are equal."""
    apart = whole = 0.0
    for tensors in _rows(experts).values():
        if tensors[0].ndim > 1:
            mean = mean_of(tensors)
            apart += sum(float(torch.linalg.vector_norm((tensor - mean).float())) ** 2 for tensor in tensors)
            whole += sum(float(torch.linalg.vector_norm(tensor.float())) ** 2 for tensor in tensors)
    return math.sqrt(apart / whole) if whole else 0.0


def _rows(experts: Sequence[nn.Module]) -> Mapping[str, list[Tensor]]:
    """Each parameter of all experts, by its name in one."""
    named = [dict(expert.named_parameters()) for expert in experts]
    for other in named[1:]:
        for name in named[0].keys() | other.keys():
            shapes = [None if found is None else tuple(found.shape) for found in (named[0].get(name), other.get(name))]
            if shapes[0] != shapes[1]:
                raise UnsupportedSetup(
                    f"the experts are not alike: {name} is {shapes[0] or 'missing'} in one and "
                    f"{shapes[1] or 'missing'} in another."
                )
    return {name: [parameters[name] for parameters in named] for name in named[0]}


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """W̄ of one parameter of all experts, in its own type; where all are equal, exactly that."""
    first = tensors[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    base = first.to(wide)
    apart = torch.zeros_like(base)
    for tensor in tensors[1:]:
        apart = apart + (tensor.to(wide) - base)
    return (base + apart / len(tensors)).to(first.dtype)


def _pull_(tensors: Sequence[Tensor], pull: float, scratch: dict[torch.dtype, Tensor]) -> None:
    """``t ← t + pull·(mean − t)`` for alike tensors; ``scratch`` holds means, as fresh memory costs page faults."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if not all(tensor.is_contiguous() and tensor.dtype == wide for tensor in tensors):
        values = [tensor.detach().to(wide, copy=True) for tensor in tensors]
        mean = mean_of(values)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value.lerp_(mean, pull))
        return
    flat = [tensor.detach().view(-1) for tensor in tensors]
    length, device = len(flat[0]), flat[0].device
    step = min(length, _CHUNK) if device.type == "cpu" else length
    if wide not in scratch or len(scratch[wide]) < step or scratch[wide].device != device:
        scratch[wide] = torch.empty(step, dtype=wide, device=device)
    for start in range(0, length, step or 1):
        parts = [tensor[start : start + step] for tensor in flat]
        mean = torch.add(parts[0], parts[1], out=scratch[wide][: len(parts[0])])
        for part in parts[2:]:
            mean += part
        mean *= 1 / len(parts)
        torch._foreach_lerp_(parts[::-1], [mean] * len(parts), pull)  # the last one read is still in the cache
