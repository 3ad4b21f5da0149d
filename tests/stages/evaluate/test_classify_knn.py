"""The k-NN stage on images whose class is a colour: scores, the random encoder beside, files, bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.errors import SourceError, UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.rows import read_shard
from stages.data.tables import SCHEMAS, Table
from stages.evaluate.classify_knn import ClassifyKnn
from stages.evaluate.classify_knn_settings import ClassifyKnnConfig

from .conftest import RunStage

SMALL = {"resize": 40, "crop": 32, "k": 5, "pooling": "mean"}


def test_scores_table_and_picture(run: RunStage) -> None:
    outcome, made = run(ClassifyKnn, **SMALL)
    assert outcome.metrics["top1"] >= 80, "even random features tell red from blue"
    assert outcome.metrics["top5"] == 100
    assert {"top1_random", "top5_random"} < set(outcome.metrics)
    assert outcome.counts == {"train": 20, "test": 10, "classes": 3, "unreadable": 0}
    table = Table.open(made).take(range(20, 30))
    hits = [row["label"] == row["prediction"] for row in table.to_pylist()]
    assert 100 * sum(hits) / 10 == outcome.metrics["top1"]
    assert [row["rank"] == 0 for row in table.to_pylist()] == hits
    assert json.loads(made.read("metrics.json"))["protocol"]["k"] == 5
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_the_same_config_gives_the_same_numbers_and_rows(run: RunStage) -> None:
    (first, one), (second, two) = run(ClassifyKnn, **SMALL), run(ClassifyKnn, fingerprint="m2", **SMALL)
    assert first.metrics == second.metrics
    assert next(one.shards()).sha256 == next(two.shards()).sha256


def with_labels(store: ArtifactStore, images: Artifact, label_of: dict[int, int]) -> Artifact:
    rows = [row for entry in images.shards() for row in read_shard(images, entry).to_pylist()]
    for row in rows:
        row["label_id"] = label_of.get(row["image_id"], row["label_id"])
    writer = store.begin("images", f"otherlabels{len(label_of)}")
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    return writer.commit(notes={"classes": ["red", "green", "blue", "grey", "black"]})


def test_classes_that_the_vote_cannot_do_justice_to_are_said(
    run: RunStage, store: ArtifactStore, coloured: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ClassifyKnn, images=with_labels(store, coloured, {0: 3, 20: 4, 21: 4}), **SMALL)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 4 classes have one train image only, whose one vote the others of k = 5 can outweigh: grey",
        "2 of 10 test images cannot be right, as no train image is of their class: black",
    ]
    with pytest.raises(SourceError, match="all labelled images of split 'train' are of one class, blue: every vote"):
        run(ClassifyKnn, images=with_labels(store, coloured, dict.fromkeys(range(20), 2)), **SMALL)


def test_without_the_random_encoder(run: RunStage) -> None:
    outcome, _ = run(ClassifyKnn, random_baseline=False, **SMALL)
    assert set(outcome.metrics) == {"top1", "top5"}


def test_an_unreadable_image_is_named_and_left_out(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    rows = [row for entry in coloured.shards() for row in read_shard(coloured, entry).to_pylist()]
    rows[3]["image"] = b"no image"
    writer = store.begin("images", "damaged")
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    outcome, _ = run(ClassifyKnn, images=writer.commit(notes=coloured.manifest.notes), **SMALL)
    assert outcome.counts["train"] == 19
    assert [problem["key"] for problem in outcome.problems] == ["03.png"]


def test_a_crop_larger_than_the_resized_image_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="crop 48 is larger than resize 40; lower crop or raise resize"):
        ClassifyKnnConfig(images="i", encoder="e", crop=48, resize=40)


@pytest.mark.parametrize("module", ["classify_knn", "segment_linear"])
def test_planning_imports_nothing_heavy(module: str) -> None:
    heavy = {"torch", "timm", "cv2", "ray", "numpy"}
    code = f"import sys, stages.evaluate.{module}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"k": 21}, SourceError, r"k is 21, but split 'train' has 20 .*set stages\.eval\.k to 20 or less"),
        (
            {"test_split": "test"},
            SourceError,
            r"no image of split 'test' .* has a label \(images by split: train: 20, val: 10\): set stages\.eval",
        ),
        ({"crop": 36}, UsageError, r"stages\.eval\.crop: 36 pixels do not split into patches of 8: set it to 32 or 40"),
    ],
)
def test_rules(run: RunStage, settings: dict[str, object], error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=rule):
        run(ClassifyKnn, **{**SMALL, **settings})
