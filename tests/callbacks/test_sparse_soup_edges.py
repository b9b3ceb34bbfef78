"""SparseModelSoup where something goes wrong: between phases, on resume, with its files, and with odd modules."""

import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_soup.callbacks import SparseModelSoup
from lightning_soup.callbacks import sparse_soup as driver
from lightning_soup.callbacks.retraining import retraining_rate
from lightning_soup.callbacks.sparse_soup_cooking import Cooking
from lightning_soup.callbacks.sparse_soup_files import CycleFiles
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.recipes import GreedySoup, LearnedSoup
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_live_average_contract import CutAt
from tests.callbacks.test_sparse_soup import SIZE, SMALL, Cosine, Everything, fit
from tests.callbacks.test_sparsity_mask import zeros
from tests.helpers.averages import loaders
from tests.helpers.boring import TinyClassifier
from tests.helpers.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*hold the same weights",
        "Be aware that when using `ckpt_path`, callbacks used",
        "The dirpath has changed from",
        "Found 1 module.* in eval mode at the start of training",
        ".*layers have no weight left",
        ".*has files of another fit, which this one writes over",
    )
]
BETWEEN = {"module": lambda: Cosine(batch_norm=True), "monitor": "val_loss", "retrain_epochs": 2}


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def stopped(folder, cut=0, every=1, module=Cosine, ckpt_path=None, seed=3, **options):
    """A fit that keeps checkpoints: one after each epoch, or one where an error ends it."""
    keep = ModelCheckpoint(
        dirpath=folder / "ckpt", save_top_k=-1, filename="{step}", every_n_epochs=every, save_on_exception=True
    )
    torch.manual_seed(seed)
    arguments = {"callbacks": [CutAt(cut), keep], "ckpt_path": ckpt_path, "seed": seed, **options}
    return fit(folder / "soup", module=module(), trainer={"enable_checkpointing": True}, **arguments)


class TestBetweenPhases:
    """Ctrl-C, a full disk or a broken validation there, with a ModelCheckpoint that saves what it finds."""

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        return Everything(*stopped(tmp_path_factory.mktemp("whole"), **BETWEEN))

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize(
        ("owner", "name", "number", "step"),
        [
            (CycleFiles, "write", 1, 6),  # the start of the first cycle: pruned already
            (driver, "make_optimizers_anew", 2, 6),
            (CycleFiles, "load", 1, 18),  # the second copy's turn
            (Cooking, "soup_of", 1, 30),
            (CycleFiles, "write_soup", 1, 30),  # cooked, and in the module
            (CycleFiles, "write", 4, 30),  # the start of the second cycle
            (CycleFiles, "write_soup", 2, 54),  # at the end of the fit
        ],
    )
    def test_what_is_saved_there_can_be_resumed(self, owner, name, number, step, error, whole, tmp_path):
        calls, original = [], getattr(owner, name)

        def fails(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                raise error("stop")
            return original(*args, **kwargs)

        with mock.patch.object(owner, name, fails), pytest.raises((error, SystemExit)):
            stopped(tmp_path, every=99, **BETWEEN)
        file = tmp_path / "ckpt" / f"step={step}.ckpt"
        Everything(*stopped(tmp_path, ckpt_path=file, seed=99, **BETWEEN)).same_as(whole)


class TestResumedOtherwise:
    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("first")
        with pytest.raises(RuntimeError, match="power cut"):
            stopped(folder, cut=16)
        return folder / "ckpt" / "step=12.ckpt"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 0.7}, r"with sparsity=0\.8, not 0\.7"),
            ({"cycles": 4, "copies": 1}, "cycles=2, not 4, copies=2, not 1"),
            ({"cycles": 1, "copies": 4}, "cycles=2, not 1, copies=2, not 4"),
            ({"vary": {"seed": [4, 5]}}, r"vary=\{\}, not \{'seed': \[4, 5\]\}"),
            ({"schedule": "clr"}, "schedule='llr', not 'clr'"),
            ({"selection": "uniform"}, "selection='global', not 'uniform'"),
            ({"lr_max": 0.1}, r"lr_max=None, not 0\.1"),
        ],
        ids=str,
    )
    def test_other_options_are_refused(self, options, message, file, tmp_path):
        with pytest.raises(UnsupportedSetup, match=f"{message}.*Resume it with the options it was made with"):
            fit(tmp_path, ckpt_path=file, **options)

    @pytest.mark.parametrize("key", ["phase", "dense_rates", "files"])
    def test_a_damaged_state_is_refused(self, key, file, tmp_path):
        checkpoint = torch.load(file, weights_only=True)
        del checkpoint["callbacks"]["SparseModelSoup"][key]
        torch.save(checkpoint, tmp_path / "x.ckpt")
        with pytest.raises(UnsupportedSetup, match=f"lacks {key}: the file is damaged.*Resume from another"):
            fit(tmp_path, ckpt_path=tmp_path / "x.ckpt")

    def test_a_trainer_that_has_ended_is_not_used_again(self, tmp_path):
        trainer = quiet_trainer(max_epochs=-1, callbacks=[SparseModelSoup(**SMALL, dirpath=str(tmp_path))])
        trainer.fit(Cosine(), *loaders())
        with pytest.raises(UnsupportedSetup, match=r"has trained for all 5 epochs before.*a new Trainer"):
            trainer.fit(Cosine(), *loaders())

    def test_another_seed_is_refused(self, file, tmp_path):
        soup = SparseModelSoup(**SMALL, seed=7, dirpath=str(tmp_path))
        with pytest.raises(UnsupportedSetup, match="seed=0, not 7"):
            quiet_trainer(max_epochs=-1, callbacks=[soup]).fit(Cosine(), *loaders(), ckpt_path=file)

    def test_recipe_and_metric_may_be_others(self, file, tmp_path):
        soup, _ = fit(tmp_path, ckpt_path=file, monitor="val_acc", recipe=GreedySoup())
        assert soup.records[-1]["soup"] is not None

    @pytest.mark.parametrize(
        ("epochs", "options", "message"),
        [
            (2, {}, "holds no state of it.*cannot tell what was pruned"),
            (1, {"schedule": "lrw"}, "schedule='lrw' needs its learning rates"),
            (5, {}, "all 5 epochs are over.*nothing was pruned"),
        ],
        ids=str,
    )
    def test_a_checkpoint_without_its_state_is_refused(self, epochs, options, message, tmp_path):
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(Cosine(), *loaders())
        trainer.save_checkpoint(tmp_path / "dense.ckpt")
        with pytest.raises(UnsupportedSetup, match=message):
            fit(tmp_path / "soup", ckpt_path=tmp_path / "dense.ckpt", **options)

    def test_a_dense_checkpoint_is_gone_on_from(self, tmp_path):
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(Cosine(), *loaders())
        trainer.save_checkpoint(tmp_path / "dense.ckpt")
        soup, _ = fit(tmp_path / "soup", ckpt_path=tmp_path / "dense.ckpt")
        assert soup.masks.pruned == round(SIZE * 0.8)


