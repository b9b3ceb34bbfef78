"""`lightning-soup sweep`: train one ingredient per setting of a W&B sweep file, then cook them if asked."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.cli.sweep_engine import choose_engine
from lightning_soup.cli.sweep_training import RunCLI, train_setting
from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.evaluator import direction
from lightning_soup.evaluation.own_loops import no_notices
from lightning_soup.progress import progress_lines, rich_progress
from lightning_soup.recipes.recipe import Recipe
from lightning_soup.runs.launched import launched, unlaunched
from lightning_soup.runs.sweep import SweepResult, run_sweep
from lightning_soup.runs.sweep_file import read_sweep_file, read_yaml
from lightning_soup.runs.sweep_replicas import run_on_ranks
from lightning_soup.runs.sweep_run import Run, canonical

__all__ = ["fingerprint", "sweep", "train_once", "train_setting"]

_LARGE = 1 << 30  # bytes; hashing as many takes about a second


def sweep(
    base: str,
    sweep_file: str,
    *,
    folder: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    metric: str | None = None,
    mode: Literal["max", "min"] | None = None,
    cook: Recipe | None = None,
    engine: Literal["local", "ray", "replicas"] = "local",
    address: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    retries: int = 0,
) -> SweepResult:
    """Train one ingredient per setting of a W&B sweep file, then cook them if asked.

    Each setting gets a folder, a Trainer, a logger and a seed of its own. Finished runs are not repeated when
    the command is given again; a run that fails does not stop the rest and is named at the end.

    The same file serves `wandb sweep` on a cluster, with
    `command: [lightning-soup, fit, --config, BASE.yaml, "${args}"]` in it. There, runs get seeds of their own
    only if `seed_everything` is one of the parameters.

    Args:
        base: Config that every run starts from; what `lightning-soup fit --config` takes.
        sweep_file: W&B sweep file with `method: grid` or `random`, `parameters` and `run_cap`.
        folder: Where the runs go; `runs/<name of the sweep>` by default.
        jobs: Trainings at a time. Above 1, each has its own process, a share of the cores, a log.txt, and where there
            are several GPUs one of them, unless trainer.devices names one.
        seed: Seed of a random search, and of the first run; each further run takes the next one.
        metric: Metric of the table at the end, and of the recipe; that of the sweep file by default, else val_acc.
        mode: Whether a high (max) or a low (min) value of the metric is good; the goal of the sweep file by default.
        cook: Recipe for a soup of the finished ingredients, written to soup.safetensors in the folder.
        engine: What trains: this machine; a Ray cluster; or replicas, the ranks that torchrun or srun started with this
            command, each of which trains one setting at a time. All machines must have the current folder and that of
            the runs under the same paths. The runs are the same, so that each goes on where another was interrupted.
        address: With engine ray, the cluster: auto, HOST:PORT or ray://HOST:PORT. By default one is started on this
            machine and stopped at the end.
        num_cpus: With engine ray, CPUs, and threads, of each training; 1 by default.
        num_gpus: With engine ray, GPUs of each training: 1, 0, or a part of one to be shared. By default 1 where the
            cluster has any and the config does not ask for a CPU.
        retries: How often a training is tried again whose process died; one that raised an error is not. With jobs
            above 1, or another engine.

    Returns:
        The runs with their settings, metrics and checkpoints; with engine replicas on all ranks, though only rank 0
        prints and cooks.

    Raises:
        UnsupportedSetup: The config, the sweep file or an option is wrong; found before any training starts.
        MissingExtra: Ray is asked for and not installed.
        LightningSoupError: No run finished, or the ranks have lost each other.
    """
    file = read_sweep_file(sweep_file)
    settings = file.settings(seed)
    if mode is None:
        told = file.metric is not None and metric in (None, file.metric)
        goal: Literal["max", "min"] = "min" if file.goal == "minimize" else "max"
        mode = goal if told else direction(metric or "val_acc")
    metric = metric or file.metric or "val_acc"
    configs = check_settings(Path(base), file.path, settings)
    trainer, mark = configs[0].trainer, partial(fingerprint, Path(base), settings)
    cluster = choose_engine(
        engine, jobs=jobs, address=address, num_cpus=num_cpus, num_gpus=num_gpus, configs=configs, same=mark
    )
    alone = engine == "local" and jobs == 1
    name = re.sub(r"[^\w.-]+", "-", file.name).strip(".-") or "sweep"
    options = {
        "seed": seed,
        "retries": retries,
        "fingerprint": mark(),
        "spread": not (isinstance(trainer.devices, list) or any("trainer.devices" in one for one in settings)),
        # With one job Lightning's own bar is on the screen, unless the config turns it off.
        "progress": progress_lines if alone and trainer.enable_progress_bar is not False else rich_progress,
    }
    train, to = partial(train_setting, base=base, group=name), Path("runs", name) if folder is None else Path(folder)

    def tell_and_cook(result: SweepResult) -> None:
        _print_table(result, metric, mode)
        for run in result.failed:
            print(f"failed: {run.folder} ({_text(run.setting)}): {run.error}", file=sys.stderr)
        if not result.finished:
            raise LightningSoupError(f"{result.folder}: none of the {len(result.runs)} runs finished.")
        if cook is not None:
            _cook(result, cook, base=base, group=name, metric=metric, mode=mode)

    if engine == "replicas":
        world = launched()
        with unlaunched(), no_notices():
            return run_on_ranks(world, settings, train, to, afterwards=tell_and_cook, **options)
    with no_notices():
        result = run_sweep(settings, train, to, jobs=jobs, engine=cluster, **options)
    tell_and_cook(result)
    return result


def train_once(base: Path, setting: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """Train one setting, or find it trained: a run of one setting is as resumable as a sweep.

    Returns:
        The checkpoint.

    Raises:
        LightningSoupError: The training failed.
    """
    train, mark = partial(train_setting, base=base), fingerprint(base, [setting])
    result = run_sweep([setting], train, folder, seed=seed, fingerprint=mark, progress=rich_progress)
    if result.failed:
        raise LightningSoupError(f"pre-training failed: {result.failed[0].error} (see {result.failed[0].folder})")
    return result.checkpoints[0]


def fingerprint(base: Path, settings: Sequence[Mapping[str, Any]] = (), without: str | None = None) -> str:
    """Hash a config by content: its values, and every file that it or a setting names.

    Comments and the order of keys do not count. New weights under an old `checkpoint_path` do. Of files too
    large to read each time, size and date stand for the content.

    Args:
        base: The config.
        settings: What is changed in it.
        without: A section that does not count.
    """
    config = dict(read_yaml(base, "config for `lightning-soup fit`"))
    config.pop(without, None)
    digest = hashlib.sha256(canonical(config).encode())
    for text in sorted({*_strings(config), *_strings([dict(setting) for setting in settings])}):
        path = next((p for p in (text, os.path.join(base.parent, text)) if os.path.isfile(p)), None)
        if path is None:
            continue
        about = os.stat(path)
        if about.st_size > _LARGE:
            digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            continue
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _cook(
    result: SweepResult, recipe: Recipe, *, base: str, group: str, metric: str, mode: Literal["max", "min"]
) -> None:
    """Cook with the model, data and trainer of the base config, as the first finished run had them."""
    first = result.finished[0]
    RunCLI(
        base,
        {"seed_everything": first.seed, **first.setting},
        result.folder,
        group,
        work=lambda trainer, model, datamodule: trainer.soup(
            model,
            datamodule,
            ingredients=[str(checkpoint) for checkpoint in result.checkpoints],
            recipe=recipe,
            output=str(result.folder / "soup.safetensors"),
            metric=metric,
            mode=mode,
        ),
    )


def _print_table(result: SweepResult, metric: str, mode: Literal["max", "min"]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name in result.runs[0].setting if len({repr(r.setting[name]) for r in result.runs}) > 1]
    scores = {run.index: run.metrics[metric] for run in result.finished if metric in run.metrics}
    best = (max if mode == "max" else min)(scores, key=scores.__getitem__, default=None)
    table = Table("run", *names, metric, title=f"{result.folder}: {len(result.finished)} ingredients")
    for run in result.runs:
        values = [_text(run.setting[name]) for name in names]
        table.add_row(run.folder.name, *values, _score(run, metric), style="bold" if run.index == best else None)
    Console().print(table)
    if result.finished and not scores:
        logged = sorted(set().union(*(run.metrics for run in result.finished)))
        print(f"No run logged {metric!r}; logged: {', '.join(logged) or 'nothing'}.", file=sys.stderr)


def _score(run: Run, metric: str) -> str:
    if run.error is not None:
        return "failed"
    return f"{run.metrics[metric]:.4g}" if metric in run.metrics else "-"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
