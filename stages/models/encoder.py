"""The encoder: one interface for all backbones of timm, from a config, from an artifact, and into the files of one.

What it computes is in `feature_extractor.py`. Shape legend: B images, D width, h w rows and columns of a map.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.errors import SourceError, UsageError
from stages.models.checkpoints import load_checkpoint
from stages.models.feature_extractor import FeatureExtractor, Features, ObjectAwareFilter, tokens_to_map
from stages.models.positions import sincos_table
from stages.models.settings import IMAGENET_MEAN, IMAGENET_STD, Backbone, near_multiples
from stages.models.timm_names import timm_kwargs

__all__ = ["Encoder", "Features", "HasFiles"]

_LOG = logging.getLogger(__name__)


class HasFiles(Protocol):
    """What loading an encoder needs of a committed artifact."""

    def local(self, name: str) -> Path:
        """A local path of one file."""
        ...


class Encoder(FeatureExtractor):
    """A timm backbone without its classifier, and optionally an object-aware filter on its map: to train and to store.

    What it gives for images is in `FeatureExtractor`, the file that is exported beside its weights.

    Example: `Encoder.build(Backbone(name="vit_tiny_patch16_224"))(torch.randn(2, 3, 96, 96)).map.shape` is
    (2, 192, 6, 6).
    """

    def __init__(self, model: Any, backbone: Backbone, timm_kwargs: dict[str, Any]) -> None:
        config: dict[str, Any] = model.pretrained_cfg if backbone.pretrained else {}
        super().__init__(
            model,
            stride=backbone.stride,
            out_stage=backbone.out_stage,
            pos_interp=backbone.pos_interp,
            img_size=backbone.img_size,
            mean=backbone.mean or config.get("mean") or IMAGENET_MEAN,
            std=backbone.std or config.get("std") or IMAGENET_STD,
        )
        self.backbone = backbone
        self.timm_kwargs = timm_kwargs  # what timm.create_model needs to give the same features

    def levels(self, image_B3HW: Tensor, taps: Sequence[int] | None = None) -> list[Tensor]:
        """Maps at several depths, for decoders.

        Args:
            image_B3HW: normalised images.
            taps: a model with levels of several strides: their numbers, of the last four from 1, so that a ResNet's are
                1 for C2 to 4 for C5; default all. Others (ViTs): blocks counted from 0, default four evenly spaced
                ones with the last, whose map is normalised.

        Returns: one map (B, D', h', w') for each tap.
        Raises: IndexError for a tap that the model does not have.
        """
        if self.is_resnet:
            stages = self._resnet_levels(image_B3HW, 4)
            return [stages[tap - 1] for tap in taps or (1, 2, 3, 4)]
        depth = self.depth
        if self.is_pyramid:
            taps = list(taps or range(1, depth + 1))
            first = len(self.level_facts) - depth - 1  # the number of a level is its tap and this
        else:  # a shallow one repeats its first block
            taps, first = list(taps or (max(0, depth * (i + 1) // 4 - 1) for i in range(4))), 0
        if not all(0 <= tap - self.is_pyramid < depth for tap in taps):
            raise IndexError(f"layers {taps}: {self.backbone.name} has {depth}, from {int(self.is_pyramid)}")
        found = self._vit_levels(image_B3HW, taps) if self.is_vit else self._other_levels(image_B3HW, taps, first)
        return [found[tap] for tap in taps]

    @property
    def is_pyramid(self) -> bool:
        """Whether it has levels of several strides, as CNNs and Swin have; else its levels are blocks."""
        return len({level["reduction"] for level in self.level_facts}) > 1 or self.is_resnet

    @property
    def depth(self) -> int:
        """How many taps `levels` knows."""
        count = len(self.level_facts)
        return min(count, 4) if self.is_pyramid else len(self.model.blocks) if self.is_vit else count

    @property
    def level_widths(self) -> list[int]:
        """Channels of the maps that `levels` gives by default."""
        if self.is_pyramid:
            return [int(level["num_chs"]) for level in self.level_facts[-self.depth :]]
        return [int(self.level_facts[-1]["num_chs"])] * 3 + [int(self.model.num_features)]

    def _vit_levels(self, image_B3HW: Tensor, taps: Sequence[int]) -> dict[int, Tensor]:
        tokens, (h, w) = self.embed_patches(image_B3HW)
        found: dict[int, Tensor] = {}
        for i, block in enumerate(self.model.blocks):
            tokens = block(tokens)
            if i in taps:
                out = self.model.norm(tokens) if i == self.depth - 1 else tokens
                found[i] = tokens_to_map(out[:, self.model.num_prefix_tokens :], h, w)
        return found

    def _other_levels(self, image_B3HW: Tensor, taps: Sequence[int], first: int) -> dict[int, Tensor]:
        wanted = sorted(set(taps))
        out, maps = self.model.forward_intermediates(
            image_B3HW, indices=[tap + first for tap in wanted], output_fmt="NCHW"
        )
        found = dict(zip(wanted, maps, strict=True))
        if not self.is_pyramid and self.depth - 1 in found:
            found[self.depth - 1] = self._last(out, image_B3HW).map
        return found

    # -- making --------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, backbone: Backbone, *, say: Callable[[str], None] = _LOG.warning) -> Encoder:
        """The encoder a config describes; random weights come from torch's global generator.

        `say` gets a line about each kind of tensor of a checkpoint that did not match; by default a log warning.
        Raises: UsageError for a name or an option that timm does not have, SourceError for an unusable checkpoint.
        """
        kwargs = timm_kwargs(backbone)
        make = functools.partial(timm.create_model, backbone.name, pretrained=backbone.pretrained, **kwargs)
        try:
            try:
                model = make(drop_path_rate=backbone.drop_path)
            except TypeError as error:
                if "drop_path_rate" not in str(error):
                    raise
                if backbone.drop_path:
                    raise UsageError(
                        f"backbone.drop_path: {backbone.name} has no stochastic depth; remove it"
                    ) from error
                model = make()
        except UsageError:
            raise
        except TypeError as error:
            raise UsageError(f"backbone.kwargs: {backbone.name} does not accept them: {error}") from error
        except Exception as error:
            if not backbone.pretrained:
                raise
            raise SourceError(  # a server, a network, a cache: the download can fail in any way
                f"backbone.pretrained: the weights of {backbone.name} cannot be had: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''} (name a file with backbone.checkpoint instead)"
            ) from error
        try:
            encoder = cls(model, backbone, kwargs)
        except ValueError as error:
            raise UsageError(f"backbone.stride: {backbone.name}: {error}") from error
        if encoder.is_vit and backbone.pos_embed == "sincos":
            encoder._fix_positions()
        if not encoder.is_vit and not encoder.is_resnet:
            encoder._require_map()
        if backbone.checkpoint is not None:
            load_checkpoint(model, backbone.checkpoint, say=say)
        return encoder

    def _require_map(self) -> None:
        """Raises UsageError for a model that gives no feature map, or another one than timm says."""
        name, whole = self.backbone.name, self.image_size
        side = min(4 * self.stride, whole)  # a few cells cost nothing; some models take images of one size only
        try:
            _, width, rows, _ = self._map_of_zeros(side)
        except (ValueError, RuntimeError, AssertionError):  # timm's own checks are assertions
            side = whole
            try:
                _, width, rows, _ = self._map_of_zeros(side)
            except (ValueError, RuntimeError, AssertionError) as error:
                raise UsageError(f"backbone.name: {name} has no dense features: {error}") from error
        if width != self.width or not 0.5 <= rows * self.stride / side <= 1.5:  # some cut the border off
            raise UsageError(
                f"backbone.name: {name} gives a map of {width} channels and {rows} rows for an image of {side} pixels, "
                f"where timm says {self.width} channels and stride {self.stride}: name another model"
            )

    def refuses(self, size: int) -> tuple[str, str] | None:
        """Why it takes no images of `size` pixels a side, and what to do; None where it takes them."""
        if (refusal := self.backbone.refuses(size)) is not None or self.is_resnet:
            return refusal
        if self.is_vit:  # one whose patches only timm knows
            near = f"set it to {near_multiples(size, self.stride)}"
            return (f"{size} pixels do not split into patches of {self.stride}", near) if size % self.stride else None
        try:
            self._map_of_zeros(size)
        except (ValueError, RuntimeError, AssertionError) as error:
            what = f"{self.backbone.name} takes no images of {size} pixels: {error or type(error).__name__}"
            return what, f"set it to {self.image_size}, the model's own"
        return None

    @torch.no_grad()
    def _map_of_zeros(self, side: int) -> torch.Size:
        training = self.training
        try:
            return self.eval()(torch.zeros(1, 3, side, side, device=next(self.parameters()).device)).map.shape
        finally:
            self.train(training)

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
                twin.filter = ObjectAwareFilter(**self.filter.settings())
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

        `feature_extractor.encoder(folder)` gives the same features from them.

        Returns: the files written.
        Raises: UsageError for an encoder with parts that these files do not hold.
        """
        self.require_savable()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": 1,
            "timm": {"name": self.backbone.name, "kwargs": self.timm_kwargs},
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "image_size": self.image_size,
            "width": self.width,
            "vector_width": self.vector_width,
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

    def require_savable(self) -> None:
        """Raises UsageError for parts that neither training nor an export could bring back."""
        others = {name.split(".")[0] for name in self.state_dict()} - {"model", "filter"}
        if self.filter is not None and type(self.filter) is not ObjectAwareFilter:
            others.add(f"filter ({type(self.filter).__name__})")
        if others:
            raise UsageError(
                f"an encoder's files hold a timm model and an ObjectAwareFilter, and this one has also "
                f"{', '.join(sorted(others))}: keep such parts in the method, outside of its encoder"
            )

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
                encoder.filter = ObjectAwareFilter(**facts["filter"])
                encoder.filter.load_state_dict(load_file(find("filter.safetensors")))
        return encoder


def _save_weights(module: nn.Module, path: Path) -> None:
    save_file({key: value.detach().contiguous().cpu() for key, value in module.state_dict().items()}, path)
