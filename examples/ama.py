"""AMA on digits: what a second training forgets, and what averaging with the model before brings back.

    python examples/ama.py

A residual network of six blocks learns to classify 900 real digits. Then it is trained by rewards (REINFORCE), in one
of two ways: on digits turned by 90 degrees, or on the same digits with a mark that asks for the label + 3. What it
forgets is its accuracy on plain digits, the alignment tax. Averages of both models, with one ratio for all or one for
each third of the network, stand against early stopping. Ratios are learned on labels drawn from the model after, as in
the paper, so that no true label is used. About a minute a seed and task on one core. ``--write`` puts the tables into
RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningModule
from results import RESULTS, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup import AdaptiveSoup, ModuleEvaluator, combine
from lightning_soup.runs.pareto import front_picture, pareto_front

MEANS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TOLD = (0.4, 0.6, 0.8)
Point = tuple[float, float]
Set = tuple[Tensor, Tensor]


class Network(LightningModule):
    """65 inputs, six residual blocks of width 48, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(65, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48)) for _ in range(6)
        )
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))

    def validation_step(self, batch: Set, batch_idx: int) -> Tensor:
        """Logs the loss, the accuracy, and the reward, the probability of the right class."""
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log_dict(
            {"val_loss": loss, "reward": logits.softmax(1)[range(len(y)), y].mean(), "val_acc": self.accuracy}
        )
        return loss


def plain(images: Tensor, labels: Tensor) -> Set:
    """The old task."""
    return torch.cat([images.flatten(1), torch.zeros(len(images), 1)], 1), labels


def turned(images: Tensor, labels: Tensor) -> Set:
    """The new task: turned digits."""
    return plain(images.rot90(1, (1, 2)), labels)


def marked(images: Tensor, labels: Tensor) -> Set:
    """The new task: a mark that asks for another answer."""
    return torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1), (labels + 3) % 10


def classify(network: Network, data: Set, epochs: int, draw: torch.Generator) -> None:
    """The first training."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=draw).split(64):
            loss = cross_entropy(network(data[0][batch]), data[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def reinforce(network: Network, data: Set, epochs: int, lr: float, draw: torch.Generator) -> list[dict[str, Tensor]]:
    """The second training, by the rewards of eight answers to each image; the weights after every second epoch."""
    optimizer, kept = torch.optim.Adam(network.parameters(), lr), []
    for epoch in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=draw).split(64):
            log_p = network(data[0][batch]).log_softmax(1)
            answers = torch.multinomial(log_p.detach().exp(), 8, replacement=True, generator=draw)
            reward = (answers == data[1][batch][:, None]).float()
            loss = -((reward - reward.mean()) * log_p.gather(1, answers)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 2:
            kept.append({name: value.clone() for name, value in network.state_dict().items()})
    return kept


def judge(data: Set, metric: str) -> ModuleEvaluator:
    """An evaluator of one task."""
    return ModuleEvaluator(Network(), DataLoader(TensorDataset(*data), 1000), metric)


Scores = dict[str, list[Point]]


def run(seed: int, task: Callable[[Tensor, Tensor], Set], lr: float) -> tuple[Scores, list[Point], list[list[float]]]:
    """One seed: curves of (reward, accuracy), proxy losses at equal and learned ratios, and the ratios."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=draw)
    images, labels = (images / 16).float()[order].view(-1, 8, 8), labels[order]
    train, test = (images[:900], labels[:900]), (images[900:], labels[900:])
    network = Network()
    classify(network, plain(*train), 10, draw)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stops = reinforce(network, task(*train), 40, lr, draw)
    inputs = task(*train)[0]
    with torch.no_grad():
        drawn = torch.multinomial(network(inputs).softmax(1), 1, generator=draw)[:, 0]
    chooser = judge((inputs, drawn), "val_loss")
    new, old = judge(task(*test), "reward"), judge(plain(*test), "val_acc")
    front = pareto_front(AdaptiveSoup(lr=0.1, steps=150), [before, stops[-1]], chooser, new, old, MEANS)
    curves = {
        "early stopping": [(new.score(weights), old.score(weights)) for weights in (before, *stops)],
        "equal ratios": list(front.equal),
        "adaptive ratios": list(front.adaptive),
    }
    plain_average = [combine([before, stops[-1]], [1 - mean, mean]) for mean in MEANS]
    proxies = [(-chooser.score(w), soup.natural_score) for w, soup in zip(plain_average, front.soups, strict=True)]
    learned = [[row[1] for row in soup.coefficients.values()] for soup in front.soups]
    return curves, proxies, learned


