"""CoTAP: semantic concentration for dense representations. The equation numbers are the paper's.

Source: docs/methods.md#cotap.

Terms: align_patch (Eq. 4, 5), align_image, sc_patch (Eq. 2, 12), sc_image, proto (Eq. 15, 16). A term of weight 0 is
not computed, and a head that no term needs is not made.

Shape legend: V crops (G global ones first), B images of this rank, I of them those that a term is about (of all ranks
where they are gathered), C width of the encoder's map, D width of features or embeddings, h w sides of a map, K
prototypes of a head, N patches of a view (or pairs of patches), M prototypes of the filter, F values of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from stages.models.encoder import Encoder, Features
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.heads import ProjectionHead, at_least_float32
from stages.pretrain.config.parts import HeadSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.dino_loss import dino_loss
from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.losses.soft_cross_entropy import soft_cross_entropy
from stages.pretrain.methods.cotap.losses.correspondence_bce import correspondence_bce
from stages.pretrain.methods.cotap.losses.cotap_ranking import cotap_ranking_loss
from stages.pretrain.methods.cotap.losses.prototype_entropy import prototype_entropy
from stages.pretrain.methods.cotap.settings import CoTAPSettings, FilterSettings
from stages.pretrain.methods.shared.assignments import entropy, usage
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.methods.shared.overlap import align_patches, assign_patches, mean_of, resample, views_of
from stages.pretrain.methods.shared.pairing import random_partners
from stages.pretrain.methods.shared.teacher import Branch, SelfDistillation, make_head
from stages.pretrain.views.geometry import overlap
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.collectives import all_reduce_max, all_reduce_sum, gather, gather_with_gradient


class CoTAP(SelfDistillation):
    """Student and teacher with an object-aware filter. The image-level terms see object-centric images only."""

    def __init__(self, settings: CoTAPSettings, encoder: Encoder) -> None:
        add_filter(encoder, settings.filter)  # before the heads, whose widths include it
        uses = settings.uses
        heads: dict[str, ProjectionHead] = {}
        if uses("align_image") or uses("sc_image"):
            heads["image"] = self._make_head(encoder.vector_width, settings.image_head, settings)
        if uses("align_patch") or (uses("sc_patch") and settings.ranking.feature == "head"):
            # sc_patch alone compares embeddings: the head then has no prototypes.
            scored = settings if uses("align_patch") else None
            heads["dense"] = self._make_head(encoder.width, settings.dense_head, scored)
        super().__init__(Branch(encoder, heads), settings.teacher, settings.export)
        self.settings = settings
        self.roles: tuple[str, ...] | None = None
        self._targets_IK: Tensor | None = None  # of align_image in the last forward pass

    @staticmethod
    def _make_head(width: int, head: HeadSettings, settings: CoTAPSettings | None) -> ProjectionHead:
        embeddings_only = settings is None or settings.literal_feature_softmax
        return make_head(width, head, prototypes=0 if embeddings_only else None)

    def use_sources(self, roles: Sequence[str]) -> None:
        """Keeps the roles: the image-level terms see images from sources of role "objects" only."""
        self.roles = tuple(roles)

    def view_plan(self) -> ViewPlan:
        """Global crops, local ones for the alignment terms, and for sc_image one view of a neighbour."""
        settings = self.settings
        colour = crop_colours((0.8, 0.8, 0.8, 0.2), blur_p=0.5)
        globals_, locals_ = settings.global_crops, settings.local_crops

        def spec(name: str, size: int, count: int, scale: tuple[float, float], min_overlap: float) -> ViewSpec:
            return ViewSpec(
                name,
                size,
                count,
                scale,
                flip_p=settings.flip,
                photometric=colour,
                min_overlap=min_overlap,
                overlap_with="global",
            )

        views = [spec("global", globals_.size, globals_.count, globals_.scale, 0.02)]
        if locals_.count and (settings.uses("align_patch") or settings.uses("align_image")):
            views.append(spec("local", locals_.size, locals_.count, locals_.scale, 0.01))
        if settings.uses("sc_image"):
            views.append(
                ViewSpec(
                    "neighbor",
                    globals_.size,
                    1,
                    globals_.scale,
                    flip_p=settings.flip,
                    photometric=colour,
                    of="neighbor",
                )
            )
        return ViewPlan(tuple(views), tables=("neighbors",) if settings.uses("sc_image") else ())

    # -- terms -----------------------------------------------------------------------------------------------

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The terms that have a weight. Student and teacher run once for all of them."""
        uses, globals_ = self.settings.uses, self.settings.global_crops.count
        objects_B = self._object_centric(batch)
        student = self.student_features(batch)
        # Only neighbours that a term is about: others would count in the teacher's batch norms.
        teacher = self.teacher_features(batch, *([_neighbors(batch, objects_B)] if uses("sc_image") else []))
        teacher, neighbors = teacher[:globals_], teacher[globals_:]
        terms: dict[str, Tensor] = {}
        # The dense head runs once on every map. Both patch terms use its embeddings.
        embedded = self._dense_embeddings(student, teacher)
        if uses("align_patch"):
            terms["align_patch"] = self._align_patch(batch, *embedded)
        if uses("align_image"):
            terms["align_image"] = self._align_image(student, teacher, objects_B)
        if uses("sc_patch"):
            maps = embedded if self.settings.ranking.feature == "head" else _unit_maps(student, teacher)
            terms["sc_patch"] = self._sc_patch(batch, *maps)
        if uses("sc_image"):
            with_neighbor_B = objects_B & _has_neighbor(batch)
            terms["sc_image"] = self._sc_image(student[0].vector[with_neighbor_B], neighbors[0].vector)
        if uses("proto"):
            terms["proto"] = self._proto(teacher[0], objects_B)
        return terms

    def _align_patch(self, batch: Batch, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """L_align: the student predicts the teacher's assignments of patches where crops overlap (Eq. 4 and 5)."""
        dense = self.settings.dense
        with torch.no_grad():
            targets = [assign_patches(self.teacher.score_map("dense", map_BDhw), dense) for map_BDhw in teacher]
        scores = [self.student.score_map("dense", map_BDhw) for map_BDhw in student]
        return align_patches(scores, targets, views_of(batch), dense, may_flip=self.settings.flip > 0)

    def _align_image(self, student: list[Features], teacher: list[Features], objects_B: Tensor) -> Tensor:
        """Lbar_align: the same for the object-centric images' vectors, over all ordered pairs of crops."""
        with torch.no_grad():
            teacher_GIK = self.teacher.head("image")(torch.stack([crop.vector[objects_B] for crop in teacher]))
            targets_GIK = torch.stack([self._assign_images(scores_IK) for scores_IK in teacher_GIK])
            self._targets_IK = targets_GIK.flatten(0, 1)
        student_VIK = self.student.head("image")(torch.stack([crop.vector[objects_B] for crop in student]))
        return mean_of(dino_loss(student_VIK, targets_GIK, temperature=self.settings.dense.temperature))

    def _sc_patch(self, batch: Batch, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """L_sc: the student ranks the pairs of patches of two images as the teacher does (Eq. 2 and 12).

        An image's partner may be one of another rank, whose map is then gathered from there.
        """
        ranking = self.settings.ranking
        partner_B = random_partners(batch)
        valid_B = torch.ones(len(batch), dtype=torch.bool, device=partner_B.device)
        online, target = student[0], teacher[0]
        if ranking.pairs == "cross_view":
            first, second = views_of(batch)[:2]
            box_a, box_b, valid_B = overlap(first.affine, second.affine, first.size, second.size)
            grid, may_flip = self.settings.dense.grid, self.settings.flip > 0
            online = resample(online, box_a, first, grid, may_flip=may_flip)
            target = resample(teacher[1], box_b, second, grid, may_flip=may_flip)
            valid_B = valid_B & gather(valid_B.long())[partner_B].bool()
        p_BN = self._similarities(online, partner_B)
        with torch.no_grad():
            q_BN = self._similarities(target, partner_B)
        if ranking.loss == "bce":
            if ranking.similarity_range == "cosine":
                p_BN, q_BN = 0.5 * p_BN + 0.5, 0.5 * q_BN + 0.5  # cross-entropy needs values in [0, 1]
            return mean_of(correspondence_bce(p_BN, q_BN), valid_B)
        return mean_of(cotap_ranking_loss(p_BN, q_BN, tau1=ranking.tau1, tau2=ranking.tau2), valid_B)

    def _similarities(self, map_BDhw: Tensor, partner_B: Tensor) -> Tensor:
        """S(u, v) of Eq. 2, flattened: every patch of an image with every patch of its partner, (B, N * N).

        Args:
            map_BDhw: of this rank's images.
            partner_B: each one's partner, a row of the global batch.
        """
        # RoIAlign averages unit vectors. Normalise again, so that similarities keep their range.
        unit_BDN = functional.normalize(at_least_float32(map_BDhw.flatten(2)), dim=1)
        others_BDN = gather_with_gradient(unit_BDN)[partner_B]
        with torch.autocast(unit_BDN.device.type, enabled=False):
            cosine_BN = torch.bmm(unit_BDN.transpose(1, 2), others_BDN).flatten(1)
        return 0.5 * cosine_BN + 0.5 if self.settings.ranking.similarity_range == "unit" else cosine_BN

    def _sc_image(self, student_IC: Tensor, neighbor_IC: Tensor) -> Tensor:
        """Lbar_sc: the student's view 1 of an image predicts the teacher's assignment of the neighbour.

        Args:
            student_IC: vectors of the object-centric images that have a neighbour.
            neighbor_IC: the teacher's vectors of their neighbours.
        """
        with torch.no_grad():
            targets_IK = self._assign_images(self.teacher.head("image")(neighbor_IC))
        scores_IK = self.student.head("image")(student_IC)
        return mean_of(soft_cross_entropy(scores_IK, targets_IK, temperature=self.settings.dense.temperature))

    def _proto(self, teacher: Features, objects_B: Tensor) -> Tensor:
        """L_proto of the filter's prototypes U and the images of all ranks; only U gets a gradient (Eq. 15, 16).

        The images are the teacher's maps of view 1 before the filter.
        """
        assert self.settings.filter is not None
        student_filter: ObjectAwareFilter = self.student.encoder.filter
        unfiltered_BChw = teacher.map[:, : self.student.encoder.backbone_width]
        images_IF = gather(student_filter.pooled(at_least_float32(unfiltered_BChw[objects_B])))
        prototypes_MF = student_filter.prototypes.flatten(1)
        return prototype_entropy(prototypes_MF, images_IF, temperature=self.settings.filter.temperature)

    # -- pieces ----------------------------------------------------------------------------------------------

    def _dense_embeddings(self, student: list[Features], teacher: list[Features]) -> tuple[list[Tensor], list[Tensor]]:
        """The dense head's embeddings (B, D, h, w) of the crops that the terms need: the student's, the teacher's."""
        if "dense" not in self.student.heads:
            return [], []
        crops = student if self.settings.uses("align_patch") else student[:1]
        with torch.no_grad():
            targets = [self.teacher.embed_map("dense", crop.map) for crop in teacher]
        return [self.student.embed_map("dense", crop.map) for crop in crops], targets

    def _assign_images(self, scores_IK: Tensor) -> Tensor:
        """Soft assignments of images: Sinkhorn over those of all ranks."""
        dense = self.settings.dense
        return sinkhorn(
            scores_IK,
            epsilon=dense.epsilon,
            iterations=dense.iterations,
            all_reduce=all_reduce_sum,
            all_reduce_max=all_reduce_max,
        )

    def _object_centric(self, batch: Batch) -> Tensor:
        """(B,) bool: the images that the image-level terms see. All of them if no roles were given."""
        if self.roles is None:
            return torch.ones_like(batch.source, dtype=torch.bool)
        is_object = torch.tensor([role == "objects" for role in self.roles], device=batch.source.device)
        return is_object[batch.source]

    def diagnostics(self) -> dict[str, float]:
        """Entropy of the teacher's image assignments and the share of prototypes in use.

        Both are over the object-centric images of all ranks in the last forward pass; nothing where there was none.
        """
        if self._targets_IK is None:
            return {}
        targets_IK = gather(self._targets_IK)
        if not len(targets_IK):
            return {}
        return {"teacher_entropy": entropy(targets_IK).item(), "prototype_usage": usage(targets_IK).item()}


def _has_neighbor(batch: Batch) -> Tensor:
    assert batch.neighbor_ids is not None
    return batch.neighbor_ids >= 0


def _neighbors(batch: Batch, chosen_B: Tensor) -> Tensor:
    """The views (I, 3, S, S) of the chosen images' neighbours, of those that have one."""
    return batch.views["neighbor"][0][chosen_B[_has_neighbor(batch)]]


def _unit_maps(student: list[Features], teacher: list[Features]) -> tuple[list[Tensor], list[Tensor]]:
    """The encoder's own maps in place of embeddings, every cell of length 1: student's view 1, teacher's views."""
    return (
        [functional.normalize(at_least_float32(crop.map), dim=1) for crop in student[:1]],
        [functional.normalize(at_least_float32(crop.map), dim=1) for crop in teacher],
    )


def add_filter(encoder: Encoder, settings: FilterSettings | None) -> None:
    """Gives the encoder the object-aware filter of the settings, unless it has this filter from an earlier training.

    Source: docs/methods.md#cotap-object-aware-filter.

    Raises:
        ValueError: if `pre_last` is set for a backbone that is not a ViT, or the encoder has a different filter.
    """
    if settings is None:
        return
    if settings.placement == "pre_last" and not encoder.is_vit:
        raise ValueError("method.filter.placement: pre_last needs a ViT's last block; use post for this backbone")
    heads = settings.heads
    if heads is None:
        heads = int(encoder.model.blocks[0].attn.num_heads) if encoder.is_vit else 1
    wanted = ObjectAwareFilter(
        encoder.backbone_width,
        settings.prototypes,
        heads=heads,
        out_projection=settings.out_projection,
        placement=settings.placement,
    )
    if encoder.filter is None:
        encoder.filter = wanted
    elif encoder.filter.settings() != wanted.settings():
        raise ValueError(
            f"method.filter asks for {wanted.settings()}, but the encoder it starts from has a filter of "
            f"{encoder.filter.settings()}: set method.filter to the same"
        )
