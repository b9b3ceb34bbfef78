"""README does what it says: its Python is run, its commands are run or parsed, and what it names exists.

Where a new snippet presupposes something (a name, a file), add it to :func:`presupposed` or :func:`runs`.
"""

import ast
import importlib.util
import json
import re
import shlex
import shutil
from itertools import dropwhile
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_soup
from lightning_soup.callbacks import LiveAverage
from lightning_soup.cli.main import main
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.data.transforms import Preprocessing
from lightning_soup.runs.sweep_file import read_sweep_file
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.adapters import write_adapter
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run
from tests.helpers.texts import sums, write_fine_tune, write_lines, write_model, write_reward_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*was set to `tensorboard`", "ignore:Starting from v1.9.0", "ignore:.*looks back over"
)


def python_blocks():
    return [code for language, code in FENCES if language in ("python", "py")]


def commands():
    """The words of every shell command of this package, without comments and line breaks."""
    shell = "\n".join(code for language, code in FENCES if language in ("bash", "sh", "shell", "console", ""))
    parts = re.split(r"&&|;|\n", re.sub(r"\\\n", " ", shell))
    words = [shlex.split(part.strip().removeprefix("$ "), comments=True) for part in parts]
    words = [list(dropwhile(re.compile(r"[A-Z_]+=").match, found)) for found in words]  # without variables
    return [found[1:] for found in words if found[:1] == ["lightning-soup"]]


def presupposed():
    """What the text has before the first snippet: a module and data of the reader's own."""
    torch.manual_seed(0)
    return {"module": TinyClassifier(), "data": TinyData(), "images": TenClasses()}


