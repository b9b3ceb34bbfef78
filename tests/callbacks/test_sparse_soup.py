"""SparseModelSoup against the procedure written out by hand, and at every place where it can be interrupted."""

import csv
import math
import os
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_soup.callbacks import ExponentialAverage, ModelSoup, SparseModelSoup
from lightning_soup.callbacks.retraining import adaptive_rate, retraining_rate
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import cycle_amounts, prune_
from lightning_soup.recipes import GreedySoup, InterpolatedSoup, UniformSoup
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_live_average_contract import CutAt
from tests.callbacks.test_sparsity_mask import Watch, zeros
from tests.helpers.averages import TwoOptimizers, loaders
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.ids import without_addresses
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

# batches in a fixed order make copies alike
pytestmark = pytest.mark.filterwarnings("ignore:.*hold the same weights")
SIZE = 8 * 16 + 16 * 3
LONGER = {"dense_epochs": 2, "retrain_epochs": 2, "monitor": "val_loss"}  # 10 epochs of six steps
SMALL = {"sparsity": 0.8, "cycles": 2, "copies": 2, "retrain_epochs": 1, "dense_epochs": 1}


class Stream(torch.utils.data.IterableDataset):
    """The data of TinyData, without a length: six batches of 16."""

    def __iter__(self):
        return iter(TinyData().train)


class Cosine(TinyClassifier):
    """Follows a schedule over the whole of what it is told training is."""

    def __init__(self, batch_norm: bool = False, lr: float = 0.05, weight_decay: float = 1e-3) -> None:
        super().__init__(batch_norm, lr)
        self.save_hyperparameters()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=self.hparams.weight_decay
        )
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / total)) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder, module=None, callbacks=(), seed=3, data=None, ckpt_path=None, trainer=None, **options):
    torch.manual_seed(seed)
    module = module or Cosine()
    soup = SparseModelSoup(**{**SMALL, "dirpath": str(folder), **options})
    watch = Watch(soup)
    trainer = quiet_trainer(**{"max_epochs": -1, **(trainer or {})}, callbacks=[soup, *callbacks, watch])
    if isinstance(data, TinyData):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, *(data or loaders()), ckpt_path=ckpt_path)
    assert watch.broken == []
    return soup, module


def by_hand(options, start, batches):
    """The procedure in plain torch, on batches in a fixed order."""
    model = TinyClassifier()
    model.load_state_dict(start)
    given = {"schedule": "llr", "lr_max": None, **SMALL, **options}

    def train(epochs, rate_at, masks):
        optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=1e-3)
        for step in range(epochs * len(batches)):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.net(x), y).backward()
            optimizer.param_groups[0]["lr"] = rate_at(step)
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)
        return {name: value.clone() for name, value in model.state_dict().items()}

    total = given["dense_epochs"] * len(batches)
    history = [0.05 * (1 + math.cos(math.pi * t / total)) / 2 for t in range(total)]
    train(given["dense_epochs"], lambda t: history[t], {})
    prunable = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    masks, counts = None, []
    for amount, of in cycle_amounts(given["sparsity"], given["cycles"]):
        before, left = {n: p.detach().clone() for n, p in prunable.items()}, SIZE - (counts[-1] if counts else 0)
        masks = prune_(prunable, amount, masks, of=of)
        counts.append(masks.pruned)
        gone = sum(float((before[n] - p.detach()).double().square().sum()) for n, p in prunable.items()) ** 0.5
        drop = gone / sum(float(p.double().square().sum()) for p in before.values()) ** 0.5
        share = (left - SIZE + masks.pruned) / left
        pruned = {name: value.clone() for name, value in model.state_dict().items()}
        copies = []
        for copy in range(given["copies"]):
            model.load_state_dict(pruned)
            epochs = given.get("vary", {}).get("retrain_epochs", [given["retrain_epochs"]] * 9)[copy]
            highest = given["lr_max"] or max(history, default=0.05)
            highest = given.get("vary", {}).get("lr_max", [highest] * 9)[copy]
            if given["schedule"] == "allr":
                highest = adaptive_rate(highest, epochs, given["dense_epochs"], drop, share)
            steps = epochs * len(batches)

            def rate_at(t, highest=highest, steps=steps):
                return retraining_rate(given["schedule"], t, steps, highest, history=history)

            copies.append(train(epochs, rate_at, masks))
        model.load_state_dict({n: sum(c[n] for c in copies) / len(copies) for n in pruned})
    return model.state_dict(), masks, counts


