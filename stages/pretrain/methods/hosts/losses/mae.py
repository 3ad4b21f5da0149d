"""MAE: chooses the patches to keep, and measures the error of the removed ones.

Source: docs/methods.md#mae.

Shape legend: B images, H W sides of an image in pixels, N patches, K kept ones, P = side * side * 3 values of a patch.
"""

from __future__ import annotations

from torch import Tensor


def patchify(image_B3HW: Tensor, side: int) -> Tensor:
    """Cuts images into patches: (B, N, P), patches row by row, values in the order row, column, channel."""
    batch, channels, height, width = image_B3HW.shape
    grid = image_B3HW.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def random_masking(noise_BN: Tensor, *, ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the patches with the smallest noise.

    Args:
        noise_BN: uniform numbers.
        ratio: share of the patches that is removed.

    Returns:
        The indices of the kept patches (B, K), smallest noise first; a mask (B, N), 1 for removed patches; and for each
        patch (B, N) its index in the list of kept and then removed patches.
    """
    patches = noise_BN.shape[1]
    keep = int(patches * (1 - ratio))
    shuffle_BN = noise_BN.argsort(dim=1, stable=True)
    restore_BN = shuffle_BN.argsort(dim=1)
    mask_BN = (restore_BN >= keep).to(noise_BN.dtype)
    return shuffle_BN[:, :keep], mask_BN, restore_BN


def mae_loss(
    predicted_BNP: Tensor, image_B3HW: Tensor, mask_BN: Tensor, *, side: int, normalise: bool = True
) -> Tensor:
    """Mean squared error over the removed patches, as the official `forward_loss`: a scalar.

    Args:
        predicted_BNP: predicted pixels of every patch.
        image_B3HW: the images.
        mask_BN: 1 where a patch was removed; at least one must be.
        side: of a patch, in pixels.
        normalise: bring the target pixels of each patch to mean 0 and variance 1 (unbiased variance plus 1e-6).
    """
    targets_BNP = patchify(image_B3HW, side)
    if normalise:
        variance = targets_BNP.var(dim=-1, keepdim=True)
        targets_BNP = (targets_BNP - targets_BNP.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
    error_BN = (predicted_BNP - targets_BNP).square().mean(dim=-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()
