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
        module: Its policy is θ_1 still, unless there was an earlier fit.
        reference: What π_ref is made of.
        start: Whether θ_1 is needed, beside π_ref.
        earlier: Those of the module's last run: they know what θ_1 was.

    Attributes:
        digest: Hash of the weights of π_ref; None where a trained policy is only validated, and θ_1 not known.

    Raises:
        LightningSoupError: As of :meth:`.SoupReference.into`.
    """

    def __init__(
        self,
        module: "SalsaPPO",
        reference: SoupReference | None,
        start: bool,
        earlier: "FrozenPolicies | None" = None,
    ):
        self._module, self._reference = module, reference
        self.models: dict[str, nn.Module] = {} if earlier is None else dict(earlier.models)
        known = (
            None if earlier is None or (reference is not None and "reference" not in self.models) else earlier.digest
        )
        if reference is not None and "reference" not in self.models:
            self.models["reference"] = _skeleton(module)
            reference.into(self.models["reference"], options="model_name or model_config")
        if not start or "start" in self.models:
            pass
        elif module.starts_elsewhere:
            self.models["start"] = open_language_model(module.hparams.start)
        elif module.hparams.lora is None:
            self.models["start"] = _skeleton(module)
            self.models["start"].load_state_dict(module.policy.state_dict())
        for model in self.models.values():
            model.requires_grad_(False).eval()
        anchor = self.models.get("reference") or self.models.get("start")
        if anchor is None and module.hparams.lora is not None:
            anchor = module.policy
        self.digest = known if known is not None or anchor is None else _digest(anchor)

    def place(self, device: torch.device) -> None:
        """Bring them to a device, in the type that the module has by now."""
        dtype = next(self._module.policy.parameters()).dtype
        for name, model in self.models.items():
            own = name == "reference" and self._reference is not None and self._reference.dtype is not None
            model.to(device) if own else model.to(device, dtype)

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
        return found.masked_fill(mask == 0, 0.0)  # a token that may never be written has −∞, and −∞·0 is NaN


def _digest(model: nn.Module) -> str:
    """Of the weights without adapters."""
    plain = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    return open_checkpoint({name: plain[name] for name in sorted(plain) if "lora_" not in name}).digest()


def _skeleton(module: "SalsaPPO") -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the training is the same with a reference and without
        return new_language_model(module.hparams.model_config)
