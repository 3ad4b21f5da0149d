"""Mistakes in what is exported and where to; each is answered before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.store.store import ArtifactStore
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from tests.mistakes.base import Mistake


def encoder_of_a_later_format(folder: Path) -> None:
    writer = ArtifactStore(str(folder / "store")).begin("encoder", "ab12cd34ef56")
    for file in Encoder.build(Backbone(name="resnet18")).save(writer.scratch):
        if file.name == "encoder.json":
            file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
        writer.put_file(file.name, file)
    writer.commit(uses="pretrain")


IN_EXPORTS = [
    Mistake(
        "46a",
        "a stage that exports nothing",
        ["nn: a stage of type neighbors exports nothing", "a stage that uses", "pretrain"],
        command=["export", "nn", "p.yaml", "--to", "out"],
    ),
    Mistake(
        "46b",
        "a folder that is not empty",
        ["--to photos: the folder is not empty, it holds cat, dog", "name another"],
        command=["export", "warmup", "p.yaml", "--to", "photos"],
    ),
    Mistake(
        "46c",
        "a file in place of a folder",
        ["--to p.yaml/out", "cannot be written", "name another folder"],
        command=["export", "ab12", "--store", "store", "--to", "p.yaml/out"],
        prepare=encoder_of_a_later_format,
    ),
    Mistake(
        "46d",
        "an encoder whose parts the files cannot hold",
        ["encoder/ab12cd34ef56 has parts that an exported encoder cannot hold", "format 2", "the version of Tessera"],
        command=["export", "ab12", "--store", "store", "--to", "out"],
        prepare=encoder_of_a_later_format,
    ),
]
