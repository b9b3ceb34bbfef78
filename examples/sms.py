"""Sparse model soups on digits, over several seeds: soups of pruned networks beside pruning alone.

    python examples/sms.py

A small network with BatchNorm learns 600 real digits, a fifth of them with random labels, and is pruned to 5 % of its
weights in three cycles. All methods begin with the same dense training. About ten seconds a seed on one core, twice:
the second table is the setting where soups are not what pays, digits with right labels. ``--write`` puts the tables
into RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from results import RESULTS, quiet_trainer, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup import ModuleEvaluator, SparseModelSoup, combine, open_checkpoint
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.prunable_weights import prunable
from lightning_soup.layers.pruning import prune_
from lightning_soup.runs.figures_sparse import sparse_picture

SPARSITY, CYCLES, DENSE, RETRAIN = 0.95, 3, 20, 10
Scores = dict[str, float]
COLUMNS = {
    "soup": "SMS: the soup",
    "mean": "mean copy",
    "best": "best copy (by test)",
    "imp": "IMP",
    "imp_long": "IMP, retrained m times as long",
    "reprune": "IMP-RePrune",
    "average": "IMP-AVG",
    "ensemble": "prediction ensemble",
}


class Digits(LightningDataModule):
    """Of scikit-learn's digits 600 to train on, 300 to validate and 897 to test."""

    def __init__(self, seed: int, wrong: float) -> None:
        super().__init__()
        images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=draw)
        images, labels = (images / 16).float()[order], labels[order]
        chosen = torch.rand(600, generator=draw) < wrong
        train = labels[:600].clone()
        train[chosen] = torch.randint(10, (int(chosen.sum()),), generator=draw)
        self.sets = [TensorDataset(images[:600], train)]
        self.sets += [TensorDataset(images[a:b], labels[a:b]) for a, b in ((600, 900), (900, None))]

    def train_dataloader(self) -> DataLoader:
        """In random order."""
        return DataLoader(self.sets[0], 64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.sets[1], 300)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.sets[2], 897)


