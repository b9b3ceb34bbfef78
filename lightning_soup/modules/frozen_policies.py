"""The policies beside the one that is trained: π_ref, which it is held to, and θ_1, which it started from."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lightning_soup.modules.causal_lm import new_language_model, open_language_model
from lightning_soup.modules.rollouts import token_log_probabilities
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.weights.weights_file import open_checkpoint

if TYPE_CHECKING:
    from lightning_soup.modules.alignment import SalsaPPO

__all__ = ["FrozenPolicies"]


class FrozenPolicies:
    """π_ref and θ_1, frozen, outside the module: no optimizer, checkpoint or DDP sees them.

    With adapters θ_1 is the policy without them, and needs no memory. Without ``reference`` π_ref is θ_1.

    Args:
        module: Its policy is θ_1 still.
        reference: What π_ref is made of.
        start: Whether θ_1 is needed, beside π_ref.

    Attributes:
        digest: Hash of the weights of π_ref.

    Raises:
        LightningSoupError: As of :meth:`.SoupReference.into`.
    """

    def __init__(self, module: "SalsaPPO", reference: SoupReference | None, start: bool):
        self._module, self._reference = module, reference
        self.models: dict[str, nn.Module] = {}
        if reference is not None:
            self.models["reference"] = _skeleton(module)
            reference.into(self.models["reference"], options="model_name or model_config")
        if start and module.starts_elsewhere:
            self.models["start"] = open_language_model(module.hparams.start)
        elif start and module.hparams.lora is None:
            self.models["start"] = _skeleton(module)
            self.models["start"].load_state_dict(module.policy.state_dict())
        for model in self.models.values():
            model.requires_grad_(False).eval()
        anchor = self.models.get("reference") or self.models.get("start") or module.policy
        plain = {name.replace(".base_layer.", "."): value for name, value in anchor.state_dict().items()}
        self.digest = open_checkpoint({name: plain[name] for name in sorted(plain) if "lora_" not in name}).digest()

    def place(self) -> None:
        """Bring them to the module's device, in the type that it has by now."""
        dtype = next(self._module.policy.parameters()).dtype
        for name, model in self.models.items():
            own = name == "reference" and self._reference is not None and self._reference.dtype is not None
            model.to(self._module.device) if own else model.to(self._module.device, dtype)

    @torch.no_grad()
    def log_probabilities(
        self, name: Literal["reference", "start"], sequences: Tensor, attention: Tensor, mask: Tensor
    ) -> Tensor | None:
        """Give log π of each token of the responses, ``[B, T]``, 0 after the ends; None where there is none."""
        name = "start" if self._reference is None else name
        module, model, plain = self._module, self.models.get(name), nullcontext()
        if model is None and name == "start" and module.hparams.lora is not None:
            model, plain = module.policy, module.model.disable_adapter()
        if model is None:
            return None
        with plain:
            found, _ = token_log_probabilities(model, sequences, attention, mask.shape[1], module.hparams.temperature)
        return found * mask


def _skeleton(module: "SalsaPPO") -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the training is the same with a reference and without
        return new_language_model(module.hparams.model_config)
