"""What SalsaPPO refuses before a token is written, and the special tokens that it goes by."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.layers.moe import RandomUniformMoE
from lightning_soup.modules.optimization import check_ranges
from lightning_soup.modules.rewards import RewardModel
from lightning_soup.modules.rollouts import position_limit
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["check_fit", "check_positions", "check_prompts", "check_values", "check_vocabularies", "special_tokens"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot work.

    Raises:
        UnsupportedSetup: A value is out of range.
    """
    check_ranges(options["lr"], options["weight_decay"], options["betas"], 0)
    whole = ("max_new_tokens", "epochs", "minibatches", "micro_batches", "kl_horizon")
    positive = ("temperature", "epsilon", "epsilon_value")
    expectations = (
        *((name, isinstance(options[name], int) and options[name] > 0, "a whole number above 0") for name in whole),
        *((name, 0 < options[name] < math.inf, "more than 0, finite") for name in positive),
        *((name, options[name] is None or options[name] > 0, "more than 0") for name in ("kl_target", "lr_value")),
        ("max_grad_norm", options["max_grad_norm"] is None or options["max_grad_norm"] > 0, "more than 0, or None"),
        *((name, 0 <= options[name] < math.inf, "0 or more, finite") for name in ("beta", "value_weight")),
        *((name, 0 <= options[name] <= 1, "a number in [0, 1]") for name in ("gamma", "lam")),
        ("kl_estimator", options["kl_estimator"] in ("k1", "k3"), "k1 or k3; k2 has a bias, and is for logging only"),
        ("value", options["value"] in ("head", "network"), "head or network"),
        ("schedule", options["schedule"] in ("constant", "linear"), "constant or linear"),
        ("kl_target", not (options["kl_target"] and options["beta"] == 0), "none beside beta=0, which stays 0"),
        ("value", not (options["lora"] and options["value"] == "network"), "head beside lora"),
    )
    for name, holds, expected in expectations:
        if not holds:
            raise UnsupportedSetup(f"SalsaPPO({name}={options[name]!r}): expected {expected}.")


def check_fit(trainer: Trainer, reward: Any, *, two_optimizers: bool) -> None:
    """Refuse what is known before any model is built.

    Raises:
        UnsupportedSetup: There is no reward, or the Trainer's strategy, precision or a callback does not do.
    """
    if not callable(reward):
        raise UnsupportedSetup(
            f"SalsaPPO needs a reward, and has {reward!r}: give a function reward(sequences, kinds) -> scores, or "
            "RewardModel(folder). One that was loaded from a checkpoint is given it anew: "
            "load_from_checkpoint(path, reward=…)."
        )
    strategy = trainer.strategy
    # Of the subclasses of DDP, DeepSpeed shards the model and ReplicaStrategy has several of them.
    if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
        raise UnsupportedSetup(
            f"SalsaPPO does not work with {type(strategy).__name__}: each rank writes responses with the whole policy, "
            "in its own time. Use one device or strategy='ddp'."
        )
    precision = trainer.precision_plugin
    if two_optimizers and isinstance(precision, MixedPrecision) and precision.scaler is not None:
        raise UnsupportedSetup(
            "SalsaPPO(lr_value=…) does not work with precision='16-mixed': the scale of the gradients changes between "
            "the steps of its two optimizers. Use bf16-mixed, or one optimizer (lr_value=None)."
        )
    if any(isinstance(part, RandomUniformMoE) for part in trainer.lightning_module.modules()):
        raise UnsupportedSetup(
            "SalsaPPO does not work with ExpertsWeightAveraging: the policy would write with the mean of its experts, "
            "and θ_1 has none. Train without the callback; ExponentialAverage and ModelSoup work."
        )


