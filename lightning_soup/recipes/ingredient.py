"""Ingredients: checkpoints and what is known of them."""

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_soup.errors import RecipeError, UnwritableOutput
from lightning_soup.recipes.training_record import STEP, training_record
from lightning_soup.weights.adapters import CONFIG_NAME
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.replica_folder import ReplicaManifest, is_replica_folder
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

RUN_FILE = "run.json"


@dataclass(frozen=True, eq=False)
class Ingredient:
    """A checkpoint and what is known of it.

    Args:
        source: What :func:`.open_checkpoint` opens: a path, ``wandb:entity/project/artifact:version``, a mapping or a
            module.
        metrics: Metrics that were logged for it.
        step: Optimizer steps of its training.
        hparams: Hyperparameters of its training.
        label: Name in tables and plots; the file's name by default.
    """

    source: Source | WeightsFile
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @cached_property
    def weights(self) -> WeightsFile:
        """The opened checkpoint, with this ingredient's label in its messages."""
        opened = open_checkpoint(self.source)
        if self.label is not None and opened.label != self.label:
            opened = copy.copy(opened)  # another ingredient may give the same file another label
            opened.label = self.label
        return opened

    @property
    def name(self) -> str:
        """The label, or the name of the source where none was given."""
        return self.label or self.weights.label

    def without(self, prefixes: tuple[str, ...]) -> "Ingredient":
        """This ingredient without the tensors whose names begin so; itself where it has none."""
        kept = self.weights.without(prefixes)
        if kept is self.weights:
            return self
        found = replace(self)
        found.__dict__["weights"] = kept
        return found

    @classmethod
    def from_path(cls, path: str | os.PathLike, label: str | None = None) -> "Ingredient":
        """Open a checkpoint and read what it and the run folder around it say: metrics, step, hyperparameters.

        Raises:
            UnreadableCheckpoint: It cannot be opened.
            RecipeError: A run folder without a checkpoint, or with several.
        """
        given = Path(path)
        if str(path).startswith("wandb:"):
            return cls._from_metadata(open_checkpoint(path), str(path), label, {})
        record, folder = _run_record(given)
        recorded = folder / record["checkpoint"] if record.get("checkpoint") else None
        file = recorded if recorded is not None and given.is_dir() else _file_of_run(given)
        if recorded is not None and file.resolve() != recorded.resolve():
            record = {**record, "metrics": {}}  # they are those of another file of the run
        record = {**record, "metrics": {**record.get("metrics", {}), **training_record(file)}}
        return cls._from_metadata(open_checkpoint(file), str(file), label, record)

    @classmethod
    def _from_metadata(
        cls, opened: WeightsFile, source: str, label: str | None, record: Mapping[str, Any]
    ) -> "Ingredient":
        metrics = _monitored(opened) | {k: float(v) for k, v in record.get("metrics", {}).items()}
        told = metrics.pop(STEP, None)
        hparams = record.get("setting") or opened.mapping_beside("hyper_parameters")
        step = opened.metadata.get("global_step") if told is None or not math.isfinite(told) else int(told)
        found = cls(source, metrics, step if isinstance(step, int) else None, hparams, label or opened.label)
        found.__dict__["weights"] = opened
        return found


