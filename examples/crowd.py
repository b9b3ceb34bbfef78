"""Labels of a crowd: the mean of seven soft labels, as labels and as what a classifier learns from.

    python examples/crowd.py

Twenty-five simulated workers (15 good, 7 poor, 3 who give one answer whatever they see) give each of 500 real digits
five labels. Soft labels are compared with the true ones; then classifiers learn from each method's labels and are
tested on other digits, on their corruptions, and on MNIST, the other handwriting: a perceptron of three layers, which
can learn labels by heart, and for fewer seeds a small ViT whose images are augmented. Three minutes a data seed on one
core, and six more for each of the first two. ``--write`` puts the tables into RESULTS.md and the picture beside it.
"""

import argparse
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningModule, seed_everything
from results import RESULTS, quiet_trainer, spread, verdicts, write
from torch import Tensor, nn

from lightning_soup import (
    CrowdDataModule,
    HandwritingDataModule,
    ImageClassifier,
    SimulatedCrowd,
    label_quality,
    measure_calibration,
)
from lightning_soup.data.label_aggregation import AGGREGATES, METHODS
from lightning_soup.evaluation.calibration import Calibration, LabelQuality
from lightning_soup.modules.classification import ClassificationModule
from lightning_soup.runs.figures import BLUE, GREY, new_figure

ITEMS = 500
OTHERS = [name for name in AGGREGATES if name != "mean"]
LEARNED = ["majority", *METHODS, "mean"]  # what a classifier learns from
SMOOTHED = {"majority, smoothed": "majority", "mean, smoothed": "mean"}  # ε = 0.3, as soft as softmax
TESTS = {"test": "UCI test", "corrupted": "corrupted", "mnist": "MNIST"}
SHIFTED = ["corrupted", "mnist"]

Labels = dict[str, LabelQuality]
Run = dict[str, dict[str, Calibration]]  # by method, by test set


class Perceptron(ClassificationModule):
    """784-64-64-10, trained with Adam on soft targets; everything else is the package's."""

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int = 0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        targets: str = "soft",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.layers(images)

    def trained_part(self) -> nn.Module:
        """All of it."""
        return self.layers


def small_vit(label_smoothing: float) -> ImageClassifier:
    """As in configs/crowd_digits.yaml."""
    shape = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    head = {"global_pool": "avg", "class_token": False, "weight_init": "jax"}
    return ImageClassifier(
        "vit_tiny_patch16_224",
        img_size=28,
        in_chans=1,
        model_args=shape | head,
        lr=3e-3,
        warmup=20,
        label_smoothing=label_smoothing,
        targets="soft",
    )


@dataclass(frozen=True)
class Network:
    """A classifier, how its images are augmented, and for how long it is trained."""

    make: Callable[[float], LightningModule]  # of a label smoothing
    augment: str
    epochs: int


PERCEPTRON = Network(lambda smoothing: Perceptron(label_smoothing=smoothing), "none", 40)
VIT = Network(small_vit, "strong", 60)


def crowd(method: str, seed: int, augment: str = "none") -> CrowdDataModule:
    """The digits and the crowd of a data seed."""
    items = HandwritingDataModule(train_size=ITEMS, val_size=0, seed=seed, augment=augment, batch_size=50)
    data = CrowdDataModule(items, SimulatedCrowd(seed=seed), method=method)
    data.setup()
    return data


def labels(seed: int) -> Labels:
    """How good each method's labels are."""
    found = {}
    for method in [*LEARNED, *OTHERS]:
        data = crowd(method, seed)
        truth = data.items.train_dataloader().dataset.targets
        found[method] = label_quality(data.labels.numpy(), truth.numpy())
    return found


def classifiers(network: Network, seed: int, model_seed: int) -> Run:
    """What classifiers that start alike learn from each method's labels."""
    found: Run = {}
    for method in [*LEARNED, *SMOOTHED]:
        data = crowd(SMOOTHED.get(method, method), seed, network.augment)
        seed_everything(100 * seed + model_seed, verbose=False)
        module = network.make(0.3 if method in SMOOTHED else 0.0)
        quiet_trainer(network.epochs, []).fit(module, datamodule=data)
        module.eval()
        found[method] = {}
        for name, loader in zip(data.test_names, data.test_dataloader(), strict=True):
            with torch.no_grad():
                logits, targets = zip(*((module(images), y) for images, y in loader), strict=True)
            found[method][name] = measure_calibration(torch.cat(logits), torch.cat(targets))
    return found


# ------------------------------------------------------------------------------------------------------- the tables


