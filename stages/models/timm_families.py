"""What maps timm's models give, by the file of timm that makes them: strides of their levels, sizes of their images.

Plain data, read when planning; `timm_catalogue.py` answers with it. Of a file that is not here nothing is known before
the model is built. A test compares it with timm's own models.
"""

from __future__ import annotations

import re

# Strides of the levels in pixels, from the finest -> the files whose models have them.
_PYRAMIDS = {
    (
        4,
        8,
        16,
        32,
    ): "coat convnext cpubone davit edgenext efficientformer efficientformer_v2 efficientvit_mit "
    "fasternet fastvit focalnet gcvit hgnet hiera hieradet_sam2 iformer inception_next lcnetv2 lowformer mambaout "
    "metaformer mvitv2 nextvit pvt_v2 rdnet repvit starnet swiftformer swin_transformer swin_transformer_v2 "
    "swin_transformer_v2_cr tiny_vit twins",
    (2, 4, 8, 16, 32): "byoanet byobnet cspnet cspnext densenet dpn efficientnet ghostnet hardcorenas hrnet "
    "inception_resnet_v2 inception_v3 inception_v4 maxxvit mobilenetv3 mobilevit nasnet nfnet pnasnet regnet repghost "
    "res2net resnest resnet resnetv2 rexnet senet sknet tresnet vovnet xception xception_aligned",
    (1, 2, 4, 8, 16, 32): "dla vgg",
    (2, 4, 8, 16, 32, 64): "selecsls",
    (8, 8, 16, 32, 64): "csatv2",
    (16, 32, 64): "efficientvit_msra levit shvit",
    (4, 8, 16): "nest",
    (8, 16, 32): "visformer",
    (7, 14, 14, 14): "sequencer",
    (8, 16, 16, 16): "volo",
}
_STRIDES = {module: strides for strides, modules in _PYRAMIDS.items() for module in modules.split()}

# Names within these files whose levels are others.
_OTHERWISE = (
    (re.compile(r"cspdarknet|darknet\d+$"), (1, 2, 4, 8, 16, 32)),
    (re.compile(r"fastvit_mci[34]"), (4, 8, 16, 32, 64)),
    (re.compile(r"levit_.*_s8"), (8, 16, 32)),
)

# One level, of patches, whose side their file says as it does for plain ViTs.
COLUMNS = frozenset(
    {
        "beit",
        "cait",
        "convit",
        "deit",
        "eva",
        "gemma4_vit",
        "mlp_mixer",
        "naflexvit",
        "qwen3_vit",
        "tnt",
        "vision_transformer",
        "vision_transformer_relpos",
        "vision_transformer_sam",
        "xcit",
    }
)

NO_SINGLE_MAP = re.compile(r"crossvit_|coat_(mini|small|tiny)$|efficientvim_|pit_")  # several streams or outputs

# Models that take images of their own size alone: that of the name, else 224 pixels, unless `img_size` says another.
_OWN_SIZE = frozenset(
    {
        "beit",
        "cait",
        "coat",
        "convit",
        "efficientformer",
        "efficientformer_v2",
        "gcvit",
        "hiera",
        "levit",
        "mlp_mixer",
        "nest",
        "tnt",
        "visformer",
        "volo",
        "vision_transformer_relpos",
    }
)
_OWN_SIZE_TOO = re.compile(r"(test_)?coatnet|coatnext|botnet|eca_botnext")
_OWN_WINDOWS = re.compile(r"(test_)?maxx?vit")
_SIZE_IN_NAME = re.compile(r"_(\d{3})$")

WHOLE_PATCHES = COLUMNS - _OWN_SIZE - {"xcit"} | {"swin_transformer", "swin_transformer_v2"}  # sides are multiples

DILATED = frozenset(
    {
        "byobnet",
        "convnext",
        "cspnet",
        "cspnext",
        "efficientnet",
        "hardcorenas",
        "inception_next",
        "mobilenetv3",
        "nfnet",
        "regnet",
        "res2net",
        "resnest",
        "resnet",
        "resnetv2",
        "rexnet",
        "sknet",
        "xception_aligned",
    }
)  # whose last stages can be dilated instead of strided

UNPADDED = frozenset({"convnext"})  # whose stages halve a map without padding: an image has a cell of the last level


def files() -> set[str]:
    """All files of timm of whose models something is known here."""
    return {*_STRIDES, *COLUMNS, *_OWN_SIZE, *DILATED, *UNPADDED}


def pyramid(name: str, module: str) -> tuple[int, ...] | None:
    """Strides of the levels of a model without patches for tokens, from the finest; None where it is not known."""
    if module not in _STRIDES:
        return None
    return next((strides for pattern, strides in _OTHERWISE if pattern.match(name)), _STRIDES[module])


def own_size(name: str, module: str) -> int | None:
    """The side of the only images that a model takes; None where it takes others, or it is not known."""
    return _side(name, module) if module in _OWN_SIZE or _OWN_SIZE_TOO.match(name) else None


def window_side(name: str, module: str) -> int | None:
    """What sides are multiples of, because of windows that are a fraction of the model's own images; None: nothing."""
    return _side(name, module) if _OWN_WINDOWS.match(name) else None


def _side(name: str, module: str) -> int:
    if name.startswith("test_"):  # timm's smallest models
        return 160
    written = _SIZE_IN_NAME.search(name)
    return int(written[1]) if written and module != "levit" else 224
