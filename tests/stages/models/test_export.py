"""An exported encoder gives the evaluated features, vector and every patch, to a process that has not this project."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.cli.export import copy_out
from pipeline.errors import UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.models.encoder import Encoder
from stages.models.export import SNIPPET
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.settings import Backbone
from tests.conftest import ROOT

from .alone import Lines, run_alone

VIT = Backbone(name="vit_tiny_patch16_224", img_size=64, kwargs={"embed_dim": 48, "depth": 3, "num_heads": 3})
FLSL = VIT.model_copy(update={"class_token": False, "pos_embed": "sincos", "pos_interp": "scale_factor_plus_0.1"})
RESNET = Backbone(name="resnet18", img_size=64)
OTHER = ((64, 96), (128, 128))  # image sizes beside the encoder's own


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of encoder: its backbone, its filter, and the sizes of images it takes beside its own."""

    backbone: Backbone
    placement: str | None = None
    sizes: tuple[tuple[int, int], ...] = OTHER

    def build(self) -> Encoder:
        encoder = Encoder.build(self.backbone)
        side = encoder.image_size
        encoder.train()(torch.randn(4, 3, side, side) * 3 + 1)  # batch-norm statistics must travel too
        for parameter in encoder.parameters():  # biases and norms are no longer 0 and 1
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.02
        if self.placement is not None:
            encoder.filter = ObjectAwareFilter(
                encoder.backbone_width, prototypes=5, heads=3 if encoder.is_vit else 1, placement=self.placement
            )
        return encoder.eval()


Made = dict[str, tuple[Artifact, Path, dict]]  # the artifact, the exported folder, what the snippet gave

KINDS = {
    "vit": Kind(VIT),
    "vit_plus_tenth": Kind(VIT.model_copy(update={"pos_interp": "scale_factor_plus_0.1", "drop_path": 0.1})),
    "registers": Kind(VIT.model_copy(update={"kwargs": {**VIT.kwargs, "reg_tokens": 4}})),
    "distilled_plus_tenth": Kind(
        VIT.model_copy(update={"name": "deit_tiny_distilled_patch16_224", "pos_interp": "scale_factor_plus_0.1"})
    ),
    "normalised_otherwise": Kind(VIT.model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)})),
    "flsl": Kind(FLSL),
    "filter_post": Kind(VIT, "post"),
    "filter_pre_last": Kind(VIT, "pre_last"),
    "resnet": Kind(RESNET),
    "resnet_dilated": Kind(RESNET.model_copy(update={"output_stride": 8})),
    "resnet_c4": Kind(RESNET.model_copy(update={"out_stage": "c4"})),
    "resnet_c4_dilated": Kind(RESNET.model_copy(update={"out_stage": "c4", "output_stride": 8})),
    "resnet_c4_filter": Kind(RESNET.model_copy(update={"out_stage": "c4"}), "post"),
    "convnext": Kind(Backbone(name="convnext_atto", kwargs={"depths": [1, 1, 1, 1]})),
    "eva": Kind(
        Backbone(name="eva02_tiny_patch14_224", img_size=56, kwargs={"embed_dim": 48, "depth": 2, "num_heads": 3}),
        sizes=((56, 112),),
    ),
    "swin": Kind(
        Backbone(
            name="swin_tiny_patch4_window7_224",
            img_size=64,
            kwargs={"embed_dim": 24, "depths": [1, 1, 1, 1], "window_size": 2},
        ),
    ),
    "convnext_finer": Kind(Backbone(name="test_convnext", stride=8)),
    "efficientnet_finer": Kind(Backbone(name="test_efficientnet", stride=4), "post"),
    "dinov3": Kind(Backbone(name="vit_small_patch16_dinov3", img_size=64, kwargs=VIT.kwargs)),
    "maxvit_finer": Kind(Backbone(name="test_maxvit", img_size=64, stride=16), sizes=((128, 128),)),
}


