"""MWA in a fit: what is recorded, what is kept, what comes out, and that an interruption changes nothing."""

import json
import math
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Subset

from lightning_soup.callbacks import MetricsWeightedAveraging
from lightning_soup.errors import LightningSoupError, NonFiniteWeights, RecipeError, UnsupportedSetup
from lightning_soup.recipes import MetricsWeightedSoup, gather_ingredients, recook
from lightning_soup.recipes.metrics_weighted import metric_weights
from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.adapters import RUN_ENTRY, adapter_in, is_adapter
from tests.helpers.adapters import TinyLoRA, updates
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


class Losses(Callback):
    """Every batch's own loss, its size, and the optimizer steps after it."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append((float(pl_module.seen), len(batch[0]), trainer.global_step))

    def mean(self, after, upto, weigh=lambda size: size):
        rows = [(loss, weigh(size)) for loss, size, step in self.rows if after < step <= upto]
        return sum(loss * weight for loss, weight in rows) / sum(weight for _, weight in rows)


class Telling(TinyClassifier):
    """Remembers the loss that its training step returned."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = loss.detach()
        return loss


def recipe(window=3, **options):
    return MetricsWeightedSoup(window=window, **options)


def fit(tmp_path, mwa, module=None, *, callbacks=(), data=None, epochs=4, ckpt_path=None, **options):
    torch.manual_seed(1)
    module = module or TinyClassifier()
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0, "max_epochs": epochs, **options}
    trainer = quiet_trainer(callbacks=[*callbacks, mwa], default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=data or TinyData(batch_size=20), ckpt_path=ckpt_path)
    return trainer, module


def kept(tmp_path):
    folders = sorted((tmp_path / "mwa").glob("step=*"), key=lambda path: int(path.name[5:]))
    return {int(path.name[5:]): json.loads((path / "metrics.json").read_text()) for path in folders}


# ---------------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weigh_by", ["samples", "batches"])
def test_the_loss_is_the_mean_since_the_checkpoint_before(tmp_path, accumulate, weigh_by):
    losses = Losses()  # batches of 20, 20, 20, 20 and 16
    mwa = MetricsWeightedAveraging(3, recipe(), weigh_by=weigh_by)
    fit(tmp_path, mwa, Telling(), callbacks=[losses], accumulate_grad_batches=accumulate)
    found = kept(tmp_path)
    assert list(found) == ([12, 15, 18] if accumulate == 1 else [6, 9, 12])
    weigh = (lambda size: size) if weigh_by == "samples" else (lambda size: 1)
    # After a batch that does not step, the counter is as before: that batch belongs to the step that comes.
    rows = losses.rows
    stepped = [row[2] for row in rows]
    for step, values in found.items():
        upto = stepped.index(step)
        after = stepped.index(step - 3) if step > 3 else -1
        part = [(loss, weigh(size)) for loss, size, _ in rows[after + 1 : upto + 1]]
        assert values["step"] == step
        assert values["train_loss"] == pytest.approx(sum(a * b for a, b in part) / sum(b for _, b in part), rel=1e-6)


def test_tokens(tmp_path):
    class Text(Telling):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    class Count(Callback):
        rows = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            mask = batch["labels"] != -100 if "labels" in batch else batch["attention_mask"]
            self.rows = (*self.rows, (float(pl_module.seen), int(mask.sum())))

    class Data(TinyData):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def train_dataloader(self):
            def collate(items):
                x, y = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
                mask = torch.arange(5)[None] <= y[:, None]
                side = torch.where(mask, 1, -100) if self.key == "labels" else mask.long()
                return {"x": x, "y": y, self.key: side}

            return DataLoader(self.train, 16, collate_fn=collate)

    for key in ("labels", "attention_mask"):
        count = Count()
        fit(tmp_path / key, MetricsWeightedAveraging(6, recipe(1), "tokens"), Text(), data=Data(key), callbacks=[count])
        part = count.rows[18:24]
        mean = sum(loss * tokens for loss, tokens in part) / sum(tokens for _, tokens in part)
        assert kept(tmp_path / key)[24]["train_loss"] == pytest.approx(mean, rel=1e-6)
    with pytest.raises(UnsupportedSetup, match="weigh_by='tokens' counts the 'labels'"):
        fit(tmp_path / "x", MetricsWeightedAveraging(6, recipe(1), "tokens"))


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    class Overflowing(Telling):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx != 1 else loss.detach() * math.inf + 0 * loss.detach().requires_grad_()

        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.nan_to_num(0, 0, 0)

    with pytest.warns(UserWarning, match="left out batches whose loss is not finite: 1"):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe(2)), Overflowing(), epochs=2)
    assert all(math.isfinite(values["train_loss"]) for values in kept(tmp_path).values())


