"""Our ViT without [CLS] gives FLSL's tokens from FLSL's weights, at the table's grid and at a smaller one."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from tests.golden.golden import load


def test_flsl_vit_without_cls_at_two_sizes(tmp_path) -> None:
    golden = load("flsl_vit_nocls")
    weights = {key[2:]: torch.from_numpy(value) for key, value in golden.items() if key.startswith("w.")}
    save_file(
        {f"module.backbone.{key}": value.contiguous() for key, value in weights.items()}, tmp_path / "w.safetensors"
    )
    width, patch = weights["patch_embed.proj.weight"].shape[0], int(golden["patch"])
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    said: list[str] = []
    encoder = Encoder.build(
        Backbone(
            name="vit_tiny_patch16_224",
            checkpoint=str(tmp_path / "w.safetensors"),
            img_size=golden["image"].shape[-1],
            patch_size=patch,
            class_token=False,
            pos_embed="sincos",
            pos_interp="scale_factor_plus_0.1",
            kwargs={"embed_dim": width, "depth": depth, "num_heads": int(golden["heads"])},
        ),
        say=said.append,
    ).eval()
    for image, tokens in (("image", "tokens"), ("image_small", "tokens_small")):
        with torch.no_grad():
            features = encoder(torch.from_numpy(golden[image]))
        np.testing.assert_allclose(features.tokens_BND.numpy(), golden[tokens], atol=1e-5)
        np.testing.assert_allclose(features.vector.numpy(), golden[tokens].mean(axis=1), atol=1e-5)
    # FLSL's file still holds the [CLS] that its model never uses: that is said, not hidden.
    assert any("not in the model: cls_token" in line for line in said)
