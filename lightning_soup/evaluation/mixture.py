"""The two tiers of AWARE-NET: the mean of probabilities inside a family, and learnable weights over the families.

Everything is computed in logs, in float32 or better. The result is a **log**-probability: its loss is ``nll_loss``.

Source: Salman et al., AWARE-NET, ICEPECC 2025 (arXiv 2505.00312), whose method is written for two classes and one
logit; K families, n_k members in family k, logits z_kj, free parameters w. The form for several classes is ours.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_soup.errors import UnsupportedSetup

__all__ = [
    "check_min_alpha",
    "entropy",
    "family_log_probabilities",
    "learn_weights",
    "log_alpha",
    "log_probabilities",
    "mix",
    "stack_families",
    "weights_optimizer",
]


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities of one member.

    Args:
        logits: ``[..., C]``; or ``[..., 1]``, one logit of the second of two classes.

    Returns:
        ``[..., C]``, of one logit ``[..., 2]``; float32, or float64 where the logits are.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if z.shape[-1] == 1:
        return torch.cat([functional.logsigmoid(-z), functional.logsigmoid(z)], dim=-1)
    return functional.log_softmax(z, dim=-1)


def family_log_probabilities(members: Sequence[Tensor]) -> Tensor:
    """Tier 1: log p_k, p_k = (1/n_k) Σ_j softmax(z_kj), the mean of probabilities and never of logits.

    Args:
        members: The logits z_kj of each member, ``[..., C]`` or ``[..., 1]``.

    Returns:
        ``[..., C]``.
    """
    log_p = torch.stack([log_probabilities(logits) for logits in members])
    return torch.logsumexp(log_p, dim=0) - math.log(len(members))


def stack_families(logits: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Tensor:
    """Tier 1 of all families: log p_k, ``[B, K, C]``.

    Args:
        logits: Of every family, of every member: ``[B, C]`` or ``[B, 1]``.
        names: Of the families.

    Raises:
        UnsupportedSetup: Not one list of logits for each name, or logits of other shapes; names the family and member.
    """
    if not isinstance(logits, (Sequence, Tensor)):
        raise UnsupportedSetup(
            f"Expected a list with the members' logits for each of the families {', '.join(names)}; got a "
            f"{type(logits).__name__}."
        )
    if len(logits) != len(names) or not all(len(members) for members in logits):
        raise UnsupportedSetup(
            f"Expected the logits of one or more members for each of the families {', '.join(names)}; got lists of "
            f"{[len(members) for members in logits]} members."
        )
    shape = None
    for name, members in zip(names, logits, strict=True):
        for number, z in enumerate(members, 1):
            if not isinstance(z, Tensor):
                raise UnsupportedSetup(
                    f"Member {number} of the family {name} gives a {type(z).__name__}; expected a tensor of logits "
                    "[batch, classes]. Wrap it, so that it returns its logits alone."
                )
            classes = 2 if z.ndim == 2 and z.shape[1] == 1 else z.shape[-1]
            if z.ndim != 2 or (len(z), classes) != (shape or (len(z), classes)):
                raise UnsupportedSetup(
                    f"Member {number} of the family {name} gives logits of shape {list(z.shape)}; expected "
                    + (f"[batch, {shape[1]}], as the members before it." if shape else "[batch, classes].")
                    + " All members must answer for the same classes."
                )
            shape = (len(z), classes)
    return torch.stack([family_log_probabilities(members) for members in logits], dim=1)


def log_alpha(w: Tensor, min_alpha: float = 0.0) -> Tensor:
    """Log of α = softmax(w), or with a floor of α = min_alpha + (1 − K · min_alpha) softmax(w).

    Args:
        w: Free parameters, ``[K]``.
        min_alpha: No family gets less than this.
    """
    log_share = functional.log_softmax(w if w.dtype == torch.float64 else w.float(), dim=0)
    if min_alpha == 0:
        return log_share
    return torch.log(min_alpha + (1 - len(w) * min_alpha) * log_share.exp())


def mix(log_p: Tensor, log_alpha: Tensor) -> Tensor:
    """Tier 2: log p, p = Σ_k α_k p_k.

    Args:
        log_p: log p_k of every family, ``[..., K, C]``.
        log_alpha: ``[K]``.

    Returns:
        ``[..., C]``.
    """
    return torch.logsumexp(log_p + log_alpha[:, None], dim=-2)


def entropy(log_alpha: Tensor) -> Tensor:
    """−Σ α log α in nats: log K where all families weigh the same, 0 where one has all the weight."""
    return -(log_alpha.exp() * log_alpha.clamp(min=torch.finfo(log_alpha.dtype).min)).sum()


def check_min_alpha(min_alpha: float, families: int) -> None:
    """Refuse a floor that the weights cannot have.

    Raises:
        UnsupportedSetup: ``min_alpha`` is not in [0, 1/K).
    """
    if not 0 <= min_alpha < 1 / families:
        raise UnsupportedSetup(
            f"min_alpha={min_alpha}: expected 0 ≤ min_alpha < 1/K = {1 / families:.4g} for K = {families} families, "
            "since their weights add up to 1."
        )


def weights_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What learns w from fixed predictions, with all of them as one batch: L-BFGS, which ends at the optimum.

    The loss is convex in α, so that the optimum is one; a step is up to 100 evaluations of K numbers.
    """
    return torch.optim.LBFGS(
        parameters, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )


def learn_weights(log_p: Tensor, targets: Tensor, min_alpha: float = 0.0) -> Tensor:
    """The w whose α minimises the mean negative log-likelihood of held-out predictions.

    Args:
        log_p: log p_k of every family, ``[N, K, C]``, for samples that the members have not learned from: on their own
            training data the most overfitted family would get the weight.
        targets: Classes, ``[N]``.
        min_alpha: No family gets less than this.

    Returns:
        ``[K]``, float64, with mean 0.

    Raises:
        UnsupportedSetup: ``min_alpha`` is out of range, or there are no samples.
    """
    check_min_alpha(min_alpha, log_p.shape[1])
    if not len(targets):
        raise UnsupportedSetup("The weights of families are learned on held-out predictions, but there are none.")
    with torch.inference_mode(False), torch.enable_grad():  # callers may be in a Trainer's evaluation
        answers = targets.clone().view(-1, 1, 1).expand(-1, log_p.shape[1], 1)
        likelihood = log_p.detach().double().clone().gather(2, answers)
        w = nn.Parameter(likelihood.new_zeros(log_p.shape[1]))
        optimizer = weights_optimizer([w])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -mix(likelihood, log_alpha(w, min_alpha)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return (w - w.mean()).detach()
