"""Rewards of responses: a reward model of transformers, and the check of what any reward returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soup.errors import NonFiniteScore, UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.modules.rollouts import position_limit

__all__ = ["PADDING", "PROMPT", "RESPONSE", "Reward", "RewardModel", "agreed_scores", "checked_scores"]

PADDING, PROMPT, RESPONSE = 0, 1, 2
"""What the second argument of a reward says of each token."""

Reward = Callable[[Tensor, Tensor], Tensor]
"""``reward(sequences, kinds) -> scores``: tokens ``[B, S]``, whether each is padding (0), of the prompt (1) or of the
response (2), to one number a response, ``[B]``."""


class RewardModel:
    """A sequence classifier of transformers with one output, which is the score of prompt and response.

    It is frozen and no ``nn.Module``, so that a module that holds it does not hold its weights. Its tokens must be
    those of the policy.

    Args:
        path: A folder of transformers, or a name on the Hugging Face hub (downloaded once).
        batch_size: Sequences at once; None: all of a batch.

    Raises:
        UnsupportedSetup: transformers finds no sequence classifier there, one with several outputs, or one without
            its head; when called: sequences are longer than it has positions.
        MissingExtra: transformers is not installed.
    """

    def __init__(self, path: str, batch_size: int | None = None):
        if batch_size is not None and batch_size < 1:
            raise UnsupportedSetup(f"RewardModel(batch_size={batch_size}): expected 1 or more.")
        self.path, self.batch_size = path, batch_size
        transformers = import_extra("transformers", "llm")
        self.model: nn.Module
        try:
            opened = transformers.AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
            self.model, found = opened
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedSetup(
                f"RewardModel({path!r}): transformers opens no sequence classifier there "
                f"({str(error).strip().partition(chr(10))[0][:300]})."
            ) from error
        lacking = sorted(found["missing_keys"])
        if lacking:  # transformers would draw them at random
            raise UnsupportedSetup(
                f"RewardModel({path!r}): {len(lacking)} weights are not there, the first is {lacking[0]}; expected a "
                "trained reward model, saved with its head."
            )
        if self.model.config.num_labels != 1:
            raise UnsupportedSetup(
                f"RewardModel({path!r}) has {self.model.config.num_labels} outputs; expected one, the score."
            )
        self.model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> "RewardModel":
        """Move it."""
        self.model.to(device)
        return self

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return self.model.config.get_text_config().vocab_size

    @torch.no_grad()
    def __call__(self, sequences: Tensor, kinds: Tensor) -> Tensor:
        """Scores ``[B]``; see :data:`Reward`."""
        tokens, attention, padding = _packed(sequences, kinds != PADDING, self.vocab_size)
        limit = position_limit(self.model)
        if limit is not None and tokens.shape[1] > limit:
            raise UnsupportedSetup(
                f"RewardModel({self.path!r}) has {limit} positions, and prompt and response {tokens.shape[1]} tokens. "
                "Give a smaller max_new_tokens or shorter prompts (PromptDataModule's max_length), or another model."
            )
        self.model.config.pad_token_id = padding  # by which the model finds the last token
        if padding is None:
            alone = [row[:length].unsqueeze(0) for row, length in zip(tokens, attention.sum(1).tolist(), strict=True)]
            return torch.cat([self.model(input_ids=row).logits[:, 0] for row in alone]).float()
        step = self.batch_size or len(tokens)
        parts = [slice(start, start + step) for start in range(0, len(tokens), step)]
        found = [self.model(input_ids=tokens[part], attention_mask=attention[part]).logits[:, 0] for part in parts]
        return torch.cat(found).float()


def _packed(sequences: Tensor, real: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, int | None]:
    """The tokens at the left, their mask, and the padding after them: a token that none of them is.

    The models look for the last token that is no padding; where the end token serves as padding, as is common, they
    would take the one before it. None: all tokens of a small vocabulary occur.
    """
    order = torch.argsort((~real).long(), dim=1, stable=True)[:, : int(real.sum(1).max())]
    tokens, attention = sequences.gather(1, order), real.gather(1, order)
    used = set(tokens[attention].unique().tolist())
    padding = next((token for token in range(vocab_size) if token not in used), None)
    return tokens.masked_fill(~attention, padding or 0), attention.long(), padding


def agreed_scores(reward: Reward, sequences: Tensor, kinds: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The rewards of responses, or an error on all ranks where that of one is of no use, so that none waits for ever.

    Args:
        reward: The reward.
        sequences: ``[B, S]``.
        kinds: ``[B, S]``; see :data:`Reward`.
        total: Sums a tensor over ranks.

    Returns:
        ``[B]``.

    Raises:
        UnsupportedSetup: As :func:`checked_scores`, or on another rank.
        NonFiniteScore: As :func:`checked_scores`.
    """
    failure: Exception | None = None
    scores = torch.zeros(len(sequences), device=sequences.device)
    try:
        scores = checked_scores(reward(sequences, kinds), len(sequences), sequences.device)
    except Exception as error:
        failure = error
    failed = int(total(torch.tensor(int(failure is not None), device=sequences.device)))
    if failure is not None:
        raise failure
    if failed:
        raise UnsupportedSetup(f"The reward failed on {failed} other ranks, whose messages say why.")
    return scores


def checked_scores(scores: Any, responses: int, device: torch.device) -> Tensor:
    """What a reward returned, as float32 ``[B]``.

    Args:
        scores: What it returned.
        responses: B.
        device: Where the scores go.

    Raises:
        UnsupportedSetup: It is not one number a response.
        NonFiniteScore: One of them is NaN or an infinity.
    """
    try:
        found = torch.as_tensor(scores, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedSetup(
            f"reward returned {type(scores).__name__} ({error}); expected a tensor of one number for each of the "
            f"{responses} responses."
        ) from error
    if found.shape != (responses,):
        raise UnsupportedSetup(
            f"reward returned the shape {list(found.shape)}; expected [{responses}], one number a response. Scores of "
            "single tokens are summed first; a column [B, 1] is squeezed."
        )
    if not found.isfinite().all():
        wrong = (~found.isfinite()).nonzero().flatten().tolist()
        raise NonFiniteScore(
            f"reward gave {found[wrong[0]].item()} for response {wrong[0]} of {responses} ({len(wrong)} in all are "
            "not finite). No step is taken with such a batch: mend the reward, or clip it."
        )
    return found.detach()
