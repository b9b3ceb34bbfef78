"""The command itself: exit codes, one clear message, no traceback, nothing half-written."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import lightning_soup
from lightning_soup.cli.main import main
from lightning_soup.errors import LightningSoupError
from lightning_soup.recipes import UniformSoup
from lightning_soup.weights import open_checkpoint, save_weights


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = torch.randn(16, 16)
    for i in range(3):
        weights = {"a.weight": start + 0.1 * torch.randn(16, 16), "b.weight": start.T + 0.1 * torch.randn(16, 16)}
        save_weights(weights, tmp_path / f"run-{i}.pt")
    return tmp_path


def run(*arguments):
    """Exit status, standard output and standard error are what a user sees."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def test_soup_from_files(files, capsys):
    main(["soup", "--ingredients", "run-*.pt", "--output", "soup.safetensors"])
    weights = [open_checkpoint(f"run-{i}.pt") for i in range(3)]
    assert torch.equal(
        open_checkpoint("soup.safetensors")["a.weight"], UniformSoup().cook(weights).weights()["a.weight"]
    )
    assert "run-2" in capsys.readouterr().out


def test_a_second_run_does_not_take_the_soup_for_an_ingredient(files):
    for _ in range(2):
        main(["soup", "--ingredients", "*.pt", "--output", "all.pt"])
        labels = [item["label"] for item in open_checkpoint("all.pt").provenance["ingredients"]]
        assert labels == ["run-0", "run-1", "run-2"]


@pytest.mark.parametrize("ingredients", [["run-*.pt"], ["run-0.pt", "run-1.pt"]], ids=["pattern", "named"])
def test_an_ingredient_is_never_overwritten(files, capsys, ingredients):
    before = (files / "run-1.pt").read_bytes()
    assert run("soup", "--ingredients", *ingredients, "--output", "run-1.pt") == 1
    assert "run-1.pt: is one of the ingredients" in capsys.readouterr().err
    main(["soup", "--ingredients", "run-*.pt", "--output", "soup.safetensors"])
    assert run("recook", "soup.safetensors", "--output", "./run-1.pt") == 1
    assert run("recook", "soup.safetensors", "--output", "soup.safetensors") == 1
    assert (files / "run-1.pt").read_bytes() == before


def test_a_pattern_that_the_shell_expanded(files):
    main(["soup", "--ingredients", "run-0.pt", "run-1.pt", "--output", "soup.pt"])
    assert len(open_checkpoint("soup.pt").provenance["ingredients"]) == 2


def test_options_of_the_recipe(files):
    main(["soup", "--recipe", "lightning_soup.recipes.UniformSoup", "--recipe.weights", "[2, 1, 1]",
          "--ingredients", "run-*.pt", "--output", "soup.pt"])  # fmt: skip
    assert open_checkpoint("soup.pt").provenance["coefficients"] == [0.5, 0.25, 0.25]


def test_show_and_recook(files, capsys):
    main(["soup", "--ingredients", "run-*.pt", "--output", "soup.safetensors"])
    main(["show", "soup.safetensors", "--tensors", "true"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("UniformSoup", "run-1", "0.3333", "a.weight", "512", "█"))
    main(["recook", "soup.safetensors"])
    assert (files / "soup.recooked.safetensors").read_bytes() == (files / "soup.safetensors").read_bytes()


def broken_files(folder):
    weights = {name: value.clone() for name, value in open_checkpoint(folder / "run-1.pt").items()}
    weights["a.weight"][3, 3] = float("nan")
    save_weights(weights, folder / "nan.pt")
    save_weights({"a.weight": torch.ones(16, 8), "b.weight": torch.ones(16, 16)}, folder / "shape.pt")
    save_weights({"c.weight": torch.ones(16, 16)}, folder / "keys.pt")
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "text.ckpt").write_text("these are my notes")
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>Please log in</html>")
    (folder / "cut.pt").write_bytes((folder / "run-0.pt").read_bytes()[:700])
    (folder / "bare").mkdir()


