"""The losses of ZSCL: distillation in the feature space, and weight consolidation.

B reference images, M reference texts, features of D dimensions.

Source: Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, ICCV
2023 (arXiv 2303.06628), sections 3.2 and 3.3.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = ["feature_distillation", "similarities", "weight_consolidation"]


def similarities(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Z = τ⁻¹·⟨image, text⟩ of features brought to unit length.

    Args:
        images: ``[B, D]``.
        texts: ``[M, D]``.
        scale: τ⁻¹, which is exp(logit_scale).

    Returns:
        ``[B, M]``.
    """
    return scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def feature_distillation(z_t: Tensor, z_s: Tensor, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """L_img and L_txt: how far the student's similarities are from the teacher's.

    ``D(Z_t, Z_s) = T²·mean_rows(−Σ_j softmax(Z_t/T)_j·log_softmax(Z_s/T)_j)``; L_img = D(Z_t, Z_s) has a distribution
    over the texts for each image, L_txt = D(Z_tᵀ, Z_sᵀ) one over the images for each text. It is a cross entropy: its
    gradient is that of the KL divergence, and its smallest value T² times the entropy of the teacher.

    Args:
        z_t: Similarities of the teacher, ``[B, M]``; no gradient flows into them.
        z_s: Similarities of the student, ``[B, M]``.
        temperature: T, above 0.

    Returns:
        L_img and L_txt.

    Raises:
        UnsupportedSetup: Shapes that differ, or a temperature that is not above 0.
    """
    if z_t.shape != z_s.shape or z_t.ndim != 2 or not temperature > 0:
        raise UnsupportedSetup(
            f"feature_distillation: got similarities {list(z_t.shape)} and {list(z_s.shape)} at temperature "
            f"{temperature}; expected two of the same shape [images, texts], and a temperature above 0."
        )
    return _soft_cross_entropy(z_t, z_s, temperature), _soft_cross_entropy(z_t.T, z_s.T, temperature)


def _soft_cross_entropy(z_t: Tensor, z_s: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(z_s.dtype, torch.float32)  # softmax and sums lose too much in 16 bits
    target = (z_t.detach().to(wide) / temperature).softmax(dim=1)
    return temperature**2 * F.cross_entropy(z_s.to(wide) / temperature, target)


def weight_consolidation(weights: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """L_WC = Σ_i (θ_i − θ_start,i)²: a sum over all weights, not a mean, so its λ depends on their number.

    Args:
        weights: θ, tensor by tensor.
        start: θ_start, in the same order.

    Raises:
        UnsupportedSetup: No weights, or another number of tensors at the start.
    """
    weights, start = list(weights), list(start)
    if not weights or len(weights) != len(start):
        raise UnsupportedSetup(
            f"weight_consolidation: got {len(weights)} tensors and {len(start)} of the start; expected as many of "
            "both, and one or more."
        )
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    return torch.stack([(now - then).square().sum(dtype=wide) for now, then in zip(weights, start, strict=True)]).sum()
