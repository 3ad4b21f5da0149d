"""Dense alignment: the student predicts the teacher's assignments of the patches where two crops overlap.

Source: docs/methods.md#dense-alignment (CoTAP, Eq. 4 and 5).

The order of operations is Leopart's. Teacher: Sinkhorn on its whole grid, then RoIAlign of the soft assignments to the
overlap. Student: RoIAlign of its *scores* to the overlap, then softmax.

Shape legend: R aligned regions (image and crop pairs), K prototypes, S side of the RoIAlign output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_alignment_loss(student_RKSS: Tensor, targets_RKSS: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every cell of an overlap, averaged over the cells.

    Args:
        student_RKSS: the student's scores, resampled to the overlap by RoIAlign.
        targets_RKSS: the teacher's soft assignments, resampled to the same overlap; used without gradient.
        temperature: of the student's softmax.

    Returns:
        (R,), one loss for each region. The paper averages over the student's crops of one target crop, then over the
        target crops. When all ordered pairs of crops are present, this is the mean over R.
    """
    log_p_RKSS = torch.log_softmax(student_RKSS / temperature, dim=1)
    return -(targets_RKSS.detach() * log_p_RKSS).sum(dim=1).mean(dim=(1, 2))
