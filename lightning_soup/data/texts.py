"""TextDataModule: texts, or prompts and what is to follow them, from files of lines."""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_soup.data.vision import random_parts
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra

__all__ = ["TextDataModule"]

_IGNORED = -100  # the target that torch's and transformers' losses leave out
_HALF = re.compile("[\ud800-\udfff]")  # JSON can name one, but it has no encoding
Example = tuple[list[int], list[int]]  # tokens, and what is learned of them


class TextDataModule(LightningDataModule):
    """Texts for a causal language model, tokenized once by transformers.

    Files are JSON lines, ``{"text": …}`` or ``{"prompt": …, "completion": …}``, or end in ``.txt`` and hold one text
    per line. Of a prompt nothing is learned. After each text comes the tokenizer's end token, so that a model learns to
    stop. Batches are mappings ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]``, padded on the right to their
    longest text.

    Args:
        train: File of the training texts.
        tokenizer: A folder of transformers, or a name on the Hugging Face hub (downloaded once).
        val: File of the validation texts; None: a share of the training texts is held out.
        test: File of the test texts; None: there are none.
        max_length: Tokens at most; longer texts are cut. Texts of which nothing is left to learn are left out, with a
            warning.
        val_fraction: The share that is held out without ``val``.
        seed: Of that share.
        batch_size: Texts in a batch.
        num_workers: Processes that make batches.

    Raises:
        UnsupportedSetup: A value is out of range; in ``setup``: a file is missing, empty or has lines of another form,
            or transformers finds no tokenizer.
        MissingExtra: transformers is not installed.
    """

    needs_completion: ClassVar[bool] = True

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        test: str | None = None,
        max_length: int = 512,
        val_fraction: float = 0.1,
        seed: int = 0,
        batch_size: int = 8,
        num_workers: int = 0,
    ):
        super().__init__()
        if not 0 < val_fraction < 1:
            raise UnsupportedSetup(f"val_fraction={val_fraction}: expected a fraction between 0 and 1.")
        if batch_size < 1 or num_workers < 0 or max_length < 2:
            raise UnsupportedSetup(
                f"batch_size={batch_size}, num_workers={num_workers}, max_length={max_length}: expected "
                "batch_size ≥ 1, num_workers ≥ 0 and max_length ≥ 2."
            )
        self.files = {"train": train, "val": val, "test": test}
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self.val_fraction, self.seed = val_fraction, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self._tokenizer: Any = None
        self._examples: dict[str, list[Example]] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        if self._tokenizer is None:
            transformers = import_extra("transformers", "llm")
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_name)
            except (OSError, ValueError, KeyError) as error:
                raise UnsupportedSetup(
                    f"tokenizer={self.tokenizer_name!r}: transformers finds no tokenizer there "
                    f"({str(error).strip().partition(chr(10))[0][:300]})."
                ) from error
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the files that the stage needs, once."""
        if stage in (None, "fit", "validate") and "train" not in self._examples:
            found = self._read("train")
            if self.files["val"] is not None:
                self._examples |= {"train": found, "val": self._read("val")}
                return
            try:
                rest, held_out = random_parts(len(found), self.val_fraction, self.seed)
            except UnsupportedSetup as error:
                raise UnsupportedSetup(
                    f"{self.files['train']}, val_fraction: {error} Give val, more texts or another val_fraction."
                ) from error
            self._examples |= {"train": [found[i] for i in rest], "val": [found[i] for i in held_out]}
        if stage in (None, "test") and "test" not in self._examples and self.files["test"] is not None:
            self._examples["test"] = self._read("test")

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Test batches.

        Raises:
            UnsupportedSetup: There is no test file.
        """
        if self.files["test"] is None:
            raise UnsupportedSetup("TextDataModule has no test texts. Give test, a file.")
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self._examples[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self._collate,
        )

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(tokens) for tokens, _ in examples)
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self._padding()),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, _IGNORED),
        }
        for row, (tokens, labels) in enumerate(examples):
            batch["input_ids"][row, : len(tokens)] = torch.tensor(tokens)
            batch["attention_mask"][row, : len(tokens)] = 1
            batch["labels"][row, : len(tokens)] = torch.tensor(labels)
        return batch

    def _padding(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)  # masked, so any will do

    # ---------------------------------------------------------------------------------------------------------- reading

    def _read(self, split: str) -> list[Example]:
        path = Path(self.files[split]).expanduser()
        found, left_out = [], 0
        for prompt, text in _lines(path, self.needs_completion):
            tokens, labels = self._tokenized(prompt, text)
            if any(label != _IGNORED for label in labels[1:]) or (labels and not self.needs_completion):
                found.append((tokens, labels))
            else:
                left_out += 1
        if not found:
            raise UnsupportedSetup(
                f"{path}: no text has anything to learn within max_length={self.max_length} tokens ({left_out} lines)."
            )
        if left_out:
            warnings.warn(
                f"{path}: {left_out} of {left_out + len(found)} texts are left out, since nothing is to be learned of "
                f"their first max_length={self.max_length} tokens.",
                stacklevel=2,
            )
        return found

    def _tokenized(self, prompt: str | None, text: str) -> Example:
        tokenize, end = self.tokenizer, self.tokenizer.eos_token_id
        before = [] if prompt is None else tokenize(prompt)["input_ids"]
        after = tokenize(text, add_special_tokens=prompt is None)["input_ids"]
        if end is not None and before[-1:] == [end]:
            before = before[:-1]  # some tokenizers end every text; the prompt goes on
        if end is not None and after[-1:] != [end]:
            after = [*after, end]
        tokens, labels = before + after, [_IGNORED] * len(before) + after
        return tokens[: self.max_length], labels[: self.max_length]


def _lines(path: Path, needs_completion: bool) -> Iterator[tuple[str | None, str]]:
    """Prompt, if there is one, and text of each line that is not empty."""
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedSetup(f"{path}: cannot be read as text ({type(error).__name__}: {error}).") from error
    lines = content.split("\n")  # splitlines() would divide at characters within texts
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UnsupportedSetup(f"{path}: has no lines.")
    for number, line in lines:
        where = f"{path}, line {number}"
        prompt, text = (None, line.rstrip("\r")) if path.suffix == ".txt" else _parsed(line, where, needs_completion)
        if _HALF.search(f"{prompt}{text}"):
            raise UnsupportedSetup(f"{where}: holds half a character (\\ud800 to \\udfff alone), which is no text.")
        yield prompt, text


def _parsed(line: str, where: str, needs_completion: bool) -> tuple[str | None, str]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UnsupportedSetup(f"{where}: is no JSON ({error}). Name the file .txt if its lines are texts.") from error
    fields = content if isinstance(content, dict) else {}
    if isinstance(fields.get("text"), str):
        return None, fields["text"]
    completion = fields.get("completion") if needs_completion else ""
    if isinstance(fields.get("prompt"), str) and isinstance(completion, str):
        return fields["prompt"], completion
    second = '"prompt": …, "completion": …' if needs_completion else '"prompt": …'
    raise UnsupportedSetup(f'{where}: expected {{"text": …}} or {{{second}}}, found {line.strip()[:80]!r}.')
