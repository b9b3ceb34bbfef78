"""The sum of a federated round, x + Σ_n a_n·Δ_n, formed by the package's kernel; and which replies may enter it.

With Δ_n = y_n − x this is (1 − Σ a)·x + Σ a_n·y_n, a combination like any other, whose coefficients add up to 1. So
:func:`.combine` forms it, in a float64 accumulator: large a (rare clients) then lose nothing of x, and what no client
changed stays as it is, bit by bit. Only the maximum of integers is taken here, which adds nothing.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_soup.distributed.participation_clients import Client
from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.weights.combine import combine
from lightning_soup.weights.compatibility import kind
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

_STATISTICS = ("running_mean", "running_var")  # of all normalisation layers of torch
Weights = Mapping[str, Tensor]


def float_buffers(module: nn.Module) -> frozenset[str]:
    """The names of a module's floating buffers, as they stand in its state dict."""
    kept = set(module.state_dict(keep_vars=True))
    return frozenset(
        name
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if name in kept and kind(buffer.dtype) in ("floating", "complex")
    )


def checked_reply(client: Client, reply: Source | WeightsFile, weights: WeightsFile) -> WeightsFile:
    """Open the weights y_n that a client replied with, and check them against the global ones.

    Args:
        client: Its name, for messages.
        reply: What :func:`.open_checkpoint` opens.
        weights: x.

    Returns:
        The opened reply.

    Raises:
        IncompatibleIngredients: Tensors are missing, unknown, or of another shape or kind.
        NonFiniteWeights: A NaN, or an infinity that x does not have at its place.
        UnreadableCheckpoint: It cannot be opened.
    """
    try:
        found = open_checkpoint(reply)
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"client {client!r}: {error}") from error
    ours, theirs = weights.specs, found.specs
    wrong = [f"{name!r} is missing" for name in ours if name not in theirs]
    wrong += [f"{name!r} is unknown" for name in theirs if name not in ours]
    wrong += [
        f"{name!r} is {theirs[name]}, expected {spec}"
        for name, spec in ours.items()
        if name in theirs and (theirs[name].shape != spec.shape or kind(theirs[name].dtype) != kind(spec.dtype))
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} tensors more" if len(wrong) > 3 else ""
        raise IncompatibleIngredients(
            f"client {client!r}: its weights do not fit the global ones: tensor {'; tensor '.join(wrong[:3])}{more}. "
            "Let it build the model of the server."
        )
    for name, spec in ours.items():
        if kind(spec.dtype) not in ("floating", "complex"):
            continue
        value = found[name]
        bad = ~torch.isfinite(value)
        if bad.any() and not (bad & (value != weights[name])).any():  # a mask; NaN is never equal
            continue
        if bad.any():
            what = "NaN" if torch.isnan(value).any() else "an infinity"
            raise NonFiniteWeights(
                f"client {client!r}: tensor {name!r} ({spec}) holds {what}. Lower its learning rate, or look at its "
                "data."
            )
    return found


def federated_sum(
    weights: Source | WeightsFile,
    replies: Mapping[Client, Source | WeightsFile],
    coefficients: Mapping[Client, float],
    *,
    remembered: Sequence[tuple[float, Weights]] = (),
    buffers: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Form x + Σ_n a_n·(y_n − x) + Σ_m b_m·Y_m of parameters; buffers are joined, not moved.

    - Parameters are accumulated in float64 and rounded once, to the type that they have in x.
    - Floating buffers, such as BatchNorm's statistics, become the mean of the participants' (a multiple of a difference
      can make a variance negative).
    - Integer tensors become the participants' maximum, bools are true where one of theirs is; types stay those of x.

    Args:
        weights: x.
        replies: y by client, as :func:`checked_reply` lets through. None: x and what is remembered.
        coefficients: a by client, one for each reply.
        remembered: (b, Y) of earlier updates, each with a tensor for every parameter of x.
        buffers: The names of floating buffers (:func:`float_buffers` of the module); ``None``: those whose names end in
            ``running_mean`` and ``running_var``.

    Returns:
        The new weights, under the names of x.

    Raises:
        IncompatibleIngredients: Tensors do not fit.
        NonFiniteWeights: x or a reply holds NaN, or the sum overflows.
        UnsupportedSetup: A buffer that x does not have, or a reply without a coefficient.
    """
    x, ys = open_checkpoint(weights), [open_checkpoint(reply) for reply in replies.values()]
    missing = [client for client in replies if client not in coefficients]
    if missing:
        raise UnsupportedSetup(f"client {missing[0]!r} replied, but has no coefficient. Give one for each reply.")
    joined = joined_names(x, buffers)
    found: dict[str, Tensor] = {}
    moved = parameter_names(x, buffers)
    if moved:
        a, b = [coefficients[client] for client in replies], [share for share, _ in remembered]
        terms = [*(file.only(set(moved)) for file in (x, *ys)), *(memory for _, memory in remembered)]
        found |= combine(terms, [1.0 - math.fsum(a), *a, *b], accumulate="float64")
    if joined:
        files = [file.only(joined) for file in (x, *ys)]
        row = [0.0, *([1.0 / len(ys)] * len(ys))] if ys else [1.0]
        found |= combine(files, row, accumulate="float64")
    found |= dict(_largest(x, ys))
    return {x.original_names[name]: found[name] for name in x}


def joined_names(weights: WeightsFile, buffers: Collection[str] | None) -> frozenset[str]:
    """The floating tensors that are averaged over participants.

    Raises:
        UnsupportedSetup: A name that the weights do not have.
    """
    floating = _floating(weights)
    if buffers is None:
        return frozenset(name for name in floating if name.rpartition(".")[2] in _STATISTICS)
    raw = {raw: name for name, raw in weights.original_names.items()}
    names = [raw.get(name, name) for name in buffers]
    unknown = [name for name in names if name not in weights]
    if unknown:
        raise UnsupportedSetup(
            f"buffers: there is no tensor {unknown[0]!r}. Give the names in the state dict, or float_buffers(module)."
        )
    return frozenset(name for name in names if name in floating)


def parameter_names(weights: WeightsFile, buffers: Collection[str] | None) -> tuple[str, ...]:
    """The floating tensors that are moved by updates."""
    joined = joined_names(weights, buffers)
    return tuple(name for name in _floating(weights) if name not in joined)


def update(weights: WeightsFile, reply: WeightsFile, buffers: Collection[str] | None) -> dict[str, Tensor]:
    """Δ = y − x of the parameters, in float32 or wider."""
    moved = parameter_names(weights, buffers)
    if not moved:
        return {}
    wide = {name: torch.promote_types(weights.specs[name].dtype, torch.float32) for name in moved}
    out = {name: torch.empty(weights.specs[name].shape, dtype=wide[name]) for name in moved}
    return combine([reply.only(set(moved)), weights.only(set(moved))], [1.0, -1.0], out, accumulate="float64")


def _floating(weights: WeightsFile) -> dict[str, None]:
    """An ordered set."""
    return {n: None for n, spec in weights.specs.items() if kind(spec.dtype) in ("floating", "complex")}


def _largest(weights: WeightsFile, replies: Sequence[WeightsFile]) -> Iterator[tuple[str, Tensor]]:
    floating = _floating(weights)
    for name in (name for name in weights if name not in floating):
        first, *others = [file[name] for file in replies] or [weights[name]]
        largest = first.to(torch.int64)
        for other in others:
            largest = torch.maximum(largest, other.to(torch.int64))
        yield name, largest.to(weights.specs[name].dtype)
