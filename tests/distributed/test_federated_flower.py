"""The Flower strategy and client over a grid in this process: references, and all ways in which clients fail.

Needs the extra ``federated`` (Flower), which goes into an environment of its own; without it all but the last tests are
skipped.
"""

import importlib.util
import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_soup.distributed import MIFA, AverageAll, AverageParticipating, FedAU
from lightning_soup.errors import MissingExtra, UnsupportedSetup

HAS_FLOWER = importlib.util.find_spec("flwr") is not None
needs_flower = pytest.mark.skipif(not HAS_FLOWER, reason="flwr: comes with lightning_soup[federated]")

if HAS_FLOWER:
    from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    from lightning_soup.distributed import FlowerStrategy, flower_client
    from lightning_soup.distributed.federated_flower import from_arrays, to_arrays

CENTRES = (1.0, 0.0, -2.0, 4.0)


class Centre(LightningModule):
    """F_n = ½(x − c_n)²."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.norm = nn.BatchNorm1d(2, affine=False)

    def training_step(self, batch, batch_idx):
        self.norm(batch.float())
        loss = (0.5 * (self.x - batch) ** 2).sum(1).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (0.5 * (self.x - batch) ** 2).sum(1).mean())

    def configure_optimizers(self):
        return torch.optim.SGD([self.x], 0.1)


class Points(LightningDataModule):
    def __init__(self, centre):
        super().__init__()
        self.centre = centre

    def train_dataloader(self):
        return DataLoader(torch.tensor([[self.centre] * 2] * 4, dtype=torch.float64), 2)

    val_dataloader = train_dataloader


class Grid:
    """Flower's grid in this process: who is online in a round, and what an app or a function makes of its message."""

    def __init__(self, online, answer):
        self.online, self.answer, self.sent = online, answer, []
        self.calls = 0

    def get_node_ids(self):
        return list(self.online[min(self.calls // 2, len(self.online) - 1)])  # a round trains, then evaluates

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.sent += messages
        found = []
        for message in messages:
            reply = self.answer(message, message.metadata.dst_node_id)
            if reply is not None:
                found.append(reply)
        self.calls += 1
        return found


@pytest.fixture(autouse=True)
def _task():
    if not HAS_FLOWER:
        yield
        return
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    level = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(level)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


def lightning_clients(steps=1, **options):
    app = flower_client(
        lambda _: Centre(), lambda c: Points(CENTRES[c.node_config["part"]]), local_steps=steps, **options
    )

    def answer(message, node):
        return app(message, Context(1, node, {"part": node % 10}, RecordDict(), {}))

    return answer


def reply(message, arrays, **metrics):
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, **metrics})})
    return Message(content, reply_to=message)


def shifted(message, delta):
    """A client whose update is a number."""
    weights = from_arrays(message.content["arrays"])
    return to_arrays({name: v + delta if v.is_floating_point() else v for name, v in weights.items()})


def start(strategy, grid, rounds, module=None):
    module = Centre() if module is None else module
    return strategy.start(grid, to_arrays(module.state_dict()), rounds)


ROUNDS = [[10, 12], [10], [10, 11], [10, 12], [], [11, 12]]


def wait_for_nobody(**options):
    return {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0, **options}


@needs_flower
def test_the_golden_rounds_over_flower():
    rule = FedAU(3)
    strategy = FlowerStrategy(rule, **wait_for_nobody())
    grid = Grid(ROUNDS, lightning_clients())
    result = start(strategy, grid, 6)
    found = from_arrays(result.arrays)
    assert found["x"].tolist() == pytest.approx([-0.13437860] * 2, abs=1e-8)
    assert [rule.participation.weight(n) for n in (10, 11, 12)] == [1.0, 3.0, 2.0]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5 * 2 * (1 + 4) / 2)
    assert result.train_metrics_clientapp[6]["weight_max"] == 3.0
    assert result.train_metrics_clientapp[5]["participants"] == 0
    assert result.evaluate_metrics_clientapp[1]["val_loss"] > 0
    assert 5 not in result.evaluate_metrics_clientapp
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    assert strategy.round == 6


