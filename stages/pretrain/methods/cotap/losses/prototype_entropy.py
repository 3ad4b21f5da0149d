"""CoTAP's prototype term: every prototype should be similar to few images of the batch.

Source: docs/methods.md#cotap-object-aware-filter (Eq. 15 and 16).

Shape legend: M prototypes, N images of all ranks, F = 3 * 3 * C values of a prototype or of a pooled image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def prototype_entropy(prototypes_MF: Tensor, images_NF: Tensor, *, temperature: float = 0.1) -> Tensor:
    """The entropy of each prototype's softmax over images, averaged over prototypes and divided by N: a scalar >= 0.

        phi = softmax over images of (l2(U) l2(F)^T / tau3),  L = -1/(N M) sum_ij phi_ij log phi_ij

    Args:
        prototypes_MF: flattened prototypes; the gradient goes here only.
        images_NF: flattened, pooled teacher features; used without gradient. If N is 0, the term is 0.
        temperature: tau3.
    """
    if not len(images_NF):
        return prototypes_MF.sum() * 0.0
    similarity_MN = functional.normalize(prototypes_MF, dim=1) @ functional.normalize(images_NF.detach(), dim=1).T
    log_phi_MN = torch.log_softmax(similarity_MN / temperature, dim=1)
    return -(log_phi_MN.exp() * log_phi_MN).mean()
