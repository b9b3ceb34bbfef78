"""FedAU: federated averaging whose clients come at rates that nobody knows and that depend on their data.

    python examples/fedau.py

First 50 quadratics in ten dimensions, where the bias of an average can be measured: how far the mean of the last
iterates lies from the optimum of the plain mean of all clients. Then real digits, split over 20 clients by labels, each
client trained by Lightning in the package's simulation. Two to three minutes a seed on one core. ``--write`` puts the
tables into RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import numpy as np
import torch
from lightning.pytorch import LightningModule
from results import RESULTS, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import FedAU, FederatedSimulation
from lightning_soup.distributed import (
    MIFA,
    AverageAll,
    AverageParticipating,
    Bernoulli,
    Cyclic,
    FederatedAverage,
    FedVARP,
    KnownParticipation,
    Markov,
    dirichlet_participation,
)
from lightning_soup.runs.figures import BLUE, COLOURS, GREY, new_figure

PATTERNS = {"Bernoulli": Bernoulli, "Markov": Markov, "cyclic": Cyclic}
Rules = dict[str, Callable[[np.ndarray], FederatedAverage]]


def known(p: np.ndarray) -> KnownParticipation:
    """The rule that is told the rates."""
    return KnownParticipation(dict(enumerate(p)))


# ---------------------------------------------------------------------------------------------------- quadratics

N, DIMENSIONS, STEPS, LR, NOISE, ROUNDS = 50, 10, 5, 0.02, 0.5, 3000
QUADRATIC: Rules = {
    "average participating": lambda p: AverageParticipating(N),
    "average all, η = 10": lambda p: AverageAll(N, lr=10),
    "FedAU, K = 1": lambda p: FedAU(range(N), cutoff=1),
    "FedAU, K = 10": lambda p: FedAU(range(N), cutoff=10),
    "FedAU, K = 50": lambda p: FedAU(range(N), cutoff=50),
    "FedAU, K = ∞": lambda p: FedAU(range(N)),
    "known p": known,
    "MIFA": lambda p: MIFA(N),
    "FedVARP": lambda p: FedVARP(N),
}
CUTOFFS = [name for name in QUADRATIC if name.startswith("FedAU")]


def quadratics(seed: int, pattern: str) -> dict[str, tuple[float, float]]:
    """Bias and RMS distance of every rule, with the same clients, rates and availability."""
    draw = np.random.default_rng([seed, 1])
    found = dirichlet_participation(N, 10, seed=seed)
    centres = found.mixes @ (3 * draw.standard_normal((10, DIMENSIONS)))
    optimum, result = centres.mean(0), {}
    for name, make in QUADRATIC.items():
        rule, available = make(found.rates), PATTERNS[pattern](found.rates, seed=seed)
        noise = np.random.default_rng([seed, 2])
        x, memory, tail = np.zeros(DIMENSIONS), np.zeros((N, DIMENSIONS)), []
        for t in range(ROUNDS):
            came = np.flatnonzero(available.draw())
            y = np.tile(x, (len(came), 1))
            for _ in range(STEPS):
                y -= LR * (y - centres[came] + NOISE * noise.standard_normal(y.shape))
            # The rule's own coefficients; ten numbers need no state dict.
            chosen = rule.coefficients(came.tolist())
            updates = y - x
            x = x + np.array([chosen.updates[n] for n in came]) @ updates if len(came) else x
            if rule.remembers:
                x = x + np.array(list(chosen.remembered.values())) @ memory[list(chosen.remembered)]
                memory[came] = updates
                rule.remember({n: {} for n in came.tolist()})
            rule.observe(came.tolist())
            if t >= 0.7 * ROUNDS:
                tail.append(x)
        distances = np.linalg.norm(np.array(tail) - optimum, axis=1)
        bias = float(np.linalg.norm(np.mean(tail, 0) - optimum))
        result[name] = bias, float(np.sqrt((distances**2).mean()))
    return result


Runs = list[dict[str, tuple[float, float]]]


def quadratic_table(runs: dict[str, Runs], column: int) -> str:
    """Bias (0) or RMS distance (1), as Markdown."""
    lines = [f"| | {' | '.join(runs)} |", f"| --- |{' --- |' * len(runs)}"]
    for name in QUADRATIC:
        cells = [spread([run[name][column] for run in found]) for found in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quadratic_claims(runs: dict[str, Runs]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    claims = []
    for pattern, found in runs.items():
        bias = {name: statistics.mean(run[name][0] for run in found) for name in QUADRATIC}
        ratio = bias["FedAU, K = ∞"] / bias["average participating"]
        told = f"{pattern}: the bias of FedAU is below 0.15 of that of the average of participants ({ratio:.3f})"
        claims.append((told, ratio < 0.15))
        falling = [bias[name] for name in CUTOFFS]
        told = f"{pattern}: the bias falls with K ({' > '.join(f'{value:.2f}' for value in falling)})"
        claims.append((told, all(a > b for a, b in pairwise(falling))))
        gap = abs(bias["FedAU, K = ∞"] - bias["known p"])
        told = f"{pattern}: FedAU is as good as known rates (biases {gap:.3f} apart, of {bias['known p']:.3f})"
        claims.append((told, gap < 0.1))
        rms = {name: statistics.mean(run[name][1] for run in found) for name in CUTOFFS}
        if pattern == "Bernoulli":
            told = f"{rms['FedAU, K = 50']:.2f} against {rms['FedAU, K = ∞']:.2f}"
            held = rms["FedAU, K = 50"] < rms["FedAU, K = ∞"]
            claims.append((f"{pattern}: the RMS distance of K = 50 is below that of K = ∞ ({told})", held))
    return claims


# -------------------------------------------------------------------------------------------------------- digits

CLIENTS, DIGIT_ROUNDS, DIGIT_STEPS, EVERY = 20, 300, 5, 10
DIGITS: Rules = {
    "average participating": lambda p: AverageParticipating(CLIENTS),
    "average all, η = 10": lambda p: AverageAll(CLIENTS, lr=10),
    "FedAU, K = 50": lambda p: FedAU(CLIENTS, cutoff=50),
    "FedAU, K = ∞": lambda p: FedAU(CLIENTS),
    "known p": known,
}


class Network(LightningModule):
    """Softmax regression on 64 pixels, by plain SGD: so small that clients must share what it can do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.layer(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without momentum."""
        return torch.optim.SGD(self.parameters(), 0.1)


class Judge:
    """Accuracy on test digits by label, every tenth round: called after each."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.network = images, labels, Network()
        self.by_label: list[np.ndarray] = []

    @torch.no_grad()
    def __call__(self, run: FederatedSimulation) -> None:
        """Judge the global weights."""
        if run.round % EVERY == 0:
            self.network.load_state_dict(run.weights)
            right = (self.network(self.images).argmax(1) == self.labels).double()
            self.by_label.append(np.array([100 * right[self.labels == label].mean() for label in range(10)]))


def digits(seed: int) -> dict[str, np.ndarray]:
    """Accuracy of every rule over the rounds: the mean over all clients, and over the rarest quarter."""
    draw = np.random.default_rng([seed, 3])
    found = dirichlet_participation(CLIENTS, 10, seed=seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    order = torch.from_numpy(draw.permutation(len(labels)))
    train, test = order[:1200], order[1200:]
    loaders = []
    for q in found.mixes:
        wanted = draw.choice(10, size=80, p=q)
        own = torch.tensor([int(draw.choice(train[labels[train] == label])) for label in wanted])
        loaders.append(DataLoader(TensorDataset(images[own], labels[own]), 16, shuffle=True))
    rare = np.argsort(found.rates)[: CLIENTS // 4]
    result = {}
    for name, make in DIGITS.items():
        torch.manual_seed(seed)
        judge, pattern = Judge(images[test], labels[test]), Bernoulli(found.rates, seed=seed)
        run = FederatedSimulation(Network(), loaders, make(found.rates), pattern, local_steps=DIGIT_STEPS, seed=seed)
        run.run(DIGIT_ROUNDS, on_round=judge)
        of_clients = np.array(judge.by_label) @ found.mixes.T
        result[name] = np.array([of_clients.mean(1), of_clients[:, rare].mean(1)])
    return result


def tails(runs: list[dict[str, np.ndarray]], name: str, row: int) -> list[float]:
    """The mean accuracy of the last third of the rounds, in each seed."""
    return [float(run[name][row, -DIGIT_ROUNDS // EVERY // 3 :].mean()) for run in runs]


def digit_table(runs: list[dict[str, np.ndarray]]) -> str:
    """Accuracies, as Markdown."""
    lines = ["| accuracy, % | mean over clients | over the quarter that comes most rarely |", "| --- | --- | --- |"]
    for name in DIGITS:
        lines.append(f"| {name} | {' | '.join(spread(tails(runs, name, row), 1) for row in (0, 1))} |")
    return "\n".join(lines)


def digit_claims(runs: list[dict[str, np.ndarray]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    claims = []
    for name in ("FedAU, K = 50", "FedAU, K = ∞"):
        for row, whom in enumerate(("all clients", "rare clients")):
            ours, theirs = tails(runs, name, row), tails(runs, "average participating", row)
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            told = f"ahead in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds, by {spread(gains, 1)} points"
            claim = f"{name}: more accurate than the average of participants on {whom} ({told})"
            claims.append((claim, statistics.mean(gains) > 0))
    return claims


# ------------------------------------------------------------------------------------------------------ the picture


def picture(runs: Runs, curves: list[dict[str, np.ndarray]]) -> bytes:
    """Bias and distance over K under Bernoulli availability; accuracy on rare clients over the rounds."""
    pictures: list = []
    with new_figure(7.2, 3.0, pictures, "fedau", "") as figure:
        left, right = figure.subplots(1, 2)
        for column, colour, label in ((0, BLUE, "bias"), (1, COLOURS[0], "RMS distance")):
            values = [statistics.mean(run[name][column] for run in runs) for name in CUTOFFS]
            left.plot(range(len(CUTOFFS)), values, "o-", color=colour, label=f"FedAU, {label}")
        for name, style in (("average participating", ":"), ("known p", "--")):
            value = statistics.mean(run[name][0] for run in runs)
            left.axhline(value, linestyle=style, color=BLUE, linewidth=1, label=f"{name}, bias")
        left.set_xticks(range(len(CUTOFFS)), [name.rpartition(" ")[2] for name in CUTOFFS])
        left.set_xlabel("cutoff K")
        left.set_ylabel("distance from the optimum")
        left.set_ylim(bottom=0)
        left.legend()
        rounds = np.arange(1, DIGIT_ROUNDS // EVERY + 1) * EVERY
        for name, colour in zip(DIGITS, (GREY, COLOURS[2], COLOURS[0], BLUE, COLOURS[1]), strict=True):
            right.plot(rounds, np.mean([run[name][1] for run in curves], 0), color=colour, label=name)
        right.set_xlabel("rounds")
        right.set_ylabel("accuracy on rare clients, %")
        right.legend()
    return pictures[0].png


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    seeds = range(options.seeds)
    runs = {pattern: [quadratics(seed, pattern) for seed in seeds] for pattern in PATTERNS}
    curves = [digits(seed) for seed in seeds]
    text = "\n\n".join(
        [
            "### FedAU: clients that come at unknown rates, which depend on their data",
            f"{options.seeds} seeds, mean ± standard deviation. Rates from 0.02 up, about 0.1 on average.",
            f"#### {N} quadratics, {ROUNDS} rounds",
            "Bias: the distance from the optimum of the mean of the last 30 % of iterates.",
            quadratic_table(runs, 0),
            "RMS distance of these iterates from the optimum:",
            quadratic_table(runs, 1),
            verdicts(quadratic_claims(runs)),
            f"MIFA and FedVARP keep the last update of each client, {N} times the model, which pays on convex "
            "problems. FedAU keeps two integers and a number for each.",
            f"#### Digits of {CLIENTS} clients, {DIGIT_ROUNDS} rounds",
            f"Softmax regression, {DIGIT_STEPS} local steps on 80 digits of a client's own labels, Dir(0.1). Accuracy "
            "on test digits, weighed by each client's labels; the mean of the last third of the rounds.",
            digit_table(curves),
            verdicts(digit_claims(curves)),
            "![bias over the cutoff, accuracy over the rounds](fedau.png)",
        ]
    )
    print(text)
    if options.write:
        write("fedau", text)
        (RESULTS.parent / "fedau.png").write_bytes(picture(runs["Bernoulli"], curves))


if __name__ == "__main__":
    main()