class TenClasses(LightningDataModule):
    """Images of the reader's own."""

    preprocessing = Preprocessing(img_size=32)
    num_classes = 10

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(20, 3, 32, 32), torch.arange(20) % 10), 10)

    val_dataloader = train_dataloader


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with the reader's trained runs under the names that the text uses, and the configs of the repository."""
    for number, checkpoint in enumerate(tiny_run()[1]):
        for place in ("my_runs/{}/last.ckpt", "runs/soup/{}/checkpoints/last.ckpt"):
            path = tmp_path / place.format(number)
            path.parent.mkdir(parents=True)
            shutil.copy(checkpoint, path)
    for name, model in (("resnet", "resnet18"), ("mobilenet", "mobilenetv3_small_100")):
        path = tmp_path / f"runs/{name}/0/last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(timm.create_model(model, num_classes=10).state_dict(), path)
    for step in (40, 80):
        adapter = {"layer": (torch.ones(2, 4) + step / 1000, torch.full((3, 2), step / 100))}
        folder = write_adapter(tmp_path / f"runs/lora/checkpoint-{step}", adapter)
        state = {"global_step": step, "log_history": [{"step": step, "loss": 1 / step}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    write_fine_tune(tmp_path / "sft_2", write_model(tmp_path / "sft_1"), size=0.01)
    write_reward_model(tmp_path / "reward_model")
    write_lines(tmp_path / "prompts.jsonl", sums(20))
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for option in ("ACCELERATOR=cpu", "LOG_EVERY_N_STEPS=1", "ENABLE_PROGRESS_BAR=False", "ENABLE_MODEL_SUMMARY=False"):
        name, value = option.split("=")
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)  # which take no explicit argument's place
    return tmp_path


def test_every_fence_is_read():
    assert len(FENCES) == README.count("```") // 2 > 5
    assert len(python_blocks()) >= 3
    assert len(commands()) >= 6


def test_every_python_block_runs_in_order(runs):
    names = presupposed()
    trainers = []
    for number, code in enumerate(python_blocks(), start=1):
        exec(compile(code, f"README.md, Python block {number}", "exec"), names)
        trainers += [names["trainer"]] if names.get("trainer") not in trainers else []
    assert len(trainers) >= 2
    assert all(isinstance(trainer, Trainer) for trainer in trainers)
    soup, held = open_checkpoint(runs / "soup.safetensors"), names["module"].state_dict()
    assert all(torch.equal(value, held[name]) for name, value in soup.items())  # of the last block


def test_the_trainer_that_soups_leaves_the_soup_where_the_text_says(runs):
    names = presupposed()
    (code,) = [code for code in python_blocks() if " ModelSoup(" in code and "trail" not in code]
    exec(code, names)
    kept = names["kept"]
    assert isinstance(kept, ModelCheckpoint)
    soup = Path(kept.dirpath) / "soup.ckpt"
    assert len(list(soup.parent.glob("epoch=*.ckpt"))) == 5
    held = names["module"].state_dict()
    assert all(torch.equal(value, held[name]) for name, value in open_checkpoint(soup).items())


def test_the_trainer_that_averages_scores_and_keeps_the_average(runs):
    names = presupposed()
    for code in python_blocks():
        exec(code, names)
        if any(isinstance(callback, LiveAverage) for callback in getattr(names.get("trainer"), "callbacks", [])):
            break
    trainer, module = names["trainer"], TinyClassifier()
    trainer.fit(module, datamodule=names["data"])
    trainer.save_checkpoint(runs / "end.ckpt")
    average, live = (open_checkpoint(runs / "end.ckpt", which=which) for which in ("average", "raw"))
    assert all(torch.equal(average[name], value) for name, value in module.state_dict().items())
    assert not torch.equal(average["net.0.weight"], live["net.0.weight"])


def test_the_trainers_that_prune_do_what_the_text_says(runs):
    names = presupposed()
    (code,) = [code for code in python_blocks() if "SparsityMask(" in code]
    exec("from lightning.pytorch import Trainer\n", names)
    imported, *trainers = ast.parse(code).body
    for statement in trainers:
        exec(ast.unparse(ast.Module([imported, statement], [])), names)
        module = TinyClassifier()
        names["trainer"].fit(module, datamodule=names["data"])
        zeros = sum(int((parameter == 0).sum()) for parameter in module.parameters() if parameter.ndim > 1)
        assert zeros == round(0.9 * (8 * 16 + 16 * 3))


def test_the_commands_that_need_files_only_do_what_the_text_says(runs, capsys):
    done = []
    for words in commands():
        if (words[0] == "soup" and "--config" not in words) or words[0] in ("show", "recook"):
            main(words)
            done.append(words[0])
    assert done[:3] == ["soup", "show", "recook"]
    files = [open_checkpoint(path) for path in sorted(runs.glob("my_runs/*/last.ckpt"))]
    mean = combine(files, [1 / 3] * 3)
    assert all(torch.equal(value, mean[name]) for name, value in open_checkpoint(runs / "soup.ckpt").items())
    assert (runs / "soup.recooked.ckpt").read_bytes() == (runs / "soup.ckpt").read_bytes()
    assert "UniformSoup" in capsys.readouterr().out
    TinyClassifier.load_from_checkpoint(runs / "soup.ckpt")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_known_with_its_options_and_files(runs, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    for word in words:
        if word.endswith((".yaml", ".yml")):
            assert (ROOT / word).is_file()
    if words[0] == "sweep":
        base, file = (Path(word) for word in words[1:3])
        settings = read_sweep_file(file).settings(seed=0)
        check_settings(base, file, settings[:2])


def test_a_command_that_is_wrong_would_be_noticed(runs, capsys):
    for words in (["stir"], ["soup", "--config", "configs/none.yaml"], ["soup", "--spoon", "x"], ["demo", "--fast"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code not in (0, None)


def test_links_and_modules_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"python -m ([\w.]+)", README):
        assert importlib.util.find_spec(name), name


def test_classes_of_the_methods_are_public():
    rows = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("|")]
    column = next(cells for cells in rows if any(cell.strip() == "Class" for cell in cells)).index(" Class ")
    classes = [name for cells in rows[2:] for name in re.findall(r"`(\w+)`", cells[column])]
    assert len(classes) >= 9
    for name in classes:
        assert isinstance(getattr(lightning_soup, name), type), name


def test_the_trainer_that_searches_cooks_its_trail(runs):
    names = {**presupposed(), "Trainer": Trainer}  # which an earlier block imports
    (code,) = [code for code in python_blocks() if "CheckpointTrail" in code]
    exec(code.replace("budget=400", "budget=20").replace("every=20, keep=24", "every=5, keep=10"), names)
    names["trainer"].fit(names["module"], datamodule=names["data"])
    assert len(names["trail"].files) == 10
    assert len(names["soup"].soup.history) == 20