@needs_flower
def test_many_rounds_are_those_of_a_numpy_reference():
    draw = np.random.default_rng(0)
    online = [[n for n in range(10, 14) if draw.random() < 0.2 + 0.2 * (n - 10)] for _ in range(30)]
    found = from_arrays(
        start(FlowerStrategy(FedAU(4), **wait_for_nobody()), Grid(online, lightning_clients(3)), 30).arrays
    )
    x, S, M, w = 0.0, np.zeros(4), np.zeros(4), np.ones(4)
    for nodes in online:
        came = np.isin(np.arange(10, 14), nodes)
        x += sum(w[n] * (1 - 0.9**3) * (CENTRES[n] - x) for n in np.flatnonzero(came)) / 4
        S += 1
        w = np.where(came, (M * w + S) / (M + 1), w)
        M, S = M + came, np.where(came, 0, S)
    assert found["x"].tolist() == pytest.approx([x, x], abs=1e-12)


@needs_flower
def test_clients_are_those_that_flowers_own_strategies_take():
    strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    result = start(strategy, Grid([[10, 12]], lightning_clients()), 1)
    assert from_arrays(result.arrays)["x"].tolist() == pytest.approx([-0.05] * 2)
    assert result.evaluate_metrics_clientapp[1]["val_loss"] == pytest.approx((1.05**2 + 1.95**2) / 2)


@needs_flower
def test_seeds_and_steps_come_from_the_server():
    from flwr.app import ConfigRecord

    strategy = FlowerStrategy(AverageAll(1), fraction_evaluate=0.0)
    answer = lightning_clients(seed=3)
    config = ConfigRecord({"local-steps": 2})
    arrays = to_arrays(Centre().state_dict())
    result = strategy.start(Grid([[10]], answer), arrays, 1, train_config=config)
    assert from_arrays(result.arrays)["x"].tolist() == pytest.approx([1 - 0.9**2] * 2)

    class Drawn(Centre):
        def training_step(self, batch, batch_idx):
            self.log("drawn", torch.rand(()))
            return super().training_step(batch, batch_idx)

    def drawn(node, number, **options):
        app = flower_client(lambda _: Drawn(), lambda _: Points(1.0), local_steps=1, **options)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number})})
        context = Context(1, node, {}, RecordDict(), {})
        return app(Message(content, node, "train"), context).content["metrics"]["drawn"]

    assert drawn(10, 1, seed=3) == drawn(10, 1, seed=3)
    assert len({drawn(10, 1, seed=3), drawn(10, 2, seed=3), drawn(11, 1, seed=3), drawn(10, 1, seed=4)}) == 4
    with pytest.raises(MisconfigurationException):  # the options are the Trainer's
        drawn(10, 1, trainer={"limit_train_batches": 0.001})


@needs_flower
def test_buffers_of_any_name_and_rounds_of_evaluation(tmp_path):
    def run(buffers, rounds):
        strategy = FlowerStrategy(AverageAll(2), buffers=buffers, folder=tmp_path)
        grid = Grid([[10]], lambda m, n: reply(m, shifted(m, 1.0)))
        return from_arrays(start(strategy, grid, rounds).arrays)["x"].tolist(), grid

    assert run(["x"], 1)[0] == [1, 1]
    with pytest.raises(UnsupportedSetup, match="buffers was"):
        run(None, 2)
    found, grid = run(["x"], 2)
    assert found == [2, 2]
    assert [(m.metadata.message_type, m.content["config"]["server-round"]) for m in grid.sent] == [
        ("train", 2),
        ("evaluate", 2),
    ]


# ------------------------------------------------------------------------------------------------------ who fails


