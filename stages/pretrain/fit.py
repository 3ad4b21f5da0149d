"""Do the numbers of a training fit together: its batch, passes, workers and queues, and the images there are?

All that is refused or stated about them is here. The plan asks with what it knows by then (stage.py); the start of a
training asks again, for the workers that it will have, before any of them starts (launch/). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.stage import Context
from stages.pretrain.config.pretrain import PretrainConfig
from stages.training.sampler import apportion

Notes = Mapping[str, Mapping[str, Any] | None]  # of each image set, by the path of its input; None: not made yet


def conflicts(config: PretrainConfig, *, workers: int | None, notes: Notes) -> Iterator[tuple[str, str, str]]:
    """What does not fit.

    Args:
        config: of the stage.
        workers: processes that share a batch; None where only the start of the training will tell.
        notes: of the image sets.

    Yields:
        (field path, what is wrong, what to do).
    """
    yield from _batch(config, workers or 1)
    yield from _queues(config, workers or 1)
    yield from _images(config, notes)
    yield from _strategy(config)


def remarks(config: PretrainConfig, notes: Notes) -> Iterator[str]:
    """What fits and is still worth knowing, a sentence each that begins with the path of an option."""
    there = images_there(config, notes)
    for (path, count), part in zip(there.items(), _parts(config, config.batch_size), strict=True):
        if count is not None and part > count:
            yield f"{path}: a step takes {part} images from its {count}, so that it holds some of them more than once"
    counts = [count for count in there.values() if count is not None]
    images = sum(counts) if len(counts) == len(there) else None
    for option, queue in config.method.queues().items():
        of_a_step = config.batch_size * queue.of_an_image
        if queue.entries < of_a_step:
            yield f"method.{option}: it keeps the last {queue.entries} of the {of_a_step} entries that a step gives"
        if images is not None and queue.entries > images * queue.of_an_image:
            yield (
                f"method.{option}: {queue.entries} entries are more than one pass over the {images} images gives "
                f"({images * queue.of_an_image}), so that it holds older entries of an image beside its newest"
            )


def usable_counts(config: PretrainConfig, fewest: int, most: int) -> list[int]:
    """Those numbers of workers from `fewest` to `most` that can share a batch and the queues equally."""
    counts = range(fewest, most + 1)
    return [n for n in counts if not any(True for _ in (*_shares(config, n), *_queues(config, n)))]


def check_start(config: PretrainConfig, context: Context, workers: tuple[int, int]) -> None:
    """Asks again at the start of a training, and says what is worth knowing.

    Args:
        config: of the stage.
        context: its inputs are there by now.
        workers: the fewest and the most processes that will share a batch.

    Raises:
        UsageError: with all that does not fit.
    """
    notes = {path: artifact.manifest.notes for path, artifact in context.inputs.items()}
    found = dict.fromkeys(
        conflict for count in sorted({*workers}) for conflict in conflicts(config, workers=count, notes=notes)
    )
    if found:
        raise UsageError("\n".join(f"{path}: {what} ({remedy})" for path, what, remedy in found))
    for remark in remarks(config, notes):
        context.say(remark)
    usable = usable_counts(config, *workers)
    if len(usable) < workers[1] - workers[0] + 1:
        named = ", ".join(map(str, usable))
        context.say(
            f"resources.workers: of {workers[0]} to {workers[1]} workers, {named} can share a batch equally; with room "
            "for another number, training takes the next smaller of these"
        )


def images_there(config: PretrainConfig, notes: Notes) -> dict[str, int | None]:
    """Images to train on of each source, by the path of its input; None where that is not known yet.

    They are those of `split`; without it of the split "train", or all where there is none.
    """
    found: dict[str, int | None] = {}
    for path, _ in config.image_sources():
        splits = (notes.get(path) or {}).get("splits")
        if splits is None:
            found[path] = None
        else:
            wanted = config.split or ("train" if "train" in splits else None)
            found[path] = sum(count for name, count in splits.items() if wanted in (None, name))
    return found


def _shares(config: PretrainConfig, workers: int) -> Iterator[tuple[str, str, str]]:
    """The same number of images for every worker."""
    in_a_pass = config.batch_size // config.accumulate
    if in_a_pass % workers:
        fewer = max(n for n in range(1, workers) if in_a_pass % n == 0)
        yield (
            "batch_size",
            f"{_pass(config)}, which {workers} workers cannot share equally",
            f"set batch_size to {_multiples(config.batch_size, workers * config.accumulate)}, or resources.workers to "
            f"{fewer}",
        )


def _pass(config: PretrainConfig) -> str:
    in_a_pass = config.batch_size // config.accumulate
    return f"a forward pass has {in_a_pass} images" + (" (batch_size / accumulate)" if config.accumulate > 1 else "")


def _batch(config: PretrainConfig, workers: int) -> Iterator[tuple[str, str, str]]:
    """The images of one forward pass: enough for the method, and the same number for every worker."""
    in_a_pass, what = config.batch_size // config.accumulate, _pass(config)
    yield from _shares(config, workers)
    if in_a_pass < config.method.least_batch():
        yield (
            "batch_size",
            f"{what}, and {config.method.name} compares different images of a pass",
            f"set batch_size to {config.method.least_batch() * config.accumulate} or more",
        )
    for (path, source), part in zip(config.image_sources(), _parts(config, in_a_pass), strict=True):
        if part < 1:
            yield (
                path,
                f"{what}, and a weight of {source.weight:g} leaves none of them to {source.from_}",
                "raise its weight, or batch_size",
            )


def _strategy(config: PretrainConfig) -> Iterator[tuple[str, str, str]]:
    """FSDP2 is for methods and optimisers that were tried with it; others would stop half-way, or wait for ever."""
    if config.strategy != "fsdp2":
        return
    if not config.method.shards:
        what = f"{config.method.name} does not call the same modules on all ranks in every step, or was not tried so"
        yield "strategy", f"fsdp2: {what}", "set strategy: ddp"
    if config.optimizer.name == "lars":
        what = "lars adapts its rate to the norm of a whole tensor, and each rank holds a part of it"
        yield "strategy", f"fsdp2: {what}", "set strategy: ddp, or optimizer.name to adamw or sgd"


def _queues(config: PretrainConfig, workers: int) -> Iterator[tuple[str, str, str]]:
    """A queue that the workers share is cut into equal shares."""
    for option, queue in config.method.queues().items():
        if queue.shared and queue.entries % workers:
            yield (
                f"method.{option}",
                f"{queue.entries} entries cannot be shared equally by {workers} workers",
                f"set it to {_multiples(queue.entries, workers)}",
            )


def _images(config: PretrainConfig, notes: Notes) -> Iterator[tuple[str, str, str]]:
    """There are images, and a step needs none of them twice."""
    found = images_there(config, notes)
    sources = dict(config.image_sources())
    for path, count in found.items():
        if count == 0:
            splits = ", ".join(sorted((notes[path] or {})["splits"])) or "none"
            yield ("split", f"{sources[path].from_} has no image of split {config.split!r}", f"its splits: {splits}")
    counts = [count for count in found.values() if count is not None]
    images = sum(counts) if len(counts) == len(found) else 0
    if images and config.stop_at is not None and config.stop_at >= (total := config.total_steps(images)):
        remedy = "name an earlier step, or leave it out"
        yield "stop_at", f"{config.stop_at} is not before the end of this training of {total} steps", remedy
    if len(counts) == len(found) and 0 < sum(counts) < config.batch_size:
        names = " and ".join(source.from_ for source in sources.values())
        yield (
            "batch_size",
            f"a step takes {config.batch_size} images, and {names} {'have' if len(found) > 1 else 'has'} {sum(counts)} "
            "to train on: it would hold images twice",
            f"set batch_size to {sum(counts)} or fewer",
        )


def _parts(config: PretrainConfig, images: int) -> tuple[int, ...]:
    """How many of a number of images are from each source."""
    return apportion([source.weight for _, source in config.image_sources()], images)


def _multiples(number: int, of: int) -> str:
    """The multiples around a number, in words."""
    below = number // of * of
    return f"{below} or {below + of}" if below else f"{of}"
