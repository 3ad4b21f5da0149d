"""Images -> one vector an image and one vector a patch. This file needs torch, timm and safetensors, and nothing else.

Tessera computes all its features with it. `tessera export` copies it beside an encoder's weights, as hubconf.py:

    encoder = torch.hub.load("the folder", "encoder", source="local")
    vector, feature_map = encoder(encoder.normalise(images))

Shape legend: B images, D width, h w rows and columns of the feature map, P prefix tokens ([CLS], registers), N = h*w
cells; in the filter C width of the map, E attention width, M prototypes, H heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

dependencies = ["torch", "timm", "safetensors"]  # torch.hub names those that are not installed


def encoder(folder: str | None = None) -> FeatureExtractor:
    """The exported encoder of a folder, frozen, on the CPU. The folder is this file's own by default."""
    found = Path(folder or Path(__file__).parent)
    facts = json.loads((found / "encoder.json").read_text(encoding="utf-8"))
    model = timm.create_model(facts["timm"]["name"], **facts["timm"]["kwargs"])
    model.load_state_dict(load_file(found / "encoder.safetensors"))
    extractor = FeatureExtractor(
        model,
        stride=facts["backbone"].get("stride"),
        out_stage=facts["backbone"]["out_stage"],
        pos_interp=facts["backbone"]["pos_interp"],
        img_size=facts["image_size"],
        mean=facts["normalisation"]["mean"],
        std=facts["normalisation"]["std"],
    )
    if facts["filter"] is not None:
        extractor.filter = ObjectAwareFilter(**facts["filter"])
        extractor.filter.load_state_dict(load_file(found / "filter.safetensors"))
    return extractor.eval().requires_grad_(False)


class Features(NamedTuple):
    """What an encoder gives for B images."""

    vector: Tensor  # (B, D'): [CLS], or the mean of the map where there is no [CLS]
    map: Tensor  # (B, D, h, w)

    @property
    def tokens_BND(self) -> Tensor:
        """The map as tokens in raster order, (B, h*w, D)."""
        return self.map.flatten(2).transpose(1, 2)


