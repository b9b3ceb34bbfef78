"""CausalLM: fine-tuning any causal language model of transformers, as a whole or by adapters."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.modules.classification import in_a_loop
from lightning_soup.modules.lora import LoRA, add_lora, config_in
from lightning_soup.modules.optimization import adamw_with_cosine, check_ranges, parameter_groups
from lightning_soup.weights.formats import ADAPTER_KEY

__all__ = ["CausalLM", "Tokens", "new_language_model", "open_language_model"]

Tokens = Mapping[str, Tensor]
_IGNORED = -100  # the target that torch's and transformers' losses leave out


class CausalLM(LightningModule):
    """Any causal language model of transformers, trained on the next token with AdamW, warm-up and cosine decay.

    Batches are mappings of tensors ``[B, T]``: ``input_ids``, ``labels`` (the same tokens, −100 where nothing is to be
    learned) and ``attention_mask``; :class:`.TextDataModule` makes them. The losses ``train_loss``, ``val_loss`` and
    ``test_loss`` are means over the tokens that are predicted, those of validation and test over all of them, whatever
    the batches are. The transformers model is ``self.model``.

    Checkpoints hold plain values only, the configuration of the model among them:
    ``CausalLM.load_from_checkpoint(path)`` needs nothing but its file.

    Args:
        model_name: A folder of transformers, or a name on the Hugging Face hub (downloaded once).
        model_config: Instead, a new model: ``{model_type: llama, hidden_size: 64, …}``.
        lora: Train low-rank adapters only, by peft: ``{r: 16, alpha: 32, targets: [q_proj, v_proj]}``. ``self.model``
            is then a ``PeftModel``.
        lr: Highest learning rate. 1e-4 to 5e-4 for adapters, about a tenth for whole models.
        weight_decay: Of matrices only.
        betas: Of AdamW.
        warmup: Steps of linear warm-up: a whole number, or a fraction of the training.
        generation_config: How the model generates, ``{temperature: 0.7, eos_token_id: 2, …}``; None: as its folder
            says. Training does not use it; checkpoints keep it.

    Raises:
        UnsupportedSetup: Both or neither of ``model_name`` and ``model_config`` are given, transformers does not know
            the model, a value is out of range, or ``lora`` does not fit.
        MissingExtra: transformers, or for ``lora`` peft, is not installed.
    """

    def __init__(
        self,
        model_name: str | None = None,
        model_config: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int | float = 0.03,
        generation_config: dict[str, Any] | None = None,
    ):
        super().__init__()
        if (model_name is None) == (model_config is None):
            raise UnsupportedSetup(
                f"CausalLM(model_name={model_name!r}, model_config={model_config!r}): expected one of them, a model to "
                "start from or the configuration of a new one."
            )
        check_ranges(lr, weight_decay, betas, warmup)
        lora = LoRA(**lora) if isinstance(lora, Mapping) else lora  # as a checkpoint holds it
        self.save_hyperparameters(ignore=["lora"])
        self.save_hyperparameters({"lora": None if lora is None else lora.plain()})
        self.model = open_language_model(model_name) if model_name is not None else new_language_model(model_config)
        if generation_config is not None:
            self._generate_by(generation_config)
        # Loggers show where training started (they read the initial hyperparameters); a checkpoint brings its weights.
        configs = {"model_config": self.model.config, "generation_config": self.model.generation_config}
        plain = {name: c and json.loads(c.to_json_string(use_diff=True)) for name, c in configs.items()}
        self.hparams.update(model_name=None, **plain)
        if lora is not None:
            self.model = add_lora(self.model, lora, task="CAUSAL_LM")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say also how an adapter is configured, so that it can be taken out of the file."""
        if self.hparams.lora is not None:
            checkpoint[ADAPTER_KEY] = config_in(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Generate as the model did that was trained: its end tokens, its sampling."""
        config = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("generation_config")
        if config is not None:
            self._generate_by(config)
            self.hparams.update(generation_config=config)

    def _generate_by(self, config: Mapping[str, Any]) -> None:
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        model.generation_config = type(model.generation_config).from_dict(dict(config))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, stepped with the optimizer."""
        groups = parameter_groups(self.model, self.hparams.lr, self.hparams.weight_decay, None)
        return adamw_with_cosine(self, groups)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of the token after each one."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def training_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        """The mean loss of the tokens that are predicted, logged."""
        loss, _ = self._loss(batch)
        if in_a_loop(self):
            self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Tokens, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """The same; without a Trainer nothing is logged, and the loss can be differentiated."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Tokens, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """The same."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: Tokens, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Logits ``[B, T, V]``."""
        return self(batch["input_ids"], batch.get("attention_mask"))

    def _evaluate(self, stage: Literal["val", "test"], batch: Tokens) -> Tensor:
        loss, count = self._loss(batch)
        if in_a_loop(self) and (tokens := int(count)):
            # Weighted by its tokens, so that the mean is that over all of them, on all ranks.
            self.log(f"{stage}_loss", loss, prog_bar=stage == "val", batch_size=tokens, on_epoch=True, sync_dist=True)
        return loss

    def _loss(self, batch: Tokens) -> tuple[Tensor, Tensor]:
        """The mean over the tokens that are predicted, 0 where there are none, and how many they are."""
        logits, targets = self(batch["input_ids"], batch.get("attention_mask"))[:, :-1], batch["labels"][:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum")
        count = (targets != _IGNORED).sum()
        return total / count.clamp(min=1), count


def open_language_model(name: str) -> nn.Module:
    """A causal language model of transformers with its weights, in float32.

    Args:
        name: A folder, or a name on the Hugging Face hub (downloaded once).

    Raises:
        UnsupportedSetup: transformers opens none there.
        MissingExtra: transformers is not installed.
    """
    transformers = import_extra("transformers", "llm")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name).float().train()
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedSetup(
            f"model_name={name!r} is no causal language model that transformers can open: {_first_line(error)}"
        ) from error


def new_language_model(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model of transformers with random weights, in float32.

    Args:
        config: Its ``model_type`` and what else is not at its default.

    Raises:
        UnsupportedSetup: transformers builds none from it.
        MissingExtra: transformers is not installed.
    """
    transformers = import_extra("transformers", "llm")
    try:
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedSetup(
            f"model_config={dict(config)!r}: transformers builds no causal language model from it "
            f"({_first_line(error)}). Give its model_type ('llama', 'gpt2', …) and its sizes."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
