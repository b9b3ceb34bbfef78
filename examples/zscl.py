"""ZSCL on five styles of real digits, against what it is made of and what it is compared with.

    python examples/zscl.py

Each seed pre-trains a tiny CLIP on all styles (300 digits), then every method learns the styles one after the other
(500 digits each) and is judged on all five after each: about two minutes a seed on one core; finished parts are not
repeated. ``--write`` puts the tables into RESULTS.md beside this file.
"""

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import yaml
from results import spread, verdicts, write

from lightning_soup.cli.continual import continual
from lightning_soup.cli.sweep import train_once
from lightning_soup.evaluation.continual import ContinualMetrics

CONFIG = Path(__file__).parents[1] / "configs" / "zscl_digits.yaml"
METRICS = {"transfer": "Transfer", "average": "Avg", "last": "Last"}
ZERO_SHOT = "zero-shot"

Config = dict[str, Any]
Table = dict[str, list[ContinualMetrics]]


def alone(config: Config) -> None:
    """Plain fine-tuning."""
    without_ensemble(config)
    config["model"]["init_args"] |= {"distillation": 0, "consolidation": 0}


def without_ensemble(config: Config) -> None:
    """No weight ensemble: the last weights count."""
    config["trainer"]["callbacks"] = None


def without_consolidation(config: Config) -> None:
    """No pull to the weights of the task's start."""
    config["model"]["init_args"]["consolidation"] = 0


def lwf(config: Config) -> None:
    """Learning without forgetting: distilled from the task's start, on the task's own images."""
    without_ensemble(config)
    config["model"]["init_args"] |= {"consolidation": 0, "teacher": "start", "reference": "task"}


def wise_ft(config: Config) -> None:
    """Fine-tuning, then 0.8 of its weights and 0.2 of the task's start."""
    alone(config)
    config["continual"]["wise_ft"] = 0.8


def only_ensemble(config: Config) -> None:
    """Fine-tuning with the weight ensemble."""
    config["model"]["init_args"] |= {"distillation": 0, "consolidation": 0}


def only_distillation(config: Config) -> None:
    """The distillation of ZSCL, without its consolidation and its weight ensemble."""
    without_ensemble(config)
    without_consolidation(config)


METHODS: dict[str, Callable[[Config], None]] = {
    "fine-tuning": alone,
    "LwF": lwf,
    "WiSE-FT, α = 0.8": wise_ft,
    "weight ensemble only": only_ensemble,
    "distillation only": only_distillation,
    "ZSCL without consolidation": without_consolidation,
    "ZSCL": lambda config: None,
}


def configs(folder: Path, seed: int) -> dict[str, Path]:
    """Write the config of every method for a seed, which also decides which image belongs to which set."""
    base = yaml.safe_load(CONFIG.read_text())
    base["seed_everything"] = seed
    base["data"].setdefault("init_args", {})["seed"] = seed
    base["model"]["init_args"]["reference"].setdefault("init_args", {})["seed"] = seed
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, (name, change) in enumerate(METHODS.items()):
        config = copy.deepcopy(base)
        change(config)
        written[name] = folder / f"method-{number}.yaml"
        written[name].write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return written


def run(folder: Path, seed: int) -> dict[str, ContinualMetrics]:
    """Run every method for a seed, or find it run."""
    written = configs(folder, seed)
    pretrain = yaml.safe_load(CONFIG.read_text())["continual"]["pretrain"]
    start = train_once(written["fine-tuning"], pretrain, folder / "pretrain", seed)
    found = {}
    for name, path in written.items():
        result = continual(str(path), folder=str(folder / path.stem), start=str(start), seed=seed)
        found[name] = result.metrics
        found.setdefault(ZERO_SHOT, result.zero_shot_metrics)
    return found


def table(results: Table) -> str:
    """Transfer, Avg and Last of every method, as Markdown."""
    lines = [f"| accuracy, % | {' | '.join(METRICS.values())} |", "| --- |" + " --- |" * len(METRICS)]
    for name in (ZERO_SHOT, *METHODS):
        cells = [spread([getattr(metrics, key) for metrics in results[name]], 1) for key in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(results: Table) -> list[tuple[str, bool]]:
    """What must hold of the means over seeds, and whether it does."""
    mean = {
        name: {key: statistics.mean(getattr(metrics, key) for metrics in rows) for key in METRICS}
        for name, rows in results.items()
    }
    order = [ZERO_SHOT, "ZSCL", "distillation only", "weight ensemble only", "fine-tuning"]
    transfer = [mean[name]["transfer"] for name in order]
    found = [
        (
            f"Transfer of {' > '.join(order).replace('>', '≥', 1)}",
            transfer[0] >= transfer[1] > transfer[2] > transfer[3] > transfer[4],
        )
    ]
    for name, least in (("ZSCL", (15, 15, 10)), ("weight ensemble only", (5, 5, 5))):
        for key, points in zip(METRICS, least, strict=True):
            gain = mean[name][key] - mean["fine-tuning"][key]
            claim = f"{name} is {points} points or more above fine-tuning on {METRICS[key]} ({gain:+.1f})"
            found.append((claim, gain >= points))
    return found


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--folder", type=Path, default=Path("runs/zscl"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    runs: Sequence[dict[str, ContinualMetrics]] = [
        run(options.folder / f"seed-{seed}", seed) for seed in range(options.seeds)
    ]
    results = {name: [found[name] for found in runs] for name in (ZERO_SHOT, *METHODS)}
    title = "### Five styles of digits in turn, a tiny CLIP"
    about = f"{options.seeds} seeds, mean ± standard deviation, in percent."
    text = "\n\n".join([title, about, table(results), verdicts(claims(results))])
    print(text)
    if options.write:
        write("zscl", text)


if __name__ == "__main__":
    main()
