"""The encoder's one face: shapes for every family, files that timm alone can read, checkpoints, ResNet's split."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import SourceError, UsageError
from stages.models import timm_catalogue
from stages.models.encoder import Encoder
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.settings import Backbone

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "window_size": 2}
VIT = Backbone(name="vit_tiny_patch16_224", img_size=64, kwargs=TINY)


def features_of(encoder: Encoder, *size: int):
    torch.manual_seed(0)
    with torch.no_grad():
        return encoder.eval()(torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    ("backbone", "size", "width", "stride", "grid"),
    [
        (VIT, (64, 96), 48, 16, (4, 6)),
        (VIT.model_copy(update={"patch_size": 8}), (32, 24), 48, 8, (4, 3)),
        (VIT.model_copy(update={"class_token": False, "pos_embed": "sincos"}), (48, 64), 48, 16, (3, 4)),
        (Backbone(name="resnet18"), (64, 96), 512, 32, (2, 3)),
        (Backbone(name="resnet18", output_stride=8), (64, 96), 512, 8, (8, 12)),
        (Backbone(name="resnet18", out_stage="c4"), (64, 96), 256, 16, (4, 6)),
        (Backbone(name="convnext_atto"), (64, 96), 320, 32, (2, 3)),
        (Backbone(name="swin_tiny_patch4_window7_224", img_size=64, kwargs=SWIN), (64, 64), 192, 32, (2, 2)),
        (Backbone(name="ghostnet_050"), (64, 96), 480, 32, (2, 3)),
        (Backbone(name="levit_128s"), (224, 224), 384, 64, (4, 4)),
    ],
    ids=["vit", "patch8", "no_cls_sincos", "resnet", "dilated", "c4", "convnext", "swin", "no_drop_path", "levit"],
)
def test_shapes(backbone, size, width, stride, grid) -> None:
    encoder = Encoder.build(backbone)
    features = features_of(encoder, *size)
    assert (encoder.width, encoder.stride) == (width, stride)
    assert features.map.shape == (2, width, *grid)
    assert features.vector.shape == (2, encoder.vector_width)
    assert features.tokens_BND.shape == (2, grid[0] * grid[1], width)
    torch.testing.assert_close(features.tokens_BND[:, 1], features.map[:, :, 0, 1])


def test_image_that_does_not_split_into_patches_is_named() -> None:
    with pytest.raises(ValueError, match="64x70 pixels does not split into patches of 16"):
        Encoder.build(VIT)(torch.zeros(1, 3, 64, 70))


@pytest.mark.parametrize(
    "backbone",
    [
        VIT,
        VIT.model_copy(update={"class_token": False, "pos_embed": "sincos", "drop_path": 0.2}),
        Backbone(name="resnet18", output_stride=16),
    ],
    ids=["vit", "no_cls", "resnet"],
)
def test_saved_artifact_loads_with_timm_alone(backbone, tmp_path) -> None:
    encoder = Encoder.build(backbone)
    if encoder.is_resnet:  # batch-norm statistics must travel too
        encoder.train()(torch.randn(4, 3, 64, 64) * 3 + 1)
    encoder.save(tmp_path, method="dino")
    facts = json.loads((tmp_path / "encoder.json").read_text())
    assert facts["method"] == "dino"
    plain = timm.create_model(facts["timm"]["name"], **facts["timm"]["kwargs"]).eval()
    plain.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    encoder.eval()
    for size in ((64, 64), (96, 32)):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            theirs, ours = plain.forward_features(image), encoder(image)
            if encoder.is_vit:
                assert torch.equal(theirs[:, plain.num_prefix_tokens :], ours.tokens_BND)
            else:
                assert torch.equal(theirs, ours.map)
            again = Encoder.load(tmp_path).eval()(image)
        assert torch.equal(again.map, ours.map)
        assert torch.equal(again.vector, ours.vector)


def test_load_keeps_normalisation_and_needs_no_checkpoint(tmp_path) -> None:
    save_file(Encoder.build(VIT).model.state_dict(), tmp_path / "w.safetensors")
    start = VIT.model_copy(update={"checkpoint": str(tmp_path / "w.safetensors"), "mean": (0.1, 0.2, 0.3)})
    Encoder.build(start).save(tmp_path / "out")
    (tmp_path / "w.safetensors").unlink()
    before = torch.get_rng_state()
    loaded = Encoder.load(tmp_path / "out")
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert torch.equal(torch.get_rng_state(), before), "loading must not move the caller's random numbers"


def test_untrained_twin_has_the_shape_and_not_the_weights() -> None:
    encoder = Encoder.build(VIT)
    twin, same = encoder.untrained_twin(3), encoder.untrained_twin(3)
    assert features_of(twin, 64, 64).map.shape == features_of(encoder, 64, 64).map.shape
    assert torch.equal(twin.model.blocks[0].attn.qkv.weight, same.model.blocks[0].attn.qkv.weight)
    assert not torch.equal(twin.model.blocks[0].attn.qkv.weight, encoder.model.blocks[0].attn.qkv.weight)


def test_stochastic_depth_is_the_students_alone() -> None:
    student = Encoder.build(VIT.model_copy(update={"drop_path": 0.9}))
    teacher = student.teacher()
    image = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    first, second = student.train()(image).map, student(image).map
    assert not torch.equal(first, second)
    assert torch.equal(teacher.train()(image).map, teacher(image).map)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_sincos_positions_are_not_trained() -> None:
    encoder = Encoder.build(VIT.model_copy(update={"pos_embed": "sincos"}))
    assert not encoder.model.pos_embed.requires_grad
    assert encoder.model.pos_embed[0, 0].abs().sum() == 0, "the [CLS] row is zero"


def test_interpolation_modes_agree_at_the_tables_own_size_only() -> None:
    encoder = Encoder.build(VIT)
    other = Encoder.build(VIT.model_copy(update={"pos_interp": "scale_factor_plus_0.1"}))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(features_of(encoder, 64, 64).map, features_of(other, 64, 64).map)
    larger, plus = features_of(encoder, 96, 128).map, features_of(other, 96, 128).map
    assert not torch.equal(larger, plus)
    torch.testing.assert_close(larger, plus, atol=0.05, rtol=0.05)


def test_resnet_split_and_levels() -> None:
    encoder = Encoder.build(Backbone(name="resnet18")).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.c5(encoder.stem_to_c4(image)), encoder(image).map)
        levels = encoder.levels(image)
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


def test_vit_levels_end_in_the_map() -> None:
    encoder = Encoder.build(VIT).eval()
    image = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        levels = encoder.levels(image, taps=[0, 2])
        assert torch.equal(levels[-1], encoder(image).map)
    assert levels[0].shape == (1, 48, 4, 2)


class Doubling(nn.Module):
    """A stand-in filter: appends the map's first channels, twice as large."""

    placement, extra_width = "post", 5

    def forward(self, map_BDhw):
        return torch.cat([map_BDhw, 2 * map_BDhw[:, :5]], dim=1)


