"""Commands that need files only. They import torch and nothing heavier, so that they answer at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_soup.cli.terminal import plain
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.progress import rich_progress
from lightning_soup.recipes import Ingredient, Recipe, Soup, UniformSoup, gather_ingredients
from lightning_soup.recipes import recook as cook_again
from lightning_soup.recipes.interpolated import for_recipe
from lightning_soup.recipes.soup_output import check_soup_output
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.atomic import check_writable, user_path
from lightning_soup.weights.formats import EXPERTS_KEY

if TYPE_CHECKING:
    from lightning_soup.weights import WeightsFile


_SHOWN = 500  # characters of one value
_LISTED = 5  # names under one entry


def soup(
    ingredients: list[str] | str,
    recipe: Recipe | None = None,
    output: str = "soup.safetensors",
    init: str | None = None,
    recalibrate: bool = False,
) -> Soup:
    """Cook a soup from files, without a model: for recipes that need no evaluation.

    Args:
        ingredients: Checkpoint files, run folders, patterns (``runs/*/checkpoints/*.ckpt``) or
            ``wandb:entity/project/artifact:version``.
        recipe: How the coefficients are chosen; UniformSoup by default. Recipes that choose by score need --config or
            --model and --data.
        output: The soup's file: .safetensors, or .ckpt, .pt, .pth, .bin in the shape of the first ingredient. Of PEFT
            adapters and of folders of transformers also the name of a folder, which from_pretrained loads.
        init: The weights that all ingredients started from, for InterpolatedSoup (WiSE-FT) and AdaptiveSoup (AMA).
        recalibrate: Estimate BatchNorm statistics anew on training data. Needs --config or --model and --data.
    """
    if recalibrate:
        raise UnsupportedSetup(
            "--recalibrate estimates BatchNorm statistics by passing training data through the model, and there is "
            "neither here. Give --config, or --model and --data; or go without --recalibrate."
        )
    recipe = recipe or UniformSoup()
    start = None if init is None else Ingredient.from_path(init)
    used = for_recipe(recipe, gather_ingredients(ingredients, output=output), start)
    check_soup_output(output, used)
    made = recipe.cook(used, progress=rich_progress)
    path = made.save(output, progress=rich_progress)
    console = Console()
    console.print(made.table())
    console.print(f"Saved: {plain(path)}")
    return made


def inspect(checkpoints: list[str] | str, init: str | None = None, output: str = "inspection") -> None:
    """Say which checkpoints can be averaged, by their weights alone.

    Args:
        checkpoints: Checkpoint files, run folders, patterns (``runs/*/checkpoints/*.ckpt``) or
            ``wandb:entity/project/artifact:version``.
        init: The weights that all started from, if they are there still: tells the angles between the updates.
        output: Folder of ``inspection.json`` and of the picture.
    """
    from lightning_soup.landscape.inspection import inspect_weights
    from lightning_soup.runs.inspection_report import inspection_table, write_inspection

    folder = user_path(output)
    check_writable(folder / "inspection.json")
    found = gather_ingredients(checkpoints)
    start = None if init is None else open_checkpoint(init)
    seen = inspect_weights(
        [item.weights for item in found], start, labels=[item.name for item in found], progress=rich_progress
    )
    write_inspection(folder, seen)
    console = Console()
    console.print(inspection_table(seen))
    for line in seen.verdict():
        console.print(plain(line))
    console.print(f"Written to {plain(folder)}")


def recook(file: str, output: str | None = None) -> Path:
    """Cook a soup again from its provenance, and check that it is the same.

    Args:
        file: A soup that lightning_soup saved.
        output: Where to write it; beside the original, as NAME.recooked.SUFFIX, by default.
    """
    path = cook_again(file, output, rich_progress)
    Console().print(f"Saved: {plain(path)}")
    return path


def show(file: str, tensors: bool = False) -> None:
    """Show what a checkpoint or soup holds: format, tensors, parameters, provenance, coefficients.

    Args:
        file: What lightning_soup can open: a file, a folder, or an artifact reference.
        tensors: List every tensor with its type and shape.
    """
    opened = open_checkpoint(file)
    record = opened.provenance
    console = Console()
    console.print(_summary(opened))
    if record is not None:
        _show_provenance(record, console)
    if tensors:
        table = Table("tensor", "type and shape", box=None)
        for name, spec in opened.specs.items():
            table.add_row(plain(name), plain(spec))
        console.print(table)


def _summary(opened: "WeightsFile") -> Table:
    kinds: dict[str, int] = {}
    for spec in opened.specs.values():
        kind = str(spec.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + spec.nbytes
    table = Table.grid(padding=(0, 2))
    for name, value in {
        "file": str(opened.path),
        "format": opened.format + (f", weights under {opened.key!r}" if opened.key else ""),
        "tensors": f"{len(opened)}" + (f", {len(opened.ties)} groups tied" if opened.ties else ""),
        "parameters": f"{opened.num_parameters:,}",
        "types": ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in kinds.items()),
        "digest": opened.digest(),
        **{key: str(value) for key, value in opened.metadata.items() if isinstance(value, (int, float))},
        "hyperparameters": ", ".join(f"{k}={_short(v)}" for k, v in opened.mapping_beside("hyper_parameters").items()),
        "experts": _experts(opened),
        "not opened": ", ".join(_grouped(opened.dropped)),
    }.items():
        if value:
            table.add_row(f"[bold]{plain(name)}", plain(value))
    return table


def _experts(opened: "WeightsFile") -> str:
    """How many experts the training had, and whether the file holds them."""
    record = opened.mapping_beside(EXPERTS_KEY)
    if not record:
        return ""
    count, layers = record.get("num_experts"), record.get("layers")
    held = "kept for resuming (which='raw' opens them)" if opened.mapping_beside("callbacks") else "while training"
    number = len(layers) if isinstance(layers, list) else "?"
    return f"{count} in each of {number} layers, {held}; described here is the plain model"


def _grouped(names: Sequence[str]) -> list[str]:
    """Names for reading: where many stand under one entry, only how many."""
    under: dict[str, list[str]] = {}
    for name in names:
        under.setdefault(name.partition(".")[0], []).append(name)
    parts = ([f"{entry} ({len(found)} entries)"] if len(found) > _LISTED else found for entry, found in under.items())
    return [name for part in parts for name in part]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _show_provenance(record: dict[str, Any], console: Console) -> None:
    if "ingredients" not in record:  # not written by Soup.save
        console.print(f"\n[bold]provenance[/] {plain(_short(record))}")
        return
    score = ""
    if record.get("score") is not None:
        score = f", {record['metric']} {-record['score'] if record['mode'] == 'min' else record['score']:.4f}"
    console.print(f"\n[bold]cooked by[/] {plain(record['recipe'])}{plain(score)}")
    coefficients = record["shares"]
    if isinstance(record["coefficients"], dict):
        console.print("the coefficients differ between tensors; their mean:")
    longest = max(abs(c) for c in coefficients) or 1.0
    table = Table("ingredient", "coefficient", "", "metrics", "digest", box=None)
    for item, c in zip(record["ingredients"], coefficients, strict=True):
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in item["metrics"].items())
        bar = f"[{'red' if c < 0 else 'cyan'}]{'█' * round(30 * abs(c) / longest)}"
        table.add_row(
            plain(item["label"]), f"{c:.4f}", bar, plain(metrics), item["digest"].removeprefix("xxh3-128:")[:12]
        )
    console.print(table)
    tried = [trial for trial in record["history"] if trial["reason"]]
    for trial in tried:
        mark = {True: "+", False: "-", None: " "}[trial["kept"]]
        console.print(f"  {mark} {plain(trial['label'])}: {plain(trial['reason'])}", highlight=False)
    for note in record["notes"]:
        console.print(f"[yellow]note[/] {plain(note)}")
