"""The encoder: the same interface for ViTs and ResNets of timm. Everything that needs features goes through this file.

Shape legend: B images, D width, h w rows and columns of the feature map, P prefix tokens ([CLS], registers), N tokens.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.errors import SourceError, UsageError
from stages.models.checkpoints import load_checkpoint
from stages.models.positions import interpolate_plus_tenth, sincos_table
from stages.models.settings import IMAGENET_MEAN, IMAGENET_STD, Backbone
from stages.models.timm_names import timm_kwargs

_LOG = logging.getLogger(__name__)


class Features(NamedTuple):
    """What an encoder gives for B images."""

    vector: Tensor  # (B, D): [CLS], or the mean of the map where there is no [CLS]
    map: Tensor  # (B, D, h, w)

    @property
    def tokens_BND(self) -> Tensor:
        """The map as tokens in raster order, (B, h*w, D)."""
        return self.map.flatten(2).transpose(1, 2)


class HasFiles(Protocol):
    """What loading an encoder needs of a committed artifact."""

    def local(self, name: str) -> Path:
        """A local path of one file."""
        ...


class Encoder(nn.Module):
    """A timm backbone without its classifier, and optionally an object-aware filter on its map.

    Example: `Encoder.build(Backbone(name="vit_tiny_patch16_224"))(torch.randn(2, 3, 96, 96)).map.shape` is
    (2, 192, 6, 6).
    """

    def __init__(self, model: Any, backbone: Backbone, timm_kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model: Any = model  # timm's classes carry no types
        self.backbone = backbone
        self.timm_kwargs = timm_kwargs  # what timm.create_model needs to give the same features
        # An ObjectAwareFilter or None: it has placement ("post" | "pre_last"), extra_width (channels appended to the
        # map, 0 for pre_last), settings() (JSON-able constructor arguments) and forward(map) -> map.
        self.filter: Any = None
        config: dict[str, Any] = self.model.pretrained_cfg if backbone.pretrained else {}
        self.mean = tuple(backbone.mean or config.get("mean") or IMAGENET_MEAN)
        self.std = tuple(backbone.std or config.get("std") or IMAGENET_STD)

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
    def backbone_width(self) -> int:
        """Channels of the backbone's map, before any filter."""
        if self.is_resnet:
            return int(self.model.feature_info[3 if self.backbone.out_stage == "c4" else 4]["num_chs"])
        return int(self.model.num_features)

    @property
    def width(self) -> int:
        """Channels of the map that `forward` gives."""
        return self.backbone_width + (self.filter.extra_width if self.filter is not None else 0)

    @property
    def vector_width(self) -> int:
        """Length of the vector that `forward` gives; differs from `width` only for a ResNet's C4 map."""
        return int(self.model.num_features) + self.width - self.backbone_width

    @property
    def stride(self) -> int:
        """Input pixels one cell of the map stands for: the patch side, or the ResNet's output stride."""
        if hasattr(self.model, "patch_embed"):
            return int(self.model.patch_embed.patch_size[0])
        if self.is_resnet and self.backbone.out_stage == "c4":
            return min(16, self.backbone.output_stride)
        return int(self.model.feature_info[-1]["reduction"])

    @property
    def image_size(self) -> int:
        """Side of the images that the position table was made for (ViT), or timm's usual one."""
        if hasattr(self.model, "patch_embed"):
            return int(self.model.patch_embed.img_size[0])
        return self.backbone.img_size or int(self.model.pretrained_cfg["input_size"][-1])

    # -- features ------------------------------------------------------------------------------------------

    def forward(self, image_B3HW: Tensor) -> Features:
        """Normalised images of any size that is a multiple of `stride` (ViT) -> vector and map.

        Raises: ValueError if a ViT's image is not a multiple of its patch.
        """
        if self.is_vit:
            features = self._vit(image_B3HW)
        elif self.is_resnet:
            features = self._resnet(image_B3HW)
        else:
            features = self._other(image_B3HW)
        if self.filter is None or self.filter.placement != "post":
            return features
        # The filter appends D' attended channels to the map; the vector gets their mean
        # (docs/methods.md#cotap-object-aware-filter).
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
        map_BDhw = _to_map(tokens[:, prefix:], h, w)
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
        if self.backbone.pos_interp == "size" or (h, w) == tuple(grid) or model.pos_embed is None:
            tokens = model._pos_embed(patches_BhwD)
        else:
            prefix = [
                token.expand(len(image_B3HW), -1, -1)
                for token in (model.cls_token, model.reg_token)
                if token is not None
            ]
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
        fused = self.filter(_to_map(block.norm1(tokens)[:, prefix:], h, w))
        return torch.cat([tokens[:, :prefix], tokens[:, prefix:] + fused.flatten(2).transpose(1, 2)], dim=1)

    def _resnet(self, image_B3HW: Tensor) -> Features:
        c4 = self.stem_to_c4(image_B3HW)
        c5 = self.c5(c4)
        return Features(c5.mean(dim=(2, 3)), c4 if self.backbone.out_stage == "c4" else c5)

    def _other(self, image_B3HW: Tensor) -> Features:
        """Any other timm model whose features are a map or tokens (ConvNeXt, Swin, Eva, ...)."""
        out = self.model.forward_features(image_B3HW)
        if out.ndim == 3:
            prefix = int(getattr(self.model, "num_prefix_tokens", 0))
            map_BDhw = _to_map(out[:, prefix:], *(side // self.stride for side in image_B3HW.shape[2:]))
            return Features(out[:, 0] if prefix else map_BDhw.mean(dim=(2, 3)), map_BDhw)
        map_BDhw = out if out.shape[1] == self.backbone_width else out.permute(0, 3, 1, 2)
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

    def levels(self, image_B3HW: Tensor, taps: Sequence[int] | None = None) -> list[Tensor]:
        """Maps at several depths, for decoders.

        Args:
            image_B3HW: normalised images.
            taps: ResNet: stages, 1 for C2 to 4 for C5, default all. ViT: blocks counted from 0, default four evenly
                spaced ones with the last, whose map is normalised.

        Returns: one map (B, D', h', w') for each tap.
        Raises: UsageError for a backbone that is neither.
        """
        if self.is_resnet:
            stages = self._resnet_levels(image_B3HW, 4)
            return [stages[tap - 1] for tap in taps or (1, 2, 3, 4)]
        if not self.is_vit:
            raise UsageError(
                f"backbone {self.backbone.name}: levels exist for ViTs and ResNets only; choose one of those"
            )
        depth = len(self.model.blocks)
        taps = list(taps or (max(0, depth * (i + 1) // 4 - 1) for i in range(4)))  # a shallow one repeats its first
        tokens, (h, w) = self.embed_patches(image_B3HW)
        found: dict[int, Tensor] = {}
        for i, block in enumerate(self.model.blocks):
            tokens = block(tokens)
            if i in taps:
                out = self.model.norm(tokens) if i == depth - 1 else tokens
                found[i] = _to_map(out[:, self.model.num_prefix_tokens :], h, w)
        return [found[tap] for tap in taps]

    # -- making --------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, backbone: Backbone, *, say: Callable[[str], None] = _LOG.warning) -> Encoder:
        """The encoder a config describes; random weights come from torch's global generator.

        `say` gets a line about each kind of tensor of a checkpoint that did not match; by default a log warning.
        Raises: UsageError for a name or an option that timm does not have, SourceError for an unusable checkpoint.
        """
        kwargs = timm_kwargs(backbone)
        try:
            model = timm.create_model(
                backbone.name, pretrained=backbone.pretrained, drop_path_rate=backbone.drop_path, **kwargs
            )
        except TypeError as error:
            raise UsageError(f"backbone.kwargs: {backbone.name} does not accept them: {error}") from error
        except Exception as error:
            if not backbone.pretrained:
                raise
            raise SourceError(  # a server, a network, a cache: the download can fail in any way
                f"backbone.pretrained: the weights of {backbone.name} cannot be had: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''} (name a file with backbone.checkpoint instead)"
            ) from error
        encoder = cls(model, backbone, kwargs)
        if encoder.is_vit and backbone.pos_embed == "sincos":
            encoder._fix_positions()
        if backbone.checkpoint is not None:
            load_checkpoint(model, backbone.checkpoint, say=say)
        return encoder

    def _fix_positions(self) -> None:
        table, model = self.model.pos_embed, self.model
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        with torch.no_grad():
            table.copy_(sincos_table(table.shape[-1], model.patch_embed.grid_size, prefix))
        table.requires_grad_(False)

    def untrained_twin(self, seed: int) -> Encoder:
        """A randomly initialised encoder of the same shape, filter included, on the same device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = type(self).build(self.backbone.untrained())
            twin.mean, twin.std = self.mean, self.std
            if self.filter is not None:
                twin.filter = _build_filter(self.filter.settings())
        return twin.to(next(self.parameters()).device)

    def teacher(self) -> Encoder:
        """A copy that needs no gradient and has no stochastic depth, which is the student's alone."""
        twin = copy.deepcopy(self).requires_grad_(False)
        for module in twin.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return twin

    # -- files ---------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, *, method: str | None = None) -> list[Path]:
        """Write encoder.safetensors (timm's own keys), encoder.json and, with a filter, filter.safetensors.

        Without a filter, `timm.create_model(json["timm"]["name"], **json["timm"]["kwargs"])` and the weights are all
        that is needed (with pos_interp `size`, at every image size). Returns the files written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": 1,
            "timm": {"name": self.backbone.name, "kwargs": self.timm_kwargs},
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "image_size": self.image_size,
            "width": self.width,
            "stride": self.stride,
            "method": method,
            # Without where the first weights came from, which the manifest says: loading must not look for them.
            "backbone": self.backbone.untrained().model_dump(mode="json"),
            "filter": None if self.filter is None else self.filter.settings(),
        }
        files = [folder / "encoder.safetensors", folder / "encoder.json"]
        _save_weights(self.model, files[0])
        files[1].write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.filter is not None:
            files.append(folder / "filter.safetensors")
            _save_weights(self.filter, files[-1])
        return files

    @classmethod
    def load(cls, source: HasFiles | Path | str) -> Encoder:
        """An encoder from an `encoder` artifact or from a folder that `save` wrote."""

        def find(name: str) -> Path:
            return Path(source) / name if isinstance(source, Path | str) else source.local(name)

        facts = json.loads(find("encoder.json").read_text(encoding="utf-8"))
        normalisation = facts["normalisation"]
        backbone = Backbone.model_validate(facts["backbone"])
        backbone = backbone.model_copy(
            update={"mean": tuple(normalisation["mean"]), "std": tuple(normalisation["std"])}
        )
        with torch.random.fork_rng(devices=[]):
            encoder = cls.build(backbone)
            encoder.model.load_state_dict(load_file(find("encoder.safetensors")))
            if facts["filter"] is not None:
                encoder.filter = _build_filter(facts["filter"])
                encoder.filter.load_state_dict(load_file(find("filter.safetensors")))
        return encoder


def _build_filter(settings: dict[str, Any]) -> nn.Module:
    from stages.models.object_aware_filter import ObjectAwareFilter

    return ObjectAwareFilter(**settings)


def _to_map(tokens_BND: Tensor, h: int, w: int) -> Tensor:
    return tokens_BND.transpose(1, 2).reshape(len(tokens_BND), -1, h, w)


def _save_weights(module: nn.Module, path: Path) -> None:
    save_file({key: value.detach().contiguous().cpu() for key, value in module.state_dict().items()}, path)
