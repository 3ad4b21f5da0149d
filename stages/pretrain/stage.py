"""The `pretrain` stage: images in, an encoder out. The work is in launch/, its config in config/pretrain.py.

Planning imports this file and must stay fast: torch and Ray are imported when the stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pipeline.stage import Context, Feed, Outcome
from stages.models import weights
from stages.models.planned import backbone_of
from stages.pretrain.config.continuing import CONTINUE, continuing_problems
from stages.pretrain.config.method import Start
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import conflicts
from stages.training.stage import EncoderTraining


class Pretrain(EncoderTraining[PretrainConfig]):
    """Pre-trains with one of the methods, on Ray Train, and writes the encoder with its curves."""

    version = 1
    exports = ("encoder.safetensors", "encoder.json", "*.safetensors")
    Config = PretrainConfig

    @property
    def change_remarks(self) -> Mapping[str, str]:  # type: ignore[override]
        """What a plan says of another length: whoever changes it may expect that the same training goes on."""
        before = self.config.continue_
        text = (
            "trains anew from the start; `continue` goes on from a stage with keep_state"
            if before is None
            else f"goes on from the end of {before} again, not from where this stage was"
        )
        return dict.fromkeys(("steps", "epochs"), text)

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """What a training with these inputs would stop at.

        Numbers that do not fit together; tables (boxes, superpixels, neighbours, embeddings) that describe none of the
        image sets trained on; a training that cannot go on from another; an encoder that the method cannot train.
        """
        if CONTINUE in feeds:
            yield from continuing_problems(self.config, feeds)
        notes = {path: feed.notes for path, feed in feeds.items()}
        counts = [None if n is None else max(n, 1) for n in self.config.resources.worker_counts or (None,)]
        found = [c for count in dict.fromkeys(counts) for c in conflicts(self.config, workers=count, notes=notes)]
        yield from dict.fromkeys(found)
        sources = {path for path, _ in self.config.image_sources()}
        trained_on = {feeds[path].fingerprint: feeds[path].stage for path in feeds if path in sources}
        roles = {path: source.role for path, source in self.config.image_sources()}
        of_objects = {feeds[path].fingerprint for path in feeds if roles.get(path) == "objects"}
        for path, feed in feeds.items():
            origins = {} if path in sources or feed.kind == "encoder" else _image_sets(feed)
            if origins and not origins.keys() & trained_on.keys():
                yield (
                    path,
                    f"{feed.stage} is made from the images of {', '.join(origins.values())}, and this stage trains on "
                    f"those of {', '.join(trained_on.values())}",
                    f"name a {feed.kind} stage that is made from the same images",
                )
            elif origins and feed.kind == "neighbors" and not origins.keys() & of_objects:
                yield (
                    path,
                    f"{feed.stage} is made from the images of {', '.join(origins.values())}, which are scenes here: "
                    "neighbours are those of images of role objects",
                    "give these images role: objects, or do without the neighbours",
                )

        start = _start(self.config, feeds)
        if start is not None:
            for path, what, remedy in self.config.method.misfits(start):
                yield f"method.{path}", what, remedy

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """Weights that cannot be had, and a GPU that training in the driver's process would not find."""
        yield from weights.obstacles(self.config, say)
        yield from super().obstacles(say)

    def run(self, context: Context) -> Outcome:
        """Train, or continue a training that was interrupted, and write the encoder with its curves and pictures."""
        from stages.pretrain.launch.pretrain import pretrain

        return pretrain(self.config, context)


def _image_sets(feed: Feed) -> dict[str, str]:
    """The image sets that a table describes: fingerprint -> stage.

    A table may be made with an encoder; the images that encoder was trained on are not among them.
    """
    if feed.kind == "images":
        return {feed.fingerprint: feed.stage}
    found: dict[str, str] = {}
    for above in feed.inputs.values():
        if above.kind != "encoder":
            found |= _image_sets(above)
    return found


def _start(config: PretrainConfig, feeds: Mapping[str, Feed]) -> Start | None:
    """The encoder that a training starts from, as far as the plan knows it; None where another stage type made it."""
    if config.backbone is not None:
        return Start(config.backbone, filtered=False)
    before: Feed | None = feeds["init"]
    backbone, filtered = backbone_of(feeds["init"]), False
    while before is not None:
        filtered |= getattr(getattr(before.config, "method", None), "filter", None) is not None
        before = before.inputs.get("init")
    return Start(backbone, filtered) if backbone is not None else None
