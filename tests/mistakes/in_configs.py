"""Mistakes that a plan finds in the pipeline file alone."""

from tests.mistakes.base import Mistake

IN_CONFIGS = [
    Mistake(
        "1",
        "misspelt key",
        ["p.yaml:11", "stages.warmup.batch_sise", "batch_size"],
        replace=[("batch_size", "batch_sise")],
    ),
]
