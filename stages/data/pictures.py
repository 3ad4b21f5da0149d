"""Pictures for previews and reports: numpy in, PNG bytes out.

`draw_*`, `colour_mask` and `pca_colours` give RGB arrays (H, W, 3) uint8; `grid`, `neighbor_strip`, `curves` and
`histograms` lay out what they are given and return the bytes of a PNG. Drawing packages are imported inside, so that
importing this is cheap.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.ImageDraw import ImageDraw

RGB: TypeAlias = NDArray[np.uint8]  # (H, W, 3)
Colour: TypeAlias = tuple[int, int, int]

CELL = 320  # pixels: longest side of a picture in a sheet
LEGEND = 30  # names that a legend shows; more could not be told apart by their colours
_GAP, _MARGIN = 12, 20
_PAPER, _INK, _QUIET = (255, 255, 255), (33, 37, 41), (108, 117, 125)
_VOID: Colour = (0, 0, 0)  # pixels that do not count


# ------------------------------------------------------------------------------------------------------------ sheets
def grid(
    images: Sequence[RGB],
    columns: int = 4,
    captions: Sequence[str] | None = None,
    *,
    title: str | None = None,
    cell: int = CELL,
    legend: Sequence[tuple[str, Colour]] = (),
) -> bytes:
    """A contact sheet: every picture fitted into a square cell of `cell` pixels, its caption below.

    `legend` adds lines of names with their colours at the bottom, of `LEGEND` names at most. Raises ValueError for no
    pictures.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    columns = max(1, min(columns, len(images)))
    fitted = [_fit(image, cell) for image in images]
    rows = [list(range(at, min(at + columns, len(images)))) for at in range(0, len(images), columns)]
    heights = [max(fitted[i].shape[0] for i in row) for row in rows]  # rows of landscapes waste no paper
    caption_height = 22 if captions else 0
    top = _MARGIN + (34 if title else 0)
    width = 2 * _MARGIN + columns * cell + (columns - 1) * _GAP
    more = [(f"and {len(legend) - LEGEND} more classes", _PAPER)] if len(legend) > LEGEND else []
    legend_rows = _legend_rows([*legend[:LEGEND], *more], width - 2 * _MARGIN)
    height = top + sum(heights) + len(rows) * caption_height + (len(rows) - 1) * _GAP + _MARGIN + 24 * len(legend_rows)
    canvas, draw = _paper(width, height)
    if title:
        _text(draw, (_MARGIN, _MARGIN - 4), title, 20, width - 2 * _MARGIN)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x, image = _MARGIN + column * (cell + _GAP), fitted[i]
            spare = row_height - image.shape[0]  # pictures stand on their captions
            canvas.paste(_pil(image), (x + (cell - image.shape[1]) // 2, y + (spare if captions else spare // 2)))
            if captions:
                _text(draw, (x, y + row_height + 4), captions[i], 13, cell, _QUIET)
        y += row_height + caption_height + _GAP
    for line in legend_rows:
        at = float(_MARGIN)
        for name, colour, advance in line:
            draw.rectangle((at, y + 3, at + 13, y + 16), fill=colour, outline=_QUIET if colour != _PAPER else _PAPER)
            _text(draw, (at + 19, y + 2), name, 13, width)
            at += advance
        y += 24
    return _png(np.asarray(canvas))


def neighbor_strip(
    queries: Sequence[RGB],
    neighbors: Sequence[Sequence[RGB]],
    captions: Sequence[Sequence[str]] | None = None,
    *,
    query_captions: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 160,
) -> bytes:
    """One row an image: itself at the left, a rule, then its neighbours, nearest first, each with its caption."""
    if not queries:
        raise ValueError("a neighbour sheet needs at least one image")
    shown = max(len(row) for row in neighbors)
    split = 2 * _GAP
    top = _MARGIN + (34 if title else 0)
    row_height = cell + 22 + _GAP
    width = 2 * _MARGIN + cell + split + shown * (cell + _GAP)
    canvas, draw = _paper(width, top + len(queries) * row_height + _MARGIN - _GAP)
    if title:
        _text(draw, (_MARGIN, _MARGIN - 4), title, 20, width - 2 * _MARGIN)
    for r, (query, row) in enumerate(zip(queries, neighbors, strict=True)):
        y = top + r * row_height
        names = [*(captions[r] if captions else [""] * len(row))]
        cells = [(query, query_captions[r] if query_captions else "", _MARGIN)]
        left = _MARGIN + cell + split + _GAP // 2
        cells += [(image, names[i], left + i * (cell + _GAP)) for i, image in enumerate(row)]
        for image, caption, x in cells:
            canvas.paste(_pil(_square(image, cell)), (x, y))
            _text(draw, (x, y + cell + 4), caption, 12, cell, _QUIET)
        draw.line((_MARGIN + cell + _GAP, y, _MARGIN + cell + _GAP, y + cell), fill=(206, 212, 218), width=2)
    return _png(np.asarray(canvas))


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str | None = None, columns: int = 3) -> bytes:
    """One small panel a name (terms have scales of their own), each a line of (step, value).

    A name with a single value gets a line of text in place of a panel: one dot shows nothing.
    """
    if not series:
        raise ValueError("there is no curve to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = {name: points for name, points in series.items() if len(points) > 1}
    single = [
        f"{name} = {points[0][1]:.5g} (step {points[0][0]:g})" for name, points in series.items() if len(points) == 1
    ]
    columns = max(1, min(columns, len(lines)))
    rows = -(-len(lines) // columns)
    inches = 0.16 * len(single) + (0.4 if title else 0)
    figure = Figure(figsize=(max(4.2 * columns, 6), 2.7 * rows + inches + 0.2), dpi=110, layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = np.array(points, float).reshape(-1, 2).T
        axes.plot(steps, values, color="#1f6feb", linewidth=1.5)
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))
        axes.grid(color="#e9ecef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    if single:
        figure.supxlabel("\n".join(single), fontsize=9, x=0.01, ha="left")
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return _figure_png(figure)


def histograms(samples: Mapping[str, NDArray[np.floating[Any]]], *, title: str, label: str, bins: int = 60) -> bytes:
    """How often each value occurs, one line a name over common bins, as a share of that name's values.

    Args:
        samples: values (n,) by name; names may have different numbers of them.
        title: above the panel.
        label: of the horizontal axis.
        bins: over the range of all values together.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges(np.concatenate(list(samples.values())), bins)
    for name, values in samples.items():
        axes.stairs(np.histogram(values, edges)[0] / len(values), edges, label=name, linewidth=1.5)
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("share", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e9ecef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return _figure_png(figure)


def intervals(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]], *, title: str, x: str, y: str
) -> bytes:
    """One line a name over a logarithmic axis, with a bar from low to high at every point.

    Args:
        series: points by name: (place, value, low, high).
        title: above the panel.
        x: what the places are.
        y: what the values are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    places = sorted({point[0] for points in series.values() for point in points})
    for number, (name, points) in enumerate(series.items()):
        place, value, low, high = np.array(points, float).reshape(-1, 4).T
        shifted = place * (1 + 0.02 * (number - (len(series) - 1) / 2))  # bars of several lines beside each other
        bars = np.clip([value - low, high - value], 0, None)
        axes.errorbar(shifted, value, bars, label=name, linewidth=1.5, marker="o", markersize=4, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e9ecef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return _figure_png(figure)


def _figure_png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


# ---------------------------------------------------------------------------------------------- one picture, marked
def draw_boxes(
    image: RGB, boxes: NDArray[np.floating[Any]], labels: Sequence[str] | None = None, *, side: int = CELL
) -> RGB:
    """The image scaled to a longest side of `side` with its boxes (n, 4) on it: x0, y0, x1, y1 in its own pixels."""
    from PIL import ImageDraw

    shown = _fit(image, side)
    scale = shown.shape[1] / image.shape[1], shown.shape[0] / image.shape[0]
    canvas = _pil(shown)
    draw = ImageDraw.Draw(canvas)
    colours = class_colours(len(boxes))
    for i in reversed(range(len(boxes))):  # the best one on top
        x0, y0, x1, y1 = (float(value) * scale[j % 2] for j, value in enumerate(boxes[i]))
        x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
        draw.rectangle((x0, y0, x1, y1), outline=_PAPER, width=4)  # a pale rim, seen on any photograph
        if x1 - x0 > 4 and y1 - y0 > 4:
            x0, y0, x1, y1 = x0 + 1, y0 + 1, x1 - 1, y1 - 1
        draw.rectangle((x0, y0, x1, y1), outline=colours[i], width=2)
        if labels and labels[i]:
            _tag(draw, (x0, y0), labels[i], colours[i])
    return np.asarray(canvas)


def draw_superpixels(
    image: RGB, labels: NDArray[np.integer[Any]], *, side: int = CELL, colour: Colour = (255, 221, 51)
) -> RGB:
    """The image scaled to a longest side of `side`, with a line where the label (H, W) changes."""
    import cv2

    shown = _fit(image, side).copy()
    size = shown.shape[1], shown.shape[0]
    large = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST_EXACT)
    edge = np.zeros(large.shape, bool)
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    edge[1:] |= large[1:] != large[:-1]
    shown[edge] = colour
    return shown


def colour_mask(
    mask: NDArray[np.integer[Any]],
    classes: int | Sequence[str],
    *,
    ignore_index: int | None = None,
    image: RGB | None = None,
    opacity: float = 0.6,
) -> RGB:
    """Class indices (H, W) as colours, void black; over `image` of the same size, if given."""
    count = classes if isinstance(classes, int) else len(classes)
    table = np.array([*class_colours(count), _VOID], np.uint8)
    known = (mask >= 0) & (mask < count)
    if ignore_index is not None:
        known &= mask != ignore_index
    coloured: RGB = table[np.where(known, mask, count)]
    if image is None:
        return coloured
    return (image * (1 - opacity) + coloured * opacity).astype(np.uint8)


def class_colours(count: int) -> list[Colour]:
    """`count` colours: hues by the golden ratio, five bands of brightness, so that 30 can be told apart."""
    bands = ((1.0, 0.95), (0.75, 0.95), (0.55, 0.95), (0.85, 0.55), (0.65, 0.75))
    colours = []
    for i in range(count):
        saturation, value = bands[i % 5]
        red, green, blue = colorsys.hsv_to_rgb((0.58 + i * 0.618034) % 1.0, saturation, value)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def pca_colours(maps: NDArray[np.floating[Any]], *, side: int | None = None) -> list[RGB]:
    """Feature maps (n, D, h, w) as pictures: three principal components as RGB.

    The components are those along which the patches of one picture differ, found over all n together, so that a channel
    is the same direction in all pictures. In each picture each channel is stretched from its 1st to its 99th
    percentile: no picture is all one colour, unless all its patches are equal. Signs are fixed by the largest loading.
    `side` enlarges to that longest side.
    """
    n, width, h, w = maps.shape
    tokens = maps.astype(np.float64).transpose(0, 2, 3, 1).reshape(n, h * w, width)
    tokens -= tokens.mean(1, keepdims=True)
    flat = tokens.reshape(-1, width)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    scores = tokens @ axes
    low, high = np.percentile(scores, [1, 99], axis=1, keepdims=True)
    scaled = np.where(high - low > 1e-12, np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1), 0.5)
    if scaled.shape[2] < 3:
        scaled = np.pad(scaled, ((0, 0), (0, 0), (0, 3 - scaled.shape[2])), constant_values=0.5)
    pictures = (scaled.reshape(n, h, w, 3) * 255).round().astype(np.uint8)
    return [picture if side is None else _fit(picture, side) for picture in pictures]


# --------------------------------------------------------------------------------------------------- paper and ink
def _fit(image: RGB, side: int) -> RGB:
    """Scaled to a longest side of `side`: averaged when it shrinks, cubic when it grows a photograph."""
    import cv2

    image = np.ascontiguousarray(image if image.ndim == 3 else np.repeat(image[..., None], 3, 2), np.uint8)
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale == 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else (cv2.INTER_NEAREST if scale > 4 else cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(image, size, interpolation=how), np.uint8)


def _square(image: RGB, side: int) -> RGB:
    """The centre square, `side` pixels."""
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return _fit(image[top : top + edge, left : left + edge], side)


def _paper(width: int, height: int) -> tuple[Any, ImageDraw]:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), _PAPER)
    return canvas, ImageDraw.Draw(canvas)


