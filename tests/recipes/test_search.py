"""The operators of LCSC's search, by the method's golden cases, and what its strategies promise."""

import math

import numpy as np
import pytest
import torch

from lightning_soup.recipes.search import (
    CovarianceAdaptation,
    Evolution,
    Member,
    crossover,
    ema_coefficients,
    mix,
    project,
    sum_zero_basis,
)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------- golden cases


def test_coefficients_of_an_ema_of_saved_checkpoints():
    found = ema_coefficients(4, 0.5)
    assert found == [0.125, 0.125, 0.25, 0.5]
    assert sum(a * x for a, x in zip(found, (1, 2, 4, 8), strict=True)) == 5.375
    running = 1.0
    for x in (2, 4, 8):
        running = 0.5 * running + 0.5 * x
    assert running == 5.375


@pytest.mark.parametrize("d", [0.0, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 3, 24])
def test_an_ema_of_any_decay_sums_to_one_and_is_the_running_average(d, count):
    found = ema_coefficients(count, d)
    assert sum(found) == pytest.approx(1, abs=1e-14)
    values = [math.sin(i) for i in range(count)]
    running = values[0]
    for x in values[1:]:
        running = d * running + (1 - d) * x
    assert sum(a * x for a, x in zip(found, values, strict=True)) == pytest.approx(running, abs=1e-14)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [((0.9, 0.6, -0.2), (0.8, 0.5, -0.3)), ((2.0, -1.5, -0.4), (2.3, -1.2, -0.1)), ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0))],
)
def test_projection_is_orthogonal_and_no_division(alpha, expected):
    close(project(row(*alpha)), [expected])


def test_each_row_is_projected_by_itself():
    found = project(torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    close(found, [[0.5, 0.5], [0.5, 0.5]])


def test_operators():
    a, b = row(0.5, 0.3, 0.2), row(0.1, 0.2, 0.7)
    crossed = crossover(a, b, torch.tensor([[True, False, True]]))
    close(crossed, [[0.5, 0.2, 0.2]])
    close(project(crossed), [[8 / 15, 7 / 30, 7 / 30]])
    mixed = mix(a, b, 0.25)
    close(mixed, [[0.2, 0.225, 0.575]])
    close(project(mixed + row(0.1, 0, -0.04)), [[0.28, 0.205, 0.515]])


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_basis_is_orthonormal_and_keeps_the_sum(count):
    basis = sum_zero_basis(count)
    close(basis @ basis.T, torch.eye(count - 1, dtype=torch.float64))
    close(basis.sum(1), torch.zeros(count - 1))


# ---------------------------------------------------------------------------------------------------- strategies


def evolution(**options):
    given = {
        "population": 4,
        "generation": 5,
        "sigma": 0.1,
        "mutation": 0.25,
        "crossover": 0.5,
        "local": 0.0,
        "seed": 0,
    }
    return Evolution(**{**given, **options})


def members(count, size=3, rows=1):
    draw = torch.Generator().manual_seed(3)
    alphas = [project(torch.randn(rows, size, generator=draw, dtype=torch.float64)) for _ in range(count)]
    return [Member(alpha, float(i)) for i, alpha in enumerate(alphas)]


def test_a_child_without_noise_is_its_parents_cross_or_mix():
    search = evolution(mutation=0.0, generation=40)
    search.learn(members(4))
    better = [member.alpha_RK for member in search.members[2:]]  # the better half: those of worth 3 and 2
    crossed = {tuple(c.flatten().tolist()) for c in search.propose(0)}
    assert len(crossed) > 10
    low, high = (torch.stack(better).amin(0), torch.stack(better).amax(0))
    mixes = [c for c in search.propose(0) if ((c >= low - 1e-12) & (c <= high + 1e-12)).all()]
    assert mixes
    only_mixed = evolution(mutation=0.0, crossover=0.0, generation=20)
    only_mixed.learn(members(4))
    for child in only_mixed.propose(0):
        share = (child - better[0]) / (better[1] - better[0])
        close(share, torch.full_like(share, share[0, 0].item()), 1e-9)
        assert 0 <= share[0, 0] <= 1
    only_crossed = evolution(mutation=0.0, crossover=1.0, generation=20)
    only_crossed.learn(members(4))
    for child in only_crossed.propose(0):
        options = torch.stack([project(torch.where(mask, *better)) for mask in _masks(3)])
        assert (options - child).abs().amax(dim=(1, 2)).min() < 1e-12


def _masks(size):
    return [torch.tensor([[bool(i >> bit & 1) for bit in range(size)]]) for i in range(2**size)]


def test_noise_of_the_asked_size_in_the_asked_share():
    search = evolution(mutation=0.25, sigma=0.1, generation=2000)
    search.learn([Member(torch.full((1, 50), 0.02, dtype=torch.float64), 0.0)] * 2)
    found = torch.cat(search.propose(0)) - 0.02
    shift = found.median(dim=1, keepdim=True).values  # what projecting added to those without noise
    noise = found - shift
    hit = noise.abs() > 1e-9
    assert hit.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert noise[hit].std().item() == pytest.approx(0.1, abs=0.005)


def test_a_local_child_changes_two_coefficients_of_the_best():
    search = evolution(local=1.0, generation=20)
    search.learn(members(4, size=6, rows=2))
    best = search.members[3].alpha_RK
    for child in search.propose(1):
        changed = (child != best).nonzero()
        assert len(changed) == 2
        assert changed[0, 0] == changed[1, 0]  # in one row
        assert (child - best).sum().item() == pytest.approx(0, abs=1e-15)


def test_the_population_keeps_the_best():
    search = evolution(population=3)
    search.learn([Member(row(1.0, 0.0), worth) for worth in (1.0, 5.0, -math.inf)])
    search.learn([Member(row(0.5, 0.5), worth) for worth in (0.0, 7.0, 0.5)])
    assert sorted(member.worth for member in search.members) == [1.0, 5.0, 7.0]


def test_proposals_depend_on_seed_and_number_only():
    def proposed(seed, number):
        search = evolution(seed=seed)
        search.learn(members(4))
        torch.rand(7)
        return torch.stack(search.propose(number))

    assert torch.equal(proposed(1, 2), proposed(1, 2))
    assert not torch.equal(proposed(1, 2), proposed(1, 3))
    assert not torch.equal(proposed(1, 2), proposed(2, 2))


@pytest.mark.parametrize("rows", [1, 3])
def test_cma_keeps_the_sum_and_numpys_numbers(rows):
    search = CovarianceAdaptation(generation=6, sigma=0.1, seed=5)
    search.learn(members(4, size=5, rows=rows))
    np.random.seed(11)
    before = np.random.get_state()[1].copy()
    for number in range(5):
        generation = search.propose(number)
        assert len(generation) == 6
        for alpha in generation:
            assert alpha.shape == (rows, 5)
            close(alpha.sum(1), torch.ones(rows))
        search.learn([Member(alpha, -float(alpha.square().sum())) for alpha in generation])
    assert (np.random.get_state()[1] == before).all()


def test_cma_takes_candidates_without_a_score():
    search = CovarianceAdaptation(generation=4, sigma=0.1, seed=0)
    search.learn(members(3))
    for number in range(4):
        generation = search.propose(number)
        worths = [-math.inf, *(-float(alpha.square().sum()) for alpha in generation[1:])]
        search.learn([Member(*pair) for pair in zip(generation, worths if number else [-math.inf] * 4, strict=True)])
    assert all(torch.isfinite(alpha).all() for alpha in search.propose(4))
