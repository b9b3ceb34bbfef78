"""FedAU: its golden cases, clients that join and leave, its state, and bad input."""

import json
import math
import random
import statistics

import numpy as np
import pytest
import torch

from lightning_soup.distributed import FedAU, ParticipationWeights
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup


def history_of(came, cutoff):
    """The weight before each round, and after the last."""
    estimate = ParticipationWeights(["n"], cutoff)
    found = [estimate.weight("n")]
    for one in came:
        estimate.observe(["n"] if one else [])
        found.append(estimate.weight("n"))
    return found


SOMETIMES = (0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("came", "cutoff", "expected"),
    [
        (SOMETIMES, None, (1, 1, 2, 2, 2, 2.5, 2, 2, 2, 2, 2, 2, 3)),
        (SOMETIMES, 3, (1, 1, 2, 2, 2, 2.5, 2, 2, 2, 2.25, 2.25, 2.25, 2.4)),
        (SOMETIMES, 1, (1,) * 13),
        ((0,) * 10, 3, (1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3)),
        ((0,) * 10, None, (1,) * 11),
        ((1,) * 5, None, (1,) * 6),
        ((1,) * 5, 3, (1,) * 6),
        ((1, 0, 0, 0, 0, 0, 0), 3, (1, 1, 1, 1, 2, 2, 2, 7 / 3)),
    ],
)
def test_golden_histories(came, cutoff, expected):
    assert history_of(came, cutoff) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cutoff", [1, 2, 3, 5, 50, None])
def test_the_recursion_is_the_mean_of_a_list_of_gaps(cutoff):
    draw = random.Random(0)
    for _ in range(100):
        p = draw.random()
        came = [draw.random() < p for _ in range(60)]
        gaps, gap, expected = [], 0, [1.0]
        for one in came:
            gap += 1
            if one or gap == cutoff:
                gaps.append(gap)
                gap = 0
            expected.append(statistics.fmean(gaps) if gaps else 1.0)
        assert history_of(came, cutoff) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "cutoff", "expected"),
    [(0.1, 50, 9.948462247926798), (0.02, 50, 31.791515995644158), (0.5, 2, 1.5), (0.1, 10, 6.513215599)],
)
def test_weights_approach_the_mean_gap_of_a_bernoulli_client(p, cutoff, expected):
    assert (1 - (1 - p) ** cutoff) / p == pytest.approx(expected, rel=1e-9)
    estimate = ParticipationWeights(range(40), cutoff)
    draw = np.random.default_rng(0)
    for _ in range(3000):
        estimate.observe(np.flatnonzero(draw.random(40) < p))
    found = estimate.summary()
    assert found.mean == pytest.approx(expected, rel=0.03)
    assert found.max <= cutoff
    assert (found.population, found.rounds, found.few_gaps) == (40, 3000, 0)


def test_without_a_cutoff_the_weight_is_one_over_p():
    estimate = ParticipationWeights(range(20))
    draw = np.random.default_rng(1)
    for _ in range(5000):
        estimate.observe(np.flatnonzero(draw.random(20) < 0.2))
    assert estimate.summary().mean == pytest.approx(5, rel=0.02)


# ----------------------------------------------------------------------------------------------- who there is


def test_names_are_learned_as_clients_come():
    named, counted = ParticipationWeights(["a", "b", "c"], 4), ParticipationWeights(3, 4)
    for came in ([], ["b"], [], [], [], [], [], [], ["a"], ["b"]):
        for estimate in (named, counted):
            estimate.observe(came)
        assert named.summary() == counted.summary()
        assert all(named.weight(name) == counted.weight(name) for name in "abc")
    assert counted.weights() == {name: named.weights()[name] for name in ("b", "a")}
    assert counted.closed_gaps() == {"b": 3, "a": 3}
    assert counted.clients == ("b", "a")
    counted.observe(["a", "b", "later"])
    with pytest.raises(UnsupportedSetup, match=r"'a fourth' does not belong to the population of 3"):
        counted.observe(["a fourth"])


def test_one_that_joins_was_not_absent_before():
    estimate = ParticipationWeights(["old"])
    for _ in range(20):
        estimate.observe([])
    estimate.join("new")
    for _ in range(3):
        estimate.observe([])
    estimate.observe(["old", "new"])
    assert estimate.weights() == {"old": 24.0, "new": 4.0}
    with pytest.raises(UnsupportedSetup, match="'new' belongs to the population already"):
        estimate.join("new")


