"""Federated averages: one round and several by hand, buffers, memory, and replies that are refused."""

import pytest
import torch

from lightning_soup.distributed import MIFA, AverageAll, AverageParticipating, FedAU, FedVARP, KnownParticipation
from lightning_soup.distributed.federated_sum import federated_sum, float_buffers
from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights, UnsupportedSetup


def vector(*values, dtype=torch.float64):
    return {"w": torch.tensor(values, dtype=dtype)}


def moved(weights, **updates):
    return {client: {"w": weights["w"] + torch.tensor(delta).to(weights["w"])} for client, delta in updates.items()}


def close(found, *expected, tolerance=1e-8):
    torch.testing.assert_close(found["w"].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ golden cases

X = vector(1.0, 2.0)
DELTAS = {"a": (0.4, -0.2), "b": (-1.0, 0.5)}


def test_one_round_of_fedau():
    rule = FedAU(["a", "b", "c", "d"], lr=0.5)
    for came in ([], [], ["a"], ["b"]):
        rule.observe(came)
    rule.participation.load_state_dict(
        {
            **rule.state_dict(),
            "clients": [["a", 0, 1, 3.0], ["b", 0, 1, 2.0], ["c", 0, 0, 1.0], ["d", 0, 0, 1.0]],
        }
    )
    step = rule.step(X, moved(X, **DELTAS))
    close(step.weights, 0.9, 2.05)
    assert step.total == pytest.approx(0.5 / 4 * 5)
    assert step.participants == ("a", "b")
    close(federated_sum(X, moved(X, **DELTAS), {"a": 0.375, "b": 0.25}), 0.9, 2.05)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (AverageParticipating(4), (0.7, 2.15)),
        (AverageAll(4), (0.85, 2.075)),
        (KnownParticipation({"a": 0.5, "b": 0.25, "c": 1, "d": 1}), (0.2, 2.4)),
        (FedAU(4), (0.85, 2.075)),
        (FedAU(4, cutoff=1), (0.85, 2.075)),
    ],
)
def test_one_round_of_others(rule, expected):
    close(rule.step(X, moved(X, **DELTAS)).weights, *expected)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MIFA(3), (4 / 3, 7 / 3, 10 / 3, 19 / 3)),
        (FedVARP(3, move_without_replies=False), (2, 7 / 3, 7 / 3, 28 / 3)),
        (FedVARP(3), (2, 7 / 3, 10 / 3, 31 / 3)),
    ],
)
def test_rules_that_remember(rule, expected):
    x = vector(0.0)
    for updates, value in zip(({0: 1.0, 1: 3.0}, {1: 2.0}, {}, {2: 6.0}), expected, strict=True):
        x = rule.step(x, {client: {"w": x["w"] + delta} for client, delta in updates.items()}).weights
        close(x, value)
    assert {client: memory["w"].item() for client, memory in rule.memory.items()} == {
        0: pytest.approx(1),
        1: pytest.approx(2),
        2: pytest.approx(6),
    }


def test_weights_are_used_before_the_round_is_learned():
    rule, x, centres = FedAU(3), vector(0.0), (1.0, 0.0, -2.0)
    expected = (-0.03333333, 0.00111111, 0.03437037, -0.00125432, -0.00125432, -0.13437860)
    for came, value in zip(([0, 2], [0], [0, 1], [0, 2], [], [1, 2]), expected, strict=True):
        x = rule.step(x, {n: {"w": x["w"] - 0.1 * (x["w"] - centres[n])} for n in came}).weights
        close(x, value)
    assert [rule.participation.weight(n) for n in range(3)] == [1.0, 3.0, 2.0]


# ------------------------------------------------------------------------------------------- types, buffers, the sum


@pytest.mark.parametrize("rule", [FedAU(2), AverageParticipating(2), AverageAll(2), KnownParticipation({0: 1, 1: 0.5})])
def test_a_round_without_anybody_moves_nothing(rule):
    x = {"w": torch.rand(3), "bn.running_mean": torch.rand(2), "n": torch.tensor(4)}
    step = rule.step(x, {})
    assert all(torch.equal(step.weights[name], value) for name, value in x.items())
    assert step.participants == ()
    assert step.total == 0


def test_an_absent_round_is_observed():
    rule = FedAU(["a"])
    x = rule.step(X, {}).weights
    x = rule.step(x, {}).weights
    x = rule.step(x, moved(x, a=(1.0, 0.0))).weights
    close(x, 2.0, 2.0)
    assert rule.participation.weight("a") == 3.0


