"""LCSC: coefficients of any sign for the checkpoints of one training, over several seeds, beside averages over time.

    python examples/lcsc.py

A small network learns 1,500 MNIST digits at a constant learning rate. The weights of every 20th step are kept, and
their coefficients are searched on 1,200 images; 500 others choose among the finalists of a search, and 1,800 test. Less
than two minutes a seed on one core. ``--write`` puts the table into RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from results import RESULTS, quiet_trainer, spread, verdicts, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import (
    CheckpointTrail,
    EvolutionarySoup,
    ExponentialAverage,
    ModuleEvaluator,
    Soup,
    combine,
    open_checkpoint,
)
from lightning_soup.data.digit_images import read_images
from lightning_soup.recipes.search import ema_coefficients
from lightning_soup.runs.figures import BLUE, COLOURS, new_figure

STEPS, EVERY, KEEP = 600, 20, 24
SIZES = {"train": 1500, "search": 1200, "third": 500, "test": 1800}
DECAYS = [0.9, 0.95, 0.98, 0.99, 0.995]  # of averages over every step
Weights = Mapping[str, Tensor]
Row = dict[str, float]
ROWS = {
    "last": "last checkpoint",
    "single": "best single checkpoint",
    "saved": "best EMA of the saved checkpoints",
    "uniform": "uniform over the saved checkpoints",
    "ema": "EMA at every step, best of five decays",
    "evolution": "LCSC, evolutionary",
    "cma": "LCSC, CMA-ES",
    "ridge": "LCSC, evolutionary, ridge",
    "third": "LCSC, evolutionary, chosen on the third split",
}
SEARCHED = ("evolution", "cma")


class Mnist(LightningDataModule):
    """5,000 digits of MNIST in four parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        images, labels = read_images("mnist")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts = order.split(list(SIZES.values()))
        self.sets = {n: TensorDataset(images[part], labels[part]) for n, part in zip(SIZES, parts, strict=True)}

    def train_dataloader(self) -> DataLoader:
        """In random order."""
        return DataLoader(self.sets["train"], 32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.sets["search"], 600)

    def third_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.sets["third"], 500)


