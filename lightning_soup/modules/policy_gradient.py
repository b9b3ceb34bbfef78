"""The arithmetic of PPO for language models, token by token, with the KL divergence to a frozen reference as reward.

B responses of up to T tokens; ``mask`` ``[B, T]`` is 1 at their tokens, the end token among them, and 0 after it. Three
policies take part: π_θ that is trained, π_old that wrote the responses (π_θ before the batch), and π_ref, which never
changes.

Source: Schulman et al., Proximal Policy Optimization Algorithms (arXiv 1707.06347); Ziegler et al., Fine-Tuning
Language Models from Human Preferences (arXiv 1909.08593) for the KL reward and its controller; k1, k2, k3: Schulman,
Approximating KL Divergence (2020).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = [
    "Estimator",
    "advantages_and_returns",
    "controlled_beta",
    "kl_divergence",
    "kl_to_reference",
    "policy_loss",
    "token_rewards",
    "value_loss",
    "whiten",
]

Estimator = Literal["k1", "k2", "k3"]
Sum = Callable[[Tensor], Tensor]  # over all ranks


def kl_to_reference(log_pi: Tensor, log_ref: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimates of KL(π‖π_ref) from single tokens that π has drawn.

    With k = log π − log π_ref: k1 = k, without bias and of either sign; k2 = k²/2, with a bias, for logging; k3 =
    exp(−k) − 1 + k, without bias, never negative, and of less variance.

    Args:
        log_pi: Log-probabilities of the tokens under π, of any shape.
        log_ref: The same under π_ref.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        An estimate for each token.

    Raises:
        UnsupportedSetup: Shapes that differ, or no such estimator.
    """
    if log_pi.shape != log_ref.shape:
        raise UnsupportedSetup(
            f"kl_to_reference: got log-probabilities {list(log_pi.shape)} and {list(log_ref.shape)} of the reference; "
            "expected the same tokens under both."
        )
    k = log_pi - log_ref
    if estimator == "k1":
        return k
    if estimator == "k2":
        return k.square() / 2
    if estimator == "k3":
        return torch.expm1(-k) + k
    raise UnsupportedSetup(f"kl_to_reference: estimator={estimator!r}; expected one of k1, k2, k3.")


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(π‖π_ref) itself, Σ_c π(c)·(log π(c) − log π_ref(c)), from the logits of both ``[…, C]``; of shape ``[…]``.

    Raises:
        UnsupportedSetup: Shapes that differ.
    """
    if logits.shape != reference.shape:
        raise UnsupportedSetup(
            f"kl_divergence: got logits {list(logits.shape)} and {list(reference.shape)} of the reference; expected "
            "the same classes, or the same vocabulary, under both."
        )
    wide = torch.promote_types(logits.dtype, torch.float32)  # softmax and sums lose too much in 16 bits
    log_pi, log_ref = logits.to(wide).log_softmax(-1), reference.to(wide).log_softmax(-1)
    pi = log_pi.exp()
    # Where π(c) is 0 the term is 0, also where both logits are −∞ (tokens that no model may write).
    return torch.where(pi > 0, pi * (log_pi - log_ref), 0.0).sum(-1)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = −β·k_t, and the score of the response on its last token.

    Args:
        kl: k_t, ``[B, T]``.
        scores: r(x, y), ``[B]``.
        mask: ``[B, T]``; each response has one token or more.
        beta: β.

    Returns:
        ``[B, T]``, 0 after the end.
    """
    rewards = -beta * kl * mask
    last = mask.sum(1).long().unsqueeze(1) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}, R_t = A_t + V_t.

    V and A are 0 after the end of a response.

    Args:
        rewards: r_t, ``[B, T]``.
        values: V_t, ``[B, T]``, of the state before token t.
        mask: ``[B, T]``.
        gamma: γ.
        lam: λ.

    Returns:
        A and R, ``[B, T]``, both 0 after the end.

    Source: Schulman et al., ICLR 2016 (arXiv 1506.02438), equation 16.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    nothing = torch.zeros_like(values[:, :1])
    deltas = (rewards + gamma * torch.cat([values[:, 1:], nothing], 1) - values) * mask
    advantages = torch.empty_like(deltas)
    ahead = nothing[:, 0]
    for t in reversed(range(deltas.shape[1])):
        ahead = deltas[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, total: Sum = lambda part: part) -> Tensor:
    """(A − mean)/√(var + 1e-8) over all tokens of the batch, with the variance of a sample (n − 1).

    Args:
        advantages: ``[B, T]``.
        mask: ``[B, T]``.
        total: Sums a tensor over ranks, so that all are scaled alike.

    Returns:
        ``[B, T]``, 0 after the ends.
    """
    mask = mask.to(advantages.dtype)
    count, summed = total(torch.stack([mask.sum(), (advantages * mask).sum()]))
    centred = (advantages - summed / count) * mask
    variance = total(centred.square().sum()) / (count - 1).clamp(min=1)
    return centred / (variance + 1e-8).sqrt()


def policy_loss(log_pi: Tensor, log_old: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """max(−A·ρ, −A·clip(ρ, 1 ± ε)) of each token, with ρ = π_θ/π_old.

    Args:
        log_pi: Log-probabilities of the tokens under π_θ, ``[B, T]``.
        log_old: The same under π_old.
        advantages: A.
        epsilon: ε.
    """
    ratio = (log_pi - log_old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float = 0.2) -> Tensor:
    """½·max((V − R)², (clip(V, V_old ± ε_v) − R)²) of each token.

    Args:
        values: V, ``[B, T]``.
        old_values: V_old, as it was when the responses were written.
        returns: R.
        epsilon: ε_v.
    """
    clipped = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def controlled_beta(beta: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """β of the next batch: β·(1 + clip(KL/target − 1, ±0.2)·n/horizon), as in Ziegler et al., section 2.2.

    Args:
        beta: β of this batch.
        kl: KL of this batch, in nats a response.
        target: KL that is wanted.
        horizon: Responses within which the controller acts; a batch of more counts as so many, or β could change its
            sign.
        responses: n of this batch, on all ranks.
    """
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * min(responses / horizon, 1))