@pytest.mark.parametrize(
    ("ingredient", "message"),
    [
        ("gone.ckpt", "no such file"),
        ("gone-*.ckpt", "matches no file"),
        ("empty.ckpt", "empty"),
        ("text.ckpt", "not a checkpoint"),
        ("page.safetensors", "web page"),
        ("cut.pt", "truncated"),
        ("bare", "folder without weights"),
        ("nan.pt", "NaN"),
        ("shape.pt", "a.weight: float32"),
        ("keys.pt", "no tensor in common"),
    ],
)
def test_bad_ingredients(files, capsys, ingredient, message):
    broken_files(files)
    before = sorted(path.name for path in files.iterdir())
    assert run("soup", "--ingredients", "run-0.pt", ingredient, "--output", "out/soup.safetensors") == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("lightning-soup: ")
    assert "Traceback" not in shown
    assert [path.name for path in files.rglob("*") if "soup" in path.name] == []
    assert sorted(path.name for path in files.iterdir() if path.name != "out") == before


def test_one_ingredient_and_recipes_that_need_a_model(files, capsys):
    assert run("soup", "--ingredients", "run-0.pt") == 1
    assert "at least two ingredients, got one (run-0.pt)" in capsys.readouterr().err
    assert run("soup", "--ingredients", "run-*.pt", "--recipe", "GreedySoup") == 1
    assert "needs an evaluator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["MetricsWeightedSoup", "--recipe.penalty", "2"],
            "penalty=2.0, scheme='linear': expected a number in [0, 1].",
        ),
        (["MetricsWeightedSoup", "--recipe.merge", "dense"], "merge='dense' needs base"),
        (
            ["InterpolatedSoup", "--recipe.soup", "MetricsWeightedSoup", "--recipe.soup.window", "0"],
            "window=0, stride=1",
        ),
    ],
)
def test_recipes_with_options_out_of_range(files, capsys, options, message):
    assert run("soup", "--ingredients", "run-*.pt", "--recipe", *options) == 1
    assert capsys.readouterr().err.startswith(f"lightning-soup: {message}")


def test_an_output_that_cannot_be_written(files, capsys):
    (files / "taken").write_text("")
    assert run("soup", "--ingredients", "run-*.pt", "--output", "taken/soup.safetensors") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_debug_shows_the_traceback(files):
    with pytest.raises(LightningSoupError):
        main(["soup", "--ingredients", "gone.ckpt", "--debug"])


def test_ctrl_c(files, capsys, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupted)
    assert run("soup", "--ingredients", "run-*.pt") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not [path for path in files.iterdir() if "soup" in path.name]


@pytest.mark.parametrize("arguments", [["soop"], ["soup", "--ingrdients", "x"], ["show"], ["show", "--nope"]])
def test_wrong_options_exit_with_2(files, arguments):
    assert run(*arguments) == 2


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments, capsys):
    main(arguments)
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("soup", "sweep", "show", "recook", "demo", "fit"))


