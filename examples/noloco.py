"""NoLoCo beside DiLoCo, synchronous training and none, over several seeds; the same on four real processes.

    python examples/noloco.py

Eight replicas of a small network learn 1,400 digits, each its own eighth, with Adam and a cosine schedule; every ten
steps they take an outer step. They are simulated in one process, by the very arithmetic that processes use: four real
ones (gloo, started by Lightning) then train with the callback and must end with the same bits. Half a minute a seed on
one core. ``--write`` puts the tables into RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import numpy as np
import torch
from lightning.pytorch import LightningModule, seed_everything
from results import RESULTS, SavesReplicas, quiet_trainer, spread, verdicts, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_soup import NoLoCo, ReplicaStrategy, SimulatedReplicas, open_checkpoint
from lightning_soup.distributed.latency import expected_maximum, ring_bytes, simulate_blocking, tree_to_pair
from lightning_soup.distributed.noloco import DiLoCoStep, NoLoCoStep, largest_gamma
from lightning_soup.distributed.outer_step import OuterStep
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.figures import BLUE, COLOURS, new_figure

WORLD, EVERY, ROUNDS, BATCH, RATE = 8, 10, 60, 35, 3e-3
REAL = 4  # processes


class Unchecked(NoLoCoStep):
    """Takes any γ, to show what the check is for."""

    def check(self, world_size: int) -> None:
        """Nothing."""


STEPS: dict[str, Callable[[], OuterStep | None]] = {
    "DiLoCo, α = 0.3": DiLoCoStep,
    "DiLoCo, α = 0.5": lambda: DiLoCoStep(alpha=0.5),
    "NoLoCo, α = 0.5": NoLoCoStep,
    "NoLoCo, α = 0.5, γ = 0.3": lambda: NoLoCoStep(gamma=0.3),
    "NoLoCo, γ = 0": lambda: NoLoCoStep(gamma=0.0),
    "NoLoCo, α = 0.9, γ = 0.7 (refused)": lambda: Unchecked(alpha=0.9),
    "no communication": lambda: None,
}
Trace = list[tuple[float, float]]  # learning rate and spread at each outer step


@cache
def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1,400 digits to train and 397 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])


class Mlp(LightningModule):
    """64 inputs, 128 hidden units, 10 classes."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        """Adam; the rate falls to a tenth."""
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, RATE / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def start(seed: int, count: int, steps: int) -> list[Mlp]:
    """Replicas with one start."""
    seed_everything(seed, verbose=False)
    modules = [Mlp(steps) for _ in range(count)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    return modules


def batches(data: TensorDataset, world: int, rank: int, seed: int, epoch: int) -> DataLoader:
    """A rank's part of an epoch, as Lightning deals it out."""
    sampler = DistributedSampler(data, world, rank, seed=seed)
    sampler.set_epoch(epoch)
    return DataLoader(data, BATCH, sampler=sampler)


@torch.no_grad()
def loss_of(module: Mlp, data: TensorDataset) -> float:
    """Negative log-likelihood on all of some data."""
    return cross_entropy(module.net(data.tensors[0]), data.tensors[1]).item()


def simulate(
    seed: int, step: OuterStep | None, world: int = WORLD
) -> tuple[list[Mlp], Trace, SimulatedReplicas | None]:
    """Train replicas in this process."""
    data, steps = digits(seed)[0], EVERY * ROUNDS
    modules = start(seed, world, steps)
    made = [module.configure_optimizers() for module in modules]
    optimizers = [one["optimizer"] for one in made]
    schedules = [one["lr_scheduler"]["scheduler"] for one in made]
    replicas = SimulatedReplicas(modules, step or Unchecked())
    trace, taken, epoch = [], 0, 0
    while taken < steps:
        for parts in zip(*(batches(data, world, rank, seed, epoch) for rank in range(world)), strict=True):
            for module, optimizer, schedule, (x, y) in zip(modules, optimizers, schedules, parts, strict=True):
                optimizer.zero_grad()
                cross_entropy(module.net(x), y).backward()
                optimizer.step()
                schedule.step()
            taken += 1
            if taken % EVERY == 0 and taken <= steps:
                if step is not None:
                    replicas.average()
                trace.append((optimizers[0].param_groups[0]["lr"], replicas.spread()))
            if taken == steps:
                break
        epoch += 1
    return modules, trace, replicas if step is not None else None


