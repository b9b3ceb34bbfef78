"""PromptDataModule: prompts that a language model writes responses to."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_soup.data.texts import Example, TextDataModule

__all__ = ["PromptDataModule"]


class PromptDataModule(TextDataModule):
    """Prompts for :class:`.SalsaPPO`, tokenized once by transformers.

    Files are those of :class:`.TextDataModule`: of ``{"prompt": …}`` lines whatever else they hold is left out, and of
    ``{"text": …}`` lines and ``.txt`` files each text is a prompt. Prompts do not end in the tokenizer's end token.
    Batches are mappings ``input_ids`` and ``attention_mask`` ``[B, P]``, padded on the left, so that responses can
    follow. Of longer prompts the last ``max_length`` tokens are kept.

    Args:
        train: File of the training prompts.
        tokenizer: A folder of transformers, or a name on the Hugging Face hub (downloaded once): the policy's.
        val: File of the validation prompts; None: a share of the training prompts is held out.
        test: File of the test prompts; None: there are none.
        max_length: Tokens at most.
        val_fraction: The share that is held out without ``val``.
        seed: Of that share.
        batch_size: Prompts in a batch: as many responses are written before the policy learns from them.
        num_workers: Processes that make batches.

    Raises:
        UnsupportedSetup: As :class:`.TextDataModule`.
        MissingExtra: transformers is not installed.
    """

    needs_completion: ClassVar[bool] = False

    def _tokenized(self, prompt: str | None, text: str) -> Example:
        tokens = self.tokenizer(text if prompt is None else prompt)["input_ids"]
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]  # some tokenizers end every text; the response goes on
        tokens = tokens[-self.max_length :]
        return tokens, tokens

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(tokens) for tokens, _ in examples)
        batch = {
            "input_ids": torch.full((len(examples), length), self._padding()),
            "attention_mask": torch.zeros((len(examples), length), dtype=torch.long),
        }
        for row, (tokens, _) in enumerate(examples):
            batch["input_ids"][row, length - len(tokens) :] = torch.tensor(tokens)
            batch["attention_mask"][row, length - len(tokens) :] = 1
        return batch
