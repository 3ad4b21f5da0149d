"""Dense alignment of two crops over their overlap, in Leopart's order
(docs/methods.md#dense-alignment, CoTAP Eq. 4 and 5).

Leopart's order: Sinkhorn on the whole target grid, RoIAlign of the soft assignments; RoIAlign of the student's
*scores*, softmax afterwards.

Shape legend: R aligned regions (image and crop pairs), K prototypes, S side of the RoIAlign output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_alignment_loss(student_RKSS: Tensor, targets_RKSS: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every cell of an overlap, averaged over the cells.

    Args:
        student_RKSS: the student's scores, RoIAligned to the overlap.
        targets_RKSS: the teacher's soft assignments, RoIAligned to the same overlap; used without gradient.

    Returns: (R,) one loss a region. Average over the online crops of a target crop (dividing by their number,
        crops - 1), then over target crops: with all ordered pairs present that is the plain mean over R.
    """
    log_p_RKSS = torch.log_softmax(student_RKSS / temperature, dim=1)
    return -(targets_RKSS.detach() * log_p_RKSS).sum(dim=1).mean(dim=(1, 2))
