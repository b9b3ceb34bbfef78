"""SparsityMask: the invariants of masks after every step, whatever moves the weights, and through resume."""

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchmetrics import Metric

from lightning_soup.callbacks import (
    EqualAverage,
    ExpertsWeightAveraging,
    ExponentialAverage,
    LatestAverage,
    ModelSoup,
    SparseModelSoup,
    SparsityMask,
    WeightEnsemble,
)
from lightning_soup.errors import LightningSoupError, NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_live_average_contract import CutAt, OverflowAt
from tests.helpers.averages import TwoOptimizers, loaders
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.ids import without_addresses
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

SIZE = 8 * 16 + 16 * 3
STEPS = 18  # three epochs of six


class Watch(Callback):
    """After each real step: the masks, and whether weights, states and gradients respect them (I1, I2, I3)."""

    def __init__(self, mask: SparsityMask) -> None:
        self.mask, self.seen, self.broken, self.hooks = mask, [], [], []

    def on_train_start(self, trainer, pl_module) -> None:
        self.hooks = [o.register_step_post_hook(lambda *_: self.look(trainer, pl_module)) for o in trainer.optimizers]

    def teardown(self, trainer, pl_module, stage) -> None:
        for hook in self.hooks:
            hook.remove()

    def look(self, trainer, pl_module) -> None:
        masks = self.mask.masks
        self.seen.append(masks.pruned)
        weights = dict(pl_module.named_parameters())
        for name, mask in masks.items():
            weight = weights[name]
            gone = {"weight": weight.detach(), "gradient": weight.grad}
            for optimizer in trainer.optimizers:
                state = optimizer.state.get(weight, {})
                gone |= {key: v for key, v in state.items() if getattr(v, "shape", None) == weight.shape}
            for what, value in gone.items():
                if value is not None and value[~mask].any():
                    self.broken.append((len(self.seen), name, what))


