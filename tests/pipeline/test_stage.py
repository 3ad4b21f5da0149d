"""Which fields of a config are edges, sources, or outside the fingerprint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.stage import Edge, Input, NoFingerprint, Resources, Settings, Source, StageConfig, edges, sources
from pipeline.stage import unfingerprinted as unfingerprinted_paths


class Mix(Settings):
    from_: Input["images"] = Field(alias="from")
    weight: float = 1.0
    workers: Annotated[int, NoFingerprint] = 1


class MethodLike(Settings):
    name: str


class Neighbourly(MethodLike):
    neighbors: Input["neighbors"]
    extra: Input["encoder", "embeddings"] | None = None


class Everything(StageConfig):
    images: Input["images"] | list[Mix]
    encoders: list[Input["encoder"]] = []
    pair: tuple[Input["boxes"], ...] = ()
    tables: dict[str, Input["superpixels"]] = {}
    either: Input["boxes"] | Input["superpixels"] | None = None
    labels: Input["images"] | dict[str, str] | None = None
    method: MethodLike | None = None
    checkpoint: Source | None = None
    folders: list[Source] = []
    log_every: Annotated[int | None, NoFingerprint] = None
    plain: str = "images"


def test_edges_reach_lists_unions_aliases_and_subclasses() -> None:
    config = Everything(
        images=[Mix.model_validate({"from": "objects"}), Mix.model_validate({"from": "scenes"})],
        encoders=["warm", "cold"],
        pair=("b1", "b2"),
        tables={"slic": "s1"},
        either="b3",
        method=Neighbourly(name="n", neighbors="near"),
    )
    assert edges(config) == [
        Edge("images.0.from", ("images",), "objects"),
        Edge("images.1.from", ("images",), "scenes"),
        Edge("encoders.0", ("encoder",), "warm"),
        Edge("encoders.1", ("encoder",), "cold"),
        Edge("pair.0", ("boxes",), "b1"),
        Edge("pair.1", ("boxes",), "b2"),
        Edge("tables.slic", ("superpixels",), "s1"),
        Edge("either", ("boxes", "superpixels"), "b3"),
        Edge("method.neighbors", ("neighbors",), "near"),
    ]


def test_a_mark_stays_on_its_own_arm_of_a_union() -> None:
    """`labels` may be an edge or a mapping of plain strings, and the strings in a mapping are not stage names."""
    config = Everything(images="scenes", labels={"cat": "feline"})
    assert [edge.path for edge in edges(config)] == ["images"]
    assert [edge.path for edge in edges(Everything(images="a", labels="b"))] == ["images", "labels"]


def test_unset_edges_and_sources_are_left_out() -> None:
    config = Everything(images="scenes")
    assert edges(config) == [Edge("images", ("images",), "scenes")]
    assert sources(config) == {}


def test_either_kind() -> None:
    config = Everything(images="a", method=Neighbourly(name="n", neighbors="x", extra="y"))
    assert edges(config)[-1] == Edge("method.extra", ("encoder", "embeddings"), "y")


def test_sources() -> None:
    config = Everything(images="a", checkpoint="w.pt", folders=["x", "s3://b/y"])
    assert sources(config) == {"checkpoint": "w.pt", "folders.0": "x", "folders.1": "s3://b/y"}


def test_unfingerprinted_names_whole_fields_also_when_unset() -> None:
    config = Everything(images=[Mix.model_validate({"from": "a"})], resources=Resources(cpus=2))
    assert unfingerprinted_paths(config) == ["resources", "images.0.workers", "log_every"]