def at_reward(points: Sequence[Point], reward: float) -> float:
    """The best accuracy that a curve reaches with this reward or more, between its points."""
    best = [old for new, old in points if new >= reward]
    for (a, b), (c, d) in pairwise(points):
        if min(a, c) < reward < max(a, c):
            best.append(b + (d - b) * (reward - a) / (c - a))
    return max(best, default=float("nan"))


def table(runs: list[tuple[Scores, list[Point], list[list[float]]]]) -> str:
    """Reward and accuracy for some means, as Markdown."""
    header = " | ".join(f"mean {mean}" for mean in TOLD)
    lines = [f"| reward / accuracy, % | {header} |", "| --- |" + " --- |" * len(TOLD)]
    for name in ("equal ratios", "adaptive ratios"):
        cells = []
        for mean in TOLD:
            points = [curves[name][MEANS.index(mean)] for curves, _, _ in runs]
            cells.append(" / ".join(spread([100 * p[i] for p in points], 1) for i in (0, 1)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = []
    for mean in TOLD:
        same = [100 * gap[1] for gap in compared(runs, mean)]
        cells.append(f"– / {spread(same, 1)}" if len(same) > 1 else "not reached")
    lines.append(f"| equal ratios with the reward of the adaptive ones | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(runs: list[tuple[Scores, list[Point], list[list[float]]]], mean: float) -> list[Point]:
    """Accuracy of adaptive ratios, and of equal ones with the same reward, where those reach it."""
    points = [(c["adaptive ratios"][MEANS.index(mean)], c["equal ratios"]) for c, _, _ in runs]
    found = [(accuracy, at_reward(equal, reward)) for (reward, accuracy), equal in points]
    return [pair for pair in found if pair[1] == pair[1]]


def claims(runs: list[tuple[Scores, list[Point], list[list[float]]]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    ahead, gaps = 0, []
    for curves, _, _ in runs:
        top = curves["early stopping"][-1][0]
        for share in (0.8, 0.85, 0.9, 0.95):
            gaps.append(
                at_reward(curves["equal ratios"], share * top) - at_reward(curves["early stopping"], share * top)
            )
        ahead += min(gaps[-4:]) > 0
    text = f"at 80 to 95 % of the reward equal ratios keep more than early stopping in {ahead} of {len(runs)} seeds"
    found = [(f"{text} ({100 * statistics.mean(gaps):+.1f} points)", ahead == len(runs))]
    lower = all(result <= equal + 1e-6 for _, proxies, _ in runs for equal, result in proxies)
    found.append(("the proxy loss of the result is that of equal ratios or less, for every mean and seed", lower))
    gains = {}
    for mean in TOLD:
        place = MEANS.index(mean)
        gains[mean] = [c["adaptive ratios"][place][0] - c["equal ratios"][place][0] for c, _, _ in runs]
    told = ", ".join(f"{100 * statistics.mean(values):+.1f} at {mean}" for mean, values in gains.items())
    held = all(statistics.mean(values) > -0.005 for values in gains.values())
    found.append((f"at equal mean adaptive ratios have the reward of equal ones or more ({told})", held))
    return found


def above(runs: list[tuple[Scores, list[Point], list[list[float]]]]) -> str:
    """Whether adaptive ratios lie above the front of equal ones: said, and not claimed."""
    gaps = [100 * (adaptive - equal) for mean in TOLD for adaptive, equal in compared(runs, mean)]
    ahead, mean = sum(gap > 0 for gap in gaps), statistics.mean(gaps)
    verdict = "here they lie above the front" if mean > 0 else "what looks like a gain at the same mean is bought"
    return (
        f"At the same reward, adaptive ratios keep {mean:+.1f} ± {statistics.stdev(gaps):.1f} points of accuracy "
        f"against equal ones, and more in {ahead} of {len(gaps)} cases that can be compared: {verdict}."
    )


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    parts = [
        "### AMA: averaging before and after a training by rewards",
        f"{options.seeds} seeds, mean ± standard deviation.",
    ]
    first = None
    tasks = (("turned digits", turned, 3e-4), ("a mark asks for another answer", marked, 1e-3))
    for title, task, lr in tasks:
        runs = [run(seed, task, lr) for seed in range(options.seeds)]
        first = first or runs[0][0]
        parts += [f"#### New task: {title}", table(runs), verdicts(claims(runs)), above(runs)]
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("ama", text)
        shown = {name: [(100 * new, 100 * old) for new, old in points] for name, points in first.items()}
        labels = {name: [f"{mean}" for mean in MEANS] for name in ("equal ratios", "adaptive ratios")}
        front_picture(
            shown, RESULTS.parent / "ama.png", "reward on turned digits, %", "accuracy on plain digits, %", labels
        )


if __name__ == "__main__":
    main()
