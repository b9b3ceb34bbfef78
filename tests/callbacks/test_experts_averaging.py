import copy
import math
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_soup.callbacks import (
    EqualAverage,
    ExpertsWeightAveraging,
    ExponentialAverage,
    LatestAverage,
    ModelSoup,
    WeightEnsemble,
)
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers import RandomUniformMoE, TopKMoE, use_experts
from lightning_soup.layers.conversion import dense_state, experts_of
from lightning_soup.layers.experts import mean_expert
from lightning_soup.modules import ImageClassifier
from lightning_soup.recipes import InterpolatedSoup
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_live_average_contract import CutAt, OverflowAt
from tests.helpers.averages import loaders
from tests.helpers.boring import TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.transformer import TinyTransformer
from tests.helpers.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*ended .* apart", "ignore:.*looks back over", "ignore:.*was called w")
KEYS = list(TinyTransformer().state_dict())
STEPS = 18  # three epochs of six


def fit(callbacks, epochs=3, module=None, seed=3, data=None, ckpt_path=None, **options):
    torch.manual_seed(seed)
    module = module or TinyTransformer()
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(module, *(data or loaders()), ckpt_path=ckpt_path)
    return trainer, module


class PlainStep(torch.optim.Optimizer):
    """A step that is known beforehand: every weight moves by its own gradient's sign, times a rate."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()
        return loss


def test_after_each_step_the_experts_move_towards_their_mean_by_the_ramp():
    class Signs(TinyTransformer):
        def configure_optimizers(self):
            return PlainStep(self.parameters())

    seen = []

    class Between(Callback):
        """Looks between the step and the averaging: in the mutating phase, before the averages."""

        def on_fit_start(self, trainer, pl_module):
            from lightning_soup.callbacks.steps import OptimizerSteps

            layer = experts_of(pl_module)["net.2.mlp"]

            def stacked():
                return torch.stack([expert[0].weight.detach().double().clone() for expert in layer.experts])

            OptimizerSteps.of(trainer).listen(self, lambda _: seen.append([stacked()]), phase="mutate")
            OptimizerSteps.of(trainer).listen(layer, lambda _: seen[-1].append(stacked()), phase="observe")

    fit([Between(), ExpertsWeightAveraging(4, share_rate=0.3)], module=Signs())
    assert len(seen) == STEPS
    for t, (before, after) in enumerate(seen):
        beta = 0.3 * min(1.0, t / (STEPS / 2))
        others = before.sum(0) - before
        torch.testing.assert_close(after, (1 - beta) * before + beta / 3 * others, rtol=0, atol=1e-6)
    assert not torch.equal(seen[-1][0][0], seen[-1][0][1])


def test_golden_5_the_ramp():
    callback = ExpertsWeightAveraging()
    callback._total = 20_000
    rates = [callback.share_rate_at(t) for t in (0, 1, 2500, 5000, 10_000, 20_000)]
    assert rates == pytest.approx([0, 3e-5, 0.075, 0.15, 0.3, 0.3], abs=1e-15)


def test_the_model_has_its_former_architecture_afterwards_with_the_mean_weights():
    means = {}

    class Last(Callback):
        def on_train_end(self, trainer, pl_module):
            means.update({name: mean_expert(layer.experts) for name, layer in experts_of(pl_module).items()})

    _, module = fit([ExpertsWeightAveraging(), Last()])
    assert list(module.state_dict()) == KEYS
    assert list(means) == ["net.2.mlp", "net.4.mlp"]
    for name, mean in means.items():
        ours = dict(module.get_submodule(name).named_parameters())
        assert all(torch.equal(ours[key], value) for key, value in mean.items())
    assert [type(module.net[i].mlp) for i in (1, 2)] == [nn.Sequential] * 2
    assert module.net[2].mlp.training == module.net[2].training


def test_validation_is_on_the_mean_network_and_draws_nothing():
    scores = []

    class Compare(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.sanity_checking:
                return
            plain = TinyTransformer()
            plain.load_state_dict(dense_state(pl_module.state_dict(), list(experts_of(pl_module))))
            plain.eval()
            x = next(iter(loaders()[1]))[0]
            state = torch.random.get_rng_state()
            pl_module.eval()
            scores.append((plain.net(x), pl_module.net(x)))
            pl_module.train()
            assert torch.equal(state, torch.random.get_rng_state())

    trainer, _ = fit([ExpertsWeightAveraging(), Compare()])
    assert len(scores) == 3
    for plain, experts in scores:
        assert torch.equal(plain, experts)
    assert trainer.callback_metrics["ewa/spread"] > 0


@pytest.mark.parametrize("middle", [False, True], ids=["end of epoch", "middle of epoch"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("place", [None, 0, 1], ids=["alone", "before an average", "after an average"])
def test_resume_is_bit_exact(middle, place, tmp_path):
    data = [DataLoader(ConcatDataset([Subset(TinyData().train, range(16))] * 6), 16), loaders()[1]] if middle else None
    options = {"epochs": 4, "max_steps": 21 if middle else -1, "data": data, "enable_checkpointing": True}
    file = "step=8.ckpt" if middle else "step=12.ckpt"

    def callbacks(cut):
        every = {"every_n_train_steps": 8} if middle else {"every_n_epochs": 1}
        keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", **every)
        averages = [] if place is None else [WeightEnsemble(every=4)]
        averages.insert(place or 0, ExpertsWeightAveraging())
        return [*averages, Seeded(), CutAt(cut), keep]

    _, whole = fit(callbacks(0), **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(callbacks(14), **options)
    _, resumed = fit(callbacks(0), seed=99, ckpt_path=tmp_path / file, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Seeded(Callback):
    """The permutations of a step depend on its number, as those of a run with a restored generator do."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


