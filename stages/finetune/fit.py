"""Do the numbers of a fine-tuning fit together? The plan asks, and the start asks again. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.stage import Context
from stages.finetune.settings import FinetuneConfig


def conflicts(config: FinetuneConfig, *, workers: int, images: int | None) -> Iterator[tuple[str, str, str]]:
    """What does not fit.

    Args:
        config: of the stage.
        workers: processes that share a batch.
        images: there are to train on; None where that is not known yet.

    Yields:
        (field path, what is wrong, what to do).
    """
    in_a_pass = config.batch_size // config.accumulate
    if in_a_pass % workers:
        least = workers * config.accumulate
        several = config.batch_size // least * least
        yield (
            "batch_size",
            f"a forward pass has {in_a_pass} images, which {workers} workers cannot share equally",
            f"set batch_size to {f'{several} or ' if several else ''}{several + least}, or change resources.workers",
        )
    if config.strategy == "fsdp2":
        yield "strategy", "fsdp2: fine-tuning was not tried with shared parameters", "set strategy: ddp"
    if images is None:
        return
    if 0 < images < config.batch_size:
        yield (
            "batch_size",
            f"a step takes {config.batch_size} images, and there are {images} to learn from: some would be in it twice",
            f"set batch_size to {images} or fewer",
        )
    if config.stop_at is not None and images and config.stop_at >= (total := config.total_steps(images)):
        remedy = "name an earlier step, or leave it out"
        yield "stop_at", f"{config.stop_at} is not before the end of this training of {total} steps", remedy


def usable_counts(config: FinetuneConfig, fewest: int, most: int) -> list[int]:
    """Those numbers of workers from `fewest` to `most` that can share a batch equally."""
    return [n for n in range(fewest, most + 1) if config.batch_size // config.accumulate % n == 0]


def check_start(config: FinetuneConfig, context: Context, workers: tuple[int, int]) -> None:
    """Ask again at the start of a training, for the numbers of workers that it may have.

    Raises:
        UsageError: with all that does not fit.
    """
    found = dict.fromkeys(one for count in sorted({*workers}) for one in conflicts(config, workers=count, images=None))
    if found:
        lines = [f"stages.{context.name}.{path}: {what} ({remedy})" for path, what, remedy in found]
        raise UsageError("\n".join(lines))


def split_size(notes: Mapping[str, Any] | None, split: str, holding: str) -> int | None:
    """How many images of a split hold what is learnt from, as far as the images' notes tell."""
    contents = ((notes or {}).get("contents") or {}).get(split)
    return None if contents is None else contents.get(holding)