class Network(LightningModule):
    """Two convolutions and two linear layers; noise on the inputs while training."""

    def __init__(self, lr: float = 0.06) -> None:
        super().__init__()
        self.save_hyperparameters()
        convolutions = [nn.Conv2d(1, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, 24, 5, stride=2), nn.ReLU()]
        self.layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(384, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of noisy inputs."""
        x, y = batch
        return cross_entropy(self(x + 0.3 * torch.randn_like(x)), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logs the cross entropy."""
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD at a constant rate."""
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


class Judge:
    """Cross entropy and accuracy of weights."""

    def __init__(self, data: Mnist) -> None:
        self.module, self.data = Network(), data

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Row:
        """On the searched images and on the test images."""
        found = {}
        for name in ("search", "test"):
            images, labels = self.data.sets[name].tensors
            logits = torch.func.functional_call(self.module, dict(weights), (images,))
            found[name] = cross_entropy(logits, labels).item()
            found[f"{name}_acc"] = 100 * (logits.argmax(1) == labels).double().mean().item()
        return found


def train(seed: int, data: Mnist, folder: Path) -> tuple[list[Path], list[Weights]]:
    """One training: the files of its trail, and its averages over every step."""
    seed_everything(seed, verbose=False)
    trail = CheckpointTrail(EVERY, KEEP, dirpath=str(folder / "trail"))
    averages = [ExponentialAverage(d, name=f"ema{d}", evaluate_on=[], leave="live") for d in DECAYS]
    trainer = quiet_trainer(-1, [trail, *averages], max_steps=STEPS)
    trainer.fit(Network(), datamodule=data)
    trainer.save_checkpoint(folder / "end.ckpt")
    return [Path(file) for file in trail.files], [open_checkpoint(folder / "end.ckpt", which=a.name) for a in averages]


def run(seed: int, budget: int) -> tuple[dict[str, Row], dict[str, Soup], list[tuple[int, float, float]]]:
    """All rows of one seed, its soups, and the search and test CE of the best so far over the evaluations."""
    data = Mnist(seed)
    judge = Judge(data)
    evaluator = ModuleEvaluator(Network(), data, "val_loss")
    with tempfile.TemporaryDirectory() as name:
        files, averages = train(seed, data, Path(name))

        def best(candidates: list[Weights]) -> Row:
            return min(map(judge, candidates), key=lambda row: row["search"])

        options = {"budget": budget, "seed": seed, "third": "ignore", "record": f"{name}/search.json"}
        options["common_start"] = "ignore"  # one training, from nothing: its steps are further apart than fine-tunes
        recipes = {
            "evolution": EvolutionarySoup(**options),
            "cma": EvolutionarySoup("cma", **{**options, "record": None}),
            "ridge": EvolutionarySoup(ridge=0.05, **{**options, "record": None}),
            "third": EvolutionarySoup(**{**options, "third": "require"}),  # of the first one's record: nothing again
        }
        soups = {key: recipe.cook(files, evaluator) for key, recipe in recipes.items()}
        saved = [combine(files, ema_coefficients(KEEP, d)) for d in (0.3, 0.6, 0.8, 0.9, 0.95)]
        rows = {
            "last": judge(open_checkpoint(files[-1])),
            "single": best([open_checkpoint(file) for file in files]),
            "saved": best(saved),
            "uniform": judge(combine(files, [1 / KEEP] * KEEP)),
            "ema": best(averages),
            **{key: judge(soup.weights()) for key, soup in soups.items()},
        }
        curve = []
        for number, trial in enumerate(soups["evolution"].history, 1):
            if trial.kept:
                alpha = [trial.values[f"α{k}"] for k in range(1, KEEP + 1)]
                found = judge(combine(files, alpha))
                curve.append((number, found["search"], found["test"]))
    return rows, soups, curve


def table(runs: list[dict[str, Row]]) -> str:
    """Every row, as Markdown."""
    lines = ["| | search CE | test CE | test accuracy, % |", "| --- | --- | --- | --- |"]
    for key, name in ROWS.items():
        cells = [spread([run[key][c] for run in runs], d) for c, d in (("search", 3), ("test", 3), ("test_acc", 1))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(runs: list[dict[str, Row]], soups: list[dict[str, Soup]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    others = [key for key in ROWS if key in ("last", "single", "saved", "uniform", "ema")]
    mean = {key: statistics.mean(run[key]["test"] for run in runs) for key in ROWS}
    found = []
    for key in SEARCHED:
        name = ROWS[key]
        ahead = sum(all(run[key]["search"] < run[other]["search"] for other in others) for run in runs)
        told = f"{name}: the search CE is below every average's and checkpoint's in {ahead} of {len(runs)} seeds"
        found.append((told, ahead == len(runs)))
        order = [mean[key], mean["uniform"], mean["single"], mean["last"]]
        told = " < ".join(f"{value:.3f}" for value in order)
        rising = all(a < b for a, b in pairwise(order))
        found.append((f"{name}: mean test CE, LCSC < uniform < best single < last ({told})", rising))
        less = 100 * (1 - mean[key] / mean["last"])
        found.append((f"{name}: mean test CE more than 30 % below the last checkpoint's ({less:.0f} %)", less > 30))
        negative = [sum(a < 0 for a in soup[key].coefficients) for soup in soups]
        told = f"{name}: negative coefficients in every seed ({min(negative)} to {max(negative)} of {KEEP})"
        found.append((told, min(negative) > 0))
    return found


def overfitting(runs: list[dict[str, Row]], soups: list[dict[str, Soup]]) -> str:
    """What the search gains where it looked, and what of it is left on other images."""
    lines = []
    for other in ("ema", "uniform"):
        gains = {c: [run[other][c] - run["evolution"][c] for run in runs] for c in ("search", "test")}
        points = spread([run["evolution"]["test_acc"] - run[other]["test_acc"] for run in runs], 1)
        lines.append(
            f"- against {ROWS[other]}: search CE lower by {spread(gains['search'], 3)}, test CE by "
            f"{spread(gains['test'], 3)} (lower in {sum(g > 0 for g in gains['test'])} of {len(runs)} seeds), accuracy "
            f"higher by {points} points"
        )
    gap = spread([run["evolution"]["test"] - run["evolution"]["search"] for run in runs], 3)
    before = spread([run["uniform"]["test"] - run["uniform"]["search"] for run in runs], 3)
    sizes = [sum(map(abs, soup["evolution"].coefficients)) for soup in soups]
    return (
        f"The evolutionary search overfits the {SIZES['search']:,} images that it searches: its test CE lies {gap} "
        f"above its search CE, that of the uniform average {before}. Σ|α| is {min(sizes):.1f} to {max(sizes):.1f}.\n\n"
        + "\n".join(lines)
    )


def picture(curves: list[list[tuple[int, float, float]]], budget: int, path: Path) -> None:
    """Search and test CE of the best so far, over the evaluations: a line for each seed."""
    pictures: list = []
    with new_figure(7.2, 3.2, pictures, path.stem, "") as figure:
        axis = figure.subplots()
        for number, curve in enumerate(curves):
            x, *values = zip(*curve, strict=True)
            for y, colour, label in zip(values, (BLUE, COLOURS[0]), ("searched images", "test images"), strict=True):
                named = {"label": label} if number == 0 else {}
                axis.step([*x, budget], [*y, y[-1]], where="post", color=colour, alpha=0.7, linewidth=1, **named)
        axis.set_xlabel("evaluations")
        axis.set_ylabel("cross entropy of the best so far")
        axis.legend()
    path.write_bytes(pictures[0].png)


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--budget", type=int, default=400, help="evaluations of a search")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    found = [run(seed, options.budget) for seed in range(options.seeds)]
    rows, soups, curves = ([one[i] for one in found] for i in range(3))
    text = "\n\n".join(
        [
            "### LCSC: MNIST, 24 checkpoints of one training",
            f"{options.seeds} seeds, mean ± standard deviation; {options.budget} evaluations of a search. CE is the "
            "cross entropy. All choices but that of the last row are made on the searched images.",
            table(rows),
            verdicts(claims(rows, soups)),
            overfitting(rows, soups),
            "![search and test CE over the evaluations](lcsc.png)",
        ]
    )
    print(text)
    if options.write:
        write("lcsc", text)
        picture(curves, options.budget, RESULTS.parent / "lcsc.png")


if __name__ == "__main__":
    main()