class TestFiles:
    def test_a_folder_that_was_moved_is_found_by_its_new_name(self, tmp_path):
        whole = Everything(*stopped(tmp_path / "whole"))
        with pytest.raises(RuntimeError, match="power cut"):
            stopped(tmp_path / "old", cut=16)
        shutil.move(tmp_path / "old", tmp_path / "new")
        file = tmp_path / "new" / "ckpt" / "step=12.ckpt"
        Everything(*stopped(tmp_path / "new", ckpt_path=file, seed=99)).same_as(whole)

    def test_a_relative_folder_is_found_from_elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        keep = ModelCheckpoint(dirpath="ckpt", save_top_k=-1, filename="{step}")
        with pytest.raises(RuntimeError, match="power cut"):
            fit("soup", callbacks=[CutAt(16), keep], trainer={"enable_checkpointing": True})
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        soup, _ = fit("soup", ckpt_path=tmp_path / "ckpt" / "step=12.ckpt")
        assert len(soup.records) == 2

    def test_fits_without_a_folder_do_not_write_over_each_other(self, tmp_path):
        for name in ("sparse_soup", "sparse_soup-v1", "sparse_soup-v2"):
            fit("", dirpath=None, trainer={"default_root_dir": tmp_path})
            assert (tmp_path / name / "cycle=2-soup.ckpt").exists()

    def test_a_resumed_fit_stays_in_its_folder(self, tmp_path):
        keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_top_k=-1, filename="{step}")
        options = {"dirpath": None, "trainer": {"default_root_dir": tmp_path, "enable_checkpointing": True}}
        fit("", **options)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("", callbacks=[CutAt(16), keep], **options)
        fit("", ckpt_path=tmp_path / "ckpt" / "step=12.ckpt", **options)
        assert len(list((tmp_path / "sparse_soup-v1").glob("cycle=*.ckpt"))) == 8
        assert not (tmp_path / "sparse_soup-v2").exists()

    def test_they_lie_beside_the_checkpoints_of_the_run(self, tmp_path):
        class Shared(CSVLogger):
            """Whose log_dir all runs share, as that of W&B."""

            log_dir = property(lambda self: f"{self.save_dir}/logs")

        logger = Shared(tmp_path, name="project", version="run7")
        fit("", dirpath=None, trainer={"logger": logger})
        assert (tmp_path / "project" / "run7" / "sparse_soup" / "cycle=2-soup.ckpt").exists()

    def test_a_given_folder_with_files_of_another_fit_is_warned_of(self, tmp_path):
        fit(tmp_path)
        with pytest.warns(UserWarning, match="has files of another fit, which this one writes over"):
            fit(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(LightningSoupError, match=r"SparseModelSoup: .*It is the dirpath of SparseModelSoup"):
            fit(tmp_path / "file")

    def test_a_report_that_fails_does_not_cost_the_soup(self, tmp_path):
        broken = mock.patch("lightning_soup.callbacks.sparse_soup_files.layer_costs", side_effect=RuntimeError("odd"))
        with broken, pytest.warns(UserWarning, match=r"the soup is in .*not all there \(RuntimeError: odd\)"):
            soup, _ = fit(tmp_path, keep_copies=False)
        assert soup.soup is not None
        assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["cycle=1-soup.ckpt", "cycle=2-soup.ckpt"]

    def test_writing_in_the_background(self, tmp_path):
        soup, _ = fit(tmp_path, trainer={"plugins": [AsyncCheckpointIO()]})
        assert len(soup.records) == 2

    def test_a_full_disk_is_said_on_every_rank_by_its_file(self, tmp_path):
        with (
            mock.patch("lightning_soup.callbacks.sparse_soup_files.torch.save", side_effect=OSError(28, "no space")),
            pytest.raises(LightningSoupError, match=r"cycle=1-start\.ckpt.*the disk is full"),
        ):
            fit(tmp_path)

    def test_what_a_module_makes_of_its_checkpoints_is_not_in_the_way(self, tmp_path):
        class Renames(Cosine):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = {f"model.{n}": v for n, v in checkpoint["state_dict"].items()}

        _, module = fit(tmp_path / "a", module=Renames())
        torch.manual_seed(3)
        _, plain = fit(tmp_path / "b")
        assert zeros(module) == zeros(plain)

    def test_numbers_of_numpy_are_written_so_that_the_safe_loader_reads_them(self, tmp_path):
        keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="x")
        options = {"sparsity": np.float64(0.8), "lr_max": np.float64(0.1), "vary": {"momentum": np.array([0.5, 0.9])}}
        fit(tmp_path / "soup", callbacks=[keep], trainer={"enable_checkpointing": True}, **options)
        assert torch.load(tmp_path / "ckpt" / "x.ckpt", weights_only=True)["callbacks"]["SparseModelSoup"]["step"]


