"""Patterns of participation: long-run rates, starts, going on, label mixes, and bad input."""

import json

import numpy as np
import pytest

from lightning_soup.distributed import Bernoulli, Cyclic, Markov, dirichlet_participation
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup

RATES = (0.02, 0.1, 0.3, 0.5, 0.8, 0.98, 1.0, 0.0)


def drawn(pattern, rounds):
    return np.array([pattern.draw() for _ in range(rounds)])


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_long_run_rates(make):
    rates = np.repeat(RATES, 40)
    found = drawn(make(rates, seed=1), 3000).mean(0).reshape(len(RATES), 40).mean(1)
    assert found == pytest.approx(RATES, abs=0.012)
    assert found[-2:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_the_first_round_is_like_any_other(make):
    rates = np.repeat((0.1, 0.5, 1.0), 2000)
    first = make(rates, seed=2).draw().reshape(3, 2000).mean(1)
    assert first == pytest.approx((0.1, 0.5, 1.0), abs=0.04)


def test_markov_clients_stay():
    on = drawn(Markov([0.5] * 200, seed=0), 500)
    came, went = (on[1:] & ~on[:-1]).sum() / (~on[:-1]).sum(), (~on[1:] & on[:-1]).sum() / on[:-1].sum()
    assert (came, went) == (pytest.approx(0.05, abs=0.005), pytest.approx(0.05, abs=0.005))
    rare = drawn(Markov([0.02] * 400, seed=0), 500)  # b would be 2.45: at most one round at a time
    assert not (rare[1:] & rare[:-1]).any()
    assert rare.mean() == pytest.approx(0.02, abs=0.002)


def test_cyclic_clients_come_once_in_a_period():
    on = drawn(Cyclic([0.3, 0.004, 1.0], seed=0), 200)
    assert on[:100].sum(0).tolist() == [30, 1, 100]
    assert np.array_equal(on[:100], on[100:])
    changes = (on[1:101, 0] != on[:100, 0]).sum()
    assert changes == 2


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_a_state_goes_on_exactly(make):
    whole, first, second = (make([0.1, 0.5, 0.9] * 5, seed=4) for _ in range(3))
    expected = drawn(whole, 60)
    assert np.array_equal(drawn(first, 25), expected[:25])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    np.random.default_rng().random()
    assert np.array_equal(drawn(second, 35), expected[25:])
    other = drawn(make([0.1, 0.5, 0.9] * 5, seed=5), 60)
    assert not np.array_equal(other, expected)


def test_rates_that_follow_the_labels():
    found = dirichlet_participation(2000, 10, seed=0)
    assert found.mixes.shape == (2000, 10)
    assert found.mixes.sum(1) == pytest.approx(np.ones(2000))
    assert found.preference.sum() == pytest.approx(1)
    expected = (0.1 * 10 * found.mixes @ found.preference).clip(0.02, 1)
    assert found.rates == pytest.approx(expected)
    assert found.rates.min() == 0.02
    flat = dirichlet_participation(50, 10, preference=1e6, seed=0)
    assert flat.rates == pytest.approx(np.full(50, 0.1), rel=0.01)


def test_labels_and_their_preference_have_their_own_concentrations():
    found = dirichlet_participation(50, 10, concentration=1e6, preference=0.01, seed=0)
    assert found.mixes == pytest.approx(np.full((50, 10), 0.1), abs=1e-3)
    assert found.preference.max() > 0.5


def test_every_option_is_among_the_settings_of_a_state():
    for one, other in (
        (Bernoulli([0.5]), Bernoulli([0.6])),
        (Bernoulli([0.5]), Bernoulli([0.5], seed=1)),
        (Bernoulli([0.5]), Markov([0.5])),
        (Markov([0.5]), Markov([0.5], arrival=0.1)),
        (Cyclic([0.5]), Cyclic([0.5], period=10)),
    ):
        assert one.settings() != other.settings()


def test_rates_never_exceed_one():
    rates = np.concatenate([dirichlet_participation(100, 100, preference=0.01, seed=seed).rates for seed in range(20)])
    assert rates.max() == 1.0
    Bernoulli(rates).draw()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bernoulli([]), "expected a rate from 0 to 1"),
        (lambda: Bernoulli([0.5, 1.2]), "expected a rate from 0 to 1"),
        (lambda: Markov([-0.1]), "expected a rate from 0 to 1"),
        (lambda: Cyclic([float("nan")]), "expected a rate from 0 to 1"),
        (lambda: Bernoulli([[0.5]]), "expected a rate from 0 to 1"),
        (lambda: Bernoulli([0.5], seed=-1), "seed=-1"),
        (lambda: Markov([0.5], arrival=0), "arrival=0"),
        (lambda: Cyclic([0.5], period=0), "period=0"),
        (lambda: dirichlet_participation(0, 10), "clients=0"),
        (lambda: dirichlet_participation(5, 1), "classes=1"),
        (lambda: dirichlet_participation(5, 10, concentration=0), "concentration=0"),
        (lambda: dirichlet_participation(5, 10, concentration=float("inf")), "concentration=inf"),
        (
            lambda: dirichlet_participation(5, 10, preference=1e308),
            r"preference=1e\+308: expected a number",
        ),
        (lambda: dirichlet_participation(5, 10, least=1.5), "least=1.5: expected a number above 0 and at most 1"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(UnsupportedSetup, match=message):
        make()


def test_states_of_others_are_refused():
    for pattern, state in (
        (Bernoulli([0.5]), {}),
        (Bernoulli([0.5]), {"round": -1}),
        (Markov([0.5, 0.5]), {"round": 1, "on": [True]}),
        (Markov([0.5]), {"round": 1, "on": ["yes"]}),
        (Markov([0.5]), None),
    ):
        with pytest.raises(UnreadableCheckpoint, match=f"no state of {type(pattern).__name__}"):
            pattern.load_state_dict(state)