def label_table(runs: list[Labels]) -> str:
    """Accuracy, log-likelihood and entropy of the labels, as Markdown."""
    lines = ["| labels | accuracy, % | NLL | entropy |", "| --- | --- | --- | --- |"]
    for method in runs[0]:
        found = [run[method] for run in runs]
        cells = [
            spread([100 * quality.accuracy for quality in found], 1),
            spread([quality.nll for quality in found], 3),
            spread([quality.entropy for quality in found], 2),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cll(runs: list[Run], method: str, test: str) -> list[float]:
    """The calibrated log-likelihood of a method in every run."""
    return [run[method][test].cll for run in runs]


def classifier_table(runs: list[Run]) -> str:
    """CLL on each test set, as Markdown."""
    lines = [
        f"| CLL | {' | '.join(TESTS.values())} | {', worst run | '.join(TESTS[name] for name in SHIFTED)}, worst run |",
        f"| --- |{' --- |' * (len(TESTS) + len(SHIFTED))}",
    ]
    for method in runs[0]:
        cells = [spread(cll(runs, method, test), 3) for test in TESTS]
        cells += [f"{max(cll(runs, method, test)):.3f}" for test in SHIFTED]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def other_table(runs: list[Run]) -> str:
    """The other measures, as Markdown."""
    lines = [
        f"| without scaling | NLL, {' | NLL, '.join(TESTS.values())} | MNIST: macro-F1, % | Brier | ECE, % | best T |",
        f"| --- |{' --- |' * 7}",
    ]
    for method in runs[0]:
        found = [run[method]["mnist"] for run in runs]
        cells = [spread([run[method][test].nll for run in runs]) for test in TESTS]
        cells += [
            spread([100 * one.macro_f1 for one in found], 1),
            spread([one.brier for one in found], 3),
            spread([100 * one.ece for one in found], 1),
            spread([one.temperature for one in found]),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- the claims


def label_claims(runs: list[Labels]) -> list[tuple[str, bool]]:
    """What must hold of the labels, and whether it does."""
    leads = [min(run[name].nll for name in METHODS) - run["mean"].nll for run in runs]
    told = f"in {sum(lead >= 0 for lead in leads)} of {len(leads)} data seeds, by {min(leads):.3f} to {max(leads):.3f}"
    return [(f"the labels' NLL of the mean is at or below that of every single method, {told}", min(leads) >= 0)]


def classifier_claims(runs: list[Run]) -> list[tuple[str, bool]]:
    """What must hold of the classifiers, and whether it does."""
    claims = []
    for test in SHIFTED:
        for other in ("majority", "standard"):
            leads = [a - b for a, b in zip(cll(runs, other, test), cll(runs, "mean", test), strict=True)]
            told = f"{sum(lead > 0 for lead in leads)} of {len(leads)} runs, by {spread(leads, 3)}"
            claims.append((f"{TESTS[test]}: the CLL of the mean is below that of {other} in {told}", min(leads) > 0))
        average = {name: statistics.mean(cll(runs, name, test)) for name in LEARNED}
        place = sorted(average, key=average.get).index("mean") + 1
        told = f"{place} of {len(LEARNED)}; first: {min(average, key=average.get)}"
        claims.append(
            (f"{TESTS[test]}: the mean is in the better half of the nine by CLL ({told})", place <= len(LEARNED) // 2)
        )
        worst = {name: max(cll(runs, name, test)) for name in LEARNED}
        best = min(worst, key=worst.get)
        told = f"{worst['mean']:.3f}; {best} {worst[best]:.3f}"
        claims.append((f"{TESTS[test]}: the mean has the best worst run by CLL ({told})", best == "mean"))
    return claims


def picture(quality: list[Labels], runs: list[Run]) -> bytes:
    """Every data seed's label NLL, and every run's CLL on MNIST, by method."""
    pictures: list = []
    with new_figure(7.2, 3.0, pictures, "crowd", "") as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        panels: list[tuple[str, Mapping[str, list[float]]]] = [
            ("NLL of the labels", {name: [run[name].nll for run in quality] for name in LEARNED}),
            ("CLL of classifiers on MNIST", {name: cll(runs, name, "mnist") for name in LEARNED}),
        ]
        for axes, (title, values) in zip((left, right), panels, strict=True):
            for place, name in enumerate(reversed(LEARNED)):
                colour = BLUE if name == "mean" else GREY
                axes.plot(values[name], [place] * len(values[name]), "o", color=colour, markersize=3, alpha=0.5)
                axes.plot(statistics.mean(values[name]), place, "|", color=colour, markersize=14, markeredgewidth=2)
            axes.set_xlabel(title)
        left.set_yticks(range(len(LEARNED)), list(reversed(LEARNED)))
    return pictures[0].png


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="data seeds, two or more")
    parser.add_argument("--models", type=int, default=3, help="trainings of the perceptron for each data seed")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    quality = [labels(seed) for seed in range(options.seeds)]
    runs = [classifiers(PERCEPTRON, seed, model) for seed in range(options.seeds) for model in range(options.models)]
    augmented = [classifiers(VIT, seed, model) for seed in range(2) for model in range(2)]
    text = "\n\n".join(
        [
            "### Labels of a crowd: 500 digits, five votes on each",
            f"25 simulated workers, {options.seeds} data seeds (digits, workers and votes), mean ± standard deviation. "
            "NLL of the true labels with 0.01 smoothing; entropy of the labels themselves. In nats, lower is better.",
            label_table(quality),
            verdicts(label_claims(quality)),
            f"#### A perceptron of three layers that learns from them, {options.models} trainings of each data seed",
            "CLL: negative log-likelihood after temperature scaling, lower is better. No true label is used before the "
            "tests.",
            classifier_table(runs),
            "Smoothed: with label smoothing of 0.3, which makes the majority as soft as the labels of softmax.",
            other_table(runs),
            verdicts(classifier_claims(runs)),
            "#### A small ViT with strong augmentation, two trainings of each of the first two data seeds",
            "Here two trainings of one data seed are as far apart as methods are.",
            classifier_table(augmented),
            verdicts(classifier_claims(augmented)),
            "![NLL of labels, CLL of classifiers](crowd.png)",
        ]
    )
    print(text)
    if options.write:
        write("crowd", text)
        (RESULTS.parent / "crowd.png").write_bytes(picture(quality, runs))


if __name__ == "__main__":
    main()
