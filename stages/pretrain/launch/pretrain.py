"""The `pretrain` stage's work, as the driver sees it: what it says, and what it hands to the launcher.

Imports no torch: with Ray Train the driver needs none (stages/training/launch).
"""

from __future__ import annotations

from functools import partial

from pipeline.stage import Context, Outcome
from stages.pretrain.config.continuing import CONTINUE
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import check_start, usable_counts
from stages.training.launch.start import start
from stages.training.launch.work import Launch


def pretrain(config: PretrainConfig, context: Context) -> Outcome:
    """Train (or continue), save the encoder, its curves and its pictures."""
    if config.accumulate > 1:
        context.say(f"{context.name}: {accumulated(config)}")
    if config.backbone is not None:  # the workers' working folder is not the driver's
        config = config.model_copy(update={"backbone": config.backbone.anywhere()})
    if CONTINUE in context.inputs:
        before = context.inputs[CONTINUE].manifest
        length = f"{config.steps} steps" if config.steps is not None else f"{config.epochs:g} epochs"
        context.say(
            f"goes on from step {before.counts['steps']} of '{before.stage}' towards {length} in all; learning rate "
            "and all other schedules are, from here on, those of one training of that length"
        )
    outcome = start(
        Launch(
            config,
            work="stages.pretrain.launch.work:PretrainWork",
            loader="stages.pretrain.data.loader",
            check_start=partial(check_start, config),
            usable_counts=partial(usable_counts, config),
        ),
        context,
    )
    if config.keep_state:
        mebibytes = outcome.notes["training_state_bytes"] / 2**20
        context.say(f"keeps the state of the training in the artifact: {mebibytes:,.1f} MiB")
    return outcome


def accumulated(config: PretrainConfig) -> str:
    """What the passes of an accumulated step do not see of each other, in one line."""
    seen = config.method.over_one_pass()
    alone = ", ".join([*seen, f"{'and ' if seen else ''}batch norms where the networks have any"])
    return (
        f"accumulate: {config.accumulate} makes forward passes of {config.batch_size // config.accumulate} images. "
        f"Computed over one pass, not over the batch of {config.batch_size}: {alone} "
        "(docs/methods.md#accumulated-steps)"
    )
