"""EWA on digits, over several seeds: what averaging the experts in training does to merging them at its end.

    python examples/ewa.py

A small ViT learns 300 real digits from nothing, plainly and with four experts in each feed-forward network, about ten
seconds a run on one core. "Merged" is the plain network with the mean weights, which is what ships; "routed" shares the
tokens out at random as in training; "single" is the first expert. ``--write`` puts the tables into RESULTS.md.

    python examples/ewa.py --regimes 10

looks for a setting in which experts beat the plain network, the same seeds for both: more wrong labels, longer
training, deeper and wider networks (eight minutes for each seed on one core).
"""

import argparse
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from results import quiet_trainer, spread, verdicts, write
from torch import nn

from lightning_soup import ExpertsWeightAveraging, HandwritingDataModule, ImageClassifier
from lightning_soup.layers.conversion import experts_of

CONFIG = Path(__file__).parents[1] / "configs" / "ewa_vit.yaml"
SCORES = {"merged": "merged", "routed": "routed", "single": "single expert"}
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "independent experts, β = 0": {"init": "independent", "share_rate": 0.0},
    "independent experts, EWA": {"init": "independent", "share_rate": 0.3},
    "copied experts, β = 0": {"init": "copy", "share_rate": 0.0},
    "copied experts, EWA": {"init": "copy", "share_rate": 0.3},
}

REGIMES: dict[str, dict[str, Any]] = {
    "as above": {},
    "30 % random labels": {"noise": 0.3},
    "60 % random labels": {"noise": 0.6},
    "30 % random labels, 150 epochs": {"noise": 0.3, "epochs": 150},
    "150 epochs": {"epochs": 150},
    "6 blocks": {"depth": 6},
    "hidden layers of 8 widths": {"mlp_ratio": 8},
    "100 labels": {"train_size": 100, "epochs": 150},
}

Scores = dict[str, float]


