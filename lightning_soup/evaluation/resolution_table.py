"""What a search over image sizes has found, the rules that choose from it, and the file that holds it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights.atomic import atomic_path, user_path

__all__ = ["Resolution", "ResolutionChoice", "Rule", "SizeScore", "Table", "choose", "mean_score"]

Rule = Literal["keep_train", "best", "one_se"]


@dataclass(frozen=True)
class Resolution:
    """A candidate: one size for all images, or bounds of their area.

    Args:
        size: Height and width in pixels.
        bounds: Lowest and highest area in pixels; see :func:`.smart_resize`.
    """

    size: tuple[int, int] | None = None
    bounds: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.bounds is not None:
            return f"{self.bounds[0]}–{self.bounds[1]} px²"
        return str(self.size[0]) if self.size[0] == self.size[1] else f"{self.size[0]}×{self.size[1]}"


@dataclass(frozen=True)
class SizeScore:
    """What a candidate has on one task.

    Attributes:
        metric: The metric's own value.
        error: Standard error of an accuracy, √(a(1−a)/n); NaN of other metrics.
        tokens: Per image, on average.
        seconds: Of the network, per image.
        images: n.
    """

    metric: float
    error: float
    tokens: float
    seconds: float
    images: int


@dataclass(frozen=True)
class ResolutionChoice:
    """The table of a search, and what was chosen.

    Attributes:
        scores: By task, by candidate.
        chosen: The candidate of each task; the same for all unless they were chosen apart.
        train: The candidate that is the size of training.
        rule: How it was chosen.
        metric: By what.
        selection_split: On what. Figures of the ``test`` split that was selected on are too good.
    """

    scores: Mapping[str, Mapping[Resolution, SizeScore]]
    chosen: Mapping[str, Resolution]
    train: Resolution
    rule: str
    metric: str
    selection_split: str

    @property
    def choice(self) -> Resolution:
        """The candidate of all tasks.

        Raises:
            UnsupportedSetup: They have several.
        """
        found = set(self.chosen.values())
        if len(found) > 1:
            raise UnsupportedSetup(f"The tasks have sizes of their own: {self._told()}. Look at chosen, by task.")
        return next(iter(found))

    def _told(self) -> str:
        return ", ".join(f"{task}: {candidate}" for task, candidate in self.chosen.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rule": self.rule,
            "metric": self.metric,
            "selection_split": self.selection_split,
            "train": str(self.train),
            "chosen": {task: str(candidate) for task, candidate in self.chosen.items()},
            "scores": {
                task: {str(candidate): asdict(score) for candidate, score in row.items()}
                for task, row in self.scores.items()
            },
        }


def choose(
    scores: Mapping[Resolution, SizeScore],
    train: Resolution,
    rule: Rule = "keep_train",
    mode: Literal["max", "min"] = "max",
    min_gain: float | None = None,
) -> Resolution:
    """Choose a candidate by a rule.

    Args:
        scores: By candidate.
        train: That of training.
        rule: ``best``: the best metric, of equal ones that with the fewest tokens. ``one_se``: the fewest tokens within
            one standard error of the best. ``keep_train``: the best, if it is better than ``train`` by more than that.
        mode: Whether a large or a small metric is good.
        min_gain: Instead of the standard error of the best one's accuracy.
    """
    sign = 1 if mode == "max" else -1
    best = min(scores, key=lambda one: (-sign * scores[one].metric, scores[one].tokens))
    margin = scores[best].error if min_gain is None else min_gain
    if rule == "best":
        return best
    if rule == "one_se":
        near = [one for one in scores if sign * scores[one].metric >= sign * scores[best].metric - margin]
        return min(near, key=lambda one: (scores[one].tokens, -sign * scores[one].metric))
    return best if sign * (scores[best].metric - scores[train].metric) > margin else train


def mean_score(scores: Sequence[SizeScore]) -> SizeScore:
    """The mean of the tasks, whatever their sizes; errors add up in squares."""
    count = len(scores)
    return SizeScore(
        sum(one.metric for one in scores) / count,
        math.sqrt(sum(one.error**2 for one in scores)) / count,
        sum(one.tokens for one in scores) / count,
        sum(one.seconds for one in scores) / count,
        sum(one.images for one in scores),
    )


@dataclass
class Table:
    """The file of a search, which is written after each candidate.

    Args:
        path: Of the file; None: nothing is kept.
        digest: Of the weights: rows of others are dropped.
        split: Of the data.
        metric: The metric.
        factor: Of the sides within bounds.
        marks: By task, what stands for all else that decides a row: the images, and how they are judged.
    """

    path: str | Path | None
    digest: str
    split: str
    metric: str
    factor: int | None
    marks: Mapping[str, str]
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        self.path = user_path(self.path)
        if self.path.exists():
            try:
                held = json.loads(self.path.read_text(encoding="utf-8"))
                same = held["weights"] == self.digest
                self.rows = {key: asdict(SizeScore(**row)) for key, row in held["rows"].items()} if same else {}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnsupportedSetup(
                    f"{self.path} is not the table of a search ({error}). Give another file, or remove it."
                ) from error

    def _key(self, task: str, candidate: Resolution) -> str:
        size = candidate if candidate.bounds is None else f"{candidate} by {self.factor}"
        return f"{self.split} | {task} | {self.metric} | {size} | {self.marks[task]}"

    def get(self, task: str, candidate: Resolution) -> SizeScore | None:
        """What it holds of a candidate."""
        row = self.rows.get(self._key(task, candidate))
        return None if row is None else SizeScore(**row)

    def put(self, task: str, candidate: Resolution, score: SizeScore) -> None:
        """Add a candidate, and write."""
        self.rows[self._key(task, candidate)] = asdict(score)
        if self.path is not None:
            with atomic_path(self.path) as temporary:
                temporary.write_text(
                    json.dumps({"weights": self.digest, "rows": self.rows}, indent=1), encoding="utf-8"
                )
