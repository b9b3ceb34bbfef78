"""Objective: a mean loss as a function of weights, with its gradient and its Hessian's products with vectors."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.evaluation.own_loops import OwnLoops, loss_of

__all__ = ["Objective"]

Term = tuple[float, Callable[[], Tensor]]


class Objective:
    """L(θ) = Σ_b w_b·L_b(θ) / Σ_b w_b, on a fixed set of batches.

    With w_b the size of batch b this is the mean over samples, whatever the batches are.

    Args:
        parameters: θ by name: the tensors that the losses are computed from.
        terms: w_b, and what computes L_b from the parameters as they are. It must give the same value each time: no
            dropout, no augmentation.
        keep_graph: Keep the graph of the gradient between Hessian products: each costs two gradients then instead of
            three and a half, and all batches are held in memory at once.

    Raises:
        UnsupportedSetup: No parameters or no batches.

    Example:
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curve = Objective({"theta": theta}, [(1.0, lambda: (theta**2).sum())])
        >>> curve.product(torch.tensor([1.0, 0.0]))
        tensor([2., 0.])
    """

    def __init__(self, parameters: Mapping[str, Tensor], terms: Sequence[Term], keep_graph: bool = True):
        self.parameters, self.terms, self.keep_graph = dict(parameters), list(terms), keep_graph
        if not self.parameters or not self.terms:
            raise UnsupportedSetup(
                f"Objective: got {len(self.parameters)} parameters and {len(self.terms)} batches; expected one or more "
                "of both."
            )
        self.total = sum(weight for weight, _ in self.terms)
        self.products = 0  # Hessian products so far
        self._kept: list[Tensor] | None = None

    @classmethod
    def of_module(
        cls,
        module: LightningModule,
        batches: Iterable[Any],
        datamodule: LightningDataModule | None = None,
        *,
        device: torch.device | str | None = None,
        precision: Precision | None = None,
        keep_graph: bool = True,
    ) -> "Objective":
        """The loss that a module's ``validation_step`` returns, in evaluation mode, over its trained parameters.

        Attention is computed by its formula, since the fused kernels have no second derivative. Compiled modules and
        parts are run uncompiled, as compilers derive once only. Batches are converted to float64 where parameters are.

        Args:
            module: The module; it is left as it was, on the device.
            batches: Fixed batches, as the data module's loaders give them.
            datamodule: Its data module, whose transfer hooks apply.
            device: Where to run; None: where the module is.
            precision: Converts inputs and casts as a Trainer's plugin does; None: neither.
            keep_graph: As above.

        Raises:
            UnsupportedSetup: It has no trained parameters, there are no batches, or the step returns no loss.
        """
        module = getattr(module, "_orig_mod", module)
        double = any(value.dtype == torch.float64 for value in module.parameters())
        precision = precision or (DoublePrecision() if double else Precision())
        loops = OwnLoops(module, datamodule, torch.device(device or module.device), precision)
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}

        def loss(batch: Any) -> Tensor:
            with loops.apart(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _uncompiled():
                found = loss_of(loops.validation_step(batch))
            if found is None or found.grad_fn is None:
                raise UnsupportedSetup(
                    f"{type(module).__name__}.validation_step returned no loss with a gradient. Let it return the loss."
                )
            return found

        terms = [(float(extract_batch_size(batch)), lambda batch=batch: loss(batch)) for batch in batches]
        return cls(trained, terms, keep_graph)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(value.numel() for value in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the flat vectors: the widest of the parameters'."""
        found = torch.float32
        for value in self.parameters.values():
            found = torch.promote_types(found, value.dtype)
        return found

    def value(self) -> float:
        """L at the parameters as they are."""
        with torch.no_grad():
            return sum(weight * float(term().detach()) for weight, term in self.terms) / self.total

    def gradient(self) -> Tensor:
        """∇L, flat."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self._device)
        for weight, term in self.terms:
            total += weight * self._flat(self._grad(term(), create_graph=False))
        return total / self.total

    def product(self, vector: Tensor) -> Tensor:
        """H·v for a flat v ``[size]``, by a gradient of ⟨∇L, v⟩.

        Raises:
            NonFiniteWeights: The product holds NaN or an infinity.
        """
        self.products += 1
        pieces = self._shaped(vector)
        if self.keep_graph:
            if self._kept is None:
                loss = sum(weight * term() for weight, term in self.terms) / self.total
                self._kept = self._grad(loss, create_graph=True)
            found = self._flat(self._of_gradient(self._kept, pieces, retain=True))
        else:
            found = torch.zeros_like(vector)
            for weight, term in self.terms:
                gradient = self._grad(term(), create_graph=True)
                found += weight * self._flat(self._of_gradient(gradient, pieces, retain=False))
            found /= self.total
        if not found.isfinite().all():
            raise NonFiniteWeights(
                "The Hessian's product with a vector holds NaN or an infinity: the loss or its derivatives overflow at "
                "these weights. Judge weights with a finite loss, or in float64."
            )
        return found

    def moved(self) -> None:
        """Forget the graph that was kept, after the parameters have changed."""
        self._kept = None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _grad(self, loss: Tensor, create_graph: bool) -> list[Tensor]:
        own = list(self.parameters.values())
        found = torch.autograd.grad(loss, own, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(value) if g is None else g for g, value in zip(found, own, strict=True)]

    def _of_gradient(self, gradient: Sequence[Tensor], pieces: Sequence[Tensor], retain: bool) -> list[Tensor]:
        own = list(self.parameters.values())
        used = [(g, piece) for g, piece in zip(gradient, pieces, strict=True) if g.requires_grad]
        if not used:  # a loss that is linear in the parameters
            return [torch.zeros_like(value) for value in own]
        found = torch.autograd.grad(
            [g for g, _ in used], own, [piece for _, piece in used], retain_graph=retain, allow_unused=True
        )
        return [torch.zeros_like(value) if g is None else g for g, value in zip(found, own, strict=True)]

    def _flat(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([piece.detach().reshape(-1).to(self.dtype) for piece in pieces])

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        own = list(self.parameters.values())
        if vector.shape != (self.size,):
            raise UnsupportedSetup(f"Objective.product: got a vector {list(vector.shape)}; expected [{self.size}].")
        pieces = vector.split([value.numel() for value in own])
        return [piece.view(value.shape).to(value) for piece, value in zip(pieces, own, strict=True)]


def _uncompiled() -> AbstractContextManager[Any]:
    stance = getattr(torch.compiler, "set_stance", None)  # of torch 2.6 and later
    if stance is None or "torch._dynamo" not in sys.modules:  # which takes seconds to import, and nothing is compiled
        return nullcontext()
    return stance("force_eager")