class TestModules:
    def test_frozen_statistics_stay(self, tmp_path):
        class Frozen(Cosine):
            def __init__(self):
                super().__init__(batch_norm=True)
                self.net[1].eval()

        _, module = fit(tmp_path, module=Frozen(), monitor="val_acc")
        assert not module.net[1].running_mean.any()
        assert not open_checkpoint(tmp_path / "cycle=2-soup.ckpt")["net.1.running_mean"].any()

    def test_statistics_are_estimated_without_a_validation_step(self, tmp_path):
        class Trains(Cosine):
            validation_step = LightningModule.validation_step

            def forward(self, x):
                return self.net(x)

        train, _ = loaders()
        module, soup = Trains(batch_norm=True), SparseModelSoup(**SMALL, dirpath=str(tmp_path))
        quiet_trainer(max_epochs=-1, callbacks=[soup]).fit(module, train)
        means = torch.stack([module.net[0](x).detach().mean(0) for x, _ in train])
        torch.testing.assert_close(module.net[1].running_mean, means.mean(0))

    def test_statistics_that_validation_does_not_reach_stay(self, tmp_path):
        class Auxiliary(Cosine):
            def __init__(self):
                super().__init__(batch_norm=True)
                self.side = nn.BatchNorm1d(8)

            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + self.side(batch[0]).square().mean()

        _, module = fit(tmp_path, module=Auxiliary())
        assert module.side.running_mean.any()
        assert module.net[1].num_batches_tracked == 6

    @pytest.mark.parametrize("recipe", [None, GreedySoup()])
    def test_a_weight_that_happens_to_be_zero_in_one_copy(self, recipe, tmp_path):
        class Vanish(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch in (2, 4):  # the second copies
                    with torch.no_grad():
                        weight = pl_module.net[0].weight
                        weight.view(-1)[weight.abs().argmax()] = 0

        soup, _ = fit(tmp_path, callbacks=[Vanish()], recipe=recipe, monitor="val_loss" if recipe else None)
        assert soup.masks.pruned == round(SIZE * 0.8)

    def test_one_cycle_schedules_give_their_peak(self, tmp_path):
        class OneCycle(TinyClassifier):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
                total = self.trainer.estimated_stepping_batches
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        rates = Rates()
        fit(tmp_path, module=OneCycle(), dense_epochs=0, callbacks=[rates])
        assert max(rates.seen) == pytest.approx(0.1)

    def test_an_optimizer_that_is_made_once_begins_anew_too(self, tmp_path):
        """As LightningCLI's ``--optimizer``; beside one that makes a new one each time."""

        class Once(TinyClassifier):
            def __init__(self):
                super().__init__()
                self.made = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

            def configure_optimizers(self):
                return self.made

        class Anew(TinyClassifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

        ends = []
        for make in (Once, Anew):
            torch.manual_seed(3)
            _, module = fit(tmp_path / make.__name__, module=make(), vary={"weight_decay": [0.1, 0.2]})
            ends.append(module.state_dict())
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), name

    def test_rates_of_zero_are_refused(self, tmp_path):
        class Still(TinyClassifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.0)

        with pytest.raises(UnsupportedSetup, match="and they are 0"):
            fit(tmp_path, module=Still())

    def test_layers_that_are_left_without_weights_are_named(self, tmp_path):
        with pytest.warns(UserWarning, match=r"1 of 2 layers have no weight left: net\.3\.weight"):
            fit(tmp_path, sparsity=0.9, selection="rows", cycles=1)


class TestVaried:
    def test_an_option_that_all_groups_are_without(self, tmp_path):
        class Plain(TinyClassifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.05)

        seen = []

        class See(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen.append(trainer.optimizers[0].param_groups[0]["weight_decay"])

        fit(tmp_path, module=Plain(), callbacks=[See()], vary={"weight_decay": [0.1, 0.2]})
        assert seen == [0, 0.1, 0.2, 0.1, 0.2]

    def test_rates_that_vary_are_adapted_too(self, tmp_path):
        rates = []

        class See(Callback):
            def on_train_batch_start(self, trainer, *_):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        options = {"dense_epochs": 0, "cycles": 1, "schedule": "allr", "pretraining_epochs": 10}
        fit(tmp_path, callbacks=[See()], vary={"lr_max": [0.1, 0.2]}, **options)
        assert 0.01 <= rates[0] < 0.1  # six steps have no warm-up
        assert rates[6] == pytest.approx(2 * rates[0])

    @pytest.mark.parametrize(
        ("vary", "message"),
        [
            ({"lr": [0.1, 0.2]}, "changes learning rates.*Vary lr_max"),
            ({"dropout": [0.1, 0.2]}, "changes nothing: only what .*configure_optimizers reads"),
            ({"device": [1, 2]}, "no optimizer can be made with these .*has no setter"),
            ({"weight_decay": [-1.0, 0.1]}, "no optimizer can be made with these .*Invalid weight_decay"),
        ],
        ids=str,
    )
    def test_what_has_no_effect_is_refused(self, vary, message, tmp_path):
        class Drops(Cosine):
            def __init__(self, dropout: float = 0.1):
                super().__init__()
                self.save_hyperparameters()

        with pytest.raises(UnsupportedSetup, match=message):
            fit(tmp_path, module=Drops(), vary=vary)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"schedule": "lrw", "lr_max": 0.1}, "so lr_max has no meaning"),
            ({"schedule": "ft", "vary": {"lr_max": [0.1, 0.2]}}, "so lr_max has no meaning"),
            ({"vary": {"lr_max": [0.1, 0.0]}}, "expected numbers above 0"),
            ({"vary": {"weight_decay": 0.1}}, "expected a list of 2 values"),
            ({"lr_min": -1}, "lr_min=-1.0: expected 0 or more"),
            ({"retrain_epochs": True}, "retrain_epochs=True: expected 1 or more"),
            ({"pretraining_epochs": 0}, "pretraining_epochs=0: expected 1 or more"),
            ({"retrain_epochs": None, "budget": 9, "vary": {"retrain_epochs": [1, 2]}}, "and so does budget"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(UnsupportedSetup, match=message):
            SparseModelSoup(**{**SMALL, **options})

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            (lambda: GradientAccumulationScheduler({0: 1, 3: 2}), "the same throughout"),
            (lambda: BackboneFinetuning(2), "prune in a fit of its own with dense_epochs=0"),
        ],
    )
    def test_callbacks(self, callback, message, tmp_path):
        with pytest.raises(UnsupportedSetup, match=message):
            fit(tmp_path, callbacks=[callback()])

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_a_recipe_without_its_loss_ends_the_first_validation(self, sanity, tmp_path):
        class Silent(Cosine):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)

        options = {"recipe": LearnedSoup(epochs=1), "monitor": "val_loss", "trainer": {"num_sanity_val_steps": sanity}}
        with pytest.raises(UnsupportedSetup, match=r"LearnedSoup learns from .* of Silent returned NoneType\. Let it"):
            fit(tmp_path, module=Silent(), callbacks=[CutAt(1 if sanity else 7)], **options)
        fit(tmp_path / "one", module=Silent(), copies=1, **options)  # whose copy is the soup

    @pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
    def test_no_optimizer(self, tmp_path):
        class Without(Cosine):
            def configure_optimizers(self):
                return None

        with pytest.raises(UnsupportedSetup, match=r"needs an optimizer, and Without\.configure_optim.* returns none"):
            fit(tmp_path, module=Without())

    @pytest.mark.parametrize("options", [{}, {"lr_max": 0.05}, {"vary": {"lr_max": [1.0, 0.05]}}], ids=str)
    def test_a_cosine_that_would_rise(self, options, tmp_path):
        with pytest.raises(UnsupportedSetup, match=r"lr_min=0\.1 is above the largest rate of a retraining, 0\.05"):
            fit(tmp_path, schedule="clr", lr_min=0.1, **options)

    def test_a_constant_accumulation_is_served(self, tmp_path):
        rates = Rates()
        fit(tmp_path, callbacks=[GradientAccumulationScheduler({0: 2}), rates], dense_epochs=0)
        assert rates.seen[:6] == pytest.approx([0.05, 0.05, 0.05 * 2 / 3, 0.05 * 2 / 3, 0.05 / 3, 0.05 / 3])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"selection": "2:8", "sparsity": 0.5}, "2:8 prunes 0.75 of the weights at once, not 0.5"),
            ({"selection": "8:16", "sparsity": 0.5}, "numbers of inputs .* that divide by 16"),
        ],
        ids=str,
    )
    def test_groups_that_do_not_fit_are_told_before_the_dense_training(self, options, message, tmp_path):
        rates = Rates()
        with pytest.raises(UnsupportedSetup, match=message):
            fit(tmp_path, callbacks=[rates], cycles=1, **options)
        assert not rates.seen

    def test_a_metric_without_validation(self, tmp_path):
        with pytest.raises(UnsupportedSetup, match="there is no validation"):
            fit(tmp_path, monitor="val_acc", trainer={"limit_val_batches": 0})

    @pytest.mark.parametrize("monitor", ["val_accuracy", "sparsity"])
    def test_a_metric_that_is_not_logged_ends_the_first_epoch(self, monitor, tmp_path):
        rates = Rates()
        with pytest.raises(UnsupportedSetup, match=r"SparseModelSoup\(monitor='val_acc'\)"):
            fit(tmp_path, monitor=monitor, callbacks=[rates], trainer={"num_sanity_val_steps": 0})
        assert len(rates.seen) == 6


def test_rates_are_never_negative():
    assert retraining_rate("llr", 30, 20, 0.1) == 0
    assert retraining_rate("clr", 30, 20, 0.1, 0.01) == pytest.approx(0.01)


def test_a_second_fit_has_no_soup_of_the_first(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    soup, _ = fit(tmp_path)
    assert soup.soup is not None
    with pytest.warns(UserWarning, match="stopped in the dense training"):
        quiet_trainer(max_epochs=-1, callbacks=[soup, Stop()]).fit(Cosine(), *loaders())
    assert soup.soup is None


def test_parts_that_are_compiled(tmp_path):
    module = Cosine()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    soup = SparseModelSoup(**SMALL, dirpath=str(tmp_path))
    quiet_trainer(max_epochs=-1, callbacks=[soup]).fit(module, *loaders())
    assert soup.masks.keys() == {"net.0.weight", "net.3.weight"}
    assert isinstance(module.net[3], nn.Linear)
