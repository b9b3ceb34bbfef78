"""The prunable weights of a module in training, and what keeps them pruned."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.prunable_weights import not_prunable, prunable
from lightning_soup.layers.pruning import Of, prune_
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.weights_file import clean_names, metric_prefixes, module_tensors


class PrunedWeights:
    """Holds the masks of a module outside of it, and applies them to its weights, gradients and optimizer states.

    Args:
        module: The module, where it trains.
        exclude: Patterns of names that are not pruned; None: those of :func:`.not_prunable`.
        skip_first: As of :func:`.prunable`.
        skip_head: As of :func:`.prunable`.

    Attributes:
        tensors: The prunable parameters, by name without the prefixes of wrappers.
        masks: Their masks.
        skipped: The first and last parameter, where they are left out.
    """

    def __init__(
        self, module: nn.Module, exclude: Sequence[str] | None = None, skip_first: bool = False, skip_head: bool = False
    ) -> None:
        metrics = [f"{prefix}*" for prefix in metric_prefixes(module)]  # networks inside metrics judge, and are not it
        given = not_prunable(module) if exclude is None else exclude
        if not isinstance(given, str):
            given = [*given, *metrics]
        found = prunable(module, given, skip_first, skip_head)
        skips = skip_first or skip_head
        self.skipped = [name for name in prunable(module, given) if name not in found] if skips else []
        names = clean_names([*module_tensors(module), *found], type(module).__name__)  # those that files have
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
        before = {name for name, mask in self.masks.items() if not mask.any()}
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
        gone = [name for name, mask in self.masks.items() if name not in before and not mask.any()]
        if gone:
            rank_zero_warn(
                f"{len(gone)} of {len(self.masks)} layers have no weight left: {', '.join(gone[:5])}. What comes after "
                "them sees constants. Prune less, spread it over the layers (selection='lamp' or 'uniform'), or leave "
                "layers out (skip_head, exclude)."
            )

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Give a module its weights, and these their masks back, if the block ends with an error or Ctrl-C."""
        tensors, masks = module_tensors(module), self.masks
        kept = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(kept[name])
            self.masks = masks
            raise

    def mask_weights(self) -> None:
        """Make pruned weights zero."""
        self.masks.apply_(self.tensors)

    def mask_gradients(self) -> None:
        """Make gradients of pruned weights zero.

        Raises:
            UnsupportedSetup: A gradient is sparse: that of an embedding that asks for it.
        """
        gradients = {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}
        sparse = [name for name, gradient in gradients.items() if gradient.layout is not torch.strided]
        if sparse:
            raise UnsupportedSetup(
                f"{sparse[0]} has sparse gradients, on which no mask can be laid. Leave it out (exclude), or make the "
                "embedding with sparse=False."
            )
        self.masks.apply_(gradients)

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