@pytest.mark.parametrize("kind", [TinyClassifier, TinyLoRA])
@pytest.mark.filterwarnings("ignore:MetricsWeightedAveraging. left out batches")
def test_weights_that_become_nan_stop_the_fit_and_leave_what_was_kept(tmp_path, kind):
    class Diverging(kind):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 10:
                with torch.no_grad():
                    next(p for p in self.parameters() if p.requires_grad).fill_(math.nan)

    with pytest.raises(NonFiniteWeights, match="step=12"):
        fit(tmp_path, MetricsWeightedAveraging(3, recipe(3)), Diverging())
    assert list(kept(tmp_path)) == [3, 6, 9]


def test_manual_optimization_with_two_optimizers(tmp_path):
    class Manual(Telling):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            first, last = self.net[0], self.net[3]
            return [torch.optim.SGD(part.parameters(), 0.05) for part in (first, last)]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return loss

    losses = Losses()
    fit(tmp_path, MetricsWeightedAveraging(4, recipe(2)), Manual(), callbacks=[losses])
    found = kept(tmp_path)
    assert list(found) == [12, 16, 20][-2:]
    assert found[20]["train_loss"] == pytest.approx(losses.mean(32, 40), rel=1e-6)  # Lightning counts both


def test_after_each_validation_its_metrics_are_known(tmp_path):
    mwa = MetricsWeightedAveraging(recipe=recipe(metric="val_acc", penalty=1.0))
    trainer, _ = fit(tmp_path, mwa, limit_val_batches=None, num_sanity_val_steps=2)
    found = kept(tmp_path)
    assert list(found) == [10, 15, 20]
    assert {"step", "train_loss", "val_acc", "val_loss"} <= set(found[20])
    assert found[20]["val_acc"] == pytest.approx(float(trainer.callback_metrics["val_acc"]))
    values = [value["val_acc"] for value in found.values()]
    assert mwa.soup.coefficients == metric_weights(values, 1.0, mode="max")


# ---------------------------------------------------------------------------------------------------- what comes out


