"""The arithmetic of PPO against numbers computed by hand, and against plain loops."""

import math

import pytest
import torch
from torch import tensor

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.policy_gradient import (
    advantages_and_returns,
    controlled_beta,
    kl_divergence,
    kl_to_reference,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def f64(*values):
    return tensor(values, dtype=torch.float64)


def close(found, *expected):
    torch.testing.assert_close(found, f64(*expected), rtol=0, atol=1e-6)


L1, L2 = f64(2, 0, 0), f64(0, 2, 0)


def test_a_soup_of_linear_models_is_a_geometric_mean_of_policies():
    soup = (L1 + L2) / 2
    close(soup.softmax(0), 0.422318798, 0.422318798, 0.155362403)
    log_z = (0.5 * L1.log_softmax(0) + 0.5 * L2.log_softmax(0)).logsumexp(0)
    to_soup, to_other = kl_divergence(L1, soup), kl_divergence(L1, L2)
    close(torch.stack([to_soup, to_other, log_z]), 0.302929101, 1.360958126, -0.377549962)
    # KL(π‖π_ref) = α KL(π‖π_1) + (1−α) KL(π‖π_2) + log Z, for any π.
    for policy in (L1, f64(0.3, -1.0, 0.7)):
        both = 0.5 * kl_divergence(policy, L1) + 0.5 * kl_divergence(policy, L2) + log_z
        torch.testing.assert_close(kl_divergence(policy, soup), both)
    quarter = 0.25 * L1 + 0.75 * L2
    close(quarter.softmax(0), 0.231223898, 0.628531719, 0.140244383)
    close(kl_divergence(L1, quarter)[None], 0.745542613)
    mixture = (L1.softmax(0) + L2.softmax(0)) / 2
    close(mixture, 0.446746511, 0.446746511, 0.106506979)
    close(kl_divergence(L1, mixture.log())[None], 0.292898919)


LOG_PI, LOG_REF = f64(-0.5, -1, -2), f64(-0.7, -0.9, -2.5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", (0.2, -0.1, 0.5)), ("k2", (0.02, 0.005, 0.125)), ("k3", (0.018730753, 0.005170918, 0.106530660))],
)
def test_estimators(estimator, expected):
    close(kl_to_reference(LOG_PI, LOG_REF, estimator), *expected)


def test_estimators_have_the_divergence_as_their_mean():
    generator = torch.Generator().manual_seed(0)
    logits, reference = f64(1.0, 0.2, -0.5, 0.0), f64(0.3, 0.4, 0.1, -0.2)
    drawn = torch.multinomial(logits.softmax(0), 200_000, replacement=True, generator=generator)
    log_pi, log_ref = logits.log_softmax(0)[drawn], reference.log_softmax(0)[drawn]
    exact = kl_divergence(logits, reference).item()
    found = {name: kl_to_reference(log_pi, log_ref, name) for name in ("k1", "k3")}
    assert found["k1"].mean().item() == pytest.approx(exact, abs=0.005)
    assert found["k3"].mean().item() == pytest.approx(exact, abs=0.002)
    assert found["k3"].var() < found["k1"].var()
    assert found["k3"].min() >= 0


def test_the_divergence_where_tokens_are_impossible():
    never = -math.inf
    close(kl_divergence(f64(0, 0, never), f64(0, 0, never))[None], 0.0)
    close(kl_divergence(f64(0, never, never), f64(0, 0, never))[None], math.log(2))
    assert kl_divergence(f64(0, 0), f64(0, never)).item() == math.inf
    assert kl_divergence(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)).dtype == torch.float32


def test_rewards_advantages_and_whitening():
    mask = torch.ones(1, 3)
    kl, values = (LOG_PI - LOG_REF)[None], f64(0.2, 0.3, 0.5)[None]
    rewards = token_rewards(kl, f64(1), mask, beta=0.1)
    close(rewards[0], -0.02, 0.01, 0.95)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.95)
    close(advantages[0], 0.685625, 0.6375, 0.45)
    close(returns[0], 0.885625, 0.9375, 0.95)
    close(whiten(advantages, mask)[0], 0.759746474, 0.373179435, -1.132925909)


