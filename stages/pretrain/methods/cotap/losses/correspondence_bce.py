"""Binary cross-entropy on the similarities of patch pairs: the baseline that CoTAP's ranking loss replaces.

Source: docs/methods.md#cotap-ranking-loss (Eq. 8).

Shape legend: B image pairs, N patch pairs of one image pair.
"""

from __future__ import annotations

import torch
from torch import Tensor


def correspondence_bce(p_BN: Tensor, q_BN: Tensor, *, margin: float = 1e-6) -> Tensor:
    """-mean[q log p + (1 - q) log(1 - p)] for each image pair: (B,).

    Args:
        p_BN: student similarities in [0, 1].
        q_BN: teacher similarities in [0, 1]; used without gradient.
        margin: p is clamped to [margin, 1 - margin], so that the logarithms are finite.
    """
    wide = torch.promote_types(p_BN.dtype, torch.float32)
    p_BN, q_BN = p_BN.to(wide).clamp(margin, 1 - margin), q_BN.detach().to(wide)
    return -(q_BN * p_BN.log() + (1 - q_BN) * (1 - p_BN).log()).mean(dim=1)
