"""The `ingest` stage: a source of images, in one of six layouts, becomes an artifact of kind `images`.

Reading order: `recognise.py` (which layout a listing looks like), `layout.py` (what a format answers), `folder.py` (the
shortest format), `rows.py` (one image checked), `write.py` (shards, threads or Ray), `remarks.py` (what is said of
them). Planning imports only this file and `settings.py`, so nothing heavy is imported at
the top of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.config import registry
from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome, Stage, StageConfig
from stages.ingest.settings import RAY_FROM, IngestConfig

if TYPE_CHECKING:
    from stages.ingest.layout import Layout

_SHOWN = 10  # problems printed one by one; all of them are in the manifest
_LISTED = 200_000  # files that a plan lists to recognise a layout; of a larger source the run itself finds out
_PROBLEMS = "problems.txt"

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

    @property
    def uses_ray(self) -> bool:  # type: ignore[override]
        """False for a local folder of few files, whose images are read in the driver's own process."""
        from stages.ingest.files import Files

        if self.config.layout == "parquet" or "://" in self.config.source:
            return True
        return not Files(self.config.source).names(RAY_FROM - 1)

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """A local source that looks like another layout, and a label map that cannot be used: seen in the listing."""
        from stages.ingest import label_map, recognise
        from stages.ingest.files import Files, read_file

        config = self.config
        written = config.label_map
        if isinstance(written, str) and "://" not in written:
            try:
                label_map.read(read_file(written), written)
            except SourceError as error:
                yield "label_map", str(error), "write value: class for each value, or class: [values]"
        if "://" in config.source or not config.check_layout:
            return
        if recognise.is_file(config.source):
            if config.layout != "parquet":
                yield ("source", *recognise.of_file(config))
        elif found := recognise.contradiction(config, Files(config.source).names(_LISTED)):
            yield ("layout", *found)

    def run(self, context: Context) -> Outcome:
        """Lists the source, writes its shards, and draws the preview.

        Raises: SourceError for a source that is missing, empty, of another layout, or without a usable image.
        """
        from stages.ingest import recognise, remarks
        from stages.ingest.preview import contact_sheet
        from stages.ingest.write import cut, spread, write_shards

        config = self.config
        layout = make_layout(config)
        if config.layout != "parquet" and (found := recognise.contradiction(config, list(layout.files.sizes))):
            raise SourceError(f"{found[0]} ({found[1]})")
        listing = layout.candidates()
        before = remarks.misnamed(layout.files) + listing.problems
        if before and config.on_error == "fail":
            raise layout.error_for(before[0])
        items = spread(listing.items, config.limit)
        done = write_shards(context, layout, listing.vocabulary, cut(items, config))
        problems = before + done.problems
        if done.images == 0:
            lines = "".join(f"{problem['key']}: {problem['reason']}\n" for problem in problems)
            context.output.leave(_PROBLEMS, lines.encode())
            place = f"{context.output.progress_address}/{_PROBLEMS}"
            raise SourceError(remarks.all_skipped(config, len(items), problems, place))
        said = listing.remarks + remarks.of_listing(config, items, layout.files)
        said += remarks.of_masks(done, listing.vocabulary) + remarks.of_rows(config, done, listing.vocabulary)
        usable = [item for item in items if item.key not in done.skipped]
        context.output.put_file("preview.png", contact_sheet(layout, listing.vocabulary, usable))
        context.say(remarks.summary(config, done, listing.vocabulary))
        self._say(context, problems, said)
        counts = {"images": done.images, "skipped": len(items) - done.images, "problems": len(problems), **done.counts}
        notes = {
            "classes": list(listing.vocabulary.classes),
            "mask_classes": done.mask_classes(listing.vocabulary),
            "ignore_index": listing.vocabulary.ignore_index,
            "splits": {name: split.images for name, split in done.splits.items()},
            "contents": {name: split.to_json() for name, split in done.splits.items()},
            "remarks": said,
            **listing.notes,
        }
        return Outcome(counts={**counts, **listing.counts}, problems=problems, notes=notes, preview="preview.png")

    def _say(self, context: Context, problems: Sequence[dict[str, str]], said: Sequence[str]) -> None:
        from stages.ingest.remarks import remedy_for

        for problem in problems[:_SHOWN]:
            context.say(f"{problem['key']}: {problem['reason']}")
        if len(problems) > _SHOWN:
            context.say(f"and {len(problems) - _SHOWN} more problems, all named in the manifest")
        if hint := remedy_for(problems):
            context.say(hint)
        for remark in said:
            context.say(remark)


def make_layout(config: IngestConfig) -> Layout:
    """The format that the config names."""
    made: Layout = registry.imported(_FORMATS[config.layout])(config)
    return made
