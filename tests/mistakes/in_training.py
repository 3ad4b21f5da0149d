"""Numbers of a training that do not fit together: batch, passes, workers, queues, images.

What is only stated, a queue larger than the set, is in stages/pretrain/test_fit.py: stating it takes a training.
"""

from tests.mistakes.base import Mistake

SWAV = ("{name: simclr, size: 64}", "{name: swav, queue: 30}")

IN_TRAINING = [
    Mistake(
        "28",
        "batch larger than the set",
        ["stages.warmup.batch_size", "64 images", "photos has 32 to train on", "set batch_size to 32 or fewer"],
        code=1,
        replace=[("batch_size: 16", "batch_size: 64")],
        command=("run", "p.yaml"),
        seconds=60,
    ),
    Mistake(
        "36",
        "workers that do not divide the batch",
        [
            "p.yaml:11: stages.warmup.batch_size",
            "16 images, which 3 workers cannot share equally",
            "set batch_size to 15 or 18, or resources.workers to 2",
        ],
        replace=[("workers: 0", "workers: 3")],
    ),
    Mistake(
        "36",
        "workers that do not divide a forward pass",
        ["stages.warmup.batch_size", "8 images (batch_size / accumulate)", "set batch_size to 12 or 18"],
        options=["--set", "stages.warmup.resources.workers=3", "--set", "stages.warmup.accumulate=2"],
    ),
    Mistake(
        "36",
        "accumulate that does not divide the batch",
        ["stages.warmup", "accumulate: 3 does not divide batch_size 16"],
        options=["--set", "stages.warmup.accumulate=3"],
    ),
    Mistake(
        "36",
        "a queue that the workers cannot share",
        ["stages.warmup.method.queue", "30 entries cannot be shared equally by 4 workers", "set it to 28 or 32"],
        replace=[SWAV, ("workers: 0", "workers: 4")],
    ),
    Mistake(
        "36",
        "a batch of one image",
        ["stages.warmup.batch_size", "simclr compares different images", "set batch_size to 2 or more"],
        replace=[("batch_size: 16", "batch_size: 1")],
    ),
]
