"""Soups of transformers' folders are folders again, which transformers loads, and TRL takes as a reference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_soup.cli.main import main
from lightning_soup.errors import UnwritableOutput
from lightning_soup.recipes import UniformSoup, gather_ingredients, recook
from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.model_folder import save_model_folder
from tests.helpers.texts import write_fine_tune, write_model

ROOT = Path(__file__).parents[2]
KINDS = {
    "llama, tied": {},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 2},
    "llama, bfloat16": {"tie_word_embeddings": False, "dtype": "bfloat16"},
}


@pytest.fixture(params=KINDS)
def folders(tmp_path, request):
    """Two models that are near each other."""
    first = write_model(tmp_path / "a", **KINDS[request.param])
    if "bfloat16" in request.param:
        narrow = {name: value.bfloat16() for name, value in load_file(first / "model.safetensors").items()}
        save_file(narrow, first / "model.safetensors", {"format": "pt"})
    second = write_fine_tune(tmp_path / "b", first, size=0.01)
    return [str(first), str(second)]


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_the_command_writes_a_folder_that_transformers_loads(folders, tmp_path):
    from transformers import AutoTokenizer

    main(["soup", "--ingredients", *folders, "--output", str(tmp_path / "soup")])
    a, b, soup = (loaded(folder) for folder in (*folders, tmp_path / "soup"))
    assert soup.config.to_dict() | {"_name_or_path": ""} == a.config.to_dict() | {"_name_or_path": ""}
    for (name, value), one, two in zip(soup.named_parameters(), a.parameters(), b.parameters(), strict=True):
        mean = (one.float() + two.float()) / 2
        torch.testing.assert_close(value, mean.to(value.dtype), msg=name)
    tied = a.lm_head.weight is a.get_input_embeddings().weight
    assert (soup.lm_head.weight is soup.get_input_embeddings().weight) == tied
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "soup").get_vocab()
        == AutoTokenizer.from_pretrained(folders[0]).get_vocab()
    )


def test_it_can_be_cooked_again_from_its_record(folders, tmp_path):
    soup = UniformSoup().cook(gather_ingredients(folders)).save(tmp_path / "soup")
    expected = open_checkpoint(soup).digest()
    again = recook(soup / "model.safetensors", tmp_path / "deep" / "er" / "again")
    assert open_checkpoint(again).digest() == expected
    assert (again / "config.json").read_text() == (soup / "config.json").read_text()
    file = recook(again, tmp_path / "file.safetensors")  # its record knows the way from where it lies
    assert open_checkpoint(file).digest() == expected


def test_shards_become_one_file(folders, tmp_path):
    sharded = tmp_path / "sharded"
    loaded(folders[0]).save_pretrained(sharded, max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    soup = UniformSoup().cook(gather_ingredients([str(sharded), folders[1]])).save(tmp_path / "soup")
    assert sorted(path.name for path in soup.glob("*.safetensors*")) == ["model.safetensors"]
    assert not list(soup.glob("*.index.json"))
    whole = UniformSoup().cook(gather_ingredients(folders)).save(tmp_path / "whole")
    assert open_checkpoint(soup).digest() == open_checkpoint(whole).digest()


def test_folders_that_hold_something_else_are_kept(folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    soup = UniformSoup().cook(gather_ingredients(folders))
    with pytest.raises(UnwritableOutput, match=r"holds other files \(thesis\.tex\)"):
        soup.save(tmp_path / "full")
    soup.save(tmp_path / "soup")
    soup.save(tmp_path / "soup")  # its own are replaced
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_without_a_configuration_are_no_folder(tmp_path):
    for number, name in enumerate("ab"):
        save_file({"w": torch.ones(2) + 0.01 * number}, tmp_path / f"{name}.safetensors")
    soup = UniformSoup().cook(gather_ingredients([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]))
    with pytest.raises(UnwritableOutput, match="unknown suffix"):
        soup.save(tmp_path / "soup")


def test_a_module_takes_files_that_hold_a_tied_tensor_once(folders):
    a, b, model = (loaded(folder) for folder in (*folders, folders[0]))
    combine(folders, [0.5, 0.5], out=model)
    for value, one, two in zip(model.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(value, ((one.float() + two.float()) / 2).to(value.dtype))


@pytest.mark.slow
def test_trl_takes_the_soup_as_its_reference():
    pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, "salsa_trl.py"], cwd=ROOT / "examples", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DPO from sft_1, held to the soup" in done.stdout
    assert "GRPO from sft_1, held to the soup" in done.stdout


def test_what_goes_with_the_weights(tmp_path):
    """All kinds of tokenizers, templates and code; neither other weights, nor what a training left."""
    folder = write_model(tmp_path / "a")
    for name in ("qwen.tiktoken", "vocab.bpe", "merges.txt", "spiece.model", "chat_template.jinja", "modeling_own.py"):
        (folder / name).write_text("of the model")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
    for name in ("training_args.bin", "model.safetensors.index.json.bak", "README.md"):
        (folder / name).write_text("of the training")
    opened = open_checkpoint(folder)
    saved = save_model_folder([opened], [1.0], tmp_path / "soup", model=opened)
    expected = {path.name for path in folder.iterdir() if path.suffix == ".safetensors" or path.suffix == ".json"}
    expected |= {path.name for path in folder.iterdir() if path.read_bytes() == b"of the model"}
    assert {path.name for path in saved.iterdir()} == expected - {"trainer_state.json"}
