"""configs/model_soup_clip.yaml and its sweep file, as their heads say to use them, on a tiny model and tiny folders."""

import json
from pathlib import Path

import yaml

from lightning_soup.cli.main import main
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.modules import CLIPClassifier
from lightning_soup.runs.sweep_file import read_sweep_file
from tests.helpers.clip import TINY_CLIP
from tests.helpers.images import write_folders

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG, SWEEP = CONFIGS / "model_soup_clip.yaml", CONFIGS / "model_soup_clip_sweep.yaml"
SMALLER = {
    "trainer": {
        "accelerator": "cpu", "max_epochs": 1, "precision": "32-true", "enable_progress_bar": False,
        "enable_model_summary": False, "logger": False,
    },
    "model": {
        "init_args": {
            "model_config": TINY_CLIP, "pretrained": None, "classnames": ["cat", "cow", "dog"], "templates": "simple",
            "warmup": 1,
        }
    },
    "data": {"init_args": {"root": "images", "img_size": 8, "num_workers": 0, "batch_size": 8, "val_fraction": 0.3}},
}  # fmt: skip


def newest(folder):
    return str(max(Path(folder).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


def test_probe_fine_tunes_and_soup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, part in enumerate(("train", "val")):
        write_folders(Path("images") / part, ["cat", "cow", "dog"], count=8, seed=seed)
    write_folders(Path("images") / "art", ["cat", "dog"], count=3)
    write_folders(Path("images") / "objects", ["animal", "cattle", "cup"], count=3)
    Path("objects.json").write_text(json.dumps({"animal": ["cat", "dog"], "cattle": "cow"}))
    shifted = {"shifted": {"a": "art", "o": "objects"}, "shifted_classes": {"a": "own", "o": "objects.json"}}
    smaller = {**SMALLER, "data": {"init_args": {**SMALLER["data"]["init_args"], **shifted}}}
    Path("smaller.yaml").write_text(yaml.safe_dump(smaller))
    both = ["--config", str(CONFIG), "--config", "smaller.yaml"]

    main(["fit", *both, "--model.train", "head", "--model.lr", "1.0e-3", "--trainer.default_root_dir", "probe"])
    probe = newest("probe")
    for number in (1, 2):
        start = ["--model.checkpoint_path", probe, f"--model.lr={number}e-4"]
        main(["fit", *both, *start, "--trainer.default_root_dir", f"sweep/{number}"])
    ends = [newest(f"sweep/{number}") for number in (1, 2)]
    beside = "[{class_path: UniformSoup}, {class_path: InterpolatedSoup}]"
    recipe = ["--recipe", "GreedySoup", "--init", probe, "--beside", beside, "--output", "soup.ckpt"]
    main(["soup", *both, "--ingredients", *ends, *recipe])

    assert "Report:" in capsys.readouterr().out
    report = json.loads(Path("soup_report/report.json").read_text())
    assert {row["label"] for row in report["rows"]} >= {"GreedySoup", "UniformSoup", "InterpolatedSoup"}
    assert report["test_sizes"] == {"test": 24, "a": 6, "o": 6}
    back = CLIPClassifier.load_from_checkpoint("soup.ckpt")
    assert back.classnames == ["cat", "cow", "dog"]


def test_settings_of_the_sweep_are_taken():
    settings = read_sweep_file(SWEEP).settings(seed=0)
    assert len(settings) == 71
    check_settings(CONFIG, SWEEP, settings[:3])
    assert all(1e-6 <= setting["model.lr"] <= 1e-4 for setting in settings)
    for option in ("model.mixup", "model.label_smoothing"):
        assert 20 <= sum(setting[option] > 0 for setting in settings) <= 44
