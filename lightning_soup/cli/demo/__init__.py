"""``lightning-soup demo``: the main job on real data, through the same commands that users have."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_soup.cli.sweep import sweep, train_once
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.cli.sweep_training import RunCLI
from lightning_soup.errors import LightningSoupError, UnwritableOutput
from lightning_soup.evaluation.own_loops import no_notices
from lightning_soup.recipes import GreedySoup, InterpolatedSoup, LearnedSoup, Soup, UniformSoup
from lightning_soup.runs.sweep import check_numbers
from lightning_soup.runs.sweep_file import read_sweep_file
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.save import check_output

_CONFIGS = Path(__file__).parent


def demo(
    folder: str = "soup_demo",
    seed: int = 0,
    jobs: int = 1,
    labels: int = 200,
    start: str | None = None,
    sweep_file: str | None = None,
) -> Path:
    """Pre-train a small ViT, fine-tune eight ingredients, cook four soups, and report what they gain.

    Everything lies in the folder afterwards: the configs (edit them and run them with lightning-soup fit, sweep and
    soup), the checkpoints, soup.safetensors and soup_report/report.html. A second run goes on where the first ended.

    Args:
        folder: Where everything is written.
        seed: Seed of the data split, of pre-training and of the sweep.
        jobs: Fine-tunings at a time.
        labels: Labelled images to fine-tune on. With 600 instead of 200 the gain on the main test set goes away.
        start: Fine-tune this checkpoint instead of pre-training one.
        sweep_file: Vary the fine-tuning by this sweep file instead of the demo's own.

    Returns:
        The report.

    Raises:
        LightningSoupError: A number, file or folder that cannot be used; found before anything is trained.
    """
    # So small a model gains nothing from a second thread, and on a busy machine its threads wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with no_notices(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return _demo(Path(folder), seed, jobs, labels, start, sweep_file)
    finally:
        torch.set_num_threads(threads)


def _demo(home: Path, seed: int, jobs: int, labels: int, start: str | None, sweep_file: str | None) -> Path:
    varied = read_sweep_file(sweep_file or _CONFIGS / "sweep.yaml")
    settings = varied.settings(seed)
    check_numbers(jobs, seed, len(settings))
    check_output(home / "soup.safetensors")
    first = None if start is None else open_checkpoint(start).path
    pretrained = home / "pretrained.ckpt"
    try:
        configs = _write_configs(home, seed, labels, varied.path)
        base = configs / "finetune.yaml"
        check_settings(base, varied.path, settings)
        _build(configs / "pretrain.yaml", home)
        _build(base, home, first)
        _copy_if_changed(first or train_once(configs / "pretrain.yaml", {}, home / "pretrain", seed), pretrained)
    except OSError as error:
        raise UnwritableOutput(f"{home}: cannot be used ({error}). Give another --folder.") from error
    result = sweep(str(base), str(configs / "sweep.yaml"), folder=str(home / "ingredients"), jobs=jobs, seed=seed)
    if result.failed:
        raise LightningSoupError(f"{len(result.failed)} of {len(result.runs)} fine-tunings failed; run the demo again.")
    cook(base, [str(path) for path in result.checkpoints], pretrained, home / "soup.safetensors")
    return home / "soup_report" / "report.html"


def cook(config: Path, ingredients: list[str], init: Path, output: Path) -> Soup:
    """Cook the four soups with the model and the data of a config, and write the report beside ``output``."""
    soups: list[Soup] = []

    def work(trainer: Any, model: Any, datamodule: Any) -> None:
        soups.append(
            trainer.soup(
                model,
                datamodule,
                ingredients=ingredients,
                recipe=UniformSoup(),
                beside=[GreedySoup(), LearnedSoup(), InterpolatedSoup()],
                init=str(init),
                output=str(output),
            )
        )

    RunCLI(config, {}, output.parent, "", work=work)
    return soups[0]


def _build(config: Path, home: Path, start: Path | None = None) -> None:
    """Build the model and read the data of a config, so that what cannot be is found at once."""
    setting = {"model.checkpoint_path": None if start is None else str(start)}
    RunCLI(config, setting, home, "", work=lambda trainer, model, data: data.setup())


def _write_configs(home: Path, seed: int, labels: int, sweep_file: Path) -> Path:
    """Copy the three configs, with the seed and the paths of this run in them."""
    target = home / "configs"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("pretrain.yaml", "finetune.yaml"):
        config = yaml.safe_load((_CONFIGS / name).read_text())
        config["seed_everything"] = seed
        config["data"]["init_args"]["seed"] = seed
        if name == "finetune.yaml":
            config["model"]["init_args"]["checkpoint_path"] = str(home / "pretrained.ckpt")
            config["data"]["init_args"]["train_size"] = labels
        (target / name).write_text(yaml.safe_dump(config, sort_keys=False))
    _copy_if_changed(sweep_file, target / "sweep.yaml")
    return target


def _copy_if_changed(source: Path, target: Path) -> None:
    """The ingredients' runs are repeated only when the start's bytes change."""
    if not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)