def test_the_merged_model_is_the_weighted_mean_of_the_window(tmp_path):
    mwa = MetricsWeightedAveraging(2, recipe(3, stride=2, penalty=0.7))
    _, module = fit(tmp_path, mwa)
    found = kept(tmp_path)
    assert list(found) == [10, 12, 14, 16, 18, 20]  # N · stride
    used = [12, 16, 20]
    weights = metric_weights([found[step]["train_loss"] for step in used], 0.7)
    assert mwa.soup.coefficients == weights
    expected = combine([tmp_path / "mwa" / f"step={step}" for step in used], weights)
    held = module.state_dict()
    assert all(torch.equal(held[name], value) for name, value in expected.items())
    assert mwa.soup_path == tmp_path / "mwa" / "mwa.ckpt"
    again = TinyClassifier.load_from_checkpoint(mwa.soup_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    assert recook(mwa.soup_path).read_bytes() == mwa.soup_path.read_bytes()


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_a_module_with_an_adapter_only_the_adapter_is_kept(tmp_path, dora):
    mwa = MetricsWeightedAveraging(5, recipe())
    torch.manual_seed(1)
    _, module = fit(tmp_path, mwa, TinyLoRA(dora=dora))
    files = [open_checkpoint(tmp_path / "mwa" / f"step={step}") for step in (10, 15, 20)]
    assert all(map(is_adapter, files))
    assert len({file.metadata[RUN_ENTRY] for file in files}) == 1
    expected = combine(files, mwa.soup.coefficients)
    merged = open_checkpoint(tmp_path / "mwa" / "mwa")
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    held = open_checkpoint(module.state_dict())
    held = adapter_in(held, merged.metadata["adapter_config"])
    assert all(torch.equal(held[name], value) for name, value in expected.items())
    assert any(".net.3." in name or name.endswith("3.bias") for name in expected)  # the head, too
    script = f"""
import sys, torch
from peft import PeftModel
from tests.helpers.boring import TinyClassifier
torch.manual_seed(1)
module = TinyClassifier()
module.load_state_dict(torch.load({str(tmp_path / "base.pt")!r}))
model = PeftModel.from_pretrained(module.net, {str(tmp_path / "mwa" / "mwa")!r}).eval()
torch.save(model(torch.ones(2, 8)), {str(tmp_path / "out.pt")!r})
"""
    from lightning_soup.weights.dense_base import without_adapter

    base = without_adapter(open_checkpoint(module.state_dict()))
    torch.save({name: value.clone() for name, value in base.items()}, tmp_path / "base.pt")
    subprocess.run([sys.executable, "-c", script], check=True)
    expected_output = module.eval().net(torch.ones(2, 8))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected_output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ["exact", "svd"])
@pytest.mark.filterwarnings("ignore:the merged update was cut")
def test_products_are_merged_and_the_module_keeps_what_fits_it(tmp_path, merge):
    mwa = MetricsWeightedAveraging(5, recipe(merge=merge, metric="step"))
    _, module = fit(tmp_path, mwa, TinyLoRA())
    files = [tmp_path / "mwa" / f"step={step}" for step in (10, 15, 20)]
    mean = sum(w * updates(file)["0"] for w, file in zip(mwa.soup.coefficients, files, strict=True))
    found = updates(mwa.soup_path)["0"]
    if merge == "exact":
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)
    live = adapter_in(open_checkpoint(module.state_dict()), open_checkpoint(files[-1]).metadata["adapter_config"])
    assert all(torch.equal(live[name], value) for name, value in open_checkpoint(files[-1]).items())
    again = recook(mwa.soup_path)
    assert open_checkpoint(again).digest() == open_checkpoint(mwa.soup_path).digest()


def test_whole_checkpoints_with_an_adapter_say_how_it_is_configured(tmp_path):
    trainer, _ = fit(tmp_path, MetricsWeightedAveraging(5, recipe()), TinyLoRA())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    adapter = adapter_in(open_checkpoint(tmp_path / "last.ckpt"))
    assert {layer.partition("lora_")[0] for layer in adapter if "lora_" in layer} == {"base_model.model.0."}


@pytest.mark.filterwarnings("ignore:.*left out .*mwa, which are soups")
def test_the_files_serve_the_command_line(tmp_path):
    mwa = MetricsWeightedAveraging(4, recipe(2, penalty=1.0))
    fit(tmp_path, mwa, TinyLoRA())
    found = gather_ingredients(str(tmp_path / "mwa" / "*"))
    assert [item.step for item in found] == [16, 20]  # the merged one is passed over


def test_leave_live(tmp_path):
    mwa = MetricsWeightedAveraging(5, recipe(), leave="live")
    _, module = fit(tmp_path, mwa)
    last = open_checkpoint(tmp_path / "mwa" / "step=20")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in last.items())