def gather_ingredients(
    sources: str | os.PathLike | Iterable[str | os.PathLike | Ingredient], *, output: str | os.PathLike | None = None
) -> list[Ingredient]:
    """Open ingredients from paths, run folders, patterns and artifact references.

    Args:
        sources: Each a file, a folder of weights, a run folder (with ``run.json`` or one file under ``checkpoints/``),
            a pattern such as ``runs/*/checkpoints/*.ckpt`` (sorted by name, numbers by value), an artifact reference
            ``wandb:entity/project/artifact:version``, or an :class:`Ingredient`. Of a checkpoint of several replicas
            each is an ingredient.
        output: Where the soup will be written. A pattern passes over an earlier soup there, so that a second run does
            not take the first one's soup for an ingredient.

    Returns:
        The ingredients, labelled by the part of their paths that tells them apart. A file that two sources name is
        taken once.

    Raises:
        RecipeError: Nothing is given, or a pattern matches nothing.
        UnwritableOutput: The output is itself an ingredient, which writing it would destroy.
        UnreadableCheckpoint: A file cannot be opened.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    paths: dict[str, str | os.PathLike | Ingredient] = {}
    for source in sources:
        if isinstance(source, Ingredient):
            paths[f"ingredient {id(source)}"] = source
            continue
        text = os.fspath(source)
        if has_magic(text) and not Path(text).exists() and not text.startswith("wandb:"):
            found = glob(os.path.expanduser(text), recursive=True)
            matches = _without_soups(sorted((m for m in found if not _is_earlier_soup(m, output)), key=_natural), text)
            if not matches:
                raise RecipeError(f"{text!r} matches no file (searched from {Path.cwd()}). Check the pattern.")
        else:
            matches = [text]
        matches = [file for match in matches for file in _replicas(match)]
        for match in matches:
            refuse_overwriting(match, output)
        paths |= {match if match.startswith("wandb:") else os.path.realpath(match): match for match in matches}
    if not paths:
        raise RecipeError("no ingredients given. Name checkpoint files, run folders or a pattern.")
    labels = iter(_labels([str(path) for path in paths.values() if not isinstance(path, Ingredient)]))
    return [
        path if isinstance(path, Ingredient) else Ingredient.from_path(path, next(labels)) for path in paths.values()
    ]


def as_ingredients(ingredients: Sequence[Ingredient | Source | WeightsFile]) -> list[Ingredient]:
    """Accept checkpoints where ingredients are asked for, and give every one a label of its own."""
    if isinstance(ingredients, (str, os.PathLike, Mapping)):
        raise RecipeError(
            f"expected a list of ingredients, got one {type(ingredients).__name__}. "
            "gather_ingredients() makes one from paths and patterns."
        )
    found = [_as_ingredient(item) for item in ingredients]
    names = [item.name for item in found]
    return [
        replace_label(item, f"{name} ({i + 1})") if names.count(name) > 1 else item
        for i, (item, name) in enumerate(zip(found, names, strict=True))
    ]


def _as_ingredient(item: Ingredient | Source | WeightsFile) -> Ingredient:
    if isinstance(item, Ingredient):
        return item
    return Ingredient.from_path(item) if isinstance(item, (str, os.PathLike)) else Ingredient(item)


def replace_label(ingredient: Ingredient, label: str) -> Ingredient:
    """The same ingredient under another label."""
    return replace(ingredient, label=label)


def refuse_overwriting(ingredient: str | os.PathLike, output: str | os.PathLike | None) -> None:
    """Refuse an output that is one of the ingredients.

    Raises:
        UnwritableOutput: It is.
    """
    if _same_file(ingredient, output):
        raise UnwritableOutput(f"{output}: is one of the ingredients, and would be overwritten. Name another output.")


def _is_earlier_soup(path: str, output: str | os.PathLike | None) -> bool:
    return _same_file(path, output) and open_checkpoint(path).provenance is not None


def _without_soups(matches: Sequence[str], pattern: str) -> list[str]:
    """Leave soups that lie among checkpoints, such as ModelSoup's own, out of what a pattern matches, and say so."""
    files = [match for match in matches if Path(match).is_file() or Path(match, CONFIG_NAME).is_file()]
    soups = [match for match in files if open_checkpoint(match).provenance is not None]
    if not soups or len(soups) == len(matches):
        return list(matches)
    warnings.warn(
        f"{pattern}: left out {', '.join(soups[:4])}{' …' if len(soups) > 4 else ''}, which are soups themselves. "
        "Name them to cook with them.",
        stacklevel=3,
    )
    return [match for match in matches if match not in soups]


def _same_file(path: str | os.PathLike, other: str | os.PathLike | None) -> bool:
    return other is not None and os.path.realpath(user_path(path)) == os.path.realpath(user_path(other))


