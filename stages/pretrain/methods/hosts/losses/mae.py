"""MAE: which patches stay, and the error of the ones that were removed (docs/methods.md#mae).

Shape legend: B images, N patches, K kept ones, P values of a patch (side * side * 3).
"""

from __future__ import annotations

from torch import Tensor


def patchify(image_B3HW: Tensor, side: int) -> Tensor:
    """(B, N, side * side * 3): patches in raster order, values as row, column, channel."""
    batch, channels, height, width = image_B3HW.shape
    grid = image_B3HW.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def random_masking(noise_BN: Tensor, *, ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
    """The patches with the smallest noise stay.

    Returns: kept (B, K) indices by rising noise; mask (B, N), 1 where removed; restore (B, N): where each patch is in
        the list "kept ones, then removed ones".
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
    """Mean squared error over the removed patches, a scalar.

    Args:
        mask_BN: 1 where a patch was removed; at least one must be.
        normalise: targets with mean 0 and variance 1 in every patch (unbiased variance, eps 1e-6).

    Source: MAE, official `forward_loss`. lightly has no loss of it, only a plain MSE in its example.
    """
    targets_BNP = patchify(image_B3HW, side)
    if normalise:
        variance = targets_BNP.var(dim=-1, keepdim=True)
        targets_BNP = (targets_BNP - targets_BNP.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
    error_BN = (predicted_BNP - targets_BNP).square().mean(dim=-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()
