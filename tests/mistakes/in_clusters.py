"""Resources that this machine does not have, which a run refuses before it starts anything."""

from __future__ import annotations

from tests.mistakes.base import Mistake


def _resources(row: str, what: str, resources: str, *words: str) -> Mistake:
    """A mistake in the resources of `warmup`, whose batch 512 workers can share."""
    replace = [("resources: {workers: 0}", f"resources: {resources}"), ("batch_size: 16", "batch_size: 512")]
    return Mistake(
        row, what, ["p.yaml:12: stages.warmup.resources.", *words], replace=replace, command=("run", "p.yaml")
    )


IN_CLUSTERS = [
    _resources("36a", "more GPUs than there are", "{gpus: 64}", "gpus: ", "asks for 1 CPU and 64 GPUs", "--address"),
    _resources("36b", "GPUs without Ray", "{gpus: 64, workers: 0}", "gpus: ", "asks for 64 GPUs", "resources.gpus: 0"),
    _resources(
        "36c", "more CPUs than there are", "{cpus: 4096}", "cpus: ", "asks for 4096 CPUs", "lower resources.cpus"
    ),
    Mistake(
        "36d",
        "more workers than CPUs",
        ["p.yaml:12: stages.warmup.resources.workers: ", "32 workers with 16 CPUs", "this machine has"],
        replace=[("batch_size: 16", "batch_size: 32"), ("{workers: 0}", "{workers: 32, cpus: 16}")],
        command=("run", "p.yaml"),
    ),
    Mistake(
        "36e",
        "more GPUs than there are for actors",
        ["p.yaml:13: stages.emb.resources.gpus", "asks for 1 CPU and 64 GPUs", "resources.gpus: 0"],
        replace=[("encoder: warmup}", "encoder: warmup, resources: {gpus: 64}}")],
        command=("run", "p.yaml"),
    ),
]