def test_a_fit_that_ends_early_is_merged_all_the_same(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 11

    mwa = MetricsWeightedAveraging(5, recipe(3))
    with pytest.warns(UserWarning, match="the fit left 2 checkpoints, fewer than the 3"):
        fit(tmp_path, mwa, callbacks=[Stop()])
    assert len(mwa.soup.ingredients) == 2


def test_a_second_fit_gets_a_folder_of_its_own(tmp_path):
    for folder in ("mwa", "mwa-v1"):
        mwa = MetricsWeightedAveraging(5, recipe())
        fit(tmp_path, mwa)
        assert mwa.soup_path.parent == tmp_path / folder
    with pytest.warns(UserWarning, match="has files of another fit"):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe(), dirpath=str(tmp_path / "mwa")))


def test_two_in_one_trainer_keep_their_files_apart(tmp_path):
    short = MetricsWeightedAveraging(4, recipe(2), filename="short")
    long = MetricsWeightedAveraging(3, recipe(5))
    fit(tmp_path, long, callbacks=[short])
    assert [item.name for item in short.soup.ingredients] == ["step=16", "step=20"]
    assert [item.name for item in long.soup.ingredients] == [f"step={step}" for step in (6, 9, 12, 15, 18)]
    assert (short.soup_path, long.soup_path) == (tmp_path / "short" / "short.ckpt", tmp_path / "mwa" / "mwa.ckpt")
    options = {"recipe": recipe(2), "dirpath": str(tmp_path / "both")}
    both = [MetricsWeightedAveraging(3, filename=name, **options) for name in ("a", "b")]
    with pytest.raises(UnsupportedSetup, match="they would delete each other's checkpoints"):
        fit(tmp_path, both[0], callbacks=both[1:])


# ---------------------------------------------------------------------------------------------------- interruptions


class CutAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("module", [TinyClassifier, TinyLoRA])
def test_resume_is_bit_exact(tmp_path, module):
    # Every batch is the whole set, so that a loader that begins anew changes nothing.
    class Whole(TinyData):
        def train_dataloader(self):
            return DataLoader(Subset(self.train, list(range(16)) * 5), 16)

    def run(folder, **options):
        torch.manual_seed(3)
        keep = ModelCheckpoint(folder / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        mwa = MetricsWeightedAveraging(3, recipe(3), dirpath=str(folder / "mwa"))
        cut = options.pop("cut", 0)
        options = {
            "data": Whole(),
            "enable_checkpointing": True,
            "callbacks": [CutAt(cut), keep],
            "epochs": 4,
            **options,
        }
        fit(folder, mwa, module(), **options)
        return mwa

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", cut=11)
    resumed = run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "kept" / "step=8.ckpt")
    assert resumed.soup.coefficients == whole.soup.coefficients
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    a, b = (open_checkpoint(mwa.soup_path) for mwa in (resumed, whole))
    assert a.digest() == b.digest()


# ---------------------------------------------------------------------------------------------------------- two ranks


def on_a_rank(tmp_path, kind):
    losses = Losses()

    class Module(kind):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen = loss.detach()
            return loss

    mwa = MetricsWeightedAveraging(3, recipe(2))
    torch.manual_seed(1)
    _, module = fit(tmp_path, mwa, Module(), callbacks=[losses], devices=2, strategy="ddp")
    weights = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return losses.rows, mwa.soup.coefficients, str(mwa.soup_path), weights


@pytest.mark.parametrize("kind", [TinyClassifier, TinyLoRA])
def test_two_ranks_share_one_loss_and_one_result(tmp_path, kind):
    first, second = run_on_two_ranks(on_a_rank, tmp_path, kind)
    assert first[1:3] == second[1:3]
    assert all((value == second[3][name]).all() for name, value in first[3].items())
    found = kept(tmp_path)
    last = max(found)
    rows = [row for rank in (first, second) for row in rank[0] if last - 3 < row[2] <= last]
    mean = sum(loss * size for loss, size, _ in rows) / sum(size for _, size, _ in rows)
    assert found[last]["train_loss"] == pytest.approx(mean, rel=1e-6)
    saved = open_checkpoint(first[2])
    if not is_adapter(saved):
        assert all((saved[name].numpy() == value).all() for name, value in first[3].items())


