"""A language model of transformers with nothing but the logits of its first token: a bandit with one step."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import PretrainedConfig as PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class BanditConfig(PreTrainedConfig):
    """So many arms."""

    model_type = "test_bandit"

    def __init__(self, vocab_size: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, 1, 1


class Bandit(PreTrainedModel, GenerationMixin):
    """Gives the same logits everywhere, and 1 as its state."""

    config_class = BanditConfig
    base_model_prefix = "bandit"
    _supports_cache_class = False

    def __init__(self, config: BanditConfig) -> None:
        super().__init__(config)
        self.arms = nn.Parameter(torch.zeros(config.vocab_size))
        self.embedding = nn.Embedding(config.vocab_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def get_input_embeddings(self) -> nn.Module:
        """Some table; it is not used."""
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits ``[B, S, arms]``."""
        states = torch.ones(*input_ids.shape, 1, dtype=self.arms.dtype)
        return CausalLMOutput(logits=states * self.arms, hidden_states=(states,) if output_hidden_states else None)


AutoConfig.register("test_bandit", BanditConfig)
AutoModelForCausalLM.register(BanditConfig, Bandit)
