"""MindVL on digits: averaging over sizes of training, and the size of test images.

    python examples/mindvl.py

A small ViT (patch 4, any size) learns 900 real digits at 24 pixels, with random crops. Three fine-tunes go on at 20, 24
and 28 pixels, three others all at 24; both are averaged. Everything is tested at eight sizes, on 597 digits. On 300
more, the size of testing is searched for, by three rules. About two minutes a seed on one core. ``--write`` puts the
tables into RESULTS.md and the picture beside it.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from results import RESULTS, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import ImageClassifier, LengthAverage, Resolution, ResolutionSearch
from lightning_soup.evaluation.image_sizes import resized
from lightning_soup.evaluation.resolution_table import ResolutionChoice, choose
from lightning_soup.runs.resolution_report import resolution_picture

TRAINED, BASE = (20, 24, 28), 24
SIZES = (12, 16, 20, 24, 28, 32, 36, 40)
RULES = ("keep_train", "one_se", "best")
Set = tuple[Tensor, Tensor]
Accuracies = dict[int, float]


def network() -> ImageClassifier:
    """Two blocks of width 48; position embeddings are resampled for each size."""
    shape = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "dynamic_img_size": True}
    return ImageClassifier("vit_tiny_patch16_224", 10, img_size=BASE, in_chans=1, model_args=shape)


def crops(images: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Random crops of half of the area or more, of any shape between 3:4 and 4:3, at one size."""
    count = len(images)
    area, shape, dx, dy = torch.rand(4, count, generator=draw)
    area, ratio = 0.5 + 0.5 * area, (4 / 3) ** (2 * shape - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * dx - 1), (1 - height) * (2 * dy - 1)
    grid = affine_grid(theta, [count, 1, size, size], align_corners=False)
    return grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def train(module: ImageClassifier, data: Set, size: int, epochs: int, lr: float, seed: int) -> ImageClassifier:
    """Train at one size: a plain loop, for nothing else is needed."""
    draw = torch.Generator().manual_seed(seed)
    model, (images, labels) = module.model, data
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    total = epochs * -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(64):
            loss = cross_entropy(model(crops(images[batch], size, draw)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()
    return module


def fine_tuned(start: ImageClassifier, data: Set, size: int, seed: int) -> ImageClassifier:
    """A copy that goes on at a size."""
    module = network()
    module.load_state_dict(start.state_dict())
    return train(module, data, size, 12, 1e-3, seed)


def averaged(modules: Sequence[ImageClassifier], lengths: Sequence[int]) -> ImageClassifier:
    """The plain mean over the sizes of training."""
    soup = network()
    LengthAverage(lengths=list(lengths)).cook(list(modules)).apply_to(soup)
    return soup.eval()


@torch.no_grad()
def tested(module: ImageClassifier, data: Set) -> Accuracies:
    """Accuracy in percent at every size."""
    images, labels = data
    return {
        size: 100 * float((module(resized(images, (size, size))).argmax(1) == labels).float().mean()) for size in SIZES
    }


def searched(module: ImageClassifier, data: Set) -> ResolutionChoice:
    """The search on held-out images; the training size is kept unless another is better by more than chance."""
    loader = DataLoader(TensorDataset(*data), 300)
    return ResolutionSearch(sizes=list(SIZES), train_size=BASE).run(module, loader)


def run(seed: int) -> tuple[dict[str, Accuracies], dict[str, ResolutionChoice]]:
    """One seed: accuracies of all networks on the test images, and the searches of three of them."""
    torch.manual_seed(seed)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = (images / 16).float()[order].view(-1, 1, 8, 8), labels[order]
    data, held_out, test = ((images[a:b], labels[a:b]) for a, b in ((0, 900), (900, 1200), (1200, None)))
    start = train(network(), data, BASE, 60, 3e-3, seed)
    by_size = {size: fine_tuned(start, data, size, 10 * seed + 1) for size in TRAINED}
    same = [by_size[BASE], *(fine_tuned(start, data, BASE, 10 * seed + j) for j in (2, 3))]
    networks = {f"fine-tuned at {size}": module for size, module in by_size.items()}
    networks["soup of 20, 24 and 28"] = averaged(list(by_size.values()), TRAINED)
    networks["soup of three at 24"] = averaged(same, [BASE] * 3)
    accuracies = {name: tested(module, test) for name, module in networks.items()}
    kept = ("fine-tuned at 24", "soup of 20, 24 and 28", "soup of three at 24")
    return accuracies, {name: searched(networks[name], held_out) for name in kept}


Runs = list[tuple[dict[str, Accuracies], dict[str, ResolutionChoice]]]


def means(runs: Runs, name: str) -> Accuracies:
    """Of one network over the seeds."""
    return {size: statistics.mean(accuracies[name][size] for accuracies, _ in runs) for size in SIZES}


def table(runs: Runs) -> str:
    """Accuracy over size, as Markdown."""
    lines = [
        f"| test size | {' | '.join(map(str, SIZES))} | mean of the grid |",
        "| --- |" + " --- |" * (len(SIZES) + 1),
    ]
    for name in runs[0][0]:
        grid = [statistics.mean(accuracies[name].values()) for accuracies, _ in runs]
        cells = [f"{value:.1f}" for value in means(runs, name).values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread(grid, 1)} |")
    return "\n".join(lines)


def by_rule(runs: Runs) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The size that each rule chooses on the held-out images, and the accuracy on test images there."""
    train = Resolution((BASE, BASE))
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for accuracies, searches in runs:
        for name, search in searches.items():
            for rule in RULES:
                (size, _) = choose(next(iter(search.scores.values())), train, rule).size
                found.setdefault(name, {}).setdefault(rule, []).append((size, accuracies[name][size]))
    return found


def rules_table(runs: Runs) -> str:
    """What the rules choose, as Markdown."""
    lines = [
        f"| chosen on 300 images | size of training | {' | '.join(RULES)} |",
        "| --- |" + " --- |" * (1 + len(RULES)),
    ]
    for name, row in by_rule(runs).items():
        cells = [spread([accuracies[name][BASE] for accuracies, _ in runs], 1)]
        for rule in RULES:
            sizes = ", ".join(f"{size}" for size in sorted({size for size, _ in row[rule]}))
            cells.append(f"{spread([value for _, value in row[rule]], 1)} (sizes {sizes})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses(runs: Runs, rule: str) -> list[float]:
    """What each search loses on test images against the size of training."""
    return [
        accuracies[name][BASE] - value
        for name, row in by_rule(runs).items()
        for (_, value), (accuracies, _) in zip(row[rule], runs, strict=True)
    ]


def claims(runs: Runs) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    every = {name: means(runs, name) for name in runs[0][0]}
    mixed, same = every["soup of 20, 24 and 28"], every["soup of three at 24"]
    grid = {name: statistics.mean(row.values()) for name, row in every.items()}
    best = max(grid, key=grid.get)
    found = [("the soup over sizes has the highest mean over the grid", best == "soup of 20, 24 and 28")]
    for size in (20, 28):
        gain = mixed[size] - same[size]
        found.append((f"at {size} it is ahead of the soup of one size by 1 point or more ({gain:+.1f})", gain >= 1))
    gap = every["fine-tuned at 24"][24] - mixed[24]
    found.append((f"at 24 it is within 1.5 points of the network for 24 ({-gap:+.1f})", gap <= 1.5))
    low = every["fine-tuned at 24"][24] - every["fine-tuned at 24"][16]
    high = every["fine-tuned at 24"][24] - every["fine-tuned at 24"][40]
    found.append((f"testing at 24 beats testing at 16 by 15 points or more ({low:+.1f})", low >= 15))
    found.append((f"testing a network for 24 at 40 is worse ({-high:+.1f})", high > 0))
    lost = max(losses(runs, "keep_train"))
    error = 100 * (0.93 * 0.07 / 597) ** 0.5
    text = f"keep_train never loses more than a standard error of the test ({error:.1f}) to the size of training"
    found.append((f"{text} (at most {lost:.1f})", lost <= error))
    return found


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    runs = [run(seed) for seed in range(options.seeds)]
    lost = [
        a[n][BASE] - v for n, row in by_rule(runs).items() for (_, v), (a, _) in zip(row["best"], runs, strict=True)
    ]
    parts = [
        "### MindVL: digits at several sizes",
        f"{options.seeds} seeds; accuracy in %.",
        table(runs),
        rules_table(runs),
    ]
    parts.append(
        f"The rule `best` loses {max(lost):.1f} points at most, where it follows chance on the held-out images."
    )
    parts.append(verdicts(claims(runs)))
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("mindvl", text)
        picture = resolution_picture(runs[0][1]["soup of 20, 24 and 28"])
        (RESULTS.parent / "mindvl.png").write_bytes(picture.png)


if __name__ == "__main__":
    main()