def _pil(image: RGB) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image))


def _text(draw: ImageDraw, at: tuple[float, float], text: str, size: int, width: float, colour: Colour = _INK) -> None:
    """One line, cut with an ellipsis where it would leave `width` pixels; what the font lacks shows as '?'."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(text + "...", font=font) > width:
            text = text[:-1]
        text += "..."
    draw.text(at, text, fill=colour, font=font)


def _tag(draw: ImageDraw, at: tuple[float, float], text: str, colour: Colour) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    x, y = at[0] + 2, at[1] + 2
    left, top, right, bottom = draw.textbbox((x + 3, y + 1), text, font=font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=colour)
    dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
    draw.text((x + 3, y + 1), text, fill=_INK if dark else _PAPER, font=font)


def _legend_rows(legend: Sequence[tuple[str, Colour]], width: float) -> list[list[tuple[str, Colour, float]]]:
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    rows: list[list[tuple[str, Colour, float]]] = []
    used = width + 1.0
    for name, colour in legend:
        advance = font.getlength(name) + 38
        if used + advance > width:
            rows.append([])
            used = 0.0
        rows[-1].append((name, colour, advance))
        used += advance
    return rows


def _png(image: RGB) -> bytes:
    from stages.data.images import encode_png

    return encode_png(image)
