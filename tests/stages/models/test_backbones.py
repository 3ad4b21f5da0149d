"""One tiny model of every kind that timm has: what a plan knows of its maps is what it gives, at every stride."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.errors import UsageError
from stages.models import planned, timm_catalogue, timm_families
from stages.models.decoders import build_decoder
from stages.models.encoder import Encoder
from stages.models.inference import require_size
from stages.models.settings import Backbone

TOKENS = {"embed_dim": 48, "depth": 3, "num_heads": 3}
PRETRAINED = Path(__file__).parents[3] / "data" / "pretrained" / "efficientnet_lite0.safetensors"


class Kind(NamedTuple):
    """A model, and what its documentation says of it."""

    backbone: dict[str, Any]
    strides: tuple[int, ...]  # from the finest
    other_size: bool  # whether it takes images of another size than its own


KINDS = {
    "convnext": Kind({"name": "test_convnext"}, (4, 8, 16, 32), True),
    "convnext_dilated": Kind({"name": "test_convnext", "output_stride": 8}, (4, 8, 8, 8), True),
    "efficientnet": Kind({"name": "test_efficientnet"}, (2, 4, 8, 16, 32), True),
    "efficientnet_dilated": Kind({"name": "test_efficientnet", "output_stride": 16}, (2, 4, 8, 16, 16), True),
    "mobilenet": Kind({"name": "mobilenetv3_small_050"}, (2, 4, 8, 16, 32), True),
    "regnet": Kind({"name": "regnetx_002"}, (2, 4, 8, 16, 32), True),
    "resnet": Kind({"name": "test_resnet"}, (2, 4, 8, 16, 32), True),
    "resnet_dilated": Kind({"name": "test_resnet", "output_stride": 8}, (2, 4, 8, 8, 8), True),
    "swin": Kind(
        {
            "name": "swin_tiny_patch4_window7_224",
            "img_size": 64,
            "kwargs": {"embed_dim": 24, "depths": [1, 1, 1, 1], "window_size": 2},
        },
        (4, 8, 16, 32),
        True,
    ),
    "maxvit": Kind({"name": "test_maxvit", "img_size": 64}, (2, 4, 8, 16, 32), False),
    "coatnet": Kind({"name": "test_coatnet", "img_size": 64}, (2, 4, 8, 16, 32), False),
    "hiera": Kind(
        {
            "name": "hiera_tiny_224",
            "img_size": 64,
            "kwargs": {"embed_dim": 24, "num_heads": 1, "stages": [1, 1, 1, 1]},
        },
        (4, 8, 16, 32),
        False,
    ),
    "sam": Kind({"name": "samvit_base_patch16", "img_size": 64, "kwargs": TOKENS}, (16,), True),
    "vit_hybrid": Kind(
        {"name": "vit_tiny_r_s16_p8_224", "img_size": 64, "kwargs": TOKENS},
        (32,),
        True,
    ),
    "vit": Kind({"name": "test_vit", "img_size": 64}, (16,), True),
    "dinov2_registers": Kind({"name": "vit_small_patch14_reg4_dinov2", "img_size": 56, "kwargs": TOKENS}, (14,), True),
    "dinov3": Kind({"name": "vit_small_patch16_dinov3", "img_size": 64, "kwargs": TOKENS}, (16,), True),
    "eva": Kind({"name": "eva02_tiny_patch14_224", "img_size": 56, "kwargs": TOKENS}, (14,), True),
    "beit": Kind({"name": "beit_base_patch16_224", "img_size": 64, "kwargs": TOKENS}, (16,), False),
}
LEVELS = [(name, stride) for name, kind in KINDS.items() for stride in sorted(set(kind.strides)) if stride > 2]


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    """Every kind with its last map."""
    torch.manual_seed(0)
    return {name: Encoder.build(Backbone.model_validate(kind.backbone)).eval() for name, kind in KINDS.items()}


def at(encoder: Encoder, stride: int) -> Encoder:
    """The same network, whose map is that of another stride."""
    backbone = encoder.backbone.model_copy(update={"stride": stride})
    return type(encoder)(encoder.model, backbone, encoder.timm_kwargs).eval()


def images(encoder: Encoder, side: int | None = None) -> Tensor:
    side = side or (encoder.image_size if encoder.backbone.img_size else 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "stride"), LEVELS)
@torch.no_grad()
def test_maps_of_every_stride(name: str, stride: int, encoders: dict[str, Encoder]) -> None:
    whole, level = encoders[name], at(encoders[name], stride)
    image = images(whole)
    vector, map_BDhw = level(image)
    assert level.backbone.cell == level.stride == stride
    side = image.shape[-1] // stride
    assert map_BDhw.shape == (2, level.width, side, side)
    assert map_BDhw.isfinite().all()
    torch.testing.assert_close(vector, whole(image).vector)
    assert vector.shape == (2, level.vector_width)
    if stride == KINDS[name].strides[-1]:
        assert torch.equal(map_BDhw, whole(image).map), "the last level is what an encoder gives as it stands"


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_plan_knows_what_the_built_model_says(name: str, encoders: dict[str, Encoder]) -> None:
    encoder, kind = encoders[name], KINDS[name]
    real = tuple(int(level["reduction"]) for level in encoder.level_facts)
    assert (real if len(set(real)) > 1 else real[:1]) == kind.strides
    assert encoder.backbone.strides in (kind.strides, None)
    assert encoder.backbone.strides == kind.strides or name == "vit_hybrid"
    side = images(encoder).shape[-1]
    assert encoder.refuses(side) is None
    other = side // 2 * 3
    assert (encoder.refuses(other) is None) == kind.other_size
    if kind.other_size:
        assert encoder(images(encoder, other)).map.shape[-1] == -(-other // encoder.stride)
    else:
        assert encoder.backbone.refuses(other) is not None, "already when planning"
        with pytest.raises(UsageError, match=f"stages.x.size: .*{other}.* set it to"):
            require_size(encoder, other, "stages.x.size")


@pytest.mark.parametrize("name", KINDS)
def test_levels_feed_decoders_and_get_gradients(name: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[name]
    image = images(encoder)
    levels = encoder.levels(image)
    assert [level.shape[1] for level in levels] == encoder.level_widths
    if not encoder.is_pyramid:
        torch.testing.assert_close(levels[-1], encoder(image).map)
    out = build_decoder("fpn", encoder, 5)(levels)
    assert out.shape == (2, 5, *levels[0].shape[2:])
    out.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    encoder.zero_grad()
    with pytest.raises(IndexError):
        encoder.levels(image, [99])


@pytest.mark.parametrize("name", ["convnext", "swin", "efficientnet", "dinov3"])
@torch.no_grad()
def test_files_keep_the_level(name: str, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    stride = KINDS[name].strides[0]
    encoder = at(encoders[name], stride)
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path).eval()
    assert loaded.stride == stride
    for ours, theirs in zip(loaded(images(encoder)), encoder(images(encoder)), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_levels_are_timms_own(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["efficientnet"]
    timms = timm.create_model("test_efficientnet", features_only=True).eval()
    timms.load_state_dict(encoder.model.state_dict(), strict=False)
    image = images(encoder)
    for stride, map_BDhw in zip((2, 4, 8, 16), timms(image), strict=False):
        torch.testing.assert_close(at(encoder, stride)(image).map, map_BDhw)
    for ours, theirs in zip(encoder.levels(image), timms(image)[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_file_of_the_families_is_timms() -> None:
    known = {model.module for name in timm_catalogue.names() if (model := timm_catalogue.look_up(name))}
    listed = timm_families.files()
    assert listed <= known, "a name that timm does not have"
    unknown = {"convmixer", "crossvit", "deepseek_vit", "efficientvim", "mobilenetv5", "pit", "vitamin"}
    assert known - listed == unknown | {"vision_transformer_hybrid"}


@pytest.mark.parametrize(
    "name",
    [
        "cspdarknet53",
        "fastvit_mci3",
        "levit_conv_384_s8",
        "selecsls42",
        "vgg11",
        "sequencer2d_s",
        "volo_d1_224",
        "nest_tiny",
        "shvit_s1",
        "csatv2",
        "xcit_nano_12_p8_224",
        "mixer_b32_224",
        "visformer_tiny",
        "dla34",
        "pvt_v2_b0",
    ],
)
def test_a_plan_knows_unusual_strides(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    real = tuple(int(level["reduction"]) for level in model.feature_info)
    assert Backbone(name=name).strides == (real if len(set(real)) > 1 else real[:1])


@pytest.mark.skipif(not PRETRAINED.is_file(), reason="needs data/pretrained")
@torch.no_grad()
def test_real_weights_at_a_finer_stride() -> None:
    said: list[str] = []
    backbone = Backbone(name="efficientnet_lite0", checkpoint=str(PRETRAINED), stride=16)
    encoder = Encoder.build(backbone, say=said.append).eval()
    assert (encoder.width, encoder.vector_width, encoder.stride) == (112, 1280, 16)
    assert encoder(images(encoder)).map.shape == (2, 112, 4, 4)
    assert not any("left random" in line for line in said), said


@pytest.mark.parametrize(
    ("backbone", "rule"),
    [
        (
            {"name": "convnext_atto", "stride": 2},
            r"stride: the levels of convnext_atto have strides 4, 8, 16, 32, none",
        ),
        (
            {"name": "vit_small_patch16_224", "stride": 8},
            r"patches of 16 pixels, none of 8; remove it or set patch_size",
        ),
        (
            {"name": "vit_small_patch16_dinov3", "stride": 8},
            r"one level, of patches of 16 pixels, none of 8; remove it$",
        ),
        ({"name": "resnet18", "stride": 16, "output_stride": 8}, "have strides 2, 4, 8, none of 16"),
        ({"name": "resnet18", "stride": 16, "out_stage": "c4"}, "stride, out_stage: both choose the level"),
        ({"name": "swin_tiny_patch4_window7_224", "output_stride": 16}, "output_stride: timm does not dilate"),
        ({"name": "crossvit_9_240"}, "name: crossvit_9_240 gives several streams and no single feature map"),
        (
            {"name": "vit_tiny_r_s16_p8_224", "stride": 8, "kwargs": TOKENS},
            "backbone.stride: .* have strides \\[32\\], not 8",
        ),
    ],
)
def test_levels_that_are_not_there(backbone: dict[str, Any], rule: str) -> None:
    with pytest.raises((UsageError, ValidationError)) as caught:
        Encoder.build(Backbone.model_validate(backbone))
    said = str(caught.value)
    if isinstance(caught.value, ValidationError):
        said = caught.value.errors()[0]["msg"]
    assert re.search(rule, said), said


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        ({"name": "vit_tiny_patch16_224"}, 100, "do not split into patches of 16, those of vit_tiny"),
        ({"name": "vit_small_patch16_dinov3"}, 100, "do not split into patches of 16, those of vit_small"),
        ({"name": "swin_tiny_patch4_window7_224"}, 98, "do not split into patches of 4, those of swin"),
        ({"name": "beit_base_patch16_224"}, 96, "takes images of 224 pixels only, not of 96"),
        ({"name": "beit_base_patch16_224", "img_size": 96}, 224, "takes images of 96 pixels only, not of 224"),
        ({"name": "maxvit_tiny_tf_224"}, 96, "takes images of multiples of 224 pixels only, not of 96"),
        ({"name": "beit_base_patch16_224", "img_size": 96}, 96, None),
        ({"name": "maxvit_tiny_tf_224"}, 448, None),
        ({"name": "convnext_atto"}, 97, None),
    ],
)
def test_sizes_that_a_plan_refuses(backbone: dict[str, Any], size: int, words: str | None) -> None:
    found = list(planned.undivided(Backbone.model_validate(backbone), {"size": size}))
    if words is None:
        assert found == []
    else:
        [(path, what, remedy)] = found
        assert path == "size"
        assert words in what
        assert remedy.startswith("set it to ")


def test_layers_that_a_plan_knows() -> None:
    swin = Backbone(name="swin_tiny_patch4_window7_224")
    assert planned.no_layer(swin, 4) is None
    assert planned.no_layer(Backbone(name="vit_tiny_patch16_224"), 11) is None
    what, remedy = planned.no_layer(swin, 5) or ("", "")
    assert (what, remedy) == (f"{swin.name} has levels 1 to 4, and no 5", "name one of these, or leave it out")
    assert planned.no_layer(swin, 0) is not None


def test_maps_too_coarse_for_a_use() -> None:
    convnext = Backbone(name="convnext_atto")
    assert list(planned.too_coarse(convnext, {"size": 64}, 2, "terms of patches")) == []
    [(path, what, remedy)] = planned.too_coarse(convnext, {"size": 32}, 2, "terms of patches")
    assert (path, what) == (
        "size",
        "the map of convnext_atto has 1 x 1 cells at 32 pixels, too few for terms of patches",
    )
    assert remedy == "raise it to 33 or more, or backbone.stride to 16"