def test_statistics_are_averaged_and_counters_take_the_largest():
    x = {
        "fc.weight": torch.ones(2),
        "bn.running_var": torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(3),
        "small": torch.tensor([1, 2], dtype=torch.int16),
        "flag": torch.tensor([False, False]),
    }
    reply = {
        **x,
        "fc.weight": torch.full((2,), 1.5),
        "bn.running_var": torch.full((2,), 0.2),
        "bn.num_batches_tracked": torch.tensor(8),
        "small": torch.tensor([5, 0], dtype=torch.int16),
        "flag": torch.tensor([True, False]),
    }
    other = {**x, "bn.running_var": torch.full((2,), 0.6), "bn.num_batches_tracked": torch.tensor(6)}
    found = federated_sum(x, {0: reply, 1: other}, {0: 2.0, 1: 2.0})
    assert found["fc.weight"].tolist() == [2.0, 2.0]
    # 1 + 2·(0.2 − 1) + 2·(0.6 − 1) would be −1.4, a negative variance
    assert found["bn.running_var"].tolist() == pytest.approx([0.4, 0.4])
    assert found["bn.num_batches_tracked"].item() == 8
    assert found["small"].tolist() == [5, 2]
    assert found["flag"].tolist() == [True, False]
    assert all(found[name].dtype == value.dtype for name, value in x.items())
    assert list(found) == list(x)


def test_the_mean_of_statistics_is_rounded_once():
    torch.manual_seed(0)
    replies = {n: {"bn.running_mean": torch.randn(1000), "bn.running_var": torch.rand(1000)} for n in range(7)}
    found = federated_sum(replies[0], replies, dict.fromkeys(replies, 9.0))
    for name in replies[0]:
        exact = torch.stack([reply[name].double() for reply in replies.values()]).mean(0)
        torch.testing.assert_close(found[name].double(), exact, rtol=0.5001 * torch.finfo(torch.float32).eps, atol=0)


def test_buffers_of_any_name():
    x, reply = {"w": torch.zeros(1), "centre": torch.zeros(1)}, {"w": torch.ones(1), "centre": torch.ones(1)}
    assert federated_sum(x, {0: reply}, {0: 3.0})["centre"].item() == 3
    found = federated_sum(x, {0: reply}, {0: 3.0}, buffers=["centre"])
    assert (found["w"].item(), found["centre"].item()) == (3, 1)
    with pytest.raises(UnsupportedSetup, match="no tensor 'center'"):
        federated_sum(x, {0: reply}, {0: 3.0}, buffers=["center"])


def test_the_buffers_of_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert float_buffers(module) == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_lose_nothing(dtype):
    torch.manual_seed(0)
    x = {"w": torch.randn(1000).to(dtype), "frozen": torch.randn(100).to(dtype)}
    replies = {n: {"w": x["w"] + (0.01 * torch.randn(1000)).to(dtype), "frozen": x["frozen"]} for n in range(3)}
    a = {0: 40.0, 1: 7.0, 2: 0.3}
    exact = x["w"].double() + sum(a[n] * (replies[n]["w"].double() - x["w"].double()) for n in a)
    found = federated_sum(x, replies, a)
    # Within one unit in the last place: the only roundings are ties.
    torch.testing.assert_close(found["w"].double(), exact, rtol=torch.finfo(dtype).eps * 0.5001, atol=0)
    assert torch.equal(found["frozen"], x["frozen"])
    assert found["w"].dtype == dtype


@pytest.mark.parametrize("make", [FedAU, MIFA, FedVARP])
def test_the_order_of_replies_makes_no_difference(make):
    torch.manual_seed(0)
    x = {"w": torch.randn(500)}
    replies = {name: {"w": torch.randn(500)} for name in (3, "b", 1, "a", 2)}
    first, second = make(5), make(5)
    for _ in range(3):
        one = first.step(x, replies)
        two = second.step(x, dict(reversed(replies.items())))
        assert torch.equal(one.weights["w"], two.weights["w"])
        assert one.participants == two.participants == (1, 2, 3, "a", "b")
    assert first.state_dict() == second.state_dict()


def test_what_is_remembered_of_half_precision_is_kept_in_single():
    x = vector(1.0, dtype=torch.float16)
    rule = MIFA(2)
    rule.step(x, {0: vector(1.5, dtype=torch.float16)})
    assert rule.memory[0]["w"].dtype == torch.float32


def test_replies_may_be_files(tmp_path):
    torch.save(vector(2.0, 4.0), tmp_path / "reply.pt")
    close(FedAU(2).step(X, {"a": tmp_path / "reply.pt"}).weights, 1.5, 3.0)


def test_names_of_wrapped_modules_come_back():
    x = {"module.w": torch.zeros(2), "module.norm.running_var": torch.ones(2)}
    found = federated_sum(x, {0: {name: value + 1 for name, value in x.items()}}, {0: 2.0})
    assert {name: value.tolist() for name, value in found.items()} == {
        "module.w": [2.0, 2.0],
        "module.norm.running_var": [2.0, 2.0],
    }


