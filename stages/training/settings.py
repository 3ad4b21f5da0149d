"""How long and with what optimiser to train: the part of a training stage's config that the loop reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.stage import NoFingerprint, Settings, StageConfig, StopPoint


def _unset(value: object) -> bool:
    """What is not set is left out of a dump, and so out of the fingerprint."""
    return value is None


class OptimizerSettings(Settings):
    """Optimiser and its schedules. All schedules are looked up every step (docs/methods.md#optimiser)."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    lr_per: int | None = Field(
        None, ge=1, description="if set, lr is multiplied by batch_size / lr_per (the papers' 'per 256')"
    )
    lr_biases: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of biases and norms, on the schedule of lr and multiplied as it is; default: "
        "lr. LARS leaves them out of its adaptation, so that lr as it stands is often too much for them",
    )
    lr_end: float = Field(1e-6, ge=0, description="what the cosine falls to")
    lr_drops: tuple[float, ...] = Field(
        (),
        description="epochs before the end at which the learning rate is multiplied by lr_drop, in place of the cosine",
    )
    lr_drop: float = Field(0.2, gt=0, le=1, description="see lr_drops")
    lr_power: float | None = Field(
        None,
        gt=0,
        exclude_if=_unset,
        description="the learning rate falls as (1 - t / T) to this power, in place of the cosine; 1: on a line",
    )
    lr_start: float = Field(0.0, ge=0, description="where the warm-up starts")
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_steps: int | None = Field(
        None, ge=1, exclude_if=_unset, description="length of the warm-up in steps, in place of epochs"
    )
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float | None = Field(None, ge=0, description="cosine from weight_decay to this; null: constant")
    decay_all: bool = Field(False, description="decay biases and norms too (ViCE); else only tensors with ndim > 1")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD and LARS")
    betas: tuple[float, float] = (0.9, 0.999)
    trust: float = Field(0.001, gt=0, description="LARS trust coefficient")
    clip: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    clip_mode: Literal["tensor", "global"] = Field("tensor", description="norm of each tensor (DINO family) or of all")

    @model_validator(mode="after")
    def _one_schedule(self) -> OptimizerSettings:
        if self.lr_drops and self.lr_power is not None:
            raise ValueError("lr_drops, lr_power: the learning rate follows one of them; leave the other out")
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError("warmup_steps, warmup_epochs: give one of the two")
        return self

    @field_validator("lr_drops")
    @classmethod
    def _before_the_end(cls, drops: tuple[float, ...]) -> tuple[float, ...]:
        if any(drop <= 0 for drop in drops):
            raise ValueError(f"{list(drops)}: epochs before the end, so numbers above 0")
        return drops


class WatchSettings(Settings):
    """What is measured while training, and when one that has gone wrong is stopped (stages/training/watch.py)."""

    gradients_every: int = Field(
        100,
        ge=0,
        description="steps between measurements of each term's gradient, one more backward pass a term; 0: never",
    )
    min_rank: float = Field(
        1.2, ge=0, description="collapse: effective rank of image vectors or patches below this; 0: never stop for it"
    )
    min_entropy: float = Field(
        0.0,
        ge=0,
        description="collapse: mean entropy of the targets in nats below this; 0: never stop for it (as sharp targets "
        "are normal with Sinkhorn)",
    )
    patience: int = Field(3, ge=1, description="consecutive logged rows that must show a collapse")
    grace: int = Field(
        200,
        ge=0,
        description="steps at the start in which no collapse is looked for: a random encoder's features look collapsed",
    )


class LoopSettings(Settings):
    """How one training goes. Give `epochs` or `steps`, not both."""

    epochs: float | None = Field(None, gt=0, description="passes over the images (all sources together)")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    stop_at: Annotated[int | None, StopPoint] = Field(
        None,
        ge=1,
        description="stop after this many steps of the training, whose schedules keep their length; with a greater "
        "stop_at, or none, the same training goes on from there",
    )
    batch_size: int = Field(256, ge=1, description="images of one optimiser step, over all ranks and passes")
    accumulate: int = Field(
        1,
        ge=1,
        description="forward passes an optimiser step; batch_size is split among them. Batch norms, and what a method "
        "computes over a batch (Sinkhorn's assignments, negatives, covariances), see the images of one pass only, so "
        "that the result is not that of one large pass (docs/methods.md#accumulated-steps)",
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)
    loader_workers: Annotated[int | None, NoFingerprint] = Field(
        None, ge=0, description="processes that load data for each rank; default: what its CPUs allow"
    )
    log_every: Annotated[int, NoFingerprint] = Field(10, ge=1, description="steps between points of a curve")
    watch: Annotated[WatchSettings, NoFingerprint] = WatchSettings()
    checkpoint_every: Annotated[int | None, NoFingerprint] = Field(
        None, ge=1, description="steps between checkpoints; default: by time, as checkpoint_minutes says"
    )
    checkpoint_minutes: Annotated[float, NoFingerprint] = Field(
        10,
        gt=0,
        description="most minutes between checkpoints. They are made sooner, down to every 2 seconds, as long as they "
        "take no more than 2 % of the training's time",
    )

    strategy: Annotated[Literal["ddp", "fsdp2"], NoFingerprint] = Field(
        "ddp",
        description="what each rank holds: a whole copy of the networks, or a share of them and of the optimiser's "
        "state (backbones that are too large for one GPU)",
    )
    max_failures: Annotated[int, NoFingerprint] = Field(
        3,
        ge=-1,
        description="how often a training on Ray Train starts again from its last checkpoint after a rank failed or "
        "was lost; -1: always. Nodes that are taken away with a warning do not count",
    )
    lost_rank_minutes: Annotated[float, NoFingerprint] = Field(
        10,
        gt=0,
        description="how long a rank waits for the others in an exchange before they are taken for lost; the time to "
        "write a checkpoint to the store must fit",
    )

    @model_validator(mode="after")
    def _one_length(self) -> LoopSettings:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs, steps: give exactly one of the two")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.steps is not None and self.stop_at is not None and self.stop_at >= self.steps:
            raise ValueError(f"stop_at: the training has {self.steps} steps; leave stop_at out, or give fewer")
        drops = self.optimizer.lr_drops
        if drops and self.epochs is not None and max(drops) >= self.epochs:
            raise ValueError(
                f"optimizer.lr_drops: {max(drops):g} epochs before the end is before the start of {self.epochs:g} "
                "epochs; leave lr_drops out, or give smaller numbers"
            )
        return self

    def steps_per_epoch(self, images: int) -> int:
        """Whole batches in one pass over `images` images; at least one."""
        return max(1, images // self.batch_size)

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole training over `images` images; at least one."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # _one_length checked it
        return max(1, round(self.epochs * self.steps_per_epoch(images)))


class TrainingConfig(LoopSettings, StageConfig):
    """The base of the config of every stage that trains with the loop."""


def weight_of(weights: Mapping[str, float], term: str) -> float:
    """The weight of a term of the loss; 1 for a term that `weights` does not name."""
    return weights.get(term, 1.0)
