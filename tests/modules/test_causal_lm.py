"""Language models: the loss of transformers itself, means over tokens, files that need nothing else, and adapters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_soup.callbacks import ExponentialAverage, MetricsWeightedAveraging
from lightning_soup.cli.main import main
from lightning_soup.data.texts import TextDataModule
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.modules.causal_lm import CausalLM
from lightning_soup.modules.lora import LoRA
from lightning_soup.recipes import MetricsWeightedSoup, UniformSoup
from lightning_soup.weights import open_checkpoint
from tests.helpers.texts import LLAMA, sums, write_lines, write_model
from tests.helpers.trainers import quiet_trainer

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore:builtin type")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, and lines to learn."""
    found = write_model(tmp_path_factory.mktemp("text") / "model")
    write_lines(found.parent / "train.jsonl", sums(40))
    return found.parent


def data(folder, **options):
    return TextDataModule(str(folder / "train.jsonl"), str(folder / "model"), **{"batch_size": 6, **options})


def fit(module, folder, tmp_path, *callbacks, **options):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=[*callbacks], default_root_dir=tmp_path, **{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=data(folder))
    return trainer


def batch_of(folder):
    found = data(folder)
    found.setup("fit")
    return next(iter(found.val_dataloader()))


def test_the_loss_is_that_of_transformers(folder):
    module, batch = CausalLM(str(folder / "model")), batch_of(folder)
    expected = module.model(**batch).loss
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    torch.testing.assert_close(module.validation_step(batch), expected)
    torch.testing.assert_close(module.predict_step(batch), module.model(**batch).logits)
    assert module.validation_step(batch).requires_grad


def test_padding_changes_nothing(folder):
    module, batch = CausalLM(str(folder / "model")).eval(), batch_of(folder)
    wide = {
        name: torch.nn.functional.pad(value, (0, 5), value={"labels": -100}.get(name, 0))
        for name, value in batch.items()
    }
    torch.testing.assert_close(module.validation_step(wide), module.validation_step(batch))
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert module.validation_step(nothing).item() == 0


def test_validation_is_the_mean_over_all_tokens(folder, tmp_path):
    write_lines(tmp_path / "val.jsonl", [*sums(5), {"text": "a much longer text than those"}, {"text": "b"}])
    module = CausalLM(str(folder / "model"))
    found = {}
    for size in (1, 2, 7):
        held_out = data(folder, val=str(tmp_path / "val.jsonl"), batch_size=size)
        found[size] = quiet_trainer().validate(module, held_out, verbose=False)[0]["val_loss"]
    assert found[1] == pytest.approx(found[7], rel=1e-5)
    assert found[2] == pytest.approx(found[7], rel=1e-5)


def test_it_learns(folder, tmp_path):
    module = CausalLM(str(folder / "model"), lr=1e-2)
    before = module.validation_step(batch_of(folder)).item()
    trainer = fit(module, folder, tmp_path, max_epochs=8)
    assert module.validation_step(batch_of(folder)).item() < 0.6 * before
    assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LoRA(r=2, targets=["q_proj", "v_proj"])])
