"""The picture of a training run: what the encoder sees (PCA colours of its patches) above the curves of every term."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.store.artifact import Artifact
from stages.data import pictures
from stages.data.images import ImageError, decode
from stages.data.tables import Table
from stages.models.encoder import Encoder
from stages.models.inference import Inference, squeeze
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.data.loader import TrainData
from stages.pretrain.methods.method import Method
from stages.pretrain.views.sheet import view_sheet

SHOWN = 6  # images, the same ones for every encoder trained on the same set
IN_SHEET = 4  # images whose views are shown


def preview_png(
    encoder: Encoder, rows: Sequence[Mapping[str, float]], config: PretrainConfig, inputs: Mapping[str, Artifact]
) -> bytes:
    """Photographs with the first three principal components of their patches as colours, then the curves."""
    path, _ = config.image_sources()[-1]
    panels = [pca_sheet(encoder, Table.open(inputs[path], columns=["image_id", "image"])), curves_png(config, rows)]
    return _stack([panel for panel in panels if panel])


def curves_png(config: PretrainConfig, rows: Sequence[Mapping[str, float]]) -> bytes:
    """One picture of all terms and watched figures by step."""
    names = dict.fromkeys(name for row in rows for name in row)
    given = ("step", "epoch", "lr", "weight_decay", "images_per_s")  # by the config or the machine, not by training
    shown = [name for name in names if name not in given and not name.startswith("weight/")]
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in shown}
    return pictures.curves(series, title=f"{config.method.name}: terms (unweighted) by step")


def pca_sheet(encoder: Encoder, images: Table) -> bytes | None:
    """A contact sheet: each photograph beside its patches' colours. None where no image can be decoded."""
    chosen = images.ids[np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)]
    photos = []
    for image_id in dict.fromkeys(chosen.tolist()):
        try:
            photos.append(decode(images.row(image_id)["image"]))
        except ImageError:
            continue  # named and counted where it was met first; a preview shows what there is
    if not photos:
        return None
    # A grid of at least 14 cells a side, however small the views it was trained on.
    side = max(14, round(encoder.image_size / encoder.stride)) * encoder.stride
    if encoder.refuses(side) is not None:
        side = encoder.image_size
    squares = [squeeze(photo, side, side) for photo in photos]
    features = Inference(encoder)(squares)
    colours = pictures.pca_colours(features.map.float().cpu().numpy(), side=side)
    cells = [cell for pair in zip(squares, colours, strict=True) for cell in pair]
    return pictures.grid(cells, columns=4, title="patch features: first three principal components as colours")


def views_png(data: TrainData, method: Method, encoder: Encoder) -> bytes:
    """The crops of the first batch with the rectangles that they share, and what the method makes of them."""
    batch = next(data.batches(0, 1)).first(IN_SHEET + 1)  # the last one may be a background of the one before it
    return view_sheet(
        batch,
        method.view_plan(),
        encoder.mean,
        encoder.std,
        panels=method.preview_panels(batch),
        images=IN_SHEET,
        title="views of the first batch",
    )


def _stack(panels: Sequence[bytes]) -> bytes:
    from PIL import Image

    images = [Image.open(io.BytesIO(panel)).convert("RGB") for panel in panels]
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), (255, 255, 255))
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    out = io.BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    return out.getvalue()
