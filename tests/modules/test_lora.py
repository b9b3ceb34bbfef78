"""LoRA in the image classifier: what is trained, what files hold, and which options are refused."""

import math
import sys

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.errors import MissingExtra, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.modules import ImageClassifier
from lightning_soup.modules.lora import LoRA, config_in, peft_model_in
from lightning_soup.recipes import MetricsWeightedSoup, UniformSoup, recook
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.adapters import adapter_in, layers_of
from tests.helpers.adapters import updates
from tests.helpers.trainers import quiet_trainer
from tests.modules.test_classifier import TINY, Shapes

OPTIONS = LoRA(r=2, alpha=4, targets=["qkv", "fc1"])


def fitted(folder, seed=0, epochs=1):
    seed_everything(0, verbose=False)
    module = ImageClassifier(**TINY, lora=OPTIONS)
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=0)
    torch.manual_seed(seed)
    trainer.fit(module, datamodule=Shapes())
    trainer.save_checkpoint(folder / f"{seed}.ckpt")
    return module


def test_adapters_and_head_are_trained_and_nothing_else(tmp_path):
    seed_everything(0, verbose=False)
    before = {name: value.clone() for name, value in ImageClassifier(**TINY, lora=OPTIONS).state_dict().items()}
    module = fitted(tmp_path)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or ".modules_to_save." in name for name in changed)
    assert {name.partition("lora_")[0].split(".")[-2] for name in changed if "lora_" in name} == {"qkv", "fc1"}
    assert "model.base_model.model.head.modules_to_save.default.weight" in changed


def test_a_checkpoint_is_loaded_again_and_holds_plain_values(tmp_path):
    module = fitted(tmp_path)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "0.ckpt", weights_only=True)
    assert peft_model_in(again) is not None
    held = again.state_dict()
    assert all(torch.equal(held[name], value) for name, value in module.state_dict().items())


def test_the_merged_base_is_a_plain_classifier(tmp_path):
    modules = [fitted(tmp_path, seed) for seed in (0, 1)]
    files = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    recipe = MetricsWeightedSoup("step", merge="dense", base=str(files[0]))  # both have made as many steps
    soup = recipe.cook(files)
    plain = ImageClassifier.load_from_checkpoint(soup.save(tmp_path / "plain.ckpt"))
    assert peft_model_in(plain) is None
    merged = [module.model.merge_and_unload().state_dict() for module in modules]
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, (merged[0][name] + merged[1][name]) / 2, rtol=1e-5, atol=1e-6)


def test_adapters_are_taken_out_of_whole_checkpoints(tmp_path):
    files = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    fitted(tmp_path, 0), fitted(tmp_path, 1)
    path = MetricsWeightedSoup("step", merge="exact").cook(files).save(tmp_path / "merged")
    merged, parts = open_checkpoint(path), [adapter_in(open_checkpoint(file)) for file in files]
    for name, update in updates(merged).items():
        mean = (updates(parts[0])[name] + updates(parts[1])[name]) / 2
        torch.testing.assert_close(update, mean, rtol=1e-4, atol=1e-6)
    assert open_checkpoint(recook(path)).digest() == merged.digest()
    with pytest.raises(UnreadableCheckpoint, match="does not say how its adapter was configured"):
        adapter_in(open_checkpoint(dict(open_checkpoint(files[0]))))
    with pytest.raises(UnreadableCheckpoint, match="holds no adapter 'default'"):
        adapter_in(open_checkpoint({"fc.weight": torch.ones(2, 2)}))
    with pytest.raises(UnreadableCheckpoint, match="holds no adapter 'other'"):
        adapter_in(open_checkpoint(files[0]), name="other")


def test_whole_checkpoints_are_souped_with_their_adapters(tmp_path):
    fitted(tmp_path, 0), fitted(tmp_path, 1)
    soup = UniformSoup().cook([tmp_path / "0.ckpt", tmp_path / "1.ckpt"])
    path = soup.save(tmp_path / "soup.ckpt")
    ImageClassifier.load_from_checkpoint(path)
    assert {layer.rank for layer in layers_of(adapter_in(open_checkpoint(path))).values()} == {2}


def test_through_the_command_line(tmp_path):
    arguments = ["--model=ImageClassifier", "--model.lora={r: 3, alpha: 6, targets: [proj], rslora: true}"]
    arguments += [f"--model.{name}={value}" for name, value in TINY.items() if name != "model_args"]
    arguments += ["--trainer.logger=false", "--model.model_args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"]
    model = SoupCLI([*arguments, "--data=tests.modules.test_classifier.Shapes"], run=False).model
    config = config_in(model)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, True)
    assert config["modules_to_save"] == ["head"]


def test_options_that_have_no_meaning():
    ranges = ({"r": 0}, {"r": 2.5}, {"alpha": 0}, {"alpha": math.nan}, {"alpha": math.inf}, {"dropout": 1.0})
    for options in (*ranges, {"targets": "qkv"}, {"targets": []}, {"heads": "head"}):
        with pytest.raises(UnsupportedSetup, match="LoRA"):
            LoRA(**options)
    with pytest.raises(UnsupportedSetup, match=r"LoRA\(heads=\['fc'\]\): VisionTransformer has no layer 'fc'"):
        ImageClassifier(**TINY, lora=LoRA(heads=["fc"]))
    assert config_in(ImageClassifier(**TINY, lora=LoRA(heads=[])))["modules_to_save"] is None
    with pytest.raises(UnsupportedSetup, match=r"peft cannot adapt VisionTransformer with LoRA\(.*nothing"):
        ImageClassifier(**TINY, lora=LoRA(targets=["nothing"]))
    with pytest.raises(UnsupportedSetup, match=r"layer_decay=0\.9 is for training all layers"):
        ImageClassifier(**TINY, lora=OPTIONS, layer_decay=0.9)


def test_without_peft_the_command_that_brings_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r'pip install "lightning_soup\[llm\]"'):
        ImageClassifier(**TINY, lora=OPTIONS)
