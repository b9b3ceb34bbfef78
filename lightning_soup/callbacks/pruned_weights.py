"""The prunable weights of a module in training, and what keeps them pruned."""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint
from lightning_soup.layers.masks import NOT_PRUNABLE, Masks, prunable
from lightning_soup.layers.pruning import Of, prune_
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.weights_file import clean_names


class PrunedWeights:
    """Holds the masks of a module outside of it, and applies them to its weights, gradients and optimizer states.

    Args:
        module: The module, where it trains.
        exclude: Patterns of names that are not pruned; None: :data:`.NOT_PRUNABLE`.
        skip_first: As of :func:`.prunable`.
        skip_head: As of :func:`.prunable`.

    Attributes:
        tensors: The prunable parameters, by name without the prefixes of wrappers.
        masks: Their masks.
    """

    def __init__(
        self, module: nn.Module, exclude: Sequence[str] | None = None, skip_first: bool = False, skip_head: bool = False
    ) -> None:
        found = prunable(module, NOT_PRUNABLE if exclude is None else exclude, skip_first, skip_head)
        names = clean_names(found, type(module).__name__)
        self.tensors: dict[str, nn.Parameter] = {names[name]: tensor for name, tensor in found.items()}
        self.masks = Masks.full(self.tensors)

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the very same tensors."""
        return tensors.keys() == self.tensors.keys() and all(tensors[n] is t for n, t in self.tensors.items())

    def resume(self, state: dict[str, Any], owner: str) -> None:
        """Take masks from a file.

        Raises:
            UnsupportedSetup: They are those of another model.
        """
        masks = Masks.from_state(state, {name: tensor.device for name, tensor in self.tensors.items()})
        masks.check(self.tensors, owner)
        self.masks = masks

    def read(self, path: str) -> None:
        """Take masks from a file of them, and lay them over the weights.

        Raises:
            UnreadableCheckpoint: It is none.
            UnsupportedSetup: They are those of another model.
        """
        try:
            state = torch.load(user_path(path), map_location="cpu", weights_only=True)
            known = isinstance(state, dict) and state.keys() == {"bits", "shapes"}
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UnreadableCheckpoint(f"{path}: no file of masks can be read there ({error}).") from error
        if not known:
            raise UnreadableCheckpoint(f"{path}: holds no masks. SparseModelSoup leaves a masks.pt in its folder.")
        self.resume(state, path)
        self.mask_weights()

    def prune(self, trainer: Trainer, amount: float, selection: str, of: Of = "all", seed: int = 0) -> None:
        """Extend the masks; rank 0 decides for all ranks.

        Raises:
            LightningSoupError: As of :func:`.prune_`, on every rank.
        """
        error, state = None, None
        if trainer.is_global_zero:
            try:
                self.masks = prune_(self.tensors, amount, self.masks, selection, of, seed)
            except LightningSoupError as caught:
                error = caught
        if trainer.world_size > 1:
            state = self.masks.state() if trainer.is_global_zero and error is None else None
            error, state = trainer.strategy.broadcast((error, state))
        if error is not None:
            raise error
        if state is not None:
            self.resume(state, "rank 0")
        self.mask_weights()

    def mask_weights(self) -> None:
        """Make pruned weights zero."""
        self.masks.apply_(self.tensors)

    def mask_gradients(self) -> None:
        """Make gradients of pruned weights zero.

        Those of sparse layout, which embeddings can ask for, stay as they are: what they move is masked after the step.
        """
        gradients = {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}
        self.masks.apply_({name: grad for name, grad in gradients.items() if grad.layout == torch.strided})

    def mask_optimizer(self, optimizer: Optimizer) -> None:
        """Make pruned weights that an optimizer moves zero, and what it remembers of them: momentum and the like."""
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue
                self.masks.apply_({name: parameter})
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                        self.masks.apply_({name: value})

    def norm(self) -> float:
        """‖W‖ over the prunable weights."""
        squares = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64).square() for t in self.tensors.values()]
        return float(sum(squares)) ** 0.5

    def holds(self) -> bool:
        """Whether all that is pruned is zero."""
        rows = ((self.tensors[name].detach(), mask) for name, mask in self.masks.items())
        return not any(torch.count_nonzero(tensor[~mask.to(tensor.device)]) for tensor, mask in rows)
