"""The colour operations that most methods give their crops; only the strengths differ."""

from __future__ import annotations

from stages.pretrain.views.plan import Photometric


def crop_colours(strength: tuple[float, float, float, float], *, blur_p: float, solarize_p: float = 0.0) -> Photometric:
    """Jitter with probability 0.8, grey with 0.2, a blur of sigma 0.1 to 2 pixels, and solarisation.

    Args:
        strength: of the jitter of brightness, contrast, saturation and hue.
        blur_p: probability of the blur.
        solarize_p: probability of the solarisation.
    """
    return Photometric(jitter=strength, jitter_p=0.8, gray_p=0.2, blur_p=blur_p, solarize_p=solarize_p)
