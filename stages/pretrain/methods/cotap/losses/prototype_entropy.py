"""CoTAP's prototype term: every prototype should look like few images of the batch
(docs/methods.md#cotap-object-aware-filter, Eq. 15 and 16).

Shape legend: M prototypes, N images (of all ranks), F = 3 * 3 * C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def prototype_entropy(prototypes_MF: Tensor, images_NF: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Mean entropy of each prototype's softmax over images, divided by N: a scalar >= 0, minimised.

        phi = softmax over images of (l2(U) l2(F)^T / tau3),  L = -1/(N M) sum_ij phi_ij log phi_ij

    Args:
        prototypes_MF: flattened prototypes; the gradient goes here only.
        images_NF: flattened, pooled teacher features; used without gradient. N may be 0 (the term is then 0).

    Source: CoTAP, Eq. 15 and 16.
    """
    if not len(images_NF):
        return prototypes_MF.sum() * 0.0
    similarity_MN = functional.normalize(prototypes_MF, dim=1) @ functional.normalize(images_NF.detach(), dim=1).T
    log_phi_MN = torch.log_softmax(similarity_MN / temperature, dim=1)
    return -(log_phi_MN.exp() * log_phi_MN).mean()
