"""How long and with what optimiser to train: the part of a pre-train stage's config that the loop owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.stage import NoFingerprint, Settings


class OptimizerSettings(Settings):
    """Optimiser and its schedules. All schedules are looked up every step (docs/methods.md#optimiser)."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    lr_per: int | None = Field(
        None, ge=1, description="if set, lr is multiplied by batch_size / lr_per (the papers' 'per 256')"
    )
    lr_end: float = Field(1e-6, ge=0, description="what the cosine falls to")
    lr_start: float = Field(0.0, ge=0, description="where the warm-up starts")
    warmup_epochs: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float | None = Field(None, ge=0, description="cosine from weight_decay to this; None: constant")
    decay_all: bool = Field(False, description="decay biases and norms too (ViCE); else only tensors with ndim > 1")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD and LARS")
    betas: tuple[float, float] = (0.9, 0.999)
    trust: float = Field(0.001, gt=0, description="LARS trust coefficient")
    clip: float | None = Field(None, gt=0, description="largest gradient norm; None: no clipping")
    clip_mode: Literal["tensor", "global"] = Field("tensor", description="norm of each tensor (DINO family) or of all")


class WatchSettings(Settings):
    """What is measured while training, and when a run that has gone wrong is stopped (watch.py)."""

    gradients_every: int = Field(
        100, ge=0, description="steps between measurements of each term's gradient: a backward pass a term; 0: never"
    )
    min_rank: float = Field(
        1.2, ge=0, description="collapse: effective rank of image vectors or patches below this; 0: never stop for it"
    )
    min_entropy: float = Field(
        0.0,
        ge=0,
        description="collapse: mean entropy of the targets in nats below this; Sinkhorn's may be sharp",
    )
    patience: int = Field(3, ge=1, description="logged rows in a row that must show a collapse")
    grace: int = Field(
        200, ge=0, description="steps at the start in which no collapse is looked for: random encoders look like one"
    )


class LoopSettings(Settings):
    """One training run. Give `epochs` or `steps`, not both."""

    epochs: float | None = Field(None, gt=0, description="passes over the images (all sources together)")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(256, ge=1, description="images a step over all workers and accumulation")
    accumulate: int = Field(1, ge=1, description="forward passes an optimiser step; batch_size is split among them")
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)
    renderer: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="who turns draws into pixels: OpenCV in loader processes, or torch on the GPU"
    )
    loader_workers: Annotated[int | None, NoFingerprint] = Field(
        None, ge=0, description="loader processes a training worker; default: what its CPUs allow"
    )
    log_every: Annotated[int, NoFingerprint] = Field(10, ge=1, description="steps between points of a curve")
    watch: Annotated[WatchSettings, NoFingerprint] = WatchSettings()
    checkpoint_every: Annotated[int | None, NoFingerprint] = Field(
        None, ge=1, description="steps between checkpoints; default: a twentieth of the run"
    )

    @model_validator(mode="after")
    def _one_length(self) -> LoopSettings:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs, steps: give exactly one of the two")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch_size {self.batch_size}")
        return self

    def steps_per_epoch(self, images: int) -> int:
        """Whole batches in one pass over `images` images; at least one."""
        return max(1, images // self.batch_size)

    def total_steps(self, images: int) -> int:
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # the validator saw to it
        return max(1, round(self.epochs * self.steps_per_epoch(images)))


def weight_of(weights: Mapping[str, float], term: str) -> float:
    """The weight of a term of the loss; 1 for a term that `weights` does not name."""
    return weights.get(term, 1.0)
