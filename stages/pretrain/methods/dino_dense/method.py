"""DINO plus dense alignment: the patches of two crops agree where the crops overlap.

Source: docs/methods.md#dino-dense.

These are CoTAP's alignment terms as a method of their own. CoTAP is compared with it, and usually starts from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dino.method import Dino
from stages.pretrain.methods.dino_dense.settings import DinoDenseSettings
from stages.pretrain.methods.shared.overlap import align_patches, assign_patches, views_of
from stages.pretrain.methods.shared.teacher import make_head


class DinoDense(Dino):
    """DINO with a second head, on patches. Terms: align_image, align_patch."""

    settings: DinoDenseSettings
    min_overlap = (0.02, 0.01)  # Source: docs/methods.md#views-and-overlap

    def __init__(self, settings: DinoDenseSettings, encoder: Encoder) -> None:
        super().__init__(settings, encoder, {"dense": make_head(encoder.width, settings.dense_head)})

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """DINO's term, and the dense alignment of every pair of crops."""
        student, teacher = self.student_features(batch), self.teacher_features(batch)
        with torch.no_grad():
            targets = [
                assign_patches(
                    self.teacher.score_map("dense", self.teacher.embed_map("dense", crop.map)), self.settings.dense
                )
                for crop in teacher
            ]
        scores = [self.student.score_map("dense", self.student.embed_map("dense", crop.map)) for crop in student]
        may_flip = self.settings.flip > 0
        return {
            "align_image": self.align_image(student, teacher),
            "align_patch": align_patches(scores, targets, views_of(batch), self.settings.dense, may_flip=may_flip),
        }