def test_post_filter_widens_map_and_vector() -> None:
    encoder = Encoder.build(VIT)
    bare = features_of(encoder, 64, 64)
    encoder.filter = Doubling()
    filtered = features_of(encoder, 64, 64)
    assert encoder.width == encoder.vector_width == 53
    assert torch.equal(filtered.map[:, :48], bare.map)
    torch.testing.assert_close(filtered.vector[:, 48:], 2 * bare.map[:, :5].mean(dim=(2, 3)))


# -- checkpoints -------------------------------------------------------------------------------------------


def test_checkpoint_of_a_training_script(tmp_path) -> None:
    trained, other = Encoder.build(VIT).model, Encoder.build(VIT).model
    wrapped = {
        "student": {f"module.backbone.{key}": value for key, value in other.state_dict().items()},
        "teacher": {f"module.backbone.{key}": value for key, value in trained.state_dict().items()},
        "epoch": 3,
    }
    wrapped["teacher"]["head.last_layer.weight"] = torch.zeros(3, 3)
    torch.save(wrapped, tmp_path / "c.pth")
    said: list[str] = []
    encoder = Encoder.build(VIT.model_copy(update={"checkpoint": str(tmp_path / "c.pth")}), say=said.append)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in encoder.model.state_dict().items())
    assert any("not in the model: head.last_layer.weight" in line for line in said)


def test_checkpoint_with_another_grid_is_interpolated(tmp_path) -> None:
    save_file(Encoder.build(VIT.model_copy(update={"img_size": 96})).model.state_dict(), tmp_path / "w.safetensors")
    said: list[str] = []
    Encoder.build(VIT.model_copy(update={"checkpoint": str(tmp_path / "w.safetensors")}), say=said.append)
    assert len(said) == 1, said


