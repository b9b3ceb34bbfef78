"""TopKMoE: experts with a router, as mixtures of experts usually are; for averaging that is not converted."""

import copy

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.experts import check_count

__all__ = ["TopKMoE"]


class TopKMoE(nn.Module):
    """A mixture of experts: each token goes through the k experts that a linear router scores highest.

    ``y = Σ_{i in top k} g_i·E_i(x)`` with ``g = softmax(router(x))``, renormalised over the k chosen ones for k > 1,
    plus the sum of the shared experts. :attr:`balance_loss`, to be added to the training loss with a small factor, is
    Switch Transformer's: ``N·Σ_i f_i·P_i``, of the share of tokens f_i that have expert i as their first choice and the
    mean probability P_i of it; 1 where tokens are spread evenly.

    Add :class:`.ExpertsWeightAveraging` to average the experts while training (EWA on a naive MoE). The router and the
    shared experts are not averaged, and nothing is converted.

    Args:
        expert: A network on the last dimension of its input, of which ``num_experts`` copies are drawn anew.
        width: D, the dimension of tokens.
        num_experts: N.
        k: Experts a token.
        num_shared: Experts that see every token.

    Shapes: input ``[…, D]``, output the same.

    Attributes:
        balance_loss: Of the last forward pass in training; a scalar with a gradient.

    Raises:
        UnsupportedSetup: Fewer than two experts, or k out of range.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); Fedus et al. 2021 (arXiv 2101.03961), equation 4.
    """

    def __init__(self, expert: nn.Module, width: int, num_experts: int = 4, k: int = 1, num_shared: int = 0):
        super().__init__()
        check_count("num_experts", num_experts, 2)
        check_count("k", k, 1)
        check_count("num_shared", num_shared, 0)
        if k > num_experts:
            raise UnsupportedSetup(f"k={k}: expected 1 to {num_experts} experts a token.")
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(_drawn(expert) for _ in range(num_experts))
        self.shared = nn.ModuleList(_drawn(expert) for _ in range(num_shared))
        self.k = k
        self.balance_loss: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Route each token."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.router(tokens).float().softmax(-1)
        gates, chosen = probabilities.topk(self.k, dim=-1)
        if self.k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if self.training:
            first = torch.bincount(chosen[:, 0], minlength=len(self.experts)).to(probabilities) / max(len(tokens), 1)
            self.balance_loss = len(self.experts) * (first * probabilities.mean(0)).sum()
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            # Also without tokens: its gradients are 0 then and not None, on which DDP would wait.
            rows, places = (chosen == number).nonzero(as_tuple=True)
            weighted = expert(tokens[rows]) * gates[rows, places].unsqueeze(-1).to(tokens.dtype)
            out = out.index_add(0, rows, weighted.to(out.dtype))
        for expert in self.shared:
            out = out + expert(tokens)
        return out.reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"k={self.k}"


def _drawn(expert: nn.Module) -> nn.Module:
    made = copy.deepcopy(expert)
    for part in made.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return made
