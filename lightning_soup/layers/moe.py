"""RandomUniformMoE: experts that share the tokens of a batch at random, in place of one feed-forward network."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.experts import check_count, mean_expert

__all__ = ["RandomUniformMoE"]


class RandomUniformMoE(nn.Module):
    """N feed-forward networks, among which each forward pass in training shares out the tokens at random.

    In training the tokens are permuted, cut into N parts of equal length (the first ``M mod N`` have one more), and
    part i goes through expert i: every token meets one expert, with weight 1, whatever it means. The cost is that of
    one network. In evaluation there is one network, whose parameters are the mean of the experts' (gradients flow to
    all of them): what the converted model will do, deterministically.

    Experts run one after another. One batched product for all of them was not faster at any size on a CPU, and slower
    for few tokens, since it has to stack in each pass the weights that experts own (``tests/benchmarks/experts.py``
    shows both); on a GPU it was not measured.

    The permutation is drawn from torch's global generator, so activation checkpointing draws it again alike, and ranks
    differ.

    Args:
        experts: The networks, alike, each working on the last dimension of its input alone.
        scope: ``tokens``: all tokens of the batch are permuted. ``positions``: the positions are, alike for all images,
            as in the code of SS-MoE; with a class token, that always trains one expert only.

    Shapes: input ``[B, …, D]``, output the same.

    Raises:
        UnsupportedSetup: Fewer than two experts, or an unknown scope.

    Source: Huang et al., Experts Weights Averaging (arXiv 2308.06093), random uniform partition.
    """

    def __init__(self, experts: list[nn.Module], scope: Literal["tokens", "positions"] = "tokens"):
        super().__init__()
        check_count("num_experts", len(experts), 2)
        if scope not in ("tokens", "positions"):
            raise UnsupportedSetup(f"scope={scope!r}: expected tokens or positions.")
        self.experts = nn.ModuleList(experts)
        self.scope = scope
        self.training = experts[0].training
        self.register_load_state_dict_pre_hook(_fit_to_experts)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        num_experts: int = 4,
        init: Literal["copy", "independent"] = "copy",
        scope: Literal["tokens", "positions"] = "tokens",
    ) -> "RandomUniformMoE":
        """Make experts of a feed-forward network, which becomes the first of them.

        Args:
            dense: The network.
            num_experts: N.
            init: ``copy``: all have its weights, so the model computes what it did. ``independent``: the others are
                drawn anew, each matrix with the mean and the deviation of the given one; for training from scratch.
            scope: As above.
        """
        if init not in ("copy", "independent"):
            raise UnsupportedSetup(f"init={init!r}: expected copy or independent.")
        check_count("num_experts", num_experts, 2)
        experts = [dense, *(_copy(dense) for _ in range(num_experts - 1))]
        if init == "independent":
            for expert in experts[1:]:
                _draw_anew(expert)
        made = cls(experts, scope)
        _move_hooks(dense, made)
        return made

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Share the tokens out in training; the mean network in evaluation.

        Args:
            x: The tokens.
            *args: What else the block gives its network; every expert is given the same.
            **kwargs: The same by name.

        Raises:
            UnsupportedSetup: There is a tensor among that.
        """
        if args or kwargs:
            _check_extra(self.experts[0], {**dict(enumerate(args, start=2)), **kwargs})
        if not self.training:
            return functional_call(self.experts[0], self.mean_parameters(), (x, *args), kwargs)
        tokens = x.reshape(-1, x.shape[-1]) if self.scope == "tokens" else x.reshape(x.shape[0], -1, x.shape[-1])
        dim = tokens.ndim - 2
        order = torch.randperm(tokens.shape[dim], device=x.device)
        parts = _permute(tokens, order, dim).tensor_split(len(self.experts), dim)
        # An expert without tokens is called, too: its gradients are 0 then and not None, on which DDP would wait.
        done = [expert(part, *args, **kwargs) for expert, part in zip(self.experts, parts, strict=True)]
        return _permute(torch.cat(done, dim), _inverse(order), dim).reshape(x.shape)

    def __getattr__(self, name: str) -> Any:
        """Parts of one network, which blocks may ask for: open_clip looks up the type of ``mlp.c_fc.weight``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_modules", {}).get("experts")
            if not experts or name not in experts[0]._modules:
                raise
            return experts[0]._modules[name]

    def mean_parameters(self) -> dict[str, Tensor]:
        """W̄ by the names of one network, with its floating-point buffers.

        Formed at each use: weights change in ways that no counter shows.
        """
        return mean_expert(self.experts)

    def to_dense(self) -> nn.Module:
        """The network with the mean weights: the first expert itself, changed in place."""
        with torch.no_grad():
            own = {**dict(self.experts[0].named_parameters()), **dict(self.experts[0].named_buffers())}
            for name, mean in self.mean_parameters().items():
                own[name].copy_(mean)
        _move_hooks(self, self.experts[0])
        return self.experts[0]

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"scope={self.scope!r}"


def _fit_to_experts(moe: RandomUniformMoE, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the weights of a plain network to all experts; refuse those of another number of experts."""
    place, count = f"{prefix}experts.", len(moe.experts)
    numbers = {name.removeprefix(place).partition(".")[0] for name in state if name.startswith(place)}
    if numbers and len(numbers) != count:
        raise UnsupportedSetup(
            f"{prefix.rstrip('.')} has {count} experts, but the weights are of {len(numbers)}. Give num_experts="
            f"{len(numbers)}, or load the plain model: open_checkpoint gives it."
        )
    names = list(moe.experts[0].state_dict())
    if not numbers and all(f"{prefix}{name}" in state for name in names):
        for name in names:
            value = state.pop(f"{prefix}{name}")
            state.update({f"{place}{i}.{name}": value for i in range(count)})


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def _copy(network: nn.Module) -> nn.Module:
    """A copy of a network without what watches it; in its parts, the very hooks are called that the network's own call.

    A copied hook would be one that tells nobody.
    """
    known: dict[int, Any] = {}
    for part in network.modules():
        hooks = [vars(part)[name] for name in _HOOKS]
        known |= {id(found): type(found)() if part is network else found for found in hooks if found}
    return copy.deepcopy(network, known)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let what watches one module watch another, which takes its place; handles still remove their hooks."""
    for name in (*_HOOKS, "_is_full_backward_hook"):  # not by attribute: compiled modules pass those on
        vars(source)[name], vars(target)[name] = vars(target)[name], vars(source)[name]


def _check_extra(network: nn.Module, extra: dict[int | str, Any]) -> None:
    """Refuse tensors beside the tokens: it cannot be known whether they belong to tokens and have to be shared out."""
    tensors = ", ".join(str(key) for key, value in extra.items() if isinstance(value, Tensor))
    if tensors:
        raise UnsupportedSetup(
            f"the block gives its feed-forward network ({type(network).__name__}) another tensor beside the tokens "
            f"(argument {tensors}), which experts cannot share out. Leave it out (layers, target)."
        )


class _Permutation(torch.autograd.Function):
    """Gathers forwards and backwards; torch's own gradient of a gather adds, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _permute(gradient, _inverse(order), ctx.dim), None, None


def _permute(x: Tensor, order: Tensor, dim: int) -> Tensor:
    return _Permutation.apply(x, order, dim)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@torch.no_grad()
def _draw_anew(expert: nn.Module) -> None:
    """Draw each matrix with its own mean and deviation; biases, norms and what is frozen are as they are."""
    for parameter in expert.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            mean, deviation = parameter.mean(), parameter.std()
            parameter.normal_().mul_(deviation).add_(mean)