def test_checkpoint_by_address_and_from_another_working_folder(tmp_path, monkeypatch) -> None:
    trained = Encoder.build(VIT).model.state_dict()
    save_file(trained, tmp_path / "w.safetensors")
    by_address = VIT.model_copy(update={"checkpoint": f"file://{tmp_path}/w.safetensors"})
    monkeypatch.chdir(tmp_path)
    by_path = VIT.model_copy(update={"checkpoint": "w.safetensors"}).anywhere()
    monkeypatch.chdir("/")
    for backbone in (by_address, by_path):
        assert torch.equal(Encoder.build(backbone).model.patch_embed.proj.weight, trained["patch_embed.proj.weight"])


def test_checkpoint_where_nothing_fits_is_refused(tmp_path) -> None:
    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match=r"none of its 1 tensors fits .*layer\.weight.*name the timm model"):
        Encoder.build(VIT.model_copy(update={"checkpoint": str(tmp_path / "w.safetensors")}))


def test_checkpoint_that_would_execute_code_is_refused(tmp_path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "c.pth")
    with pytest.raises(SourceError, match="not a readable file of weights"):
        Encoder.build(VIT.model_copy(update={"checkpoint": str(tmp_path / "c.pth")}))


def test_missing_checkpoint_is_named(tmp_path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.pth: there is no such file"):
        Encoder.build(VIT.model_copy(update={"checkpoint": str(tmp_path / "nowhere.pth")}))


# -- rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "rule"),
    [
        (
            {"name": "vit_smal_patch16_224"},
            "no model called 'vit_smal_patch16_224'; did you mean vit_small_patch16_224",
        ),
        ({"name": "resnet18.mine"}, r"no weights called 'resnet18\.mine'; after the dot may stand a1_in1k"),
        ({"name": "resnet18", "pos_embed": "sincos"}, "resnet18 is not a plain ViT"),
        ({"name": "vit_tiny_patch16_224", "output_stride": 16}, "output_stride: .* is a ViT; remove them"),
        ({"name": "convnext_atto", "out_stage": "c4"}, "out_stage: convnext_atto is not a ResNet"),
        (
            {"name": "vit_tiny_patch16_224", "img_size": 100},
            "100 pixels do not split into patches of 16; set .* 96 or 112",
        ),
        ({"name": "vit_tiny_patch16_224", "kwargs": {"colour": 1}}, "does not accept them.*colour"),
        ({"name": "ghostnet_050", "drop_path": 0.1}, "backbone.drop_path: ghostnet_050 has no stochastic depth"),
    ],
)
def test_rules_of_backbones(backbone, rule) -> None:
    with pytest.raises((UsageError, ValidationError), match=rule):
        Encoder.build(Backbone.model_validate(backbone))


def test_the_catalogue_is_timms_own() -> None:
    from timm.models import _registry as registry

    assert set(timm_catalogue.names()) == set(registry._model_entrypoints)
    for name in timm_catalogue.names():
        model = timm_catalogue.look_up(name)
        assert model is not None
        assert model.module == registry._model_to_module.get(name, model.module)
    for name, with_tags in registry._model_with_tags.items():
        tags = timm_catalogue.tags(name)
        assert not tags or {full.partition(".")[2] for full in with_tags if "." in full} <= set(tags)


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch14_dinov2", "deit_tiny_patch16_224", "vit_base_patch8_224_dino"]
)
def test_the_catalogue_knows_the_patch(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, VisionTransformer)
    assert Backbone(name=name).patch == model.patch_embed.patch_size[0]


def test_settings_import_no_torch() -> None:
    code = "import sys, stages.models.settings; assert not {'torch', 'timm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("placement", ["post", "pre_last"])
def test_filter_travels_with_the_encoder(placement, tmp_path) -> None:
    encoder = Encoder.build(VIT)
    bare = features_of(encoder, 64, 64)
    encoder.filter = ObjectAwareFilter(48, prototypes=5, heads=3, placement=placement)
    filtered = features_of(encoder, 64, 64)
    assert encoder.width == filtered.map.shape[1] == (96 if placement == "post" else 48)
    assert filtered.vector.shape[1] == encoder.vector_width
    assert torch.equal(filtered.map[:, :48], bare.map) == (placement == "post")
    files = encoder.save(tmp_path)
    assert [file.name for file in files] == ["encoder.safetensors", "encoder.json", "filter.safetensors"]
    loaded = Encoder.load(tmp_path)
    assert torch.equal(features_of(loaded, 64, 64).map, filtered.map)
    assert torch.equal(features_of(loaded, 64, 64).vector, filtered.vector)
    twin = encoder.untrained_twin(0)
    assert twin.width == encoder.width
    assert not torch.equal(twin.filter.prototypes, encoder.filter.prototypes)