def test_padding_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    kl, values = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    scores = f64(0.7, -1.3)
    rewards = token_rewards(kl, scores, mask, beta=0.3)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=0.9, lam=0.8)
    whitened = whiten(advantages, mask)
    alone = token_rewards(kl[:1, :3], scores[:1], mask[:1, :3], beta=0.3)
    torch.testing.assert_close(rewards[:1, :3], alone)
    for found, expected in zip(
        (advantages, returns), advantages_and_returns(alone, values[:1, :3], mask[:1, :3], 0.9, 0.8), strict=True
    ):
        torch.testing.assert_close(found[:1, :3], expected)
    for found in (rewards, advantages, returns, whitened):
        assert not found[0, 3:].any()
    real = advantages[mask.bool()]
    torch.testing.assert_close(whitened[mask.bool()], (real - real.mean()) / (real.var() + 1e-8).sqrt())


def test_whitening_over_ranks_is_that_of_all_tokens():
    both = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    parts = [(both[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    expected = whiten(both, mask)
    # What the other rank would add, asked for in the order in which whiten asks.
    for own, other, rows in ((0, 1, slice(0, 1)), (1, 0, slice(1, 4))):
        seen = []
        whiten(*parts[other], total=lambda part, seen=seen: seen.append(part) or part)
        count, summed = seen[0] + torch.stack([parts[own][1].sum(), (parts[own][0] * parts[own][1]).sum()])
        centred = (parts[other][0] - summed / count) * parts[other][1]
        added = iter([seen[0], centred.square().sum()])
        found = whiten(*parts[own], total=lambda part, added=added: part + next(added))
        torch.testing.assert_close(found, expected[rows])


def test_one_token_is_whitened_to_nothing():
    assert whiten(f64(3.0)[None], torch.ones(1, 1)).item() == 0


def test_clipping():
    advantages = f64(1, 1, -1, -1)
    found = policy_loss(f64(1.5, 0.5, 1.5, 0.5).log(), f64(0, 0, 0, 0), advantages, epsilon=0.2)
    close(found, -1.2, -0.5, 1.5, 0.8)
    close(found.mean()[None], 0.15)
    close(value_loss(f64(1, 0), f64(0.5, 0.5), f64(0.9, 1), epsilon=0.2), 0.02, 0.5)


@pytest.mark.parametrize(
    ("reference", "best", "objective", "kl"),
    [
        (L1, (0.468310531, 0.468310531, 0.063378938), 0.259539455, 0.417542152),
        ((L1 + L2) / 2, (0.114195199, 0.843794734, 0.042010066), 0.653925608, 0.379738254),
    ],
)
def test_the_optimum_of_a_bandit(reference, best, objective, kl):
    reward, beta = f64(0, 1, 0), 0.5
    optimum = reference.log_softmax(0) + reward / beta
    close(optimum.softmax(0), *best)
    close(kl_divergence(optimum, reference)[None], kl)
    reached = (optimum.softmax(0) * reward).sum() - beta * kl_divergence(optimum, reference)
    close(torch.stack([beta * optimum.logsumexp(0), reached]), objective, objective)


def test_beta_is_controlled():
    assert controlled_beta(0.1, kl=4.0, target=4.0, horizon=100, responses=10) == 0.1
    assert controlled_beta(0.1, kl=40.0, target=4.0, horizon=100, responses=10) == pytest.approx(0.1 * 1.02)
    assert controlled_beta(0.1, kl=0.0, target=4.0, horizon=100, responses=10) == pytest.approx(0.1 * 0.98)
    assert controlled_beta(0.1, kl=4.4, target=4.0, horizon=100, responses=10) == pytest.approx(0.1 * 1.01)


def test_refusals():
    with pytest.raises(UnsupportedSetup, match=r"\[3\] and \[2\] of the reference"):
        kl_to_reference(torch.zeros(3), torch.zeros(2))
    with pytest.raises(UnsupportedSetup, match="expected one of k1, k2, k3"):
        kl_to_reference(torch.zeros(3), torch.zeros(3), "k4")
    with pytest.raises(UnsupportedSetup, match="the same vocabulary"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
