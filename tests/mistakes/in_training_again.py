"""Mistakes of users who change the length of a training, or go on with one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.config.load import load_pipeline
from pipeline.plan import history
from pipeline.plan.plan import make_plan
from pipeline.store.store import ArtifactStore
from tests.mistakes.base import Mistake

LONGER = """\
  longer:
    uses: pretrain
    images: photos
    backbone: {name: resnet18, img_size: 64}
    method: {name: simclr, size: 64}
    steps: 8
    batch_size: 16
    resources: {workers: 0}
    continue: warmup
  emb:"""
KEPT = ("steps: 4\n", "steps: 4\n    keep_state: true\n")


def with_longer(old: str = "", new: str = "") -> tuple[str, str]:
    assert old in LONGER
    return ("  emb:", LONGER.replace(old, new) if old else LONGER)


def remember_the_first_run(folder: Path) -> None:
    """What a run of the pipeline would leave for later plans to compare with; then `steps` is changed."""
    with contextlib.chdir(folder):
        pipeline = load_pipeline("p.yaml")
        store = ArtifactStore(pipeline.store)
        for stage in make_plan(pipeline, store).stages:
            history.remember(store, pipeline.name, stage.name, stage.known_as)
        Path("p.yaml").write_text(
            Path("p.yaml").read_text().replace("steps: 4", "steps: 6").replace("steps: 8", "steps: 9")
        )


IN_TRAINING_AGAIN = [
    Mistake(
        "39a",
        "changed steps",
        ["stages.warmup.steps 4 -> 6 (trains anew from the start; `continue` goes on from a stage with keep_state)"],
        code=0,
        prepare=remember_the_first_run,
    ),
    Mistake(
        "39h",
        "changed steps of a stage that continues",
        ["stages.longer.steps 8 -> 9 (goes on from the end of warmup again, not from where this stage was)"],
        code=0,
        replace=[KEPT, with_longer()],
        prepare=remember_the_first_run,
    ),
    Mistake(
        "39b",
        "continue without a kept state",
        ["p.yaml:21: stages.longer.continue", "warmup does not keep the state", "stages.warmup.keep_state", "init"],
        replace=[with_longer()],
    ),
    Mistake(
        "39c",
        "continue with another backbone",
        ["p.yaml:17: stages.longer.backbone.name", "is resnet50", "warmup", "has resnet18", "may differ"],
        replace=[KEPT, with_longer("resnet18", "resnet50")],
    ),
    Mistake(
        "39d",
        "continue with another method",
        ["stages.longer.method.name", "is byol", "has simclr"],
        replace=[KEPT, with_longer("simclr", "byol")],
    ),
    Mistake(
        "39e",
        "continue with another batch size",
        ["stages.longer.batch_size", "is 8", "has 16"],
        replace=[KEPT, with_longer("batch_size: 16", "batch_size: 8")],
    ),
    Mistake(
        "39f",
        "continue for no more steps",
        ["stages.longer.steps", "warmup has trained for 4 steps already", "more than 4"],
        replace=[KEPT, with_longer("steps: 8", "steps: 4")],
    ),
    Mistake(
        "39g",
        "continue a stage that trains nothing",
        ["stages.longer.continue", "kind embeddings, expected encoder"],
        replace=[with_longer("continue: warmup", "continue: emb")],
    ),
]
