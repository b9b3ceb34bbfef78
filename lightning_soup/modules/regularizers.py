"""Regularizers: what holds a fine-tune to a model that was there before, as a part of the training loss.

A soup of earlier fine-tunes is that model for :class:`ReferenceKL`, by what it predicts, and for :class:`L2SP`, by its
weights.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.distillation import weight_consolidation
from lightning_soup.modules.initial_weights import head_layers
from lightning_soup.modules.policy_gradient import kl_divergence
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.weights.weights_file import open_checkpoint

if TYPE_CHECKING:
    from lightning_soup.modules.classification import ClassificationModule

__all__ = ["L2SP", "ReferenceKL", "Regularizer"]


class Regularizer(ABC):
    """Base: a part of the loss that knows the module. No ``nn.Module``, so that nothing of it is trained or saved.

    Attributes:
        name: What its figure is logged as, after ``train_``.
        digest: Hash of the weights that the module is held to, from ``prepare`` on.
    """

    name: str
    digest = ""

    @abstractmethod
    def prepare(self, module: "ClassificationModule") -> None:
        """Build what the module is held to, before its training, and before a checkpoint is loaded to go on with.

        Raises:
            UnsupportedSetup: It does not fit the module.
        """

    def recall(self, digest: str) -> None:  # noqa: B027 (what is read from files is the same in every run)
        """A training is resumed: go back to what this object prepared for the run before, where that has this digest.

        Args:
            digest: Of what the checkpoint's training was held to.
        """

    @abstractmethod
    def place(self, module: "ClassificationModule") -> None:
        """Bring it to the module's device."""

    @abstractmethod
    def __call__(self, module: "ClassificationModule", images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the loss of a batch, and the figure that is logged.

        Args:
            module: The module.
            images: What it was shown, ``[B, C, H, W]``.
            logits: What it made of them, ``[B, classes]``.
        """


class ReferenceKL(Regularizer):
    """weight·T²·KL(p_θ‖p_ref), with probabilities at temperature T: predictions stay near those of a soup.

    p_ref is of a frozen model with the weights Σ_i c_i·θ_i, in evaluation mode, for the same images. It is the penalty
    of SALSA (:class:`.SalsaPPO`) for classifiers. Its figure is ``train_reference_kl``, the divergence without weight
    and T². A step costs one more forward pass.

    Args:
        checkpoints: Of models with the same classes: see :class:`.SoupReference`.
        coefficients: c, one a checkpoint, with the sum 1; None: all the same.
        weight: Weight in the loss. 0.1 to 1 leaves room to learn.
        temperature: T.
        dtype: Type in which the reference is kept; None: the module's own.

    Raises:
        UnsupportedSetup: A value is out of range; before training: checkpoints that do not fit the module.
    """

    name = "reference_kl"

    def __init__(
        self,
        checkpoints: list[str],
        coefficients: list[float] | None = None,
        weight: float = 1.0,
        temperature: float = 1.0,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        if not (0 <= weight < math.inf and 0 < temperature < math.inf):
            raise UnsupportedSetup(
                f"ReferenceKL(weight={weight}, temperature={temperature}): expected a weight of 0 or more, and a "
                "temperature above 0, both finite."
            )
        self.reference = SoupReference(checkpoints, coefficients, dtype)
        self.weight, self.temperature = weight, temperature
        self._twin: nn.Module | None = None

    def prepare(self, module: "ClassificationModule") -> None:
        """Add the checkpoints up, in a model like the module's."""
        self._twin, self.digest = _twin_of(module, self.reference)

    def place(self, module: "ClassificationModule") -> None:
        """Bring it to the module's device, in the module's type if it has none of its own."""
        self._twin.to(module.device)
        if self.reference.dtype is None:
            self._twin.to(module.dtype)

    def __call__(self, module: "ClassificationModule", images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted divergence, and the divergence."""
        with torch.no_grad():
            reference = self._twin(images.to(next(self._twin.parameters()).dtype))
        kl = kl_divergence(logits / self.temperature, reference / self.temperature).mean()
        return self.weight * self.temperature**2 * kl, kl.detach()


class L2SP(Regularizer):
    """α/2·‖θ − θ_0‖²: weights stay near those that the training started from, or near a soup.

    Its figure is ``train_l2sp``, what is added to the loss. Give the optimizer no weight decay beside it.

    Args:
        weight: α.
        weight_head: β: the classifier's last layer gets β/2·‖θ_head‖² instead, as a layer for new classes does in the
            paper; None: it is held to its start like the rest.
        checkpoints: θ_0 is their mean: see :class:`.SoupReference`; None: what the training starts from.
        coefficients: c, one a checkpoint, with the sum 1; None: all the same.

    Raises:
        UnsupportedSetup: A value is out of range; before training: checkpoints that do not fit the module, or
            parameters that a callback has replaced.

    Source: Li, Grandvalet, Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML
    2018 (arXiv 1802.01483), equation 3.
    """

    name = "l2sp"

    def __init__(
        self,
        weight: float = 0.1,
        weight_head: float | None = None,
        checkpoints: list[str] | None = None,
        coefficients: list[float] | None = None,
    ):
        if not all(0 <= each < math.inf for each in (weight, weight_head or 0)):
            raise UnsupportedSetup(f"L2SP(weight={weight}, weight_head={weight_head}): expected 0 or more, finite.")
        self.weight, self.weight_head = weight, weight_head
        self.reference = None if checkpoints is None else SoupReference(checkpoints, coefficients)
        self._start: dict[str, Tensor] = {}
        self._before: tuple[dict[str, Tensor], str] = {}, ""
        self._head: tuple[str, ...] = ()

    def prepare(self, module: "ClassificationModule") -> None:
        """Take θ_0."""
        if self.reference is None:
            source: nn.Module = module
        else:
            source, _ = _twin_of(module, self.reference)
        trained = {name for name, value in module.named_parameters() if value.requires_grad}
        held = {name: value.detach().clone() for name, value in source.named_parameters() if name in trained}
        if lost := sorted(trained - held.keys()):
            raise UnsupportedSetup(
                f"L2SP: {len(lost)} parameters that are trained are not in the checkpoints, the first is {lost[0]}: "
                "adapters or experts. Use ReferenceKL, which looks at predictions; or hold them to their own start, "
                "with checkpoints=None."
            )
        self._before = self._start, self.digest
        self._start, self.digest = held, open_checkpoint(held).digest()
        layers = head_layers(module.trained_part())
        inside = next((f"{name}." for name, part in module.named_modules() if part is module.trained_part()), "")
        self._head = tuple(f"{inside.lstrip('.')}{layer}." for layer in layers) + ("head.",) * (not layers)

    def recall(self, digest: str) -> None:
        """A module that was trained already is resumed: θ_0 is not what it is by now."""
        if digest == self._before[1]:
            self._start, self.digest = self._before

    def place(self, module: "ClassificationModule") -> None:
        """Bring θ_0 to the module's device and type, and look whether the parameters are still there."""
        self._before = {}, ""
        own = dict(module.named_parameters())
        lost = [name for name in self._start if name not in own or own[name].shape != self._start[name].shape]
        if lost:
            raise UnsupportedSetup(
                f"L2SP: {len(lost)} parameters are not those of the start any more, the first is {lost[0]}: a callback "
                "has replaced them. Use ReferenceKL, which looks at predictions."
            )
        self._start = {name: value.to(own[name]) for name, value in self._start.items()}

    def __call__(self, module: "ClassificationModule", images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty, twice."""
        own = dict(module.named_parameters())
        head = [name for name in self._start if self.weight_head is not None and name.startswith(self._head)]
        held = [name for name in self._start if name not in head]
        penalty = self.weight / 2 * weight_consolidation([own[n] for n in held], [self._start[n] for n in held])
        if head:
            penalty = penalty + self.weight_head / 2 * torch.stack([own[n].float().square().sum() for n in head]).sum()
        return penalty, penalty.detach()


def _twin_of(module: "ClassificationModule", reference: SoupReference) -> tuple[nn.Module, str]:
    """A module built like this one, without adapters and regularizer, with the weights of the reference; its digest."""
    known = _options_of(type(module))
    options: Mapping[str, Any] = {name: value for name, value in module.hparams.items() if name in known}
    # Without adapters; and a head that is written over need not be written in words first.
    changes = {"lora": None, "regularizer": None, "zero_shot": False}
    plain = {name: value for name, value in changes.items() if name in known}
    with torch.random.fork_rng(devices=[]):  # the training is the same with a reference and without
        try:
            twin = type(module)(**{**options, **plain})
        except TypeError as error:
            raise UnsupportedSetup(
                f"A reference is built as the module was, and {type(module).__name__}(**hparams) fails: {error}. Have "
                "it call save_hyperparameters() for all of its arguments."
            ) from error
    inner = getattr(twin, "model", None)
    whole = inner is None or sum(p.numel() for p in inner.parameters()) < sum(p.numel() for p in twin.parameters())
    built_by = "model_name, num_classes, img_size, model_args, classnames"
    digest = reference.into(twin, prefix="", options=built_by) if whole else reference.into(inner, options=built_by)
    return twin.requires_grad_(False).eval(), digest


def _options_of(kind: type) -> set[str]:
    """Names of a class's arguments, those among them that it hands on to its bases by ``**options``."""
    found: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each):
            parameters = inspect.signature(each).parameters.values()
            found |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found
