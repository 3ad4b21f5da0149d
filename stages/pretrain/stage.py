"""The `pretrain` stage: images in, an encoder out. The work is in launch/, its config in config/pretrain.py.

Planning imports this file and must stay fast: torch and Ray are imported when the stage runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import Context, Feed, Outcome, Stage
from stages.pretrain.config.pretrain import PretrainConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


class Pretrain(Stage[PretrainConfig]):
    """Pre-trains with one of the methods, on Ray Train, and writes the encoder with its curves."""

    kind = "encoder"
    version = 1
    tracked_as = "model"
    exports = ("encoder.safetensors", "encoder.json", "*.safetensors")
    Config = PretrainConfig

    @property
    def uses_ray(self) -> bool:  # type: ignore[override]
        """False with `resources.workers: 0`, which trains in the driver's own process."""
        return self.config.resources.workers != 0

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """Tables (boxes, superpixels, neighbours, embeddings) that describe none of the image sets trained on."""
        sources = {path for path, _ in self.config.image_sources()}
        trained_on = {feeds[path].fingerprint: feeds[path].stage for path in feeds if path in sources}
        for path, feed in feeds.items():
            origins = {} if path in sources or feed.kind == "encoder" else _image_sets(feed)
            if origins and not origins.keys() & trained_on.keys():
                yield (
                    path,
                    f"{feed.stage} is made from the images of {', '.join(origins.values())}, and this stage trains on "
                    f"those of {', '.join(trained_on.values())}",
                    f"name a {feed.kind} stage that is made from the same images",
                )

    @classmethod
    def complete_export(cls, artifact: Artifact, folder: Path) -> list[Path]:
        """The code that computes the encoder's features, and a README; the encoder is made from the files once."""
        from stages.models.export import complete

        return complete(artifact, folder)

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
