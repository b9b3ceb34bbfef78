"""SimulatedCrowd: workers of known skill who vote on items with known labels, for examples and tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_soup.data.votes import Votes
from lightning_soup.errors import UnsupportedSetup

__all__ = ["SimulatedCrowd"]

DIGITS_ALIKE = {"0": "6", "1": "7", "2": "7", "3": "8", "4": "9", "5": "6", "6": "5", "7": "1", "8": "3", "9": "4"}


@dataclass(frozen=True)
class SimulatedCrowd:
    """Good workers, poor ones, and spammers who give one answer whatever they see.

    A worker of accuracy a is right on an item of difficulty d with probability σ(log(a/(1 − a)) − d); d is normal with
    mean 0 and deviation ``difficulty``. Of wrong answers a share is the class that the right one looks like, the rest
    is spread over all others. Each item gets votes of ``votes_per_item`` different workers, drawn at random.

    Args:
        good: How many workers have an accuracy between 0.7 and 0.9.
        poor: How many between 0.35 and 0.55.
        spammers: How many always give one and the same class, drawn for each of them.
        votes_per_item: Votes on each item.
        difficulty: Deviation of the items' difficulty.
        look_alike: For a class, the one that it is taken for; by default the digits', 4 for 9 and so on.
        look_alike_share: Share of wrong answers that are this class.
        seed: Decides the workers and all their answers.

    Raises:
        UnsupportedSetup: No workers, more votes on an item than workers, a value out of range, or a class that is taken
            for itself.
    """

    good: int = 15
    poor: int = 7
    spammers: int = 3
    votes_per_item: int = 5
    difficulty: float = 1.0
    look_alike: dict[str, str] = field(default_factory=lambda: dict(DIGITS_ALIKE))
    look_alike_share: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        workers = self.good + self.poor + self.spammers
        if min(self.good, self.poor, self.spammers) < 0 or not 1 <= self.votes_per_item <= workers:
            raise UnsupportedSetup(
                f"{workers} workers (good={self.good}, poor={self.poor}, spammers={self.spammers}) cannot give "
                f"votes_per_item={self.votes_per_item}: expected 1 or more votes, of as many workers at least."
            )
        if not (self.difficulty >= 0 and 0 <= self.look_alike_share <= 1):
            raise UnsupportedSetup(
                f"difficulty={self.difficulty}, look_alike_share={self.look_alike_share}: expected a number of 0 or "
                "more, and a share between 0 and 1."
            )
        if same := [name for name, other in self.look_alike.items() if name == other]:
            raise UnsupportedSetup(
                f"look_alike: {', '.join(same)} would be taken for itself, which is no wrong answer. Name another "
                "class, or leave it out."
            )

    def votes(self, labels: Sequence[int] | np.ndarray, classes: Sequence[str], items: Sequence[str]) -> Votes:
        """Votes on items.

        Args:
            labels: The true class of each item, [N].
            classes: Names of the classes, [C].
            items: Names of the items, [N].
        """
        draw = np.random.default_rng(self.seed)
        labels, count = np.asarray(labels), len(classes)
        accuracy = np.concatenate([draw.uniform(0.7, 0.9, self.good), draw.uniform(0.35, 0.55, self.poor)])
        habits = draw.integers(count, size=self.spammers)
        number = {name: index for index, name in enumerate(classes)}
        # Classes that look like no other are taken for the next one.
        alike = np.array([number.get(self.look_alike.get(name), (i + 1) % count) for i, name in enumerate(classes)])
        difficulty = self.difficulty * draw.standard_normal(len(labels))

        shape = len(labels), self.votes_per_item
        workers = draw.random((len(labels), len(accuracy) + self.spammers)).argsort(1)[:, : self.votes_per_item]
        a = np.append(accuracy, np.full(self.spammers, 0.5))[workers]
        right = draw.random(shape) < 1 / (1 + np.exp(difficulty[:, None]) * (1 - a) / a)
        other = (labels[:, None] + draw.integers(1, count, size=shape)) % count
        wrong = np.where(draw.random(shape) < self.look_alike_share, alike[labels][:, None], other)
        given = np.where(right, labels[:, None], wrong)
        spams = workers >= len(accuracy)
        given[spams] = habits[workers[spams] - len(accuracy)]
        return Votes.of(
            np.repeat(np.asarray(items, object), self.votes_per_item),
            [f"worker {number:02d}" for number in workers.ravel()],
            [classes[label] for label in given.ravel()],
            classes,
            place="The simulated votes",
        )
