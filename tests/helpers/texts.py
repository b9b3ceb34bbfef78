"""A tiny language model of transformers with its tokenizer, and files of texts, made without a network."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+= .?"


def write_tokenizer(folder: Path, **special: str) -> Path:
    """One token a character, after ``<unk>``, ``<s>`` and ``</s>``; texts begin with the second."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A folder of transformers with a model and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, **config})).save_pretrained(folder)
    return write_tokenizer(folder)


def write_fine_tune(folder: Path, of: Path, seed: int = 1, size: float = 0.05) -> Path:
    """A copy of a model's folder with weights that have moved a little."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(of, folder)
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: (value + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for name, value in load_file(of / "model.safetensors").items()
    }
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_reward_model(folder: Path, **config: Any) -> Path:
    """A sequence classifier with one output."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = {"num_labels": 1, "pad_token_id": 2, **config}
    AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**LLAMA, **config)).save_pretrained(folder)
    return folder


def write_lines(path: Path, examples: Sequence[Mapping[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    """``3+4=`` and what follows."""
    return [{"prompt": f"{i % 7}+{i % 5}=", "completion": str(i % 7 + i % 5)} for i in range(count)]
