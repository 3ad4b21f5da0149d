"""Puts one rank's training together from a config and its input artifacts.

No Ray: the Ray Train worker, the driver's own process and the benchmarks all call this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import SourceError, UsageError
from pipeline.store.artifact import Artifact
from stages.data.tables import Table
from stages.models.encoder import Encoder
from stages.models.sync_batch_norm import convert
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.data.loader import ImageSource, TrainData
from stages.pretrain.methods.method import Method
from stages.pretrain.views.plan import ViewPlan
from stages.training.loop import Training

OWN = "method."  # how the paths of a method's own inputs begin


@dataclass(frozen=True)
class Pretraining(Training):
    """A training whose parts are a method and its views."""

    method: Method
    data: TrainData


def assemble(
    config: PretrainConfig,
    inputs: Mapping[str, Artifact],
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    loader_workers: int = 0,
) -> Pretraining:
    """The method, its data and its schedule lengths, for `rank` of `world_size`.

    Args:
        config: of the stage.
        inputs: finished artifacts by dotted input path ("images", "init", "method.neighbors", ...).
        rank: which part of every batch this is, from 0.
        world_size: how many ranks share a batch.
        device: where the batches end up.
        loader_workers: processes that read and render images; 0 does it in this one.

    Raises:
        SourceError: when the chosen split has no image.
        UsageError: when the method cannot use the encoder.
        ValueError: when the numbers do not fit together, which stages/pretrain/fit.py finds before.
    """
    device = torch.device(device)
    sources = image_sources(config, inputs)
    images = sum(len(source.chosen) for source in sources)
    total_steps, steps_per_epoch = config.total_steps(images), config.steps_per_epoch(images)

    # Student, heads and queues start the same on every rank and in every world size.
    torch.manual_seed(config.seed)
    encoder = Encoder.load(inputs["init"]) if config.backbone is None else Encoder.build(config.backbone)
    _require_sizes(config, encoder)
    try:
        method = config.method.build(
            encoder, total_steps=total_steps, steps_per_epoch=steps_per_epoch, global_batch=config.batch_size
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    method.encoder().require_savable()
    method.use_inputs({path[len(OWN) :]: artifact for path, artifact in inputs.items() if path.startswith(OWN)})
    if world_size > 1:
        convert(method)  # batch norms see the global batch
    method.use_sources([source.role for source in sources])
    data = train_data(
        config,
        sources,
        method.view_plan(),
        encoder,
        rank=rank,
        world_size=world_size,
        device=device,
        loader_workers=loader_workers,
    )
    return Pretraining(method, data, config, config.method.term_weights(), total_steps, steps_per_epoch, device)


def _require_sizes(config: PretrainConfig, encoder: Encoder) -> None:
    """Raises UsageError for views that a backbone does not take whose sizes no plan knows. A plan checks the others."""
    for path, size in () if encoder.is_vit or encoder.is_resnet else config.method.view_sizes():
        if (refusal := encoder.refuses(size)) is not None:
            raise UsageError(f"{OWN}{path}: {': '.join(refusal)}")


def train_data(
    config: PretrainConfig,
    sources: Sequence[ImageSource],
    plan: ViewPlan,
    encoder: Encoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    loader_workers: int = 0,
) -> TrainData:
    """The batches of `rank` of `world_size`; as it stands, whole batches rendered in this process on the CPU."""
    return TrainData(
        sources,
        plan,
        global_batch=config.batch_size // config.accumulate,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        workers=loader_workers,
        renderer=config.renderer,
        device=device,
        mean=encoder.mean,
        std=encoder.std,
    )


def image_sources(config: PretrainConfig, inputs: Mapping[str, Artifact]) -> list[ImageSource]:
    """The image sets to mix, each with the method's tables that were made from it."""
    tables = {
        path: artifact for path, artifact in inputs.items() if path.startswith(OWN) and artifact.kind != "encoder"
    }
    sources = []
    for path, mix in config.image_sources():
        artifact = inputs[path]
        mine = {a.kind: Table.open(a) for a in tables.values() if made_from(a, artifact)}
        sources.append(
            ImageSource(
                images=Table.open(artifact, columns=["image_id", "key", "image", "width", "height"]),
                ids=_split_ids(artifact, config.split, path),
                weight=mix.weight,
                role=mix.role,
                boxes=mine.get("boxes"),
                superpixels=mine.get("superpixels"),
                neighbors=mine.get("neighbors"),
                embeddings=mine.get("embeddings"),
            )
        )
    return sources


def made_from(table: Artifact, images: Artifact) -> bool:
    """Whether a table (boxes, superpixels, neighbours) describes this image set, by its manifest."""
    origin = table.manifest.inputs.get("images") or table.manifest.notes.get("images")
    return origin == f"{images.kind}/{images.fingerprint}"


def _split_ids(artifact: Artifact, split: str | None, path: str) -> list[int]:
    table = Table.open(artifact, columns=["image_id", "split"])
    splits = [str(value) for value in table.column("split")]
    wanted = split or ("train" if "train" in splits else None)
    ids = [int(i) for i, name in zip(table.ids, splits, strict=True) if wanted is None or name == wanted]
    if not ids:
        raise SourceError(f"{path}: no image of split {wanted!r}; there are {', '.join(sorted(set(splits)))}")
    return ids
