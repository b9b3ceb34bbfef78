"""What an inspection is told as: a table, the verdict, pictures, and a JSON file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_soup.landscape.basins import Basins
from lightning_soup.landscape.inspection import Inspection
from lightning_soup.runs.figures_inspection import inspection_pictures
from lightning_soup.runs.report_json import plain
from lightning_soup.weights.atomic import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["inspection_table", "verdict", "write_inspection"]


def verdict(seen: Inspection, basins: Basins | None = None) -> list[str]:
    """In plain words; what validation says comes after what the weights say, and instead of their last word."""
    told = seen.verdict()
    if basins is None:
        return told
    return [*told[:-1], *basins.verdict(_names(seen))]


def _names(seen: Inspection) -> list[str]:
    return [seen.labels[i] for i in seen.compared if i not in seen.broken]


def inspection_table(seen: Inspection, basins: Basins | None = None) -> "Table":
    """A rich table with a row for each checkpoint."""
    from rich.table import Table

    columns = ["checkpoint", "norm", "nearest", "usual distance"]
    columns += ["update"] if seen.statistics is not None and seen.statistics.lengths is not None else []
    columns += [basins.metric, "greedy order"] if basins is not None else []
    table = Table(*columns, "", box=None)
    whole = [i for i in seen.compared if i not in seen.broken]
    for i, name in enumerate(seen.labels):
        cells = [name]
        if i in whole and seen.statistics is not None and len(whole) > 1:
            place = seen.compared.index(i)
            row = sorted(float(seen.statistics.distances[place, seen.compared.index(j)]) for j in whole if j != i)
            cells += [f"{float(seen.statistics.norms[place]):.3g}", f"{row[0]:.3g}", f"{row[len(row) // 2]:.3g}"]
            cells += [f"{float(seen.statistics.lengths[place]):.3g}"] if "update" in columns else []
            if basins is not None:
                number = whole.index(i)
                order = list(basins.order)
                cells += [f"{basins.q[number]:.4g}", str(order.index(number) + 1) if number in order else "–"]
        cells += [""] * (len(columns) - len(cells))
        table.add_row(*cells, _mark(seen, basins, i, whole))
    return table


def _mark(seen: Inspection, basins: Basins | None, i: int, whole: list[int]) -> str:
    for known, word in ((seen.incompatible, "other tensors"), (seen.broken, "NaN"), (seen.far, "far away")):
        if i in known:
            return word
    if any(i in group for group in seen.groups[1:]):
        return "another start"
    if basins is not None and i in whole and whole.index(i) in basins.poor:
        return "far worse"
    if basins is not None and any(whole.index(i) in basin for basin in basins.basins[1:]):
        return "another basin"
    return ""


def write_inspection(
    folder: Path, seen: Inspection, basins: Basins | None = None, alike: Tensor | None = None
) -> list[Path]:
    """Write ``inspection.json`` and the pictures.

    Args:
        folder: Where; it is made if need be.
        seen: What the weights said.
        basins: What validation said.
        alike: CKA between outputs.

    Returns:
        The files.

    Raises:
        UnwritableOutput: The folder cannot be written.
    """
    files = []
    for picture in inspection_pictures(seen, basins, alike):
        path = folder / f"{picture.name}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture.png)
        files.append(path)
    path = folder / "inspection.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_content(seen, basins, alike), indent=1), encoding="utf-8")
    return [path, *files]


def _content(seen: Inspection, basins: Basins | None, alike: Tensor | None) -> dict[str, Any]:
    named = lambda numbers: [seen.labels[i] for i in numbers]  # noqa: E731
    content: dict[str, Any] = {
        "checkpoints": list(seen.labels),
        "verdict": verdict(seen, basins),
        "hopeless": named(seen.hopeless),
        "incompatible": {seen.labels[i]: why for i, why in seen.incompatible.items()},
        "broken": {seen.labels[i]: why for i, why in seen.broken.items()},
        "groups": [named(group) for group in seen.groups],
        "far": {seen.labels[i]: times for i, times in seen.far.items()},
        "duplicates": [named(pair) for pair in seen.duplicates],
        "compared": named(seen.compared),
    }
    if seen.statistics is not None:
        found = seen.statistics
        content |= {
            "distances": found.distances.tolist(),
            "norms": found.norms.tolist(),
            "effective_rank": found.rank,
            "update_cosines": None if found.cosines is None else found.cosines.tolist(),
            "update_lengths": None if found.lengths is None else found.lengths.tolist(),
            "norms_by_tensor": {name: row.clamp(min=0).sqrt().tolist() for name, row in found.gram.squares.items()},
        }
    if basins is not None:
        names = _names(seen)
        content |= {
            "evaluated": names,
            "metric": basins.metric,
            "values": list(basins.q),
            "barriers": basins.barriers.tolist(),
            "tolerance": basins.tolerance,
            "poor": [names[i] for i in basins.poor],
            "basins": [[names[i] for i in basin] for basin in basins.basins],
            "greedy_order": [names[i] for i in basins.order],
            "evaluations": list(basins.evaluations),
        }
    if alike is not None:
        content["cka"] = alike.tolist()
    return plain(content)
