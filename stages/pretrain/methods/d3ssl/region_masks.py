"""Turns the rectangles of a whole batch into masks at once, and pastes regions onto other images.

Shape legend: B images, R rectangles of each (x0, y0, x1, y1; integers, last row and column excluded), S side of a view
in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def painted(rectangles_BR4: Tensor, size: int) -> Tensor:
    """The pixels of each rectangle, (B, R, S, S) bool."""
    at_S = torch.arange(size, device=rectangles_BR4.device, dtype=rectangles_BR4.dtype)
    x0, y0, x1, y1 = rectangles_BR4[..., None].unbind(-2)
    columns_BRS = (at_S >= x0) & (at_S < x1)
    rows_BRS = (at_S >= y0) & (at_S < y1)
    return rows_BRS[..., :, None] & columns_BRS[..., None, :]


def union(rectangles_BR4: Tensor, size: int) -> Tensor:
    """The pixels in any of an image's rectangles, (B, S, S) bool."""
    return painted(rectangles_BR4, size).any(dim=1)


def kept(operations_BR4: Tensor, size: int) -> Tensor:
    """The pixels that are left after the operations of a cut-out, (B, S, S) bool.

    Operations restore and cut in turn (see `proposals.proposal_cutout`). The last one that covers a pixel decides.
    """
    number_R = torch.arange(1, operations_BR4.shape[1] + 1, device=operations_BR4.device, dtype=torch.int16)
    last_BSS = (painted(operations_BR4, size) * number_R[:, None, None]).amax(dim=1)
    return (last_BSS == 0) | (last_BSS % 2 == 1)


def compose(image_B3SS: Tensor, background_B3SS: Tensor, mask_BSS: Tensor, offset_B2: Tensor) -> Tensor:
    """View 3 (Eq. 8): the image moved by (dx, dy) inside the mask, the background elsewhere.

    Args:
        image_B3SS: the images that regions come from.
        background_B3SS: the images that they are pasted onto.
        mask_BSS: bool, the moved regions; their pixels must come from inside the image.
        offset_B2: dx and dy in pixels, integers.

    Returns:
        (B, 3, S, S).
    """
    size = image_B3SS.shape[-1]
    at_S = torch.arange(size, device=image_B3SS.device)
    from_x_BS, from_y_BS = ((at_S - offset_B2[:, i, None]).clamp(0, size - 1) for i in range(2))
    rows = from_y_BS[:, None, :, None].expand_as(image_B3SS)
    columns = from_x_BS[:, None, None, :].expand_as(image_B3SS)
    moved_B3SS = image_B3SS.gather(2, rows).gather(3, columns)
    return torch.where(mask_BSS[:, None], moved_B3SS, background_B3SS)
