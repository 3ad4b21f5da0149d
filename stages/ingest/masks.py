"""Layout `masks`: `images/[split/]x.jpg` and `masks/[split/]x.png`, with an optional `classes.json`.

A split's folder may also stand first: `train/images/x.jpg` and `train/masks/x.png`.
"""

from __future__ import annotations

from pipeline.errors import SourceError
from stages.ingest.layout import Item, Layout, Listing, stem, top_folders
from stages.ingest.recognise import SPLITS


class Masks(Layout):
    """An image and its mask have the same path under their two folders, except for the ending and the name's suffix."""

    def candidates(self) -> Listing:
        """The pairs; an image or a mask without its partner is a problem."""
        config = self.config
        images, masks = f"{config.image_folder}/", f"{config.mask_folder}/"
        inner_of = {path: self._split_second(path, (images, masks)) for path in self.files.sizes}
        paths = [path for path in self.files.images() if inner_of[path].startswith(images)]
        if not paths or not any(inner.startswith(masks) for inner in inner_of.values()):
            raise SourceError(
                f"source {config.source} is not of layout masks: it needs images in {images} and PNG masks in {masks} "
                "(set image_folder and mask_folder if they are called otherwise)"
            )
        splits = self.split_folders(top_folders([inner_of[path].removeprefix(images) for path in paths]))
        mask_of = {}
        for path, inner in inner_of.items():
            name, is_mask = stem(inner), inner.startswith(masks) and path.lower().endswith((".png", ".bmp"))
            if is_mask and name.endswith(config.mask_suffix):
                mask_of[name.removeprefix(masks).removesuffix(config.mask_suffix)] = path
        items: list[Item] = []
        problems = [problem for problem in self.unread() if inner_of[problem["key"]].startswith(images)]
        for path in paths:
            inner = stem(inner_of[path].removeprefix(images))
            top = inner.split("/", 1)[0] if "/" in inner else ""
            if (splits and top not in splits) or not inner.endswith(config.image_suffix):
                continue
            name = inner.removesuffix(config.image_suffix)
            if (mask := mask_of.pop(name, None)) is None:
                reason = f"no mask {masks}{name}{config.mask_suffix}.png"
                if f"{masks}{name}{config.mask_suffix}.jpg" in self.files.sizes:
                    reason += ", only a .jpg, whose values are not exactly those that were drawn: masks must be PNG"
                problems.append({"key": path, "reason": reason})
                continue
            split = splits[top] if splits else config.split
            items.append(Item(path, split, self.files.sizes[path], path, mask))
        for name, mask in sorted(mask_of.items()):
            if not splits or name.split("/", 1)[0] in splits:
                problems.append({"key": mask, "reason": "a mask without an image"})
        return Listing(items, self.mask_vocabulary(), problems)

    def _split_second(self, path: str, folders: tuple[str, str]) -> str:
        """`images/train/x` for `train/images/x`, where the first folder is a split's; other paths as they are."""
        top, _, rest = path.partition("/")
        named = self.config.split_folders
        is_split = top in named.values() if named is not None else top.lower() in SPLITS
        folder = next((folder for folder in folders if rest.startswith(folder)), None)
        if not is_split or folder is None or path.startswith(folders):
            return path
        return f"{folder}{top}/{rest.removeprefix(folder)}"
