"""The simulation: equal to averaging by hand, resumed exactly, with bad clients, and refused where it cannot work."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup.distributed import (
    MIFA,
    AverageAll,
    Bernoulli,
    Cyclic,
    FedAU,
    FederatedSimulation,
    FedVARP,
    KnownParticipation,
    Markov,
)
from lightning_soup.distributed.federated_client import evaluate_locally, train_locally
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup, UnwritableOutput
from tests.helpers.boring import TinyClassifier, TinyData

pytestmark = pytest.mark.filterwarnings("ignore:.*clients have fewer than 10 closed gaps")


class Centre(LightningModule):
    """F_n = ½(x − c_n)²: the batch is the centre."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.x, self.lr = nn.Parameter(torch.zeros(1, dtype=torch.float64)), lr

    def training_step(self, batch, batch_idx):
        loss = (0.5 * (self.x - batch) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Data(LightningDataModule):
    """A client's own part of a small problem."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(self.number)
        x = torch.randn(24, 8, generator=draw)
        y = (x[:, :3] + self.number * 0.1).argmax(1)
        return DataLoader(TensorDataset(x, y), 8, shuffle=True)


class Listed(Bernoulli):
    """Who comes, by a list."""

    def __init__(self, rounds, clients):
        super().__init__([0.5] * clients)
        self.rounds = rounds

    def _available(self, draw):
        return np.isin(np.arange(self.rates.size), self.rounds[self.round])


def centre(value):
    return DataLoader(torch.tensor([value], dtype=torch.float64), 1)


def tiny(rule=None, pattern=None, clients=4, module=None, **options):
    torch.manual_seed(5)
    rule = FedAU(clients, cutoff=5) if rule is None else rule
    pattern = Markov(np.linspace(0.3, 0.9, clients), seed=2, arrival=0.3) if pattern is None else pattern
    return FederatedSimulation(
        TinyClassifier(batch_norm=True) if module is None else module,
        [Data(n) for n in range(clients)],
        rule,
        pattern,
        **{"local_steps": 2, **options},
    )


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------- what it does


def test_the_golden_rounds_by_trainers():
    rounds = [[0, 2], [0], [0, 1], [0, 2], [], [1, 2]]
    clients = [centre(value) for value in (1.0, 0.0, -2.0)]
    rule, module, found = FedAU(3), Centre(), []
    simulation = FederatedSimulation(module, clients, rule, Listed(rounds, 3), local_steps=1)
    simulation.run(6, on_round=lambda run: found.append(run.weights["x"].item()))
    expected = (-0.03333333, 0.00111111, 0.03437037, -0.00125432, -0.00125432, -0.13437860)
    assert found == pytest.approx(expected, abs=1e-8)
    assert [rule.participation.weight(n) for n in range(3)] == [1.0, 3.0, 2.0]
    assert module.x.item() == found[-1]
    assert [row["participants"] for row in simulation.history] == [2, 1, 2, 2, 0, 2]
    assert simulation.history[0]["loss"] == pytest.approx((0.5 + 2) / 2)
    assert simulation.history[-1]["weight_max"] == 3.0
    assert simulation.history[2]["total"] == pytest.approx(2 / 3)


def test_local_steps_are_those_of_a_plain_loop():
    simulation = FederatedSimulation(Centre(), {"a": centre(1.0)}, FedAU(["a"]), Bernoulli([1.0]), local_steps=5)
    assert simulation.run(2)["x"].item() == pytest.approx(1 - 0.9**10, abs=1e-12)


def test_optimizers_and_modules_are_fresh_in_every_round():
    module = TinyClassifier()  # SGD with momentum, which must not be carried on
    simulation = FederatedSimulation(module, [Data(0)], AverageAll(1), Bernoulli([1.0]), local_steps=3, seed=3)
    x = {name: value.clone() for name, value in module.state_dict().items()}
    for number in range(2):
        seed = int(np.random.SeedSequence([3, number, 0]).generate_state(1)[0])
        x = train_locally(TinyClassifier(), Data(0), x, 3, seed=seed).weights
    found = simulation.run(2)
    assert all(torch.allclose(found[name].double(), x[name].double(), atol=1e-6) for name in x)
    assert module._trainer is None


def test_buffers_are_averaged_over_participants():
    rates = {0: 0.1, 1: 0.1}
    simulation = FederatedSimulation(
        TinyClassifier(batch_norm=True),
        [Data(0), Data(1)],
        KnownParticipation(rates),
        Cyclic([1.0, 1.0]),
        local_steps=4,
    )
    found = simulation.run(1)
    assert simulation.history[0]["total"] == pytest.approx(10)
    assert (found["net.1.running_var"] > 0).all()  # ten times the difference would be far below 0
    assert found["net.1.num_batches_tracked"].item() == 4
    assert found["net.1.num_batches_tracked"].dtype == torch.int64


def test_buffers_may_be_named():
    for buffers, expected in ((None, 1.0), (["x"], 0.1)):
        rule = KnownParticipation({0: 0.1})
        simulation = FederatedSimulation(
            Centre(), [centre(1.0)], rule, Bernoulli([1.0]), local_steps=1, buffers=buffers
        )
        assert simulation.run(1)["x"].item() == pytest.approx(expected)


def test_random_numbers_outside_are_left_alone():
    simulation = tiny()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = os.environ.get("PL_GLOBAL_SEED")
    simulation.run(2)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert os.environ.get("PL_GLOBAL_SEED") == before


def test_global_weights_are_validated_where_there_is_data():
    module, weights = TinyClassifier(), TinyClassifier(lr=0.1).state_dict()
    assert evaluate_locally(module, Data(0), weights).metrics == {}
    found = evaluate_locally(module, TinyData(), weights)
    assert set(found.metrics) == {"val_acc", "val_loss"}
    assert found.examples == 60
    assert same(found.weights, weights)
    assert same(module.state_dict(), weights)
    assert evaluate_locally(module, TinyData().val_dataloader(), weights).metrics == found.metrics


def test_rounds_are_logged(tmp_path):
    simulation = tiny(logger=CSVLogger(tmp_path, name="", version=""))
    simulation.run(3)
    simulation.logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4
    place = lines[0].split(",").index("step")
    assert [line.split(",")[place] for line in lines[1:]] == ["1", "2", "3"]
    assert {"participants", "weight_max", "few_gaps", "total"} <= set(lines[0].split(","))


def test_rough_weights_are_told_at_the_end():
    with pytest.warns(UserWarning, match="4 of 4 clients have fewer than 10 closed gaps after 2 rounds"):
        tiny().run(2)


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAU(4, cutoff=3),
        lambda: FedAU(range(4)),
        lambda: MIFA(4),
        lambda: FedVARP(4),
        lambda: KnownParticipation(dict.fromkeys(range(4), 0.6)),
    ],
    ids=["FedAU cutoff", "FedAU", "MIFA", "FedVARP", "known"],
)
def test_a_run_goes_on_exactly(tmp_path, make):
    whole = tiny(make())
    expected = whole.run(7)
    first = tiny(make(), folder=tmp_path)
    first.run(3)
    second = tiny(make(), folder=tmp_path)
    assert second.round == 3
    found = second.run(7)
    assert same(found, expected)
    assert second.rule.state_dict() == whole.rule.state_dict()
    assert second.history == whole.history
    assert {c: {n: v.tolist() for n, v in m.items()} for c, m in second.rule.memory.items()} == {
        c: {n: v.tolist() for n, v in m.items()} for c, m in whole.rule.memory.items()
    }
    third = tiny(make(), folder=tmp_path)
    assert same(third.run(7), expected)  # nothing is left to do
    with pytest.raises(UnsupportedSetup, match="rounds=6, but 7 are done"):
        third.run(6)


@pytest.mark.parametrize("place", ["training", "writing"])
def test_a_run_that_is_ended_in_the_middle_goes_on(tmp_path, monkeypatch, place):
    expected = tiny().run(6)
    ended = tiny(folder=tmp_path, save_every=2)
    calls = []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    name = "train_locally" if place == "training" else "write_state"
    target = f"lightning_soup.distributed.federated_simulation.{name}"
    from lightning_soup.distributed import federated_simulation

    original = getattr(federated_simulation, name)
    if place == "training":
        ended.run(4)
    monkeypatch.setattr(target, stop)
    with pytest.raises(KeyboardInterrupt):
        ended.run(6)
    monkeypatch.setattr(target, original)
    assert [path.name for path in tmp_path.iterdir()] == ["federated.safetensors"]
    again = tiny(folder=tmp_path)
    assert again.round == 4
    assert same(again.run(6), expected)
    assert same(ended.run(6), expected)  # the same object, too


def test_tied_weights_go_on(tmp_path):
    class Tied(Centre):
        def __init__(self):
            super().__init__()
            self.y = self.x

    def make():
        return FederatedSimulation(
            Tied(), [centre(1.0), centre(3.0)], FedAU(2), Cyclic([0.5, 0.5]), local_steps=2, folder=tmp_path
        )

    make().run(20)
    again = make()
    again.run(40)
    assert again.weights["x"].item() == again.weights["y"].item() == again.module.y.item() != 0


def loop_of_another_process(folder):
    """What the process that is killed runs."""
    tiny(folder=folder, save_every=1).run(100_000)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_state_to_go_on_from(tmp_path):
    code = f"from tests.distributed.test_federated_simulation import *; loop_of_another_process({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    try:
        end = time.monotonic() + 120
        while tiny(folder=tmp_path).round < 4 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    again = tiny(folder=tmp_path)
    assert again.round >= 4
    whole = tiny()
    assert same(again.run(again.round + 2), whole.run(again.round))
    assert again.history == whole.history


def test_folders_of_others_are_refused(tmp_path):
    tiny(folder=tmp_path).run(1)
    before = (tmp_path / "federated.safetensors").read_bytes()
    for make, message in (
        (lambda: tiny(FedAU(4, cutoff=6), folder=tmp_path), "cutoff was 5, is 6"),
        (lambda: tiny(MIFA(4), folder=tmp_path), "rule was 'FedAU', is 'MIFA'"),
        (lambda: tiny(pattern=Bernoulli([0.5] * 4), folder=tmp_path), "pattern was 'Markov', is 'Bernoulli'"),
        (lambda: tiny(seed=1, folder=tmp_path), "local_seed was 0, is 1"),
        (lambda: tiny(pattern=Markov([0.5] * 4, seed=2, arrival=0.3), folder=tmp_path), "pattern_rates was"),
        (lambda: tiny(clients=5, folder=tmp_path), "population was 4, is 5.*clients was"),
        (lambda: tiny(folder=tmp_path, local_steps=3), "local_steps was 2, is 3"),
        (lambda: tiny(folder=tmp_path, module=TinyClassifier()), "tensors was"),
        (lambda: tiny(buffers=["net.1.running_mean"], folder=tmp_path), "buffers was"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            make()
    assert (tmp_path / "federated.safetensors").read_bytes() == before


def test_damaged_files_are_refused(tmp_path):
    tiny(folder=tmp_path).run(1)
    path = tmp_path / "federated.safetensors"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:50] + b"\x00" * 20 + content[70:]):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableCheckpoint, match="damaged"):
            tiny(folder=tmp_path)
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    about = json.loads(metadata["lightning_soup.federated"])
    for damaged in (
        {**about, "extra": {}},
        {**about, "extra": {**about["extra"], "history": 3}},
        {**about, "extra": {**about["extra"], "pattern": {"round": -1}}},
        {**about, "rule": {}},
        {**about, "memory": 1},
        {**about, "round": None},
    ):
        save_file(tensors, path, {"lightning_soup.federated": json.dumps(damaged)})
        with pytest.raises(UnreadableCheckpoint):
            tiny(folder=tmp_path)
    save_file({n: v for n, v in tensors.items() if n != "x/net.0.weight"}, path, metadata)
    with pytest.raises(UnreadableCheckpoint, match=r"federated\.safetensors: is damaged.*'net.0.weight'"):
        tiny(folder=tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UnreadableCheckpoint, match="no state of a federated training"):
        tiny(folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableOutput):
        tiny(folder=tmp_path / "file")  # before a round is done for nothing
    tiny(folder=tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_the_file_is_plain(tmp_path):
    simulation = tiny(FedVARP(4), folder=tmp_path)
    simulation.run(3)
    tensors = load_file(tmp_path / "federated.safetensors")
    assert same(
        {n.removeprefix("x/"): v for n, v in sorted(tensors.items()) if n.startswith("x/")},
        dict(sorted(simulation.weights.items())),
    )
    json.dumps(simulation.rule.state_dict())
    (tmp_path / "other").write_text("")
    assert (tmp_path / "federated.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# -------------------------------------------------------------------------------------------------- clients that fail


def test_a_client_that_diverges_counts_as_absent():
    clients = [centre(1.0), centre(float("nan"))]
    rule = FedAU(2)
    simulation = FederatedSimulation(Centre(), clients, rule, Bernoulli([1.0, 1.0]), local_steps=1)
    with pytest.warns(UserWarning, match="client 1: tensor 'x' .* holds NaN"):
        found = simulation.run(3)
    assert 0 < found["x"].item() < 1
    assert [row["refused"] for row in simulation.history] == [1, 1, 1]
    assert rule.participation.closed_gaps() == {0: 3}


def test_a_client_without_data_is_named():
    empty = DataLoader(TensorDataset(torch.zeros(0, 1)), 1)
    simulation = FederatedSimulation(Centre(), {"full": centre(1.0), "void": empty}, FedAU(2), Bernoulli([1.0, 1.0]))
    with pytest.raises(UnsupportedSetup, match="client 'void' took none of 5 local steps"):
        simulation.run(1)


def test_trainer_options_reach_the_clients():
    class Count(Callback):
        fits = 0

        def on_fit_start(self, trainer, pl_module):
            Count.fits += 1
            assert trainer.gradient_clip_val == 0.01

    simulation = FederatedSimulation(
        Centre(),
        [centre(1.0)],
        FedAU(1),
        Bernoulli([1.0]),
        trainer={"callbacks": [Count()], "gradient_clip_val": 0.01},
    )
    assert simulation.run(2)["x"].item() == pytest.approx(10 * 0.1 * 0.01, rel=1e-5)
    assert Count.fits == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": FedAU(3)}, "clients 2, pattern 2, rule 3"),
        ({"pattern": Bernoulli([0.5] * 5)}, "clients 2, pattern 5, rule 2"),
        ({"rule": FedAU(["a", "b"])}, "client 0 does not belong to the population of 2"),
        ({"rule": KnownParticipation({"a": 0.5, 1: 0.5})}, "client 0 has no rate"),
        ({"local_steps": 0}, "local_steps=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"trainer": {"max_epochs": 3}}, "max_epochs is decided by local_steps"),
        ({"trainer": {"devices": 2}}, "a client trains on one device"),
    ],
)
def test_wrong_options(change, message):
    options = {"rule": FedAU(2), "pattern": Bernoulli([0.5, 0.5]), **change}
    with pytest.raises(UnsupportedSetup, match=message):
        FederatedSimulation(Centre(), [centre(1.0), centre(2.0)], **options)


def test_modules_whose_weights_are_not_known_are_refused():
    class Later(Centre):
        def __init__(self):
            LightningModule.__init__(self)

    class Lazy(Centre):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(2)

    class Extra(Centre):
        def get_extra_state(self):
            return {"plain": 1}

    for kind, message in (
        (Later, "Later: its state dict is empty"),
        (Lazy, r"Lazy: 'layer\.\w+' in its state dict is no tensor that has a shape"),
        (Extra, "Extra: '_extra_state' in its state dict is no tensor"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            FederatedSimulation(kind(), [centre(1.0)], FedAU(1), Bernoulli([1.0]))


def test_weights_of_another_module_are_refused():
    with pytest.raises(UnsupportedSetup, match="client 'n': the global weights do not fit Centre"):
        train_locally(Centre(), centre(1.0), {"y": torch.zeros(1)}, 1, client="n")
