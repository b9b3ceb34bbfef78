"""Small tables of votes."""

import numpy as np

from lightning_soup.data.votes import Votes

A_TO_D = [("a", "0 0 1"), ("b", "1 1 1"), ("c", "0 2 2"), ("d", "2 2 2")]
ROWS = [(task, f"w{place}", label) for task, given in A_TO_D for place, label in enumerate(given.split(), 1)]


def four_items() -> Votes:
    """Four items, three workers, three classes: the votes of the golden cases."""
    return Votes.of(*zip(*ROWS, strict=True))


def random_rows(seed: int = 0, items: int = 60, workers: int = 12, classes: int = 4) -> list[tuple[str, str, str]]:
    """Rows of all kinds of workers; some items have one vote, one worker votes once, a class has no votes."""
    draw = np.random.default_rng(seed)
    skill, rows = draw.uniform(0.2, 0.95, workers), []
    for item in range(items):
        truth = draw.integers(classes - 1)
        for worker in draw.choice(workers, draw.integers(1, 6), replace=False):
            label = truth if draw.random() < skill[worker] else draw.integers(classes - 1)
            rows.append((f"item {item:02d}", f"worker {worker:02d}", f"class {label}"))
    rows.append(("item 00", "a worker with one vote", "class 0"))
    return rows


def random_votes(seed: int = 0, **options: int) -> Votes:
    """Votes of :func:`random_rows`."""
    count = options.get("classes", 4)
    return Votes.of(*zip(*random_rows(seed, **options), strict=True), [f"class {label}" for label in range(count)])
