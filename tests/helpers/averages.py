"""The table of live averages, and slow, obviously right references for them: every row passes the same tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, LiveAverage, WeightEnsemble
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer

Weights = dict[str, Tensor]
STEPS_PER_EPOCH = 6  # 96 samples in batches of 16


class Trail(Callback):
    """Keeps the trainable weights at the start and after every real step of the first optimizer."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = [values_of(pl_module)]
        self.hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self.weights.append(values_of(pl_module)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.hook.remove()


def values_of(module: torch.nn.Module, frozen: bool = False) -> Weights:
    """The trainable weights (and the frozen ones, if asked for), whole, in float64. All ranks take part."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or frozen:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name.replace("_orig_mod.", "")] = value.detach().double().clone()
    return found


class FrozenFirst(TinyClassifier):
    """Begins with a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Unfreeze(Callback):
    """Lets that layer train from the second epoch on."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= 1:
            pl_module.net[0].requires_grad_(True)


class EveryWeight(Callback):
    """Keeps all weights after every real step, those that are not trained too."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights: list[Weights] = []

        def keep(*_: Any) -> None:
            self.weights.append(values_of(pl_module, frozen=True))

        self.hook = trainer.optimizers[0].register_step_post_hook(keep)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.hook.remove()


class TwoOptimizers(TinyClassifier):
    """Optimized by hand: an optimizer for each layer, both of which are stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.take_steps(self.optimizers(), batch_idx)

    def take_steps(self, optimizers: list[Any], batch_idx: int) -> None:
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.05) for layer in (0, 3)]


@dataclass(frozen=True)
class Row:
    """A callback with arguments, and its average after the steps of a trail (``trail[0]`` is the start)."""

    name: str
    make: Callable[..., LiveAverage]
    samples: Callable[[int, int], Sequence[int]]
    mean: Callable[[Weights, list[Weights]], Weights]

    def expected(self, trail: list[Weights], per_epoch: int = STEPS_PER_EPOCH) -> Weights:
        taken = self.samples(len(trail) - 1, per_epoch)
        return self.mean(trail[0], [trail[step] for step in taken])


def weighted(terms: Sequence[Weights], shares: Sequence[float]) -> Weights:
    return {name: sum(s * term[name] for s, term in zip(shares, terms, strict=True)) for name in terms[0]}


def equal(_: Weights, taken: list[Weights]) -> Weights:
    return weighted(taken, [1 / len(taken)] * len(taken))


def with_start(start: Weights, taken: list[Weights]) -> Weights:
    return equal(start, [start, *taken])


def exponential(decay: float, warmup: bool) -> Callable[[Weights, list[Weights]], Weights]:
    def mean(_: Weights, taken: list[Weights]) -> Weights:
        average = taken[0]
        for n, weights in enumerate(taken[1:], start=1):
            d = min(decay, n / (n + 10)) if warmup else decay
            average = {name: d * average[name] + (1 - d) * weights[name] for name in weights}
        return average

    return mean


ROWS = [
    Row("ema", lambda **o: ExponentialAverage(0.8, **o), lambda t, e: range(1, t + 1), exponential(0.8, True)),
    Row(
        "ema late, every 2",
        lambda **o: ExponentialAverage(0.6, warmup=False, start=3, every=2, **o),
        lambda t, e: range(5, t + 1, 2),
        exponential(0.6, False),
    ),
    Row("swa", lambda **o: EqualAverage(start="1 epochs", **o), lambda t, e: range(2 * e, t + 1, e), equal),
    Row("swa by steps", lambda **o: EqualAverage(start=2, every=3, **o), lambda t, e: range(5, t + 1, 3), equal),
    Row(
        "lawa",
        lambda **o: LatestAverage(3, every=2, **o),
        lambda t, e: list(range(2, t + 1, 2))[-3:],
        equal,
    ),
    Row("zscl", lambda **o: WeightEnsemble(every=4, **o), lambda t, e: range(1, t + 1, 4), with_start),
]
ids = [row.name.replace(" ", "-") for row in ROWS]


def fit(average: Callback | list[Callback], epochs: int = 3, module: Any = None, seed: int = 3, **options: Any) -> Any:
    """Train a tiny classifier (on batches in a fixed order), and return the Trainer, the module and the trail."""
    torch.manual_seed(seed)
    module = (module or TinyClassifier)()
    trail = Trail()
    given = average if isinstance(average, list) else [average]
    fit_options = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    data = options.pop("data", None) or loaders()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*given, trail, *options.pop("callbacks", [])], **options)
    trainer.fit(module, *data, **fit_options)
    return trainer, module, trail.weights


def loaders(batch_size: int = 16) -> tuple[DataLoader, DataLoader]:
    data = TinyData()
    return DataLoader(data.train, batch_size), DataLoader(data.val, batch_size)


def assert_close(module_or_weights: Any, expected: Weights, atol: float = 2e-6) -> None:
    got = module_or_weights if isinstance(module_or_weights, dict) else values_of(module_or_weights)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