def blind_rank(tmp_path):
    class Blind(MetricsWeightedAveraging):
        def on_train_end(self, trainer, pl_module):
            if trainer.global_rank == 1:  # as if its disk were another one
                self._files.folder = tmp_path / "elsewhere"
                self._files.kept = [(str(tmp_path / "elsewhere" / "step=3"), values) for _, values in self._files.kept]

    try:
        fit(tmp_path, Blind(3, recipe(2)), devices=2, strategy="ddp")
    except LightningSoupError as error:
        return str(error)
    return "no error"


def test_ranks_without_a_common_disk_do_not_wait_for_one_another(tmp_path):
    first, second = run_on_two_ranks(blind_rank, tmp_path)
    assert "rank 0 sees 2 checkpoints" in first
    assert "rank 1 sees 0 checkpoints" in second


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "expected 1 or more"),
        ({"leave": "average"}, "expected 'soup' or 'live'"),
        ({"filename": "a/b"}, "expected a name, not a path"),
        ({"filename": "step=x"}, "does not begin with 'step='"),
        ({"weigh_by": "words"}, "expected one of samples, tokens, batches"),
        ({"every_n_steps": 5, "recipe": MetricsWeightedSoup(metric="val_acc")}, "between validations, whose 'val_acc'"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        MetricsWeightedAveraging(**options)


def test_what_cannot_work_is_refused_before_training(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"window=3 with stride=4, .* needs 45 optimizer steps, .* has 20"):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe(3, stride=4)))
    with pytest.raises(UnsupportedSetup, match="after each validation, but there is none"):
        fit(tmp_path, MetricsWeightedAveraging())
    with pytest.raises(UnsupportedSetup, match="merge='exact' is for adapters, but there is no PeftModel in TinyClass"):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe(merge="exact")))
    mwa = MetricsWeightedAveraging(5)
    trainer = quiet_trainer(devices=1, strategy=ModelParallelStrategy(), callbacks=[mwa])
    with pytest.raises(UnsupportedSetup, match="does not work with ModelParallelStrategy: its checkpoints are sharded"):
        mwa.setup(trainer, TinyClassifier(), "fit")
    assert not list(tmp_path.rglob("step=*"))


def test_a_training_step_without_a_loss(tmp_path):
    class Silent(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()

    with pytest.raises(UnsupportedSetup, match="but training_step returns none"):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe()), Silent())


def test_batch_norm_of_a_frozen_base_is_told_of(tmp_path):
    with pytest.warns(
        UserWarning, match=r"BatchNorm layer 'base_model\.model\.1' of the frozen base is in training mode"
    ):
        fit(tmp_path, MetricsWeightedAveraging(5, recipe()), TinyLoRA(batch_norm=True))


def test_a_metric_that_was_not_logged(tmp_path):
    with pytest.raises(RecipeError, match=r"step=10: its 'val_f1' is not known \(known are: .*val_acc"):
        fit(tmp_path, MetricsWeightedAveraging(recipe=recipe(metric="val_f1")), limit_val_batches=None)


def test_through_yaml(tmp_path):
    options = {
        "every_n_steps": 7,
        "weigh_by": "batches",
        "recipe": {
            "class_path": "lightning_soup.recipes.MetricsWeightedSoup",
            "init_args": {"penalty": 0.5, "scheme": "softmax", "window": 4, "merge": "svd", "rank": 3},
        },
    }
    path = "lightning_soup.callbacks.MetricsWeightedAveraging"
    for built in through_yaml(TinyClassifier, path, options, tmp_path):
        assert built.recipe == MetricsWeightedSoup(penalty=0.5, scheme="softmax", window=4, merge="svd", rank=3)
        assert (built.every_n_steps, built.weigh_by) == (7, "batches")
