"""AWARE-NET on digits, over several seeds: an ensemble of three families, its members, and a soup of one family.

    python examples/aware_net.py

Odd or even? 400 of scikit-learn's digits train the members, 400 others weigh the families, 997 test. Families: a small
network with convolutions and BatchNorm, one with two layers and tanh, and one that is weak on purpose, a linear model
of sixteen pooled pixels. "Shifted" is the test set with noise. A further family starts from one convolutional network,
so that it can be a soup. About half a minute a seed on one core. ``--write`` puts the tables into RESULTS.md.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from results import quiet_trainer, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import AwareNet, Family, UniformSoup, cross_evaluate
from lightning_soup.data.digit_images import read_images
from lightning_soup.evaluation.detection import detection_metrics
from lightning_soup.evaluation.mixture import family_log_probabilities, log_probabilities
from lightning_soup.evaluation.own_loops import OwnLoops

Scores = dict[str, float]
CONV, MLP, WEAK = "convolutions", "tanh", "weak"


def conv() -> nn.Module:
    """Two convolutions with BatchNorm."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 1))


def mlp() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))


def weak() -> nn.Module:
    """Linear, of sixteen pooled pixels."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 1))


BUILD: dict[str, Callable[[], nn.Module]] = {CONV: conv, MLP: mlp, WEAK: weak}


class Parity(LightningDataModule):
    """Odd digits (class 1) against even ones, 8×8: to train members, to weigh families (validation), and to test."""

    class_names = ("even", "odd")

    def __init__(self, seed: int, mnist: bool = False) -> None:
        super().__init__()
        if mnist:
            images, labels = read_images("mnist")
            images = nn.functional.adaptive_avg_pool2d(images[:, :, 4:24, 4:24], 8)
        else:
            images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
            images = (images / 16).float().view(-1, 1, 8, 8)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=draw)[:1797]
        images, labels = images[order], labels[order] % 2
        parts = [TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 400), (400, 800), (800, None))]
        self.train, self.val, self.test = parts
        noise = 0.5 * torch.randn(self.test.tensors[0].shape, generator=draw)
        self.shifted = TensorDataset(self.test.tensors[0] + noise, self.test.tensors[1])

    def train_dataloader(self) -> DataLoader:
        """In random order."""
        return DataLoader(self.train, 64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.val, 400)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.test, 1000)


def train(network: nn.Module, data: Parity, seed: int, epochs: int = 25, lr: float = 3e-3) -> nn.Module:
    """One member by itself: a plain loop, for nothing else is needed."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = data.train.tensors
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(64):
            loss = cross_entropy(log_probabilities(network(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def fitted(families: list[Family], data: Parity) -> AwareNet:
    """Learn the weights of trained families."""
    ensemble = AwareNet(families, one_logit=True, in_chans=1)
    trainer: Trainer = quiet_trainer(10, [])
    trainer.limit_val_batches = 1.0
    trainer.fit(ensemble, datamodule=data)
    return ensemble.eval()


def scores(log_p: Tensor, labels: Tensor) -> Scores:
    """AUC and F1 in percent, and the NLL."""
    metrics = detection_metrics(2)
    metrics.update(log_p.exp(), labels)
    found = metrics.compute()
    return {"auc": 100 * float(found["auc"]), "f1": 100 * float(found["f1"]), "nll": float(nll_loss(log_p, labels))}


def mean(rows: list[Scores]) -> Scores:
    """The mean of each score."""
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


@torch.no_grad()
def judge(ensemble: AwareNet, images: Tensor, labels: Tensor) -> dict[str, Scores]:
    """Everything that is compared, on one test set."""
    found = {}
    logits = ensemble.member_logits(images)
    for name, members in zip(ensemble.family_names, logits, strict=True):
        found[f"single, {name}"] = mean([scores(log_probabilities(z), labels) for z in members])
        found[f"tier 1, {name}"] = scores(family_log_probabilities(members), labels)
    alike = family_log_probabilities([family_log_probabilities(members) for members in logits])
    found["tier 2, all alike"] = scores(alike, labels)
    found["tier 2, learned"] = scores(ensemble(images), labels)
    return found


def run(seed: int) -> tuple[dict[str, dict[str, Scores]], Scores, dict[str, nn.Module]]:
    """One seed: scores on both test sets, the weights, and the networks of the family that can be a soup."""
    seed_everything(seed, verbose=False)
    data = Parity(seed)
    families = [
        Family(modules=[train(build(), data, 10 * seed + j) for j in range(3)], name=name)
        for name, build in BUILD.items()
    ]
    ensemble = fitted(families, data)
    # The family from one start: its members differ by the order of the images alone.
    start = train(conv(), data, seed, epochs=15)
    members = []
    for j in range(3):
        copy = conv()
        copy.load_state_dict(start.state_dict())
        members.append(train(copy, data, 100 * seed + j, epochs=10))
    soup = conv()
    UniformSoup().cook(members).apply_to(soup)
    recalibrated = recalibrate(soup, data)
    sets = {"clean": data.test.tensors, "shifted": data.shifted.tensors}
    found = {name: judge(ensemble, *tensors) for name, tensors in sets.items()}
    with torch.no_grad():
        for name, (images, labels) in sets.items():
            logits = [member(images) for member in members]
            found[name]["one start: single"] = mean([scores(log_probabilities(z), labels) for z in logits])
            found[name]["one start: mean of predictions"] = scores(family_log_probabilities(logits), labels)
            found[name]["one start: soup"] = scores(log_probabilities(recalibrated(images)), labels)
    return found, ensemble.alpha, {"ensemble": ensemble, "member": members[0], "soup": recalibrated}


def recalibrate(soup: nn.Module, data: Parity) -> nn.Module:
    """The soup with BatchNorm statistics of its own."""
    module = AwareNet([Family(modules=[soup], name="soup")], one_logit=True, in_chans=1)
    trainer = quiet_trainer(1, [])
    OwnLoops(module, data, torch.device("cpu"), trainer.precision_plugin).recalibrate(data.train_dataloader())
    return soup.eval()


def speed(networks: dict[str, nn.Module]) -> dict[str, float]:
    """Images per second of each, as the median of interleaved rounds on one thread."""
    images = torch.rand(256, 1, 8, 8)
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for _ in range(30):
            for name, network in networks.items():
                begin = time.process_time()
                network(images)
                times[name].append(time.process_time() - begin)
    return {name: len(images) / statistics.median(values) for name, values in times.items()}


def table(results: list[dict[str, dict[str, Scores]]], passes: dict[str, str]) -> str:
    """All rows, as Markdown."""
    sets = list(results[0])
    lines = [f"| AUC / F1 / NLL | {' | '.join(sets)} | forward passes |", "| --- |" + " --- |" * (len(sets) + 1)]
    for row in results[0][sets[0]]:
        cells = []
        for name in sets:
            values = {s: [one[name][row][s] for one in results] for s in ("auc", "f1", "nll")}
            cells.append(f"{spread(values['auc'], 1)} / {spread(values['f1'], 1)} / {spread(values['nll'], 3)}")
        lines.append(f"| {row} | {' | '.join(cells)} | {passes.get(row, '1' if 'single' in row else '3')} |")
    return "\n".join(lines)


def claims(results: list[dict[str, dict[str, Scores]]], alphas: list[Scores]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    found, count = [], len(results)
    for name in results[0]:
        for family in BUILD:
            gain = statistics.mean(
                r[name][f"tier 1, {family}"]["auc"] - r[name][f"single, {family}"]["auc"] for r in results
            )
            found.append(
                (f"{name}: tier 1 of the family {family} has the AUC of its members or more ({gain:+.1f})", gain >= 0)
            )
    clean = [row["clean"] for row in results]
    ahead = sum(row["tier 2, learned"]["nll"] < row["tier 2, all alike"]["nll"] for row in clean)
    found.append((f"learned weights have a lower NLL than equal ones in {ahead} of {count} seeds", ahead == count))
    worst = max(row["tier 2, learned"]["nll"] - min(row[f"tier 1, {k}"]["nll"] for k in BUILD) for row in clean)
    found.append((f"their NLL is at most 0.005 above the best family's in every seed ({worst:+.4f})", worst <= 0.005))
    heaviest = max(alpha[WEAK] for alpha in alphas)
    found.append((f"the weak family gets less than 0.05 (at most {heaviest:.3f})", heaviest < 0.05))
    gain = statistics.mean(row["tier 2, learned"]["auc"] - row["tier 2, all alike"]["auc"] for row in clean)
    found.append((f"learned weights lose no more than 0.1 of AUC to equal ones ({gain:+.2f})", gain >= -0.1))
    return found


def shifted(results: list[dict[str, dict[str, Scores]]]) -> str:
    """What learned weights are worth on data unlike those that they were learned on."""
    rows = [row["shifted"] for row in results]
    loss = [row["tier 2, learned"]["nll"] - row["tier 2, all alike"]["nll"] for row in rows]
    auc = [row["tier 2, learned"]["auc"] - row["tier 2, all alike"]["auc"] for row in rows]
    return (
        f"Under shift, learned weights against equal ones: NLL {statistics.mean(loss):+.2f}, AUC "
        f"{statistics.mean(auc):+.1f}; the NLL is lower in {sum(one < 0 for one in loss)} of {len(rows)} seeds. They "
        "are right for data like those that they were learned on."
    )


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    runs = [run(seed) for seed in range(options.seeds)]
    results, alphas = [found for found, _, _ in runs], [alpha for _, alpha, _ in runs]
    passes = {"tier 2, all alike": "9", "tier 2, learned": "9", "one start: soup": "1"}
    rates = speed(runs[0][2])
    weights = ", ".join(f"{name} {spread([alpha[name] for alpha in alphas], 3)}" for name in BUILD)
    rate = ", ".join(f"{name} {value / rates['member']:.2f}" for name, value in rates.items())
    pair = {"UCI": Parity(0), "MNIST": Parity(0, mnist=True)}
    trained = {
        name: fitted([Family(modules=[train(b(), data, j) for j in range(3)], name=n) for n, b in BUILD.items()], data)
        for name, data in pair.items()
    }
    parts = [
        "### AWARE-NET: odd or even",
        f"{options.seeds} seeds, mean ± standard deviation; AUC and F1 in %.",
        table(results, passes),
        f"Learned weights α: {weights}. Images per second, as a multiple of one convolutional network's: {rate}.",
        verdicts(claims(results, alphas)),
        shifted(results),
        "#### Trained on one set, tested on the other",
        "One seed; AUC and F1 in %, at the threshold of 0.5, with nothing learned anew.",
        cross_evaluate(trained, pair).markdown(),
    ]
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("aware-net", text)


if __name__ == "__main__":
    main()
