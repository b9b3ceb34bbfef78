"""What a training wrote beside a checkpoint: ``metrics.json`` here, ``trainer_state.json`` with transformers."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.adapter_merging import METRICS_NAME

STEP, TRAIN_LOSS = "step", "train_loss"
_TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = "checkpoint-"


def training_record(folder: Path) -> dict[str, float]:
    """The metrics that stand beside a checkpoint in its folder, ``step`` among them; empty where there are none.

    Of a ``checkpoint-<step>`` folder of transformers' Trainer, ``train_loss`` is the mean over the steps since the
    checkpoint before: what its log says of single steps is noise. The checkpoint before is the one that lies beside it;
    where older ones were deleted, it is taken to be as far away as the next one. Results of an evaluation at that very
    step come with it (``eval_loss`` and so on).

    Args:
        folder: Where the checkpoint lies.

    Raises:
        UnreadableCheckpoint: ``trainer_state.json`` is damaged.
    """
    if not folder.is_dir():
        return {}
    if (folder / METRICS_NAME).is_file():
        with suppress(UnreadableCheckpoint):  # another program's file may have this name
            return {name: float(value) for name, value in _json(folder / METRICS_NAME).items() if _is_number(value)}
    if (folder / _TRAINER_STATE).is_file():
        return _from_trainer(folder, _json(folder / _TRAINER_STATE))
    return {}


def _from_trainer(folder: Path, state: Mapping[str, Any]) -> dict[str, float]:
    step, log = state.get("global_step"), state.get("log_history")
    if not isinstance(step, int) or not isinstance(log, list):
        raise UnreadableCheckpoint(f"{folder / _TRAINER_STATE}: no global_step and log_history. Copy the folder again.")
    entries = [entry for entry in log if isinstance(entry, dict) and _is_number(entry.get("step"))]
    entries = [entry for entry in entries if entry["step"] <= step]
    found = {STEP: float(step)}
    loss = _mean_loss([entry for entry in entries if "loss" in entry], _step_before(folder, step))
    if loss is not None:
        found[TRAIN_LOSS] = loss
    for entry in entries:
        if entry["step"] == step:
            found |= {name: float(v) for name, v in entry.items() if name.startswith("eval_") and _is_number(v)}
    return found


def _mean_loss(entries: list[Mapping[str, Any]], since: int) -> float | None:
    """The mean over the steps after ``since``; an entry is the mean over those since the entry before."""
    total, steps, before = 0.0, 0, 0
    for entry in entries:
        covered = entry["step"] - max(before, since)
        before = entry["step"]
        if covered > 0:
            loss = entry["loss"] if _is_number(entry["loss"]) else math.nan  # which is told where it is used
            total, steps = total + covered * loss, steps + covered
    return total / steps if steps else None


def _step_before(folder: Path, step: int) -> int:
    names = (path.name.removeprefix(_CHECKPOINT) for path in folder.absolute().parent.glob(f"{_CHECKPOINT}*"))
    others = [int(name) for name in names if name.isdigit()]
    earlier = [other for other in others if other < step]
    if earlier:
        return max(earlier)
    later = [other for other in others if other > step]
    return max(0, 2 * step - min(later)) if later else 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: not JSON ({error}). Copy the folder again.") from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path}: expected a JSON object. Copy the folder again.")
    return content