class Anchored(torch.optim.Optimizer):
    """Pulls weights towards something else than zero, whatever their gradients."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.anchor = {p: torch.randn_like(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for parameter, start in self.anchor.items():
            parameter.lerp_(start, 0.1)
            self.state[parameter]["velocity"] = parameter - start
        return loss


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "towards an anchor": Anchored,
    "groups": lambda p: torch.optim.SGD([{"params": [x], "lr": 0.01 * i} for i, x in enumerate(p, 1)], momentum=0.9),
}


def module_with(make):
    class Module(TinyClassifier):
        def configure_optimizers(self):
            return make(list(self.parameters()))

    return Module()


def fit(mask, epochs=3, module=None, callbacks=(), seed=3, data=None, ckpt_path=None, **options):
    torch.manual_seed(seed)
    module = with_a_large_head(module or TinyClassifier())
    watch = Watch(mask)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[mask, *callbacks, watch], **options)
    trainer.fit(module, *(data or loaders()), ckpt_path=ckpt_path)
    assert watch.broken == []
    return trainer, module, watch.seen


def with_a_large_head(module):
    """Else all of the head would be among the smallest weights, and nothing would train."""
    with torch.no_grad():
        module.net[3].weight.mul_(3)
    return module


def zeros(module):
    return sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)


class TestInvariants:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("gradual", [False, True], ids=["once", "gradually"])
    def test_optimizers(self, optimizer, gradual):
        options = {"start": 2, "stop": 14, "every": 3} if gradual else {}
        _, module, seen = fit(SparsityMask(0.8, **options), module=module_with(OPTIMIZERS[optimizer]))
        assert seen[-1] == round(SIZE * 0.8) == zeros(module)
        assert len(seen) == STEPS

    def test_two_optimizers_by_hand(self):
        _, module, seen = fit(SparsityMask(0.8), module=TwoOptimizers())
        assert len(seen) == 2 * STEPS
        assert zeros(module) == round(SIZE * 0.8)

    def test_accumulation_and_clipping(self):
        _, _, seen = fit(SparsityMask(0.8), accumulate_grad_batches=3, gradient_clip_val=0.1, data=loaders(14))
        assert len(seen) == 9

    def test_gradients_are_masked_before_they_are_clipped(self):
        class Norms(Callback):
            found = ()

            def on_train_batch_end(self, trainer, pl_module, *_):
                norm = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]).norm()
                self.found = (*self.found, float(norm))

        norms = Norms()
        fit(SparsityMask(0.7), callbacks=[norms], gradient_clip_val=1e-3)
        # what was clipped has the norm asked for: nothing was taken from it afterwards
        assert norms.found == pytest.approx([1e-3] * STEPS, rel=1e-3)

    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_the_scaler_skips(self, fused):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
        module = module_with(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=fused))
        mask = SparsityMask(0.8, start=4, stop=10, every=1)
        _, module, _ = fit(mask, module=module, callbacks=[OverflowAt(2, 3, 9)], plugins=[plugin])
        assert zeros(module) == round(SIZE * 0.8)
        assert mask._steps_done == STEPS - 3

    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
    def test_precisions(self, precision):
        _, module, _ = fit(SparsityMask(0.8), precision=precision)
        assert zeros(module) == round(SIZE * 0.8)

    def test_compiled_parts(self):
        module = with_a_large_head(TinyClassifier())
        module.net[0] = torch.compile(module.net[0], backend="eager")
        mask = SparsityMask(0.8)
        quiet_trainer(max_epochs=2, callbacks=[mask]).fit(module, *loaders())
        assert zeros(module) == round(SIZE * 0.8)
        assert set(mask.masks) == {"net.0.weight", "net.3.weight"}

    def test_training_of_the_rest_is_what_masked_layers_would_do(self):
        class Masked(TinyClassifier):
            """The slow way: weights times mask in each forward pass."""

            def __init__(self, masks):
                super().__init__()
                for layer in (0, 3):
                    self.net[layer].register_buffer("mask", masks[f"net.{layer}.weight"].float())
                    self.net[layer].forward = self._forward(self.net[layer])

            @staticmethod
            def _forward(layer):
                return lambda x: nn.functional.linear(x, layer.weight * layer.mask, layer.bias)

        mask = SparsityMask(0.7)
        _, module, _ = fit(mask)
        torch.manual_seed(3)
        slow = with_a_large_head(Masked(mask.masks))
        with torch.no_grad():
            for layer in (0, 3):
                slow.net[layer].weight *= slow.net[layer].mask
        quiet_trainer(max_epochs=3).fit(slow, *loaders())
        for layer in (0, 3):
            torch.testing.assert_close(module.net[layer].weight, slow.net[layer].weight * slow.net[layer].mask)
            torch.testing.assert_close(module.net[layer].bias, slow.net[layer].bias)

    def test_names_and_order_stay(self):
        before = [name for name, _ in TinyClassifier().named_parameters()]
        _, module, _ = fit(SparsityMask(0.5))
        assert [name for name, _ in module.named_parameters()] == before
        copy.deepcopy(module)

    def test_what_is_written_after_the_last_step_is_noticed(self):
        class Meddle(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                with torch.no_grad():
                    pl_module.net[0].weight += 1

        mask = SparsityMask(0.5)
        trainer = quiet_trainer(max_epochs=1, callbacks=[mask, Meddle()])
        module = TinyClassifier()
        with pytest.warns(UserWarning, match="something wrote to pruned weights"):
            trainer.fit(module, *loaders())
        assert zeros(module) == SIZE // 2

    def test_networks_inside_metrics_are_not_pruned(self):
        class Judge(Metric):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(20, 20)
                self.add_state("total", torch.zeros(()), "sum")

            def update(self):
                pass

            def compute(self):
                return self.total

        module = TinyClassifier()
        module.judge = Judge()
        mask = SparsityMask(0.5)
        fit(mask, module=module)
        assert set(mask.masks) == {"net.0.weight", "net.3.weight"}
        assert module.judge.net.weight.all()

    def test_sparse_gradients_are_refused(self):
        class Looks(TinyClassifier):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(10, 4, sparse=True)

            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + self.table(batch[1]).sum()

        with pytest.raises(UnsupportedSetup, match=r"table\.weight has sparse gradients"):
            fit(SparsityMask(0.5, exclude=[]), module=Looks())

    def test_layers_that_are_left_without_weights_are_named(self):
        with pytest.warns(UserWarning, match=r"1 of 2 layers have no weight left: net\.0\.weight.*Prune less"):
            fit(SparsityMask(0.9))


class TestGradual:
    def test_golden_5_the_cubic(self):
        _, _, seen = fit(SparsityMask(0.9, start=0, stop=16, every=4))
        expected = [round(SIZE * s) for s in (0, 0.5203125, 0.7875, 0.8859375, 0.9)]
        assert seen == [0] * 3 + [expected[1]] * 4 + [expected[2]] * 4 + [expected[3]] * 4 + [expected[4]] * 3

    @pytest.mark.parametrize(
        ("options", "changes"),
        [
            ({"start": "1 epochs", "stop": "3 epochs"}, [12, 18]),
            ({"stop": 0.5, "every": 0.25}, [5, 9]),
            ({"start": 6, "stop": "3 epochs", "every": "1 epochs"}, [12, 18]),
            ({"start": 0.5}, [9]),
            ({"start": "2 epochs"}, [12]),
            ({"start": 5}, [5]),
            ({"start": 4, "stop": 11, "every": 5}, [5, 10, 11]),
        ],
        ids=str,
    )
    def test_when(self, options, changes):
        """The steps after which there are more zeros; ends of batches come after their step."""
        mask = SparsityMask(0.8, **options)
        found, before = [], 0

        class Count(Callback):
            def on_train_batch_end(self, trainer, *_):
                nonlocal before
                if mask.masks.pruned > before:
                    found.append(trainer.global_step)
                before = mask.masks.pruned

        _, module, _ = fit(mask, callbacks=[Count()])
        assert found == changes
        assert zeros(module) == round(SIZE * 0.8)

    @pytest.mark.parametrize("selection", ["uniform", "lamp", "erk", "random", "rows"])
    def test_selections(self, selection):
        mask = SparsityMask(0.5, selection, stop=12, every=3)
        fit(mask)
        assert mask.sparsity_reached == pytest.approx(0.5, abs=0.05)

    def test_two_of_four(self):
        _, module, _ = fit(SparsityMask(0.5, "2:4"))
        assert (module.net[0].weight.unflatten(1, (2, 4)).ne(0).sum(-1) <= 2).all()


class TestResume:
    @pytest.mark.parametrize("options", [{}, {"start": 3, "stop": 16, "every": 2}], ids=["once", "gradually"])
    @pytest.mark.parametrize("middle", [False, True], ids=["end of epoch", "middle of epoch"])
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    def test_it_is_bit_exact(self, middle, options, tmp_path):
        data = None
        if middle:  # equal batches, for a plain loader begins an interrupted epoch anew
            data = [DataLoader(ConcatDataset([Subset(TinyData().train, range(16))] * 6), 16), loaders()[1]]
        file = "step=8.ckpt" if middle else "step=12.ckpt"

        def run(seed, cut, **resume):
            every = {"every_n_train_steps": 8} if middle else {"every_n_epochs": 1}
            keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", **every)
            mask = SparsityMask(0.8, **options)
            module = module_with(OPTIMIZERS["AdamW"])
            limits = {"epochs": 4, "max_steps": 21 if middle else -1, "enable_checkpointing": True}
            _, module, _ = fit(mask, module=module, callbacks=[cut, keep], seed=seed, data=data, **limits, **resume)
            return mask.masks, module.state_dict()

        masks, weights = run(3, CutAt(0))
        with pytest.raises(RuntimeError, match="power cut"):
            run(3, CutAt(14))
        again, resumed = run(99, CutAt(0), ckpt_path=tmp_path / file)
        assert again == masks
        for name, value in weights.items():
            assert torch.equal(resumed[name], value), name

    def test_a_dense_training_is_pruned_where_it_goes_on(self, tmp_path):
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(TinyClassifier(), *loaders())
        trainer.save_checkpoint(tmp_path / "dense.ckpt")
        _, module, _ = fit(SparsityMask(0.8), ckpt_path=tmp_path / "dense.ckpt")
        assert zeros(module) == round(SIZE * 0.8)

    def test_the_state_is_a_bit_a_weight_and_read_by_the_safe_loader(self, tmp_path):
        trainer, module, _ = fit(SparsityMask(0.8))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["SparsityMask"]
        assert sum(bits.numel() for bits in state["masks"]["bits"].values()) == SIZE // 8
        weights = open_checkpoint(tmp_path / "x.ckpt")
        assert torch.equal(weights["net.0.weight"], module.net[0].weight)

    def test_masks_of_another_model_are_refused(self, tmp_path):
        class Wide(TinyClassifier):
            def __init__(self):
                super().__init__()
                self.net[0], self.net[3] = nn.Linear(8, 32), nn.Linear(32, 3)

        trainer, _, _ = fit(SparsityMask(0.8))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        content["state_dict"] = Wide().state_dict()
        torch.save(content, tmp_path / "y.ckpt")
        with pytest.raises(UnsupportedSetup, match=r"the checkpoint holds the masks of another model.*net\.0\.weight"):
            fit(SparsityMask(0.8), epochs=5, module=Wide(), ckpt_path=tmp_path / "y.ckpt")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 0.9}, r"with sparsity=0\.8, not 0\.9"),
            ({"sparsity": 0.5}, r"with sparsity=0\.8, not 0\.5"),
            ({"stop": "4 epochs"}, "stop=None, not '4 epochs'"),
            ({"selection": "uniform"}, "selection='global', not 'uniform'"),
        ],
        ids=str,
    )
    def test_other_options_are_refused(self, options, message, tmp_path):
        trainer, _, _ = fit(SparsityMask(0.8))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        with pytest.raises(UnsupportedSetup, match=f"{message}.*Resume it with the options it was made with"):
            fit(SparsityMask(**{"sparsity": 0.8, **options}), epochs=5, ckpt_path=tmp_path / "x.ckpt")

    def test_damaged_masks_are_refused(self, tmp_path):
        trainer, _, _ = fit(SparsityMask(0.8))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        del content["callbacks"]["SparsityMask"]["masks"]["shapes"]
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(UnsupportedSetup, match="the masks are damaged: expected bits and shapes, found bits"):
            fit(SparsityMask(0.8), epochs=5, ckpt_path=tmp_path / "x.ckpt")

    def test_a_second_fit_keeps_its_masks(self):
        mask, module = SparsityMask(0.8, stop=12, every=3), TinyClassifier()
        quiet_trainer(max_epochs=3, callbacks=[mask]).fit(module, *loaders())
        masks = mask.masks
        quiet_trainer(max_epochs=3, callbacks=[mask]).fit(module, *loaders())
        assert mask.masks == masks
        assert zeros(module) == round(SIZE * 0.8)

    @pytest.mark.parametrize("resumed", [False, True])
    def test_another_module_begins_dense(self, resumed, tmp_path):
        mask = SparsityMask(0.8, start="2 epochs")
        trainer, first, _ = fit(mask)
        if resumed:
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            _, first, _ = fit(mask, epochs=4, ckpt_path=tmp_path / "x.ckpt")
        _, second, seen = fit(mask, seed=4)
        assert seen[0] == 0
        assert zeros(first) == zeros(second)


class TestMasksFromAFile:
    def _file(self, folder):
        mask = SparsityMask(0.6)
        _, module, _ = fit(mask, epochs=1)
        torch.save(mask.masks.state(), folder / "masks.pt")
        return mask.masks, module, str(folder / "masks.pt")

    def test_a_pruned_network_keeps_its_zeros(self, tmp_path):
        masks, module, path = self._file(tmp_path)
        mask = SparsityMask(masks_from=path)
        fit(mask, module=module)
        assert mask.masks == masks
        assert zeros(module) == round(SIZE * 0.6)

    def test_more_may_be_pruned(self, tmp_path):
        masks, module, path = self._file(tmp_path)
        mask = SparsityMask(0.8, masks_from=path, stop="2 epochs")
        _, _, seen = fit(mask, module=module)
        assert seen[0] == round(SIZE * 0.6)
        assert zeros(module) == round(SIZE * 0.8)
        assert not any((mask.masks[name] & ~masks[name]).any() for name in masks)

    def test_resume_goes_on_with_the_checkpoints_own(self, tmp_path):
        _, module, path = self._file(tmp_path)
        trainer, _, _ = fit(SparsityMask(0.8, masks_from=path), module=module, epochs=1)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        again = SparsityMask(0.8, masks_from=path)
        fit(again, epochs=2, ckpt_path=tmp_path / "x.ckpt")
        assert again.masks.pruned == round(SIZE * 0.8)

    @pytest.mark.parametrize("content", [None, b"", b"nothing", {"a": 1}, {"bits": {}, "shapes": {}}], ids=str)
    def test_files_that_are_none(self, content, tmp_path):
        path = tmp_path / "masks.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(LightningSoupError, match=r"masks\.pt"):
            fit(SparsityMask(masks_from=str(path)))


AVERAGES = {
    "ema": lambda: ExponentialAverage(0.9),
    "swa": lambda: EqualAverage(every=2),
    "lawa": lambda: LatestAverage(3),
    "zscl": lambda: WeightEnsemble(every=2),
}


class TestBesideAverages:
    @pytest.mark.parametrize("first", [False, True], ids=["average first", "mask first"])
    @pytest.mark.parametrize("average", AVERAGES)
    @pytest.mark.parametrize("options", [{}, {"stop": "3 epochs"}, {"stop": 14, "every": 2}], ids=str)
    def test_the_average_has_the_same_zeros(self, average, options, first, tmp_path):
        mask, live = SparsityMask(0.8, **options), AVERAGES[average]()
        callbacks = [mask, live] if first else [live, mask]
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks)
        module = with_a_large_head(TinyClassifier())
        trainer.fit(module, *loaders())
        assert zeros(module) == round(SIZE * 0.8)
        for name, kept in mask.masks.items():
            assert not module.get_parameter(name)[~kept].any()
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert (
            open_checkpoint(tmp_path / "x.ckpt", which="raw")["net.0.weight"][~mask.masks["net.0.weight"]] == 0
        ).all()

    @pytest.mark.parametrize("scale", ["trained", "frozen"])
    def test_a_network_that_is_called_module(self, scale, tmp_path):
        class Scaled(TinyClassifier):
            """A name that files keep, for not all begin with it; the average leaves out what is frozen."""

            def __init__(self):
                super().__init__()
                self.module = self._modules.pop("net")
                self.scale = nn.Parameter(torch.ones(1), requires_grad=scale == "trained")

            @property
            def net(self):
                return lambda x: self.scale * self.module(x)

        mask, module = SparsityMask(0.5, stop="2 epochs"), Scaled()
        trainer = quiet_trainer(max_epochs=3, callbacks=[mask, ExponentialAverage(0.9)])
        trainer.fit(module, *loaders())
        assert sum(int((module.get_parameter(name) == 0).sum()) for name in mask.masks) == mask.masks.pruned == 88
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert mask.masks.keys() <= open_checkpoint(tmp_path / "x.ckpt").keys()

    @pytest.mark.parametrize("first", [False, True])
    def test_lightnings_own_while_the_mask_is_fixed(self, first):
        mask, average = SparsityMask(0.8), EMAWeightAveraging(decay=0.9)
        module = with_a_large_head(TinyClassifier())
        trainer = quiet_trainer(max_epochs=3, callbacks=[mask, average] if first else [average, mask])
        trainer.fit(module, *loaders())
        assert zeros(module) == round(SIZE * 0.8)

    @pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.01)])
    def test_lightnings_own_while_it_changes_is_refused(self, average):
        with pytest.raises(UnsupportedSetup, match="so its average would be dense"):
            fit(SparsityMask(0.8, stop="2 epochs"), callbacks=[average()])

    def test_lightnings_own_before_it_is_pruned_is_refused(self):
        with pytest.raises(UnsupportedSetup, match="Prune at the beginning"):
            fit(SparsityMask(0.8, start=3), callbacks=[EMAWeightAveraging()])


def _train_on_a_rank() -> list:
    found = []
    for selection, options in (("global", {}), ("random", {"stop": 10, "every": 2})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = SparsityMask(0.8, selection, **options)
            _, module, _ = fit(mask, devices=2, strategy="ddp", data=loaders(8))
        found += [mask.masks[name].numpy() for name in mask.masks]
        found += [value.numpy() for value in module.state_dict().values()]
    return found


def test_two_ranks_agree():
    for a, b in zip(*run_on_two_ranks(_train_on_a_rank), strict=True):
        assert (a == b).all()


def test_pickle_and_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    mask = pickle.loads(pickle.dumps(SparsityMask(0.8)))
    fit(mask)
    assert isinstance(pickle.loads(pickle.dumps(mask)), SparsityMask)
    options = {
        "sparsity": 0.7,
        "selection": "erk",
        "start": 3,
        "stop": "2 epochs",
        "every": 0.25,
        "exclude": ["net.3.*"],
    }
    for made in through_yaml(TinyClassifier, "lightning_soup.callbacks.SparsityMask", options, tmp_path):
        assert (made.sparsity, made.selection, made.exclude) == (0.7, "erk", ["net.3.*"])
        assert str(made._schedule.stop) == "2 epochs"


@pytest.mark.parametrize("when", [{"start": 0, "stop": "50%", "every": 2}, {"start": 6}])
def test_a_soup_of_the_run_may_get_other_masks(when, tmp_path):
    soup = ModelSoup(last=2, dirpath=str(tmp_path))  # after steps 12 and 18
    with pytest.warns(UserWarning, match=r"ModelSoup stands beside .* prunes until .*Let it take later ones"):
        _, module, _ = fit(SparsityMask(0.5, **when), callbacks=[soup])
    assert zeros(module) == SIZE // 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 0.0}, "expected a share above 0 and below 1"),
            ({"sparsity": 1.0}, "expected a share above 0 and below 1"),
            ({"sparsity": 90}, "expected a share above 0 and below 1"),
            ({"sparsity": "lots"}, "expected a share above 0 and below 1"),
            ({"sparsity": None}, "give sparsity, the share to prune"),
            ({"selection": "largest"}, "expected global, uniform"),
            ({"selection": "2:4", "stop": 10}, "prunes at once"),
            ({"exclude": "net.*"}, "expected a list of patterns"),
            ({"every": 0, "stop": 3}, "expected more than 0"),
            ({"start": 5, "stop": 5}, "stop must come after start"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(UnsupportedSetup, match=message):
            SparsityMask(**{"sparsity": 0.5, **options})

    @pytest.mark.parametrize(
        ("options", "callbacks", "message"),
        [
            ({"exclude": ["*"]}, [], "nothing in TinyClassifier can be pruned"),
            ({"selection": "2:8"}, [], "2:8 prunes 0.75 of the weights at once, not 0.5"),
            ({"selection": "8:16"}, [], r"divide by 16, but not these: net.0.weight \(16, 8\)"),
            ({"start": "9 epochs"}, [], "training ends before that.*nothing would ever be pruned"),
            ({"stop": "9 epochs"}, [], "training ends before that, after 3"),
            ({}, [lambda: ModelPruning("l1_unstructured", amount=0.5)], "Remove it: SparsityMask prunes alone"),
            ({}, [ExpertsWeightAveraging], "Train with experts first"),
            ({}, [lambda: SparsityMaskOfAnotherKind(0.5)], "both prune. Keep one of them"),
        ],
        ids=without_addresses,
    )
    def test_before_training(self, options, callbacks, message):
        with pytest.raises(UnsupportedSetup, match=message):
            fit(SparsityMask(0.5, **options), callbacks=[make() for make in callbacks])

    def test_a_nan_is_not_ranked(self):
        module = TinyClassifier()
        with torch.no_grad():
            module.net[3].weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteWeights, match=r"net\.3\.weight has a NaN"):
            fit(SparsityMask(0.5), module=module)


class SparsityMaskOfAnotherKind(SparsityMask):
    """So that Lightning does not take the two for one."""


def test_evaluation_needs_nothing_to_prune():
    module, trainer = TinyClassifier(), quiet_trainer(callbacks=[SparsityMask(0.5, exclude=["*"])])
    trainer.validate(module, loaders()[1], verbose=False)
    assert zeros(module) == 0


def test_masks_can_be_looked_at():
    mask = SparsityMask(0.5)
    assert mask.masks is None
    assert mask.sparsity_reached == 0
    fit(mask)
    assert isinstance(mask.masks, Masks)
    assert mask.sparsity_reached == 0.5


def test_sparsity_is_logged():
    trainer, _, _ = fit(SparsityMask(0.8))
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(round(SIZE * 0.8) / SIZE)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("make", [lambda: SparsityMask(0.5), lambda: SparseModelSoup(0.5, retrain_epochs=1)])
def test_strategies_that_shard_are_refused_by_name(make, strategy):
    callback = make()
    trainer = quiet_trainer(callbacks=[callback])
    trainer.strategy.__class__ = strategy
    name = f"{type(callback).__name__} does not work with {strategy.__name__}"
    with pytest.raises(UnsupportedSetup, match=f"{name}: masks are laid over whole parameters"):
        callback.setup(trainer, TinyClassifier(), "fit")
