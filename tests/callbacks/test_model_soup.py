import copy
import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_soup.callbacks import ModelSoup
from lightning_soup.errors import LightningSoupError, RecipeError, UnsupportedSetup, UnwritableOutput
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import AdaptiveSoup, GreedySoup, InterpolatedSoup, LearnedSoup, Recipe, UniformSoup, recook
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks


def fit(tmp_path, soup, *, callbacks=(), checkpoint=None, module=None, data=None, epochs=5, ckpt_path=None, **options):
    torch.manual_seed(1)
    kept = checkpoint or ModelCheckpoint(tmp_path / "kept", monitor="val_acc", mode="max", save_top_k=3)
    options = {"max_epochs": epochs, "enable_checkpointing": True, "num_sanity_val_steps": 0, **options}
    trainer = quiet_trainer(callbacks=[*callbacks, kept, soup], default_root_dir=tmp_path, **options)
    module = module or TinyClassifier()
    trainer.fit(module, datamodule=data or TinyData(), ckpt_path=ckpt_path)
    return trainer, module, kept


@pytest.mark.parametrize(
    "recipe", [UniformSoup(), GreedySoup(), LearnedSoup(epochs=2), InterpolatedSoup()], ids=lambda r: type(r).__name__
)
def test_the_soup_of_what_model_checkpoint_kept(tmp_path, recipe):
    soup = ModelSoup(recipe)
    _, module, kept = fit(tmp_path, soup)
    start = [str(tmp_path / "kept" / "soup-start.ckpt")] if isinstance(recipe, InterpolatedSoup) else []
    assert [str(item.source) for item in soup.soup.ingredients] == [*start, *kept.best_k_models]
    expected = combine([item.weights for item in soup.soup.ingredients], soup.soup.coefficients, accumulate="float64")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    outside = ModuleEvaluator(TinyClassifier(), TinyData())
    assert soup.soup.score == pytest.approx(outside.score(expected))
    saved = TinyClassifier.load_from_checkpoint(soup.soup_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), module.parameters(), strict=True))
    assert soup.soup_path.parent == tmp_path / "kept"


def test_a_run_that_went_far_from_its_start_is_souped_all_the_same(tmp_path):
    class Jumping(TinyClassifier):
        def on_train_epoch_start(self):
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.randn_like(parameter))

    soup = ModelSoup(last=2)
    fit(tmp_path, soup, module=Jumping())
    assert soup.soup.recipe == "UniformSoup"


class Ending(Callback):
    """The weights that training ended with."""

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_leave_live_puts_the_trained_weights_back(tmp_path):
    ending = Ending()
    _, module, _ = fit(tmp_path, ModelSoup(leave="live"), callbacks=[ending])
    assert all(torch.equal(value, ending.weights[name]) for name, value in module.state_dict().items())


class Witness(Callback):
    """Counts validations, and notes the Trainer's public state before the soup is cooked."""

    def __init__(self):
        self.validations = 0

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1

    def on_fit_end(self, trainer, pl_module):
        self.before = snapshot(trainer)