def committed(encoder: Encoder, store: ArtifactStore, fingerprint: str = "e1") -> Artifact:
    """The artifact that the pretrain stage would write."""
    writer = store.begin("encoder", fingerprint)
    for file in encoder.save(writer.scratch, method="dino"):
        writer.put_file(file.name, file)
    return writer.commit(uses="pretrain", stage="warmup")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every kind: its artifact, its exported folder, and what the snippet in that folder's README gave."""
    base = tmp_path_factory.mktemp("export")
    store = ArtifactStore(str(base / "store"))
    torch.manual_seed(0)
    artifacts = {name: committed(kind.build(), store, name) for name, kind in KINDS.items()}
    jobs = {}
    for name, artifact in artifacts.items():
        copy_out(artifact, base / name)
        (snippet,) = re.findall(r"```python\n(.*?)```", (base / name / "README.md").read_text(), flags=re.S)
        jobs[name] = Lines(base / name, snippet, [torch.rand(2, 3, *size) for size in KINDS[name].sizes])
    alone = run_alone(jobs, base)
    return {name: (artifacts[name], base / name, alone[name]) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_the_exported_features_are_the_evaluated_ones(name: str, made: Made) -> None:
    artifact, folder, alone = made[name]
    evaluated = Encoder.load(artifact).eval()
    facts = json.loads((folder / "encoder.json").read_text())
    assert len(alone["features"]) == 1 + len(KINDS[name].sizes)
    for images, vector, map_BDhw in alone["features"]:
        mean, std = (torch.tensor(facts["normalisation"][key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            ours = evaluated((images - mean) / std)
        torch.testing.assert_close(vector, ours.vector, atol=1e-5, rtol=0)
        torch.testing.assert_close(map_BDhw, ours.map, atol=1e-5, rtol=0)
        assert map_BDhw.std() > 0.01, "features that differ from patch to patch"
        assert facts["width"] == map_BDhw.shape[1]
        assert facts["vector_width"] == vector.shape[1]
        assert facts["stride"] == images.shape[2] // map_BDhw.shape[2] == images.shape[3] // map_BDhw.shape[3]
    assert json.loads(artifact.read("encoder.json")) == facts, "the numbers of the artifact are as true"
    assert alone["numbers"] == {key: facts[key] for key in alone["numbers"]}


def test_the_projects_readme_prints_the_same_lines(made: Made, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"tessera export cotap[^\n]*--to encoder/\n```\n```python\n(.*?)```", readme, flags=re.S)
    assert snippet == SNIPPET.format(folder="encoder")
    artifact, folder, _ = made["filter_post"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "encoder").symlink_to(folder)
    alone = run_alone({"readme": Lines(tmp_path / "home", snippet)}, tmp_path)
    [[images, vector, map_BDhw]] = alone["readme"]["features"]
    encoder = Encoder.load(artifact).eval()
    with torch.no_grad():
        ours = encoder(encoder.normalise(images))
    torch.testing.assert_close(map_BDhw, ours.map, atol=1e-5, rtol=0)
    torch.testing.assert_close(vector, ours.vector, atol=1e-5, rtol=0)


def test_numbers_of_an_older_artifact_are_mended(tmp_path: Path, store: ArtifactStore) -> None:
    encoder = KINDS["resnet_c4"].build()
    writer = store.begin("encoder", "old")
    for file in encoder.save(writer.scratch):
        if file.name == "encoder.json":
            facts = json.loads(file.read_text())
            del facts["vector_width"]
            file.write_text(json.dumps(facts | {"stride": 4}))
        writer.put_file(file.name, file)
    copy_out(writer.commit(uses="pretrain"), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert (facts["width"], facts["vector_width"], facts["stride"]) == (256, 512, 16)


def filter_of_another_kind(facts: dict) -> dict:
    return facts | {"filter": {"slots": 7}}


@pytest.mark.parametrize(
    ("change", "extra", "words"),
    [
        (filter_of_another_kind, None, "slots"),
        (lambda facts: facts | {"format": 2}, None, "format 2"),
        (lambda facts: facts, "adapter.safetensors", "adapter.safetensors"),
    ],
    ids=["filter", "format", "file"],
)
def test_parts_that_the_files_cannot_hold_are_refused_before_anything_is_written(
    change: Callable[[dict], dict], extra: str | None, words: str, tmp_path: Path, store: ArtifactStore
) -> None:
    writer = store.begin("encoder", "e1")
    for file in Encoder.build(VIT).save(writer.scratch):
        if file.name == "encoder.json":
            file.write_text(json.dumps(change(json.loads(file.read_text()))))
        writer.put_file(file.name, file)
    if extra is not None:
        writer.put_file(extra, b"weights")
    with pytest.raises(UsageError, match=f"parts that an exported encoder cannot hold: .*{words}"):
        copy_out(writer.commit(uses="pretrain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_such_parts_is_not_saved(tmp_path: Path) -> None:
    class OwnFilter(ObjectAwareFilter):
        pass

    encoder = Encoder.build(VIT)
    encoder.filter = OwnFilter(48)
    with pytest.raises(UsageError, match=r"has also filter \(OwnFilter\): keep such parts in the method"):
        encoder.save(tmp_path / "out")
    encoder.filter, encoder.adapter = None, nn.Linear(2, 2)
    with pytest.raises(UsageError, match="has also adapter"):
        encoder.require_savable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["coat_mini", "pit_ti_224"])
def test_a_model_without_a_feature_map_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"name: {name} gives several streams and no single feature map"):
        Backbone(name=name)