class FeatureExtractor(nn.Module):
    """A timm backbone without its classifier, and optionally an object-aware filter on its map.

    Args:
        model: of timm, made with num_classes=0.
        stride: pixels a cell of the map: it is the model's last level of this stride; default: its last level.
        out_stage: of a ResNet: where its map comes from.
        pos_interp: of a ViT: how its position table is fitted to other image sizes, timm's way or the DINO family's.
        img_size: side of its usual images; default: by the model.
        mean: of an RGB image in 0..1, subtracted by `normalise`.
        std: likewise, the divisor.
    """

    def __init__(
        self,
        model: Any,  # timm's classes carry no types
        *,
        stride: int | None = None,
        out_stage: Literal["c4", "c5"] = "c5",
        pos_interp: Literal["size", "scale_factor_plus_0.1"] = "size",
        img_size: int | None = None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.out_stage, self.pos_interp, self.img_size = out_stage, pos_interp, img_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.filter: Any = None  # an ObjectAwareFilter, or nothing
        self._level = self._chosen_level(stride)  # number of the level of the map; None: what the model ends with

    def _chosen_level(self, stride: int | None) -> int | None:
        strides = [int(level["reduction"]) for level in self.level_facts]
        if self.is_resnet and self.out_stage == "c4":
            return 3
        if stride is None or stride == strides[-1]:
            return None
        if stride not in strides:
            raise ValueError(f"the model's levels have strides {sorted(set(strides))}, not {stride}: name one of them")
        return len(strides) - 1 - strides[::-1].index(stride)

    # -- shape ---------------------------------------------------------------------------------------------

    @property
    def is_vit(self) -> bool:
        """Whether the backbone is a plain ViT."""
        return isinstance(self.model, VisionTransformer)

    @property
    def is_resnet(self) -> bool:
        """Whether the backbone is a ResNet."""
        return hasattr(self.model, "layer4") and hasattr(self.model, "maxpool")

    @property
    def level_facts(self) -> list[dict[str, Any]]:
        """What timm says of the model's levels, from the finest: `reduction` (the stride), `num_chs`."""
        return list(self.model.feature_info)

    @property
    def backbone_width(self) -> int:
        """Channels of the backbone's map, before any filter."""
        return int(self.model.num_features if self._level is None else self.level_facts[self._level]["num_chs"])

    @property
    def width(self) -> int:
        """Channels of the map that `forward` gives."""
        return self.backbone_width + (self.filter.extra_width if self.filter is not None else 0)

    @property
    def vector_width(self) -> int:
        """Length of the vector that `forward` gives; differs from `width` only where the map is no last level."""
        return int(self.model.num_features) + self.width - self.backbone_width

    @property
    def stride(self) -> int:
        """Input pixels one cell of the map stands for: a ViT's patch side, or the stride of the level of the map."""
        return int(self.level_facts[-1 if self._level is None else self._level]["reduction"])

    @property
    def image_size(self) -> int:
        """Side of the images that the position table was made for (ViT), or the usual one."""
        table_for = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        if table_for is not None:
            return int(table_for[0])
        return self.img_size or int(self.model.pretrained_cfg["input_size"][-1])

    # -- features ------------------------------------------------------------------------------------------

    def normalise(self, image_B3HW: Tensor) -> Tensor:
        """RGB in 0..1 -> what `forward` takes."""
        mean, std = (image_B3HW.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image_B3HW - mean) / std

    def forward(self, image_B3HW: Tensor) -> Features:
        """Normalised images of any size that is a multiple of `stride` (ViT) -> vector and map.

        Raises: ValueError if a ViT's image is not a multiple of its patch.
        """
        if self.is_vit:
            features = self._vit(image_B3HW)
        elif self.is_resnet and self._level in (None, 3):
            features = self._resnet(image_B3HW)
        else:
            features = self._other(image_B3HW)
        if self.filter is None or self.filter.placement != "post":
            return features
        # The filter appends attended channels to the map; the vector gets their mean.
        map_BDhw = self.filter(features.map)
        attended = map_BDhw[:, self.backbone_width :].mean(dim=(2, 3))
        return Features(torch.cat([features.vector, attended], dim=1), map_BDhw)

    def _vit(self, image_B3HW: Tensor) -> Features:
        tokens, (h, w) = self.embed_patches(image_B3HW)
        last = len(self.model.blocks) - 1
        for i, block in enumerate(self.model.blocks):
            if i == last and self.filter is not None and self.filter.placement == "pre_last":
                tokens = self._filter_residual(tokens, block, h, w)
            tokens = block(tokens)
        tokens = self.model.norm(tokens)
        prefix = self.model.num_prefix_tokens
        map_BDhw = tokens_to_map(tokens[:, prefix:], h, w)
        vector = tokens[:, 0] if self.model.has_class_token else map_BDhw.mean(dim=(2, 3))
        return Features(vector, map_BDhw)

    def embed_patches(self, image_B3HW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """ViT: the first block's input, prefix tokens and patches with positions (B, P + h*w, D); and the grid (h, w).

        Raises: ValueError if the image is not a multiple of the patch.
        """
        h, w = (side // self.stride for side in image_B3HW.shape[2:])
        if (h * self.stride, w * self.stride) != tuple(image_B3HW.shape[2:]):
            raise ValueError(
                f"an image of {image_B3HW.shape[2]}x{image_B3HW.shape[3]} pixels does not split into patches of "
                f"{self.stride}: choose sizes that are multiples of {self.stride}"
            )
        model = self.model
        patches_BhwD = model.patch_embed(image_B3HW)
        grid = model.patch_embed.grid_size
        if self.pos_interp == "size" or (h, w) == tuple(grid) or model.pos_embed is None:
            tokens = model._pos_embed(patches_BhwD)
        else:
            tokens_of_image = (model.cls_token, getattr(model, "dist_token", None), model.reg_token)
            prefix = [token.expand(len(image_B3HW), -1, -1) for token in tokens_of_image if token is not None]
            embedded = 0 if model.no_embed_class else model.num_prefix_tokens
            positions = interpolate_plus_tenth(model.pos_embed, tuple(grid), (h, w), embedded)
            tokens = patches_BhwD.flatten(1, 2)
            if model.no_embed_class:
                tokens = torch.cat([*prefix, tokens + positions], dim=1)
            else:
                tokens = torch.cat([*prefix, tokens], dim=1) + positions
            tokens = model.pos_drop(tokens)
        return model.norm_pre(model.patch_drop(tokens)), (h, w)

    def _filter_residual(self, tokens: Tensor, block: Any, h: int, w: int) -> Tensor:
        """`pre_last`: the filter reads the last block's normalised input and adds to its residual stream."""
        prefix = self.model.num_prefix_tokens
        fused = self.filter(tokens_to_map(block.norm1(tokens)[:, prefix:], h, w))
        return torch.cat([tokens[:, :prefix], tokens[:, prefix:] + fused.flatten(2).transpose(1, 2)], dim=1)

    def _resnet(self, image_B3HW: Tensor) -> Features:
        c4 = self.stem_to_c4(image_B3HW)
        c5 = self.c5(c4)
        return Features(c5.mean(dim=(2, 3)), c4 if self._level else c5)

    def _other(self, image_B3HW: Tensor) -> Features:
        """Any other timm model whose features are a map or tokens (ConvNeXt, Swin, Eva, ...)."""
        if self._level is None:
            return self._last(self.model.forward_features(image_B3HW), image_B3HW)
        wanted = [self._level, len(self.level_facts) - 1]  # some models end at the last level they are asked for
        out, (map_BDhw, _) = self.model.forward_intermediates(image_B3HW, indices=wanted, output_fmt="NCHW")
        return Features(self._last(out, image_B3HW).vector, map_BDhw)

    def _last(self, out: Any, image_B3HW: Tensor) -> Features:
        if isinstance(out, Tensor) and out.ndim == 3:
            has_class_token = getattr(self.model, "cls_token", None) is not None
            prefix = getattr(self.model, "num_prefix_tokens", None)
            tokens_BND = out[:, int(has_class_token) if prefix is None else prefix :]
            h, w = (-(-side // self.level_facts[-1]["reduction"]) for side in image_B3HW.shape[2:])
            if h * w != tokens_BND.shape[1]:
                raise ValueError(f"{type(self.model).__name__} gives {tokens_BND.shape[1]} tokens, not {h} x {w}")
            map_BDhw = tokens_to_map(tokens_BND, h, w)
            return Features(out[:, 0] if has_class_token else map_BDhw.mean(dim=(2, 3)), map_BDhw)
        width = int(self.model.num_features)
        if not isinstance(out, Tensor) or out.ndim != 4 or width not in (out.shape[1], out.shape[3]):
            raise ValueError(f"{type(self.model).__name__} gives no feature map of {width} channels")
        channels_last = getattr(self.model, "output_fmt", None) == "NHWC" or out.shape[1] != width
        map_BDhw = out.permute(0, 3, 1, 2) if channels_last else out
        return Features(map_BDhw.mean(dim=(2, 3)), map_BDhw)

    def stem_to_c4(self, image_B3HW: Tensor) -> Tensor:
        """ResNet: the map after its third stage, (B, D4, H/16, W/16). `c5(stem_to_c4(x))` is the C5 map."""
        return self._resnet_levels(image_B3HW, 3)[-1]

    def c5(self, c4_BDhw: Tensor) -> Tensor:
        """ResNet: the last stage, on a C4 map or on regions cut from one."""
        c5: Tensor = self.model.layer4(c4_BDhw)
        return c5

    def _resnet_levels(self, image_B3HW: Tensor, count: int) -> list[Tensor]:
        model = self.model
        x = model.maxpool(model.act1(model.bn1(model.conv1(image_B3HW))))
        levels = []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4)[:count]:
            x = stage(x)
            levels.append(x)
        return levels


class ObjectAwareFilter(nn.Module):
    """CoTAP's prototype cross-attention on a feature map.

    Source: Eq. 17 to 19 of the paper, as Tessera's docs/methods.md#cotap-object-aware-filter gives them.

    Prototypes of 3 x 3 cells slide over a map as convolution kernels; each cell attends over the prototypes.

    `post` appends the attended values to the map: (B, C, h, w) -> (B, C + E, h, w). `pre_last` fuses both back to C
    channels, to be added to the residual stream before a ViT's last block.

    Args:
        width: C.
        prototypes: M.
        heads: channels are split among them; 1 is the paper's literal single-head form.
        attention_width: E; default C.
        kernel: side of a prototype in cells, odd.
        out_projection: a linear layer on the attended values.
        placement: where the extractor puts it.

    Raises: ValueError if the heads do not divide E, or the kernel is even.
    """

    def __init__(
        self,
        width: int,
        prototypes: int = 64,
        heads: int = 1,
        attention_width: int | None = None,
        kernel: int = 3,
        out_projection: bool = True,
        placement: Literal["post", "pre_last"] = "post",
    ) -> None:
        super().__init__()
        inner = attention_width or width
        if inner % heads:
            raise ValueError(f"{heads} heads do not divide an attention width of {inner}: choose heads that do")
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, but a prototype is centred on a cell: choose an odd number")
        self.width, self.heads, self.kernel, self.attention_width = width, heads, kernel, inner
        self.placement: Literal["post", "pre_last"] = placement
        self.prototypes = nn.Parameter(torch.randn(prototypes, kernel, kernel, width) * 0.02)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, inner) if out_projection else None
        self.fuse = nn.Linear(width + inner, width) if placement == "pre_last" else None
        for layer in (self.query, self.key, self.value, self.out, self.fuse):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def extra_width(self) -> int:
        """Channels that `forward` adds to the map."""
        return self.attention_width if self.placement == "post" else 0

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "width": self.width,
            "prototypes": len(self.prototypes),
            "heads": self.heads,
            "attention_width": self.attention_width,
            "kernel": self.kernel,
            "out_projection": self.out is not None,
            "placement": self.placement,
        }

    def scores(self, map_BChw: Tensor) -> Tensor:
        """mu: cross-correlation of queries with the prototypes' keys, zero padded: (B, H, h*w, M) (Eq. 18).

        The paper prints U_q and h_k but defines h_q and U_k only: keys of the prototypes slide over patch queries.
        """
        per_head = self.attention_width // self.heads
        query_BEhw = functional.conv2d(map_BChw, self.query.weight[:, :, None, None])
        # (M, k, k, E) -> H groups of M kernels with E/H channels each.
        kernels = self.key(self.prototypes).permute(0, 3, 1, 2)
        kernels = kernels.unflatten(1, (self.heads, per_head)).transpose(0, 1).flatten(0, 1)
        mu = functional.conv2d(query_BEhw, kernels.to(query_BEhw.dtype), padding=self.kernel // 2, groups=self.heads)
        return mu.reshape(len(mu), self.heads, len(self.prototypes), -1).transpose(2, 3)

    def attend(self, map_BChw: Tensor) -> Tensor:
        """softmax(mu / sqrt(E / H)) times the prototypes' mean values, before any out-projection: (B, E, h, w)."""
        per_head = self.attention_width // self.heads
        attention_BHNM = (self.scores(map_BChw) / per_head**0.5).softmax(dim=-1)
        value_ME = self.value(self.prototypes).mean(dim=(1, 2))
        value_HMe = value_ME.unflatten(1, (self.heads, per_head)).transpose(0, 1)
        attended_BHNe = attention_BHNM @ value_HMe.to(attention_BHNM.dtype)
        return attended_BHNe.transpose(2, 3).flatten(1, 2).reshape(len(map_BChw), -1, *map_BChw.shape[2:])

    def forward(self, map_BChw: Tensor) -> Tensor:
        """h_o of Eq. 19 (`post`, (B, C + E, h, w)), or what joins the residual stream (`pre_last`, (B, C, h, w))."""
        attended_BEhw = self.attend(map_BChw)
        if self.out is not None:
            attended_BEhw = _per_cell(self.out, attended_BEhw)
        joined = torch.cat([map_BChw, attended_BEhw.to(map_BChw.dtype)], dim=1)
        return joined if self.fuse is None else _per_cell(self.fuse, joined)

    def pooled(self, map_BChw: Tensor) -> Tensor:
        """F_down: a map pooled to the prototypes' grid, k x k cells, and flattened in their order, (B, k*k*C)."""
        return functional.adaptive_avg_pool2d(map_BChw, self.kernel).permute(0, 2, 3, 1).flatten(1)


def _per_cell(layer: nn.Linear, map_BChw: Tensor) -> Tensor:
    return functional.conv2d(map_BChw, layer.weight[:, :, None, None], layer.bias)


def interpolate_plus_tenth(table_1ND: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """The DINO family's interpolation: bicubic by the factor (new + 0.1) / old, which differs slightly from timm's.

    Args:
        table_1ND: (1, P + h*w, D), for the grid `old`.
        old: (h, w).
        new: (h', w').
        prefix: P, the rows that stay as they are.

    Returns: (1, P + h'*w', D).
    """
    if old == new:
        return table_1ND
    head, grid_1ND = table_1ND[:, :prefix], table_1ND[:, prefix:]
    map_1Dhw = grid_1ND.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    factors = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    map_1Dhw = functional.interpolate(map_1Dhw, scale_factor=factors, mode="bicubic")
    resized = map_1Dhw.permute(0, 2, 3, 1).flatten(1, 2).to(table_1ND.dtype)
    return torch.cat([head, resized], dim=1)


def tokens_to_map(tokens_BND: Tensor, h: int, w: int) -> Tensor:
    """Tokens in raster order (B, h*w, D) -> (B, D, h, w)."""
    return tokens_BND.transpose(1, 2).reshape(len(tokens_BND), -1, h, w)
