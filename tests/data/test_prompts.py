"""Prompts: padded on the left, without an end, of lines that need no completion."""

import pytest
import torch

from lightning_soup.data.prompts import PromptDataModule
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.texts import sums, write_lines, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def prompts(path, tokenizer, **options):
    found = PromptDataModule(str(path), tokenizer, **{"batch_size": 3, "val_fraction": 0.25, **options})
    found.setup("fit")
    return found


def test_padded_on_the_left_and_without_an_end(tmp_path, tokenizer):
    lines = [{"prompt": "1+1="}, {"prompt": "a"}, {"prompt": "12"}, {"prompt": "abc"}]
    data = prompts(write_lines(tmp_path / "p.jsonl", lines), tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask"}
    known = data.tokenizer
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist())  # zeros, then ones
        text = known.decode(row[mask.bool()]).replace(" ", "")
        assert text.removeprefix("<s>") in {line["prompt"] for line in lines}
        assert known.eos_token_id not in row[mask.bool()]
        assert row[-1] != known.bos_token_id


def test_completions_are_left_out_and_texts_are_prompts(tmp_path, tokenizer):
    both = prompts(write_lines(tmp_path / "both.jsonl", sums(8)), tokenizer)
    alone = prompts(write_lines(tmp_path / "alone.jsonl", [{"prompt": line["prompt"]} for line in sums(8)]), tokenizer)
    (tmp_path / "lines.txt").write_text("\n".join(line["prompt"] for line in sums(8)))
    texts = prompts(tmp_path / "lines.txt", tokenizer)
    assert both._examples == alone._examples == texts._examples


def test_the_end_of_a_long_prompt_is_kept(tmp_path, tokenizer):
    data = prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "abcdef"}] * 4), tokenizer, max_length=3)
    batch = next(iter(data.val_dataloader()))
    assert data.tokenizer.decode(batch["input_ids"][0]).replace(" ", "") == "def"


def test_tokenizers_that_end_every_text(tmp_path):
    from tokenizers import processors

    folder = write_tokenizer(tmp_path / "ends")
    from transformers import AutoTokenizer

    ending = AutoTokenizer.from_pretrained(folder)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ending.save_pretrained(folder)
    data = prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "ab"}] * 4), str(folder))
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"][0].tolist() == [1, 3, 4]


def test_bad_lines(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"completion": "b"}])
    with pytest.raises(UnsupportedSetup, match=r'p\.jsonl, line 2: expected \{"text": …\} or \{"prompt": …\}, found'):
        prompts(path, tokenizer)
    assert torch.is_tensor(next(iter(prompts(write_lines(path, sums(8)), tokenizer).train_dataloader()))["input_ids"])
