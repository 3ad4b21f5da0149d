"""MAE: rebuilds the removed patches of an image from those that are kept.

Source: docs/methods.md#mae.

Shape legend: B images of this rank, S side of a view, N patches, K kept ones, D width of a token, P values of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.models.positions import sincos_table
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.losses.mae import mae_loss, random_masking
from stages.pretrain.methods.hosts.settings.mae import MAEDecoderSettings, MAESettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.views.plan import ViewPlan, ViewSpec


class MAE(Method):
    """An encoder of visible patches and a decoder. Term: mae, the mean over `masks` masks of every image."""

    def __init__(self, settings: MAESettings, encoder: Encoder) -> None:
        super().__init__()
        if not encoder.is_vit or encoder.filter is not None:
            raise ValueError("method mae leaves patches out, which only a plain ViT can do: choose a vit_ backbone")
        if settings.size % encoder.stride:
            raise ValueError(f"method.size {settings.size} is not a multiple of the ViT's patch {encoder.stride}")
        self.settings = settings
        self.student = VisibleEncoder(encoder)
        self.decoder = Decoder(encoder, settings.decoder, settings.size // encoder.stride)

    def view_plan(self) -> ViewPlan:
        """One crop, flipped at random and not coloured."""
        settings = self.settings
        return ViewPlan((ViewSpec("global", settings.size, 1, settings.scale, flip_p=settings.flip),))

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The error of the removed patches, for one or more masks of every image."""
        image_B3SS = batch.views["global"][0]
        losses = [self._rebuild(batch, image_B3SS, noise_BN) for noise_BN in self._noise(batch)]
        return {"mae": torch.stack(losses).mean()}

    def _rebuild(self, batch: Batch, image_B3SS: Tensor, noise_BN: Tensor) -> Tensor:
        """The loss of one mask."""
        kept_BK, mask_BN, restore_BN = random_masking(noise_BN, ratio=self.settings.mask_ratio)
        visible = self.student(image_B3SS, kept_BK)
        predicted_BNP = at_least_float32(self.decoder(visible.tokens, restore_BN))
        side = self.student.encoder.stride
        return mae_loss(predicted_BNP, image_B3SS, mask_BN, side=side, normalise=self.settings.normalise_targets)

    def _noise(self, batch: Batch) -> Tensor:
        """Uniform numbers (masks, B, N). An image's depend on its row in the global batch, not on the rank."""
        patches, stop = (self.settings.size // self.student.encoder.stride) ** 2, batch.offset + len(batch)
        rows = torch.rand(stop, self.settings.masks, patches, generator=batch.generator())[batch.offset :]
        return rows.transpose(0, 1).to(batch.views["global"].device)

    def representation(self) -> nn.Module:
        """The encoder of visible patches: two masks of an image are the two views that DSA compares."""
        return self.student

    def after_step(self, step: Step) -> None:
        """Nothing: MAE has no teacher and no queue."""
        return

    def encoder(self) -> Encoder:
        """The ViT, which sees all patches once it is exported."""
        return self.student.encoder


class Visible(NamedTuple):
    """The encoder's output for the patches that it sees."""

    vector: Tensor  # (B, D): mean of the visible patches' tokens
    tokens: Tensor  # (B, prefix + K, D)


class VisibleEncoder(nn.Module):
    """A ViT that sees only some patches of an image, with the positions that they have in it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_B3SS: Tensor, kept_BK: Tensor) -> Visible:
        """The features of the patches with these indices."""
        model, prefix = self.encoder.model, self.encoder.model.num_prefix_tokens
        tokens_BND, _ = self.encoder.embed_patches(image_B3SS)
        index_BKD = kept_BK[..., None].expand(-1, -1, tokens_BND.shape[2])
        tokens_BKD = torch.cat([tokens_BND[:, :prefix], tokens_BND[:, prefix:].gather(1, index_BKD)], dim=1)
        for block in model.blocks:
            tokens_BKD = block(tokens_BKD)
        tokens_BKD = model.norm(tokens_BKD)
        return Visible(tokens_BKD[:, prefix:].mean(dim=1), tokens_BKD)


class Decoder(nn.Module):
    """A transformer that predicts the pixels of every patch.

    Its input: the visible tokens in their places, a mask token in all other places, plus fixed positions.
    """

    positions: Tensor  # (prefix + N, width)

    def __init__(self, encoder: Encoder, settings: MAEDecoderSettings, grid: int) -> None:
        super().__init__()
        self.prefix = int(encoder.model.num_prefix_tokens)
        width = settings.width
        self.embed = nn.Linear(encoder.backbone_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        table_ND = sincos_table(width, (grid, grid), self.prefix).float()
        self.register_buffer("positions", table_ND, persistent=False)
        self.blocks = nn.Sequential(*(Block(width, settings.heads, qkv_bias=True) for _ in range(settings.blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, encoder.stride**2 * 3)

    def forward(self, tokens_BKD: Tensor, restore_BN: Tensor) -> Tensor:
        """The pixels of every patch, (B, N, P).

        Args:
            tokens_BKD: the encoder's output, prefix tokens first.
            restore_BN: for each patch, its index in the list of kept and then removed patches.
        """
        embedded = self.embed(tokens_BKD)
        kept = embedded[:, self.prefix :]
        removed = self.mask_token.expand(len(kept), restore_BN.shape[1] - kept.shape[1], -1).to(kept.dtype)
        index = restore_BN[..., None].expand(-1, -1, kept.shape[2])
        patches = torch.cat([kept, removed], dim=1).gather(1, index)
        tokens = torch.cat([embedded[:, : self.prefix], patches], dim=1) + self.positions
        predicted_BNP: Tensor = self.pixels(self.norm(self.blocks(tokens)))[:, self.prefix :]
        return predicted_BNP
