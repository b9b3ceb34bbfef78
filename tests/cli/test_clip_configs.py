"""configs/model_soup_clip.yaml and its sweep file, as their heads say to use them, on a tiny model and tiny folders."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from lightning_soup.cli.main import main
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.modules import CLIPClassifier
from lightning_soup.runs.sweep_file import read_sweep_file
from tests.helpers.clip import TINY_CLIP
from tests.helpers.images import write_folders

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG, SWEEP = CONFIGS / "model_soup_clip.yaml", CONFIGS / "model_soup_clip_sweep.yaml"
COLOURS = ["blue", "green", "red", "white"]
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


def images_of(folder):
    """Images of a class, as CLIP's authors prepare them."""
    transform = open_clip.image_transform(8, is_train=False)
    return torch.stack([transform(Image.open(path)) for path in sorted(Path("images", folder).glob("*.png"))])


@torch.no_grad()
def computed_plainly(weights):
    """Accuracy on the three sets in %, and the mean over the two shifted ones, without any code of the package."""
    model = open_clip.CLIP(**TINY_CLIP).eval()
    model.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    sets = {  # folder -> its place among the competing classes, each of which covers training classes
        "test": ({"val/cat": 0, "val/cow": 1, "val/dog": 2}, [[0], [1], [2]]),
        "a": ({"art/cat": 0, "art/dog": 1}, [[0], [2]]),
        "o": ({"objects/animal": 0, "objects/cattle": 1}, [[0, 2], [1]]),
    }
    found = {}
    for name, (folders, competing) in sets.items():
        right = []
        for folder, target in folders.items():
            features = F.normalize(model.encode_image(images_of(folder)), dim=-1)
            logits = features @ weights["head.weight"].T + weights["head.bias"]
            best = torch.stack([logits[:, members].max(1).values for members in competing], 1).argmax(1)
            right += (best == target).tolist()
        found[name] = 100 * sum(right) / len(right)
    return found, (found["a"] + found["o"]) / 2


@pytest.mark.slow
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
    trained = [torch.load(end, weights_only=True)["state_dict"] for end in ends]
    start = torch.load(probe, weights_only=True)["state_dict"]
    expected = {
        "UniformSoup": {name: (trained[0][name] + trained[1][name]) / 2 for name in start},
        "GreedySoup": torch.load("soup.ckpt", weights_only=True)["state_dict"],
        Path(probe).name: start,
    }
    rows = {row["label"]: row for row in report["rows"]}
    for label, weights in expected.items():
        by_set, mean = computed_plainly(weights)
        assert {name: found["accuracy"] for name, found in rows[label]["tests"].items()} == pytest.approx(by_set)
        assert rows[label]["mean_shifted_accuracy"] == pytest.approx(mean)
    (first,) = (point for point in report["curve_points"] if point["alpha"] == 0)
    assert first["tests"] == rows[Path(probe).name]["tests"]  # WiSE-FT begins at the zero-shot or probed model, exactly
    back = CLIPClassifier.load_from_checkpoint("soup.ckpt")
    assert back.classnames == ["cat", "cow", "dog"]

    for seed, part in enumerate(("train", "val")):  # another data set, with another number of classes
        write_folders(Path("colours") / part, COLOURS, count=4, seed=seed)
    other = {"root": "colours", "shifted": None, "shifted_classes": None}
    Path("other.yaml").write_text(yaml.safe_dump({"data": {"init_args": other}}))
    words = ["--model.head", "text", "--model.classnames", "null"]
    for weights in ("soup.ckpt", ends[0]):
        main(["test", *both, "--config", "other.yaml", *words, "--model.checkpoint_path", weights])
        shown = capsys.readouterr().out
        model = CLIPClassifier.load_from_checkpoint(weights, head="text", classnames=COLOURS).eval()
        images = torch.cat([images_of(f"../colours/val/{name}") for name in COLOURS])
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == torch.arange(4).repeat_interleave(4)).double().mean().item()
        assert f" {accuracy} " in shown


def test_settings_of_the_sweep_are_taken():
    settings = read_sweep_file(SWEEP).settings(seed=0)
    assert len(settings) == 71
    check_settings(CONFIG, SWEEP, settings[:3])
    assert all(1e-6 <= setting["model.lr"] <= 1e-4 for setting in settings)
    for option in ("model.mixup", "model.label_smoothing"):
        assert 20 <= sum(setting[option] > 0 for setting in settings) <= 44
