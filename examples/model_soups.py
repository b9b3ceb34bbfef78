"""Model soups on real handwriting, over several seeds: prints the tables of RESULTS.md, and which claims hold.

    python examples/model_soups.py --seeds 5

Each seed pre-trains a small ViT on MNIST, fine-tunes eight ingredients on 200 labelled UCI digits and cooks (about
two minutes on one core; finished parts are not repeated). The other cases fine-tune on 600 labels, and with learning
rates a factor of ten apart, for three seeds. ``--write`` puts the tables into RESULTS.md beside this file.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import spread, verdicts, write

from lightning_soup.cli.demo import demo

TESTS = {"test": "UCI test", "corrupted": "corrupted", "mnist": "MNIST left behind"}
ROWS = {
    "mean": "mean of the 8 ingredients",
    "best": "best ingredient on validation",
    "UniformSoup": "uniform soup",
    "GreedySoup": "greedy soup",
    "LearnedSoup": "learned soup",
    "InterpolatedSoup": "WiSE-FT to the uniform soup, α by validation",
    "ensemble": "logit ensemble (8 × the cost)",
    "init": "before fine-tuning",
}
LADDER = """\
method: grid
parameters:
  model.lr: {{values: {rates}}}
  data.augment: {{values: [none, strong]}}
"""

Report = dict[str, Any]


def run(folder: Path, seed: int, **options: Any) -> Report:
    """Run the demo, or find it run, and read its report."""
    done = folder / "soup_report" / "report.json"
    if not done.exists():
        demo(str(folder), seed=seed, **options)
    return json.loads(done.read_text())


def row_of(report: Report, key: str) -> dict[str, Any]:
    """The report's row of a kind, or of a recipe."""
    return next(row for row in report["rows"] if row["kind"] == key or row["label"].startswith(key))


def accuracy(report: Report, key: str, test: str) -> float:
    """Accuracy in percent."""
    return row_of(report, key)["tests"][test]["accuracy"]


def table(reports: Sequence[Report]) -> str:
    """Accuracy of every row on every test set, as Markdown."""
    lines = [f"| accuracy, % | {' | '.join(TESTS.values())} |", "| --- |" + " --- |" * len(TESTS)]
    for key, name in ROWS.items():
        cells = [spread([accuracy(report, key, test) for report in reports]) for test in TESTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(reports: Sequence[Report]) -> str:
    """The uniform soup against the mean and the chosen best, and in how many seeds it is ahead."""
    lines = [f"| uniform soup, points | {' | '.join(TESTS.values())} |", "| --- |" + " --- |" * len(TESTS)]
    for key, name in {"mean": "minus the mean ingredient", "best": "minus the chosen best"}.items():
        cells = []
        for test in TESTS:
            values = [accuracy(report, "UniformSoup", test) - accuracy(report, key, test) for report in reports]
            cells.append(f"{spread(values)} (ahead in {sum(value > 0 for value in values)} of {len(values)})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(reports: Sequence[Report]) -> list[tuple[float, list[float]]]:
    """The WiSE-FT line: for each α, the mean accuracy on each test set."""
    points = zip(*(report["curve_points"] for report in reports), strict=True)
    return [
        (group[0]["alpha"], [statistics.mean(p["tests"][test]["accuracy"] for p in group) for test in TESTS])
        for group in points
    ]


def curve_table(reports: Sequence[Report]) -> str:
    """The WiSE-FT line, as Markdown."""
    points = curve(reports)
    lines = [f"| α | {' | '.join(f'{alpha:g}' for alpha, _ in points)} |", "| --- |" + " --- |" * len(points)]
    for place, name in enumerate(TESTS.values()):
        lines.append(f"| {name} | {' | '.join(f'{values[place]:.1f}' for _, values in points)} |")
    return "\n".join(lines)


def claims(reports: Sequence[Report]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    greedy = all(row_of(r, "GreedySoup")["selection_score"] >= row_of(r, "best")["selection_score"] for r in reports)
    above = all(accuracy(r, "UniformSoup", test) > accuracy(r, "mean", test) for r in reports for test in TESTS)
    behind = statistics.mean(accuracy(r, "UniformSoup", "mnist") - accuracy(r, "best", "mnist") for r in reports)
    points = [values for _, values in curve(reports)]
    rises = all(later[0] >= earlier[0] - 0.3 for earlier, later in pairwise(points))
    falls = all(later[2] <= earlier[2] + 0.3 for earlier, later in pairwise(points))
    return [
        ("validation accuracy of the greedy soup ≥ that of the best ingredient, in every seed", greedy),
        ("the uniform soup is above the mean ingredient, in every seed, on all three tests", above),
        (
            f"the uniform soup is 2 points or more above the chosen best on MNIST, on average ({behind:+.2f})",
            behind >= 2,
        ),
        ("the WiSE-FT line is a frontier: UCI rises and MNIST falls with α (within 0.3 points)", rises and falls),
    ]


def section(title: str, reports: Sequence[Report], *, checked: bool) -> str:
    """One part of RESULTS.md."""
    parts = [f"### {title}", f"{len(reports)} seeds, mean ± standard deviation.", table(reports), gains(reports)]
    if checked:
        parts += ["The WiSE-FT line from the pre-trained weights to the uniform soup:", curve_table(reports)]
        parts.append(verdicts(claims(reports)))
    return "\n\n".join(parts)


def main() -> None:
    """Run, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--counter-seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/model_soups"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    main_job = [run(options.folder / f"seed-{seed}", seed) for seed in range(options.seeds)]
    parts = [section("200 labels, ingredients of about equal quality", main_job, checked=True)]
    variants: list[tuple[str, str, dict[str, Any]]] = [("600-labels", "600 labels", {"labels": 600})]
    for name, rates in {
        "ladder": "[3.0e-4, 6.5e-4, 1.4e-3, 3.0e-3]",
        "steep": "[1.0e-3, 2.2e-3, 4.6e-3, 1.0e-2]",
    }.items():
        ladder = options.folder / f"{name}.yaml"
        ladder.write_text(LADDER.format(rates=rates))
        variants.append(
            (name, f"200 labels, learning rates a factor of ten apart, {rates}", {"sweep_file": str(ladder)})
        )
    for name, title, change in variants:
        starts = [str(options.folder / f"seed-{seed}" / "pretrained.ckpt") for seed in range(options.counter_seeds)]
        reports = [
            run(options.folder / f"{name}-{seed}", seed, start=start, **change) for seed, start in enumerate(starts)
        ]
        parts.append(section(title, reports, checked=False))
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write("model_soups", text)


if __name__ == "__main__":
    main()