def loaded_modules(*code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "; ".join(
        [*code, "import sys", "print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return set(done.stdout.split("\n")[-2].split())


HEAVY = {
    "lightning",
    "pytorch_lightning",
    "timm",
    "open_clip",
    "wandb",
    "peft",
    "transformers",
    "matplotlib",
    "torchvision",
}


def test_importing_the_package_is_light():
    assert not loaded_modules("import lightning_soup") & (HEAVY | {"torch"})


def test_file_commands_do_not_import_lightning(files):
    commands = (["soup", "--ingredients", "run-*.pt", "--output", "s.pt"], ["show", "s.pt"], ["recook", "s.pt"])
    code = [f"main({command!r})" for command in commands]
    assert not loaded_modules("from lightning_soup.cli.main import main", *code) & HEAVY


def test_help_imports_nothing_heavy():
    code = "from lightning_soup.cli.main import main", "main(['--help'])"
    assert not loaded_modules(*code) & (HEAVY | {"torch", "jsonargparse"})


def test_termination_is_no_success(files, monkeypatch):
    class SIGTERMException(SystemExit):
        """As Lightning raises it: without a status."""

    def terminated(*_args):
        raise SIGTERMException

    monkeypatch.setattr("lightning_soup.cli.main._run", terminated)
    assert run("soup", "--ingredients", "run-*.pt") == 143


def test_names_in_any_script(files):
    os.rename("run-0.pt", "lauf-ä-😀.pt")
    main(["soup", "--ingredients", "lauf-ä-😀.pt", "run-1.pt", "--output", "soup.pt"])
    assert "lauf-ä-😀" in {item["label"] for item in open_checkpoint("soup.pt").provenance["ingredients"]}


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-soup {lightning_soup.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--ingredients", "run-0.pt", "--output", "soup.pt", "--ingredients", "run-1.pt", "run-2.pt"],
        ["--ingredients=run-0.pt", "--ingredients=[run-1.pt, run-2.pt]", "--output=soup.pt"],
        ["--ingredients", '["run-0.pt", "run-1.pt"]', "--ingredients=run-2.pt", "--output", "soup.pt"],
    ],
)
def test_ingredients_given_several_times_add_up(files, words):
    main(["soup", *words])
    labels = [item["label"] for item in open_checkpoint("soup.pt").provenance["ingredients"]]
    assert labels == ["run-0", "run-1", "run-2"]


def test_a_short_option_ends_the_list_of_ingredients(files, capsys):
    assert run("soup", "--ingredients", "run-0.pt", "run-1.pt", "-c", "gone.yaml") == 2
    assert "gone.yaml" in capsys.readouterr().err


def test_switches(files, capsys):
    for words in (["--tensors"], ["--tensors", "true"], ["--tensors=true"]):
        main(["show", "run-0.pt", *words])
        assert "a.weight" in capsys.readouterr().out
    main(["show", "--tensors", "run-0.pt"])
    assert "a.weight" in capsys.readouterr().out
    main(["show", "run-0.pt", "--tensors", "false"])
    assert "a.weight" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf_8(files, capsys):
    name = os.fsdecode(b"run-\xff.pt")
    os.rename("run-0.pt", name)
    main(["soup", "--ingredients", name, "run-1.pt", "--output", "soup.pt"])
    main(["show", name])
    main(["show", "soup.pt"])
    assert "run-\\udcff" in capsys.readouterr().out


def test_a_damaged_record(files, capsys):
    main(["soup", "--ingredients", "run-*.pt", "--output", "soup.pt"])
    record = open_checkpoint("soup.pt").provenance
    del record["shares"]
    save_weights(dict(open_checkpoint("soup.pt")), "soup.pt", provenance=record)
    for command in ("show", "recook"):
        assert run(command, "soup.pt") == 1
        assert "soup.pt: its provenance is damaged: 'shares' is missing" in capsys.readouterr().err
    save_weights({"w": torch.ones(2)}, "own.pt", provenance={"made by": "me"})
    main(["show", "own.pt"])
    assert "'made by': 'me'" in capsys.readouterr().out


def test_control_characters_and_hyperparameters_without_end(files, capsys):
    laughs = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    content = {"pytorch-lightning_version": "2.4.0", "state_dict": {"w\x1b[2J": torch.ones(2)}}
    torch.save({**content, "hyper_parameters": {"laughs": laughs, "lr": 0.1}}, "a.ckpt")
    main(["show", "a.ckpt", "--tensors"])
    shown = capsys.readouterr().out
    assert "lr=0.1" in shown
    assert "w\\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert len(shown) < 5000


def test_errors_of_the_system_are_one_line(files, capsys, monkeypatch):
    assert run("show", "x" * 300) == 1
    assert run("soup", "--ingredients", "x" * 300, "run-0.pt") == 1
    shown = capsys.readouterr().err
    assert shown.count("File name too long") == 2
    assert shown.count("\n") == 2

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied", "locked/run.json")

    monkeypatch.setattr("lightning_soup.recipes.ingredient._run_record", refuse)
    assert run("soup", "--ingredients", "run-*.pt") == 1
    assert capsys.readouterr().err == (
        "lightning-soup: locked/run.json: Permission denied. (--debug shows where this happened.)\n"
    )
    with pytest.raises(PermissionError):
        main(["soup", "--ingredients", "run-*.pt", "--debug"])


def test_a_checkpoint_to_validate_that_is_not_there(files, capsys):
    model, data = "tests.helpers.boring.TinyClassifier", "tests.helpers.boring.TinyData"
    words = ["--model", model, "--data", data, "--trainer.logger=false", "--trainer.accelerator=cpu"]
    assert run("validate", *words, "--ckpt_path", "nope.ckpt") == 1
    shown = capsys.readouterr().err
    assert "nope.ckpt" in shown
    assert "Traceback" not in shown


def test_notes_are_one_line(files, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["soup", "--ingredients", "run-0.pt", "run-1.pt", "--output", "once.pt"])
        main(["soup", "--ingredients", "once.pt", "run-2.pt", "--output", "twice.pt"])
    assert capsys.readouterr().err == (
        "lightning-soup: note: once is itself a soup (UniformSoup). Is it meant to be an ingredient?\n"
    )