class Measure(Callback):
    """Scores the model in its three forms before it is converted."""

    def __init__(self, data: HandwritingDataModule) -> None:
        self.data, self.scores = data, {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Experts are still there."""
        layers = experts_of(pl_module)
        pl_module.eval()
        self.scores["merged"] = accuracy(pl_module, self.data)
        if layers:
            first = [layer.experts[0] for layer in layers.values()]
            for layer in layers.values():
                layer.training = True  # the layer itself, not what is in it: no dropout
            self.scores["routed"] = accuracy(pl_module, self.data)
            forwards = [layer.forward for layer in layers.values()]
            for layer, expert in zip(layers.values(), first, strict=True):
                layer.forward = expert.forward
            self.scores["single"] = accuracy(pl_module, self.data)
            for layer, forward in zip(layers.values(), forwards, strict=True):
                layer.forward = forward
            [callback] = [one for one in trainer.callbacks if isinstance(one, ExpertsWeightAveraging)]
            self.scores["spread"] = 100 * callback.spread
        pl_module.train()


@torch.no_grad()
def accuracy(model: nn.Module, data: HandwritingDataModule) -> float:
    """Accuracy on the test set, in percent."""
    right = total = 0
    for images, targets in data.test_dataloader()[0]:
        right += int((model(images).argmax(1) == targets).sum())
        total += len(targets)
    return 100 * right / total


def run(
    seed: int,
    options: dict[str, Any] | None,
    epochs: int = 50,
    noise: float = 0.0,
    train_size: int = 300,
    **architecture: int,
) -> Scores:
    """Train once and measure."""
    config = yaml.safe_load(CONFIG.read_text())
    seed_everything(seed, verbose=False)
    arguments = config["model"]["init_args"]
    model = ImageClassifier(**{**arguments, "model_args": {**arguments["model_args"], **architecture}})
    data = HandwritingDataModule(**{**config["data"]["init_args"], "seed": seed, "train_size": train_size})
    data.setup()
    if noise:
        wrong(data, noise, seed)
    measure = Measure(data)
    experts = [] if options is None else [ExpertsWeightAveraging(4, layers="all", **options)]
    quiet_trainer(epochs, [*experts, measure]).fit(model, datamodule=data)
    return measure.scores


def wrong(data: HandwritingDataModule, share: float, seed: int) -> None:
    """Give a share of the training images a random label."""
    labels = data.train_dataloader().dataset.targets
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(labels), generator=generator) < share
    labels[chosen] = torch.randint(10, (int(chosen.sum()),), generator=generator)


def table(results: dict[str, list[Scores]]) -> str:
    """Accuracy of every form, and the spread of the experts, as Markdown."""
    lines = [f"| accuracy, % | {' | '.join(SCORES.values())} | spread of the experts, % |"]
    lines.append("| --- |" + " --- |" * (len(SCORES) + 1))
    for name, rows in results.items():
        cells = [spread([row[key] for row in rows], 1) if key in rows[0] else "" for key in SCORES]
        apart = spread([row["spread"] for row in rows]) if "spread" in rows[0] else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {apart} |")
    return "\n".join(lines)


def regimes(seeds: int) -> str:
    """How far each kind of experts, merged, is from the plain network of the same seed, in each setting."""
    names = list(METHODS)[1:]
    lines = [f"| merged − dense, points | dense, % | {' | '.join(names)} |", "| --- |" + " --- |" * len(METHODS)]
    for title, setting in REGIMES.items():
        scores = {name: [run(s, o, **setting)["merged"] for s in range(seeds)] for name, o in METHODS.items()}
        dense = scores.pop("dense")
        gains = [[one - other for one, other in zip(found, dense, strict=True)] for found in scores.values()]
        cells = [f"{statistics.mean(gain):+.1f} ± {statistics.stdev(gain) / seeds**0.5:.1f}" for gain in gains]
        lines.append(f"| {title} | {statistics.mean(dense):.1f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    about = f"{seeds} seeds, the same for both; mean ± standard error of the difference."
    return "\n\n".join(["### Where experts beat the plain network", about, "\n".join(lines)])


def claims(results: dict[str, list[Scores]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    dense, apart, ewa = (results[name] for name in list(METHODS)[:3])

    def mean(rows: list[Scores], key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    gap = max(abs(row["merged"] - row["routed"]) for row in ewa)
    widest = max(row["spread"] for row in ewa)
    loss = mean(apart, "routed") - mean(apart, "merged")
    behind = mean(ewa, "merged") - mean(dense, "merged")
    copied = results["copied experts, β = 0"]
    kept = mean(copied, "merged") - mean(copied, "single")
    return [
        (f"EWA: merged and routed are within 0.5 points on every seed (at most {gap:.2f} apart)", gap <= 0.5),
        (f"EWA: experts end less than 0.1 % apart on every seed (at most {widest:.3f} %)", widest < 0.1),
        (f"independent experts without averaging lose 3 points or more when they are merged ({loss:.1f})", loss >= 3),
        (f"EWA is at most 2 points below dense ({behind:+.1f})", behind >= -2),
        (f"copied experts without averaging: merged is no worse than one of them ({kept:+.1f})", kept >= 0),
    ]


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--noisy-seeds", type=int, default=5, help="seeds of the case with random labels; 0: leave out")
    parser.add_argument("--regimes", type=int, default=0, help="instead, look for a gain with so many seeds")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.regimes:
        text = regimes(options.regimes)
        print(text)
        if options.write:
            write("ewa-regimes", text)
        return

    def all_methods(seeds: int, noise: float) -> dict[str, list[Scores]]:
        return {name: [run(s, o, options.epochs, noise) for s in range(seeds)] for name, o in METHODS.items()}

    def about(seeds: int) -> str:
        return f"{seeds} seeds, mean ± standard deviation."

    results = all_methods(options.seeds, 0.0)
    parts = ["### EWA: 300 digits, a small ViT from nothing", about(options.seeds), table(results)]
    parts.append(verdicts(claims(results)))
    if options.noisy_seeds:
        noisy = all_methods(options.noisy_seeds, 0.3)
        parts += ["#### The same with 30 % random labels", about(options.noisy_seeds), table(noisy)]
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("ewa", text)


if __name__ == "__main__":
    main()
