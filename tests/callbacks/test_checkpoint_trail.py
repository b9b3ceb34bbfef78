"""CheckpointTrail: which weights are kept, through what a Trainer can be, and the soup that is searched at the end."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Subset

from lightning_soup.callbacks import CheckpointTrail, ExponentialAverage, ModelSoup
from lightning_soup.cli.main import main
from lightning_soup.errors import LightningSoupError, NonFiniteWeights, UnsupportedSetup, UnwritableOutput
from lightning_soup.recipes import EvolutionarySoup, UniformSoup, gather_ingredients
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_live_average_contract import CutAt, OverflowAt
from tests.helpers.averages import FrozenFirst, Trail, TwoOptimizers
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

STEPS_PER_EPOCH = 6  # 96 samples in batches of 16


def fit(tmp_path, trail, module=None, *, callbacks=(), data=None, epochs=3, ckpt_path=None, **options):
    torch.manual_seed(1)
    module, steps = module or TinyClassifier(), Trail()
    options = {"num_sanity_val_steps": 0, "max_epochs": epochs, **options}
    trainer = quiet_trainer(callbacks=[*callbacks, trail, steps], default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=data or TinyData(), ckpt_path=ckpt_path)
    return trainer, module, steps.weights


def kept(trail):
    return [int(Path(file).stem[5:]) for file in trail.files]


def assert_are(trail, weights, steps):
    """Each file holds what the module held right after that step."""
    assert kept(trail) == steps
    for file, step in zip(trail.files, steps, strict=True):
        found = open_checkpoint(file)
        for name, value in weights[step].items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ what is kept


def test_the_newest_weights_of_every_nth_step(tmp_path):
    trail = CheckpointTrail(every=4, keep=3)
    _, _, weights = fit(tmp_path, trail)
    assert_are(trail, weights, [8, 12, 16])
    assert {path.name for path in (tmp_path / "trail").iterdir()} == {f"step={step}.ckpt" for step in (8, 12, 16)}
    assert [item.step for item in gather_ingredients(str(tmp_path / "trail" / "*.ckpt"))] == [8, 12, 16]


@pytest.mark.parametrize(("start", "steps"), [(5, [8, 11, 14, 17]), (0.5, [12, 15, 18]), ("2 epochs", [15, 18])])
def test_start(tmp_path, start, steps):
    trail = CheckpointTrail(every=3, keep=4, start=start)
    with pytest.warns(UserWarning, match="fewer than keep=4") if len(steps) < 4 else nullcontext():
        _, _, weights = fit(tmp_path, trail)
    assert_are(trail, weights, steps)


def test_files_are_those_of_the_module(tmp_path):
    trail = CheckpointTrail(every=6, keep=3)
    _, module, _ = fit(tmp_path, trail, TinyClassifier(batch_norm=True))
    again = TinyClassifier.load_from_checkpoint(trail.files[-1])
    assert again.hparams.batch_norm
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    content = torch.load(trail.files[-1], weights_only=True)
    assert content["global_step"] == 18
    assert "optimizer_states" not in content
    assert content["state_dict"]["net.1.num_batches_tracked"] == 18


def test_accumulated_batches_are_one_step(tmp_path):
    trail = CheckpointTrail(every=2, keep=3)
    _, _, weights = fit(tmp_path, trail, accumulate_grad_batches=2)
    assert len(weights) == 10
    assert_are(trail, weights, [4, 6, 8])


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    trail = CheckpointTrail(every=4, keep=4)
    trainer, _, weights = fit(tmp_path, trail, callbacks=[OverflowAt(2, 3, 9)], plugins=[plugin])
    assert trainer.global_step == 18
    assert len(weights) - 1 == 15
    assert_are(trail, weights, [4, 8, 12])


def test_manual_optimization_with_two_optimizers(tmp_path):
    trail = CheckpointTrail(every=5, keep=3)
    fit(tmp_path, trail, TwoOptimizers())
    assert kept(trail) == [5, 10, 15]
    assert not torch.equal(*(open_checkpoint(file)["net.3.weight"] for file in trail.files[:2]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sixteen_bits_are_kept_in_thirty_two(tmp_path, precision):
    trail = CheckpointTrail(every=4, keep=3)
    with pytest.warns(UserWarning, match="trained in 16 bits") if precision == "bf16-true" else nullcontext():
        _, _, weights = fit(tmp_path, trail, precision=precision)
    assert_are(trail, weights, [8, 12, 16])


def test_compiled_parts(tmp_path):
    class Compiled(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[0] = torch.compile(self.net[0], backend="eager")

    trail = CheckpointTrail(every=6, keep=3)
    _, _, weights = fit(tmp_path, trail, Compiled())
    assert_are(trail, weights, [6, 12, 18])
    Compiled.load_from_checkpoint(trail.files[0])


def test_raw_weights_beside_an_average(tmp_path):
    trail = CheckpointTrail(every=6, keep=3)
    _, _, weights = fit(tmp_path, trail, callbacks=[ExponentialAverage(0.9)])
    assert_are(trail, weights, [6, 12, 18])


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters(tmp_path, frozen):
    trail = CheckpointTrail(every=6, keep=3, frozen=frozen)
    fit(tmp_path, trail, FrozenFirst())
    assert ("net.0.weight" in open_checkpoint(trail.files[0])) == frozen
    assert "net.3.weight" in open_checkpoint(trail.files[0])


def test_training_is_as_without_it(tmp_path):
    _, plain, _ = fit(tmp_path, Callback())
    _, module, _ = fit(tmp_path, CheckpointTrail(every=4, keep=3))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_a_second_fit_gets_files_of_its_own(tmp_path):
    trail = CheckpointTrail(every=6, keep=3)
    for folder in ("trail", "trail-v1"):
        _, _, weights = fit(tmp_path, trail)
        assert {Path(file).parent.name for file in trail.files} == {folder}
        assert_are(trail, weights, [6, 12, 18])
    with pytest.warns(UserWarning, match="has files of another fit"):
        fit(tmp_path, CheckpointTrail(every=6, keep=3, dirpath=str(tmp_path / "trail")))


def test_weights_that_became_nan_push_no_good_ones_out(tmp_path):
    class Diverging(TinyClassifier):
        def on_before_zero_grad(self, optimizer):
            if self.global_step == 10:
                with torch.no_grad():
                    self.net[3].bias.fill_(float("nan"))

    trail = CheckpointTrail(every=4, keep=3)
    with pytest.raises(NonFiniteWeights, match=r"step=12.ckpt: was not written, .* holds NaN"):
        fit(tmp_path, trail, Diverging())
    assert kept(trail) == [4, 8]


def test_a_fast_run_writes_nothing(tmp_path):
    trail = CheckpointTrail()
    fit(tmp_path, trail, fast_dev_run=True)
    assert trail.files == []
    assert not (tmp_path / "trail").exists()


def test_testing_a_checkpoint_leaves_the_files_of_the_fit(tmp_path):
    trail = CheckpointTrail(every=6, keep=3)
    middle = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    trainer, _, _ = fit(tmp_path, trail, callbacks=[middle], enable_checkpointing=True)
    trainer.test(
        TinyWithTest(), datamodule=TinyData(), ckpt_path=str(next(tmp_path.glob("*step=7.ckpt"))), verbose=False
    )
    assert kept(trail) == [6, 12, 18]


class TinyWithTest(TinyClassifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


# ---------------------------------------------------------------------------------------------------- interruptions


class Whole(TinyData):
    """Every batch is the same, so that a loader that begins anew changes nothing."""

    def train_dataloader(self):
        return DataLoader(Subset(self.train, list(range(16)) * 5), 16)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("saved", [4, 8])
def test_resume_is_bit_exact(tmp_path, saved):
    def run(folder, cut=0, **options):
        trail = CheckpointTrail(every=3, keep=4, start=2)
        often = ModelCheckpoint(folder / "all", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        fit(folder, trail, callbacks=[CutAt(cut), often], data=Whole(), epochs=4, enable_checkpointing=True, **options)
        return trail

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", cut=11)
    assert (tmp_path / "cut" / "trail" / "step=11.ckpt").exists()
    resumed = run(tmp_path / "cut", ckpt_path=str(tmp_path / "cut" / "all" / f"step={saved}.ckpt"))
    assert kept(resumed) == kept(whole) == [11, 14, 17, 20]
    for a, b in zip(resumed.files, whole.files, strict=True):
        assert open_checkpoint(a).digest() == open_checkpoint(b).digest()
    assert {path.name for path in (tmp_path / "cut" / "trail").iterdir()} == {Path(file).name for file in whole.files}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_files_that_were_moved_or_are_gone(tmp_path):
    first = CheckpointTrail(every=3, keep=4)
    with pytest.warns(UserWarning, match="about 2 files will be kept, fewer than keep=4"):
        trainer, _, _ = fit(tmp_path / "a", first, epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    os.rename(tmp_path / "a" / "trail", tmp_path / "moved")
    (tmp_path / "moved" / "step=3.ckpt").unlink()
    second = CheckpointTrail(every=3, keep=3, dirpath=str(tmp_path / "moved"))
    with pytest.warns(UserWarning, match="1 files of the earlier fit are gone"):
        fit(tmp_path / "b", second, epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert kept(second) == [6, 9, 12]
    assert all(os.path.exists(file) for file in second.files)


# --------------------------------------------------------------------------------------------------------- two ranks


def on_a_rank(tmp_path):
    trail = CheckpointTrail(every=3, keep=2)
    soup = ModelSoup(EvolutionarySoup(budget=12), trail=True, monitor="val_loss")
    _, module, _ = fit(tmp_path, trail, callbacks=[soup], epochs=3, devices=2, strategy="ddp")
    return trail.files, soup.soup.coefficients, module.net[0].weight.detach().numpy()


def test_two_ranks_write_once_and_find_the_same(tmp_path):
    first, second = run_on_two_ranks(on_a_rank, tmp_path)
    assert first[:2] == second[:2]
    assert (first[2] == second[2]).all()
    assert [Path(file).name for file in first[0]] == ["step=6.ckpt", "step=9.ckpt"]
    assert len(list((tmp_path / "trail").iterdir())) == 2


def full_disk(tmp_path):
    trail = CheckpointTrail(every=3, keep=2)

    class Full(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4 and trainer.is_global_zero:
                trail._folder = Path("/dev/null/trail")

    try:
        fit(tmp_path, trail, callbacks=[Full()], devices=2, strategy="ddp")
    except LightningSoupError as error:
        return str(error)
    return "no error"


def test_a_failure_of_one_rank_is_raised_on_both(tmp_path):
    assert all("step=6.ckpt" in told for told in run_on_two_ranks(full_disk, tmp_path))


# ------------------------------------------------------------------------------------------------------------ the soup


def test_the_soup_of_the_trail(tmp_path):
    trail, soup = (
        CheckpointTrail(every=2, keep=6),
        ModelSoup(EvolutionarySoup(budget=40), trail=True, monitor="val_loss"),
    )
    trainer, module, _ = fit(tmp_path, trail, callbacks=[soup])
    assert [item.name for item in soup.soup.ingredients] == [f"step={step}" for step in (8, 10, 12, 14, 16, 18)]
    assert len(soup.soup.history) == 40
    found = soup.soup.weights()
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())
    score = float(trainer.validate(module, datamodule=TinyData(), verbose=False)[0]["val_loss"])
    assert score == pytest.approx(soup.soup.natural_score, rel=1e-5)


class ThirdData(TinyData):
    def third_dataloader(self):
        return DataLoader(self.test[0], 16)


def test_the_third_split_of_a_fit(tmp_path):
    data = ThirdData()
    soup = ModelSoup(EvolutionarySoup(budget=40, third="require"), trail=True, monitor="val_loss")
    _, module, _ = fit(tmp_path, CheckpointTrail(every=2, keep=6), callbacks=[soup], data=data)
    x, y = data.test[0].tensors
    expected = torch.nn.functional.cross_entropy(module.net(x), y).item()
    assert -soup.soup.third_score == pytest.approx(expected, rel=1e-5)
    x, y = data.val.tensors
    assert soup.soup.natural_score == pytest.approx(
        torch.nn.functional.cross_entropy(module.net(x), y).item(), rel=1e-5
    )


def test_trails_serve_every_recipe(tmp_path):
    soup = ModelSoup(UniformSoup(), trail=True)
    fit(tmp_path, CheckpointTrail(every=6, keep=3), callbacks=[soup])
    assert soup.soup.coefficients == (1 / 3,) * 3


def test_from_the_command_line(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: tests.helpers.boring.TinyClassifier\ndata: tests.helpers.boring.TinyData\n"
        "trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false, max_epochs: 3}\n"
    )
    trail = CheckpointTrail(every=3, keep=5)
    fit(tmp_path, trail)
    out = tmp_path / "lcsc.ckpt"
    command = ["soup", "--config", str(config), "--ingredients", str(tmp_path / "trail" / "*.ckpt")]
    recipe = ["--recipe", "lightning_soup.recipes.EvolutionarySoup", "--recipe.budget", "20"]
    main([*command, *recipe, "--metric", "val_loss", "--output", str(out)])
    printed = capsys.readouterr().out
    assert "EvolutionarySoup" in printed
    provenance = open_checkpoint(out).provenance
    assert len(provenance["history"]) == 20
    assert sum(provenance["coefficients"]) == pytest.approx(1, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0.*whole number of steps, 1 or more"),
        ({"every": True}, "every=True"),
        ({"every": 1.5}, "every=1.5"),
        ({"keep": 1}, "keep=1.*2 or more"),
        ({"start": -1}, "start"),
        ({"start": "soon"}, "start"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        CheckpointTrail(**options)


def test_what_cannot_work_is_refused_before_training(tmp_path):
    class NeverTrained(TinyClassifier):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    def refused(message, trail, error=UnsupportedSetup, **options):
        with pytest.raises(error, match=message):
            fit(tmp_path, trail, options.pop("module", None) or NeverTrained(), **options)

    refused("of 18 steps would leave 1 files", CheckpointTrail(every=12, keep=3))
    refused("would leave 0 files", CheckpointTrail(every=4, start=0.9))
    refused("nothing would ever be kept", CheckpointTrail(every=1, start=18))
    trail = CheckpointTrail()
    trainer = quiet_trainer(strategy=ModelParallelStrategy(), callbacks=[trail])
    with pytest.raises(UnsupportedSetup, match="shards"):
        trail.setup(trainer, NeverTrained(), "fit")
    (tmp_path / "file").touch()
    refused("dirpath of CheckpointTrail", CheckpointTrail(4, 3, dirpath=str(tmp_path / "file")), UnwritableOutput)
    frozen = NeverTrained()
    frozen.requires_grad_(False)
    with pytest.raises(UnsupportedSetup, match="no trainable parameter"):
        fit(tmp_path, CheckpointTrail(), frozen)
    assert not list(tmp_path.glob("trail*/*"))


def test_a_soup_without_its_trail(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"needs weights to soup. Add CheckpointTrail"):
        fit(tmp_path, ModelSoup(trail=True))
    with pytest.raises(UnsupportedSetup, match=r"frozen=False. leaves frozen parameters out"):
        fit(tmp_path, CheckpointTrail(frozen=False), FrozenFirst(), callbacks=[ModelSoup(trail=True)])
    with pytest.raises(UnsupportedSetup, match="expected one of them"):
        ModelSoup(last=3, trail=True)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_every_option_is_reachable_from_yaml(tmp_path):
    options = {"every": 7, "keep": 9, "start": 0.25, "frozen": False, "dirpath": "somewhere"}
    for built in through_yaml(TinyClassifier, "lightning_soup.callbacks.CheckpointTrail", options, tmp_path):
        assert (built.every, built.keep, built.frozen, built.dirpath) == (7, 9, False, "somewhere")
        assert str(built.schedule.start) == "0.25 of the training"