class Network(LightningModule):
    """64-256-256-10 with BatchNorm; noise on its inputs while training."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [[nn.Linear(a, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()] for a in (64, 256)]
        self.layers = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(256, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of noisy inputs."""
        x, y = batch
        return cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logs the accuracy."""
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_acc", self.accuracy)
        return cross_entropy(logits, y)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits."""
        return self(batch[0])

    def configure_optimizers(self) -> dict:
        """SGD whose rate falls linearly."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.hparams.lr, momentum=0.9, nesterov=True, weight_decay=self.hparams.weight_decay
        )
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sms(seed: int, data: Digits, folder: Path, copies: int, epochs: int, first: int = 0) -> SparseModelSoup:
    """Train densely, then prune and retrain in cycles; the dense training is the same for all of one seed."""
    seed_everything(seed, verbose=False)
    soup = SparseModelSoup(
        SPARSITY, CYCLES, copies, epochs, DENSE, seed=1000 * seed + first, dirpath=str(folder), keep_copies=True
    )
    quiet_trainer(-1, [soup]).fit(Network(), datamodule=data)
    return soup


class Judge:
    """Test accuracy of weights with BatchNorm statistics of their own."""

    def __init__(self, data: Digits) -> None:
        self.module, self.data = Network(), data
        self.evaluator = ModuleEvaluator(self.module, data, "val_acc")

    @torch.no_grad()
    def logits(self, weights: dict[str, Tensor]) -> Tensor:
        """Of the test images."""
        self.evaluator.recalibrate(weights)
        self.module.eval()
        return self.module(self.data.sets[2].tensors[0])

    def accuracy(self, logits: Tensor) -> float:
        """In percent."""
        return 100 * float((logits.argmax(1) == self.data.sets[2].tensors[1]).float().mean())

    def __call__(self, weights: dict[str, Tensor]) -> float:
        """Accuracy of weights."""
        return self.accuracy(self.logits(weights))


def run(seed: int, copies: int, wrong: float) -> tuple[Scores, dict[str, list[float]], Masks]:
    """All methods from one dense training: test accuracies, some over the cycles, and the masks of the soup."""
    data = Digits(seed, wrong)
    judge = Judge(data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def opened(part: str, cycle: int = CYCLES) -> dict[str, Tensor]:
            return dict(open_checkpoint(folder / f"cycle={cycle}-{part}.ckpt"))

        soup = sms(seed, data, folder, copies, RETRAIN)
        members = [judge.logits(opened(f"copy={j}")) for j in range(1, copies + 1)]
        alone = [judge.accuracy(member) for member in members]
        scores = {"soup": judge(opened("soup")), "mean": statistics.mean(alone), "best": max(alone)}
        scores["ensemble"] = judge.accuracy(torch.stack(members).softmax(-1).mean(0))

        def over_cycles() -> list[float]:
            return [judge(opened("soup", cycle)) for cycle in range(1, CYCLES + 1)]

        curves = {"soup": over_cycles()}
        scores["sparsity"] = sparsity(opened("soup"))
        assert soup.masks.pruned == round(soup.masks.size * SPARSITY)
        sms(seed, data, folder, 1, copies * RETRAIN)
        curves["imp_long"] = over_cycles()
        scores["imp_long"] = curves["imp_long"][-1]
        runs = []
        for first in range(copies):
            sms(seed, data, folder, 1, RETRAIN, first)
            runs.append(opened("soup"))
            if first == 0:
                curves["imp"] = over_cycles()
    scores["imp"] = judge(runs[0])
    average = combine(runs, [1 / copies] * copies)
    scores["average"], scores["average_sparsity"] = judge(average), sparsity(average)
    prune_({name: average[name] for name in prunable(judge.module)}, SPARSITY)
    scores["reprune"] = judge(average)
    return scores, curves, soup.masks


def sparsity(weights: dict[str, Tensor]) -> float:
    """The share of zeros among the prunable weights, in percent."""
    names = list(prunable(Network()))
    return 100 * sum(int((weights[n] == 0).sum()) for n in names) / sum(weights[n].numel() for n in names)


def table(results: dict[int, list[Scores]]) -> str:
    """Accuracy of every method, as Markdown."""
    lines = [f"| test accuracy, % | {' | '.join(f'm = {m}' for m in results)} |", "| --- |" + " --- |" * len(results)]
    for key, name in COLUMNS.items():
        cells = []
        for rows in results.values():
            told = spread([row[key] for row in rows], 1)
            if key == "average":
                told += f" (only {statistics.mean(row['average_sparsity'] for row in rows):.1f} % pruned)"
            cells.append(told)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(results: dict[int, list[Scores]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    found = []
    for copies, rows in results.items():
        seeds = len(rows)
        ahead = sum(row["soup"] > row["mean"] for row in rows)
        found.append((f"m = {copies}: soup > mean copy in {ahead} of {seeds} seeds", ahead >= seeds * 10 / 12))
        for key in ("imp", "imp_long", "reprune"):
            gains = [row["soup"] - row[key] for row in rows]
            gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / seeds**0.5:.1f} s.e."
            found.append((f"m = {copies}: soup > {COLUMNS[key]} on average ({gain})", statistics.mean(gains) > 0))
        short = 100 * SPARSITY - statistics.mean(row["average_sparsity"] for row in rows)
        found.append((f"m = {copies}: IMP-AVG misses the sparsity by 2 points or more ({short:.1f})", short >= 2))
        apart = abs(statistics.mean(row["soup"] - row["ensemble"] for row in rows))
        found.append((f"m = {copies}: the prediction ensemble is within a point ({apart:.1f})", apart <= 1))
    return found


def mean_curves(curves: list[dict[str, list[float]]], copies: int) -> dict[str, list[tuple[float, float, float]]]:
    """By method: sparsity, mean accuracy and its standard error after each cycle."""
    reached = [1 - (1 - SPARSITY) ** (cycle / CYCLES) for cycle in range(1, CYCLES + 1)]
    found = {}
    for key, rows in {key: [one[key] for one in curves] for key in curves[0]}.items():
        values = torch.tensor(rows)
        error = values.std(0) / len(rows) ** 0.5
        name = COLUMNS[key] + (f", m = {copies}" if key == "soup" else "")
        found[name] = list(zip(reached, values.mean(0).tolist(), error.tolist(), strict=True))
    return found


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="two or more")
    parser.add_argument("--copies", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--clean-seeds", type=int, default=12, help="seeds of the case with right labels; 0: leave out")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    runs = {m: [run(seed, m, 0.2) for seed in range(options.seeds)] for m in options.copies}
    results = {m: [scores for scores, _, _ in row] for m, row in runs.items()}
    curves, masks = [one for _, one, _ in runs[options.copies[0]]], runs[options.copies[0]][0][2]
    about = f"{options.seeds} seeds, mean ± standard deviation. 95 % pruned in three cycles, m copies in each."
    parts = ["### SMS: digits, a fifth with random labels", about, table(results), verdicts(claims(results))]
    if options.clean_seeds:
        copies = options.copies[0]
        clean = {copies: [run(seed, copies, 0.0)[0] for seed in range(options.clean_seeds)]}
        gains = [row["soup"] - row["imp_long"] for row in clean[copies]]
        told = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f} s.e."
        parts += ["#### The same with right labels", f"{options.clean_seeds} seeds.", table(clean)]
        parts.append(f"Here longer retraining of one network pays, not a soup: soup − IMP retrained as long is {told}")
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("sms", text)
        sparse_picture(mean_curves(curves, options.copies[0]), masks, "test accuracy, %", RESULTS.parent / "sms.png")


if __name__ == "__main__":
    main()
