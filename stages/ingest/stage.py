"""The `ingest` stage: a source of images, in one of six layouts, becomes an artifact of kind `images`.

Reading order: `layout.py` (what a format answers), `folder.py` (the shortest format), `rows.py` (one image checked),
`write.py` (shards, threads or Ray). Planning imports only this file and `settings.py`, so nothing heavy is imported at
the top of either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pipeline.config import registry
from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome, Stage, StageConfig
from stages.ingest.settings import IngestConfig

if TYPE_CHECKING:
    from stages.ingest.layout import Layout

_SHOWN = 10  # problems printed one by one; all of them are in the manifest

_FORMATS = {  # layout -> its class; imported only when a pipeline uses it
    "folder": "stages.ingest.folder:Folder",
    "masks": "stages.ingest.masks:Masks",
    "coco": "stages.ingest.coco:Coco",
    "voc": "stages.ingest.voc:Voc",
    "davis": "stages.ingest.davis:Davis",
    "parquet": "stages.ingest.parquet:Parquet",
}


class Ingest(Stage[IngestConfig]):
    """Reads every image once, checks it by decoding it, and keeps its bytes as found."""

    kind: ClassVar[str] = "images"
    version: ClassVar[int] = 1
    Config: ClassVar[type[StageConfig]] = IngestConfig

    def run(self, context: Context) -> Outcome:
        """Lists the source, writes its shards, and draws the preview.

        Raises: SourceError for a source that is missing, empty, of another layout, or without a usable image.
        """
        from stages.ingest.preview import contact_sheet
        from stages.ingest.write import cut, spread, write_shards

        layout = make_layout(self.config)
        listing = layout.candidates()
        if listing.problems and self.config.on_error == "fail":
            raise layout.error_for(listing.problems[0])
        items = spread(listing.items, self.config.limit)
        done = write_shards(context, layout, listing.vocabulary, cut(items, self.config))
        problems = listing.problems + done.problems
        if done.images == 0:
            raise SourceError(self._nothing(len(items), problems))
        for problem in problems[:_SHOWN]:
            context.say(f"{context.name}: {problem['key']}: {problem['reason']}")
        if len(problems) > _SHOWN:
            context.say(f"{context.name}: and {len(problems) - _SHOWN} more problems, all named in the manifest")
        context.output.put_file("preview.png", contact_sheet(layout, listing.vocabulary, items))
        counts = {"images": done.images, "skipped": len(items) - done.images, "problems": len(problems), **done.counts}
        notes = {
            "classes": list(listing.vocabulary.classes),
            "mask_classes": done.mask_classes(listing.vocabulary),
            "ignore_index": listing.vocabulary.ignore_index,
            "splits": done.splits,
            **listing.notes,
        }
        return Outcome(counts=counts, problems=problems, notes=notes, preview="preview.png")

    def _nothing(self, listed: int, problems: list[dict[str, str]]) -> str:
        place = f"source {self.config.source} has no usable image (layout {self.config.layout}, {listed} listed)"
        if not problems:
            return f"{place}: no file that ends like an image where the layout expects one (is the layout right?)"
        return f"{place}: the first of {len(problems)} problems is {problems[0]['key']}: {problems[0]['reason']}"


def make_layout(config: IngestConfig) -> Layout:
    """The format that the config names."""
    made: Layout = registry.imported(_FORMATS[config.layout])(config)
    return made