def synchronous(seed: int) -> float:
    """One model on the batches of all replicas: what DDP trains."""
    (data, test), steps = digits(seed), EVERY * ROUNDS
    module = start(seed, 1, steps)[0]
    made = module.configure_optimizers()
    taken, epoch = 0, 0
    while taken < steps:
        for parts in zip(*(batches(data, WORLD, rank, seed, epoch) for rank in range(WORLD)), strict=True):
            made["optimizer"].zero_grad()
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            cross_entropy(module.net(x), y).backward()
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
            taken += 1
            if taken == steps:
                break
        epoch += 1
    return loss_of(module, test)


def on_processes(seed: int) -> tuple[float, float, float]:
    """Train on four processes; give the largest difference to the simulation, the mean's NLL, and MB sent by rank 0."""
    modules, _, _ = simulate(seed, NoLoCoStep(), REAL)
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed, verbose=False)
        trainer = quiet_trainer(
            -1,
            [NoLoCo(every=EVERY), SavesReplicas(folder)],
            devices=REAL,
            strategy=ReplicaStrategy(start_method="fork", final="all"),
            max_steps=EVERY * ROUNDS,
        )
        data, test = digits(seed)
        trainer.fit(start(seed, 1, EVERY * ROUNDS)[0], DataLoader(data, BATCH, shuffle=True))
        replicas = [dict(open_checkpoint(Path(folder, "end.ckpt"), which=rank)) for rank in range(REAL)]
        apart = max(
            float((replica[name] - value).abs().max())
            for replica, module in zip(replicas, modules, strict=True)
            for name, value in module.state_dict().items()
        )
        module = Mlp(1)
        module.load_state_dict(dict(open_checkpoint(Path(folder, "end.ckpt"), which="mean")))
        sent = float(Path(folder, "sent").read_text())
    return apart, loss_of(module, test), sent


def run(seed: int) -> tuple[dict[str, float], dict[str, Trace]]:
    """Train by all methods; give the replicas' mean NLL (and that of their mean) and how their spread went."""
    test = digits(seed)[1]
    losses, traces = {"synchronous": synchronous(seed)}, {}
    for name, make in STEPS.items():
        modules, traces[name], _ = simulate(seed, make())
        losses[name] = statistics.fmean(loss_of(module, test) for module in modules)
        mean = Mlp(1)
        mean.load_state_dict(
            {key: torch.stack([m.state_dict()[key] for m in modules]).mean(0) for key in modules[0].state_dict()}
        )
        losses[f"{name}, mean"] = loss_of(mean, test)
    return losses, traces


def peak(trace: Trace) -> float:
    """The largest spread."""
    return max(value for _, value in trace)


