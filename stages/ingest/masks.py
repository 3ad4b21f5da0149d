"""Layout `masks`: `images/[split/]x.jpg` and `masks/[split/]x.png`, with an optional `classes.json`."""

from __future__ import annotations

from pipeline.errors import SourceError
from stages.ingest.layout import Item, Layout, Listing, stem, top_folders


class Masks(Layout):
    """An image and its mask have the same path under their two folders, except for the ending and the name's suffix."""

    def candidates(self) -> Listing:
        """The pairs; an image or a mask without its partner is a problem."""
        config = self.config
        images, masks = f"{config.image_folder}/", f"{config.mask_folder}/"
        paths = list(self.files.images(images))
        if not paths or not any(path.startswith(masks) for path in self.files.sizes):
            raise SourceError(
                f"source {config.source} is not of layout masks: it needs images in {images} and PNG masks in {masks} "
                "(set image_folder and mask_folder if they are called otherwise)"
            )
        splits = self.split_folders(top_folders([path.removeprefix(images) for path in paths]))
        mask_of = {}
        for path in self.files.sizes:
            name = stem(path)
            if path.startswith(masks) and path.lower().endswith((".png", ".bmp")) and name.endswith(config.mask_suffix):
                mask_of[name.removeprefix(masks).removesuffix(config.mask_suffix)] = path
        items, problems = [], self.unread(images)
        for path in paths:
            inner = stem(path.removeprefix(images))
            top = inner.split("/", 1)[0] if "/" in inner else ""
            if (splits and top not in splits) or not inner.endswith(config.image_suffix):
                continue
            name = inner.removesuffix(config.image_suffix)
            if (mask := mask_of.pop(name, None)) is None:
                reason = f"no mask {masks}{name}{config.mask_suffix}.png"
                problems.append({"key": path, "reason": reason})
                continue
            split = splits[top] if splits else config.split
            items.append(Item(path, split, self.files.sizes[path], path, mask))
        for name, mask in sorted(mask_of.items()):
            if not splits or name.split("/", 1)[0] in splits:
                problems.append({"key": mask, "reason": "a mask without an image"})
        return Listing(items, self.mask_vocabulary(), problems)