def check_vocabularies(policy: nn.Module, reference: SoupReference | None, reward: Any, tokenizer: Any | None) -> None:
    """Refuse models that mean different tokens by the same numbers.

    Sizes are compared, and where folders hold tokenizers, these.

    Raises:
        UnsupportedSetup: A vocabulary is another one than the policy's.
    """
    name, size = _embedding(policy), policy.get_input_embeddings().weight.shape[0]
    known = None if tokenizer is None else tokenizer.get_vocab()
    if known is not None and len(known) and max(known.values()) >= size:
        raise UnsupportedSetup(
            f"The prompts' tokenizer has tokens up to {max(known.values())}, the policy knows {size}. Give the "
            "tokenizer that belongs to the policy."
        )
    places = [] if reference is None else list(reference.checkpoints)
    for place in places:
        opened = open_checkpoint(place)
        spec = next((opened.specs[found] for found in (name, f"model.{name}") if found in opened.specs), None)
        if spec is not None and spec.shape[0] != size:
            raise UnsupportedSetup(
                f"{place}: has a vocabulary of {spec.shape[0]} tokens, the policy of {size}. Policy and reference must "
                "come from one model and share its tokenizer."
            )
    if isinstance(reward, RewardModel):
        if reward.vocab_size < size:
            raise UnsupportedSetup(
                f"RewardModel({reward.path!r}) knows {reward.vocab_size} tokens, the policy {size}. It must share the "
                "policy's tokenizer; for another one, write a reward that decodes the tokens and encodes them anew."
            )
        places.append(reward.path)
    for place in places if known else ():
        theirs = _vocabulary(place)
        wrong = [token for token, number in known.items() if theirs is not None and theirs.get(token) != number]
        if wrong:
            raise UnsupportedSetup(
                f"{place}: its tokenizer is not that of the prompts: {len(wrong)} tokens differ, the first is "
                f"{wrong[0]!r} ({known[wrong[0]]} against {theirs.get(wrong[0])}). All models must share one tokenizer."
            )


def _embedding(policy: nn.Module) -> str:
    wanted = policy.get_input_embeddings().weight
    return next(name for name, value in policy.named_parameters(remove_duplicate=False) if value is wanted)


def _vocabulary(place: Any) -> dict[str, int] | None:
    """The tokens of a folder of transformers that holds a tokenizer."""
    if not isinstance(place, (str, os.PathLike)):
        return None
    folder = Path(place).expanduser()
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return import_extra("transformers", "llm").AutoTokenizer.from_pretrained(folder).get_vocab()


def special_tokens(policy: nn.Module, tokenizer: Any | None) -> tuple[set[int], int]:
    """The tokens that end a response, and the one that follows the end.

    They are those of the model's generation configuration, else of its configuration, else of the tokenizer. Without
    an end token all responses have ``max_new_tokens`` tokens. What follows an end is masked everywhere, so without a
    padding token any other serves: the end token, or 0.

    Args:
        policy: A causal language model of transformers.
        tokenizer: That of the prompts, if there is one.
    """
    size = policy.get_input_embeddings().weight.shape[0]
    sources = [policy.generation_config, policy.config, tokenizer]

    def found(name: str) -> list[int]:
        for source in sources:
            given = getattr(source, name, None)
            tokens = given if isinstance(given, (list, tuple)) else [given]
            # Some configurations name tokens of a larger vocabulary, by default.
            tokens = [token for token in tokens if isinstance(token, int) and 0 <= token < size]
            if tokens:
                return tokens
        return []

    ends = found("eos_token_id")
    return set(ends), (found("pad_token_id") or ends or [0])[0]


def check_prompts(batch: Any) -> tuple[Tensor, Tensor]:
    """The prompts of a batch and their mask, ``[B, P]``.

    Raises:
        UnsupportedSetup: They are no prompts, or end in padding.
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.numel():
        raise UnsupportedSetup(
            f"SalsaPPO got a batch of {type(batch).__name__}; expected a mapping with input_ids and attention_mask of "
            "shape [B, P], such as PromptDataModule makes."
        )
    attention = batch.get("attention_mask")
    attention = torch.ones_like(tokens) if attention is None else attention.long()
    if attention.shape != tokens.shape or not bool(attention[:, -1].all()):
        raise UnsupportedSetup(
            "SalsaPPO got prompts that end in padding, or whose attention_mask has another shape. Responses follow the "
            "prompts, so these are padded on the left (padding_side='left', or PromptDataModule)."
        )
    return tokens, attention


def check_positions(policy: nn.Module, attention: Tensor, max_new_tokens: int) -> None:
    """Refuse prompts whose responses would leave the table of positions, which is a crash on a GPU.

    Args:
        policy: A causal language model of transformers.
        attention: 1 at the tokens of the prompts, ``[B, P]``.
        max_new_tokens: Tokens of a response at most.

    Raises:
        UnsupportedSetup: One is too long.
    """
    limit = position_limit(policy)
    longest = 0 if limit is None else int(attention.sum(1).max())
    if limit is not None and longest + max_new_tokens > limit:
        raise UnsupportedSetup(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the {limit} positions of "
            f"{type(policy).__name__}. Give a smaller max_new_tokens, or PromptDataModule a smaller max_length: their "
            "sum may be so many."
        )