def table(losses: list[dict[str, float]], traces: list[dict[str, Trace]]) -> str:
    """A row for each method."""
    lines = ["| | NLL, mean over replicas | NLL of their mean | spread at its peak | at the end |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [f"| synchronous (DDP) | {spread([one['synchronous'] for one in losses], 4)} | | 0 | 0 |"]
    for name in STEPS:
        cells = [spread([one[key] for one in losses], 4) for key in (name, f"{name}, mean")]
        cells += [spread([get(one[name]) for one in traces], 4) for get in (peak, lambda trace: trace[-1][1])]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def claims(losses: list[dict[str, float]], traces: list[dict[str, Trace]]) -> list[tuple[str, bool]]:
    """What noloco's authors find, or what follows from the bound, and whether it is so here."""
    name, none = "NoLoCo, α = 0.5", "NoLoCo, γ = 0"
    mean = {key: statistics.fmean(one[key] for one in losses) for key in losses[0]}
    ends = [one[name][-1][1] / peak(one[name]) for one in traces]
    related = [float(np.corrcoef(np.array(one[name]).T)[0, 1]) for one in traces]
    larger = [one[none][-1][1] / one[name][-1][1] for one in traces]
    try:
        NoLoCoStep(alpha=0.9).check(WORLD)
        refused = False
    except UnsupportedSetup:
        refused = True
    alike, default = (mean[name] / mean[f"DiLoCo, α = {alpha}"] - 1 for alpha in (0.5, 0.3))
    return [
        (
            f"NoLoCo's NLL is within 5 % of DiLoCo's with the same α ({alike:+.1%}; of that with its own default, "
            f"α = 0.3, {default:+.1%})",
            abs(alike) < 0.05,
        ),
        (f"the spread ends below 0.15 of its peak in every seed (at most {max(ends):.3f})", max(ends) < 0.15),
        (f"spread and learning rate correlate above 0.8 (at least {min(related):.2f})", min(related) > 0.8),
        (f"with γ = 0 the spread ends more than 20 times as large (at least {min(larger):.0f})", min(larger) > 20),
        (f"α = 0.9 with γ = 0.7 is refused (γ must be below {largest_gamma(0.9, 2):.2f})", refused),
    ]


def communication() -> str:
    """Bytes and messages, and the waiting of 1,024 workers on paper."""
    size = sum(parameter.numel() for parameter in Mlp(1).parameters())
    ring = ring_bytes(size, WORLD) / 1e3
    rows = [
        ("DDP", 1, 2 * (WORLD - 1), ring),
        ("DiLoCo", 2 * EVERY, 2 * (WORLD - 1), ring),
        ("NoLoCo", EVERY, 1, size * 4 / 1e3),
    ]
    lines = ["| | every | messages | kB sent | kB per 100 steps | who waits |", "| --- | --- | --- | --- | --- | --- |"]
    for (name, every, messages, sent), who in zip(rows, ("all", "all", "two"), strict=True):
        lines += [f"| {name} | {every} | {messages} | {sent:.0f} | {sent * 100 / every:,.0f} | {who} |"]
    lines += [
        "",
        f"A tree all-reduce among 1,024 takes {tree_to_pair(1024):.0f} times as long as an exchange in a pair. With "
        f"log-normal message times the slower of two takes {expected_maximum(-0.5, 1):.2f} times the mean at σ = 1 "
        f"({expected_maximum(-0.005, 0.1):.2f} at 0.1). What waiting alone adds to the training of 1,024 workers whose "
        "inner steps take log-normal times:",
        "",
        "| σ of a step | DiLoCo, every 100 | NoLoCo, every 50 |",
        "| --- | --- | --- |",
    ]
    for sigma in (0.1, 0.5, 1.0):
        all_wait = simulate_blocking(1024, 100, 50, sigma).everyone - 1
        two_wait = simulate_blocking(1024, 50, 100, sigma).pairs - 1
        lines += [f"| {sigma} | +{all_wait:.0%} | +{two_wait:.0%} |"]
    return "\n".join(lines)


def picture(traces: dict[str, Trace], path: Path) -> None:
    """The spread over the outer steps."""
    pictures: list = []
    with new_figure(7.2, 3.2, pictures, path.stem, "") as figure:
        axis = figure.subplots()
        apart = {name: trace for name, trace in traces.items() if peak(trace) > 1e-6}  # DiLoCo's are all equal
        for (name, trace), colour in zip(apart.items(), (BLUE, *COLOURS), strict=False):
            axis.plot(range(1, len(trace) + 1), [value for _, value in trace], color=colour, linewidth=1.2, label=name)
        axis.set_yscale("log")
        axis.set_xlabel("outer steps")
        axis.set_ylabel("spread of the replicas")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7)
    path.write_bytes(pictures[0].png)


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    losses, traces = map(list, zip(*(run(seed) for seed in range(options.seeds)), strict=True))
    real = [on_processes(seed) for seed in range(options.seeds)]
    apart = max(one[0] for one in real)
    text = "\n\n".join(
        [
            f"### NoLoCo: digits, {WORLD} replicas",
            f"{options.seeds} seeds, mean ± standard deviation; {EVERY * ROUNDS} steps, an outer step every {EVERY}. "
            "The spread is √(mean of (mean − θ)²) over replicas and weights, right after an outer step.",
            table(losses, traces),
            verdicts(claims(losses, traces)),
            f"On {REAL} real processes (gloo), with the callback: NLL of their mean "
            f"{spread([one[1] for one in real], 4)}; {real[0][2]:.2f} MB sent by a rank in {ROUNDS} messages. Largest "
            f"difference to the same {REAL} replicas "
            f"in one process: {apart:g}.",
            f"What a worker sends, for this network among {WORLD}:",
            communication(),
            "![spread of the replicas over the outer steps](noloco.png)",
        ]
    )
    print(text)
    if options.write:
        write("noloco", text)
        picture(traces[0], RESULTS.parent / "noloco.png")


if __name__ == "__main__":
    main()
