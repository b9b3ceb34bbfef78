"""Responses of a causal language model to prompts, and how likely each of their tokens was.

Prompts are ``[B, P]``, padded on the left; responses follow them, ``[B, T]``, padded on the right.
"""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soup.extras import import_extra

__all__ = [
    "Rollout",
    "fork_rng",
    "hidden_width",
    "kinds_of_tokens",
    "model_inputs",
    "position_limit",
    "sample",
    "token_log_probabilities",
    "until_end",
]


@dataclass
class Rollout:
    """Responses to a batch of prompts, and what of them does not change while the policy learns from them.

    Attributes:
        sequences: Prompts and responses, ``[B, P + T]``.
        attention: 1 where ``sequences`` has a token, ``[B, P + T]``.
        mask: 1 at the tokens of the responses, their end token among them, ``[B, T]``.
        scores: r(x, y), ``[B]``.
        log_old: log π_old of each token, ``[B, T]``.
        log_ref: log π_ref of each token, ``[B, T]``.
        old_values: V_old, ``[B, T]``.
        advantages: A, whitened, ``[B, T]``.
        returns: R, ``[B, T]``.
    """

    sequences: Tensor
    attention: Tensor
    mask: Tensor
    scores: Tensor
    log_old: Tensor
    log_ref: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def part(self, rows: Tensor) -> "Rollout":
        """Some of the responses."""
        return Rollout(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def sample(
    policy: nn.Module,
    prompts: Tensor,
    attention: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    ends: Collection[int],
    pad: int,
) -> Tensor:
    """Draw responses from softmax(logits/temperature), and from nothing else.

    What the model's own generation configuration says (top-k, penalties, …) is left out: PPO is right only where the
    tokens are drawn from the distribution whose probabilities it weighs.

    Args:
        policy: A causal language model of transformers.
        prompts: ``[B, P]``, padded on the left.
        attention: 1 at their tokens, ``[B, P]``.
        max_new_tokens: T at most.
        temperature: Above 0.
        ends: Tokens that end a response.
        pad: What follows the end.

    Returns:
        ``[B, T]``.
    """
    config = import_extra("transformers", "llm").GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    own, policy.generation_config = policy.generation_config, config  # which would fill in what is not said here
    try:
        found = policy.generate(input_ids=prompts, attention_mask=attention, generation_config=config)
    finally:
        policy.generation_config = own
    return found[:, prompts.shape[1] :]


def until_end(responses: Tensor, ends: Collection[int]) -> Tensor:
    """1 at the tokens up to the first end token and at it, 0 after it; ``[B, T]``, of integers."""
    if not ends:
        return torch.ones_like(responses)
    ended = torch.isin(responses, torch.tensor(sorted(ends), device=responses.device)).long()
    return ((ended.cumsum(1) - ended) == 0).long()


def kinds_of_tokens(attention: Tensor, mask: Tensor) -> Tensor:
    """0 for padding, 1 for tokens of the prompt, 2 for those of the response, ``[B, P + T]``: see :data:`.Reward`."""
    kinds = attention.clone()
    kinds[:, -mask.shape[1] :] += mask
    return kinds


def model_inputs(model: nn.Module, sequences: Tensor, attention: Tensor) -> dict[str, Any]:
    """What a model of transformers is called with, for sequences that may be padded on both sides."""
    inputs: dict[str, Any] = {"input_ids": sequences, "attention_mask": attention, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:  # from the first token on, not the padding
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    return inputs


def token_log_probabilities(
    model: nn.Module, sequences: Tensor, attention: Tensor, count: int, temperature: float, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the last tokens of sequences.

    Args:
        model: A causal language model of transformers.
        sequences: ``[B, S]``.
        attention: ``[B, S]``.
        count: T, how many of the last tokens.
        temperature: That they were drawn with.
        hidden: Also give the last layer's states at the places from which the tokens were predicted.

    Returns:
        ``[B, T]``, and ``[B, T, width]`` or None.
    """
    options = model_inputs(model, sequences, attention)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count + 1  # those of the prompts would be thrown away
    result = model(**options, output_hidden_states=hidden)
    logits = result.logits[:, -count - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = logits.gather(2, sequences[:, -count:].unsqueeze(2)).squeeze(2)
    return chosen - logits.logsumexp(2), result.hidden_states[-1][:, -count - 1 : -1] if hidden else None


def hidden_width(model: nn.Module) -> int:
    """The width of a language model's last states."""
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT projects them to that, before


def position_limit(model: nn.Module) -> int | None:
    """Tokens of a sequence at most, of a model with a table of positions; None where positions are computed."""
    config = model.config.get_text_config()
    if getattr(config, "rope_parameters", None) or hasattr(config, "rope_theta"):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    tables = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    first = max((getattr(table, "padding_idx", None) or 0 for table in tables), default=0)
    return limit - first - 1 if limit and first else limit  # RoBERTa counts from the number of the padding token


@contextmanager
def fork_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed of their own: they neither depend on what was drawn before, nor change it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