def test_steps_are_counted_and_not_batches():
    callback = ExpertsWeightAveraging()
    trainer, _ = fit(callback, epochs=5, accumulate_grad_batches=3, data=loaders(14))
    assert callback._steps_done == trainer.global_step == 15
    assert callback._total == 15


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_are_none(fused):
    class Scaled(TinyTransformer):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    callback = ExpertsWeightAveraging()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    trainer, _ = fit([callback, OverflowAt(2, 3, 9)], module=Scaled(), plugins=[plugin])
    assert trainer.global_step == 18
    assert callback._steps_done == 15


def test_stop_at_ends_the_averaging():
    rates = []
    callback = ExpertsWeightAveraging(schedule="constant", stop_at="1 epochs")
    original = callback.share_rate_at
    callback.share_rate_at = lambda step: rates.append(step) or original(step)
    fit(callback)
    assert rates == list(range(6))


def test_a_schedule_of_ones_own():
    asked = []
    fit(ExpertsWeightAveraging(schedule=lambda step, total: asked.append((step, total)) or 0.1))
    assert asked == [(step, STEPS) for step in range(STEPS)]
    for rate, message in [(0.9, r"share_rate=0\.9"), (None, "share_rate=None"), (math.nan, "share_rate=nan")]:
        with pytest.raises(UnsupportedSetup, match=message):
            fit(ExpertsWeightAveraging(schedule=lambda step, total, rate=rate: rate))


def test_independent_experts_without_averaging_end_apart_and_that_is_said():
    callback = ExpertsWeightAveraging(init="independent", share_rate=0.0)
    with pytest.warns(UserWarning, match=r"ended \d+% apart"):
        fit(callback)


class Routed(TinyTransformer):
    """Has routers in two blocks."""

    def __init__(self):
        super().__init__()
        for block in self.net[2:4]:
            block.mlp = TopKMoE(block.mlp, 8, num_experts=3, num_shared=1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * sum(b.mlp.balance_loss for b in self.net[2:4])


def test_experts_with_routers_are_averaged_early_and_stay():
    spreads = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            spreads.append(trainer.callbacks[0].spread)

    callback = ExpertsWeightAveraging(3, share_rate=0.6, schedule="constant", stop_at="1 epochs")
    _, module = fit([callback, Look()], module=Routed())
    assert spreads[0] < 0.2 * spreads[2]
    assert isinstance(module.net[2].mlp, TopKMoE)
    shared, router = module.net[2].mlp.shared[0], module.net[2].mlp.router
    assert not torch.equal(shared[0].weight, module.net[2].mlp.experts[0][0].weight)
    assert router.weight.shape == (3, 8)
    with pytest.raises(UnsupportedSetup, match="has 3 experts, but num_experts=4"):
        fit(ExpertsWeightAveraging(4), module=Routed())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divergence_is_never_averaged_silently(value):
    class Diverge(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == STEPS:
                experts_of(pl_module)["net.4.mlp"].experts[2][0].weight.data[0, 0] = value

    with pytest.raises(NonFiniteWeights, match="an expert has a NaN or an infinite value"):
        fit([ExpertsWeightAveraging(), Diverge()], limit_val_batches=0)


# --------------------------------------------------------------------------------------------------------------- files


def test_files_open_as_the_plain_model_and_resume_as_experts(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, filename="{epoch}", save_top_k=-1)
    trainer, module = fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("last", "epoch=2", "after"):
        opened = open_checkpoint(tmp_path / f"{name}.ckpt")
        assert list(opened) == KEYS
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in opened.items()), name
    raw = open_checkpoint(tmp_path / "last.ckpt", which="raw")
    assert "net.2.mlp.experts.3.0.weight" in raw
    assert list(open_checkpoint(tmp_path / "after.ckpt", which="raw")) == KEYS
    plain = TinyTransformer.load_from_checkpoint(tmp_path / "after.ckpt")  # as Lightning alone does it
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in plain.state_dict().items())