def test_a_checkpoint_needs_nothing_but_its_file(folder, tmp_path, lora):
    module = CausalLM(str(folder / "model"), lora=lora, lr=1e-2)
    fit(module, folder, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert str(folder) not in str(content["hyper_parameters"]["model_name"])
    code = (
        f"import torch; from lightning_soup.modules import CausalLM; m = CausalLM.load_from_checkpoint("
        f"{str(tmp_path / 'a.ckpt')!r}).eval(); torch.save(m(torch.arange(5)[None]), {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = module.eval()(torch.arange(5)[None])
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


@pytest.mark.parametrize("lora", [None, LoRA(r=2, targets=["q_proj", "v_proj"])])
def test_a_checkpoint_generates_as_its_model_did(folder, tmp_path, lora):
    module = CausalLM(str(folder / "model"))
    module.model.generation_config.update(eos_token_id=[2, 5], max_new_tokens=7)
    module.model.save_pretrained(tmp_path / "model")
    fit(CausalLM(str(tmp_path / "model"), lora=lora), folder, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="hold the same weights"):
        UniformSoup().cook([tmp_path / "a.ckpt"] * 2).save(tmp_path / "soup.ckpt")
    for name in ("a.ckpt", "soup.ckpt"):
        again = CausalLM.load_from_checkpoint(tmp_path / name)
        found = again.model.generation_config
        assert (found.eos_token_id, found.max_new_tokens) == ([2, 5], 7)
        assert again.model.generate(torch.ones(1, 1, dtype=torch.long)).shape[1] <= 8


def test_a_new_model_and_its_soup(folder, tmp_path):
    files = []
    for seed in range(2):
        torch.manual_seed(3)
        module = CausalLM(model_config=LLAMA, lr=1e-3)
        seed_everything(seed, verbose=False)
        trainer = quiet_trainer(max_epochs=1, callbacks=[ExponentialAverage(0.5)], default_root_dir=tmp_path)
        trainer.fit(module, datamodule=data(folder, seed=0))
        files.append(tmp_path / f"{seed}.ckpt")
        trainer.save_checkpoint(files[-1])
    evaluator = ModuleEvaluator(CausalLM(model_config=LLAMA), data(folder), "val_loss")
    soup = UniformSoup().cook(files).rated(evaluator)
    assert soup.score is not None
    found = soup.weights()
    tied = [name for name in found if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert all(torch.equal(found[name], found[tied[0]]) for name in tied)


def test_adapters_are_kept_by_their_loss_over_tokens(folder, tmp_path):
    module = CausalLM(str(folder / "model"), lora=LoRA(r=2, targets=["q_proj", "v_proj"]), lr=1e-2)
    mwa = MetricsWeightedAveraging(3, MetricsWeightedSoup(window=2), weigh_by="tokens")
    fit(module, folder, tmp_path, mwa)
    adapter = open_checkpoint(mwa.soup_path)
    assert all("lora_" in name for name in adapter)
    code = (
        "import torch; from peft import AutoPeftModelForCausalLM as A, PeftModel; "
        "from transformers import AutoModelForCausalLM as M; "
        f"m = PeftModel.from_pretrained(M.from_pretrained({str(folder / 'model')!r}), {str(mwa.soup_path)!r}).eval(); "
        f"torch.save(m(torch.arange(5)[None]).logits, {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = module.eval()(torch.arange(5)[None])
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*bf16.*|The 'train_dataloader' does not|.*litlogger.*|.*tensorboardX.*")
def test_the_config_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(folder / "model")
    small = ["--data.train", str(folder / "train.jsonl"), "--data.tokenizer", model, "--data.batch_size", "4"]
    main(
        [
            *["fit", "--config", str(CONFIGS / "mwa_text.yaml"), "--model.model_name", model, *small],
            *[
                "--trainer.accelerator",
                "cpu",
                "--trainer.max_epochs",
                "25",
                "--trainer.log_every_n_steps",
                "1",
                "--trainer.enable_progress_bar",
                "false",
            ],
        ]
    )
    [merged] = tmp_path.glob("lightning_logs/version_0/**/mwa/mwa")
    assert len(list(merged.parent.glob("step=*"))) == 10
    assert open_checkpoint(merged).provenance["recipe"].startswith("MetricsWeightedSoup")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of them"),
        ({"model_name": "a", "model_config": LLAMA}, "expected one of them"),
        ({"model_config": {"model_type": "no-such-type"}}, "builds no causal language model"),
        ({"model_config": {"hidden_size": 3}}, "builds no causal language model"),
        ({"model_config": {"model_type": "vit"}}, "builds no causal language model"),
        ({"model_config": LLAMA, "lr": 0.0}, "lr=0.0: expected more than 0"),
        ({"model_config": LLAMA, "lora": LoRA(targets=["qkv"])}, "peft cannot adapt"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        CausalLM(**options)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UnsupportedSetup, match="is no causal language model that transformers can open"):
        CausalLM(str(tmp_path))
