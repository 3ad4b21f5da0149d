"""Layout `folder`: images in folders. `[split/][class/]name.jpg`, deeper folders allowed."""

from __future__ import annotations

from stages.ingest.layout import Item, Layout, Listing, Vocabulary, top_folders


class Folder(Layout):
    """The label is the first folder under the split (or under the source, where there are no splits)."""

    def candidates(self) -> Listing:
        """All images below the source, or below its split folders."""
        paths = list(self.files.images())
        splits = self.split_folders(top_folders(paths))
        if splits:
            paths = [path for path in paths if path.split("/", 1)[0] in splits]
        items = []
        for path in paths:
            top, _, inner = path.partition("/")
            split, inner = (splits[top], inner) if splits else (self.config.split, path)
            label = inner.split("/", 1)[0] if "/" in inner else None
            items.append(Item(path, split, self.files.sizes[path], path, label=label))
        found = sorted({item.label for item in items if item.label is not None})
        return Listing(items, Vocabulary(tuple(self.config.classes or found)), self.unread())