def test_weights_only_files_hold_the_plain_model(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="{epoch}", save_top_k=-1)
    _, module = fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    plain = TinyTransformer.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in plain.state_dict().items())


def test_training_cannot_go_on_without_the_callback_and_that_is_said(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    with (
        pytest.warns(UserWarning, match="without this callback training cannot go on, for the optimizer's state"),
        pytest.raises(ValueError, match="a parameter group that doesn't match the size of optimizer's group"),
    ):
        fit([keep], epochs=4, enable_checkpointing=True, ckpt_path=keep.best_model_path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_the_classifiers_of_the_package_load_the_plain_model(tmp_path):
    def classifier():
        arguments = {"patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return ImageClassifier("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=3, model_args=arguments)

    images = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(12) % 3), 4)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    options = {"epochs": 1, "data": [data, data], "enable_checkpointing": True}
    _, module = fit([ExpertsWeightAveraging(layers="all"), keep], module=classifier(), **options)
    loaded = ImageClassifier.load_from_checkpoint(keep.best_model_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())
    [scores] = quiet_trainer().test(classifier(), data, ckpt_path=keep.best_model_path, verbose=False)
    assert scores == quiet_trainer().test(module, data, verbose=False)[0]
    with pytest.raises(UnsupportedSetup, match=r"Add the callback to the Trainer.*to resume"):
        fit([], module=classifier(), ckpt_path=keep.best_model_path, **{**options, "epochs": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 3}, r"net\.2\.mlp has 3 experts, but those of the checkpoint are 4"),
        ({"layers": "last_2"}, r"has experts at net\.2\.mlp, net\.4\.mlp, but layers='last_2' puts them at net\.3"),
    ],
)
def test_resuming_with_other_experts_is_refused(options, message, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    with pytest.raises(UnsupportedSetup, match=message):
        fit(
            [ExpertsWeightAveraging(**options), keep],
            epochs=4,
            enable_checkpointing=True,
            ckpt_path=keep.best_model_path,
        )


def test_plain_weights_are_given_to_all_experts():
    plain, module = TinyTransformer(), TinyTransformer()
    use_experts(module)
    module.load_state_dict(plain.state_dict())
    for expert in module.net[2].mlp.experts:
        assert torch.equal(expert[0].weight, plain.net[2].mlp[0].weight)


# ------------------------------------------------------------------------------------------- together with other things


AVERAGES = [lambda: ExponentialAverage(0.8), lambda: EqualAverage(0, every=1), lambda: LatestAverage(3, every=1)]


@pytest.mark.parametrize("make", AVERAGES, ids=["ema", "swa", "lawa"])
@pytest.mark.parametrize("first", [False, True])
def test_beside_a_live_average_the_mean_of_averaged_experts_is_shipped(make, first, tmp_path):
    def callbacks():
        both = [ExpertsWeightAveraging(), make()]
        return both if first else both[::-1]

    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, filename="{epoch}", save_top_k=-1)
    every = {"every_n_train_steps": STEPS}
    light = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="light", save_top_k=-1, **every)
    _, module = fit([*callbacks(), keep, light], enable_checkpointing=True)
    assert list(module.state_dict()) == KEYS
    found = open_checkpoint(tmp_path / "last.ckpt")
    for key, value in module.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(open_checkpoint(tmp_path / "light.ckpt")[key], value, rtol=0, atol=1e-6)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "net.2.mlp.experts.0.0.weight" in content["current_model_state"]
    _, other = fit(callbacks()[::-1])
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in module.state_dict().items())