def test_one_that_leaves_no_longer_counts():
    rule = FedAU(["a", "b"])
    assert rule.coefficients(["a"]).updates == {"a": 0.5}
    rule.participation.leave("b")
    assert rule.population == 1
    assert rule.coefficients(["a"]).updates == {"a": 1.0}
    with pytest.raises(UnsupportedSetup, match="'b' does not belong"):
        rule.participation.weight("b")
    rule.participation.leave("a")
    assert rule.population == 0
    assert rule.coefficients([]).updates == {}
    assert rule.metrics() == {"weight_mean": 1.0, "weight_min": 1.0, "weight_max": 1.0, "few_gaps": 0.0}
    counted = ParticipationWeights(3)
    counted.observe(["a"])
    counted.leave("one that never came")
    assert counted.population == 2


def test_rough_weights_are_told():
    rule = FedAU(["often", "rare"])
    for number in range(12):
        rule.observe(["often", "rare"] if number == 6 else ["often"])
    assert rule.metrics() == {"weight_mean": 4.0, "weight_min": 1.0, "weight_max": 7.0, "few_gaps": 1.0}
    [note] = rule.notes()
    assert "1 of 2 clients have fewer than 10 closed gaps after 12 rounds" in note
    for _ in range(10):
        rule.observe(["rare"])
    assert rule.notes() == ()


# ------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("cutoff", [None, 3])
def test_a_state_of_plain_values_goes_on_exactly(cutoff):
    draw = random.Random(3)
    names = [7, "b", 2**63 + 1]
    first, whole = ParticipationWeights(5, cutoff), ParticipationWeights(5, cutoff)
    rounds = [[name for name in names if draw.random() < 0.3] for _ in range(40)]
    for came in rounds[:20]:
        first.observe(came)
    second = ParticipationWeights(1, cutoff)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for came in rounds:
        whole.observe(came)
    for came in rounds[20:]:
        second.observe(came)
    assert second.state_dict() == whole.state_dict()
    assert second.population == 5


def test_states_of_others_are_refused():
    estimate = ParticipationWeights(2, cutoff=5)
    state = estimate.state_dict()
    with pytest.raises(UnsupportedSetup, match=r"cutoff=3, but the state was made with cutoff=5"):
        ParticipationWeights(2, cutoff=3).load_state_dict(state)
    broken = [
        {},
        {**state, "clients": [["a", 1, 1]]},
        {**state, "clients": [["a", 1, 1, 2.0], ["a", 1, 1, 2.0]]},
        {**state, "unseen": [0, 0, math.nan]},
        {**state, "unseen": [-1, 0, 1.0]},
        {**state, "unseen": [0, 0, 0.5]},
        {**state, "rounds": "many"},
    ]
    for one in broken:
        with pytest.raises(UnreadableCheckpoint, match="no state of ParticipationWeights"):
            estimate.load_state_dict(one)
    assert estimate.state_dict() == state


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("population", "options", "message"),
    [
        (0, {}, "population=0: expected an integer, 1 or more"),
        (2.5, {}, "population=2.5: expected an integer"),
        (True, {}, "population=True"),
        (["a", "a"], {}, "client 'a' is there more than once"),
        ("abc", {}, "expected a collection of clients"),
        ([1.5], {}, "client 1.5: expected a name"),
        ([None], {}, "client None: expected a name"),
        (3, {"cutoff": 0}, "cutoff=0: expected an integer, 1 or more"),
        (3, {"cutoff": 2.0}, "cutoff=2.0"),
        (3, {"lr": 0}, "lr=0: expected a positive number"),
        (3, {"lr": math.inf}, "lr=inf"),
        (3, {"lr": math.nan}, "lr=nan"),
        (3, {"lr": "1"}, "lr='1'"),
    ],
)
def test_wrong_options_are_refused(population, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        FedAU(population, **options)


def test_a_round_that_is_refused_is_not_noted():
    estimate = ParticipationWeights(["a", "b"])
    before = estimate.state_dict()
    for wrong in (["a", "c"], ["a", "a"], [True]):
        with pytest.raises(UnsupportedSetup):
            estimate.observe(wrong)
        assert estimate.state_dict() == before


def test_numpy_integers_and_torch_integers_are_the_same_clients():
    estimate = ParticipationWeights(3)
    estimate.observe([np.int64(4)])
    estimate.observe(torch.tensor([4]))
    assert estimate.clients == (4,)
    assert type(estimate.clients[0]) is int