# ------------------------------------------------------------------------------------------------------ bad replies

GOOD = {"w": torch.tensor([2.0, 4.0], dtype=torch.float64)}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (vector(float("nan"), 1.0), r"client 'bad': tensor 'w' \(.*\) holds NaN"),
        (vector(1.0, float("inf")), r"client 'bad': tensor 'w' \(.*\) holds an infinity"),
        (vector(1.0), r"client 'bad': .*tensor 'w' is .*\[1\], expected .*\[2\]"),
        ({"v": torch.ones(1)}, "client 'bad': .*tensor 'w' is missing; tensor 'v' is unknown"),
        ({}, "client 'bad': .*got an empty one"),
        ({**GOOD, "v": torch.ones(1)}, "client 'bad': .*tensor 'v' is unknown"),
        ({"w": torch.tensor([1, 2])}, "client 'bad': .*tensor 'w' is .*, expected"),
    ],
)
@pytest.mark.parametrize("make", [lambda: FedAU(["good", "bad"]), lambda: MIFA(2)], ids=["FedAU", "MIFA"])
def test_a_bad_reply_counts_as_absence(make, reply, message):
    rule = make()
    with pytest.warns(UserWarning, match=f"{message}.*It counts as absent in this round"):
        step = rule.step(X, {"good": GOOD, "bad": reply})
    close(step.weights, 1.5, 3.0)
    assert step.participants == ("good",)
    assert list(step.refused) == ["bad"]
    assert "bad" not in rule.memory
    if isinstance(rule, FedAU):
        step = rule.step(X, {"good": GOOD, "bad": GOOD})
        assert rule.participation.weights() == {"good": 1.0, "bad": 2.0}


def test_infinities_that_the_model_has_are_no_fault():
    x = {"mask": torch.tensor([0.0, float("-inf")]), "w": torch.zeros(1)}
    step = FedAU(1).step(x, {0: {**x, "w": torch.ones(1)}})
    assert step.refused == {}
    assert step.weights["mask"].tolist() == [0.0, float("-inf")]
    assert step.weights["w"].item() == 1


def test_a_stranger_changes_nothing():
    for rule in (FedAU(["a"]), KnownParticipation({"a": 1.0}), MIFA(1), FedVARP(1)):
        rule.step(X, {"a": GOOD})
        before = rule.state_dict(), dict(rule.memory)
        for replies in ({"a": GOOD, "b": GOOD}, {"b": GOOD}):
            with pytest.raises(UnsupportedSetup, match=r"'b'|2 clients have come"):
                rule.step(X, replies)
        assert (rule.state_dict(), dict(rule.memory)) == before


def test_broken_global_weights_and_overflow_are_errors():
    rule = FedAU(["a", "b"])
    before = rule.state_dict()
    with pytest.raises(NonFiniteWeights, match=r"'w'.* holds NaN"):
        rule.step(vector(float("nan"), 1.0), {"a": GOOD})
    large = vector(3e38, dtype=torch.float32)
    with pytest.raises(NonFiniteWeights, match="overflows"):
        FedAU(["a"], lr=50).step(large, {"a": vector(-3e38, dtype=torch.float32)})
    assert rule.state_dict() == before


def test_wrong_options():
    for make, message in (
        (lambda: AverageAll(0), "population=0"),
        (lambda: KnownParticipation({}), "got no clients"),
        (lambda: KnownParticipation({"a": 0.0}), "got 0.0 for client 'a'"),
        (lambda: KnownParticipation({"a": 1.5}), "got 1.5 for client 'a'"),
        (lambda: FedAU(2).load_memory({"a": X}), "FedAU remembers no updates"),
        (lambda: federated_sum(X, {"a": GOOD}, {}), "'a' replied, but has no coefficient"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            make()


def test_every_option_is_among_the_settings_of_a_state():
    for one, other in (
        (FedAU(2), FedAU(3)),
        (FedAU(2), FedAU(2, cutoff=5)),
        (FedAU(2), FedAU(2, lr=0.5)),
        (AverageAll(2), AverageAll(3)),
        (AverageAll(2), AverageParticipating(2)),
        (KnownParticipation({"a": 0.5}), KnownParticipation({"a": 0.6})),
        (FedVARP(2), FedVARP(2, move_without_replies=False)),
    ):
        assert one.settings() != other.settings()


def test_the_total_is_that_of_updates():
    rule = MIFA(2)
    assert rule.step(X, {"a": GOOD}).total == 0.5
    assert rule.step(X, {"b": GOOD}).total == 0.5


def test_a_remembered_tensor_that_does_not_fit_is_refused():
    rule = MIFA(2)
    rule.load_memory({"a": {"v": torch.zeros(2)}})
    with pytest.raises(IncompatibleIngredients):
        rule.step(X, {"b": GOOD})