def _natural(text: str) -> list[Any]:
    """Sort key under which ``run-10`` comes after ``run-9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _labels(paths: Sequence[str]) -> list[str]:
    """The parts of the paths that tell them apart: ``000-a1/checkpoints/last.ckpt`` becomes ``000-a1``."""
    parts = [Path(path).parts for path in paths]
    if len(paths) == 1:
        return [Path(paths[0]).name]
    depth = max((len(p) for p in parts), default=0)
    padded = [p + ("",) * (depth - len(p)) for p in parts]
    differing = [i for i in range(depth) if len({p[i] for p in padded}) > 1]
    for count in range(1, len(differing) + 1):
        labels = ["/".join(p[i] for i in differing[:count] if p[i]) for p in padded]
        if len(set(labels)) == len(labels):
            shorter = [label.removesuffix(Path(path).suffix) for label, path in zip(labels, paths, strict=True)]
            return shorter if len(set(shorter)) == len(labels) else labels
    return list(paths)


def _run_record(path: Path) -> tuple[dict[str, Any], Path]:
    """What a sweep wrote about the run that a file or folder belongs to, and the run's folder."""
    folders = [path, *path.parents][: 1 if path.is_dir() else 3]
    for folder in folders:
        file = folder / RUN_FILE
        if file.is_file():
            try:
                record = json.loads(file.read_text())
            except ValueError as error:
                raise RecipeError(f"{file}: not valid JSON ({error}). Remove it or run the sweep again.") from error
            return (record if _is_record(record) else {}), folder
    return {}, path


def _is_record(record: object) -> bool:
    """Whether a ``run.json`` is one that a sweep wrote, and not another program's."""
    if not isinstance(record, dict) or not isinstance(record.get("checkpoint"), str):
        return False
    metrics, setting = record.get("metrics"), record.get("setting")
    numbers = isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())
    return numbers and isinstance(setting, dict)


def _replicas(path: str) -> list[str]:
    """The files of a checkpoint of several replicas; any other path as it is."""
    folder = user_path(path)
    if path.startswith("wandb:") or not folder.is_dir():
        return [path]
    inside = _checkpoints_of_run(folder)
    folder = inside[0] if len(inside) == 1 else folder
    if not is_replica_folder(folder):
        return [path]
    manifest = ReplicaManifest.read(folder)
    return [str(manifest.path(rank)) for rank in range(manifest.world_size)]


def _checkpoints_of_run(path: Path) -> list[Path]:
    return sorted((path / "checkpoints").glob("*.ckpt")) if path.is_dir() else []


def _file_of_run(path: Path) -> Path:
    inside = _checkpoints_of_run(path)
    if not inside:
        return path
    if len(inside) > 1:
        raise RecipeError(
            f"{path}: a run folder with {len(inside)} checkpoints ({', '.join(p.name for p in inside[:4])}). "
            "Name the one you mean, or give a pattern for all of them."
        )
    return inside[0]


def saves_between_validations(state_key: str) -> bool:
    """Whether a ModelCheckpoint saves every so many steps or minutes, by its ``state_key``.

    It saves before the validation of the same step then, so the score that it notes for a file is that of earlier
    weights, or of none.
    """
    return bool(re.search(r"'every_n_train_steps': [1-9]|'train_time_interval': (?!None)", state_key))


def _monitored(opened: WeightsFile) -> dict[str, float]:
    """The score that ModelCheckpoint recorded for a file when it wrote it."""
    metrics = {}
    for key, state in opened.mapping_beside("callbacks").items():
        if not isinstance(state, dict) or not isinstance(state.get("monitor"), str) or saves_between_validations(key):
            continue
        kept = {Path(str(path)).name: score for path, score in state.get("best_k_models", {}).items()}
        score = kept.get(opened.path.name if opened.path else "", state.get("current_score"))
        if isinstance(score, (int, float)):
            metrics[state["monitor"]] = float(score)
    return metrics