def test_before_a_model_soup(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=3)
    soup = ModelSoup()
    _, module = fit([ExpertsWeightAveraging(), soup, keep], enable_checkpointing=True)
    assert list(open_checkpoint(soup.soup_path)) == KEYS
    assert all(torch.equal(value, module.state_dict()[k]) for k, value in open_checkpoint(soup.soup_path).items())
    with pytest.raises(UnsupportedSetup, match="List ExpertsWeightAveraging first"):
        fit([ModelSoup(), ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    wise = ModelSoup(InterpolatedSoup(), filename="wise.ckpt")
    fit([ExpertsWeightAveraging(), wise, keep], enable_checkpointing=True)
    assert list(open_checkpoint(wise.soup_path)) == KEYS


def _train_on_a_rank():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fit([ExpertsWeightAveraging(), ExponentialAverage(0.8)], devices=2, strategy="ddp", data=loaders(8))[1]
        few = fit(ExpertsWeightAveraging(7), devices=2, strategy="ddp", data=loaders(1), max_steps=3)[1]
    return [{k: v.numpy() for k, v in m.state_dict().items()} for m in (module, few)]


def test_two_ranks_agree():
    for a, b in zip(*run_on_two_ranks(_train_on_a_rank), strict=True):
        assert a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by the compiler
@pytest.mark.slow
def test_compiled_blocks():
    module = TinyTransformer()
    for block in module.net[1:5]:
        block.mlp[1] = torch.compile(block.mlp[1], backend="eager")
    keys = list(module.state_dict())
    fit(ExpertsWeightAveraging(), module=module)
    assert list(module.state_dict()) == keys
    whole = torch.compile(TinyTransformer(), backend="eager")
    trainer = quiet_trainer(max_epochs=1, callbacks=[ExpertsWeightAveraging()])
    trainer.fit(whole, *loaders())
    assert list(whole._orig_mod.state_dict()) == KEYS


def test_gradient_clipping_and_bfloat16():
    fit(ExpertsWeightAveraging(), gradient_clip_val=0.1, precision="bf16-mixed")
    with pytest.warns(UserWarning, match="have 16 bits, in which the small steps"):
        fit(ExpertsWeightAveraging(), precision="bf16-true")


def test_a_callback_is_used_again_and_goes_through_pickle():
    callback = pickle.loads(pickle.dumps(ExpertsWeightAveraging(3, "all")))
    _, module = fit(callback)
    steps = callback._steps_done
    fit(copy.deepcopy(callback), module=module)
    fit(callback, module=module)
    assert callback._steps_done == steps
    assert list(module.state_dict()) == KEYS


def test_experts_made_by_hand_are_those_that_are_trained():
    module = TinyTransformer()
    use_experts(module, layers="all")
    with pytest.warns(UserWarning, match="the model has experts already and goes on with them, so layers, init"):
        fit([ExpertsWeightAveraging(), CutAt(99)], module=module)
    assert list(module.state_dict()) == KEYS


def test_a_plain_training_cannot_go_on_with_experts(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit([keep], enable_checkpointing=True)
    with pytest.raises(UnsupportedSetup, match="is of a training without ExpertsWeightAveraging"):
        fit([ExpertsWeightAveraging(), keep], epochs=4, enable_checkpointing=True, ckpt_path=keep.best_model_path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_state_is_found_whatever_its_key_explains(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    states = checkpoint["callbacks"]
    states["ExpertsWeightAveraging (in other words)"] = states.pop(ExpertsWeightAveraging().state_key)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    callback = ExpertsWeightAveraging()
    fit([callback], epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert callback._loaded["steps"] == checkpoint["global_step"]


def test_lightnings_swa_must_come_after_it():
    with pytest.raises(UnsupportedSetup, match="StochasticWeightAveraging stands before"):
        fit([StochasticWeightAveraging(0.01), ExpertsWeightAveraging()])


def test_yaml_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    options = {"num_experts": 3, "layers": [0, 2], "share_rate": 0.5, "stop_at": "2 epochs", "target": ["net.*.mlp"]}

    both = through_yaml(TinyTransformer, "lightning_soup.callbacks.ExpertsWeightAveraging", options, tmp_path)
    assert len(both) == 2
    for made in both:
        assert (made.num_experts, made.layers, made.share_rate, made.target) == (3, [0, 2], 0.5, ["net.*.mlp"])
        assert str(made._open.stop) == "2 epochs"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "num_experts=1"),
        ({"num_experts": 4.5}, "num_experts=4.5: expected a whole number"),
        ({"num_experts": "4"}, "num_experts='4'"),
        ({"num_experts": True}, "num_experts=True"),
        ({"share_rate": "0.3"}, "share_rate='0.3': expected a number"),
        ({"share_rate": True}, "share_rate=True"),
        ({"share_rate": float("nan")}, "share_rate=nan"),
        ({"stop_at": True}, r"\(stop_at\)=True: expected a whole number of optimizer steps"),
        ({"stop_at": 0}, "stop_at=0: expected more than 0"),
        ({"stop_at": 0.0}, "stop_at=0.0: expected more than 0"),
        ({"target": [3]}, r"target=\[3\]: expected a list of patterns"),
        ({"share_rate": 0.8}, r"share_rate=0.8: expected 0 ≤ β"),
        ({"share_rate": -0.1}, "share_rate=-0.1"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"init": "zero"}, "init='zero'"),
        ({"scope": "image"}, "scope='image'"),
        ({"stop_at": "soon"}, "'soon'"),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ExpertsWeightAveraging(**options)


def with_own_optimizer():
    module = TinyTransformer()
    optimizer = torch.optim.SGD(list(module.parameters()), lr=0.1)
    module.configure_optimizers = lambda: optimizer
    return module


class Two(TinyTransformer):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        names = dict(self.named_parameters())
        first = [p for n, p in names.items() if "experts.0" in n]
        return torch.optim.SGD(first, 0.1), torch.optim.SGD([p for n, p in names.items() if "experts.0" not in n], 0.1)


class ByHand(TinyTransformer):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Late(TinyTransformer):
    """Builds its model in configure_model, with experts or without."""

    def __init__(self, experts=False):
        super().__init__()
        self.hidden, self.net, self.experts = [self.net], nn.Sequential(), experts

    def configure_model(self):
        if self.hidden:
            self.net = self.hidden.pop()
            if self.experts:
                use_experts(self)


@pytest.mark.parametrize(
    ("callback", "make", "options", "message"),
    [
        (ExpertsWeightAveraging(layers="last_9"), TinyTransformer, {}, "layers='last_9'.*the model has 4"),
        (ExpertsWeightAveraging(layers=[4]), TinyTransformer, {}, r"layers=\[4\]"),
        (ExpertsWeightAveraging(target=["blocks.*"]), TinyTransformer, {}, r"target=\['blocks.\*'\] matches no module"),
        (
            ExpertsWeightAveraging(),
            with_own_optimizer,
            {},
            r"net\.2\.mlp\.experts\.1.* that no optimizer owns",
        ),
        (ExpertsWeightAveraging(schedule="constant"), Two, {}, "spread over several optimizers"),
        (ExpertsWeightAveraging(), TinyTransformer, {"epochs": -1}, r"needs to know .* endless\. Set max_steps or"),
        (
            ExpertsWeightAveraging(),
            ByHand,
            {},
            r"needs to know .* optimization is by hand\. Or give schedule='constant'",
        ),
        (ExpertsWeightAveraging(), Late, {}, r"has no experts.*configure_model, call .*use_experts\(self"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_before_training(callback, make, options, message):
    module = make()
    module.training_step = lambda *_: pytest.fail("training began")
    with pytest.raises(UnsupportedSetup, match=message):
        fit(callback, module=module, num_sanity_val_steps=0, **options)


def test_a_model_that_is_built_late_is_given_experts_there():
    module = Late(experts=True)
    fit(ExpertsWeightAveraging(), module=module)
    assert not experts_of(module)
    with pytest.raises(UnsupportedSetup, match=r"has 4 experts, but num_experts=2"):
        fit(ExpertsWeightAveraging(2), module=Late(experts=True))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_are_refused_by_name(strategy, monkeypatch):
    trainer = quiet_trainer(callbacks=[ExpertsWeightAveraging()])
    trainer.strategy.__class__ = strategy
    with pytest.raises(UnsupportedSetup, match=f"ExpertsWeightAveraging does not work with {strategy.__name__}"):
        trainer.callbacks[0].setup(trainer, TinyTransformer(), "fit")


def test_experts_are_not_replaced_twice():
    module = TinyTransformer()
    use_experts(module, layers="all")
    with pytest.raises(UnsupportedSetup, match="made of experts already"):
        use_experts(module)
    assert all(isinstance(block.mlp, RandomUniformMoE) for block in module.net[1:5])