def snapshot(trainer):
    loop = trainer.fit_loop
    return copy.deepcopy(
        {
            "state": (trainer.state.fn, trainer.state.stage),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "progress": loop.state_dict(),
            "step": trainer.global_step,
            "rng": torch.get_rng_state().tolist(),
            "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        }
    )


class Last(Witness):
    """After the soup in the list: sees what it left behind."""

    def on_fit_end(self, trainer, pl_module):
        self.after = snapshot(trainer)


def test_trainer_and_other_callbacks_are_unharmed(tmp_path):
    witness, last, stopping = Witness(), Last(), EarlyStopping("val_acc", patience=50, mode="max")
    soup = ModelSoup(GreedySoup())
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_acc", mode="max", save_top_k=3)
    torch.manual_seed(1)
    trainer = quiet_trainer(
        callbacks=[witness, stopping, soup, last, kept],
        max_epochs=4,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    assert witness.validations == 4
    assert stopping.wait_count < 4
    assert last.after == witness.before
    assert len(kept.best_k_models) == 3
    trainer.fit_loop.max_epochs = 6  # and training can go on
    trainer.fit(trainer.lightning_module, datamodule=TinyData())
    assert trainer.current_epoch == 6


@pytest.mark.parametrize("last", [2, 3])
def test_the_last_epochs(tmp_path, last):
    weights = []

    class Record(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    soup = ModelSoup(last=last)
    _, module, _ = fit(tmp_path, soup, callbacks=[Record()])
    expected = combine(weights[-last:], [1 / last] * last)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert len(list((tmp_path / "kept").glob("soup-epoch=*.ckpt"))) == last


def test_the_last_epochs_across_a_resume(tmp_path):
    whole = ModelSoup(last=3)
    fit(tmp_path / "whole", whole)
    halves = [ModelSoup(last=3), ModelSoup(last=3)]
    saved = ModelCheckpoint(tmp_path / "half" / "kept", save_last=True, save_top_k=0)
    fit(tmp_path / "half", halves[0], checkpoint=saved, epochs=3)
    again = ModelCheckpoint(tmp_path / "half" / "kept", save_last=True, save_top_k=0)
    fit(tmp_path / "half", halves[1], checkpoint=again, ckpt_path=tmp_path / "half" / "kept" / "last.ckpt")
    assert [item.name for item in halves[1].soup.ingredients] == ["soup-epoch=2", "soup-epoch=3", "soup-epoch=4"]


def test_the_soup_is_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version=0)
    soup = ModelSoup(GreedySoup())
    fit(tmp_path, soup, logger=logger)
    text = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    assert "soup_val_acc" in text
    assert f"{soup.soup.score}" in text


@pytest.mark.parametrize(
    ("soup", "checkpoint", "options", "message"),
    [
        (lambda: ModelSoup(), lambda d: ModelCheckpoint(d, monitor="val_acc", mode="max"), {}, "keeps 1"),
        (lambda: ModelSoup(), lambda d: ModelCheckpoint(d, save_top_k=-1), {}, "without monitor"),
        (lambda: ModelSoup(GreedySoup(), last=3), lambda d: ModelCheckpoint(d), {}, "chooses by a validation metric"),
        (
            lambda: ModelSoup(GreedySoup()),
            lambda d: ModelCheckpoint(d, monitor="val_acc", save_top_k=2),
            {"limit_val_batches": 0},
            "validation data",
        ),
    ],
    ids=["one kept", "no monitor", "no metric", "no validation"],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, soup, checkpoint, options, message):
    class NoTraining(TinyClassifier):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training started")

    with pytest.raises(UnsupportedSetup, match=message):
        fit(tmp_path, soup(), checkpoint=checkpoint(tmp_path / "kept"), module=NoTraining(), **options)


def test_options_are_checked():
    with pytest.raises(UnsupportedSetup, match="at least the last 2"):
        ModelSoup(last=1)
    with pytest.raises(UnsupportedSetup, match="leave="):
        ModelSoup(leave="both")
    with pytest.raises(UnsupportedSetup, match="filename="):
        ModelSoup(filename="soup.onnx")


def test_no_checkpoint_callback(tmp_path):
    trainer = quiet_trainer(callbacks=[ModelSoup()], max_epochs=1)
    with pytest.raises(UnsupportedSetup, match="needs checkpoints to soup"):
        trainer.fit(TinyClassifier(), datamodule=TinyData())


class Failing(Recipe):
    """No dataclass, as a user may write one; leaves a candidate in the module and fails."""

    needs_evaluator = True

    def cook(self, ingredients, evaluator=None, progress=None):
        for value in evaluator.slot().values():
            value.zero_()
        raise RecipeError("nothing to be done")


def test_a_failing_recipe_leaves_the_live_weights(tmp_path):
    module, ending = TinyClassifier(), Ending()
    with pytest.raises(RecipeError, match="nothing to be done"):
        fit(tmp_path, ModelSoup(Failing()), module=module, callbacks=[ending])
    assert all(torch.equal(value, ending.weights[name]) for name, value in module.state_dict().items())


def test_an_unknown_metric_is_said_at_the_first_validation(tmp_path):
    class TwoEpochs(TinyClassifier):
        def on_train_epoch_start(self):
            assert self.current_epoch == 0

    with pytest.raises(UnsupportedSetup, match=r"'val_auc' is not logged in validation\. Logged: val_acc, val_loss"):
        fit(tmp_path, ModelSoup(GreedySoup(), monitor="val_auc"), module=TwoEpochs())


def test_an_unknown_metric_does_not_matter_to_a_uniform_soup(tmp_path):
    soup = ModelSoup(monitor="val_auc")
    with pytest.warns(UserWarning, match="the soup gets no score: the metric 'val_auc' is not logged in validation"):
        fit(tmp_path, soup)
    assert soup.soup.score is None


class Logging(TinyClassifier):
    """Logs its training loss, and can tell when it is trained for a second epoch."""

    second_epoch = staticmethod(lambda: None)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.second_epoch()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


class OneEpoch(Logging):
    second_epoch = staticmethod(lambda: pytest.fail("trained on after the first validation"))


@pytest.mark.parametrize("last", [None, 2])
def test_a_metric_of_training_is_refused_at_the_first_validation(tmp_path, last):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="train_loss", save_top_k=3)
    message = (
        r"GreedySoup chooses by a validation metric, but the metric 'train_loss' is not logged in validation\. "
        r"Logged: val_acc, val_loss\. Training logs 'train_loss', .*ModelSoup\(monitor='val_acc'\)"
    )
    with pytest.raises(UnsupportedSetup, match=message):
        fit(tmp_path, ModelSoup(GreedySoup(), last=last), checkpoint=kept, module=OneEpoch())


def test_a_metric_of_another_callback_is_refused_at_the_first_validation(tmp_path):
    class Reporting(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics["other"] = torch.tensor(1.0)

    with pytest.raises(UnsupportedSetup, match=r"A callback reports 'other', but callbacks are not at work"):
        fit(tmp_path, ModelSoup(GreedySoup(), monitor="other"), callbacks=[Reporting()], module=OneEpoch())


def test_the_sanity_check_warns_of_a_metric_that_is_not_logged(tmp_path):
    class NoTraining(TinyClassifier):
        def training_step(self, batch, batch_idx):
            raise InterruptedError

    soup = ModelSoup(GreedySoup(), monitor="val_auc")
    message = "in the sanity check the metric 'val_auc' is not logged in validation"
    with pytest.warns(UserWarning, match=message), pytest.raises(InterruptedError):
        fit(tmp_path, soup, module=NoTraining(), num_sanity_val_steps=2)


def test_a_metric_that_the_sanity_check_does_not_log_is_no_error(tmp_path):
    class Sometimes(TinyClassifier):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking and self.current_epoch % 2 == 0:
                self.log("val_norm", self.net[0].weight.norm())

    soup = ModelSoup(GreedySoup(), monitor="val_norm", last=2)
    with pytest.warns(UserWarning, match="in the sanity check the metric 'val_norm' is not logged"):
        fit(tmp_path, soup, module=Sometimes(), epochs=4, num_sanity_val_steps=2)
    assert soup.soup.metric == "val_norm"


def test_the_metric_of_one_of_several_loaders(tmp_path):
    class TwoLoaders(TinyData):
        def val_dataloader(self):
            return [super().val_dataloader(), self.test_dataloader()[1]]

    class Both(TinyClassifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    kept = ModelCheckpoint(tmp_path / "kept", save_top_k=0)
    soup = ModelSoup(GreedySoup(), last=2, monitor="val_loss/dataloader_idx_1")
    fit(tmp_path, soup, checkpoint=kept, module=Both(), data=TwoLoaders(), epochs=2)
    assert soup.soup.score is not None
    refused = ModelSoup(GreedySoup(), last=2, monitor="val_loss")
    with pytest.raises(UnsupportedSetup, match="Logged: val_loss/dataloader_idx_0, val_loss/dataloader_idx_1"):
        fit(tmp_path, refused, checkpoint=kept, module=Both(), data=TwoLoaders(), epochs=2)


def test_a_uniform_soup_is_told_at_the_first_validation_that_it_gets_no_score(tmp_path):
    told = []

    class Asking(Logging):
        second_epoch = staticmethod(lambda: told.extend(str(found.message) for found in caught))

    kept = ModelCheckpoint(tmp_path / "kept", monitor="train_loss", save_top_k=3)
    soup = ModelSoup()
    with pytest.warns(UserWarning, match="gets no score") as caught:
        fit(tmp_path, soup, checkpoint=kept, module=Asking())
    assert len([message for message in told if "the soup gets no score: the metric 'train_loss'" in message]) == 1
    assert len([found for found in caught if "gets no score" in str(found.message)]) == 1
    assert soup.soup.score is None
    assert soup.soup_path.exists()


def test_a_soup_is_scored_where_no_validation_came_before(tmp_path):
    soup = ModelSoup(last=2, monitor="val_acc")
    saved = ModelCheckpoint(tmp_path / "kept", save_top_k=0)
    fit(tmp_path, soup, checkpoint=saved, epochs=3, check_val_every_n_epoch=9)
    assert soup.soup.score is not None


class NoTraining(TinyClassifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training started")

    def validation_step(self, batch, batch_idx):
        raise AssertionError("validation started")


@pytest.mark.parametrize("whose", ["ModelCheckpoint", "ModelSoup"])
@pytest.mark.parametrize("recipe", [UniformSoup(), InterpolatedSoup()], ids=lambda r: type(r).__name__)
def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, whose, recipe):
    (tmp_path / "taken").write_text("")
    folder = tmp_path / "taken" / "kept"
    soup = ModelSoup(recipe, dirpath=str(folder) if whose == "ModelSoup" else None)
    kept = ModelCheckpoint(tmp_path if whose == "ModelSoup" else folder, monitor="val_acc", mode="max", save_top_k=3)
    with pytest.raises(UnwritableOutput, match=r"taken/kept/soup\.ckpt: cannot be written .*dirpath of ModelSoup"):
        fit(tmp_path, soup, checkpoint=kept, module=NoTraining(), num_sanity_val_steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    class Stopped(TinyClassifier):
        def on_train_start(self):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(tmp_path, ModelSoup(last=2), module=Stopped())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_local_is_refused(tmp_path):
    with pytest.raises(UnsupportedSetup, match="memory:/kept is no local folder"):
        fit(tmp_path, ModelSoup(), checkpoint=ModelCheckpoint("memory://kept", monitor="val_acc", save_top_k=2))


def test_wise_ft_starts_from_the_weights_before_the_first_step(tmp_path):
    module = TinyClassifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    soup = ModelSoup(InterpolatedSoup(alpha=0.0), last=2)
    fit(tmp_path, soup, module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_second_fit_with_the_same_callbacks_does_not_take_files_of_the_first(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", mode="min", save_top_k=-1)
    soup = ModelSoup()
    fit(tmp_path, soup, checkpoint=kept, epochs=2)
    first = {str(item.source) for item in soup.soup.ingredients}
    fit(tmp_path, soup, checkpoint=kept, epochs=3)
    assert not first & {str(item.source) for item in soup.soup.ingredients}
    assert len(soup.soup.ingredients) == 3


@pytest.mark.parametrize(
    "make",
    [lambda: ModelSoup(), lambda: ModelSoup(last=2), lambda: ModelSoup(InterpolatedSoup(alpha=0.0), last=2)],
    ids=["kept", "last", "with the start"],
)
def test_a_second_fit_with_nothing_left_to_train_keeps_the_soup(tmp_path, make):
    soup = make()
    trainer, module, _ = fit(tmp_path, soup)
    cooked, path, before = soup.soup, soup.soup_path, copy.deepcopy(module.state_dict())
    files = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    trainer.fit(module, datamodule=TinyData())
    assert (soup.soup, soup.soup_path) == (cooked, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == files


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_fit_that_is_resumed_at_its_end_has_its_soup(tmp_path):
    first, soup = ModelSoup(last=2), ModelSoup(last=2)
    _, _, kept = fit(tmp_path, first, checkpoint=ModelCheckpoint(tmp_path / "kept", save_last=True))
    again = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, soup, checkpoint=again, ckpt_path=kept.last_model_path)
    assert [str(item.source) for item in soup.soup.ingredients] == [str(item.source) for item in first.soup.ingredients]


def test_a_module_with_extra_state(tmp_path):
    class Counting(TinyClassifier):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    soup = ModelSoup(GreedySoup())
    fit(tmp_path, soup, module=Counting())
    assert soup.soup.score is not None


def test_two_soups_of_one_fit(tmp_path):
    uniform, greedy = ModelSoup(filename="uniform.ckpt"), ModelSoup(GreedySoup(), filename="greedy.ckpt")
    fit(tmp_path, uniform, callbacks=[greedy])
    assert uniform.soup_path.exists()
    assert greedy.soup_path.exists()


def test_epochs_that_are_gone_on_resume(tmp_path):
    saved = ModelCheckpoint(tmp_path / "kept", save_last=True, save_top_k=0)
    fit(tmp_path, ModelSoup(last=3), checkpoint=saved, epochs=3)
    (tmp_path / "kept" / "soup-epoch=2.ckpt").unlink()
    again = ModelCheckpoint(tmp_path / "kept", save_last=True, save_top_k=0)
    soup = ModelSoup(last=3)
    with pytest.warns(UserWarning, match="soup-epoch=2.ckpt of the earlier fit is gone"):
        fit(tmp_path, soup, checkpoint=again, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert [item.name for item in soup.soup.ingredients] == ["soup-epoch=1", "soup-epoch=3", "soup-epoch=4"]


def test_a_compiled_layer(tmp_path):
    module = TinyClassifier()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    soup = ModelSoup(GreedySoup())
    fit(tmp_path, soup, module=module)
    assert "net.0._orig_mod.weight" in torch.load(soup.soup_path, weights_only=True)["state_dict"]
    assert "net.0.weight" in open_checkpoint(soup.soup_path)


def test_half_precision_and_accumulation(tmp_path):
    soup = ModelSoup(GreedySoup())
    _, module, _ = fit(tmp_path, soup, precision="bf16-true", accumulate_grad_batches=2)
    assert soup.soup.weights()["net.0.weight"].dtype == torch.bfloat16
    assert torch.equal(module.net[0].weight.cpu(), soup.soup.weights()["net.0.weight"])


def test_fast_dev_run_is_left_alone(tmp_path):
    fit(tmp_path, ModelSoup(), fast_dev_run=True, checkpoint=ModelCheckpoint(tmp_path))


def on_a_rank(folder, recipe):
    torch.set_num_threads(1)
    soup = ModelSoup(recipe)
    trainer, module, _ = fit(folder, soup, devices=2, strategy="ddp")
    return {
        "weights": {name: value.numpy() for name, value in module.state_dict().items()},
        "coefficients": soup.soup.coefficients,
        "score": soup.soup.score,
        "path": str(soup.soup_path),
        "state": str(trainer.state.fn),
    }


def failing_rank(folder):
    """Rank 1 alone misses a file: both must say so, and none wait for the other."""
    torch.set_num_threads(1)

    class Losing(ModelSoup):
        def _ingredients(self, trainer, metric):
            if trainer.global_rank == 1:
                self._folder(trainer)
                os.path.exists = lambda path: False
            return super()._ingredients(trainer, metric)

    try:
        fit(folder, Losing(), devices=2, strategy="ddp")
    except LightningSoupError as error:
        return str(error)


def test_one_rank_that_fails_does_not_leave_the_other_waiting(tmp_path):
    first, second = run_on_two_ranks(failing_rank, tmp_path)
    assert "another rank misses one" in first
    assert "rank 1 cannot see" in second


def test_two_ranks_agree(tmp_path):
    results = {}
    for recipe in (UniformSoup(), GreedySoup(), LearnedSoup(epochs=1, batch_size=30)):
        name = type(recipe).__name__
        results[name] = run_on_two_ranks(on_a_rank, tmp_path / name, recipe)
    for first, second in results.values():
        assert first["score"] == second["score"]
        assert first["coefficients"] == second["coefficients"]
        assert first["path"] == second["path"]
        for name, value in first["weights"].items():
            assert (value == second["weights"][name]).all()
        saved = open_checkpoint(first["path"])
        whole = ModuleEvaluator(TinyClassifier(), TinyData())  # 60 samples: two ranks of 30
        assert first["score"] == pytest.approx(whole.score(saved))
        assert all((saved[name].numpy() == value).all() for name, value in first["weights"].items())


def test_wise_ft_without_its_start_is_refused_on_resume(tmp_path):
    saved = ModelCheckpoint(tmp_path / "kept", save_last=True, save_top_k=0)
    fit(tmp_path, ModelSoup(last=2), checkpoint=saved, epochs=2)
    again = ModelCheckpoint(tmp_path / "kept", save_last=True, save_top_k=0)
    soup = ModelSoup(InterpolatedSoup(alpha=0.5), last=2)
    with pytest.raises(UnsupportedSetup, match="needs the weights before the first step"):
        fit(tmp_path, soup, checkpoint=again, ckpt_path=tmp_path / "kept" / "last.ckpt")


def refusing_rank(folder, kind):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Lightning has a word on what only rank 0 logs

    class OnRankZero(TinyClassifier):
        def on_validation_epoch_end(self):
            if self.trainer.is_global_zero:
                self.log("val_one", 1.0, rank_zero_only=True)

    try:
        if kind == "folder":
            fit(folder, ModelSoup(dirpath=str(folder / "taken")), module=NoTraining(), devices=2, strategy="ddp")
        else:
            fit(folder, ModelSoup(GreedySoup(), monitor="val_one"), module=OnRankZero(), devices=2, strategy="ddp")
    except LightningSoupError as error:
        return f"{type(error).__name__}: {error}"


def test_both_ranks_say_that_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("")
    first, second = run_on_two_ranks(refusing_rank, tmp_path, "folder")
    assert first == second
    assert first.startswith(f"UnwritableOutput: ModelSoup: {tmp_path}/taken/soup.ckpt: cannot be written")


def test_both_ranks_say_that_one_does_not_log_the_metric(tmp_path):
    first, second = run_on_two_ranks(refusing_rank, tmp_path, "metric")
    assert "'val_one' is logged in validation on some ranks only" in first
    assert "'val_one' is not logged in validation" in second


def test_the_recipe_inside_an_interpolation_needs_a_metric_too(tmp_path):
    soup = ModelSoup(InterpolatedSoup(soup=GreedySoup()), last=2)
    with pytest.raises(UnsupportedSetup, match="GreedySoup chooses by a validation metric"):
        fit(tmp_path, soup, checkpoint=ModelCheckpoint(tmp_path / "kept"), module=NoTraining())


def batch_norm():
    return TinyClassifier(batch_norm=True)


def means_of_training_data(weights):
    """Of what goes into the BatchNorm layer: its batches are of one size, so their order does not matter."""
    return (TinyData().train.tensors[0] @ weights["net.0.weight"].T + weights["net.0.bias"]).mean(0)


@pytest.mark.parametrize("recipe", [UniformSoup(), GreedySoup(), LearnedSoup(epochs=1)], ids=lambda r: type(r).__name__)
def test_recalibration(tmp_path, recipe):
    plain = ModelSoup(recipe, filename="plain.ckpt", leave="live")
    witness, fresh, last = Witness(), ModelSoup(recipe, recalibrate=True), Last()
    _, module, _ = fit(tmp_path, last, callbacks=[plain, witness, fresh], module=batch_norm())
    weights, old = module.state_dict(), plain.soup.weights()
    changed = [name for name, value in weights.items() if name in old and not torch.equal(value, old[name])]
    assert changed == ["net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"]
    torch.testing.assert_close(weights["net.1.running_mean"], means_of_training_data(weights))
    outside = ModuleEvaluator(batch_norm(), TinyData())
    assert fresh.soup.score == pytest.approx(outside.score(open_checkpoint(fresh.soup_path)))
    trial = fresh.soup.history[-1]
    assert trial.label == "BatchNorm recalibrated"
    assert trial.values == {"before": plain.soup.score, "after": fresh.soup.score}
    assert any(trial.reason in note for note in open_checkpoint(fresh.soup_path).provenance["notes"])
    assert last.after == witness.before
    with pytest.warns(UserWarning, match="copied from it, not cooked again"):
        again = recook(fresh.soup_path)
    assert open_checkpoint(again).digest() == open_checkpoint(fresh.soup_path).digest()


def test_recalibration_without_batch_norm_changes_nothing(tmp_path):
    plain, fresh = ModelSoup(filename="plain.ckpt"), ModelSoup(recalibrate=True)
    with pytest.warns(UserWarning, match="nothing was recalibrated: the model has no BatchNorm layer"):
        fit(tmp_path, fresh, callbacks=[plain])
    assert open_checkpoint(fresh.soup_path).digest() == open_checkpoint(plain.soup_path).digest()
    assert fresh.soup.score == plain.soup.score


def test_a_recalibration_that_fails_does_not_cost_the_soup(tmp_path):
    class Unlike(TinyData):
        def train_dataloader(self):
            return DataLoader(Dictionaries(self.train), 16)

    class Dictionaries(list):
        def __init__(self, data):
            super().__init__({"x": x, "y": y} for x, y in data)

    class Reading(TinyClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    soup = ModelSoup(recalibrate=True)
    with pytest.warns(UserWarning, match="statistics were not estimated anew"):
        _, module, _ = fit(tmp_path, soup, module=Reading(batch_norm=True), data=Unlike())
    assert not soup.soup.statistics
    assert all(torch.equal(v, soup.soup.weights()[n]) for n, v in module.state_dict().items() if n.startswith("net"))


def test_recalibration_without_a_metric_is_refused_before_training(tmp_path):
    with pytest.raises(UnsupportedSetup, match="recalibrate=True tells the score before and after"):
        fit(tmp_path, ModelSoup(last=2, recalibrate=True), checkpoint=ModelCheckpoint(tmp_path), module=NoTraining())


def test_recalibration_on_training_data_without_end_is_refused_before_training(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(lambda: (torch.randn(8), torch.tensor(0)), None)

    class Streaming(TinyData):
        def train_dataloader(self):
            return DataLoader(Endless(), 16)

    class Untrained(TinyClassifier):
        def training_step(self, batch, batch_idx):
            raise InterruptedError

    options = {"data": Streaming(), "module": Untrained(batch_norm=True)}
    with pytest.raises(UnsupportedSetup, match=r"may have no end\. Pass Trainer\(limit_train_batches=100\)"):
        fit(tmp_path, ModelSoup(recalibrate=True), **options)
    with pytest.raises(InterruptedError):
        fit(tmp_path, ModelSoup(recalibrate=True), limit_train_batches=3, **options)


def recalibrating_rank(folder):
    torch.set_num_threads(1)
    soup = ModelSoup(recalibrate=True)
    _, module, _ = fit(folder, soup, module=batch_norm(), devices=2, strategy="ddp")
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    return {"weights": weights, "score": soup.soup.score, "path": str(soup.soup_path)}


def test_two_ranks_recalibrate_alike(tmp_path):
    first, second = run_on_two_ranks(recalibrating_rank, tmp_path)
    assert first["score"] == second["score"]
    saved = open_checkpoint(first["path"])
    for name, value in first["weights"].items():
        assert (value == second["weights"][name]).all()
        assert (value == saved[name].numpy()).all()
    # 96 samples: three batches of 16 on each rank
    torch.testing.assert_close(saved["net.1.running_mean"], means_of_training_data(saved))


def test_adaptive_ratios_between_the_start_and_what_the_fit_ended_with(tmp_path):
    torch.manual_seed(0)
    module = TinyClassifier()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    recipe = AdaptiveSoup(mean=0.6, groups=[["net.0.*"], ["net.3.*"]], steps=10)
    callback = ModelSoup(recipe, last=2, monitor="val_acc", dirpath=str(tmp_path))
    quiet_trainer(max_epochs=3, callbacks=[callback]).fit(module, datamodule=TinyData())
    names = [item.name for item in callback.soup.ingredients]
    assert names[0] == "soup-start"
    assert len(names) == 3
    kept = callback.soup.ingredients[0].weights
    assert all(torch.equal(value, start[name]) for name, value in kept.items())
    shares = [1 - row[0] for name, row in callback.soup.coefficients.items() if name.endswith("weight")]
    assert sum(shares) / 2 == pytest.approx(0.6)
    assert callback.soup.history[0].label == "equal ratios"


def test_adaptive_ratios_need_a_metric(tmp_path):
    callback = ModelSoup(AdaptiveSoup(), last=2, dirpath=str(tmp_path))
    with pytest.raises(UnsupportedSetup, match="AdaptiveSoup chooses by a validation metric"):
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(TinyClassifier(), datamodule=TinyData())


class WithoutLoss(TinyClassifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("recipe", [LearnedSoup(), AdaptiveSoup(), InterpolatedSoup(soup=LearnedSoup())], ids=str)
def test_a_recipe_that_learns_from_a_loss_needs_one_before_training(recipe, tmp_path):
    module = WithoutLoss()
    before = module.net[0].weight.clone()
    callback = ModelSoup(recipe, last=2, monitor="val_acc", dirpath=str(tmp_path))
    with pytest.raises(UnsupportedSetup, match=r"learns from the loss .*WithoutLoss returned NoneType"):
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module, datamodule=TinyData())
    assert torch.equal(module.net[0].weight, before)
