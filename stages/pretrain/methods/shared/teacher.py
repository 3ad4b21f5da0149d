"""Self-distillation without its losses: a student, a teacher that is its moving average, and the features of both.

Shape legend: V views of one kind, B images of this rank, I of further images, S side of a view, D width of the
encoder's features, h w sides of a map, N = h w cells, d width of a head's embedding, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder, Features
from stages.models.heads import ProjectionHead
from stages.pretrain.config.parts import Export, HeadSettings, TeacherSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.training.schedules import cosine


class SelfDistillation(Method):
    """Base of `dino`, `dino_dense`, `cotap` and `flsl`: all but the views and the terms."""

    def __init__(self, student: Branch, settings: TeacherSettings, export: Export) -> None:
        super().__init__()
        self.student = student
        self.teacher = make_teacher(student)
        self.teacher_settings = settings
        self.export = export

    def student_features(self, batch: Batch) -> list[Features]:
        """The student's features of all crops, global ones first; one forward pass for each size of crop."""
        return self.student.encode(batch.views[name] for name in ("global", "local") if name in batch.views)

    @torch.no_grad()
    def teacher_features(self, batch: Batch, *more: Tensor) -> list[Features]:
        """The teacher's features of the global crops, then of `more`, all in one forward pass.

        Args:
            batch: this rank's.
            more: further images (I, 3, S, S) of the global crops' size; I may be 0, and differ between ranks.
        """
        stacks = [*batch.views["global"], *more]
        counts = [len(stack) for stack in stacks]
        vectors, maps = self.teacher.encoder(torch.cat(stacks))
        return [Features(*pair) for pair in zip(vectors.split(counts), maps.split(counts), strict=True)]

    def after_step(self, step: Step) -> None:
        """Brings the heads' prototypes back to their length, then moves the teacher."""
        for head in self.student.heads.values():
            assert isinstance(head, ProjectionHead)
            head.renormalise()
        settings = self.teacher_settings
        momentum = cosine(step.index, step.total, settings.momentum, settings.momentum_end)
        move_teacher(self.teacher, self.student, momentum)

    def encoder(self) -> Encoder:
        """The encoder of the branch that `export` names."""
        return (self.student if self.export == "student" else self.teacher).encoder


class Branch(nn.Module):
    """A student or a teacher: an encoder and its named heads."""

    def __init__(self, encoder: Encoder, heads: dict[str, ProjectionHead]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def head(self, name: str) -> ProjectionHead:
        """The head of that name."""
        head = self.heads[name]
        assert isinstance(head, ProjectionHead)
        return head

    def encode(self, views: Iterable[Tensor]) -> list[Features]:
        """Features of every view in order, from one forward pass for each stack of views (V, B, 3, S, S)."""
        features = []
        for view_VB3SS in views:
            vector, maps = self.encoder(view_VB3SS.flatten(0, 1))
            count = len(view_VB3SS)
            features += [Features(*pair) for pair in zip(vector.chunk(count), maps.chunk(count), strict=True)]
        return features

    def embed_map(self, name: str, map_BDhw: Tensor) -> Tensor:
        """A head's embedding of every cell, of length 1: (B, d, h, w)."""
        embeddings_BNd = self.head(name).embed(map_BDhw.flatten(2).transpose(1, 2))
        return embeddings_BNd.transpose(1, 2).reshape(len(map_BDhw), -1, *map_BDhw.shape[2:])

    def score_map(self, name: str, embeddings_Bdhw: Tensor) -> Tensor:
        """A head's scores of every embedded cell against its prototypes: (B, K, h, w)."""
        scores_BNK = self.head(name).score(embeddings_Bdhw.flatten(2).transpose(1, 2))
        return scores_BNK.transpose(1, 2).reshape(len(embeddings_Bdhw), -1, *embeddings_Bdhw.shape[2:])


def make_teacher(student: Branch) -> Branch:
    """A copy of the student without gradients and without stochastic depth."""
    return Branch(
        student.encoder.teacher(), {name: copy.deepcopy(student.head(name)) for name in student.heads}
    ).requires_grad_(False)


def make_head(width: int, settings: HeadSettings, *, prototypes: int | None = None) -> ProjectionHead:
    """A projection head for features of a width, with the settings' number of prototypes unless another is given."""
    return ProjectionHead(
        width,
        settings.prototypes if prototypes is None else prototypes,
        hidden=settings.hidden,
        bottleneck=settings.bottleneck,
        fixed_gain=settings.fixed_gain,
    )


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moves the teacher towards the student: teacher <- m teacher + (1 - m) student.

    Parameters only: the teacher's batch norms keep their own running statistics.

    Source: docs/methods.md#ema-and-schedules.
    """
    moving: list[Tensor] = list(teacher.parameters())
    target: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(moving, target, 1 - momentum)