class TestProcedure:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"cycles": 3, "copies": 3, "retrain_epochs": 2},
            {"schedule": "lrw", "dense_epochs": 2},
            {"schedule": "slr"},
            {"schedule": "allr", "dense_epochs": 4, "vary": {"retrain_epochs": [1, 3]}},
            {"schedule": "ft"},
            {"schedule": "clr", "lr_max": 0.02, "copies": 1},
            {"vary": {"retrain_epochs": [2, 1]}},
            {"vary": {"lr_max": [0.1, 0.01]}, "dense_epochs": 0},
        ],
        ids=str,
    )
    def test_it_is_what_it_would_be_by_hand(self, options, tmp_path):
        torch.manual_seed(3)
        start = TinyClassifier().state_dict()
        expected, masks, counts = by_hand(options, start, list(loaders()[0]))
        soup, module = fit(tmp_path, **options)
        assert soup.masks == masks
        assert [round(SIZE * record["sparsity"]) for record in soup.records] == counts
        for name, value in expected.items():
            torch.testing.assert_close(module.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)
        assert zeros(module) == round(SIZE * 0.8)

    def test_the_dense_training_is_as_without_it(self, tmp_path):
        torch.manual_seed(3)
        alone = Cosine()
        quiet_trainer(max_epochs=2).fit(alone, *loaders())

        class At(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    self.weights = {n: v.clone() for n, v in pl_module.state_dict().items()}

        at = At()
        fit(tmp_path, dense_epochs=2, callbacks=[at])
        for name, value in alone.state_dict().items():
            assert torch.equal(at.weights[name], value)

    def test_files_hold_starts_copies_and_soups(self, tmp_path):
        soup, module = fit(tmp_path)
        names = sorted(path.name for path in tmp_path.iterdir())
        parts = ("copy=1", "copy=2", "soup", "start")
        assert names[:-3] == [f"cycle={cycle}-{part}.ckpt" for cycle in (1, 2) for part in parts]
        assert names[-3:] == ["layers.csv", "masks.pt", "sparse_soup.png"]
        assert Masks.from_state(torch.load(tmp_path / "masks.pt", weights_only=True)) == soup.masks
        for cycle, count in ((1, cycle_amounts(0.8, 2)[0][0]), (2, 0.8)):
            for part in parts:
                weights = open_checkpoint(tmp_path / f"cycle={cycle}-{part}.ckpt")
                found = sum(int((weights[f"net.{layer}.weight"] == 0).sum()) for layer in (0, 3))
                assert found == round(SIZE * count)
        again = Cosine.load_from_checkpoint(tmp_path / "cycle=2-soup.ckpt")
        assert torch.equal(again.net[0].weight, module.net[0].weight)
        assert open_checkpoint(tmp_path / "cycle=2-soup.ckpt").provenance is not None
        assert soup.soup.coefficients == (0.5, 0.5)

    def test_what_is_left_of_each_layer_is_told(self, tmp_path):
        class Example(Cosine):
            def __init__(self):
                super().__init__()
                self.example_input_array = torch.rand(1, 8)

            def forward(self, x):
                return self.net(x)

        soup, _ = fit(tmp_path, module=Example())
        with (tmp_path / "layers.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["net.0.weight", "net.3.weight"]
        assert sum(int(row["kept"]) for row in rows) == soup.masks.size - soup.masks.pruned
        assert [int(row["flops"]) for row in rows] == [2 * 8 * 16, 2 * 16 * 3]

    def test_copies_may_go(self, tmp_path):
        fit(tmp_path, keep_copies=False)
        assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["cycle=1-soup.ckpt", "cycle=2-soup.ckpt"]

    def test_copies_differ_in_their_order_of_batches_alone(self, tmp_path):
        fit(tmp_path, data=TinyData())
        one, two = (open_checkpoint(tmp_path / f"cycle=1-copy={i}.ckpt")["net.0.weight"] for i in (1, 2))
        assert not torch.equal(one, two)
        fixed = tmp_path / "fixed"
        fit(fixed)
        one, two = (open_checkpoint(fixed / f"cycle=1-copy={i}.ckpt")["net.0.weight"] for i in (1, 2))
        assert torch.equal(one, two)

    def test_every_epoch_of_every_copy_has_an_order_of_its_own(self, tmp_path):
        first = []

        class See(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if batch_idx == 0 and trainer.current_epoch > 0:
                    first.append(tuple(batch[0].flatten().tolist()))

        fit(tmp_path, data=TinyData(), callbacks=[See()], retrain_epochs=2)
        assert len(set(first)) == len(first) == 2 * 2 * 2

    def test_seeds_may_be_given(self, tmp_path):
        fit(tmp_path, data=TinyData(), vary={"seed": [5, 5]})
        one, two = (open_checkpoint(tmp_path / f"cycle=2-copy={i}.ckpt")["net.0.weight"] for i in (1, 2))
        assert torch.equal(one, two)

    @pytest.mark.parametrize("name", ["weight_decay", "momentum"])
    def test_hyperparameters_and_options_of_the_optimizer_may_vary(self, name, tmp_path):
        seen = []

        class See(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen.append(trainer.optimizers[0].param_groups[0][name])

        _, module = fit(tmp_path, callbacks=[See()], vary={name: [0.1, 0.2]})
        assert seen == [{"weight_decay": 1e-3, "momentum": 0.9}[name], 0.1, 0.2, 0.1, 0.2]
        assert module.hparams.weight_decay == 1e-3
        assert open_checkpoint(tmp_path / "cycle=1-copy=1.ckpt").specs

    def test_groups_keep_their_ratios(self, tmp_path):
        class Groups(Cosine):
            def configure_optimizers(self):
                first, *rest = self.parameters()
                return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.08}])

        seen = []

        class See(Callback):
            def on_train_batch_start(self, trainer, *_):
                seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        fit(tmp_path, module=Groups(), callbacks=[See()], lr_max=0.4, dense_epochs=0)
        peak = max(seen, key=lambda rates: rates[1])
        assert peak == pytest.approx([0.1, 0.4])
        assert all(4 * a == pytest.approx(b) for a, b in seen)

    @pytest.mark.filterwarnings("ignore:.*layers have no weight left")
    def test_accumulation(self, tmp_path):
        soup, _ = fit(tmp_path, trainer={"accumulate_grad_batches": 4})
        assert soup.records[-1]["sparsity"] == round(SIZE * 0.8) / SIZE
        assert soup._rates.step == 2  # of six batches

    def test_other_selections_and_roundings(self, tmp_path):
        for selection in ("uniform", "lamp", "erk", "random"):
            soup, _ = fit(tmp_path / selection, selection=selection, rounding="compound")
            assert soup.masks.pruned == pytest.approx(SIZE * 0.8, abs=1)
        soup, _ = fit(tmp_path / "2:4", selection="2:4", sparsity=0.5, cycles=1, skip_head=True)
        assert soup.masks.sparsity == 0.5


class TestScores:
    def test_copies_and_soups_are_scored(self, tmp_path):
        class Logged(Callback):
            pass

        logger = CSVLogger(tmp_path)
        soup, module = fit(tmp_path / "x", data=TinyData(), monitor="val_acc", trainer={"logger": logger})
        scores = [float(row["val_acc"]) for row in quiet_trainer().validate(module, TinyData(), verbose=False)]
        assert soup.records[-1]["soup"] == pytest.approx(scores[0])
        assert soup.soup.score == soup.records[-1]["soup"]
        assert len(soup.records[-1]["copies"]) == 2
        text = Path(logger.log_dir, "metrics.csv").read_text()
        assert "sparse_soup/val_acc" in text
        assert "sparse_soup/copy_2" in text

    def test_losses_are_minimised(self, tmp_path):
        soup, _ = fit(tmp_path, monitor="val_loss", recipe=GreedySoup())
        assert soup.soup.score == -soup.records[-1]["soup"] < 0
        assert soup.records[-1]["soup"] <= min(soup.records[-1]["copies"]) + 1e-9

    def test_greedy_takes_what_helps(self, tmp_path):
        soup, _ = fit(tmp_path, data=TinyData(), monitor="val_acc", recipe=GreedySoup(), copies=3)
        assert soup.soup.score >= max(soup.records[-1]["copies"]) - 1e-9
        assert len(soup.soup.history) == 3

    def test_batch_norm_is_estimated_anew(self, tmp_path):
        _, module = fit(tmp_path, module=Cosine(batch_norm=True), monitor="val_acc")
        means = [module.net[0](x).detach().mean(0) for x, _ in loaders()[0]]
        torch.testing.assert_close(module.net[1].running_mean, torch.stack(means).mean(0))
        saved = open_checkpoint(tmp_path / "cycle=2-soup.ckpt")
        assert torch.equal(saved["net.1.running_mean"], module.net[1].running_mean)

    def test_scores_are_those_with_statistics_of_their_own(self, tmp_path):
        soup, module = fit(tmp_path, module=Cosine(batch_norm=True), monitor="val_loss")
        module.load_state_dict(dict(open_checkpoint(tmp_path / "cycle=2-copy=1.ckpt")))
        layer = module.net[1]
        layer.reset_running_stats()
        layer.momentum = None
        module.train()
        with torch.no_grad():
            for x, _ in loaders()[0]:
                module.net(x)
        [scores] = quiet_trainer().validate(module, loaders()[1], verbose=False)
        assert soup.records[-1]["copies"][0] == pytest.approx(scores["val_loss"], rel=1e-5)

    def test_one_copy(self, tmp_path):
        soup, module = fit(tmp_path, copies=1, monitor="val_acc")
        assert soup.records[-1]["copies"] == [soup.records[-1]["soup"]]
        copy = open_checkpoint(tmp_path / "cycle=2-copy=1.ckpt")
        assert torch.equal(copy["net.0.weight"], module.net[0].weight)


class Everything:
    """What a fit ends with."""

    def __init__(self, soup, module):
        self.weights, self.masks, self.records = module.state_dict(), soup.masks, soup.records

    def same_as(self, other):
        for name, value in self.weights.items():
            assert torch.equal(value, other.weights[name]), name
        assert self.masks == other.masks
        assert self.records == other.records


class TestResume:
    def _run(self, folder, cut=0, data=None, **options):
        keep = ModelCheckpoint(dirpath=folder / "ckpt", save_top_k=-1, filename="{step}", every_n_epochs=1)
        if "every" in options:
            every = options.pop("every")
            keep = ModelCheckpoint(dirpath=folder / "ckpt", save_top_k=-1, filename="{step}", every_n_train_steps=every)
        torch.manual_seed(options.get("seed", 3))
        module = Cosine(batch_norm=True)
        arguments = {"module": module, "callbacks": [CutAt(cut), keep], "data": data, **LONGER, **options}
        return Everything(*fit(folder / "soup", trainer={"enable_checkpointing": True}, **arguments))

    @pytest.mark.parametrize(
        "epoch", [1, 5, *(pytest.param(epoch, marks=pytest.mark.slow) for epoch in (2, 3, 4, 6, 7, 8, 9))]
    )
    def test_at_the_end_of_every_epoch(self, epoch, tmp_path):
        whole = self._run(tmp_path / "whole")
        with pytest.raises(RuntimeError, match="power cut"):
            self._run(tmp_path / "cut", cut=6 * epoch + 4)
        file = tmp_path / "cut" / "ckpt" / f"step={6 * epoch}.ckpt"
        self._run(tmp_path / "cut", seed=99, ckpt_path=file).same_as(whole)

    @pytest.mark.parametrize("epoch", [4, *(pytest.param(epoch, marks=pytest.mark.slow) for epoch in (3, 6))])
    def test_copies_draw_the_same_order_again(self, epoch, tmp_path):
        data = TinyData()
        whole = self._run(tmp_path / "whole", data=data)
        with pytest.raises(RuntimeError, match="power cut"):
            self._run(tmp_path / "cut", cut=6 * epoch + 4, data=data)
        file = tmp_path / "cut" / "ckpt" / f"step={6 * epoch}.ckpt"
        self._run(tmp_path / "cut", seed=99, ckpt_path=file, data=data).same_as(whole)

    @pytest.mark.parametrize("step", [16, *(pytest.param(step, marks=pytest.mark.slow) for step in (8, 24, 32, 56))])
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    def test_within_an_epoch(self, step, tmp_path):
        data = [DataLoader(ConcatDataset([Subset(TinyData().train, range(16))] * 6), 16), loaders()[1]]
        whole = self._run(tmp_path / "whole", data=data, every=8)
        with pytest.raises(RuntimeError, match="power cut"):
            self._run(tmp_path / "cut", cut=step + 1, data=data, every=8)
        file = tmp_path / "cut" / "ckpt" / f"step={step}.ckpt"
        self._run(tmp_path / "cut", seed=99, ckpt_path=file, data=data, every=8).same_as(whole)

    def test_what_has_ended_stays_so(self, tmp_path):
        whole = self._run(tmp_path)
        self._run(tmp_path, seed=99, ckpt_path=tmp_path / "ckpt" / "step=60.ckpt").same_as(whole)

    @pytest.mark.filterwarnings("ignore:.*has files of another fit, which this one writes over")
    def test_a_second_fit_begins_anew(self, tmp_path):
        first = self._run(tmp_path / "a")
        torch.manual_seed(3)
        soup, module = SparseModelSoup(**{**SMALL, **LONGER, "dirpath": str(tmp_path / "b")}), None
        for _ in range(2):
            torch.manual_seed(3)
            module = Cosine(batch_norm=True)
            quiet_trainer(max_epochs=-1, callbacks=[soup]).fit(module, *loaders())
        Everything(soup, module).same_as(first)

    def test_a_second_fit_of_one_module_begins_with_a_dense_training(self, tmp_path):
        soup, module = SparseModelSoup(**{**SMALL, "dirpath": str(tmp_path)}), Cosine()
        for number in range(2):
            watch = Watch(soup)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the second writes over the first one's files
                quiet_trainer(max_epochs=-1, callbacks=[soup, watch]).fit(module, *loaders())
            assert watch.seen[0] == 0, number
            assert watch.broken == []
            assert zeros(module) == round(SIZE * 0.8)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [(os.unlink, "is gone, which this fit comes back to"), (None, "was written by another fit since")],
    )
    def test_files_that_are_not_what_they_were(self, damage, message, tmp_path):
        with pytest.raises(RuntimeError, match="power cut"):
            self._run(tmp_path, cut=20)
        start = tmp_path / "soup" / "cycle=1-start.ckpt"
        if damage:
            damage(start)
        else:
            content = torch.load(start, weights_only=True)
            content["state_dict"]["net.0.weight"][0] += 1
            torch.save(content, start)
        with pytest.raises(LightningSoupError, match=message):
            self._run(tmp_path, ckpt_path=tmp_path / "ckpt" / "step=18.ckpt")

    def test_a_fit_that_is_stopped_says_so(self, tmp_path):
        class Stop(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = trainer.current_epoch == 2

        with pytest.warns(UserWarning, match="stopped in copy 2 of cycle 1, before epoch 5"):
            soup, _ = fit(tmp_path, callbacks=[Stop()])
        assert soup.soup is None


def _train_on_a_rank(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"monitor": "val_loss", "recipe": GreedySoup()}
        trainer = {"devices": 2, "strategy": "ddp"}
        soup, module = fit(folder, module=Cosine(batch_norm=True), data=loaders(8), trainer=trainer, **options)
        broken = mock.patch("lightning_soup.callbacks.sparse_soup_files.atomic_path", side_effect=OSError("no disk"))
        with broken, pytest.raises(LightningSoupError, match="was not written"):  # on rank 0, said on both
            fit(f"{folder}/full", module=Cosine(batch_norm=True), data=loaders(8), trainer=trainer, **options)
    masks = [soup.masks[name].numpy() for name in soup.masks]
    return [*masks, *(value.numpy() for value in module.state_dict().values())], soup.records


def test_two_ranks_agree(tmp_path):
    (first, records), (second, others) = run_on_two_ranks(_train_on_a_rank, str(tmp_path))
    assert records == others
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()


def test_yaml_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    options = {
        "sparsity": 0.9,
        "cycles": 3,
        "copies": 2,
        "retrain_epochs": 4,
        "dense_epochs": 5,
        "vary": {"weight_decay": [1e-4, 5e-4]},
        "schedule": "allr",
        "monitor": "val_acc",
        "recipe": {"class_path": "lightning_soup.recipes.GreedySoup", "init_args": {"strict": True}},
    }
    for made in through_yaml(TinyClassifier, "lightning_soup.callbacks.SparseModelSoup", options, tmp_path):
        assert made.total_epochs == 5 + 3 * 2 * 4
        assert made.recipe == GreedySoup(strict=True)
        assert made.vary == {"weight_decay": [1e-4, 5e-4]}


def test_what_varies_need_not_be_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    options = {"sparsity": 0.5, "copies": 2, "retrain_epochs": 1, "vary": {"nesterov": [True, False], "seed": [0, 1]}}
    for made in through_yaml(TinyClassifier, "lightning_soup.callbacks.SparseModelSoup", options, tmp_path):
        assert made.vary == {"nesterov": [True, False], "seed": [0, 1]}
        assert isinstance(made.vary["nesterov"][0], bool)


def test_a_budget():
    soup = SparseModelSoup(0.9, cycles=3, copies=2, dense_epochs=8, budget=20)
    assert (soup.retrain_epochs, soup.total_epochs) == ([2, 2], 20)


def test_fast_dev_run(tmp_path):
    fit(tmp_path / "x", trainer={"fast_dev_run": True, "max_epochs": 1})
    assert not (tmp_path / "x").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 1.0}, "expected a share above 0 and below 1"),
            ({"cycles": 0}, "cycles=0: expected 1 or more"),
            ({"copies": 0}, "copies=0: expected 1 or more"),
            ({"dense_epochs": -1}, "dense_epochs=-1: expected 0 or more"),
            ({"retrain_epochs": None}, "give retrain_epochs.*or budget"),
            ({"retrain_epochs": 0}, "retrain_epochs=0: expected 1 or more"),
            ({"budget": 9}, "give retrain_epochs.*or budget"),
            (
                {"retrain_epochs": None, "budget": 8},
                "7 are left for 2 cycles of 2 copies.*divide by 4. Give 9",
            ),
            ({"schedule": "cosine"}, "expected one of llr, allr, clr, slr, lrw, ft"),
            ({"schedule": "lrw", "dense_epochs": 0}, "dense_epochs=0. Train densely in this fit"),
            ({"schedule": "allr", "dense_epochs": 0}, "Say how long that was with pretraining_epochs"),
            ({"lr_max": -1.0}, "lr_max=-1.0: expected more than 0"),
            ({"vary": {"weight_decay": [0.1]}}, "expected a list of 2 values, one for each copy"),
            ({"vary": {"retrain_epochs": [1, 0.5]}}, "expected whole numbers"),
            ({"vary": {"retrain_epochs": ["1", "2"]}}, "retrain_epochs=.*expected numbers"),
            ({"vary": {"lr_max": ["0.1", "0.2"]}}, "lr_max=.*expected numbers"),
            ({"vary": {"seed": [0, math.nan]}}, "seed=.*expected whole numbers"),
            ({"cycles": 2.5}, "cycles=2.5: expected 1 or more"),
            ({"sparsity": None}, "sparsity=None: expected a share"),
            ({"selection": "2:4"}, "prunes at once. Give cycles=1"),
            ({"rounding": "up"}, "expected direct or compound"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(UnsupportedSetup, match=message):
            SparseModelSoup(**{**SMALL, **options})

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"trainer": {"max_epochs": 7}},
                r"for 5 epochs: 1 dense and 2 cycles × \(1 \+ 1\). Give max_epochs=5",
            ),
            ({"trainer": {"max_epochs": 5, "max_steps": 3}}, "leave max_steps out, and give max_epochs=5"),
            ({"callbacks": [lambda: EarlyStopping("val_loss")]}, "would end the fit before its soup"),
            ({"callbacks": [lambda: ExponentialAverage(0.9)]}, "different copies and sparsities"),
            ({"callbacks": [lambda: StochasticWeightAveraging(0.1)]}, "different copies and sparsities"),
            ({"callbacks": [lambda: ModelSoup(last=2)]}, "different copies and sparsities"),
            ({"module": TwoOptimizers}, "which manual optimization keeps to itself"),
            ({"recipe": GreedySoup()}, "GreedySoup chooses by a validation metric"),
            ({"recipe": UniformSoup(weights=[1.0, 2.0, 1.0])}, "has 3 weights, but SparseModelSoup makes copies=2"),
            ({"recipe": InterpolatedSoup()}, "takes the first of its ingredients for the start"),
            ({"recipe": UniformSoup(reprune=True)}, "which their average keeps. Leave reprune out"),
            ({"vary": {"dropout": [0.1, 0.2]}}, "no hyperparameter 'dropout', and SGD no such option"),
            ({"exclude": ["net.*"]}, "nothing in Cosine can be pruned"),
        ],
        ids=without_addresses,
    )
    def test_before_training(self, given, message, tmp_path):
        given = dict(given)
        if "callbacks" in given:
            given["callbacks"] = [make() for make in given["callbacks"]]
        if "module" in given:
            given["module"] = given["module"]()

        class Never(Callback):
            def on_train_batch_start(self, *_):
                raise AssertionError("training began")

        given["callbacks"] = [*given.get("callbacks", []), Never()]
        with pytest.raises(UnsupportedSetup, match=message):
            fit(tmp_path, **given)

    @pytest.mark.parametrize(("dense", "best"), [(1, "the dense one"), (0, "one of the first cycle")])
    def test_a_monitored_checkpoint_is_warned_of(self, dense, best, tmp_path):
        keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
        with pytest.warns(UserWarning, match=f"{best} will be its best"):
            fit(tmp_path, callbacks=[keep], trainer={"enable_checkpointing": True}, dense_epochs=dense)

    def test_data_without_a_length(self, tmp_path):
        with pytest.raises(UnsupportedSetup, match=r"the training data has none\. Give Trainer"):
            fit(tmp_path, data=[DataLoader(Stream(), 16), loaders()[1]], module=TinyClassifier())

    @pytest.mark.parametrize(("batches", "warned"), [(4, False), (6, False), (9, True)])
    def test_a_stream_that_ends_before_its_limit(self, batches, warned, tmp_path, recwarn):
        data = [DataLoader(Stream(), 16), loaders()[1]]
        fit(tmp_path, data=data, module=TinyClassifier(), trainer={"limit_train_batches": batches})
        told = [str(one.message) for one in recwarn if "do not reach their end" in str(one.message)]
        assert bool(told) is warned
        assert all("had 6 batches, not 9" in one and "limit_train_batches=6" in one for one in told)