@needs_flower
@pytest.mark.parametrize("kind", ["error", "nothing", "NaN", "shape", "missing", "no arrays", "two records", "object"])
@pytest.mark.parametrize("make", [FedAU, MIFA, AverageParticipating])
def test_a_client_that_fails_counts_as_absent(kind, make):
    def answer(message, node):
        if message.metadata.message_type == "evaluate":
            return reply(message, ArrayRecord())
        good = shifted(message, 1.0)
        if node == 10:
            return reply(message, good, loss=1.0)
        if kind == "error":
            return Message(Error(0, "Traceback:\n  ...\nMemoryError: too large\n"), reply_to=message)
        if kind == "nothing":
            return None
        weights = from_arrays(good)
        if kind == "NaN":
            weights["x"][1] = float("nan")
        elif kind == "shape":
            weights["x"] = weights["x"][:1]
        elif kind == "missing":
            del weights["x"]
        if kind == "no arrays":
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
        if kind == "two records":
            return Message(RecordDict({"a": good, "b": good}), reply_to=message)
        arrays = to_arrays(weights)
        if kind == "object":
            arrays["x"].data = b"no array"
        return reply(message, arrays, loss=99.0)

    rule = make(2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = start(FlowerStrategy(rule), Grid([[10, 11]], answer), 3)
    share = 1 if make is AverageParticipating else 0.5
    assert from_arrays(result.arrays)["x"].tolist() == pytest.approx([3 * share] * 2)
    assert result.train_metrics_clientapp[3]["participants"] == 1
    assert result.train_metrics_clientapp[3]["loss"] == 1.0
    if make is FedAU:
        assert rule.participation.weight(10) == 1.0
        assert rule.participation.closed_gaps().get(11, 0) == 0
    told = [str(one.message) for one in warned if "counts as absent" in str(one.message)]
    assert len(told) == (0 if kind in ("error", "nothing") else 3)
    assert all("client 11" in one for one in told)
    if kind in ("NaN", "shape", "missing"):
        assert all("tensor 'x'" in one for one in told)


@needs_flower
def test_metrics_are_means_over_those_that_have_them():
    def answer(message, node):
        return reply(message, shifted(message, 1.0), **{10: {"a": 1.0, "b": 5.0}, 11: {"a": 2.0, "b": nan}}[node])

    class Twice(Grid):
        def send_and_receive(self, messages, *, timeout=None):
            found = super().send_and_receive(messages, timeout=timeout)
            return [*found, reply(self.sent[-1], shifted(self.sent[-1], 99.0), a=99.0)]

    nan = float("nan")
    strategy = FlowerStrategy(AverageParticipating(2))
    result = start(strategy, Twice([[10, 11]], answer), 1)
    train, evaluate = result.train_metrics_clientapp[1], result.evaluate_metrics_clientapp[1]
    assert (train["a"], train["b"], train["participants"]) == (1.5, 5.0, 2)
    assert dict(evaluate) == {"a": 1.5, "b": 5.0}  # the second reply of a client does not count
    assert from_arrays(result.arrays)["x"].tolist() == [1.0, 1.0]


@needs_flower
def test_a_lightning_client_that_raises_is_told_as_an_error():
    app = flower_client(lambda _: Centre(), lambda _: DataLoader(torch.zeros(0, 2)))
    message = Message(RecordDict({"arrays": to_arrays(Centre().state_dict())}), 10, "train")
    with pytest.raises(UnsupportedSetup, match="client 10 took none of 5 local steps"):
        app(message, Context(1, 10, {}, RecordDict(), {}))


@needs_flower
def test_errors_are_logged_in_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    for reason in ("Traceback:\n  ...\nMemoryError: too large\n", None, " \n"):
        start(FlowerStrategy(FedAU(1)), Grid([[10]], lambda m, n, r=reason: Message(Error(0, r), reply_to=m)), 1)
    told = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
    expected = [
        f"client 10 replied with an error and is left out of this round: {what}"
        for what in ("MemoryError: too large", "no reason given", "no reason given")
    ]
    assert told[::2] == expected  # of training
    assert told[1::2] == expected  # of evaluation


@needs_flower
def test_nobody_ever_replies():
    rule = FedAU(2)
    result = start(FlowerStrategy(rule), Grid([[10, 11]], lambda *_: None), 4)
    assert from_arrays(result.arrays)["x"].tolist() == [0, 0]
    assert rule.participation.rounds == 4


# ---------------------------------------------------------------------------------------- the population, going on


@needs_flower
def test_nodes_join_as_they_are_met():
    rule = FedAU([])
    online = [[10], [10], [11], [10, 11, 12]]
    strategy = FlowerStrategy(rule, grow=True)
    totals = start(strategy, Grid(online, lambda m, n: reply(m, shifted(m, 1.0))), 4).train_metrics_clientapp
    # w of node 10 after two rounds of absence would be 1; the one that joins in round 3 is new there
    assert [totals[n]["total"] for n in (1, 2, 3, 4)] == pytest.approx([1, 1, 0.5, 1])
    assert rule.participation.weights() == {10: pytest.approx(4 / 3), 11: 1.0, 12: 1.0}
    late = FedAU([])
    strategy = FlowerStrategy(late, grow=True)

    class Late(Grid):
        asked = 0

        def get_node_ids(self):  # nobody is there when the server is, and the last to come is gone at once
            self.asked += 1
            return [] if self.asked == 1 else [10, 11] if self.asked < 4 else [10]

    result = start(strategy, Late([[10]], lambda m, n: reply(m, shifted(m, 1.0))), 1)
    assert late.participation.population == 2
    assert result.train_metrics_clientapp[1]["participants"] == 1
    with pytest.raises(UnsupportedSetup, match="AverageAll has a fixed population"):
        FlowerStrategy(AverageAll(2), grow=True)


@needs_flower
@pytest.mark.parametrize("make", [lambda: FedAU(3, cutoff=2), lambda: MIFA(3)], ids=["FedAU", "MIFA"])
def test_a_strategy_goes_on_exactly(tmp_path, make):
    def run(rounds, folder, offset=0, strategy=None):
        strategy = strategy or FlowerStrategy(make(), folder=folder, **wait_for_nobody())
        grid = Grid(ROUNDS[offset:], lightning_clients(2, seed=0))
        return start(strategy, grid, rounds), strategy, grid

    whole, first, _ = run(6, None)
    run(2, tmp_path)
    rest, second, grid = run(6, tmp_path, offset=2)
    assert second.round == 6
    for name, value in from_arrays(whole.arrays).items():
        assert torch.equal(from_arrays(rest.arrays)[name], value)
    assert second.rule.state_dict() == first.rule.state_dict()
    assert grid.sent[-1].content["config"]["server-round"] == 6
    again, third, _ = run(6, tmp_path)
    assert from_arrays(again.arrays)["x"].tolist() == from_arrays(whole.arrays)["x"].tolist()
    with pytest.raises(UnsupportedSetup, match="another model than initial_arrays"):
        start(third, Grid(ROUNDS, lightning_clients()), 6, nn.Linear(2, 2))
    with pytest.raises(UnsupportedSetup, match="rule was"):
        FlowerStrategy(AverageAll(3), folder=tmp_path)


@needs_flower
def test_another_population_is_another_training(tmp_path):
    start(FlowerStrategy(FedAU(3), folder=tmp_path), Grid([[10]], lambda *_: None), 1)
    with pytest.raises(UnsupportedSetup, match="population was 3, is 4"):
        FlowerStrategy(FedAU(4), folder=tmp_path)
    rule = FedAU([])
    start(FlowerStrategy(rule, grow=True, folder=tmp_path / "b"), Grid([[10, 11]], lambda *_: None), 1)
    rule = FedAU([])
    FlowerStrategy(rule, grow=True, folder=tmp_path / "b")
    assert rule.population == 2


@needs_flower
def test_options_that_would_change_nothing_are_refused():
    for name in ("weighted_by_key", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
        with pytest.raises(UnsupportedSetup, match=f"{name}: the rule decides"):
            FlowerStrategy(FedAU(1), **{name: "key"})
    with pytest.raises(UnsupportedSetup, match="seed=-1"):
        flower_client(lambda _: Centre(), lambda _: Points(1.0), seed=-1)
    strategy = FlowerStrategy(FedAU(1), arrayrecord_key="x", configrecord_key="c")
    assert from_arrays(start(strategy, Grid([[10]], lightning_clients()), 1).arrays)["x"].tolist() == [0.1, 0.1]


@needs_flower
def test_half_precision_travels_as_single():
    weights = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}
    found = from_arrays(to_arrays(weights))
    assert {name: value.dtype for name, value in found.items()} == {
        "a": torch.float32,
        "b": torch.float16,
        "n": torch.int64,
    }
    app = flower_client(lambda _: Centre(torch.bfloat16), lambda _: Points(1.0))
    message = Message(RecordDict({"arrays": to_arrays(Centre(torch.bfloat16).state_dict())}), 10, "train")
    answer = app(message, Context(1, 10, {}, RecordDict(), {}))
    assert (from_arrays(answer.content["arrays"])["x"] > 0.3).all()


# ------------------------------------------------------------------------------------------------- without Flower


def test_without_flower_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "flwr.app", raising=False)
    monkeypatch.delitem(sys.modules, "lightning_soup.distributed.federated_flower", raising=False)
    import lightning_soup.distributed as distributed

    with pytest.raises(MissingExtra, match=r"'flwr' is not installed.*pip install \"lightning_soup\[federated\]\""):
        distributed.FlowerStrategy  # noqa: B018
    assert distributed.FedAU(3).population == 3
