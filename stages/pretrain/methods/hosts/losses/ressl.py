"""ReSSL's loss: the student's similarities to a queue of teacher features follow the teacher's.

Source: docs/methods.md#ressl (Eq. 4 to 6).

Shape legend: B images, Q queue entries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def ressl_loss(
    student_BD: Tensor, teacher_BD: Tensor, queue_QD: Tensor, *, tau_s: float = 0.1, tau_t: float = 0.04
) -> Tensor:
    """Mean cross-entropy of softmax(z_s . Q / tau_s) against softmax(z_t . Q / tau_t), a scalar.

    Args:
        student_BD: projections of the strongly augmented views, normalised here.
        teacher_BD: the teacher's projections of the weakly augmented views, normalised here; no gradient.
        queue_QD: unit vectors of the teacher from earlier batches; no gradient.
        tau_s: the student's temperature.
        tau_t: the teacher's temperature.
    """
    teacher_BD, queue_QD = functional.normalize(teacher_BD.detach(), dim=1), queue_QD.detach()
    targets_BQ = torch.softmax(teacher_BD @ queue_QD.T / tau_t, dim=1)
    log_p_BQ = torch.log_softmax(functional.normalize(student_BD, dim=1) @ queue_QD.T / tau_s, dim=1)
    return -(targets_BQ * log_p_BQ).sum(dim=1).mean()
